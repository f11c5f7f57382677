// Products of tiles against plain loops, and attention over sequences whose starts are wrong.

#include <algorithm>

#include "cuda/attention_backward.cu"
#include "cuda/attention_forward.cu"
#include "cuda/attention_query_gradients.cu"
#include "harness.h"

namespace {

using namespace fastopt;
using namespace fastopt::cuda;

constexpr int kRows = 32, kColumns = 16, kDeep = 32, kStride = 40;

// Whole numbers, which every type holds exactly; no two rows or columns are alike.
float left_value(int row, int depth) { return static_cast<float>((row * 7 + depth * 3) % 11 - 5); }
float right_value(int depth, int column) {
  return static_cast<float>((depth * 5 + column * 2) % 13 - 6);
}

template <class Products>
struct Buffers {
  using Element = typename Products::Element;
  std::vector<Element> left = std::vector<Element>(kStride * kStride);
  std::vector<Element> right = std::vector<Element>(kStride * kStride);
  std::vector<float> sums = std::vector<float>(kRows * kColumns);

  Buffers(Side left_side, Side right_side) {
    for (int k = 0; k < kDeep; ++k) {
      for (int row = 0; row < kRows; ++row) {
        const bool rows = left_side == Side::kRows;
        store(&left[rows ? row * kStride + k : k * kStride + row], left_value(row, k));
      }
      for (int column = 0; column < kColumns; ++column) {
        const bool rows = right_side == Side::kRows;
        store(&right[rows ? column * kStride + k : k * kStride + column], right_value(k, column));
      }
    }
  }

  bool is_right(float factor) const {
    for (int row = 0; row < kRows; ++row) {
      for (int column = 0; column < kColumns; ++column) {
        float sum = 0;
        for (int k = 0; k < kDeep; ++k) sum += left_value(row, k) * right_value(k, column);
        if (sums[row * kColumns + column] != factor * sum) return false;
      }
    }
    return true;
  }
};

__device__ void write_sums(float* target, const Sums (&sums)[2][2]) {
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      for (int k = 0; k < 4; ++k) {
        const int row = 16 * i + 8 * (k / 2) + lane_of_warp() / 4;
        target[row * kColumns + 8 * j + lane_of_warp() % 4 * 2 + k % 2] = sums[i][j][k];
      }
    }
  }
}

template <class Products, Side kLeftSide, Side kRightSide>
__global__ void product_kernel(const typename Products::Element* left,
                               const typename Products::Element* right, float* target) {
  using Element = typename Products::Element;
  Element* const tiles = reinterpret_cast<Element*>(dynamic_shared());
  for (int i = lane_of_warp(); i < kStride * kStride; i += 32) {
    tiles[i] = left[i];
    tiles[kStride * kStride + i] = right[i];
  }
  __syncwarp();
  Sums sums[2][2];
  clear(sums);
  add_product<Products, kLeftSide, kRightSide, kDeep>(sums, tiles, kStride,
                                                      tiles + kStride * kStride, kStride);
  write_sums(target, sums);
}

// Sums that hold a left operand become one.
template <class Products, Side kRightSide>
__global__ void operand_kernel(const typename Products::Element* right, float* target) {
  using Element = typename Products::Element;
  Element* const tile = reinterpret_cast<Element*>(dynamic_shared());
  for (int i = lane_of_warp(); i < kStride * kStride; i += 32) tile[i] = right[i];
  __syncwarp();
  Sums left[2][kDeep / 8], sums[2][2];
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < kDeep / 8; ++j) {
      for (int k = 0; k < 4; ++k) {
        const int row = 16 * i + 8 * (k / 2) + lane_of_warp() / 4;
        left[i][j][k] = left_value(row, 8 * j + lane_of_warp() % 4 * 2 + k % 2);
      }
    }
  }
  clear(sums);
  typename Products::Operand operands[2][kDeep / 8];
  make_operands<Products>(operands, left);
  add_product<Products, kRightSide>(sums, operands, tile, kStride);
  write_sums(target, sums);
}

template <class Products, Side kLeftSide, Side kRightSide>
bool is_product_right() {
  Buffers<Products> buffers(kLeftSide, kRightSide);
  const size_t bytes = 2 * kStride * kStride * sizeof(typename Products::Element);
  sim::launch({dim3(1), dim3(32), bytes}, "product_kernel",
              product_kernel<Products, kLeftSide, kRightSide>, buffers.left.data(),
              buffers.right.data(), buffers.sums.data());
  return buffers.is_right(1);
}

template <class Products, Side kRightSide>
bool is_operand_right() {
  Buffers<Products> buffers(Side::kRows, kRightSide);
  const size_t bytes = kStride * kStride * sizeof(typename Products::Element);
  sim::launch({dim3(1), dim3(32), bytes}, "operand_kernel", operand_kernel<Products, kRightSide>,
              buffers.right.data(), buffers.sums.data());
  return buffers.is_right(1);
}

template <class Products>
bool are_all_right() {
  return is_product_right<Products, Side::kRows, Side::kRows>() &&
         is_product_right<Products, Side::kRows, Side::kColumns>() &&
         is_product_right<Products, Side::kColumns, Side::kRows>() &&
         is_product_right<Products, Side::kColumns, Side::kColumns>() &&
         is_operand_right<Products, Side::kRows>() && is_operand_right<Products, Side::kColumns>();
}

// Numbers between two guards.
struct Guarded {
  static constexpr size_t kGuard = 4096;
  std::vector<float> numbers;

  Guarded(size_t count, float value) : numbers(count + 2 * kGuard, -7.0f) {
    std::fill(numbers.begin() + kGuard, numbers.end() - kGuard, value);
  }
  AttentionTensor tensor(int64_t features) {
    return {numbers.data() + kGuard, 0, features, 2 * features};  // [rows, 2 heads, features]
  }
  bool is_intact() const {
    const auto kept = [](float number) { return number == -7.0f; };
    return std::all_of(numbers.begin(), numbers.begin() + kGuard, kept) &&
           std::all_of(numbers.end() - kGuard, numbers.end(), kept);
  }
};

}  // namespace

CASE(products_bf16) { return are_all_right<HalfProducts<BFloat16>>(); }
CASE(products_fp16) { return are_all_right<HalfProducts<Half>>(); }
CASE(products_tf32) { return are_all_right<Tf32Products>(); }
CASE(products_fp32) { return are_all_right<Fp32Products>(); }

// On a card, starts are not read before the launch: whatever they are, nothing outside of the
// tensors is written, or read for what is.
CASE(wrong_starts) {
  constexpr int64_t kTokens = 10, kHeads = 2, kFeatures = 8;
  const std::vector<int32_t> starts = {0, 50, -7, 3, 1 << 30, 9};
  const std::vector<int32_t> used = {1 << 30, -4, 3, 2, 700};
  Guarded query(kTokens * kHeads * kFeatures, 1), key = query, value = query, output = query;
  Guarded gradient = query, logsumexp(kTokens * kHeads, 0), deltas = logsumexp;
  Guarded query_gradient = query, key_gradient = query, value_gradient = query, sums = query;
  AttentionForward forward{};
  AttentionLayer& layer = forward.layer;
  layer.dtype = DType::kFloat32;
  layer.batch = 5;
  layer.heads = layer.key_heads = kHeads;
  layer.queries = layer.keys = layer.query_rows = layer.key_rows = kTokens;
  layer.features = layer.value_features = kFeatures;
  layer.query = query.tensor(kFeatures);
  layer.key = key.tensor(kFeatures);
  layer.value = value.tensor(kFeatures);
  layer.query_starts = layer.key_starts = starts.data();
  layer.used_keys = used.data();
  layer.scale = 1;
  layer.left = layer.right = -1;
  forward.output = output.tensor(kFeatures);
  forward.logsumexp = {logsumexp.numbers.data() + Guarded::kGuard, 0, kTokens, 1};
  const AttentionWork work{Float32::kExact, {0, nullptr}};
  launch_attention_forward(forward, work);
  AttentionBackward backward{};
  backward.layer = layer;
  backward.output = forward.output;
  backward.logsumexp = forward.logsumexp;
  backward.output_gradient = gradient.tensor(kFeatures);
  backward.query_gradient = query_gradient.tensor(kFeatures);
  backward.key_gradient = key_gradient.tensor(kFeatures);
  backward.value_gradient = value_gradient.tensor(kFeatures);
  float* const delta_data = deltas.numbers.data() + Guarded::kGuard;
  launch_attention_backward(backward, delta_data, nullptr, work);
  launch_attention_backward(backward, delta_data, sums.numbers.data() + Guarded::kGuard, work);
  for (const Guarded* one :
       {&output, &logsumexp, &deltas, &query_gradient, &key_gradient, &value_gradient, &sums}) {
    if (!one->is_intact()) return false;
  }
  return true;
}
