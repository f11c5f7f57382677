// The forward pass of FlashAttention-2 (Dao 2023). A block has some queries of one head; keys and
// values go by in tiles, the next tile of either on its way while the other is multiplied. Scores,
// weights and sums stay in registers.

#include "cuda/attention_passes.h"
#include "cuda/attention_tiles.cuh"

namespace fastopt::cuda {

namespace {

// Sizes that let two blocks of any of these share a multiprocessor of 163 KB, and one fit into 99.
// Two row tiles a warp: with one, products would wait for shared memory.
template <class V>
struct ForwardShape : V {
  using typename V::Products;
  using V::kIsHalf, V::kIsExact, V::kIsGeneral, V::kFeatures;
  static constexpr int kWarps = kIsHalf || kFeatures < 256 ? 4 : 2;
  static constexpr int kRowTiles = kIsHalf && kFeatures <= 128 ? 2 : 1;
  static constexpr int kWarpQueries = 16 * kRowTiles;
  static constexpr int kQueries = kWarps * kWarpQueries;
  static constexpr int kHalfKeys = kFeatures == 64 && !kIsGeneral ? 64 : 32;
  static constexpr int kKeys = kIsHalf ? kHalfKeys
                                       : (kFeatures == 64    ? 64
                                          : kFeatures == 128 ? 32
                                                             : 16);
  // Without tensor cores, operands leave no registers for the sums of more than 128 features.
  static constexpr int kOutputs = kFeatures == 256 && kIsExact ? 128 : kFeatures;
  static constexpr int kParts = kFeatures / kOutputs;
  static constexpr int kThreads = kThreadsOf<kWarps>;
  using QueryTile = Tile<Products, kQueries, kFeatures>;
  using KeyTile = Tile<Products, kKeys, kFeatures>;
  using ValueTile = Tile<Products, kKeys, kOutputs>;
  static constexpr int kSharedBytes = QueryTile::kBytes + KeyTile::kBytes + ValueTile::kBytes;
};

// What a warp's rows have gathered: for each lane its two rows of each row tile. The sums of
// weights are those of the lane's own columns, until the end.
template <int kRowTiles>
struct Rows {
  float largest[kRowTiles][2], sum[kRowTiles][2];
};

__device__ inline float largest_of_row(float value) {
  value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 1));
  return fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, 2));
}
__device__ inline float sum_of_row(float value) {
  value += __shfl_xor_sync(0xFFFFFFFFu, value, 1);
  return value + __shfl_xor_sync(0xFFFFFFFFu, value, 2);
}

// Products become scores, those of keys that a query does not see kNever.
template <class V, int kRowTiles, int kColumnTiles>
__device__ void find_scores(const AttentionLayer& layer, int64_t head, int64_t first_query,
                            int64_t first_key, Sums (&scores)[kRowTiles][kColumnTiles]) {
  const TileScores<typename V::Products::Element> tile(layer, head, first_query, first_key);
  const int queries = static_cast<int>(clamped(layer.queries - first_query, 0, 16 * kRowTiles));
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int query = 16 * i + 8 * half + lane_of_warp() / 4;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          const int key = 8 * j + lane_of_warp() % 4 * 2 + k;
          float& score = scores[i][j][2 * half + k];
          if (query >= queries || !tile.sees(query, key)) {
            score = kNever<float>;
          } else if constexpr (V::kScoring == Scoring::kGeneral) {
            score = tile.score(score, query, key);
          }
        }
      }
    }
  }
}

// Scores become weights, relative to the largest score so far, which has the weight 1 exactly:
// differences come first. `factor` leads from differences to powers of two.
template <int kRowTiles, int kColumnTiles, int kValueTiles>
__device__ void find_weights(Rows<kRowTiles>& rows, float factor,
                             Sums (&scores)[kRowTiles][kColumnTiles],
                             Sums (&values)[kRowTiles][kValueTiles]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float largest = kNever<float>;  // a NaN is passed over: the weights carry it
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
        largest = fmaxf(largest, fmaxf(scores[i][j][2 * half], scores[i][j][2 * half + 1]));
      }
      const float before = rows.largest[i][half];
      largest = fmaxf(largest_of_row(largest), before);
      rows.largest[i][half] = largest;
      const float base = largest == kNever<float> ? 0.0f : largest;
      const float shrinkage = power_of_two_fast((before - base) * factor);
      float sum = rows.sum[i][half] * shrinkage;
#pragma unroll
      for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          float& score = scores[i][j][2 * half + k];
          score = power_of_two_fast((score - base) * factor);
          sum += score;
        }
      }
      rows.sum[i][half] = sum;
#pragma unroll
      for (int j = 0; j < kValueTiles; ++j) {
        values[i][j][2 * half] *= shrinkage;
        values[i][j][2 * half + 1] *= shrinkage;
      }
    }
  }
}

template <int kQueries, int kKeys, int kRowTiles, int kColumnTiles>
__device__ void drop(const Kept<kQueries, kKeys>& kept, int first_row,
                     Sums (&weights)[kRowTiles][kColumnTiles]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int row = first_row + 16 * i + 8 * (k / 2) + lane_of_warp() / 4;
        if (!kept.at(row, 8 * j + lane_of_warp() % 4 * 2 + k % 2)) weights[i][j][k] = 0;
      }
    }
  }
}

template <class V>
__global__ void __launch_bounds__(ForwardShape<V>::kThreads)
    attention_forward_kernel(const __grid_constant__ AttentionForward whole) {
  using Shape = ForwardShape<V>;
  using Products = typename Shape::Products;
  using Storage = typename Shape::Storage;
  using QueryTile = typename Shape::QueryTile;
  using KeyTile = typename Shape::KeyTile;
  using ValueTile = typename Shape::ValueTile;
  constexpr bool kIsGeneral = Shape::kIsGeneral;
  constexpr int kFeatures = V::kFeatures;
  constexpr int kKeys = Shape::kKeys, kRowTiles = Shape::kRowTiles, kStride = KeyTile::kStride;
  constexpr int kThreads = Shape::kThreads;
  const BlockPlace place =
      place_of_block<Shape::kQueries>(blockIdx.x / Shape::kParts, whole.layer.batch,
                                      whole.layer.query_rows, whole.layer.query_starts);
  AttentionForward call = sequence_of<Storage>(whole, place.batch);
  const AttentionLayer& layer = call.layer;
  const int64_t head = place.head, first = place.first;
  if (first < 0 || first >= layer.queries) return;
  const int first_output = static_cast<int>(blockIdx.x % Shape::kParts) * Shape::kOutputs;
  call.layer.value.data = static_cast<Storage*>(layer.value.data) + first_output;

  Storage* const queries = reinterpret_cast<Storage*>(dynamic_shared());
  Storage* const keys = queries + QueryTile::kRows * kStride;
  Storage* const values = keys + KeyTile::kRows * kStride;
  __shared__ Kept<Shape::kQueries, kKeys> kept;

  const int64_t key_head = key_head_of(layer, head);
  const int own_row = static_cast<int>(threadIdx.x) / 32 * Shape::kWarpQueries;
  const int64_t own_first = first + own_row;
  const KeysOf seen(layer, {first, first + Shape::kQueries});
  const KeysOf own_seen(layer, {own_first, own_first + Shape::kWarpQueries});
  const float factor = kIsGeneral ? 1.0f : static_cast<float>(layer.scale);

  Sums sums[kRowTiles][Shape::kOutputs / 8];
  clear(sums);
  Rows<kRowTiles> rows;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows.largest[i][half] = kNever<float>;
      rows.sum[i][half] = 0;
    }
  }

  copy_tile<QueryTile, kThreads>(queries, layer.query, head, first, layer.queries, layer.features);
  int tile = seen.begin / kKeys * kKeys;
  copy_tile<KeyTile, kThreads>(keys, layer.key, key_head, tile, layer.keys, layer.features);
  copy_async_commit();
  for (; tile < seen.end; tile += kKeys) {
    copy_async_wait<0>();
    __syncthreads();  // keys are there, and nobody reads values any more
    copy_tile<ValueTile, kThreads>(values, layer.value, key_head, tile, layer.keys,
                                   layer.value_features - first_output);
    copy_async_commit();
    const bool has_work = tile < own_seen.end && tile + kKeys > own_seen.begin;
    Sums weights[kRowTiles][kKeys / 8];
    if (has_work) {
      clear(weights);
      add_product<Products, Side::kRows, Side::kRows, kFeatures>(
          weights, queries + own_row * kStride, kStride, keys, kStride);
      if (kIsGeneral || tile < own_seen.all_begin || tile + kKeys > own_seen.all_end) {
        find_scores<V>(layer, head, own_first, tile, weights);
      }
      find_weights(rows, factor * kLog2E, weights, sums);
    }
    if (kIsGeneral && layer.dropout > 0) draw<kThreads>(kept, layer, head, first, tile);
    copy_async_wait<0>();
    __syncthreads();  // values are there, and nobody reads keys any more
    typename Products::Operand operands[kRowTiles][kKeys / 8];
    if (has_work) {
      if (kIsGeneral && layer.dropout > 0) drop(kept, own_row, weights);
      make_operands<Products>(operands, weights);
    }
    if (tile + kKeys < seen.end) {
      copy_tile<KeyTile, kThreads>(keys, layer.key, key_head, tile + kKeys, layer.keys,
                                   layer.features);
    }
    copy_async_commit();
    if (has_work) add_product<Products, Side::kColumns>(sums, operands, values, ValueTile::kStride);
  }
  copy_async_wait<0>();
  __syncthreads();  // where no key is seen, queries may still be on their way

  // A query that sees no key is zeros, as in torch; a sink is one more key, whose value is zero.
  float factors[kRowTiles][2];
  const float growth = growth_of_kept<float>(layer);
  const bool has_sink = layer.sinks != nullptr;
  const float sink = has_sink ? static_cast<const float*>(layer.sinks)[head] : kNever<float>;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = sum_of_row(rows.sum[i][half]);
      float largest = rows.largest[i][half] * factor;
      float shrinkage = 1;
      if (has_sink && sink != kNever<float>) {
        const float both = fmaxf(largest, sink);
        shrinkage = power_of_two_fast((largest - both) * kLog2E);
        const float weight = sink == both ? 1.0f : power_of_two_fast((sink - both) * kLog2E);
        sum = sum * shrinkage + weight;
        largest = both;
      }
      const int64_t query = own_first + 16 * i + 8 * half + lane_of_warp() / 4;
      if (lane_of_warp() % 4 == 0 && query < layer.queries) {
        *row_of<float>(call.logsumexp, head, query) =
            sum == 0 ? kNever<float> : largest + logf(sum);
      }
      factors[i][half] = sum == 0 ? 0.0f : shrinkage * growth / sum;
    }
  }
  // The rows of queries that a warp has read are read by nobody else.
  Storage* const own = queries + own_row * kStride;
  store_sums<Products, kStride>(own, sums, factors);
  write_rows<Shape::kWarpQueries, Shape::kOutputs, kStride>(
      own, call.output, head, own_first, layer.queries, first_output, layer.value_features);
}

}  // namespace

void load_forward_kernels(DType dtype, Float32 float32) {
  with_each_variant(dtype, float32,
                    [](auto variant) { load_kernel(attention_forward_kernel<decltype(variant)>); });
}

void launch_attention_forward(const AttentionForward& call, const AttentionWork& work) {
  const AttentionLayer& layer = call.layer;
  with_variant(layer, work.float32, [&](auto variant) {
    using Shape = ForwardShape<decltype(variant)>;
    const int64_t blocks =
        Shape::kParts * layer.heads *
        blocks_of_head<Shape::kQueries>(layer.batch, layer.query_rows, layer.query_starts);
    launch("attention_forward_kernel", work.stream, {blocks, Shape::kThreads, Shape::kSharedBytes},
           attention_forward_kernel<decltype(variant)>, call);
  });
}

}  // namespace fastopt::cuda
