#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/range.h"

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
  int threads;                      // for the CPU
  int64_t batch, heads, key_heads;  // heads is a multiple of key_heads
  int64_t queries, keys;            // of the longest sequence of the batch, or an upper bound
  int64_t query_rows, key_rows;     // of the tensors: the same, unless there are sequences
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
  // To be added to, in the type of the arithmetic; laid out as the bias, with strides of its own, 0
  // where several heads or batches share it; or nullptr.
  void* bias_gradient;
  int64_t bias_gradient_strides[3];
  void* sink_gradient;  // [batch, heads], to be written, in the type of the arithmetic; or nullptr
};

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

// The key at no distance from query 0.
HOST_DEVICE int64_t diagonal(const AttentionLayer& layer) {
  return layer.bottom_right ? layer.keys - layer.queries : 0;
}

// The keys that a query sees, as far as left and right bound them.
HOST_DEVICE Range visible(const AttentionLayer& layer, int64_t query) {
  const int64_t center = query + diagonal(layer);
  const int64_t end = layer.right < 0 ? layer.keys : center + layer.right + 1;
  const int64_t begin = layer.left < 0 ? 0 : center - layer.left;
  const int64_t last = clamped(end, 0, layer.keys);
  return {clamped(begin, 0, last), last};
}
// Those of any of the queries [begin, end); bounds never move back.
HOST_DEVICE Range visible(const AttentionLayer& layer, int64_t begin, int64_t end) {
  return {visible(layer, begin).begin, visible(layer, end - 1).end};
}

// The queries that see any of some keys.
HOST_DEVICE Range seeing(const AttentionLayer& layer, Range keys) {
  const int64_t first = keys.begin - diagonal(layer), last = keys.end - 1 - diagonal(layer);
  return {layer.right < 0 ? 0 : clamped(first - layer.right, 0, layer.queries),
          layer.left < 0 ? layer.queries : clamped(last + layer.left + 1, 0, layer.queries)};
}

// The head of keys and values that goes with a head of queries.
HOST_DEVICE int64_t key_head_of(const AttentionLayer& layer, int64_t head) {
  return head / (layer.heads / layer.key_heads);
}

// Where row `number` of a head begins, in the first sequence.
template <class Element>
HOST_DEVICE Element* row_of(const AttentionTensor& tensor, int64_t head, int64_t number) {
  return static_cast<Element*>(tensor.data) + head * tensor.head_stride +
         number * tensor.row_stride;
}

// Where a sequence begins. Starts that leave the tensors, which a card cannot be asked about
// without waiting for it, are brought back into them.
HOST_DEVICE int64_t first_row(const int32_t* starts, int64_t batch, int64_t rows) {
  return starts ? clamped(starts[batch], 0, rows) : 0;
}
HOST_DEVICE int64_t rows_from(const int32_t* starts, int64_t batch, int64_t first, int64_t rows) {
  return clamped(starts[batch + 1], first, rows) - first;
}

template <class Element>
HOST_DEVICE void move_to(AttentionTensor& tensor, int64_t batch, int64_t row) {
  tensor.data =
      static_cast<Element*>(tensor.data) + batch * tensor.batch_stride + row * tensor.row_stride;
}

template <class Storage>
HOST_DEVICE void move_to_sequence(AttentionLayer& layer, int64_t batch) {
  const int64_t first = first_row(layer.query_starts, batch, layer.query_rows);
  const int64_t first_key = first_row(layer.key_starts, batch, layer.key_rows);
  move_to<Storage>(layer.query, batch, first);
  move_to<Storage>(layer.key, batch, first_key);
  move_to<Storage>(layer.value, batch, first_key);
  if (layer.query_starts) {
    layer.queries = rows_from(layer.query_starts, batch, first, layer.query_rows);
  }
  if (layer.key_starts) {
    layer.keys = rows_from(layer.key_starts, batch, first_key, layer.key_rows);
  }
  if (layer.used_keys) layer.keys = clamped(layer.used_keys[batch], 0, layer.keys);
  const int64_t place = batch * layer.mask_strides[0];
  if (layer.bias) layer.bias = static_cast<const Storage*>(layer.bias) + place;
  if (layer.allowed) layer.allowed += place;
  if (layer.slopes) layer.slopes += batch * layer.slope_batch_stride;
  layer.first_head = batch * layer.heads;
  layer.batch = 1;
}

// A call as if one sequence were all of the batch.
template <class Storage>
HOST_DEVICE AttentionForward sequence_of(AttentionForward call, int64_t batch) {
  const int64_t first = first_row(call.layer.query_starts, batch, call.layer.query_rows);
  move_to<Storage>(call.output, batch, first);
  move_to<ComputeType<Storage>>(call.logsumexp, batch, first);
  move_to_sequence<Storage>(call.layer, batch);
  return call;
}
template <class Storage>
HOST_DEVICE AttentionBackward sequence_of(AttentionBackward call, int64_t batch) {
  using T = ComputeType<Storage>;
  const int64_t first = first_row(call.layer.query_starts, batch, call.layer.query_rows);
  const int64_t first_key = first_row(call.layer.key_starts, batch, call.layer.key_rows);
  move_to<Storage>(call.output, batch, first);
  move_to<Storage>(call.output_gradient, batch, first);
  move_to<Storage>(call.query_gradient, batch, first);
  move_to<T>(call.logsumexp, batch, first);
  move_to<Storage>(call.key_gradient, batch, first_key);
  move_to<Storage>(call.value_gradient, batch, first_key);
  if (call.bias_gradient) {
    call.bias_gradient =
        static_cast<T*>(call.bias_gradient) + batch * call.bias_gradient_strides[0];
  }
  if (call.sink_gradient) {
    call.sink_gradient = static_cast<T*>(call.sink_gradient) + batch * call.layer.heads;
  }
  move_to_sequence<Storage>(call.layer, batch);
  return call;
}

FASTOPT_END_NAMESPACE
