#pragma once

// The product of one step: what all blocks have told each other, [rows, depth], with the weights of
// one block, [depth, columns], which stay in registers for the whole sequence.
//
// The depth is cut into groups of 64 bytes, which are dealt out to the warps of a block in turn:
// group q is the (q / 8)-th of warp q % 8. Each warp leaves its partial sums in shared memory.

#include <cstring>

#include "cuda/grid_barrier.cuh"
#include "cuda/tile_mma.cuh"

namespace fastopt::cuda {

constexpr int kProductThreads = 256;
constexpr int kProductWarps = kProductThreads / 32;
// Hidden units of a block: as many as a tensor core's tile has columns.
constexpr int kUnits = 8;
constexpr int kGates = 4;

constexpr int kGroupBytes = 64;
template <class Storage>
constexpr int kGroup = kGroupBytes / static_cast<int>(sizeof(Storage));  // values

// Of a row of so many values.
template <class Storage>
HOST_DEVICE int groups_of(int64_t depth) {
  return static_cast<int>((depth + kGroup<Storage> - 1) / kGroup<Storage>);
}

// The distance of two rows of partial sums, [warps, rows, stride]: tensor-core fragments and single
// columns both reach them without bank conflicts.
template <int kColumns>
constexpr int kSumStride = kColumns == kUnits ? kUnits : kColumns + 8;

// The groups of the calling warp.
__device__ inline int own_groups_of(int groups) {
  const int warp = static_cast<int>(threadIdx.x) / 32;
  return groups > warp ? (groups - warp + kProductWarps - 1) / kProductWarps : 0;
}

__device__ inline int group_number(int own) {
  return own * kProductWarps + static_cast<int>(threadIdx.x) / 32;
}

// bf16, fp16 and, for floats, tf32. Lane t of a row's four reads 16 bytes of a group at once: the
// depth is permuted within a group, for values and weights alike, so that they are the registers of
// two tensor-core products.
template <class StorageType, int kColumns, int kDepth>
class TensorCoreProduct {
 public:
  using Storage = StorageType;
  static constexpr int kMaxDepth = kDepth;
  static constexpr int kRows = kColumns > 32 ? 32 : 64;  // of one call
  static constexpr int kScratchBytes = 0;

  // The value as blocks exchange it.
  static __device__ Storage exchanged(float value) {
    if constexpr (kIsTf32) {
      return float_from_bits(to_tf32(value));
    } else {
      Storage stored;
      store(&stored, value);
      return stored;
    }
  }

  // weight_at(column, k) is a Storage, and zero beyond the depth.
  template <class WeightAt>
  __device__ void load_weights(int groups, const WeightAt& weight_at) {
    own_groups_ = own_groups_of(groups);
    const int column = lane() / 4;
#pragma unroll
    for (int own = 0; own < kMaxGroups; ++own) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          const int64_t k = static_cast<int64_t>(group_number(own)) * kGroup<Storage> +
                            (lane() % 4 * 4 + word) * kPerWord;
          uint32_t bits = 0;
          if (own < own_groups_) {
            Storage values[kPerWord];
            for (int i = 0; i < kPerWord; ++i) {
              values[i] = weight_at(tile * kUnits + column, k + i);
              if constexpr (kIsTf32) values[i] = exchanged(values[i]);
            }
            memcpy(&bits, values, sizeof bits);
          }
          weights_[own][word / 2][tile][word % 2] = bits;
        }
      }
    }
  }

  // `values` are rows of `stride` values; `sums` is [warps, kRows, kSumStride<kColumns>].
  __device__ void multiply(const Storage* values, int64_t stride, int rows, float* sums,
                           unsigned char*) const {
    if (own_groups_ == 0) return;
    const Storage* first = values + lane() / 4 * stride +
                           static_cast<int64_t>(group_number(0)) * kGroup<Storage> +
                           lane() % 4 * (kGroup<Storage> / 4);
    float* own_sums = sums + static_cast<int>(threadIdx.x) / 32 * kRows * kSumStride<kColumns>;
    Batch batch = load_batch(first, stride, 0, rows, 0);
    for (int row = 0; row < rows; row += kTileRows) {
      float accumulators[kTiles][4] = {};
#pragma unroll
      for (int number = 0; number < kBatches; ++number) {
        if (number * kBatch < own_groups_) {
          const bool is_last = (number + 1) * kBatch >= own_groups_;
          const Batch next = load_batch(first, stride, is_last ? row + kTileRows : row, rows,
                                        is_last ? 0 : (number + 1) * kBatch);
#pragma unroll
          for (int i = 0; i < kBatch; ++i)
            multiply_group(batch.group[i], number * kBatch + i, accumulators);
          batch = next;
        }
      }
      float* target = own_sums + (row + lane() / 4) * kSumStride<kColumns> + lane() % 4 * 2;
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const float (&sum)[4] = accumulators[tile];
        float* of_tile = target + tile * kUnits;
        *reinterpret_cast<float2*>(of_tile) = make_float2(sum[0], sum[1]);
        *reinterpret_cast<float2*>(of_tile + kUnits * kSumStride<kColumns>) =
            make_float2(sum[2], sum[3]);
      }
    }
  }

 private:
  static constexpr bool kIsTf32 = sizeof(Storage) == 4;
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(Storage));
  static constexpr int kTiles = kColumns / kUnits;
  static constexpr int kTileRows = 16;
  static constexpr int kMaxGroups = kDepth / kGroup<Storage> / kProductWarps;
  // Groups whose values are fetched while those before them are multiplied. Two are 32 KB under way
  // in a block, beyond what the L2 cache's latency and rate ask for.
  static constexpr int kBatch = 2;
  static constexpr int kBatches = (kMaxGroups + kBatch - 1) / kBatch;

  struct Group {
    uint4 upper, lower;  // of rows r and r + 8
  };
  struct Batch {
    Group group[kBatch];
  };

  static __device__ int lane() { return static_cast<int>(threadIdx.x) % 32; }

  __device__ Batch load_batch(const Storage* first, int64_t stride, int row, int rows,
                              int own) const {
    Batch batch;
    const int upper = row + lane() / 4;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const Storage* address =
          first + row * stride + static_cast<int64_t>(own + i) * (kProductWarps * kGroup<Storage>);
      const bool exists = own + i < own_groups_;
      const uint4 zero = make_uint4(0, 0, 0, 0);
      batch.group[i].upper = exists && upper < rows ? load_exchanged(address) : zero;
      batch.group[i].lower =
          exists && upper + 8 < rows ? load_exchanged(address + 8 * stride) : zero;
    }
    return batch;
  }

  __device__ void multiply_group(const Group& group, int own,
                                 float (&accumulators)[kTiles][4]) const {
    const uint32_t first[4] = {group.upper.x, group.lower.x, group.upper.y, group.lower.y};
    const uint32_t second[4] = {group.upper.z, group.lower.z, group.upper.w, group.lower.w};
    if (own >= kMaxGroups) return;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      multiply_tile(accumulators[tile], first, weights_[own][0][tile]);
      multiply_tile(accumulators[tile], second, weights_[own][1][tile]);
    }
  }

  static __device__ void multiply_tile(float (&accumulator)[4], const uint32_t (&a)[4],
                                       const uint32_t (&b)[2]) {
    if constexpr (kIsTf32) {
      mma_m16n8k8(accumulator, a, b);
    } else {
      mma_m16n8k16<Storage>(accumulator, a, b);
    }
  }

  uint32_t weights_[kMaxGroups][2][kTiles][2];
  int own_groups_;
};

// True fp32. A lane has one or two columns, and where there are fewer columns than lanes one of
// kParts parts of each group. Values come through shared memory, from which all lanes of a part
// read the same 16 bytes.
template <int kColumns, int kDepth>
class FmaProduct {
 public:
  using Storage = float;
  static constexpr int kMaxDepth = kDepth;
  static constexpr int kRows = 32;

  static __device__ float exchanged(float value) { return value; }

  template <class WeightAt>
  __device__ void load_weights(int groups, const WeightAt& weight_at) {
    own_groups_ = own_groups_of(groups);
#pragma unroll
    for (int own = 0; own < kMaxGroups; ++own) {
#pragma unroll
      for (int i = 0; i < kOfPart; ++i) {
        const int64_t k =
            static_cast<int64_t>(group_number(own)) * kGroup<float> + part() * kOfPart + i;
#pragma unroll
        for (int c = 0; c < kOfLane; ++c) {
          weights_[own][i][c] = own < own_groups_ ? weight_at(column() + c * 32, k) : 0.0f;
        }
      }
    }
  }

  // `scratch` is kScratchBytes of shared memory.
  __device__ void multiply(const float* values, int64_t stride, int rows, float* sums,
                           unsigned char* scratch) const {
    if (own_groups_ == 0) return;
    const int warp = static_cast<int>(threadIdx.x) / 32;
    float* stages = reinterpret_cast<float*>(scratch) + warp * (2 * kStage);
    float* own_sums = sums + (warp * kRows) * kSumStride<kColumns> + column();
    fetch(values, stride, 0, rows, stages);
    for (int row = 0; row < rows; row += kStageRows) {
      const int number = row / kStageRows;
      fetch(values, stride, row + kStageRows, rows, stages + (number + 1) % 2 * kStage);
      copy_async_wait<1>();
      __syncwarp();
      const float* stage = stages + number % 2 * kStage + part() * kOfPart;
      float accumulators[kStageRows][kChains][kOfLane] = {};
#pragma unroll
      for (int own = 0; own < kMaxGroups; ++own) {
        if (own < own_groups_) {
#pragma unroll
          for (int i = 0; i < kOfPart; i += 4) {
#pragma unroll
            for (int r = 0; r < kStageRows; ++r) {
              const float4 value = *reinterpret_cast<const float4*>(
                  stage + (r * kMaxGroups + own) * kGroup<float> + i);
#pragma unroll
              for (int c = 0; c < kOfLane; ++c) {
                float& sum = accumulators[r][(own + i / 4) % kChains][c];
                sum += value.x * weights_[own][i][c];
                sum += value.y * weights_[own][i + 1][c];
                sum += value.z * weights_[own][i + 2][c];
                sum += value.w * weights_[own][i + 3][c];
              }
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kStageRows; ++r) {
#pragma unroll
        for (int c = 0; c < kOfLane; ++c) {
          float sum = accumulators[r][0][c];
#pragma unroll
          for (int chain = 1; chain < kChains; ++chain) sum += accumulators[r][chain][c];
#pragma unroll
          for (int distance = kColumns; distance < 32; distance *= 2) {
            sum += __shfl_xor_sync(0xFFFFFFFFu, sum, distance);
          }
          if (part() == 0) own_sums[(row + r) * kSumStride<kColumns> + c * 32] = sum;
        }
      }
      __syncwarp();  // the next copy goes where this stage was
    }
    copy_async_wait<0>();
  }

 private:
  static constexpr int kParts = kColumns < 32 ? 32 / kColumns : 1;
  static constexpr int kOfLane = kColumns > 32 ? kColumns / 32 : 1;  // columns
  static constexpr int kOfPart = kGroup<float> / kParts;             // values of a group
  static constexpr int kMaxGroups = kDepth / kGroup<float> / kProductWarps;
  static constexpr int kStageRows = kParts == 1 ? 4 : 1;
  // Sums under way at once: a multiplication takes four cycles.
  static constexpr int kChains = 4 / kStageRows;
  static constexpr int kStage = kStageRows * kMaxGroups * kGroup<float>;  // values

 public:
  // Two stages for each warp: one is fetched while the other is read.
  static constexpr int kScratchBytes = kProductWarps * 2 * kStage * 4;

 private:
  static __device__ int column() {
    return static_cast<int>(threadIdx.x) % (kColumns < 32 ? kColumns : 32);
  }
  static __device__ int part() {
    return kParts == 1 ? 0 : static_cast<int>(threadIdx.x) % 32 / kColumns;
  }

  // Begins to copy the warp's groups of kStageRows rows: [kStageRows, kMaxGroups, kGroup].
  __device__ void fetch(const float* values, int64_t stride, int row, int rows,
                        float* stage) const {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int here = rows - row < kStageRows ? rows - row : kStageRows;
    for (int r = 0; r < here; ++r) {
      for (int piece = lane; piece < own_groups_ * 4; piece += 32) {
        const int own = piece / 4, offset = piece % 4 * 4;
        copy_async_16(stage + (r * kMaxGroups + own) * kGroup<float> + offset,
                      values + (row + r) * stride +
                          static_cast<int64_t>(group_number(own)) * kGroup<float> + offset);
      }
    }
    copy_async_commit();
  }

  float weights_[kMaxGroups][kOfPart][kOfLane];
  int own_groups_;
};

// The sums of all warps for one row of a call and one column.
template <class Product, int kColumns>
__device__ float sum_of_warps(const float* sums, int groups, int row, int column) {
  const int warps = groups < kProductWarps ? groups : kProductWarps;
  float sum = 0;
#pragma unroll
  for (int warp = 0; warp < kProductWarps; ++warp) {
    if (warp < warps) {
      sum += sums[(warp * Product::kRows + row) * kSumStride<kColumns> + column];
    }
  }
  return sum;
}

}  // namespace fastopt::cuda
