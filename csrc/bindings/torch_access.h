#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>

// torch's memory, reached without torch's headers: addresses, shapes and strides through the DLPack
// exchange API that torch.Tensor carries, and addresses alone, ten times cheaper, through the C ABI
// that torch keeps stable for models compiled ahead of time.
namespace fastopt::torch_access {

// As in dlpack.h, version 1.3.
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;

  bool operator!=(const DLDataType& other) const {
    return code != other.code || bits != other.bits || lanes != other.lanes;
  }
};
struct DLTensor {
  void* data;
  int32_t device_type;
  int32_t device_id;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;

  void* address() const { return static_cast<char*>(data) + byte_offset; }
};
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLFloat = 2;
constexpr uint8_t kDLBfloat = 4;
constexpr uint8_t kDLComplex = 5;

// Looks both interfaces up in the torch given. Returns what is missing, in words, or "".
std::string initialise(pybind11::module_ torch);

// False where torch cannot describe the object so: no tensor, not strided, or without memory.
bool describe(PyObject* object, DLTensor& tensor);

// True for torch.Tensor and torch.nn.Parameter themselves, not for their subclasses.
bool has_plain_type(PyObject* object);

// A view whose elements are the negated or conjugated ones of its memory; DLPack does not tell.
bool is_lazily_changed(PyObject* tensor, const DLTensor& description);

PyObject* gradient_of(PyObject* tensor);  // a new reference

// A tensor's address at any time. Holds a reference to the tensor.
class TensorHandle {
 public:
  TensorHandle() = default;
  explicit TensorHandle(pybind11::handle tensor);
  ~TensorHandle();
  TensorHandle(TensorHandle&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  TensorHandle& operator=(TensorHandle&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  void* address() const;
  // Brings in what address() is going to read.
  void prefetch() const { __builtin_prefetch(*static_cast<void* const*>(handle_)); }

 private:
  void* handle_ = nullptr;
};

}  // namespace fastopt::torch_access
