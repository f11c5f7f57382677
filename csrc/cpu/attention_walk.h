#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

FASTOPT_BEGIN_NAMESPACE

HOST_DEVICE int64_t rounded_down(int64_t value, int64_t grain) { return value / grain * grain; }
HOST_DEVICE int64_t rounded_up(int64_t value, int64_t grain) {
  return (value + grain - 1) / grain * grain;
}
HOST_DEVICE int64_t clamped(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

// What two ranges have in common; nothing is {place, place}.
HOST_DEVICE Range common(Range left, Range right, int64_t place = 0) {
  const int64_t begin = left.begin > right.begin ? left.begin : right.begin;
  const int64_t end = left.end < right.end ? left.end : right.end;
  return begin < end ? Range{begin, end} : Range{place, place};
}

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

// Sizes and the way to one sequence of the batch.
template <class Storage>
struct AttentionWalk {
  using T = ComputeType<Storage>;
  using F = typename FactorOf<Storage>::type;
  static constexpr int64_t kSkew = 16;  // rows a power of two apart would share cache sets
  static constexpr int64_t kPanel = Tiling<T>::kPanel;
  static constexpr int kMostThreads = 64;

  // A thread is worth waking for so many products of queries with keys and weights with values.
  static int threads(const AttentionLayer& layer, int64_t products) {
    const int64_t all = layer.batch * layer.heads * layer.queries * layer.keys *
                        (layer.features + layer.value_features);
    const int64_t most = layer.threads < kMostThreads ? layer.threads : kMostThreads;
    return static_cast<int>(clamped(all / products, 1, most));
  }

  // Keys of a tile, from the edge of a panel on, in whole words of factors.
  static Range from_panel(Range keys, Range tile) {
    const int64_t end = tile.begin + rounded_up(keys.end - tile.begin, Factors<F>::kInWord);
    return {tile.begin + rounded_down(keys.begin - tile.begin, kPanel),
            end < tile.end ? end : tile.end};
  }

  // A call as if one sequence were all of the batch.
  static AttentionForward sequence(AttentionForward call, int64_t batch) {
    const int64_t first = first_row(call.layer.query_starts, batch);
    move<Storage>(call.output, batch, first);
    move<T>(call.logsumexp, batch, first);
    move(call.layer, batch);
    return call;
  }
  static AttentionBackward sequence(AttentionBackward call, int64_t batch) {
    const int64_t first = first_row(call.layer.query_starts, batch);
    const int64_t first_key = first_row(call.layer.key_starts, batch);
    move<Storage>(call.output, batch, first);
    move<Storage>(call.output_gradient, batch, first);
    move<Storage>(call.query_gradient, batch, first);
    move<T>(call.logsumexp, batch, first);
    move<Storage>(call.key_gradient, batch, first_key);
    move<Storage>(call.value_gradient, batch, first_key);
    if (call.bias_gradient) {
      call.bias_gradient =
          static_cast<T*>(call.bias_gradient) + batch * call.bias_gradient_strides[0];
    }
    if (call.sink_gradient) {
      call.sink_gradient = static_cast<T*>(call.sink_gradient) + batch * call.layer.heads;
    }
    move(call.layer, batch);
    return call;
  }

 private:
  static int64_t first_row(const int32_t* starts, int64_t batch) {
    return starts ? starts[batch] : 0;
  }

  template <class Element>
  static void move(AttentionTensor& tensor, int64_t batch, int64_t row) {
    tensor.data =
        static_cast<Element*>(tensor.data) + batch * tensor.batch_stride + row * tensor.row_stride;
  }

  static void move(AttentionLayer& layer, int64_t batch) {
    move<Storage>(layer.query, batch, first_row(layer.query_starts, batch));
    move<Storage>(layer.key, batch, first_row(layer.key_starts, batch));
    move<Storage>(layer.value, batch, first_row(layer.key_starts, batch));
    if (layer.query_starts) {
      layer.queries = layer.query_starts[batch + 1] - layer.query_starts[batch];
    }
    if (layer.key_starts) layer.keys = layer.key_starts[batch + 1] - layer.key_starts[batch];
    if (layer.used_keys) layer.keys = layer.used_keys[batch];
    const int64_t place = batch * layer.mask_strides[0];
    if (layer.bias) layer.bias = static_cast<const Storage*>(layer.bias) + place;
    if (layer.allowed) layer.allowed += place;
    if (layer.slopes) layer.slopes += batch * layer.slope_batch_stride;
    layer.first_head = batch * layer.heads;
    layer.batch = 1;
  }
};

// Copies rows as factors, with zeros up to whole words.
template <class F, class Storage>
void gather_rows(const Storage* source, int64_t source_stride, int64_t rows, int64_t count,
                 F* target, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    convert_row(source + row * source_stride, count, target + row * stride);
  }
  fill_last_words(target, rows, stride, count);
}

FASTOPT_END_NAMESPACE
