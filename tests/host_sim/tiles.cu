// The plain twins of the PTX instructions.

#include "cuda/tile_mma.cuh"
#include "harness.h"

namespace {

using namespace fastopt;

template <class Body>
__global__ void body_kernel(Body body) {
  body();
}

template <class Body>
void run_warp(Body body, int threads = 32) {
  sim::launch({dim3(1), dim3(threads)}, "body_kernel", body_kernel<Body>, body);
}

// Fragments of m16n8k16 and m16n8k8 as the tables of the PTX ISA number them: element i of a lane.
struct Position {
  int row, column;
};

Position position_of_a16(int lane, int i) {
  const int group = lane >> 2;
  const int thread = lane % 4;
  const bool upper = i < 2 || (i >= 4 && i < 6);
  return {upper ? group : group + 8, thread * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
}

Position position_of_b16(int lane, int i) {
  return {lane % 4 * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane >> 2};
}

Position position_of_c(int lane, int i) {
  return {(lane >> 2) + (i >= 2 ? 8 : 0), lane % 4 * 2 + (i & 1)};
}

Position position_of_a_tf32(int lane, int i) {
  return {(lane >> 2) + (i % 2 == 1 ? 8 : 0), lane % 4 + (i >= 2 ? 4 : 0)};
}

Position position_of_b_tf32(int lane, int i) { return {lane % 4 + 4 * i, lane >> 2}; }

template <class Input, int kCount, class PositionOf>
void pack(uint32_t* registers, const float* matrix, int columns, PositionOf position_of) {
  for (int i = 0; i < kCount; ++i) {
    const Position at = position_of(static_cast<int>(threadIdx.x), i);
    Input value;
    store(&value, matrix[at.row * columns + at.column]);
    if (i % 2 == 0) registers[i / 2] = 0;
    registers[i / 2] |= static_cast<uint32_t>(value.bits) << (i % 2 * 16);
  }
}

struct Tf32 {};

template <class Input>
constexpr int kDepth = std::is_same_v<Input, Tf32> ? 8 : 16;

// c [16, 8] += a [16, depth] b [depth, 8]
template <class Input>
void multiply(float* c, const float* a, const float* b) {
  run_warp([=] {
    const int lane = static_cast<int>(threadIdx.x);
    uint32_t a_registers[4], b_registers[2];
    float accumulator[4];
    for (int i = 0; i < 4; ++i) {
      const Position at = position_of_c(lane, i);
      accumulator[i] = c[at.row * 8 + at.column];
    }
    if constexpr (std::is_same_v<Input, Tf32>) {
      for (int i = 0; i < 4; ++i) {
        const Position at = position_of_a_tf32(lane, i);
        a_registers[i] = to_tf32(a[at.row * 8 + at.column]);
      }
      for (int i = 0; i < 2; ++i) {
        const Position at = position_of_b_tf32(lane, i);
        b_registers[i] = to_tf32(b[at.row * 8 + at.column]);
      }
      mma_m16n8k8(accumulator, a_registers, b_registers);
    } else {
      pack<Input, 8>(a_registers, a, 16, position_of_a16);
      pack<Input, 4>(b_registers, b, 8, position_of_b16);
      mma_m16n8k16<Input>(accumulator, a_registers, b_registers);
    }
    for (int i = 0; i < 4; ++i) {
      const Position at = position_of_c(lane, i);
      c[at.row * 8 + at.column] = accumulator[i];
    }
  });
}

template <class Input>
bool product_is_right() {
  constexpr int depth = kDepth<Input>;
  float a[16 * depth], b[depth * 8], c[16 * 8], expected[16 * 8];
  for (int i = 0; i < 16 * depth; ++i) a[i] = static_cast<float>(i * 7 % 23 - 11) / 4;
  for (int i = 0; i < depth * 8; ++i) b[i] = static_cast<float>(i * 5 % 19 - 9) / 8;
  for (int i = 0; i < 16 * 8; ++i) {
    c[i] = expected[i] = static_cast<float>(i);
    for (int k = 0; k < depth; ++k) expected[i] += a[i / 8 * depth + k] * b[k * 8 + i % 8];
  }
  multiply<Input>(c, a, b);
  return memcmp(c, expected, sizeof c) == 0;
}

// One 1 at each place of A picks a row of B, whose values tell their places.
template <class Input>
bool every_element_is_in_its_place() {
  constexpr int depth = kDepth<Input>;
  float b[depth * 8];
  for (int i = 0; i < depth * 8; ++i) b[i] = static_cast<float>(i + 1);
  for (int place = 0; place < 16 * depth; ++place) {
    float a[16 * depth] = {}, c[16 * 8] = {};
    a[place] = 1.0f;
    multiply<Input>(c, a, b);
    for (int i = 0; i < 16 * 8; ++i) {
      const float expected = i / 8 == place / depth ? b[place % depth * 8 + i % 8] : 0.0f;
      if (c[i] != expected) return false;
    }
  }
  return true;
}

template <bool kTransposed>
bool matrices_load() {
  uint32_t loaded[32][4];
  run_warp([&loaded] {
    __shared__ __align__(16) uint16_t tiles[4][8][8];
    const int lane = static_cast<int>(threadIdx.x);
    for (int i = lane; i < 256; i += 32) tiles[i / 64][i / 8 % 8][i % 8] = i;
    __syncwarp();
    const void* row = tiles[lane / 8][lane % 8];
    uint32_t fragment[4];
    if (kTransposed) {
      load_matrix_x4_trans(fragment, row);
    } else {
      load_matrix_x4(fragment, row);
    }
    memcpy(loaded[lane], fragment, sizeof fragment);
  });
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      for (int i = 0; i < 2; ++i) {
        const unsigned row = lane / 4;
        const unsigned column = lane % 4 * 2 + i;
        const unsigned place = kTransposed ? column * 8 + row : row * 8 + column;
        const unsigned value = loaded[lane][matrix] >> (16 * i) & 0xFFFFu;
        if (value != matrix * 64 + place) return false;
      }
    }
  }
  return true;
}

}  // namespace

CASE(product_bf16) { return product_is_right<BFloat16>(); }
CASE(product_fp16) { return product_is_right<Half>(); }
CASE(product_tf32) { return product_is_right<Tf32>(); }
CASE(layout_bf16) { return every_element_is_in_its_place<BFloat16>(); }
CASE(layout_fp16) { return every_element_is_in_its_place<Half>(); }
CASE(layout_tf32) { return every_element_is_in_its_place<Tf32>(); }
CASE(load_matrix) { return matrices_load<false>(); }
CASE(load_matrix_transposed) { return matrices_load<true>(); }

CASE(tf32_ignores_low_bits) {
  float a[16 * 8] = {}, b[8 * 8] = {}, c[16 * 8] = {};
  a[0] = float_from_bits(0x3F801000u);  // half a tf32 step above 1: away from zero
  b[0] = float_from_bits(0x3F800FFFu);
  multiply<Tf32>(c, a, b);
  return c[0] == float_from_bits(0x3F802000u);
}

CASE(product_of_half_a_warp) {
  run_warp(
      [] {
        float accumulator[4] = {};
        const uint32_t a[4] = {}, b[2] = {};
        mma_m16n8k16<BFloat16>(accumulator, a, b);
      },
      16);
  return true;
}

CASE(load_matrix_from_global) {
  alignas(16) static uint16_t row[8];
  run_warp([] {
    uint32_t fragment[4];
    load_matrix_x4(fragment, row);
  });
  return true;
}

CASE(copy_async) {
  alignas(16) float source[32][4];
  for (int i = 0; i < 32 * 4; ++i) source[i / 4][i % 4] = static_cast<float>(i);
  bool early = false, right = true;
  run_warp([&] {
    __shared__ __align__(16) float tile[2][32][4];
    const int lane = static_cast<int>(threadIdx.x);
    for (int stage = 0; stage < 2; ++stage) {
      copy_async_16(tile[stage][lane], source[lane]);
      copy_async_commit();
    }
    for (float value : tile[0][lane]) early |= !std::isnan(value);
    copy_async_wait<1>();
    for (float value : tile[1][lane]) early |= !std::isnan(value);
    __syncwarp();
    for (int i = 0; i < 4; ++i) right &= tile[0][lane ^ 5][i] == source[lane ^ 5][i];
    copy_async_wait<0>();
    __syncwarp();
    for (int i = 0; i < 4; ++i) right &= tile[1][lane ^ 5][i] == source[lane ^ 5][i];
  });
  return !early && right;
}

CASE(copy_async_with_zeros) {
  alignas(16) float source[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  bool right = true;
  run_warp([&] {
    __shared__ __align__(16) float tile[5][4];
    const int lane = static_cast<int>(threadIdx.x);
    if (lane > 4) return;
    copy_async_16(tile[lane], source, lane * 4);
    copy_async_commit();
    copy_async_wait<0>();
    for (int i = 0; i < 4; ++i) right &= tile[lane][i] == (i < lane ? source[i] : 0.0f);
  });
  return right;
}

CASE(copy_async_without_commit) {
  alignas(16) float source[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  float sum = 0.0f;
  run_warp([&] {
    __shared__ __align__(16) float tile[4];
    if (threadIdx.x == 0) copy_async_16(tile, source);
    copy_async_wait<0>();
    __syncthreads();
    if (threadIdx.x == 1) sum = tile[0] + tile[1];
  });
  return sum == 3.0f;
}

CASE(copy_async_before_the_wait) {
  alignas(16) float source[4] = {1.0f, 2.0f, 3.0f, 4.0f};
  float sum = 0.0f;
  run_warp([&] {
    __shared__ __align__(16) float tile[4];
    if (threadIdx.x == 0) copy_async_16(tile, source);
    copy_async_commit();
    __syncthreads();
    if (threadIdx.x == 1) sum = tile[0] + tile[1];
    __syncthreads();
    copy_async_wait<0>();
  });
  return sum == 3.0f;
}

CASE(copy_async_misaligned) {
  alignas(16) float source[8] = {};
  run_warp([&] {
    __shared__ __align__(16) float tile[4];
    copy_async_16(tile, source + 1);
  });
  return true;
}

CASE(copy_async_to_global) {
  alignas(16) float source[8] = {};
  run_warp([&] { copy_async_16(source, source + 4); });
  return true;
}
