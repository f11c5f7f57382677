#pragma once

#include <atomic>

#include "cpu/attention_softmax.h"

FASTOPT_BEGIN_NAMESPACE

// The forward pass of few queries over many keys, as in decoding with a cache: memory sets the
// pace, so keys and values are read once, as they lie, for all queries of all heads that share
// them. Where heads are few, the keys are split among the threads, and each row's parts are merged
// in their order (Dao et al. 2023, Flash-Decoding). Splits hang on shapes alone.
template <class Storage>
class AttentionDecodePass {
 public:
  using Walk = AttentionWalk<Storage>;
  using T = typename Walk::T;
  static constexpr int64_t kMostQueries = 4;
  static constexpr int64_t kProductsOfThread = 1 << 15;
  static constexpr int64_t kTileKeys = 256;
  static constexpr int64_t kEnoughTasks = 32, kMostSplits = 16;

  // Scores are summed in another order than in the backward pass: of large ones that is to be seen.
  static bool takes(const AttentionForward& call) {
    return call.inference && call.layer.queries <= kMostQueries;
  }

  explicit AttentionDecodePass(const AttentionForward& call) : call_(call) {
    const AttentionLayer& layer = call.layer;
    group_ = layer.heads / layer.key_heads;
    const int64_t tiles = layer.keys > 0 ? (layer.keys + kTileKeys - 1) / kTileKeys : 1;
    const int64_t sources = layer.batch * layer.key_heads;
    splits_ = (kEnoughTasks + sources - 1) / sources;
    if (splits_ > kMostSplits) splits_ = kMostSplits;
    if (splits_ > tiles) splits_ = tiles;
    split_keys_ = (tiles + splits_ - 1) / splits_ * kTileKeys;
    key_stride_ = layer.features + Walk::kSkew;
    value_stride_ = padded_columns<T>(layer.value_features);
    const int64_t rows = splits_ * layer.batch * layer.heads * layer.queries;
    shared_.reserve(&values_, rows * value_stride_);
    shared_.reserve(&gathered_, rows);
    shared_.allocate();
    for (int i = 0; i < threads(); ++i) {
      Scratch& own = scratch_[i];
      own.space.reserve(&own.queries, group_ * layer.queries * key_stride_);
      own.space.reserve(&own.weights, group_ * layer.queries * kScoreStride);
      own.dropout.reserve(own.space, kTileKeys);
      own.space.allocate();
    }
  }

  int threads() const { return Walk::threads(call_.layer, kProductsOfThread); }

  void run(int rank, int size) {
    const AttentionLayer& whole = call_.layer;
    const int64_t tasks = whole.batch * whole.key_heads * splits_;
    for (int64_t task = next_++; task < tasks; task = next_++) {
      const int64_t source = task / splits_;
      const AttentionForward call = sequence_of<Storage>(call_, source / whole.key_heads);
      run_split(scratch_[rank], call, source % whole.key_heads, task % splits_);
    }
    if (splits_ == 1) return;
    barrier_.wait(size);
    const Range mine = Team{rank, size, &barrier_}.share(whole.batch * whole.heads);
    for (int64_t head = mine.begin; head < mine.end; ++head) {
      const AttentionForward call = sequence_of<Storage>(call_, head / whole.heads);
      for (int64_t query = 0; query < call.layer.queries; ++query) {
        finish(call, head % whole.heads, query);
      }
    }
  }

 private:
  static constexpr int64_t kScoreStride = kTileKeys + Walk::kSkew;

  struct Scratch {
    Workspace space;
    T* queries;  // [rows, features]; rows are the queries of one head, then those of the next
    T* weights;  // [rows, kTileKeys], scores before
    DropoutScratch<T> dropout;
  };

  // Where what a split gathers for a row is.
  int64_t place(const AttentionLayer& layer, int64_t split, int64_t head, int64_t query) const {
    const AttentionLayer& whole = call_.layer;
    const int64_t number = split * whole.batch * whole.heads + layer.first_head + head;
    return number * whole.queries + query;
  }

  void run_split(Scratch& own, const AttentionForward& call, int64_t key_head,
                 int64_t split) const {
    const AttentionLayer& layer = call.layer;
    const int64_t rows = group_ * layer.queries, first_head = key_head * group_;
    if (rows == 0) return;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t head = first_head + row / layer.queries, query = row % layer.queries;
      convert_row(row_of<const Storage>(layer.query, head, query), layer.features,
                  own.queries + row * key_stride_);
      const int64_t at = place(layer, split, head, query);
      gathered_[at] = {};
      for (int64_t i = 0; i < value_stride_; ++i) values_[at * value_stride_ + i] = 0;
    }
    const Range seen =
        common(visible(layer, 0, layer.queries), {split * split_keys_, (split + 1) * split_keys_});
    for (int64_t tile = seen.begin; tile < seen.end; tile += kTileKeys) {
      const Range keys{tile, tile + kTileKeys < seen.end ? tile + kTileKeys : seen.end};
      multiply_keys(own, layer, key_head, rows, keys);
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t head = first_head + row / layer.queries, query = row % layer.queries;
        const int64_t at = place(layer, split, head, query);
        T* weights = own.weights + row * kScoreStride;
        T* values = values_ + at * value_stride_;
        const RowOfWeights<Storage, T> of_row(layer, head, query);
        of_row.compute(keys, weights, weights, gathered_[at], values, own.dropout);
        add_values(layer, key_head, weights, values, keys);
      }
    }
    if (splits_ > 1) return;
    for (int64_t row = 0; row < rows; ++row) {
      finish(call, first_head + row / layer.queries, row % layer.queries);
    }
  }

  void finish(const AttentionForward& call, int64_t head, int64_t query) const {
    const AttentionLayer& layer = call.layer;
    const int64_t first = place(layer, 0, head, query);
    T* values = values_ + first * value_stride_;
    Gathered<T> gathered = gathered_[first];
    const T factor = ScoreRow<Storage>(layer, head, query).factor();
    for (int64_t split = 1; split < splits_; ++split) {
      const int64_t other = place(layer, split, head, query);
      gathered.add(gathered_[other], factor, values, values_ + other * value_stride_,
                   layer.value_features);
    }
    finish_row<Storage>(call, head, query, gathered, values);
  }

  // Products of all rows with some keys: a vector of sums for each key, summed across by a
  // transposition.
  void multiply_keys(Scratch& own, const AttentionLayer& layer, int64_t head, int64_t rows,
                     Range keys) const {
    constexpr int64_t kWidth = Vec<T>::kWidth;
    const int64_t whole = rounded_down(layer.features, kWidth);
    for (int64_t first = keys.begin; first < keys.end; first += kWidth) {
      for (int64_t row = 0; row < rows; ++row) {
        const T* query = own.queries + row * key_stride_;
        Vec<T> sums[kWidth];
        for (int64_t i = 0; i < kWidth; ++i) {
          const int64_t number = first + i < keys.end ? first + i : keys.end - 1;
          const Storage* key = row_of<const Storage>(layer.key, head, number);
          Vec<T> sum{};
          int64_t j = 0;
          for (; j < whole; j += kWidth) {
            sum = sum + load_as<Vec<T>>(key + j) * load_as<Vec<T>>(query + j);
          }
          for (; j < layer.features; ++j) sum.value[0] += load(key + j) * query[j];
          sums[i] = sum;
        }
        transpose(sums);
        Vec<T> total{};
        for (int64_t i = 0; i < kWidth; ++i) total = total + sums[i];
        store(own.weights + row * kScoreStride + first - keys.begin, total);
      }
    }
  }

  void add_values(const AttentionLayer& layer, int64_t head, const T* weights, T* values,
                  Range keys) const {
    constexpr int64_t kWidth = Vec<T>::kWidth, kVectors = 4;
    int64_t j = 0;
    for (; j + kVectors * kWidth <= layer.value_features; j += kVectors * kWidth) {
      Vec<T> sums[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[v] = load_as<Vec<T>>(values + j + v * kWidth);
      for (int64_t key = keys.begin; key < keys.end; ++key) {
        const T weight = weights[key - keys.begin];
        const Storage* value = row_of<const Storage>(layer.value, head, key) + j;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[v] = sums[v] + load_as<Vec<T>>(value + v * kWidth) * weight;
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) store(values + j + v * kWidth, sums[v]);
    }
    for (int64_t key = keys.begin; j < layer.value_features && key < keys.end; ++key) {
      const T weight = weights[key - keys.begin];
      const Storage* value = row_of<const Storage>(layer.value, head, key) + j;
      for_each_lanes<T>(layer.value_features - j, [&](int64_t i, auto lanes) {
        using V = decltype(lanes);
        store(values + j + i, load_as<V>(values + j + i) + load_as<V>(value + i) * weight);
      });
    }
  }

  const AttentionForward& call_;
  int64_t group_, splits_, split_keys_, key_stride_, value_stride_;
  Workspace shared_;
  T* values_;              // [splits, batch, heads, queries, value_features], weighted sums
  Gathered<T>* gathered_;  // [splits, batch, heads, queries]
  Scratch scratch_[Walk::kMostThreads];
  std::atomic<int64_t> next_{0};
  Barrier barrier_;
};

FASTOPT_END_NAMESPACE
