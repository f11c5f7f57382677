#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastopt {

// Elements of [batch, heads, rows, features]: features are contiguous, strides are in elements.
struct AttentionTensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;
};

// softmax(cap(scale * Q K^T) - slope * distance + bias) V, by rows of Q. Query i stands at key
// i + diagonal, where the diagonal is 0 or, from the bottom right, keys - queries, and sees the
// keys from `left` before to `right` behind it; a negative bound is none.
struct AttentionLayer {
  DType dtype;
  int threads;
  int64_t batch, heads, key_heads;  // heads is a multiple of key_heads
  int64_t queries, keys;            // of the longest sequence of the batch
  int64_t features, value_features;
  AttentionTensor query, key, value;
  // Sequences of different lengths have their rows behind each other: those of sequence b begin at
  // row starts[b] and end before starts[b + 1], and batch strides are 0. Or nullptr.
  const int32_t* query_starts;
  const int32_t* key_starts;
  const int32_t* used_keys;  // of each sequence, how many keys there are; or nullptr: all
  double scale;
  double softcap;  // cap(x) = softcap * tanh(x / softcap); 0: cap(x) = x
  int64_t left, right;
  bool bottom_right;
  // [batch, heads, queries, keys], a stride of 0 where it is the same for all; keys are contiguous.
  // `bias` is added; where `allowed` is 0, the key is not seen. At most one of them is there.
  const void* bias;
  const uint8_t* allowed;
  int64_t mask_strides[3];
  const float* slopes;  // of ALiBi, -slope * |i + diagonal - j| is added; or nullptr
  int64_t slope_batch_stride;
  // [heads], in the type of the arithmetic: the score of one more key, whose value is 0; or
  // nullptr.
  const void* sinks;
  double dropout;  // probability of a weight to be dropped, the others grow by 1 / (1 - dropout)
  uint64_t seed;
  int64_t first_head;  // the number of head 0 in the whole batch: 0 unless this is a part of it
};

// In these two, logsumexp is [batch, heads, queries] in the type of the arithmetic.
struct AttentionForward {
  AttentionLayer layer;
  AttentionTensor output, logsumexp;
  bool inference;  // no backward pass follows, which would have to meet the same scores
};

struct AttentionBackward {
  AttentionLayer layer;
  AttentionTensor output, output_gradient, logsumexp;
  // To be written.
  AttentionTensor query_gradient, key_gradient, value_gradient;
  // To be added to, in the type of the arithmetic; laid out as the bias, with strides of its own.
  void* bias_gradient;  // or nullptr
  int64_t bias_gradient_strides[3];
  void* sink_gradient;  // [batch, heads], to be written, in the type of the arithmetic; or nullptr
};

// What one instruction set offers.
struct AttentionKernels {
  void (*forward)(const AttentionForward& call);
  void (*backward)(const AttentionBackward& call);
  // The words that dropout compares, [rows, keys] of one head.
  void (*random_words)(uint64_t seed, int64_t head, int64_t rows, int64_t keys, uint32_t* words);
};

}  // namespace fastopt
