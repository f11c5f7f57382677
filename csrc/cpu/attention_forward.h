#pragma once

#include <atomic>

#include "cpu/attention_softmax.h"

FASTOPT_BEGIN_NAMESPACE

// The forward pass, by the online softmax of Milakov and Gimelshein (2018) in the tiles of
// FlashAttention (Dao et al. 2022): of a block of queries, scores, weights and sums stay in the L2
// cache while the keys go by. Strips of a register tile's height see no more keys than they need.
template <class Storage>
class AttentionForwardPass {
 public:
  using Walk = AttentionWalk<Storage>;
  using T = typename Walk::T;
  using F = typename Walk::F;
  static constexpr int64_t kStrip = Tiling<T>::kTileRows;
  static constexpr int64_t kBlockQueries = 8 * kStrip;
  static constexpr int64_t kProductsOfThread = 1 << 17;
  static constexpr int64_t kTileKeys = 256;
  // Queries that a thread takes at a time, having packed the keys and values for them.
  static constexpr int64_t kTaskQueries = 4 * kBlockQueries;

  explicit AttentionForwardPass(const AttentionForward& call) : call_(call) {
    const AttentionLayer& layer = call.layer;
    // Few queries read each tile once: it is packed when its turn comes, and stays in the L2 cache.
    streams_ = layer.queries <= kBlockQueries;
    const int64_t keys = streams_ ? kTileKeys : rounded_up(layer.keys, kTileKeys);
    key_stride_ = rounded_up(layer.features, Factors<F>::kInWord) + Walk::kSkew;
    output_stride_ = padded_columns<T>(layer.value_features) + Walk::kSkew;
    for (int i = 0; i < threads(); ++i) {
      Scratch& own = scratch_[i];
      own.space.reserve(&own.key_panels, words_of<F>(layer.features) * keys);
      own.space.reserve(&own.value_panels, keys * padded_columns<T>(layer.value_features));
      own.space.reserve(&own.queries, kBlockQueries * key_stride_);
      own.space.reserve(&own.scores, kStrip * kScoreStride);
      own.space.reserve(&own.weights, kStrip * kScoreStride);
      own.space.reserve(&own.outputs, kBlockQueries * output_stride_);
      own.dropout.reserve(own.space, kTileKeys);
      own.space.allocate();
    }
  }

  int threads() const { return Walk::threads(call_.layer, kProductsOfThread); }

  void run(int rank, int) {
    Scratch& own = scratch_[rank];
    const AttentionLayer& whole = call_.layer;
    const int64_t parts = (whole.queries + kTaskQueries - 1) / kTaskQueries;
    const int64_t tasks = whole.batch * whole.heads * parts;
    int64_t packed_for = -1;
    Range packed{};
    for (int64_t task = next_++; task < tasks; task = next_++) {
      const int64_t batch = task / parts / whole.heads, head = task / parts % whole.heads;
      const AttentionForward call = sequence_of<Storage>(call_, batch);
      const AttentionLayer& layer = call.layer;
      // From the last queries on: with causal masks they need the most keys.
      const int64_t begin = (parts - 1 - task % parts) * kTaskQueries;
      const int64_t end =
          begin + kTaskQueries < layer.queries ? begin + kTaskQueries : layer.queries;
      if (begin >= end) continue;
      const Range seen = visible(layer, begin, end);
      const Range tiles{rounded_down(seen.begin, kTileKeys), seen.end};
      const int64_t key_head = key_head_of(layer, head);
      const int64_t source = batch * whole.key_heads + key_head;
      if (!streams_ &&
          (packed_for != source || tiles.begin < packed.begin || tiles.end > packed.end)) {
        for (int64_t tile = tiles.begin; tile < tiles.end; tile += kTileKeys) {
          pack_tile(own, layer, key_head, tile);
        }
        packed_for = source;
        packed = tiles;
      }
      for (int64_t first = begin; first < end; first += kBlockQueries) {
        const int64_t count = end - first < kBlockQueries ? end - first : kBlockQueries;
        run_block(own, call, head, first, count);
      }
    }
  }

 private:
  static constexpr int64_t kScoreStride = kTileKeys + Walk::kSkew;

  struct Scratch {
    Workspace space;
    T* key_panels;    // tiles of K^T: panels of keys, of depth features
    T* value_panels;  // tiles of V: panels of features, of depth kTileKeys
    F* queries;       // [kBlockQueries, features]
    T* scores;        // [kStrip, kTileKeys]
    F* weights;       // the same after the exponential
    T* outputs;       // [kBlockQueries, value_features]
    Gathered<T> gathered[kBlockQueries];
    DropoutScratch<T> dropout;
  };

  T* key_tile(const Scratch& own, const AttentionLayer& layer, int64_t tile) const {
    return own.key_panels + (streams_ ? 0 : words_of<F>(layer.features) * tile);
  }
  T* value_tile(const Scratch& own, const AttentionLayer& layer, int64_t tile) const {
    const int64_t place = streams_ ? 0 : words_of<F>(tile);
    return own.value_panels + place * padded_columns<T>(layer.value_features);
  }

  void pack_tile(Scratch& own, const AttentionLayer& layer, int64_t head, int64_t tile) const {
    const int64_t left = layer.keys - tile, count = left < kTileKeys ? left : kTileKeys;
    const auto key = [&](int64_t n) { return row_of<const Storage>(layer.key, head, tile + n); };
    pack_columns<F>(key, layer.features, count, 0, count, key_tile(own, layer, tile));
    const int64_t columns = layer.value_features;
    const auto value = [&](int64_t n) {
      return row_of<const Storage>(layer.value, head, tile + n);
    };
    pack_rows<F>(value, count, columns, 0, columns, value_tile(own, layer, tile));
  }

  void run_block(Scratch& own, const AttentionForward& call, int64_t head, int64_t first,
                 int64_t count) const {
    const AttentionLayer& layer = call.layer;
    gather_rows(row_of<const Storage>(layer.query, head, first), layer.query.row_stride, count,
                layer.features, own.queries, key_stride_);
    for (int64_t i = 0; i < count; ++i) own.gathered[i] = {};
    for (int64_t i = 0; i < count * output_stride_; ++i) own.outputs[i] = 0;
    const Range seen = visible(layer, first, first + count);
    const int64_t height = tile_height(count, kStrip);
    for (int64_t tile = rounded_down(seen.begin, kTileKeys); tile < seen.end; tile += kTileKeys) {
      const int64_t end = tile + kTileKeys < layer.keys ? tile + kTileKeys : layer.keys;
      if (streams_) pack_tile(own, layer, key_head_of(layer, head), tile);
      for (int64_t row = 0; row < count; row += height) {
        const int64_t rows = count - row < height ? count - row : height;
        run_strip(own, layer, head, first, row, rows, {tile, end});
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      finish_row<Storage>(call, head, first + i, own.gathered[i], own.outputs + i * output_stride_);
    }
  }

  void run_strip(Scratch& own, const AttentionLayer& layer, int64_t head, int64_t first,
                 int64_t row, int64_t rows, Range tile) const {
    Range keys = common(tile, visible(layer, first + row, first + row + rows));
    if (keys.begin == keys.end) return;
    keys = Walk::from_panel(keys, tile);
    const int64_t offset = keys.begin - tile.begin, width = keys.end - keys.begin;
    const int64_t feature_words = words_of<F>(layer.features);
    multiply<F>({own.queries + row * key_stride_, key_stride_}, rows,
                key_tile(own, layer, tile.begin) + feature_words * offset, tile.end - keys.begin,
                width, Depth{feature_words, 0, feature_words}, own.scores, kScoreStride,
                Into::kReplace);
    for (int64_t i = 0; i < rows; ++i) {
      const RowOfWeights<Storage, F> weights(layer, head, first + row + i);
      weights.compute(keys, own.scores + i * kScoreStride, own.weights + i * kScoreStride,
                      own.gathered[row + i], own.outputs + (row + i) * output_stride_, own.dropout);
    }
    const int64_t tile_words = words_of<F>(tile.end - tile.begin);
    multiply<F>({own.weights, kScoreStride}, rows, value_tile(own, layer, tile.begin),
                layer.value_features, layer.value_features,
                Depth{tile_words, words_of<F>(offset), words_of<F>(width)},
                own.outputs + row * output_stride_, output_stride_, Into::kAdd);
  }

  const AttentionForward& call_;
  bool streams_;
  int64_t key_stride_, output_stride_;
  Scratch scratch_[Walk::kMostThreads];
  std::atomic<int64_t> next_{0};
};

FASTOPT_END_NAMESPACE
