#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

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
constexpr int32_t kDLCPU = 1;
constexpr int32_t kDLCUDA = 2;
constexpr uint8_t kDLInt = 0;
constexpr uint8_t kDLUInt = 1;
constexpr uint8_t kDLFloat = 2;
constexpr uint8_t kDLBfloat = 4;
constexpr uint8_t kDLComplex = 5;

// What a tensor is made of, as either interface tells it; the pointers are torch's own.
struct Description {
  void* data;
  DLDataType dtype;  // through a handle: torch's own code for it, which only a handle gives
  int32_t device_type, device_index;  // through a handle: not told
  int32_t dims;
  const int64_t* sizes;
  const int64_t* strides;  // in elements
};

// A description kept, to be compared with a later one of the same interface.
class Fingerprint {
 public:
  Fingerprint() = default;
  explicit Fingerprint(const Description& tensor);
  bool matches(const Description& tensor) const;
  bool has_sizes_of(const Description& tensor) const;
  void* data() const { return data_; }
  DLDataType dtype() const { return dtype_; }

 private:
  void* data_ = nullptr;
  DLDataType dtype_{};
  std::vector<int64_t> sizes_, strides_;
};

// Looks both interfaces up in the torch given. Returns what is missing, in words, or "".
std::string initialise(pybind11::module_ torch);

// False where torch cannot describe the object so: no tensor, not strided, or without memory.
bool describe(PyObject* object, Description& tensor);

// True for torch.Tensor and torch.nn.Parameter themselves, not for their subclasses.
bool has_plain_type(PyObject* object);

// A view whose elements are the negated or conjugated ones of its memory; DLPack does not tell.
bool is_lazily_changed(PyObject* tensor, const Description& description);

// A new reference. The object must be a tensor.
PyObject* gradient_of(PyObject* tensor);

bool requires_grad(PyObject* tensor);

// A tensor's description at any time, through the C ABI. Holds a reference to the tensor.
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
  Description describe() const;
  // Brings in what describe() is going to read.
  void prefetch() const { __builtin_prefetch(*static_cast<void* const*>(handle_)); }

 private:
  void* handle_ = nullptr;
};

}  // namespace fastopt::torch_access
