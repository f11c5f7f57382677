#pragma once

// What the forward and the backward recurrence share: who works on what, and when.

#include "cuda/grid_barrier.cuh"
#include "cuda/lstm.h"
#include "cuda/lstm_product.cuh"
#include "cuda/lstm_unit.cuh"

namespace fastopt::cuda {

constexpr int kMaxHidden = 1024;  // what fits into the registers

// Of a team: blocks that share columns are `split`, all of them there.
HOST_DEVICE int64_t blocks_of_units(int64_t hidden, int split) {
  const int64_t shared_units = int64_t{kUnits} * split;
  return (hidden + shared_units - 1) / shared_units * split;
}

// A team of blocks runs one direction for one part of the batch, and waits for nobody else.
struct Team {
  int direction, part;
  int64_t first_row;
  int rows;        // of the part, at the steps that have them all
  int first_unit;  // of the calling block
  unsigned blocks;

  __device__ Team(const LstmRecurrence& layer, int first_direction) {
    blocks = static_cast<unsigned>(blocks_of_units(layer.steps.hidden, layer.grid.split));
    const int team = static_cast<int>(blockIdx.x / blocks);
    direction = first_direction + team / layer.grid.parts;
    part = team % layer.grid.parts;
    first_unit = static_cast<int>(blockIdx.x % blocks) * kUnits;
    first_row = static_cast<int64_t>(part) * layer.grid.part_rows;
    const int64_t left = layer.steps.batch - first_row;
    rows = left < layer.grid.part_rows ? static_cast<int>(left) : layer.grid.part_rows;
  }

  __device__ GridBarrier barrier(const LstmRecurrence& layer) const {
    return GridBarrier(layer.counters + direction * layer.grid.parts + part, blocks);
  }
};

__device__ inline int64_t first_token(const LstmSteps& steps, int64_t step) {
  return steps.first_token ? steps.first_token[step] : step * steps.batch;
}

// The team's rows at a step; none before the first step and after the last.
__device__ inline int rows_at(const LstmSteps& steps, const Team& team, int64_t step) {
  if (step < 0 || step >= steps.steps) return 0;
  const int64_t rows = first_token(steps, step + 1) - first_token(steps, step) - team.first_row;
  return rows <= 0 ? 0 : rows < team.rows ? static_cast<int>(rows) : team.rows;
}

// Threads take pairs of a row and a unit, the same ones at every step.
struct Pair {
  int row;   // within the rows of one product
  int unit;  // within the block's

  __device__ explicit Pair(int number) {
    const int index = static_cast<int>(threadIdx.x) + number * kProductThreads;
    row = index / kUnits;
    unit = index % kUnits;
  }
};
template <class Product>
constexpr int kPairs = Product::kRows * kUnits / kProductThreads;

template <class Product, int kColumns>
constexpr int kSumBytes = kProductWarps * Product::kRows * kSumStride<kColumns> * 4;

// Calls back with the product of a pass that a dtype takes: `product.type`.
template <class Product>
struct ProductType {
  using type = Product;
};
template <int kColumns, int kDepth, int kFmaDepth, class Visitor>
void with_product(DType dtype, bool tf32, const Visitor& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return visit(ProductType<TensorCoreProduct<BFloat16, kColumns, kDepth>>{});
    case DType::kFloat16:
      return visit(ProductType<TensorCoreProduct<Half, kColumns, kDepth>>{});
    case DType::kFloat32:
      if (tf32) return visit(ProductType<TensorCoreProduct<float, kColumns, kDepth>>{});
      return visit(ProductType<FmaProduct<kColumns, kFmaDepth>>{});
    case DType::kFloat64:
      return;  // runs step by step
  }
}

// As large a part of the batch for each team as leaves no block without work.
template <class Kernel>
LstmGrid spread(int64_t batch, int64_t hidden, int directions, int split, int shared_bytes,
                Kernel kernel, const Stream& stream) {
  constexpr int64_t kSmallestPart = 16;  // the rows of a tensor core's tile
  const int64_t units = blocks_of_units(hidden, split);
  const int64_t fit =
      resident_blocks(stream, {units, kProductThreads, shared_bytes, true}, kernel) / units;
  if (fit == 0) return {};
  const bool together = fit >= directions;
  const int64_t most = together ? fit / directions : fit;
  const int64_t wanted = (batch + kSmallestPart - 1) / kSmallestPart;
  const int64_t parts = wanted < most ? wanted : most;
  const int64_t rows = (wanted + parts - 1) / parts * kSmallestPart;
  return {static_cast<int>((batch + rows - 1) / rows), static_cast<int>(rows), together, split};
}

// Both directions in one launch, or one after the other.
template <class Run>
void launch_directions(const char* name, const Run& run, int shared_bytes,
                       void (*kernel)(const Run, int), const Stream& stream) {
  const LstmRecurrence& layer = run.layer;
  const int at_once = layer.grid.together ? layer.steps.directions : 1;
  const int64_t blocks =
      blocks_of_units(layer.steps.hidden, layer.grid.split) * layer.grid.parts * at_once;
  for (int direction = 0; direction < layer.steps.directions; direction += at_once) {
    launch(name, stream, {blocks, kProductThreads, shared_bytes, true}, kernel, run, direction);
  }
}

}  // namespace fastopt::cuda
