#pragma once

#include <cstdint>

#include "core/attention_layer.h"

namespace fastopt {

// What one instruction set offers.
struct AttentionKernels {
  void (*forward)(const AttentionForward& call);
  void (*backward)(const AttentionBackward& call);
  // The words that dropout compares, [rows, keys] of one head.
  void (*random_words)(uint64_t seed, int64_t head, int64_t first_row, int64_t rows, int64_t keys,
                       uint32_t* words);
};

}  // namespace fastopt
