// The norm of a list of gradients: a number for each chunk, then one block joins them in a fixed
// order, so that the result does not depend on which block came first.

#include "core/norm_orders.h"
#include "cuda/block_join.cuh"
#include "cuda/optimizer_step.h"
#include "cuda/task_range.cuh"
#include "cuda/vector_access.cuh"

namespace fastopt::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kJoiningThreads = 1024;

template <class Order, class Storage, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    grad_norm_kernel(const DeviceTask* tasks, int begin, int end, int64_t first_chunk,
                     const Order order, double* partials,
                     const __grid_constant__ GradAddresses<kCapacity> grads) {
  const Share share = find_share(tasks, begin, end, first_chunk);
  const DeviceTask& task = tasks[share.task];
  const Storage* grad = static_cast<const Storage*>(grads.at[share.task - begin]);
  double value = Order::kStart;
  if (grad && task.walk && !task.grad_is_dense) {
    for (int64_t element = share.start + threadIdx.x; element < share.end; element += kThreads) {
      const Storage* at = grad + offset_of(*task.walk, kGrad, element);
      value = order.add(value, static_cast<double>(load(at)));
    }
  } else if (grad) {
    constexpr int kN = kLanes<Storage>;
    for_each_pack(grad, share.start, share.end, [&](int64_t first, LaneRange range) {
      ComputeType<Storage> values[kN];
      load_lanes<kN>(grad + first, true, range, values);
#pragma unroll
      for (int lane = 0; lane < kN; ++lane) {
        if (lane >= range.begin && lane < range.end) {
          value = order.add(value, static_cast<double>(values[lane]));
        }
      }
    });
  }
  value = join_block(order, value);
  if (threadIdx.x == 0) partials[first_chunk + blockIdx.x] = value;
}

template <class Order>
__global__ void __launch_bounds__(kJoiningThreads)
    join_norms_kernel(const double* partials, int64_t chunks, const Order order, double* norm) {
  double value = Order::kStart;
#pragma unroll 4
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kJoiningThreads) {
    value = order.join(value, partials[chunk]);
  }
  value = join_block(order, value);
  if (threadIdx.x == 0) *norm = order.root(value);
}

template <class Storage, class Order>
void launch_for(const TaskRange& range, const Order& order, double* partials,
                const Stream& stream) {
  with_grad_addresses(range, [&](const auto& grads) {
    constexpr int kCapacity = sizeof(grads.at) / sizeof(void*);
    launch("grad_norm_kernel", stream, {range.chunk_end - range.first_chunk, kThreads},
           grad_norm_kernel<Order, Storage, kCapacity>, range.tasks, range.begin, range.end,
           range.first_chunk, order, partials, grads);
  });
}

}  // namespace

void load_norm_kernels(DType dtype) {
  const auto load = [&](const auto& order) {
    using Order = std::decay_t<decltype(order)>;
    load_kernel(join_norms_kernel<Order>);
    const auto of_storage = [](auto storage) {
      using Storage = decltype(storage);
      load_kernel(grad_norm_kernel<Order, Storage, kFewTensors>);
      load_kernel(grad_norm_kernel<Order, Storage, kManyTensors>);
    };
    switch (dtype) {
      case DType::kFloat32:
        return of_storage(float{});
      case DType::kFloat64:
        return of_storage(double{});
      case DType::kBFloat16:
        return of_storage(BFloat16{});
      case DType::kFloat16:
        return of_storage(Half{});
    }
  };
  for (double order :
       {2.0, 1.0, 3.0, static_cast<double>(INFINITY), -static_cast<double>(INFINITY)}) {
    with_norm_order(order, load);
  }
}

void launch_grad_norm(const TaskRange& range, double order, double* partials,
                      const Stream& stream) {
  with_norm_order(order, [&](const auto& reduction) {
    switch (range.dtype) {
      case DType::kFloat32:
        return launch_for<float>(range, reduction, partials, stream);
      case DType::kFloat64:
        return launch_for<double>(range, reduction, partials, stream);
      case DType::kBFloat16:
        return launch_for<BFloat16>(range, reduction, partials, stream);
      case DType::kFloat16:
        return launch_for<Half>(range, reduction, partials, stream);
    }
  });
}

void launch_join_norms(const double* partials, int64_t chunks, double order, double* norm,
                       const Stream& stream) {
  with_norm_order(order, [&](const auto& reduction) {
    using Order = std::decay_t<decltype(reduction)>;
    launch("join_norms_kernel", stream, {1, kJoiningThreads}, join_norms_kernel<Order>, partials,
           chunks, reduction, norm);
  });
}

}  // namespace fastopt::cuda
