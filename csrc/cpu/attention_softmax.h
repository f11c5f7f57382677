#pragma once

#include <cmath>
#include <cstdint>

#include "core/attention_scores.h"
#include "cpu/attention_walk.h"
#include "cpu/random.h"

FASTOPT_BEGIN_NAMESPACE

// Factors of dropout for the keys [begin, end) of a row: 0, or 1 / (1 - dropout).
template <class T>
void dropout_factors(const AttentionLayer& layer, int64_t head, int64_t row, Range keys,
                     uint32_t* words, T* factors) {
  const int64_t begin = rounded_down(keys.begin, kRandomGroup);
  random_row(layer.seed, layer.first_head + head, row, begin, rounded_up(keys.end, kRandomGroup),
             words);
  const uint32_t threshold = dropout_threshold(layer);
  const T kept = growth_of_kept<T>(layer);
  const uint32_t* own = words + (keys.begin - begin);
  for (int64_t i = 0; i < keys.end - keys.begin; ++i) {
    factors[i] = own[i] >= threshold ? kept : T(0);
  }
}

// Scratch of a thread for dropout in one row of a tile.
template <class T>
struct DropoutScratch {
  T* factors;
  uint32_t* words;

  void reserve(Workspace& space, int64_t tile_keys) {
    space.reserve(&factors, tile_keys + AttentionWalk<T>::kSkew);
    space.reserve(&words, tile_keys + 2 * kRandomGroup);
  }
};

// One row of scores.
template <class Storage>
struct ScoreRow {
  using T = ComputeType<Storage>;
  using V = Vec<T>;

  ScoreRule<T> rule;
  T center;  // the key at no distance, for slopes
  const Storage* bias;
  const uint8_t* allowed;

  ScoreRow(const AttentionLayer& layer, int64_t head, int64_t query)
      : rule(layer, head),
        center(static_cast<T>(query + diagonal(layer))),
        bias(nullptr),
        allowed(nullptr) {
    const int64_t place = head * layer.mask_strides[1] + query * layer.mask_strides[2];
    if (layer.bias) bias = static_cast<const Storage*>(layer.bias) + place;
    if (layer.allowed) allowed = layer.allowed + place;
  }

  bool is_plain() const { return rule.only_scales() && !bias && !allowed; }

  // Of what stands for a score: a product where the row is plain, else the score itself.
  T factor() const { return is_plain() ? rule.scale : T(1); }

  // Scores of key `column` and those after it, of which `left` are there.
  template <bool kPlain>
  HOST_DEVICE V score(V product, int64_t column, int64_t left) const {
    if (kPlain) return product * rule.scale;
    V result = rule.score(product, lane_numbers<V>() + (static_cast<T>(column) - center));
    if (bias) result = result + load_up_to(bias + column, left);
    if (allowed) result = unless_zero(load_up_to(allowed + column, left), result, kNever<T>);
    return result;
  }

 private:
  template <class Element>
  static HOST_DEVICE V load_up_to(const Element* source, int64_t left) {
    return left < V::kWidth ? load_first<V>(source, left) : load_as<V>(source);
  }
};

// What a query has gathered from some keys: the sums of weights and of weighted values, where the
// largest score so far has the weight 1. Scores are `factor` times what is given for them.
template <class T>
struct Gathered {
  T largest = kNever<T>, sum = 0;

  // The largest score may only grow.
  void grow_to(T score, T factor, T* values, int64_t features) {
    if (score == largest) return;
    const T shrinkage = exponential_of(largest - score, factor);
    largest = score;
    sum *= shrinkage;
    for_each_lanes<T>(features, [&](int64_t j, auto lanes) {
      store(values + j, load_as<decltype(lanes)>(values + j) * shrinkage);
    });
  }

  // What was gathered from other keys; without values, those are zeros.
  void add(Gathered other, T factor, T* values, const T* other_values, int64_t features) {
    if (other.sum == 0) return;
    grow_to(at_least(largest, other.largest), factor, values, features);
    const T weight =
        other.largest == largest ? T(1) : exponential_of(other.largest - largest, factor);
    sum += other.sum * weight;
    if (!other_values) return;
    for_each_lanes<T>(features, [&](int64_t j, auto lanes) {
      using V = decltype(lanes);
      store(values + j, load_as<V>(values + j) + load_as<V>(other_values + j) * weight);
    });
  }
};

template <class F>
HOST_DEVICE void store_zeros(F* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(target + i, ComputeType<F>(0));
}

// Weights of a query for `keys` of a tile, from its products with them, 0 where it sees none. All
// buffers have room for a vector beyond.
template <class Storage, class F>
class RowOfWeights {
 public:
  using T = ComputeType<Storage>;
  using V = Vec<T>;

  RowOfWeights(const AttentionLayer& layer, int64_t head, int64_t query)
      : layer_(layer), head_(head), query_(query), scores_(layer, head, query) {}

  void compute(Range keys, T* products, F* weights, Gathered<T>& gathered, T* values,
               const DropoutScratch<T>& dropout) const {
    const Range seen = common(keys, visible(layer_, query_), keys.begin);
    const int64_t before = seen.begin - keys.begin, count = seen.end - seen.begin;
    store_zeros(weights, before);
    if (count > 0) {
      if (scores_.is_plain()) {
        weigh<true>(seen, products + before, weights + before, gathered, values);
      } else {
        weigh<false>(seen, products + before, weights + before, gathered, values);
      }
      if (layer_.dropout > 0) drop(seen, weights + before, dropout);
    }
    const int64_t width = words_of<F>(keys.end - keys.begin) * Factors<F>::kInWord;
    store_zeros(weights + before + count, width - before - count);
  }

 private:
  template <bool kPlain>
  void weigh(Range seen, T* scores, F* weights, Gathered<T>& gathered, T* values) const {
    const int64_t count = seen.end - seen.begin, whole = rounded_down(count, V::kWidth);
    V most = V{} + kNever<T>;
    if (kPlain) store(scores + count, V{} + kNever<T>);
    for (int64_t j = 0; j < count; j += V::kWidth) {
      V score = load_as<V>(scores + j);
      if (!kPlain) {
        score = scores_.template score<false>(score, seen.begin + j, count - j);
        store(scores + j, score);
        if (j == whole) {
          store(scores + count, V{} + kNever<T>);
          score = load_as<V>(scores + j);
        }
      }
      most = at_least(most, score);  // a NaN is passed over: the weights carry it
    }
    T largest = largest_lane(most);
    if (largest == kNever<T>) {  // none of them is allowed, unless one is a NaN
      T sum = 0;
      for (int64_t j = 0; j < count; ++j) sum += scores[j] == kNever<T> ? T(0) : scores[j];
      for (int64_t j = 0; j < count; ++j) store(weights + j, sum);
      gathered.sum += sum;
      return;
    }
    // Differences, then the factor: the largest one has the weight 1 exactly, however large it is.
    largest = at_least(gathered.largest, largest);
    const T factor = scores_.factor();
    V sums{};
    for (int64_t j = 0; j < count; j += V::kWidth) {
      const V weight = exponential_of(load_as<V>(scores + j) - largest, factor);
      store(weights + j, weight);
      sums = sums + weight;
    }
    gathered.grow_to(largest, factor, values, layer_.value_features);
    gathered.sum += sum_of_lanes(sums);
  }

  void drop(Range seen, F* weights, const DropoutScratch<T>& scratch) const {
    dropout_factors(layer_, head_, query_, seen, scratch.words, scratch.factors);
    for (int64_t j = 0; j < seen.end - seen.begin; j += V::kWidth) {
      store(weights + j, load_as<V>(weights + j) * load_as<V>(scratch.factors + j));
    }
  }

  const AttentionLayer& layer_;
  const int64_t head_, query_;
  const ScoreRow<Storage> scores_;
};

// Output and logsumexp of a query that has met all of its keys. One that sees none is zeros, as in
// torch; a sink is one more key.
template <class Storage, class T>
void finish_row(const AttentionForward& call, int64_t head, int64_t query, Gathered<T> gathered,
                T* values) {
  const AttentionLayer& layer = call.layer;
  gathered.largest *= ScoreRow<Storage>(layer, head, query).factor();
  if (layer.sinks) {
    Gathered<T> sink;
    sink.largest = static_cast<const T*>(layer.sinks)[head];
    sink.sum = sink.largest == kNever<T> ? T(0) : T(1);
    gathered.add(sink, T(1), values, nullptr, layer.value_features);
  }
  const T sum = gathered.sum, inverse = sum == 0 ? T(0) : 1 / sum;
  Storage* output = row_of<Storage>(call.output, head, query);
  for_each_lanes<T>(layer.value_features, [&](int64_t j, auto lanes) {
    store(output + j, load_as<decltype(lanes)>(values + j) * inverse);
  });
  *row_of<T>(call.logsumexp, head, query) = sum == 0 ? kNever<T> : gathered.largest + std::log(sum);
}

FASTOPT_END_NAMESPACE
