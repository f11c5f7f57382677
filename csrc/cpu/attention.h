#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastopt {

// Elements of [batch, heads, rows, features]: features are contiguous, strides are in elements.
struct AttentionTensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// softmax(cap(scale * Q K^T) - slope * distance + bias) V, by rows of Q. Query i sees the keys from
// i + diagonal - left to i + diagonal + right; a negative left or right means no bound.
struct AttentionLayer {
  DType dtype;
  int threads;
  int64_t batch, heads, key_heads;  // heads is a multiple of key_heads
  int64_t queries, keys, features, value_features;
  AttentionTensor query, key, value;
  double scale;
  double softcap;  // cap(x) = softcap * tanh(x / softcap); 0: cap(x) = x
  int64_t left, right, diagonal;
  // [batch, heads, queries, keys], a stride of 0 where it is the same for all; keys are contiguous.
  // `bias` is added; where `allowed` is 0, the key is not seen. At most one of them is there.
  const void* bias;
  const uint8_t* allowed;
  int64_t mask_strides[3];
  const float* slopes;  // of ALiBi, -slope * |i + diagonal - j| is added; or nullptr
  int64_t slope_batch_stride;
  double dropout;  // probability of a weight to be dropped, the others grow by 1 / (1 - dropout)
  uint64_t seed;
};

struct AttentionForward {
  AttentionLayer layer;
  AttentionTensor output;
  void* logsumexp;  // [batch, heads, queries] in the type of the arithmetic
};

struct AttentionBackward {
  AttentionLayer layer;
  AttentionTensor output, output_gradient;
  const void* logsumexp;
  // To be written.
  AttentionTensor query_gradient, key_gradient, value_gradient;
  // To be added to, in the type of the arithmetic; laid out as the bias, with strides of its own.
  void* bias_gradient;  // or nullptr
  int64_t bias_gradient_strides[3];
};

// What one instruction set offers.
struct AttentionKernels {
  void (*forward)(const AttentionForward& call);
  void (*backward)(const AttentionBackward& call);
  // The words that dropout compares, [rows, keys] of one head.
  void (*random_words)(uint64_t seed, int64_t head, int64_t rows, int64_t keys, uint32_t* words);
};

}  // namespace fastopt
