// Two passes over scores for what the main backward pass does not write: the gradients of queries,
// where their bits shall not hang on the order of blocks, and the gradient of a bias. Both go
// through tiles of queries by keys; a block owns what it writes, and nothing is added to memory.

#include "cuda/attention_gradients.cuh"
#include "cuda/attention_passes.h"

namespace fastopt::cuda {

namespace {

// As many queries as keys in a tile; four tiles of rows fit into 99 KB.
template <class V>
struct SquareShape : V {
  using typename V::Products;
  using V::kIsHalf, V::kFeatures;
  static constexpr int kSide =
      (kIsHalf ? 128 : 64) / (kFeatures / 64) > 64 ? 64 : (kIsHalf ? 128 : 64) / (kFeatures / 64);
  static constexpr int kWarps = kSide / 16;
  static constexpr int kThreads = kThreadsOf<kWarps>;
  using RowTile = Tile<Products, kSide, kFeatures>;
  static constexpr int kStride = RowTile::kStride;
  static constexpr int kSharedBytes = 4 * RowTile::kBytes;
};

// The four tiles that a square of scores needs.
template <class V>
struct Square {
  using Shape = SquareShape<V>;
  using Products = typename Shape::Products;
  using Storage = typename Shape::Storage;
  using RowTile = typename Shape::RowTile;
  static constexpr int kElements = Shape::kSide * Shape::kStride;

  Storage *queries, *gradients, *keys, *values;
  QueryNumbers<Shape::kSide>& numbers;
  Kept<Shape::kSide, Shape::kSide>& kept;

  __device__ Square(QueryNumbers<Shape::kSide>& numbers, Kept<Shape::kSide, Shape::kSide>& kept)
      : queries(reinterpret_cast<Storage*>(dynamic_shared())),
        gradients(queries + kElements),
        keys(gradients + kElements),
        values(keys + kElements),
        numbers(numbers),
        kept(kept) {}

  __device__ void load_queries(const AttentionBackward& call, const float* deltas, int64_t head,
                               int64_t first) const {
    const AttentionLayer& layer = call.layer;
    copy_tile<RowTile, Shape::kThreads>(queries, layer.query, head, first, layer.queries,
                                        layer.features);
    copy_tile<RowTile, Shape::kThreads>(gradients, call.output_gradient, head, first, layer.queries,
                                        layer.value_features);
    load_numbers<Shape::kThreads>(numbers, call, deltas, head, first);
  }

  __device__ void load_keys(const AttentionLayer& layer, int64_t head, int64_t first) const {
    const int64_t key_head = key_head_of(layer, head);
    copy_tile<RowTile, Shape::kThreads>(keys, layer.key, key_head, first, layer.keys,
                                        layer.features);
    copy_tile<RowTile, Shape::kThreads>(values, layer.value, key_head, first, layer.keys,
                                        layer.value_features);
  }

  // Gradients of products, or with kOfScores of scores, for the warp's 16 queries.
  template <bool kOfScores>
  __device__ void differentiate_own(const AttentionLayer& layer, int64_t head, int64_t first_query,
                                    int64_t first_key, Sums (&results)[1][Shape::kSide / 8]) const {
    const int own_row = static_cast<int>(threadIdx.x) / 32 * 16;
    Sums weights[1][Shape::kSide / 8], through[1][Shape::kSide / 8];
    clear(weights);
    clear(through);
    add_product<Products, Side::kRows, Side::kRows, V::kFeatures>(
        weights, queries + own_row * Shape::kStride, Shape::kStride, keys, Shape::kStride);
    add_product<Products, Side::kRows, Side::kRows, V::kFeatures>(
        through, gradients + own_row * Shape::kStride, Shape::kStride, values, Shape::kStride);
    const TileScores<Storage> scores(layer, head, first_query, first_key);
    const bool drops = V::kScoring == Scoring::kGeneral && layer.dropout > 0;
    const float growth = growth_of_kept<float>(layer);
#pragma unroll
    for (int j = 0; j < Shape::kSide / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int query = own_row + 8 * (k / 2) + lane_of_warp() / 4;
        const int key = 8 * j + lane_of_warp() % 4 * 2 + k % 2;
        const float of_product =
            differentiate<V::kScoring, true>(scores, numbers, drops ? &kept : nullptr, growth,
                                             query, key, weights[0][j][k], through[0][j][k]);
        results[0][j][k] = kOfScores ? through[0][j][k] : of_product;
      }
    }
  }
};

template <class V>
__global__ void __launch_bounds__(SquareShape<V>::kThreads, 2)
    attention_query_gradient_kernel(const __grid_constant__ AttentionBackward whole,
                                    const float* whole_deltas) {
  using Shape = SquareShape<V>;
  using Products = typename Shape::Products;
  using Storage = typename Shape::Storage;
  __shared__ QueryNumbers<Shape::kSide> numbers;
  __shared__ Kept<Shape::kSide, Shape::kSide> kept;
  const BlockPlace place = place_of_block<Shape::kSide>(
      blockIdx.x, whole.layer.batch, whole.layer.query_rows, whole.layer.query_starts);
  const AttentionBackward call = sequence_of<Storage>(whole, place.batch);
  const AttentionLayer& layer = call.layer;
  const int64_t head = place.head, first = place.first;
  if (first < 0 || first >= layer.queries) return;
  const float* const deltas = whole_deltas + numbers_before(whole, call);
  const Square<V> square(numbers, kept);
  square.load_queries(call, deltas, head, first);
  copy_async_commit();
  Sums sums[1][V::kFeatures / 8];
  clear(sums);
  const KeysOf seen(layer, {first, first + Shape::kSide});
  for (int tile = seen.begin / Shape::kSide * Shape::kSide; tile < seen.end; tile += Shape::kSide) {
    square.load_keys(layer, head, tile);
    copy_async_commit();
    if constexpr (V::kScoring == Scoring::kGeneral) {
      if (layer.dropout > 0) draw<Shape::kThreads>(kept, layer, head, first, tile);
    }
    copy_async_wait<0>();
    __syncthreads();
    Sums gradients[1][Shape::kSide / 8];
    square.template differentiate_own<false>(layer, head, first, tile, gradients);
    typename Products::Operand operands[1][Shape::kSide / 8];
    make_operands<Products>(operands, gradients);
    add_product<Products, Side::kColumns>(sums, operands, square.keys, Shape::kStride);
    __syncthreads();  // nobody reads this tile any more
  }
  copy_async_wait<0>();
  __syncthreads();
  const int own_row = static_cast<int>(threadIdx.x) / 32 * 16;
  const float scale = static_cast<float>(layer.scale);
  const float factors[1][2] = {{scale, scale}};
  Storage* const own = square.queries + own_row * Shape::kStride;
  store_sums<Products, Shape::kStride>(own, sums, factors);
  write_rows<16, V::kFeatures, Shape::kStride>(own, call.query_gradient, head, first + own_row,
                                               layer.queries, 0, layer.features);
}

// A block has a square of the bias, and goes through the batches and heads that share it.
template <class V>
__global__ void __launch_bounds__(SquareShape<V>::kThreads, 2)
    attention_bias_gradient_kernel(const __grid_constant__ AttentionBackward whole,
                                   const float* deltas, int64_t batches, int64_t heads) {
  using Shape = SquareShape<V>;
  using Storage = typename Shape::Storage;
  __shared__ QueryNumbers<Shape::kSide> numbers;
  __shared__ Kept<Shape::kSide, Shape::kSide> kept;
  const AttentionLayer& layer = whole.layer;
  const int64_t rows = (layer.queries + Shape::kSide - 1) / Shape::kSide;
  const int64_t columns = (layer.keys + Shape::kSide - 1) / Shape::kSide;
  const int64_t first_key = blockIdx.x % columns * Shape::kSide;
  const int64_t first_query = blockIdx.x / columns % rows * Shape::kSide;
  const int64_t part = blockIdx.x / columns / rows;
  const Square<V> square(numbers, kept);
  Sums sums[1][Shape::kSide / 8];
  clear(sums);
  const int64_t batch_end = batches == 1 ? layer.batch : part / heads + 1;
  const int64_t head_end = heads == 1 ? layer.heads : part % heads + 1;
  for (int64_t batch = part / heads; batch < batch_end; ++batch) {
    const AttentionBackward call = sequence_of<Storage>(whole, batch);
    const KeysOf seen(call.layer, {first_query, first_query + Shape::kSide});
    if (first_key >= seen.end || first_key + Shape::kSide <= seen.begin) continue;
    const float* const own_deltas = deltas + numbers_before(whole, call);
    for (int64_t head = part % heads; head < head_end; ++head) {
      __syncthreads();  // nobody reads the tiles of the head before any more
      square.load_queries(call, own_deltas, head, first_query);
      square.load_keys(call.layer, head, first_key);
      copy_async_commit();
      if (layer.dropout > 0) draw<Shape::kThreads>(kept, call.layer, head, first_query, first_key);
      copy_async_wait<0>();
      __syncthreads();
      Sums gradients[1][Shape::kSide / 8];
      square.template differentiate_own<true>(call.layer, head, first_query, first_key, gradients);
#pragma unroll
      for (int j = 0; j < Shape::kSide / 8; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[0][j][k] += gradients[0][j][k];
      }
    }
  }
  float* const target = static_cast<float*>(whole.bias_gradient) +
                        part / heads * whole.bias_gradient_strides[0] +
                        part % heads * whole.bias_gradient_strides[1];
  const int own_row = static_cast<int>(threadIdx.x) / 32 * 16;
#pragma unroll
  for (int j = 0; j < Shape::kSide / 8; ++j) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int64_t query = first_query + own_row + 8 * (k / 2) + lane_of_warp() / 4;
      const int64_t key = first_key + 8 * j + lane_of_warp() % 4 * 2 + k % 2;
      if (query < layer.queries && key < layer.keys) {
        target[query * whole.bias_gradient_strides[2] + key] = sums[0][j][k];
      }
    }
  }
}

// A bias makes scores general.
template <class Visitor>
void with_bias_variant(const AttentionLayer& layer, Float32 float32, const Visitor& visit) {
  with_variant(layer, float32, [&](auto variant) {
    using V = decltype(variant);
    if constexpr (V::kScoring == Scoring::kGeneral) visit(variant);
  });
}

}  // namespace

void load_query_kernels(DType dtype, Float32 float32) {
  with_each_variant(dtype, float32, [](auto variant) {
    using V = decltype(variant);
    load_kernel(attention_query_gradient_kernel<V>);
    if constexpr (V::kScoring == Scoring::kGeneral) load_kernel(attention_bias_gradient_kernel<V>);
  });
}

void launch_query_gradients(const AttentionBackward& call, const float* deltas,
                            const AttentionWork& work) {
  const AttentionLayer& layer = call.layer;
  with_variant(layer, work.float32, [&](auto variant) {
    using Shape = SquareShape<decltype(variant)>;
    const int64_t blocks = layer.heads * blocks_of_head<Shape::kSide>(layer.batch, layer.query_rows,
                                                                      layer.query_starts);
    launch("attention_query_gradient_kernel", work.stream,
           {blocks, Shape::kThreads, Shape::kSharedBytes},
           attention_query_gradient_kernel<decltype(variant)>, call, deltas);
  });
}

void launch_bias_gradient(const AttentionBackward& call, const float* deltas,
                          const AttentionWork& work) {
  const AttentionLayer& layer = call.layer;
  const int64_t batches = call.bias_gradient_strides[0] == 0 ? 1 : layer.batch;
  const int64_t heads = call.bias_gradient_strides[1] == 0 ? 1 : layer.heads;
  with_bias_variant(layer, work.float32, [&](auto variant) {
    using Shape = SquareShape<decltype(variant)>;
    const int64_t rows = (layer.queries + Shape::kSide - 1) / Shape::kSide;
    const int64_t columns = (layer.keys + Shape::kSide - 1) / Shape::kSide;
    launch("attention_bias_gradient_kernel", work.stream,
           {batches * heads * rows * columns, Shape::kThreads, Shape::kSharedBytes},
           attention_bias_gradient_kernel<decltype(variant)>, call, deltas, batches, heads);
  });
}

void load_attention_kernels(DType dtype, Float32 float32, int device) {
#if !defined(FASTOPT_HOST_SIM)
  const DeviceGuard guard(device);
#else
  (void)device;
#endif
  load_forward_kernels(dtype, float32);
  load_backward_kernels(dtype, float32);
  load_query_kernels(dtype, float32);
}

}  // namespace fastopt::cuda
