#pragma once

#include <atomic>

#include "cpu/attention_softmax.h"

FASTOPT_BEGIN_NAMESPACE

// The backward pass, from logsumexp (Dao 2023). A task owns a range of the keys of one key head:
// nobody else adds to the gradients of its keys, values and biases. With few heads, the keys are
// split, and each split adds up gradients of the queries of its own, which are summed in order at
// the end. Tasks and sums hang on shapes alone: the bits do not depend on the number of threads.
template <class Storage>
class AttentionBackwardPass {
 public:
  using Walk = AttentionWalk<Storage>;
  using T = typename Walk::T;
  using F = typename Walk::F;
  using V = Vec<T>;
  static constexpr int64_t kStrip = Tiling<T>::kTileRows;
  static constexpr int64_t kBlockQueries = 4 * kStrip;
  static constexpr int64_t kProductsOfThread = 1 << 16;
  static constexpr int64_t kTileKeys = 128;
  static constexpr int64_t kEnoughTasks = 8, kMostSplits = 8;

  explicit AttentionBackwardPass(const AttentionBackward& call)
      : call_(call),
        layer_(call.layer),
        features_(call.layer.features),
        value_features_(call.layer.value_features) {
    // Where a bias is the same for several heads or batches, one task has them all.
    const bool biased = call.bias_gradient != nullptr;
    batches_ = biased && call.bias_gradient_strides[0] == 0 ? 1 : layer_.batch;
    heads_ = biased && call.bias_gradient_strides[1] == 0 ? 1 : layer_.key_heads;
    const int64_t tiles = layer_.keys > 0 ? (layer_.keys + kTileKeys - 1) / kTileKeys : 1;
    splits_ = (kEnoughTasks + batches_ * heads_ - 1) / (batches_ * heads_);
    if (splits_ > kMostSplits) splits_ = kMostSplits;
    if (splits_ > tiles) splits_ = tiles;
    split_keys_ = (tiles + splits_ - 1) / splits_ * kTileKeys;
    splits_ = layer_.keys > 0 ? (layer_.keys + split_keys_ - 1) / split_keys_ : 1;

    stride_ = padded_columns<T>(features_) + Walk::kSkew;
    value_stride_ = padded_columns<T>(value_features_) + Walk::kSkew;
    const int64_t blocks = (layer_.queries + kBlockQueries - 1) / kBlockQueries;
    const int64_t queries = blocks * kBlockQueries;
    if (splits_ > 1) {
      shared_.reserve(&partial_sums_,
                      splits_ * layer_.batch * layer_.heads * layer_.queries * stride_);
      shared_.allocate();
    }
    scratch_size_ = transposed_scratch<F>(kBlockQueries);
    for (int i = 0; i < threads(); ++i) {
      Scratch& own = scratch_[i];
      own.space.reserve(&own.key_columns, words_of<F>(features_) * split_keys_);
      own.space.reserve(&own.value_columns, words_of<F>(value_features_) * split_keys_);
      own.space.reserve(&own.key_rows, split_keys_ * stride_);
      own.space.reserve(&own.queries, queries * stride_);
      own.space.reserve(&own.gradients, queries * value_stride_);
      own.space.reserve(&own.query_panels, queries * stride_);
      own.space.reserve(&own.gradient_panels, queries * value_stride_);
      own.space.reserve(&own.deltas, queries);
      if (splits_ == 1) own.space.reserve(&own.query_sums, layer_.queries * stride_);
      own.space.reserve(&own.key_sums, split_keys_ * stride_);
      own.space.reserve(&own.value_sums, split_keys_ * value_stride_);
      own.space.reserve(&own.scores, kStrip * kScoreStride);
      own.space.reserve(&own.products, kStrip * kScoreStride);
      own.space.reserve(&own.weights, kBlockQueries * kScoreStride);
      own.space.reserve(&own.score_gradients, kBlockQueries * kScoreStride);
      own.space.reserve(&own.transposed, scratch_size_);
      own.dropout.reserve(own.space, kTileKeys);
      own.space.allocate();
    }
  }

  int threads() const { return Walk::threads(layer_, kProductsOfThread); }

  void run(int rank, int size) {
    Scratch& own = scratch_[rank];
    const int64_t tasks = batches_ * heads_ * splits_;
    for (int64_t task = next_++; task < tasks; task = next_++) {
      const int64_t split = task % splits_, head = task / splits_ % heads_;
      const int64_t batch = task / splits_ / heads_;
      for (int64_t b = batch; b < (batches_ == 1 ? layer_.batch : batch + 1); ++b) {
        for (int64_t h = head; h < (heads_ == 1 ? layer_.key_heads : head + 1); ++h) {
          run_key_head(own, sequence_of<Storage>(call_, b), h, split);
        }
      }
    }
    if (splits_ == 1) return;
    barrier_.wait(size);
    const int64_t heads = layer_.batch * layer_.heads, rows = heads * layer_.queries;
    const Range mine = Team{rank, size, &barrier_}.share(rows);
    AttentionBackward call{};
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const int64_t head = row / layer_.queries, query = row % layer_.queries;
      if (row == mine.begin || query == 0) call = sequence_of<Storage>(call_, head / layer_.heads);
      if (query >= call.layer.queries) continue;
      T* sums = partial_sums_ + row * stride_;
      for (int64_t split = 1; split < splits_; ++split) {
        const T* more = sums + split * rows * stride_;
        for_each_lanes<T>(features_, [&](int64_t j, auto lanes) {
          using V = decltype(lanes);
          store(sums + j, load_as<V>(sums + j) + load_as<V>(more + j));
        });
      }
      convert_row(sums, features_,
                  row_of<Storage>(call.query_gradient, head % layer_.heads, query));
    }
  }

 private:
  static constexpr int64_t kScoreStride = kTileKeys + Walk::kSkew;

  struct Scratch {
    Workspace space;
    T* key_columns;      // tiles of K^T: panels of keys, of depth features
    T* value_columns;    // tiles of V^T
    T* key_rows;         // tiles of K: panels of features, of depth keys
    F* queries;          // [queries, features]
    F* gradients;        // [queries, value_features], of the outputs
    T* query_panels;     // blocks of Q: panels of features, of depth queries
    T* gradient_panels;  // blocks of the gradients of the outputs
    T* deltas;           // [queries]: output times its gradient
    T* query_sums;       // [queries, features]
    T* key_sums;         // [keys, features]
    T* value_sums;
    T* scores;           // [kStrip, kTileKeys]
    T* products;         // of the outputs' gradients with the values
    F* weights;          // [kBlockQueries, kTileKeys], after dropout
    F* score_gradients;  // with respect to the products of queries and keys
    F* transposed;
    DropoutScratch<T> dropout;
  };

  static void zero(T* values, int64_t count) {
    for (int64_t i = 0; i < count; ++i) values[i] = 0;
  }

  void run_key_head(Scratch& own, const AttentionBackward& call, int64_t key_head,
                    int64_t split) const {
    const AttentionLayer& layer = call.layer;
    const Range keys{clamped(split * split_keys_, 0, layer.keys),
                     clamped((split + 1) * split_keys_, 0, layer.keys)};
    for (int64_t tile = keys.begin; tile < keys.end; tile += kTileKeys) {
      const int64_t count = keys.end - tile < kTileKeys ? keys.end - tile : kTileKeys;
      const int64_t place = tile - keys.begin;
      const auto key = [&](int64_t n) {
        return row_of<const Storage>(layer.key, key_head, tile + n);
      };
      const auto value = [&](int64_t n) {
        return row_of<const Storage>(layer.value, key_head, tile + n);
      };
      pack_columns<F>(key, features_, count, 0, count,
                      own.key_columns + words_of<F>(features_) * place);
      pack_columns<F>(value, value_features_, count, 0, count,
                      own.value_columns + words_of<F>(value_features_) * place);
      pack_rows<F>(key, count, features_, 0, features_, own.key_rows + place * stride_);
    }
    zero(own.key_sums, (keys.end - keys.begin) * stride_);
    zero(own.value_sums, (keys.end - keys.begin) * value_stride_);
    const int64_t group = layer.heads / layer.key_heads;
    for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
      run_head(own, call, head, split, keys);
    }
    for (int64_t n = keys.begin; n < keys.end; ++n) {
      convert_row(own.key_sums + (n - keys.begin) * stride_, features_,
                  row_of<Storage>(call.key_gradient, key_head, n));
      convert_row(own.value_sums + (n - keys.begin) * value_stride_, value_features_,
                  row_of<Storage>(call.value_gradient, key_head, n));
    }
  }

  void run_head(Scratch& own, const AttentionBackward& call, int64_t head, int64_t split,
                Range keys) const {
    const AttentionLayer& layer = call.layer;
    const int64_t queries = layer.queries;
    gather_rows(row_of<const Storage>(layer.query, head, 0), layer.query.row_stride, queries,
                features_, own.queries, stride_);
    gather_rows(row_of<const Storage>(call.output_gradient, head, 0),
                call.output_gradient.row_stride, queries, value_features_, own.gradients,
                value_stride_);
    for (int64_t first = 0; first < queries; first += kBlockQueries) {
      const int64_t count = queries - first < kBlockQueries ? queries - first : kBlockQueries;
      pack_rows<F>([&](int64_t n) { return own.queries + (first + n) * stride_; }, count, features_,
                   0, features_, own.query_panels + first * stride_);
      pack_rows<F>([&](int64_t n) { return own.gradients + (first + n) * value_stride_; }, count,
                   value_features_, 0, value_features_,
                   own.gradient_panels + first * value_stride_);
    }
    find_deltas(own, call, head, split);
    T* query_sums = own.query_sums;
    if (splits_ > 1) {
      const int64_t number = split * layer_.batch * layer_.heads + layer.first_head + head;
      query_sums = partial_sums_ + number * layer_.queries * stride_;
    }
    zero(query_sums, queries * stride_);
    for (int64_t tile = keys.begin; tile < keys.end; tile += kTileKeys) {
      const Range of_tile{tile, tile + kTileKeys < keys.end ? tile + kTileKeys : keys.end};
      for (int64_t first = 0; first < queries; first += kBlockQueries) {
        const int64_t count = queries - first < kBlockQueries ? queries - first : kBlockQueries;
        run_block(own, call, head, first, count, keys.begin, of_tile, query_sums);
      }
    }
    if (splits_ > 1) return;
    for (int64_t i = 0; i < queries; ++i) {
      convert_row(query_sums + i * stride_, features_,
                  row_of<Storage>(call.query_gradient, head, i));
    }
  }

  // Outputs times their gradients, and from these the gradient of the sink.
  void find_deltas(Scratch& own, const AttentionBackward& call, int64_t head, int64_t split) const {
    for (int64_t i = 0; i < call.layer.queries; ++i) {
      const Storage* output = row_of<const Storage>(call.output, head, i);
      const Storage* gradient = row_of<const Storage>(call.output_gradient, head, i);
      V sums{};
      int64_t j = 0;
      for (; j + V::kWidth <= value_features_; j += V::kWidth) {
        sums = sums + load_as<V>(output + j) * load_as<V>(gradient + j);
      }
      if (j < value_features_) {
        sums = sums + load_first<V>(output + j, value_features_ - j) *
                          load_first<V>(gradient + j, value_features_ - j);
      }
      own.deltas[i] = sum_of_lanes(sums);
    }
    if (!call.sink_gradient || split > 0) return;
    const T sink = static_cast<const T*>(call.layer.sinks)[head];
    T sum = 0;
    for (int64_t i = 0; i < call.layer.queries; ++i) {
      const T logsumexp = *row_of<const T>(call.logsumexp, head, i);
      if (logsumexp == kNever<T>) continue;
      sum -= exponential<T>(sink - logsumexp) * own.deltas[i];
    }
    static_cast<T*>(call.sink_gradient)[head] = sum;
  }

  void run_block(Scratch& own, const AttentionBackward& call, int64_t head, int64_t first,
                 int64_t count, int64_t begin, Range tile, T* query_sums) const {
    Range keys = common(tile, visible(call.layer, first, first + count));
    if (keys.begin == keys.end) return;
    keys = Walk::from_panel(keys, tile);
    const int64_t height = tile_height(count, kStrip);
    for (int64_t row = 0; row < count; row += height) {
      const int64_t rows = count - row < height ? count - row : height;
      run_strip(own, call, head, first, row, rows, begin, tile, keys, query_sums);
    }
    const int64_t width = keys.end - keys.begin, place = keys.begin - begin;
    const int64_t offset = keys.begin - tile.begin;
    const auto words_for = [&](int64_t row, int64_t rows) {
      const int64_t key = keys.begin + row;
      const Range queries =
          common({first, first + count}, seeing(call.layer, {key, key + rows}), first);
      return Range{(queries.begin - first) / Factors<F>::kInWord, words_of<F>(queries.end - first)};
    };
    multiply_transposed<F>(own.weights + offset, kScoreStride, width,
                           own.gradient_panels + first * value_stride_, value_features_, count,
                           own.value_sums + place * value_stride_, value_stride_, Into::kAdd,
                           own.transposed, words_for);
    multiply_transposed<F>(own.score_gradients + offset, kScoreStride, width,
                           own.query_panels + first * stride_, features_, count,
                           own.key_sums + place * stride_, stride_, Into::kAdd, own.transposed,
                           words_for);
  }

  // Weights and gradients of scores for the keys of a block, and what they add to the queries.
  void run_strip(Scratch& own, const AttentionBackward& call, int64_t head, int64_t first,
                 int64_t row, int64_t rows, int64_t begin, Range tile, Range block_keys,
                 T* query_sums) const {
    const AttentionLayer& layer = call.layer;
    Range keys =
        common(block_keys, visible(layer, first + row, first + row + rows), block_keys.begin);
    keys = Walk::from_panel(keys, tile);
    const int64_t width = keys.end - keys.begin, place = keys.begin - begin;
    if (width > 0) {
      const int64_t packed = tile.end - keys.begin;
      const int64_t words = words_of<F>(features_), value_words = words_of<F>(value_features_);
      multiply<F>({own.queries + (first + row) * stride_, stride_}, rows,
                  own.key_columns + words * place, packed, width, Depth{words, 0, words},
                  own.scores, kScoreStride, Into::kReplace);
      multiply<F>({own.gradients + (first + row) * value_stride_, value_stride_}, rows,
                  own.value_columns + value_words * place, packed, width,
                  Depth{value_words, 0, value_words}, own.products, kScoreStride, Into::kReplace);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t query = first + row + i;
      const Range seen = common(keys, visible(layer, query), block_keys.begin);
      F* weights = own.weights + (row + i) * kScoreStride - tile.begin;
      F* gradients = own.score_gradients + (row + i) * kScoreStride - tile.begin;
      if (seen.begin < seen.end) {
        const ScoreRow<Storage> scores(layer, head, query);
        const int64_t offset = i * kScoreStride + seen.begin - keys.begin;
        if (scores.is_plain() && layer.dropout == 0 && !call.bias_gradient) {
          differentiate<true>(own, call, scores, head, query, seen, own.scores + offset,
                              own.products + offset, weights + seen.begin, gradients + seen.begin);
        } else {
          differentiate<false>(own, call, scores, head, query, seen, own.scores + offset,
                               own.products + offset, weights + seen.begin, gradients + seen.begin);
        }
      }
      // To the end of the last word: the products take it whole.
      const int64_t words_end =
          tile.begin + rounded_up(block_keys.end - tile.begin, Factors<F>::kInWord);
      F* const both[] = {weights, gradients};
      for (F* values : both) {
        store_zeros(values + block_keys.begin, seen.begin - block_keys.begin);
        store_zeros(values + seen.end, words_end - seen.end);
      }
    }
    if (width == 0) return;
    const int64_t offset = keys.begin - tile.begin;
    multiply<F>({own.score_gradients + row * kScoreStride + offset, kScoreStride}, rows,
                own.key_rows + (tile.begin - begin) * stride_, features_, features_,
                Depth{words_of<F>(tile.end - tile.begin), words_of<F>(offset), words_of<F>(width)},
                query_sums + (first + row) * stride_, stride_, Into::kAdd);
  }

  // Buffers have room for a vector beyond the keys that are seen; what comes to stand there is for
  // the caller to clear.
  template <bool kPlain>
  void differentiate(Scratch& own, const AttentionBackward& call, const ScoreRow<Storage>& row,
                     int64_t head, int64_t query, Range seen, const T* products,
                     const T* value_products, F* weights, F* gradients) const {
    const AttentionLayer& layer = call.layer;
    const int64_t count = seen.end - seen.begin;
    const T logsumexp = *row_of<const T>(call.logsumexp, head, query);
    if (logsumexp == kNever<T>) {
      store_zeros(weights, count);
      store_zeros(gradients, count);
      return;
    }
    const bool drops = !kPlain && layer.dropout > 0;
    if (drops) dropout_factors(layer, head, query, seen, own.dropout.words, own.dropout.factors);
    T* bias_gradient = nullptr;
    if (!kPlain && call.bias_gradient) {
      const int64_t* strides = call.bias_gradient_strides;
      bias_gradient =
          static_cast<T*>(call.bias_gradient) + head * strides[1] + query * strides[2] + seen.begin;
    }
    const T delta = own.deltas[query];
    for (int64_t j = 0; j < count; j += V::kWidth) {
      const V product = load_as<V>(products + j);
      // Rounded as in the forward pass: where one key has all the weight, that is 1 exactly.
      const V score = unfused(row.template score<kPlain>(product, seen.begin + j, count - j));
      const V weight = exponential_of(score - logsumexp, T(1));
      V through = load_as<V>(value_products + j), kept = weight;
      if (drops) {
        const V factor = load_as<V>(own.dropout.factors + j);
        through = through * factor;
        kept = kept * factor;
      }
      store(weights + j, kept);
      V gradient = weight * (through - delta);
      if (bias_gradient) add_up_to(bias_gradient + j, gradient, count - j);
      if (!kPlain) gradient = row.rule.through_cap(product, gradient);
      store(gradients + j, gradient * row.rule.scale);
    }
  }

  static void add_up_to(T* target, V value, int64_t left) {
    if (left >= V::kWidth) return store(target, load_as<V>(target) + value);
    store_first(target, load_first<V>(target, left) + value, left);
  }

  const AttentionBackward& call_;
  const AttentionLayer& layer_;
  const int64_t features_, value_features_;
  int64_t batches_, heads_, splits_, split_keys_, stride_, value_stride_, scratch_size_;
  Workspace shared_;
  T* partial_sums_ = nullptr;  // [splits, batch, heads, queries, features]
  Scratch scratch_[Walk::kMostThreads];
  std::atomic<int64_t> next_{0};
  Barrier barrier_;
};

FASTOPT_END_NAMESPACE
