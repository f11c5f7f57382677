#pragma once

// How a warp multiplies tiles that lie in shared memory or in its registers, for each kind of
// arithmetic alike: 16 rows of a left operand by columns of a right one, eight at a time, `kDepth`
// deep. Sums lie in the lanes as mma leaves them: with g = lane / 4 and t = lane % 4, sum[0] and
// sum[1] are row g, columns 2t and 2t + 1, sum[2] and sum[3] the same of row g + 8.
//
//   Left    load_rows      from [row][depth]      load_columns   from [depth][row]
//           from operands  sums of an earlier product, whose columns are now the depth
//   Right   load_rows      from [column][depth]   load_columns   from [depth][column]
//
// Right operands come in pairs, 16 columns. An Operand is what sums of eight columns become on
// their way to a left operand. kPad is by how many elements rows of a tile are longer than a power
// of two, so that a warp's accesses fall on different banks.

#include "cuda/tile_mma.cuh"

namespace fastopt::cuda {

__device__ inline int lane_of_warp() { return static_cast<int>(threadIdx.x % 32); }

using Sums = float[4];

// bf16 and fp16 on tensor cores.
template <class Storage>
struct HalfProducts {
  using Element = Storage;
  static constexpr int kDepth = 16, kPad = 8;
  using Left = uint32_t[4];
  using Right = uint32_t[2];
  using Operand = uint32_t[2];

  static __device__ void load_left_rows(Left& left, const Element* tile, int stride) {
    const int lane = lane_of_warp();
    load_matrix_x4(left, tile + lane % 16 * stride + lane / 16 * 8);
  }
  static __device__ void load_left_columns(Left& left, const Element* tile, int stride) {
    const int lane = lane_of_warp();
    load_matrix_x4_trans(left, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
  }
  static __device__ void load_right_rows(Right (&right)[2], const Element* tile, int stride) {
    const int lane = lane_of_warp();
    uint32_t loaded[4];
    load_matrix_x4(loaded, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
    split(loaded, right);
  }
  static __device__ void load_right_columns(Right (&right)[2], const Element* tile, int stride) {
    const int lane = lane_of_warp();
    uint32_t loaded[4];
    load_matrix_x4_trans(loaded, tile + lane % 16 * stride + lane / 16 * 8);
    split(loaded, right);
  }
  static __device__ void make_operand(Operand& operand, const Sums& sums) {
    operand[0] = packed_pair<Storage>(sums[0], sums[1]);
    operand[1] = packed_pair<Storage>(sums[2], sums[3]);
  }
  static __device__ void load_left(Left& left, const Operand* operands, int depth) {
    const Operand* const both = operands + depth / 8;
    left[0] = both[0][0];
    left[1] = both[0][1];
    left[2] = both[1][0];
    left[3] = both[1][1];
  }
  static __device__ void multiply(Sums& sums, const Left& left, const Right& right) {
    mma_m16n8k16<Storage>(sums, left, right);
  }

 private:
  static __device__ void split(const uint32_t (&loaded)[4], Right (&right)[2]) {
    right[0][0] = loaded[0];
    right[0][1] = loaded[1];
    right[1][0] = loaded[2];
    right[1][1] = loaded[3];
  }
};

// fp32 on tensor cores, operands rounded to tf32. Which element of a depth of 8 is which of the
// instruction is free, as long as both operands agree: elements 2t and 2t + 1 stand for the
// instruction's t and t + 4. A lane then reads neighbours, and sums need not change lanes.
struct Tf32Products {
  using Element = float;
  static constexpr int kDepth = 8, kPad = 8;
  using Left = uint32_t[4];
  using Right = uint32_t[2];
  using Operand = uint32_t[4];

  static __device__ void load_left_rows(Left& left, const float* tile, int stride) {
    const int lane = lane_of_warp();
    const float* const row = tile + lane / 4 * stride + lane % 4 * 2;
    const float2 upper = *reinterpret_cast<const float2*>(row);
    const float2 lower = *reinterpret_cast<const float2*>(row + 8 * stride);
    set(left, upper.x, lower.x, upper.y, lower.y);
  }
  static __device__ void load_left_columns(Left& left, const float* tile, int stride) {
    const int lane = lane_of_warp();
    const float* const column = tile + lane % 4 * 2 * stride + lane / 4;
    set(left, column[0], column[8], column[stride], column[stride + 8]);
  }
  static __device__ void load_right_rows(Right (&right)[2], const float* tile, int stride) {
    const int lane = lane_of_warp();
    const float* const row = tile + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float2 pair = *reinterpret_cast<const float2*>(row + i * 8 * stride);
      right[i][0] = to_tf32(pair.x);
      right[i][1] = to_tf32(pair.y);
    }
  }
  static __device__ void load_right_columns(Right (&right)[2], const float* tile, int stride) {
    const int lane = lane_of_warp();
    const float* const column = tile + lane % 4 * 2 * stride + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      right[i][0] = to_tf32(column[i * 8]);
      right[i][1] = to_tf32(column[i * 8 + stride]);
    }
  }
  static __device__ void make_operand(Operand& operand, const Sums& sums) {
    set(operand, sums[0], sums[2], sums[1], sums[3]);
  }
  static __device__ void load_left(Left& left, const Operand* operands, int depth) {
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = operands[depth / 8][i];
  }
  static __device__ void multiply(Sums& sums, const Left& left, const Right& right) {
    mma_m16n8k8(sums, left, right);
  }

 private:
  static __device__ void set(Left& left, float a, float b, float c, float d) {
    left[0] = to_tf32(a);
    left[1] = to_tf32(b);
    left[2] = to_tf32(c);
    left[3] = to_tf32(d);
  }
};

// fp32 without tensor cores. A lane holds all four of a depth for its two rows and two columns:
// loads of 16 bytes, of which the lanes of a row or a column read the same ones.
struct Fp32Products {
  using Element = float;
  static constexpr int kDepth = 4, kPad = 4;
  using Left = float[2][4];   // rows g and g + 8
  using Right = float[2][4];  // columns 2t and 2t + 1
  using Operand = Sums;

  static __device__ void load_left_rows(Left& left, const float* tile, int stride) {
    const float* const row = tile + lane_of_warp() / 4 * stride;
    load_four(left[0], row);
    load_four(left[1], row + 8 * stride);
  }
  static __device__ void load_left_columns(Left& left, const float* tile, int stride) {
    const float* const column = tile + lane_of_warp() / 4;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      left[0][k] = column[k * stride];
      left[1][k] = column[k * stride + 8];
    }
  }
  static __device__ void load_right_rows(Right (&right)[2], const float* tile, int stride) {
    const float* const row = tile + lane_of_warp() % 4 * 2 * stride;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      load_four(right[i][0], row + i * 8 * stride);
      load_four(right[i][1], row + (i * 8 + 1) * stride);
    }
  }
  static __device__ void load_right_columns(Right (&right)[2], const float* tile, int stride) {
    const float* const column = tile + lane_of_warp() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float2 pair = *reinterpret_cast<const float2*>(column + k * stride + i * 8);
        right[i][0][k] = pair.x;
        right[i][1][k] = pair.y;
      }
    }
  }
  static __device__ void make_operand(Operand& operand, const Sums& sums) {
#pragma unroll
    for (int i = 0; i < 4; ++i) operand[i] = sums[i];
  }
  // Four columns of sums lie in two lanes.
  static __device__ void load_left(Left& left, const Operand* operands, int depth) {
    const Operand& sums = operands[depth / 8];
    const int first = lane_of_warp() / 4 * 4 + depth % 8 / 2;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      left[0][k] = __shfl_sync(0xFFFFFFFFu, sums[k % 2], first + k / 2);
      left[1][k] = __shfl_sync(0xFFFFFFFFu, sums[2 + k % 2], first + k / 2);
    }
  }
  static __device__ void multiply(Sums& sums, const Left& left, const Right& right) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      sums[0] = fmaf(left[0][k], right[0][k], sums[0]);
      sums[1] = fmaf(left[0][k], right[1][k], sums[1]);
      sums[2] = fmaf(left[1][k], right[0][k], sums[2]);
      sums[3] = fmaf(left[1][k], right[1][k], sums[3]);
    }
  }

 private:
  static __device__ void load_four(float (&values)[4], const float* source) {
    const float4 loaded = *reinterpret_cast<const float4*>(source);
    values[0] = loaded.x;
    values[1] = loaded.y;
    values[2] = loaded.z;
    values[3] = loaded.w;
  }
};

enum class Side { kRows, kColumns };  // how an operand lies: see above

template <class Products, Side kSide>
__device__ void load_left(typename Products::Left& left, const typename Products::Element* tile,
                          int stride) {
  if constexpr (kSide == Side::kRows) {
    Products::load_left_rows(left, tile, stride);
  } else {
    Products::load_left_columns(left, tile, stride);
  }
}

// Where element (line, place along the depth) of an operand begins.
template <Side kSide>
__device__ int place_of(int line, int depth, int stride) {
  return kSide == Side::kRows ? line * stride + depth : depth * stride + line;
}

template <class Products, Side kSide>
__device__ void load_right(typename Products::Right (&right)[2],
                           const typename Products::Element* tile, int stride) {
  if constexpr (kSide == Side::kRows) {
    Products::load_right_rows(right, tile, stride);
  } else {
    Products::load_right_columns(right, tile, stride);
  }
}

template <int kRowTiles, int kColumnTiles>
__device__ void clear(Sums (&sums)[kRowTiles][kColumnTiles]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) {
#pragma unroll
      for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;
    }
  }
}

// sums += left right, with both operands in shared memory.
template <class Products, Side kLeftSide, Side kRightSide, int kDeep, int kRowTiles,
          int kColumnTiles>
__device__ void add_product(Sums (&sums)[kRowTiles][kColumnTiles],
                            const typename Products::Element* left, int left_stride,
                            const typename Products::Element* right, int right_stride) {
  static_assert(kDeep % Products::kDepth == 0 && kColumnTiles % 2 == 0);
  // All of it would have loads of many steps in registers at once.
  [[maybe_unused]] constexpr int kUnroll = Products::kDepth < 8 ? 2 : 4;
#pragma unroll kUnroll
  for (int depth = 0; depth < kDeep; depth += Products::kDepth) {
    typename Products::Left a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
      load_left<Products, kLeftSide>(a[i], left + place_of<kLeftSide>(16 * i, depth, left_stride),
                                     left_stride);
    }
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      typename Products::Right b[2];
      load_right<Products, kRightSide>(b, right + place_of<kRightSide>(8 * j, depth, right_stride),
                                       right_stride);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        Products::multiply(sums[i][j], a[i], b[0]);
        Products::multiply(sums[i][j + 1], a[i], b[1]);
      }
    }
  }
}

template <class Products, int kRowTiles, int kColumnTiles>
__device__ void make_operands(typename Products::Operand (&operands)[kRowTiles][kColumnTiles],
                              const Sums (&sums)[kRowTiles][kColumnTiles]) {
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kColumnTiles; ++j) Products::make_operand(operands[i][j], sums[i][j]);
  }
}

// The same where the left operand is in registers, kDepthTiles tiles of eight columns.
template <class Products, Side kRightSide, int kRowTiles, int kDepthTiles, int kColumnTiles>
__device__ void add_product(Sums (&sums)[kRowTiles][kColumnTiles],
                            const typename Products::Operand (&left)[kRowTiles][kDepthTiles],
                            const typename Products::Element* right, int right_stride) {
  static_assert(kDepthTiles * 8 % Products::kDepth == 0 && kColumnTiles % 2 == 0);
#pragma unroll
  for (int depth = 0; depth < kDepthTiles * 8; depth += Products::kDepth) {
    typename Products::Left a[kRowTiles];
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) Products::load_left(a[i], left[i], depth);
#pragma unroll
    for (int j = 0; j < kColumnTiles; j += 2) {
      typename Products::Right b[2];
      load_right<Products, kRightSide>(b, right + place_of<kRightSide>(8 * j, depth, right_stride),
                                       right_stride);
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        Products::multiply(sums[i][j], a[i], b[0]);
        Products::multiply(sums[i][j + 1], a[i], b[1]);
      }
    }
  }
}

}  // namespace fastopt::cuda
