#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/gemm.h"

FASTOPT_BEGIN_NAMESPACE

// Memory of a call, handed out in aligned pieces: first everybody says what is needed, then all of
// it is allocated at once.
class Workspace {
 public:
  template <class T>
  void reserve(T** pointer, int64_t count) {
    if (count_ == kMost) throw std::bad_alloc();
    requests_[count_++] = {reinterpret_cast<void**>(pointer), bytes_};
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + kAlignment - 1) / kAlignment * kAlignment;
  }
  void allocate() {
    memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, bytes_ + kAlignment)));
    if (!memory_) throw std::bad_alloc();
    for (int i = 0; i < count_; ++i) *requests_[i].pointer = memory_.get() + requests_[i].offset;
  }

 private:
  static constexpr int64_t kAlignment = 64;
  static constexpr int kMost = 64;
  struct Request {
    void** pointer;
    int64_t offset;
  };
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  // No std::vector here: what the linker merges must not be compiled for an instruction set.
  Request requests_[kMost];
  int count_ = 0;
  int64_t bytes_ = 0;
  std::unique_ptr<char, Free> memory_;
};

template <class From, class To>
void convert_row(const From* source, int64_t count, To* target) {
  using T = ComputeType<To>;
  for_each_lanes<T>(count, [&](int64_t i, auto lanes) {
    store(target + i, load_as<decltype(lanes)>(source + i));
  });
}

// Zeros for what fills up the last word of each row, `count` factors long.
template <class F>
void fill_last_words(F* rows, int64_t row_count, int64_t row_stride, int64_t count) {
  if (count % Factors<F>::kInWord == 0) return;
  for (int64_t row = 0; row < row_count; ++row) store(rows + row * row_stride + count, SumOf<F>(0));
}

FASTOPT_END_NAMESPACE
