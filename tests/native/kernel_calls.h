#pragma once

#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "core/with_storage.h"
#include "cpu/dispatch.h"

// Memory of one call, with the same numbers in it every time.
class Memory {
 public:
  using Contents = std::vector<std::vector<char>>;

  template <class T>
  T* zeros(int64_t count) {
    const size_t bytes = (count * sizeof(T) + kAlignment) / kAlignment * kAlignment;
    char* data = static_cast<char*>(std::aligned_alloc(kAlignment, bytes));
    if (!data) throw std::bad_alloc();
    std::fill(data, data + bytes, char{0});
    buffers_.push_back({std::unique_ptr<char, Free>(data), bytes});
    return reinterpret_cast<T*>(data);
  }

  template <class T>
  T* copy(const std::vector<T>& values) {
    T* target = zeros<T>(values.size());
    std::copy(values.begin(), values.end(), target);
    return target;
  }

  void* draw(fastopt::DType dtype, int64_t count, double low = -1, double high = 1) {
    return fastopt::with_storage(dtype, [&](auto storage) -> void* {
      using Storage = decltype(storage);
      Storage* target = zeros<Storage>(count);
      for (int64_t i = 0; i < count; ++i) {
        const double part = static_cast<double>(random_() >> 11) / (int64_t{1} << 53);
        fastopt::store(target + i,
                       static_cast<fastopt::ComputeType<Storage>>(low + (high - low) * part));
      }
      return target;
    });
  }

  Contents contents() const {
    Contents copies;
    for (const Buffer& buffer : buffers_) {
      copies.emplace_back(buffer.data.get(), buffer.data.get() + buffer.bytes);
    }
    return copies;
  }
  void restore(const Contents& copies) {
    for (size_t i = 0; i < buffers_.size(); ++i) {
      std::copy(copies[i].begin(), copies[i].end(), buffers_[i].data.get());
    }
  }

 private:
  static constexpr size_t kAlignment = 64;
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  struct Buffer {
    std::unique_ptr<char, Free> data;
    size_t bytes;
  };
  std::vector<Buffer> buffers_;
  std::mt19937_64 random_{1};
};

// A call of a kernel, ready to be made on a number of threads.
struct KernelCall {
  Memory memory;
  std::function<void(const fastopt::InstructionSet& set, int threads)> run;
};

struct KernelCase {
  std::string name;
  std::function<void(KernelCall& call)> prepare;
};

// Every kernel of csrc/cpu in every dtype, on shapes that neither vectors, tiles nor threads divide
// evenly.
std::vector<KernelCase> kernel_cases();
