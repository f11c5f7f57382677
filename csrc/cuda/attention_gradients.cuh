#pragma once

// What the backward pass's kernels share: weights from logsumexp, and gradients of scores.

#include "cuda/attention_tiles.cuh"

namespace fastopt::cuda {

// How far the numbers of a sequence's queries are from those of all, [batch, heads, queries]: in
// logsumexp and in whatever is laid out like it.
__device__ inline int64_t numbers_before(const AttentionBackward& whole,
                                         const AttentionBackward& sequence) {
  return static_cast<const float*>(sequence.logsumexp.data) -
         static_cast<const float*>(whole.logsumexp.data);
}

// Of the queries of a tile, in shared memory: what makes weights of scores, and output times its
// gradient. A query that is not there, or sees no key, has weights of zero.
template <int kQueries>
struct QueryNumbers {
  float logsumexp[kQueries], delta[kQueries];
};

// They may be read after a barrier. `deltas` are those of the sequence's heads.
template <int kThreads, int kQueries>
__device__ void load_numbers(QueryNumbers<kQueries>& numbers, const AttentionBackward& call,
                             const float* deltas, int64_t head, int64_t first) {
  for (int i = static_cast<int>(threadIdx.x); i < kQueries; i += kThreads) {
    const bool is_there = first + i < call.layer.queries;
    float logsumexp = kNever<float>, delta = 0;
    if (is_there) {
      logsumexp = *row_of<const float>(call.logsumexp, head, first + i);
      delta = deltas[head * call.logsumexp.head_stride + first + i];
    }
    numbers.logsumexp[i] = logsumexp == kNever<float> ? -kNever<float> : logsumexp;
    numbers.delta[i] = delta;
  }
}

// Of one query and one key, counted from the first ones of a tile: `product` becomes the weight
// that goes to the values, `through`, the product of the output's gradient with the value, becomes
// the gradient of the score; returns that of the scaled product. The scale itself comes after the
// products that follow: fp16 would lose what it makes small.
template <Scoring kScoring, bool kBounded, class Storage, int kQueries, int kKeys>
__device__ float differentiate(const TileScores<Storage>& scores,
                               const QueryNumbers<kQueries>& numbers,
                               const Kept<kQueries, kKeys>* kept, float growth, int query, int key,
                               float& product, float& through) {
  const float logsumexp = numbers.logsumexp[query];
  if (kBounded && (!scores.sees(query, key) || logsumexp == -kNever<float>)) {
    product = through = 0;
    return 0;
  }
  const float before = product;
  // Rounded as in the forward pass: where one key has all the weight, that is 1 exactly.
  float score = __fmul_rn(product, scores.rule.scale);
  if constexpr (kScoring == Scoring::kGeneral) score = scores.score(product, query, key);
  const float weight = power_of_two_fast((score - logsumexp) * kLog2E);
  product = weight;
  if (kScoring == Scoring::kGeneral && kept) {
    const float factor = kept->at(query, key) ? growth : 0.0f;
    product *= factor;
    through *= factor;
  }
  through = weight * (through - numbers.delta[query]);
  if constexpr (kScoring == Scoring::kGeneral) return scores.rule.through_cap(before, through);
  return through;
}

}  // namespace fastopt::cuda
