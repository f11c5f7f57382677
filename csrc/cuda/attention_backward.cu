// The backward pass, from logsumexp (Dao 2023). A block owns some keys of one key head and adds up
// the gradients of these keys and their values in registers, while the queries that see them go by.
// Products are transposed, keys by queries: weights and gradients of scores are then left operands
// as they lie in registers. The gradients of queries are added to memory, or left to
// attention_query_gradients.cu.

#include "cuda/attention_gradients.cuh"
#include "cuda/attention_passes.h"

namespace fastopt::cuda {

namespace {

// Sizes that fit into 99 KB. Of 256 features, a block adds up gradients of 128, and of 128 in one
// variant of exact fp32 of 64: with all of them, sums would not fit into registers. For the same
// reason a warp has one row tile, although two would ask less of shared memory.
template <class V>
struct KeysShape : V {
  using typename V::Products;
  using V::kIsHalf, V::kIsExact, V::kIsGeneral, V::kFeatures;
  static constexpr int kMostOutputs = kIsExact && kIsGeneral && kFeatures == 128 ? 64 : 128;
  static constexpr int kOutputs = kFeatures < kMostOutputs ? kFeatures : kMostOutputs;
  static constexpr int kParts = kFeatures / kOutputs;
  static constexpr int kWarps = kIsHalf || kFeatures < 256 ? 4 : 1;
  static constexpr int kRowTiles = 1;
  static constexpr int kWarpKeys = 16 * kRowTiles;
  static constexpr int kKeys = kWarps * kWarpKeys;
  static constexpr bool kIsTight =
      kFeatures == 256 || (kFeatures == 128 && (kIsGeneral || !kIsHalf));
  static constexpr int kQueries = kIsTight ? 16 : 32;
  static constexpr int kStages = kIsHalf && kFeatures < 256 ? 2 : 1;
  static constexpr int kThreads = kThreadsOf<kWarps>;
  using KeyTile = Tile<Products, kKeys, kFeatures>;
  using QueryTile = Tile<Products, kQueries, kFeatures>;
  using ScoreTile = Tile<Products, kKeys, kQueries>;
  static constexpr int kSharedBytes =
      2 * KeyTile::kBytes + 2 * kStages * QueryTile::kBytes + ScoreTile::kBytes;
};

template <class V>
__global__ void __launch_bounds__(KeysShape<V>::kThreads, 2)
    attention_backward_kernel(const __grid_constant__ AttentionBackward whole,
                              const float* whole_deltas, float* whole_query_sums) {
  using Shape = KeysShape<V>;
  using Products = typename Shape::Products;
  using Storage = typename Shape::Storage;
  using KeyTile = typename Shape::KeyTile;
  using QueryTile = typename Shape::QueryTile;
  constexpr bool kIsGeneral = Shape::kIsGeneral;
  constexpr int kKeys = Shape::kKeys, kQueries = Shape::kQueries, kRowTiles = Shape::kRowTiles;
  constexpr int kThreads = Shape::kThreads, kStride = KeyTile::kStride;
  constexpr int kScoreStride = Shape::ScoreTile::kStride, kOutputs = Shape::kOutputs;
  const int part = static_cast<int>(blockIdx.x % Shape::kParts);
  const BlockPlace place = place_of_block<kKeys>(blockIdx.x / Shape::kParts, whole.layer.batch,
                                                 whole.layer.key_rows, whole.layer.key_starts);
  const AttentionBackward call = sequence_of<Storage>(whole, place.batch);
  const AttentionLayer& layer = call.layer;
  const int64_t key_head = place.head, first_key = place.first;
  if (first_key < 0 || first_key >= layer.keys) return;
  const int64_t moved = numbers_before(whole, call);
  const float* const deltas = whole_deltas + moved;

  Storage* const keys = reinterpret_cast<Storage*>(dynamic_shared());
  Storage* const values = keys + kKeys * kStride;
  Storage* const queries = values + kKeys * kStride;  // [stages][queries, then gradients]
  constexpr int kStageElements = 2 * kQueries * kStride;
  Storage* const score_gradients = queries + Shape::kStages * kStageElements;  // [key][query]
  __shared__ QueryNumbers<kQueries> numbers[Shape::kStages];
  __shared__ Kept<kQueries, kKeys> kept[Shape::kStages];

  copy_tile<KeyTile, kThreads>(keys, layer.key, key_head, first_key, layer.keys, layer.features);
  copy_tile<KeyTile, kThreads>(values, layer.value, key_head, first_key, layer.keys,
                               layer.value_features);
  copy_async_commit();

  const int warp = static_cast<int>(threadIdx.x) / 32, own_row = warp * Shape::kWarpKeys;
  const int first_output = part * kOutputs;
  const float growth = growth_of_kept<float>(layer);
  const float scale = static_cast<float>(layer.scale);
  Sums key_sums[kRowTiles][kOutputs / 8], value_sums[kRowTiles][kOutputs / 8];
  clear(key_sums);
  clear(value_sums);

  const Range of_block{first_key, first_key + kKeys < layer.keys ? first_key + kKeys : layer.keys};
  const Range seeing_queries = seeing(layer, of_block);
  const int first_tile = static_cast<int>(seeing_queries.begin) / kQueries * kQueries;
  const int tiles =
      seeing_queries.begin < seeing_queries.end
          ? (static_cast<int>(seeing_queries.end) - first_tile + kQueries - 1) / kQueries
          : 0;
  const int group = static_cast<int>(layer.heads / layer.key_heads);
  const auto head_of = [&](int step) { return key_head * group + step / tiles; };
  const auto tile_of = [&](int step) { return first_tile + step % tiles * kQueries; };
  const auto load_stage = [&](int step) {
    const int stage = step % Shape::kStages;
    Storage* const target = queries + stage * kStageElements;
    const int64_t head = head_of(step), first = tile_of(step);
    copy_tile<QueryTile, kThreads>(target, layer.query, head, first, layer.queries, layer.features);
    copy_tile<QueryTile, kThreads>(target + kQueries * kStride, call.output_gradient, head, first,
                                   layer.queries, layer.value_features);
    copy_async_commit();
    load_numbers<kThreads>(numbers[stage], call, deltas, head, first);
  };

  const int steps = tiles * group;
  if (steps > 0) load_stage(0);
  for (int step = 0; step < steps; ++step) {
    const int stage = step % Shape::kStages;
    const Storage* const query_tile = queries + stage * kStageElements;
    const Storage* const gradient_tile = query_tile + kQueries * kStride;
    const int64_t head = head_of(step);
    const int first_query = tile_of(step);
    const bool drops = kIsGeneral && layer.dropout > 0;
    copy_async_wait<0>();
    if constexpr (kIsGeneral) {
      if (drops) draw<kThreads>(kept[stage], layer, head, first_query, first_key);
    }
    __syncthreads();  // this stage is there, and nobody reads the other one any more
    if (Shape::kStages > 1 && step + 1 < steps) load_stage(step + 1);

    Sums weights[kRowTiles][kQueries / 8], through[kRowTiles][kQueries / 8];
    clear(weights);
    clear(through);
    add_product<Products, Side::kRows, Side::kRows, V::kFeatures>(weights, keys + own_row * kStride,
                                                                  kStride, query_tile, kStride);
    add_product<Products, Side::kRows, Side::kRows, V::kFeatures>(
        through, values + own_row * kStride, kStride, gradient_tile, kStride);
    const TileScores<Storage> scores(layer, head, first_query, first_key);
    const KeysOf seen(layer, {first_query, first_query + kQueries});
    const int64_t own_first = first_key + own_row;
    const bool is_bounded =
        own_first < seen.all_begin || own_first + Shape::kWarpKeys > seen.all_end;
    Sums gradients[kRowTiles][kQueries / 8];
    const auto differentiate_all = [&](auto bounded) {
    // Queries first: their numbers leave the registers before the next ones' come.
#pragma unroll
      for (int j = 0; j < kQueries / 8; ++j) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const int key = own_row + 16 * i + 8 * (k / 2) + lane_of_warp() / 4;
            const int query = 8 * j + lane_of_warp() % 4 * 2 + k % 2;
            gradients[i][j][k] = differentiate<V::kScoring, decltype(bounded)::value>(
                scores, numbers[stage], drops ? &kept[stage] : nullptr, growth, query, key,
                weights[i][j][k], through[i][j][k]);
          }
        }
      }
    };
    if (kIsGeneral || is_bounded) {
      differentiate_all(std::true_type{});
    } else {
      differentiate_all(std::false_type{});
    }

    typename Products::Operand operands[kRowTiles][kQueries / 8];
    make_operands<Products>(operands, weights);
    add_product<Products, Side::kColumns>(value_sums, operands, gradient_tile + first_output,
                                          kStride);
    make_operands<Products>(operands, gradients);
    add_product<Products, Side::kColumns>(key_sums, operands, query_tile + first_output, kStride);

    if (whole_query_sums) {
      float ones[kRowTiles][2];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) ones[i][0] = ones[i][1] = 1;
      store_sums<Products, kScoreStride>(score_gradients + own_row * kScoreStride, gradients, ones);
      __syncthreads();
      // Each warp multiplies for some features of all queries, not too many at once: its sums of
      // keys and values stay in registers.
      constexpr int kOwnColumns = kOutputs / Shape::kWarps;
      constexpr int kColumns = kOwnColumns < 64 ? kOwnColumns : 64;
      float* const target =
          whole_query_sums +
          (moved + head * call.logsumexp.head_stride + first_query) * layer.features;
      [[maybe_unused]] constexpr int kUnroll = kOwnColumns == kColumns ? 4 : 1;
      const int features = static_cast<int>(layer.features);
      const int rows = static_cast<int>(clamped(layer.queries - first_query, 0, kQueries));
#pragma unroll kUnroll
      for (int own = 0; own < kOwnColumns; own += kColumns) {
        Sums query_sums[kQueries / 16][kColumns / 8];
        clear(query_sums);
        const int column = first_output + warp * kOwnColumns + own;
        add_product<Products, Side::kColumns, Side::kColumns, kKeys>(
            query_sums, score_gradients, kScoreStride, keys + column, kStride);
#pragma unroll
        for (int i = 0; i < kQueries / 16; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
              const int row = 16 * i + 8 * (k / 2) + lane_of_warp() / 4;
              const int feature = column + 8 * j + lane_of_warp() % 4 * 2 + k % 2;
              if (row < rows && feature < features) {
                atomicAdd(target + (row * features + feature), query_sums[i][j][k] * scale);
              }
            }
          }
        }
      }
    }
    if (Shape::kStages == 1) {
      __syncthreads();  // nobody reads this stage any more
      if (step + 1 < steps) load_stage(step + 1);
    }
  }
  copy_async_wait<0>();
  __syncthreads();  // nobody reads keys or values any more

  const int64_t own_first = first_key + own_row;
  const auto write = [&](Storage* tile, const auto& sums, float factor,
                         const AttentionTensor& target, int64_t features) {
    float factors[kRowTiles][2];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) factors[i][0] = factors[i][1] = factor;
    Storage* const own = tile + own_row * kStride;
    store_sums<Products, kStride>(own, sums, factors);
    write_rows<Shape::kWarpKeys, kOutputs, kStride>(own, target, key_head, own_first, layer.keys,
                                                    first_output, features);
  };
  write(keys, key_sums, scale, call.key_gradient, layer.features);
  write(values, value_sums, 1.0f, call.value_gradient, layer.value_features);
}

// Outputs times their gradients, a warp for each row of each head.
constexpr int kDeltaThreads = 128;

template <class Storage>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(const __grid_constant__ AttentionBackward call, float* deltas) {
  const AttentionLayer& layer = call.layer;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kDeltaThreads / 32) + threadIdx.x / 32;
  const int64_t rows = layer.query_rows, heads = layer.heads;
  const int64_t batch = row / rows / heads, head = row / rows % heads, query = row % rows;
  const int64_t batches = layer.query_starts ? 1 : layer.batch;
  if (batch >= batches) return;
  const auto line = [&](const AttentionTensor& tensor) {
    return row_of<const Storage>(tensor, head, query) + batch * tensor.batch_stride;
  };
  const Storage* const output = line(call.output);
  const Storage* const gradient = line(call.output_gradient);
  float sum = 0;
  for (int64_t i = lane_of_warp(); i < layer.value_features; i += 32) {
    sum += load(output + i) * load(gradient + i);
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (lane_of_warp() == 0) deltas[row] = sum;
}

// The gradient of a sink in one head of one sequence, a block for each.
template <class Storage>
__global__ void __launch_bounds__(kDeltaThreads)
    attention_sink_kernel(const __grid_constant__ AttentionBackward whole, const float* deltas) {
  const int64_t batch = blockIdx.x / whole.layer.heads, head = blockIdx.x % whole.layer.heads;
  const AttentionBackward call = sequence_of<Storage>(whole, batch);
  const int64_t moved = numbers_before(whole, call);
  const float sink = static_cast<const float*>(call.layer.sinks)[head];
  float sum = 0;
  for (int64_t i = threadIdx.x; i < call.layer.queries; i += kDeltaThreads) {
    const float logsumexp = *row_of<const float>(call.logsumexp, head, i);
    if (logsumexp == kNever<float>) continue;
    sum -= exponential<float>(sink - logsumexp) *
           deltas[moved + head * call.logsumexp.head_stride + i];
  }
  __shared__ float of_warps[kDeltaThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  if (lane_of_warp() == 0) of_warps[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x > 0) return;
  float total = 0;
  for (float part : of_warps) total += part;
  static_cast<float*>(call.sink_gradient)[head] = total;
}

template <class Visitor>
void with_storage(DType dtype, const Visitor& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return visit(BFloat16{});
    case DType::kFloat16:
      return visit(Half{});
    default:
      return visit(float{});
  }
}

}  // namespace

void load_backward_kernels(DType dtype, Float32 float32) {
  with_each_variant(dtype, float32, [](auto variant) {
    load_kernel(attention_backward_kernel<decltype(variant)>);
  });
  with_storage(dtype, [](auto storage) {
    load_kernel(attention_delta_kernel<decltype(storage)>);
    load_kernel(attention_sink_kernel<decltype(storage)>);
  });
}

void launch_attention_backward(const AttentionBackward& call, float* deltas, float* query_sums,
                               const AttentionWork& work) {
  const AttentionLayer& layer = call.layer;
  with_storage(layer.dtype, [&](auto storage) {
    const int64_t batches = layer.query_starts ? 1 : layer.batch;
    const int64_t rows = batches * layer.heads * layer.query_rows, of_block = kDeltaThreads / 32;
    launch("attention_delta_kernel", work.stream, {(rows + of_block - 1) / of_block, kDeltaThreads},
           attention_delta_kernel<decltype(storage)>, call, deltas);
    if (call.sink_gradient) {
      launch("attention_sink_kernel", work.stream, {layer.batch * layer.heads, kDeltaThreads},
             attention_sink_kernel<decltype(storage)>, call, deltas);
    }
  });
  with_variant(layer, work.float32, [&](auto variant) {
    using Shape = KeysShape<decltype(variant)>;
    const int64_t blocks =
        Shape::kParts * layer.key_heads *
        blocks_of_head<Shape::kKeys>(layer.batch, layer.key_rows, layer.key_starts);
    launch("attention_backward_kernel", work.stream, {blocks, Shape::kThreads, Shape::kSharedBytes},
           attention_backward_kernel<decltype(variant)>, call, deltas, query_sums);
  });
  if (!query_sums) launch_query_gradients(call, deltas, work);
  if (call.bias_gradient) launch_bias_gradient(call, deltas, work);
}

}  // namespace fastopt::cuda
