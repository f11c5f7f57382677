// Norm and clipping of a list of gradients, each in one parallel region.

#include "cpu/grad_norm.h"

#include <algorithm>

#include "core/norm_orders.h"
#include "cpu/portions.h"
#include "cpu/simd.h"

FASTOPT_BEGIN_NAMESPACE

namespace {

template <class Order, class Storage>
double reduce_run(const Order& order, const Storage* data, int64_t n) {
  using T = ComputeType<Storage>;
  constexpr int kUnroll = 4;  // an addition takes four cycles
  Vec<double> sums[kUnroll];
#pragma GCC unroll 4
  for (int u = 0; u < kUnroll; ++u) sums[u] = Vec<double>{Order::kStart + Vec<double>::Native{}};
  constexpr int kVectors = kUnroll / kDoubles<T>;
  constexpr int64_t kStep = kVectors * Vec<T>::kWidth;
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
#pragma GCC unroll 4
    for (int k = 0; k < kVectors; ++k) {
      Vec<double> parts[kDoubles<T>];
      widen(load_as<Vec<T>>(data + i + k * Vec<T>::kWidth), parts);
#pragma GCC unroll 2
      for (int h = 0; h < kDoubles<T>; ++h) {
        Vec<double>& sum = sums[k * kDoubles<T> + h];
        sum = order.add(sum, parts[h]);
      }
    }
  }
  double result = Order::kStart;
  for (; i < n; ++i) result = order.add(result, static_cast<double>(load_as<T>(data + i)));
#pragma GCC unroll 4
  for (int u = 1; u < kUnroll; ++u) sums[0] = order.join(sums[0], sums[u]);
  for (int lane = 0; lane < Vec<double>::kWidth; ++lane) {
    result = order.join(result, static_cast<double>(sums[0].value[lane]));
  }
  return result;
}

// The `chunk`-th part of a task.
template <class Order, class Storage>
double reduce_chunk(const Order& order, const GradTask& task, int64_t chunk) {
  const int64_t start = chunk * kNormTiles * kTile;
  const int64_t left = task.numel - start;
  const int64_t n = left < kNormTiles * kTile ? left : kNormTiles * kTile;
  if (!task.walk) return reduce_run(order, static_cast<const Storage*>(task.data) + start, n);
  double result = Order::kStart;
  for (int64_t done = 0; done < n; done += kTile) {
    OperandTile<Storage> tile;
    const int64_t size = n - done < kTile ? n - done : kTile;
    const Storage* values = tile.load_tile(task.data, task.walk, kGrad, start + done, size);
    result = order.join(result, reduce_run(order, values, size));
  }
  return result;
}

template <class Storage>
void clip_chunk(const GradTask& task, int64_t chunk, double factor, double clip_value) {
  using T = ComputeType<Storage>;
  const T scale = static_cast<T>(factor);
  const Clamp<T> clamp(clip_value);
  const int64_t first = chunk * kNormTiles * kTile;
  for (int64_t t = 0; t < kNormTiles && first + t * kTile < task.numel; ++t) {
    OperandTile<Storage> tile;
    const int64_t start = first + t * kTile;
    const int64_t size = task.numel - start < kTile ? task.numel - start : kTile;
    Storage* values = tile.load_tile(task.data, task.walk, kGrad, start, size);
    for_each_lanes<T>(size, [&](int64_t i, auto lanes) {
      store(values + i, clamp(scale * load_as<decltype(lanes)>(values + i)));
    });
    tile.store_tile();
  }
}

// visit(task, chunk of the task, chunk of the batch)
template <class Visitor>
void for_each_chunk(const GradBatch& batch, const Visitor& visit) {
  const int64_t threads = useful_threads(batch.chunk_count * kNormTiles, batch.threads);
  for_each_portion(threads, batch.chunk_count, [&](int64_t begin, int64_t end) {
    const auto is_behind = [](int64_t c, const GradTask& task) { return c < task.first_chunk; };
    const GradTask* const behind =
        std::upper_bound(batch.tasks, batch.tasks + batch.task_count, begin, is_behind);
    for (const GradTask* task = behind - 1; begin < end; ++task) {
      for (; begin < end && begin - task->first_chunk < task->chunks(); ++begin) {
        visit(*task, begin - task->first_chunk, begin);
      }
    }
  });
}

template <class Order>
double reduce(const GradBatch& batch, const Order& order, double* partials) {
  static double (*const kReduce[kDTypes])(const Order&, const GradTask&, int64_t) = {
      reduce_chunk<Order, float>, reduce_chunk<Order, double>, reduce_chunk<Order, BFloat16>,
      reduce_chunk<Order, Half>};
  for_each_chunk(batch, [&](const GradTask& task, int64_t chunk, int64_t place) {
    partials[place] = kReduce[static_cast<int>(task.dtype)](order, task, chunk);
  });
  double result = Order::kStart;
  for (int64_t i = 0; i < batch.chunk_count; ++i) result = order.join(result, partials[i]);
  return result;
}

double norm(const GradBatch& batch, double order, double* partials) {
  if (order != 0) {
    return with_norm_order(order, [&](const auto& reduction) {
      return reduction.root(reduce(batch, reduction, partials));
    });
  }
  reduce(batch, CountOfNonzeros{}, partials);
  double tensors = 0;
  for (int64_t t = 0; t < batch.task_count; ++t) {
    double elements = 0;
    for (int64_t c = 0; c < batch.tasks[t].chunks(); ++c) {
      elements += partials[batch.tasks[t].first_chunk + c];
    }
    tensors += elements != 0;
  }
  return tensors;
}

void clip(const GradBatch& batch, double scale, double clip_value) {
  static void (*const kClip[kDTypes])(const GradTask&, int64_t, double, double) = {
      clip_chunk<float>, clip_chunk<double>, clip_chunk<BFloat16>, clip_chunk<Half>};
  for_each_chunk(batch, [&](const GradTask& task, int64_t chunk, int64_t) {
    kClip[static_cast<int>(task.dtype)](task, chunk, scale, clip_value);
  });
}

}  // namespace

extern const GradNormKernels kGradNormKernels;
const GradNormKernels kGradNormKernels = {norm, clip};

FASTOPT_END_NAMESPACE
