#pragma once

// What the attention's kernels share: which part of the work a block has, tiles of rows in shared
// memory, scores, and dropout. All of it is called by whole blocks, unless a comment says
// otherwise.

#include <cstdint>
#include <type_traits>

#include "core/attention_scores.h"
#include "cuda/attention.h"
#include "cuda/launch.cuh"
#include "cuda/tile_product.cuh"
#include "cuda/vector_access.cuh"

namespace fastopt::cuda {

// ptxas keeps to 255 registers by itself; shared memory lets two or three blocks share a
// multiprocessor.
template <int kWarps>
constexpr int kThreadsOf = 32 * kWarps;

constexpr float kLog2E = 1.44269504088896340735992468100189f;

// A block's head and its rows of one sequence, kRows from `first` on.
struct BlockPlace {
  int64_t head, batch, first;
};

// How many blocks one head needs. Sequences behind each other are cut at multiples of kRows from
// their own beginnings: block starts / kRows + b is the first one of sequence b.
template <int kRows>
int64_t blocks_of_head(int64_t batch, int64_t rows, const int32_t* starts) {
  return starts ? rows / kRows + batch : batch * ((rows + kRows - 1) / kRows);
}

// The block's place; where there is none for it, `first` is negative or beyond the rows. The last
// rows come first: with causal masks they have the most to do.
template <int kRows>
__device__ BlockPlace place_of_block(int64_t block, int64_t batch, int64_t rows,
                                     const int32_t* starts) {
  const int64_t blocks = starts ? rows / kRows + batch : batch * ((rows + kRows - 1) / kRows);
  const int64_t head = block / blocks;
  block = blocks - 1 - block % blocks;
  if (!starts) {
    const int64_t of_sequence = blocks / batch;
    return {head, block / of_sequence, block % of_sequence * kRows};
  }
  const auto first_block = [&](int64_t b) { return first_row(starts, b, rows) / kRows + b; };
  int64_t low = 0, high = batch;
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_block(middle) <= block ? low : high) = middle;
  }
  return {head, low, (block - first_block(low)) * kRows};
}

// kRows rows in shared memory, of kFeatures elements and some more between them.
template <class Products, int kRows_, int kFeatures_>
struct Tile {
  using Element = typename Products::Element;
  static constexpr int kRows = kRows_, kFeatures = kFeatures_;
  static constexpr int kStride = kFeatures + Products::kPad;
  static constexpr int kBytes = kRows * kStride * static_cast<int>(sizeof(Element));
};

// Whether each row of a head begins at a multiple of 16 bytes.
template <class Storage>
__device__ bool has_aligned_rows(const AttentionTensor& tensor) {
  const uintptr_t bits = reinterpret_cast<uintptr_t>(tensor.data) |
                         static_cast<uintptr_t>(tensor.head_stride) * sizeof(Storage) |
                         static_cast<uintptr_t>(tensor.row_stride) * sizeof(Storage);
  return bits % 16 == 0;
}

// Starts to copy rows [first, first + kRows) of a head into a tile, with zeros for rows from `end`
// on and beyond `features`: they are there after copy_async_wait and a barrier. A thread stays in
// its columns of 16 bytes.
template <class ATile, int kThreads, class Storage>
__device__ void copy_tile(Storage* tile, const AttentionTensor& source, int64_t head, int64_t first,
                          int64_t end, int64_t features) {
  constexpr int kN = kLanes<Storage>, kPacks = ATile::kFeatures / kN;
  constexpr int kAbreast = kPacks < kThreads ? kPacks : kThreads, kStep = kThreads / kAbreast;
  static_assert(kThreads % kAbreast == 0 && kPacks % kAbreast == 0 && ATile::kRows % kStep == 0);
  const bool aligned = has_aligned_rows<Storage>(source);
  const int rows = static_cast<int>(clamped(end - first, 0, ATile::kRows));
#pragma unroll
  for (int pack = 0; pack < kPacks; pack += kAbreast) {
    const int column = (pack + static_cast<int>(threadIdx.x) % kAbreast) * kN;
    int row = static_cast<int>(threadIdx.x) / kAbreast;
    const int there = static_cast<int>(clamped(features - column, 0, kN));
    const Storage* line = row_of<const Storage>(source, head, first + row) + column;
    Storage* target = tile + row * ATile::kStride + column;
    if (aligned) {
      const void* const any = source.data;
#pragma unroll 4
      for (int i = 0; i < ATile::kRows / kStep; ++i) {
        const int bytes = row < rows ? there * static_cast<int>(sizeof(Storage)) : 0;
        copy_async_16(target, bytes > 0 ? line : any, bytes);
        row += kStep;
        line += kStep * source.row_stride;
        target += kStep * ATile::kStride;
      }
    } else {
#pragma unroll 1
      for (; row < ATile::kRows; row += kStep) {
#pragma unroll
        for (int j = 0; j < kN; ++j) target[j] = row < rows && j < there ? line[j] : Storage{};
        line += kStep * source.row_stride;
        target += kStep * ATile::kStride;
      }
    }
  }
}

// Sums of a warp as rows of a tile that are its own, times `factors` of each lane's two rows of
// each row tile.
template <class Products, int kStride, int kRowTiles, int kColumnTiles>
__device__ void store_sums(typename Products::Element* tile,
                           const Sums (&sums)[kRowTiles][kColumnTiles],
                           const float (&factors)[kRowTiles][2]) {
  using Element = typename Products::Element;
  const int row = lane_of_warp() / 4, column = lane_of_warp() % 4 * 2;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Element* const target = tile + (16 * i + 8 * half + row) * kStride + 8 * j + column;
        const float first = sums[i][j][2 * half] * factors[i][half];
        const float second = sums[i][j][2 * half + 1] * factors[i][half];
        if constexpr (sizeof(Element) == 2) {
          *reinterpret_cast<uint32_t*>(target) = packed_pair<Element>(first, second);
        } else {
          *reinterpret_cast<float2*>(target) = make_float2(first, second);
        }
      }
    }
  }
}

// Writes kRows rows of a tile, from a column on, that the calling warp has stored.
template <int kRows, int kColumns, int kStride, class Storage>
__device__ void write_rows(const Storage* tile, const AttentionTensor& target, int64_t head,
                           int64_t first, int64_t end, int64_t first_column, int64_t features) {
  constexpr int kN = kLanes<Storage>, kPacks = kColumns / kN;
  __syncwarp();
  const bool aligned = has_aligned_rows<Storage>(target);
#pragma unroll 4
  for (int i = lane_of_warp(); i < kRows * kPacks; i += 32) {
    const int row = i / kPacks, column = i % kPacks * kN;
    const int64_t left = first + row < end ? features - first_column - column : 0;
    if (left <= 0) continue;
    Storage* const line = row_of<Storage>(target, head, first + row) + first_column + column;
    const Storage* const source = tile + row * kStride + column;
    if (aligned && left >= kN) {
      *reinterpret_cast<uint4*>(line) = *reinterpret_cast<const uint4*>(source);
    } else {
      for (int j = 0; j < kN && j < left; ++j) line[j] = source[j];
    }
  }
}

// The scores of one head for the keys of a tile. Numbers that are kept while keys go by have 32
// bits: registers are what these kernels are short of.
template <class Storage>
struct TileScores {
  ScoreRule<float> rule;
  int center;  // where the first query stands, counted from the first key
  int keys;    // that there are from the first one on
  int left, right;
  int64_t row_stride;
  const Storage* bias;     // of the first query and key, or nullptr
  const uint8_t* allowed;  // the same

  static constexpr int kFar = 1 << 28;

  __device__ TileScores(const AttentionLayer& layer, int64_t head, int64_t first_query,
                        int64_t first_key)
      : rule(layer, head),
        center(static_cast<int>(clamped(first_query + diagonal(layer) - first_key, -kFar, kFar))),
        keys(static_cast<int>(clamped(layer.keys - first_key, 0, kFar))),
        left(layer.left < 0 ? 2 * kFar : static_cast<int>(clamped(layer.left, 0, 2 * kFar))),
        right(layer.right < 0 ? 2 * kFar : static_cast<int>(clamped(layer.right, 0, 2 * kFar))),
        row_stride(layer.mask_strides[2]),
        bias(nullptr),
        allowed(nullptr) {
    const int64_t place = head * layer.mask_strides[1] + first_query * row_stride + first_key;
    if (layer.bias) bias = static_cast<const Storage*>(layer.bias) + place;
    if (layer.allowed) allowed = layer.allowed + place;
  }

  // Of a query and a key, counted from the first ones, whether the one sees the other.
  __device__ bool sees(int query, int key) const {
    return key < keys && key >= center + query - left && key <= center + query + right;
  }

  // Of a query that there is and sees the key.
  __device__ float score(float product, int query, int key) const {
    float result = rule.score(product, static_cast<float>(key - query - center));
    if (bias) result += load(bias + query * row_stride + key);
    if (allowed && allowed[query * row_stride + key] == 0) result = kNever<float>;
    return result;
  }
};

// Whether scores are products but for a factor, and bounds alone hide keys; or anything else, which
// needs registers of its own.
enum class Scoring { kPlain, kGeneral };

inline Scoring scoring_of(const AttentionLayer& layer) {
  const bool plain = !layer.slopes && ScoreRule<float>(layer, 0).only_scales() && !layer.bias &&
                     !layer.allowed && layer.dropout == 0;
  return plain ? Scoring::kPlain : Scoring::kGeneral;
}

// The keys [begin, end) that any of some queries see, and [all_begin, all_end) that all of them do,
// where all of them are there. More than 2^31 keys of one head fit on no card.
struct KeysOf {
  int begin = 0, end = 0, all_begin = 0, all_end = 0;

  __device__ KeysOf(const AttentionLayer& layer, Range queries) {
    if (queries.begin >= layer.queries) return;
    const bool is_whole = queries.end <= layer.queries;
    const Range first = visible(layer, queries.begin);
    const Range last = visible(layer, (is_whole ? queries.end : layer.queries) - 1);
    begin = static_cast<int>(first.begin);
    end = static_cast<int>(last.end);
    all_begin = static_cast<int>(last.begin);
    all_end = is_whole ? static_cast<int>(first.end) : 0;
  }
};

// Bits of the weights that dropout keeps, 16 keys to a word.
template <int kQueries, int kKeys>
struct Kept {
  static constexpr int kWords = kKeys / kRandomLanes;
  uint16_t words[kQueries][kWords];

  __device__ bool at(int query, int key) const {
    return (words[query][key / kRandomLanes] >> key % kRandomLanes & 1) != 0;
  }
};

// They may be read after a barrier.
template <int kThreads, int kQueries, int kKeys>
__device__ void draw(Kept<kQueries, kKeys>& kept, const AttentionLayer& layer, int64_t head,
                     int64_t first_query, int64_t first_key) {
  static_assert(kQueries * kRandomLanes % kThreads == 0 && kRandomGroup % kKeys == 0);
  const uint32_t threshold = dropout_threshold(layer);
  const int first_word = static_cast<int>(first_key % kRandomGroup) / kRandomLanes;
  const int lane = static_cast<int>(threadIdx.x) % kRandomLanes;
#pragma unroll 1
  for (int item = static_cast<int>(threadIdx.x); item < kQueries * kRandomLanes; item += kThreads) {
    const int row = item / kRandomLanes;
    uint32_t counter[4] = {
        static_cast<uint32_t>(first_key / kRandomGroup * kRandomLanes + lane),
        static_cast<uint32_t>(first_query + row),
        static_cast<uint32_t>(layer.first_head + head),
        0,
    };
    philox<ScalarWords>(counter, layer.seed);
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      const uint32_t both_rows = __ballot_sync(0xFFFFFFFFu, counter[word] >= threshold);
      const int place = word - first_word;
      if (lane == 0 && place >= 0 && place < Kept<kQueries, kKeys>::kWords) {
        kept.words[row][place] = static_cast<uint16_t>(both_rows >> (row % 2 * kRandomLanes));
      }
    }
  }
}

template <Scoring kScoring_, class Products_, int kFeatures_>
struct Variant {
  using Products = Products_;
  using Storage = typename Products::Element;
  static constexpr Scoring kScoring = kScoring_;
  static constexpr int kFeatures = kFeatures_;
  static constexpr bool kIsGeneral = kScoring == Scoring::kGeneral;
  static constexpr bool kIsHalf = sizeof(Storage) == 2;
  static constexpr bool kIsExact = Products::kDepth < 8;  // fp32 without tensor cores
};

// visit(variant) with what a kernel is made for: kind of scores and arithmetic, number of features.
template <Scoring kScoring, class Products, class Visitor>
void with_features(int64_t features, const Visitor& visit) {
  if (features <= 64) {
    visit(Variant<kScoring, Products, 64>{});
  } else if (features <= 128) {
    visit(Variant<kScoring, Products, 128>{});
  } else {
    visit(Variant<kScoring, Products, 256>{});
  }
}
template <Scoring kScoring, class Visitor>
void with_products(DType dtype, Float32 float32, int64_t features, const Visitor& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return with_features<kScoring, HalfProducts<BFloat16>>(features, visit);
    case DType::kFloat16:
      return with_features<kScoring, HalfProducts<Half>>(features, visit);
    case DType::kFloat32:
      return float32 == Float32::kTf32 ? with_features<kScoring, Tf32Products>(features, visit)
                                       : with_features<kScoring, Fp32Products>(features, visit);
    case DType::kFloat64:
      throw std::invalid_argument("no attention kernel for cards has fp64");
  }
}
template <class Visitor>
void with_variant(Scoring scoring, DType dtype, Float32 float32, int64_t features,
                  const Visitor& visit) {
  if (scoring == Scoring::kPlain) {
    with_products<Scoring::kPlain>(dtype, float32, features, visit);
  } else {
    with_products<Scoring::kGeneral>(dtype, float32, features, visit);
  }
}
template <class Visitor>
void with_variant(const AttentionLayer& layer, Float32 float32, const Visitor& visit) {
  const int64_t features =
      layer.features > layer.value_features ? layer.features : layer.value_features;
  if (features > kMostFeatures) throw std::invalid_argument("more than 256 features");
  with_variant(scoring_of(layer), layer.dtype, float32, features, visit);
}
// All that a dtype may need.
template <class Visitor>
void with_each_variant(DType dtype, Float32 float32, const Visitor& visit) {
  for (Scoring scoring : {Scoring::kPlain, Scoring::kGeneral}) {
    for (int64_t features : {64, 128, 256}) with_variant(scoring, dtype, float32, features, visit);
  }
}

}  // namespace fastopt::cuda
