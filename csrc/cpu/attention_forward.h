#pragma once

#include <atomic>
#include <cmath>
#include <type_traits>

#include "cpu/attention_walk.h"

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
  static constexpr int64_t kTileKeys = 256;
  // So few queries are multiplied with keys and values as they lie in memory, which sets the pace.
  static constexpr int64_t kDirectQueries = 4;
  // Queries that a thread takes at a time, having packed the keys and values for them.
  static constexpr int64_t kTaskQueries = 4 * kBlockQueries;

  explicit AttentionForwardPass(const AttentionForward& call)
      : call_(call), layer_(call.layer), walk_{call.layer} {
    // Few queries read each tile once: it is packed when its turn comes, and stays in the L2 cache.
    streams_ = layer_.queries <= kBlockQueries;
    const int64_t keys = streams_ ? kTileKeys : rounded_up(layer_.keys, kTileKeys);
    key_stride_ = rounded_up(layer_.features, Factors<F>::kInWord) + Walk::kSkew;
    output_stride_ = padded_columns<T>(layer_.value_features) + Walk::kSkew;
    for (int i = 0; i < threads(); ++i) {
      Scratch& own = scratch_[i];
      own.space.reserve(&own.key_panels, words_of<F>(layer_.features) * keys);
      own.space.reserve(&own.value_panels, keys * padded_columns<T>(layer_.value_features));
      own.space.reserve(&own.queries, kBlockQueries * key_stride_);
      own.space.reserve(&own.scores, kStrip * kScoreStride);
      own.space.reserve(&own.weights, kStrip * kScoreStride);
      own.space.reserve(&own.outputs, kBlockQueries * output_stride_);
      own.space.reserve(&own.factors, kTileKeys);
      own.space.reserve(&own.words, kTileKeys + 2 * kRandomGroup);
      own.space.allocate();
    }
  }

  int threads() const { return Walk::threads(layer_); }

  void run(int rank) {
    Scratch& own = scratch_[rank];
    const int64_t parts = (layer_.queries + kTaskQueries - 1) / kTaskQueries;
    const int64_t tasks = layer_.batch * layer_.heads * parts;
    int64_t packed_for = -1, packed_begin = 0, packed_end = 0;
    for (int64_t task = next_++; task < tasks; task = next_++) {
      const int64_t batch = task / parts / layer_.heads, head = task / parts % layer_.heads;
      // From the last queries on: with causal masks they need the most keys.
      const int64_t begin = (parts - 1 - task % parts) * kTaskQueries;
      const int64_t end =
          begin + kTaskQueries < layer_.queries ? begin + kTaskQueries : layer_.queries;
      const Range seen = walk_.visible(begin, end);
      const Range tiles{rounded_down(seen.begin, kTileKeys), seen.end};
      const int64_t source = batch * layer_.key_heads + walk_.key_head(head);
      if (!streams_ &&
          (packed_for != source || tiles.begin < packed_begin || tiles.end > packed_end)) {
        for (int64_t tile = tiles.begin; tile < tiles.end; tile += kTileKeys) {
          pack_tile(own, batch, walk_.key_head(head), tile);
        }
        packed_for = source;
        packed_begin = tiles.begin;
        packed_end = tiles.end;
      }
      for (int64_t first = begin; first < end; first += kBlockQueries) {
        const int64_t count = end - first < kBlockQueries ? end - first : kBlockQueries;
        run_block(own, batch, head, first, count);
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
    T* factors;       // of dropout, for one row of a tile
    uint32_t* words;
    T largest[kBlockQueries], sums[kBlockQueries];
  };

  T* key_tile(const Scratch& own, int64_t tile) const {
    return own.key_panels + (streams_ ? 0 : words_of<F>(layer_.features) * tile);
  }
  T* value_tile(const Scratch& own, int64_t tile) const {
    const int64_t place = streams_ ? 0 : words_of<F>(tile);
    return own.value_panels + place * padded_columns<T>(layer_.value_features);
  }

  void pack_tile(Scratch& own, int64_t batch, int64_t head, int64_t tile) const {
    const int64_t left = layer_.keys - tile, count = left < kTileKeys ? left : kTileKeys;
    const auto key = [&](int64_t n) { return walk_.row(layer_.key, batch, head, tile + n); };
    pack_columns<F>(key, layer_.features, count, 0, count, key_tile(own, tile));
    const int64_t columns = layer_.value_features;
    const auto value = [&](int64_t n) { return walk_.row(layer_.value, batch, head, tile + n); };
    pack_rows<F>(value, count, columns, 0, columns, value_tile(own, tile));
  }

  void run_block(Scratch& own, int64_t batch, int64_t head, int64_t first, int64_t count) const {
    gather_rows(walk_.row(layer_.query, batch, head, first), layer_.query.row_stride, count,
                layer_.features, own.queries, key_stride_);
    for (int64_t i = 0; i < count; ++i) {
      own.largest[i] = ScoreRow<Storage>::kNever;
      own.sums[i] = 0;
      for (int64_t j = 0; j < output_stride_; ++j) own.outputs[i * output_stride_ + j] = 0;
    }
    const Range seen = walk_.visible(first, first + count);
    const int64_t height = tile_height(count, kStrip);
    for (int64_t tile = rounded_down(seen.begin, kTileKeys); tile < seen.end; tile += kTileKeys) {
      const int64_t end = tile + kTileKeys < layer_.keys ? tile + kTileKeys : layer_.keys;
      if (streams_ && !is_direct()) pack_tile(own, batch, walk_.key_head(head), tile);
      for (int64_t row = 0; row < count; row += height) {
        const int64_t rows = count - row < height ? count - row : height;
        run_strip(own, batch, head, first, row, rows, {tile, end});
      }
    }
    for (int64_t i = 0; i < count; ++i) finish_row(own, batch, head, first, i);
  }

  void run_strip(Scratch& own, int64_t batch, int64_t head, int64_t first, int64_t row,
                 int64_t rows, Range tile) const {
    Range keys = common(tile, walk_.visible(first + row, first + row + rows));
    if (keys.begin == keys.end) return;
    keys = Walk::whole_panels(keys, tile);
    const int64_t offset = keys.begin - tile.begin, width = keys.end - keys.begin;
    if (is_direct()) {
      multiply_keys(own, batch, walk_.key_head(head), rows, keys);
    } else {
      multiply<F>({own.queries + row * key_stride_, key_stride_}, rows,
                  key_tile(own, tile.begin) + words_of<F>(layer_.features) * offset, width,
                  layer_.features, own.scores, kScoreStride, Into::kReplace);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t query = first + row + i;
      const ScoreRow<Storage> scores(layer_, batch, head, query);
      const Range seen = common(keys, walk_.visible(query), keys.begin);
      F* weights = own.weights + i * kScoreStride;
      T* outputs = own.outputs + (row + i) * output_stride_;
      const int64_t before = seen.begin - keys.begin, after = keys.end - seen.end;
      store_zeros(weights, before);
      if (scores.is_plain()) {
        weigh<true>(own, scores, seen, own.scores + i * kScoreStride + before, weights + before,
                    row + i, outputs);
      } else {
        weigh<false>(own, scores, seen, own.scores + i * kScoreStride + before, weights + before,
                     row + i, outputs);
      }
      if (layer_.dropout > 0 && seen.begin < seen.end) {
        dropout_factors(layer_, batch * layer_.heads + head, query, seen, own.words, own.factors);
        for_each_lanes<T>(seen.end - seen.begin, [&](int64_t j, auto lanes) {
          using V = decltype(lanes);
          F* weight = weights + before + j;
          store(weight, load_as<V>(weight) * load_as<V>(own.factors + j));
        });
      }
      store_zeros(weights + width - after,
                  words_of<F>(width) * Factors<F>::kInWord - width + after);
    }
    if (is_direct()) return multiply_values(own, batch, walk_.key_head(head), rows, keys);
    const int64_t first_word = words_of<F>(offset);
    const int64_t tile_words = words_of<F>(tile.end - tile.begin);
    multiply<F>({own.weights, kScoreStride}, rows, value_tile(own, tile.begin),
                layer_.value_features, Depth{tile_words, first_word, words_of<F>(width)},
                own.outputs + row * output_stride_, output_stride_, Into::kAdd);
  }

  bool is_direct() const { return layer_.queries <= kDirectQueries; }

  // Scores of all queries for some keys: a vector of sums for each key, summed across by a
  // transposition.
  void multiply_keys(Scratch& own, int64_t batch, int64_t head, int64_t rows, Range keys) const {
    constexpr int64_t kWidth = Vec<T>::kWidth;
    const int64_t whole = rounded_down(layer_.features, kWidth);
    for (int64_t first = keys.begin; first < keys.end; first += kWidth) {
      for (int64_t row = 0; row < rows; ++row) {
        const F* query = own.queries + row * key_stride_;
        Vec<T> sums[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
          const int64_t number = first + i < keys.end ? first + i : keys.end - 1;
          const Storage* key = walk_.row(layer_.key, batch, head, number);
          Vec<T> sum{};
          int64_t j = 0;
          for (; j < whole; j += kWidth) {
            sum = sum + load_as<Vec<T>>(key + j) * load_as<Vec<T>>(query + j);
          }
          for (; j < layer_.features; ++j) sum.value[0] += load(key + j) * load(query + j);
          sums[i] = sum;
        }
        transpose(sums);
        Vec<T> total{};
        for (int64_t i = 0; i < kWidth; ++i) total = total + sums[i];
        store(own.scores + row * kScoreStride + first - keys.begin, total);
      }
    }
  }

  void multiply_values(Scratch& own, int64_t batch, int64_t head, int64_t rows, Range keys) const {
    constexpr int64_t kWidth = Vec<T>::kWidth, kVectors = 4;
    for (int64_t row = 0; row < rows; ++row) {
      const F* weights = own.weights + row * kScoreStride;
      T* outputs = own.outputs + row * output_stride_;
      int64_t j = 0;
      for (; j + kVectors * kWidth <= layer_.value_features; j += kVectors * kWidth) {
        Vec<T> sums[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[v] = load_as<Vec<T>>(outputs + j + v * kWidth);
        for (int64_t key = keys.begin; key < keys.end; ++key) {
          const T weight = load(weights + key - keys.begin);
          const Storage* value = walk_.row(layer_.value, batch, head, key) + j;
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) {
            sums[v] = sums[v] + load_as<Vec<T>>(value + v * kWidth) * weight;
          }
        }
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(outputs + j + v * kWidth, sums[v]);
      }
      for (int64_t key = keys.begin; j < layer_.value_features && key < keys.end; ++key) {
        const T weight = load(weights + key - keys.begin);
        const Storage* value = walk_.row(layer_.value, batch, head, key) + j;
        for_each_lanes<T>(layer_.value_features - j, [&](int64_t i, auto lanes) {
          using V = decltype(lanes);
          store(outputs + j + i, load_as<V>(outputs + j + i) + load_as<V>(value + i) * weight);
        });
      }
    }
  }

  // exp(score - largest) of a row's keys; what the row has so far shrinks as the largest grows.
  template <bool kPlain>
  void weigh(Scratch& own, const ScoreRow<Storage>& row, Range seen, T* scores, F* weights,
             int64_t number, T* outputs) const {
    const int64_t count = seen.end - seen.begin;
    if (count == 0) return;
    Vec<T> most = Vec<T>{} + ScoreRow<Storage>::kNever;
    T largest = own.largest[number];
    for_each_lanes<T>(count, [&](int64_t j, auto lanes) {
      using V = decltype(lanes);
      const V score = row.template score<kPlain>(load_as<V>(scores + j), seen.begin + j);
      store(scores + j, score);
      // A NaN is passed over: the weights carry it.
      if constexpr (std::is_same<V, T>::value) {
        largest = at_least(largest, score);
      } else {
        most = at_least(most, score);
      }
    });
    for (int i = 0; i < Vec<T>::kWidth; ++i) largest = at_least(largest, most.value[i]);
    if (largest == ScoreRow<Storage>::kNever) {  // none of them is allowed, unless one is a NaN
      T sum = 0;
      for (int64_t j = 0; j < count; ++j) sum += scores[j] == largest ? T(0) : scores[j];
      for (int64_t j = 0; j < count; ++j) store(weights + j, sum);
      own.sums[number] += sum;
      return;
    }
    Vec<T> sums{};
    T sum = 0;
    for_each_lanes<T>(count, [&](int64_t j, auto lanes) {
      using V = decltype(lanes);
      const V weight = row.weight(load_as<V>(scores + j), largest);
      store(weights + j, weight);
      if constexpr (std::is_same<V, T>::value) {
        sum += weight;
      } else {
        sums = sums + weight;
      }
    });
    sum += sum_of_lanes(sums);
    const T shrinkage = row.weight(own.largest[number], largest);
    own.sums[number] = own.sums[number] * shrinkage + sum;
    own.largest[number] = largest;
    if (shrinkage == 1) return;
    for_each_lanes<T>(layer_.value_features, [&](int64_t j, auto lanes) {
      store(outputs + j, load_as<decltype(lanes)>(outputs + j) * shrinkage);
    });
  }

  // A row that sees no key is zeros, as in torch.
  void finish_row(const Scratch& own, int64_t batch, int64_t head, int64_t first,
                  int64_t number) const {
    const T sum = own.sums[number], inverse = sum == 0 ? T(0) : 1 / sum;
    Storage* output = Walk::written_row(call_.output, batch, head, first + number);
    const T* own_outputs = own.outputs + number * output_stride_;
    for_each_lanes<T>(layer_.value_features, [&](int64_t j, auto lanes) {
      store(output + j, load_as<decltype(lanes)>(own_outputs + j) * inverse);
    });
    static_cast<T*>(
        call_.logsumexp)[(batch * layer_.heads + head) * layer_.queries + first + number] =
        sum == 0 ? ScoreRow<Storage>::kNever : own.largest[number] + std::log(sum);
  }

  const AttentionForward& call_;
  const AttentionLayer& layer_;
  const Walk walk_;
  bool streams_;
  int64_t key_stride_, output_stride_;
  Scratch scratch_[Walk::kMostThreads];
  std::atomic<int64_t> next_{0};
};

FASTOPT_END_NAMESPACE
