#pragma once

// All inline PTX: asynchronous copies, matrix loads and tensor-core products, each beside a plain
// twin for the simulator. The layout of a fragment is that of the PTX ISA, chapter "Warp-level
// matrix instructions".
//
// Every function here but the copies is called by all 32 lanes of a warp together.

#include <cstdint>
#include <type_traits>

#include "core/dtypes.h"

#if defined(FASTOPT_HOST_SIM)
#include "host_sim/cuda.h"
#else
#include <cuda_runtime.h>
#endif

namespace fastopt {

#if defined(FASTOPT_HOST_SIM)
namespace tile_twin {

// What the lanes of a warp bring to a matrix product, all of them or none.
struct ProductLane {
  const uint32_t* a;
  const uint32_t* b;
  float* accumulator;
};

struct MatrixLane {
  uint32_t* fragment;
  const void* row;
};

inline void require_warp(uint32_t members, const char* name) {
  if (members != host_sim::kFullMask) {
    host_sim::fail(std::string(name) + " needs all 32 lanes of a warp");
  }
}

// One of the two 16-bit values of a register, as float.
template <class Input>
float half_of(uint32_t pair, int which) {
  const Input value{static_cast<uint16_t>(pair >> (16 * which))};
  return load(&value);
}

inline float tf32_of(uint32_t bits) { return float_from_bits(bits & 0xFFFFE000u); }

template <int kDepth, class ValueOfA, class ValueOfB>
void multiply(void* const* lanes, ValueOfA a_at, ValueOfB b_at) {
  float a[16][kDepth];
  float b[kDepth][8];
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < kDepth; ++k) a[row][k] = a_at(row, k);
  }
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < 8; ++column) b[k][column] = b_at(k, column);
  }
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      const int lane = (row % 8) * 4 + column / 2;
      float& sum = static_cast<ProductLane*>(lanes[lane])->accumulator[row / 8 * 2 + column % 2];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
    }
  }
}

template <class Input>
void multiply_16x8x16(void* const* lanes, uint32_t members) {
  require_warp(members, "mma.m16n8k16");
  // Registers of A: rows 0 to 7 and 8 to 15 of the left half, then of the right half.
  const auto a_at = [&](int row, int k) {
    const int lane = (row % 8) * 4 + k % 8 / 2;
    return half_of<Input>(static_cast<ProductLane*>(lanes[lane])->a[k / 8 * 2 + row / 8], k % 2);
  };
  const auto b_at = [&](int k, int column) {
    const int lane = column * 4 + k % 8 / 2;
    return half_of<Input>(static_cast<ProductLane*>(lanes[lane])->b[k / 8], k % 2);
  };
  multiply<16>(lanes, a_at, b_at);
}

inline void multiply_16x8x8_tf32(void* const* lanes, uint32_t members) {
  require_warp(members, "mma.m16n8k8");
  const auto a_at = [&](int row, int k) {
    const int lane = (row % 8) * 4 + k % 4;
    return tf32_of(static_cast<ProductLane*>(lanes[lane])->a[k / 4 * 2 + row / 8]);
  };
  const auto b_at = [&](int k, int column) {
    const int lane = column * 4 + k % 4;
    return tf32_of(static_cast<ProductLane*>(lanes[lane])->b[k / 4]);
  };
  multiply<8>(lanes, a_at, b_at);
}

// Lanes 8 i to 8 i + 7 name the rows of matrix i, which is 8 x 8 of 16 bits.
template <bool kTransposed>
void load_matrices(void* const* lanes, uint32_t members) {
  require_warp(members, "ldmatrix");
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t values[8][8];
    for (int row = 0; row < 8; ++row) {
      const void* source = static_cast<MatrixLane*>(lanes[matrix * 8 + row])->row;
      if (reinterpret_cast<uintptr_t>(source) % 16 != 0) {
        host_sim::fail("ldmatrix: a row is not aligned to 16 bytes");
      }
      if (!host_sim::is_shared(source, 16)) {
        host_sim::fail("ldmatrix: a row is not in shared memory");
      }
      memcpy(values[row], source, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t pair = 0;
      for (int i = 0; i < 2; ++i) {
        const int row = lane / 4;
        const int column = lane % 4 * 2 + i;
        const uint32_t value = kTransposed ? values[column][row] : values[row][column];
        pair |= value << (16 * i);
      }
      static_cast<MatrixLane*>(lanes[lane])->fragment[matrix] = pair;
    }
  }
}

template <bool kTransposed>
void load_matrix(uint32_t (&fragment)[4], const void* row) {
  static const host_sim::WarpOperation operation{kTransposed ? "ldmatrix.x4.trans" : "ldmatrix.x4",
                                                 load_matrices<kTransposed>};
  MatrixLane lane{fragment, row};
  host_sim::warp_collective(operation, host_sim::kFullMask, &lane);
}

}  // namespace tile_twin
#else
__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
#endif

// Copies 16 bytes past the registers and the L1 cache. Both addresses are aligned to 16. The bytes
// are there for this thread after copy_async_wait, for the block after a barrier behind it.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
#if defined(FASTOPT_HOST_SIM)
  host_sim::copy_async(shared, global, 16);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global))
               : "memory");
#endif
}

// Reads `bytes` (0 to 16) and fills the rest of the 16 with zeros. With 0 bytes `global` is not
// read, but still has to be aligned.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, int bytes) {
#if defined(FASTOPT_HOST_SIM)
  host_sim::copy_async(shared, global, bytes);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(bytes)
               : "memory");
#endif
}

// Ends a group of copies.
__device__ __forceinline__ void copy_async_commit() {
#if defined(FASTOPT_HOST_SIM)
  host_sim::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's youngest groups are under way.
template <int kPending>
__device__ __forceinline__ void copy_async_wait() {
  static_assert(kPending >= 0);
#if defined(FASTOPT_HOST_SIM)
  host_sim::wait_copies(kPending);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Loads four 8 x 8 matrices of 16-bit values. Lane 8 i + r gives the address of row r of matrix i,
// in shared memory, aligned to 16. fragment[i] of lane l becomes columns 2 (l % 4) and
// 2 (l % 4) + 1 of row l / 4 of matrix i.
__device__ __forceinline__ void load_matrix_x4(uint32_t (&fragment)[4], const void* row) {
#if defined(FASTOPT_HOST_SIM)
  tile_twin::load_matrix<false>(fragment, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// The same of the transposed matrices: rows 2 (l % 4) and 2 (l % 4) + 1 of column l / 4.
__device__ __forceinline__ void load_matrix_x4_trans(uint32_t (&fragment)[4], const void* row) {
#if defined(FASTOPT_HOST_SIM)
  tile_twin::load_matrix<true>(fragment, row);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(row))
               : "memory");
#endif
}

// accumulator [16, 8] += a [16, 16] b [16, 8], for Input BFloat16 or Half. With g = lane / 4 and
// t = lane % 4, the low half of each register first:
//   a[0]: row g,     columns 2t, 2t + 1        b[0]: rows 2t, 2t + 1 of column g
//   a[1]: row g + 8, columns 2t, 2t + 1        b[1]: rows 2t + 8, 2t + 9 of column g
//   a[2]: row g,     columns 2t + 8, 2t + 9    accumulator[0], [1]: row g, columns 2t, 2t + 1
//   a[3]: row g + 8, columns 2t + 8, 2t + 9    accumulator[2], [3]: row g + 8, the same columns
template <class Input>
__device__ __forceinline__ void mma_m16n8k16(float (&accumulator)[4], const uint32_t (&a)[4],
                                             const uint32_t (&b)[2]) {
  constexpr bool kIsBFloat16 = std::is_same_v<Input, BFloat16>;
  static_assert(kIsBFloat16 || std::is_same_v<Input, Half>);
#if defined(FASTOPT_HOST_SIM)
  static const host_sim::WarpOperation operation{
      kIsBFloat16 ? "mma.m16n8k16 of bf16" : "mma.m16n8k16 of fp16",
      tile_twin::multiply_16x8x16<Input>};
  tile_twin::ProductLane lane{a, b, accumulator};
  host_sim::warp_collective(operation, host_sim::kFullMask, &lane);
#else
  if constexpr (kIsBFloat16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// accumulator [16, 8] += a [16, 8] b [8, 8], of tf32: floats whose low 13 bits are ignored, so
// round with to_tf32 first. With g = lane / 4 and t = lane % 4:
//   a[0]: row g,     column t        b[0]: row t of column g
//   a[1]: row g + 8, column t        b[1]: row t + 4 of column g
//   a[2]: row g,     column t + 4    accumulator: as above
//   a[3]: row g + 8, column t + 4
__device__ __forceinline__ void mma_m16n8k8(float (&accumulator)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
#if defined(FASTOPT_HOST_SIM)
  static const host_sim::WarpOperation operation{"mma.m16n8k8 of tf32",
                                                 tile_twin::multiply_16x8x8_tf32};
  tile_twin::ProductLane lane{a, b, accumulator};
  host_sim::warp_collective(operation, host_sim::kFullMask, &lane);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(accumulator[0]), "+f"(accumulator[1]), "+f"(accumulator[2]), "+f"(accumulator[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Rounds to nearest, ties away from zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
#if defined(FASTOPT_HOST_SIM)
  const uint32_t bits = float_bits(value);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FFFFFFFu : (bits + 0x1000u) & 0xFFFFE000u;
#else
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
#endif
}

// Two 16-bit values in a register, rounded to nearest, the first one in the low half.
template <class Input>
__device__ __forceinline__ uint32_t packed_pair(float low, float high) {
#if defined(FASTOPT_HOST_SIM)
  Input pair[2];
  store(pair, low);
  store(pair + 1, high);
  return pair[0].bits | static_cast<uint32_t>(pair[1].bits) << 16;
#else
  uint32_t bits;
  if constexpr (std::is_same_v<Input, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
#endif
}

// 2^x within 2 units in the last place; subnormal results are zero.
__device__ __forceinline__ float power_of_two_fast(float x) {
#if defined(FASTOPT_HOST_SIM)
  const float power = exp2f(x);
  return power < 1.17549435e-38f ? 0.0f : power;
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}

}  // namespace fastopt
