#pragma once

#include <cstdint>

#include "core/operands.h"

namespace fastopt {

// The unit in which work is shared out and converted. Fixed, so that an element meets the same
// instructions, and gets the same bits, whatever the number of threads. 512 elements in fp32, six
// operands: 12 KB of a 32 KB L1.
constexpr int64_t kTile = 512;

constexpr int64_t tiles_of(int64_t numel) { return (numel + kTile - 1) / kTile; }

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

// n elements of one operand, from the `start`-th of the walk on, as runs of equal stride:
// visit(offset of the first element, stride, elements).
template <class Visitor>
void for_each_run(const Walk& walk, int operand, int64_t start, int64_t n, Visitor visit) {
  const int64_t* strides = walk.strides[operand];
  int64_t index[kMaxDims];
  int64_t offset = 0;
  for (int d = walk.dims - 1; d >= 0; --d) {
    index[d] = start % walk.sizes[d];
    start /= walk.sizes[d];
    offset += index[d] * strides[d];
  }
  const int inner = walk.dims - 1;
  while (n > 0) {
    const int64_t left = walk.sizes[inner] - index[inner];
    const int64_t run = n < left ? n : left;
    visit(offset, strides[inner], run);
    n -= run;
    offset += run * strides[inner];
    index[inner] += run;
    for (int d = inner; d > 0 && index[d] == walk.sizes[d]; --d) {
      offset += strides[d - 1] - index[d] * strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// One operand's share of a tile: its own memory where that is contiguous, otherwise a copy.
template <class Storage>
class OperandTile {
 public:
  Storage* load_tile(void* data, const Walk* walk, int operand, int64_t start, int64_t n) {
    data_ = static_cast<Storage*>(data);
    walk_ = walk;
    operand_ = operand;
    start_ = start;
    size_ = n;
    if (!walk_) return data_ + start;
    Storage* target = buffer_;
    for_each_run(*walk_, operand, start, n, [&](int64_t offset, int64_t stride, int64_t run) {
      for (int64_t i = 0; i < run; ++i) target[i] = data_[offset + i * stride];
      target += run;
    });
    return buffer_;
  }

  void store_tile() {
    if (!walk_) return;
    const Storage* source = buffer_;
    for_each_run(*walk_, operand_, start_, size_, [&](int64_t offset, int64_t stride, int64_t run) {
      for (int64_t i = 0; i < run; ++i) data_[offset + i * stride] = source[i];
      source += run;
    });
  }

 private:
  alignas(64) Storage buffer_[kTile];
  Storage* data_;
  const Walk* walk_;
  int operand_;
  int64_t start_, size_;
};

FASTOPT_END_NAMESPACE
