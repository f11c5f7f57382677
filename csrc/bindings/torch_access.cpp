#include "bindings/torch_access.h"

#include <dlfcn.h>

#include <algorithm>
#include <string>
#include <type_traits>

namespace py = pybind11;

namespace fastopt::torch_access {

namespace {

// As in dlpack.h, version 1.3.
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLPackExchangeAPI {
  uint32_t major_version, minor_version;
  DLPackExchangeAPI* previous;
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  int (*dltensor_from_py_object)(void* object, DLTensor* tensor);
  void* current_work_stream;
};

// Borrowed from torch, which outlives this module.
struct Torch {
  const DLPackExchangeAPI* dlpack = nullptr;
  int32_t (*get_data_ptr)(void* handle, void** address) = nullptr;
  int32_t (*get_dtype)(void* handle, int32_t* dtype) = nullptr;
  int32_t (*get_dim)(void* handle, int64_t* dims) = nullptr;
  int32_t (*get_sizes)(void* handle, int64_t** sizes) = nullptr;
  int32_t (*get_strides)(void* handle, int64_t** strides) = nullptr;
  int32_t (*delete_handle)(void* handle) = nullptr;
  PyObject* new_handle = nullptr;
  PyObject* tensor_type = nullptr;
  PyObject* parameter_type = nullptr;
  const PyMethodDef* is_neg = nullptr;
  const PyMethodDef* is_conj = nullptr;
  const PyGetSetDef* grad = nullptr;
  const PyGetSetDef* requires_grad = nullptr;
};
Torch torch_;

// What a type written in C calls for an attribute, without the way there: a third of the time.
const PyMethodDef* method_of(py::handle type, const char* name) {
  py::object descriptor = type.attr(name);
  if (Py_TYPE(descriptor.ptr()) != &PyMethodDescr_Type) return nullptr;
  const PyMethodDef* method = reinterpret_cast<PyMethodDescrObject*>(descriptor.ptr())->d_method;
  return method->ml_flags == METH_NOARGS ? method : nullptr;
}

const PyGetSetDef* property_of(py::handle type, const char* name) {
  py::object descriptor = type.attr(name);
  if (Py_TYPE(descriptor.ptr()) != &PyGetSetDescr_Type) return nullptr;
  return reinterpret_cast<PyGetSetDescrObject*>(descriptor.ptr())->d_getset;
}

bool is_true(const PyMethodDef* method, PyObject* tensor) {
  PyObject* answer = method->ml_meth(tensor, nullptr);
  if (!answer) throw py::error_already_set();
  const bool result = answer == Py_True;
  Py_DECREF(answer);
  return result;
}

}  // namespace

std::string initialise(py::module_ torch) {
  py::object tensor_type = torch.attr("Tensor");
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__")) {
    return "this torch has no DLPack exchange API (torch.Tensor.__dlpack_c_exchange_api__)";
  }
  torch_.dlpack = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(
      tensor_type.attr("__dlpack_c_exchange_api__").ptr(), "dlpack_exchange_api"));
  if (!torch_.dlpack || torch_.dlpack->major_version != 1 ||
      !torch_.dlpack->dltensor_from_py_object) {
    PyErr_Clear();
    return "this torch has another version of the DLPack exchange API";
  }
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  bool complete = library != nullptr;
  const auto find = [&](auto& function, const char* name) {
    void* symbol = library ? dlsym(library, name) : nullptr;
    function = reinterpret_cast<std::decay_t<decltype(function)>>(symbol);
    complete = complete && symbol;
  };
  find(torch_.get_data_ptr, "aoti_torch_get_data_ptr");
  find(torch_.get_dtype, "aoti_torch_get_dtype");
  find(torch_.get_dim, "aoti_torch_get_dim");
  find(torch_.get_sizes, "aoti_torch_get_sizes");
  find(torch_.get_strides, "aoti_torch_get_strides");
  find(torch_.delete_handle, "aoti_torch_delete_tensor_object");
  if (library) dlclose(library);
  py::object aoti = py::getattr(torch.attr("_C"), "_aoti", py::none());
  const char* new_handle = "unsafe_alloc_void_ptr_from_tensor";
  if (!complete || !py::hasattr(aoti, new_handle)) {
    return "this torch has no stable C ABI (aoti_torch_get_data_ptr)";
  }
  torch_.is_neg = method_of(tensor_type, "is_neg");
  torch_.is_conj = method_of(tensor_type, "is_conj");
  torch_.grad = property_of(tensor_type, "grad");
  torch_.requires_grad = property_of(tensor_type, "requires_grad");
  if (!torch_.is_neg || !torch_.is_conj || !torch_.grad || !torch_.requires_grad) {
    return "this torch does not write torch.Tensor.grad or is_neg in C";
  }
  const auto kept = [](py::object object) { return object.release().ptr(); };
  torch_.new_handle = kept(aoti.attr(new_handle));
  torch_.parameter_type = kept(torch.attr("nn").attr("Parameter"));
  torch_.tensor_type = kept(tensor_type);
  return "";
}

bool describe(PyObject* object, Description& tensor) {
  DLTensor source;
  if (torch_.dlpack->dltensor_from_py_object(object, &source) != 0) {
    PyErr_Clear();
    return false;
  }
  tensor = {static_cast<char*>(source.data) + source.byte_offset,
            source.dtype,
            source.device_type,
            source.device_id,
            source.ndim,
            source.shape,
            source.strides};
  if (source.data) return true;
  // Zero tensors and functorch's wrappers have no memory; only an empty tensor may have none.
  for (int d = 0; d < source.ndim; ++d) {
    if (source.shape[d] == 0) return true;
  }
  return false;
}

Fingerprint::Fingerprint(const Description& tensor)
    : data_(tensor.data),
      dtype_(tensor.dtype),
      sizes_(tensor.sizes, tensor.sizes + tensor.dims),
      strides_(tensor.strides, tensor.strides + tensor.dims) {}

bool Fingerprint::has_sizes_of(const Description& tensor) const {
  return static_cast<int>(sizes_.size()) == tensor.dims &&
         std::equal(sizes_.begin(), sizes_.end(), tensor.sizes);
}

bool Fingerprint::matches(const Description& tensor) const {
  return tensor.data == data_ && !(tensor.dtype != dtype_) && has_sizes_of(tensor) &&
         std::equal(strides_.begin(), strides_.end(), tensor.strides);
}

bool has_plain_type(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == torch_.tensor_type || type == torch_.parameter_type;
}

bool is_lazily_changed(PyObject* tensor, const Description& description) {
  return is_true(torch_.is_neg, tensor) ||
         (description.dtype.code == kDLComplex && is_true(torch_.is_conj, tensor));
}

PyObject* gradient_of(PyObject* tensor) {
  PyObject* grad = torch_.grad->get(tensor, torch_.grad->closure);
  if (!grad) throw py::error_already_set();
  return grad;
}

bool requires_grad(PyObject* tensor) {
  PyObject* answer = torch_.requires_grad->get(tensor, torch_.requires_grad->closure);
  if (!answer) throw py::error_already_set();
  const bool result = answer == Py_True;
  Py_DECREF(answer);
  return result;
}

TensorHandle::TensorHandle(py::handle tensor) {
  py::object capsule =
      py::reinterpret_steal<py::object>(PyObject_CallOneArg(torch_.new_handle, tensor.ptr()));
  if (!capsule) throw py::error_already_set();
  handle_ = PyCapsule_GetPointer(capsule.ptr(), nullptr);
  if (!handle_) throw py::error_already_set();
}

TensorHandle::~TensorHandle() {
  if (handle_) torch_.delete_handle(handle_);
}

Description TensorHandle::describe() const {
  Description tensor{};
  int32_t dtype = 0;
  int64_t dims = 0;
  int64_t *sizes = nullptr, *strides = nullptr;
  if (torch_.get_data_ptr(handle_, &tensor.data) || torch_.get_dtype(handle_, &dtype) ||
      torch_.get_dim(handle_, &dims) || torch_.get_sizes(handle_, &sizes) ||
      torch_.get_strides(handle_, &strides)) {
    return {};
  }
  tensor.dtype.code = static_cast<uint8_t>(dtype);
  tensor.dims = static_cast<int32_t>(dims);
  tensor.sizes = sizes;
  tensor.strides = strides;
  return tensor;
}

}  // namespace fastopt::torch_access
