#pragma once

#include <cstdint>

#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

FASTOPT_BEGIN_NAMESPACE

// Sizes, and how many threads are worth it.
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
