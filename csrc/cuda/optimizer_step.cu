// One loop for every optimizer: a block takes a chunk of a tensor, a thread 16 bytes of each
// operand at a time. Clipping, zeroing and averaging happen in registers around the rule.

#include "cuda/layerwise_step.h"
#include "cuda/step_update.cuh"

namespace fastopt::cuda {

namespace {

// At least: left to itself, ptxas spills for more. 512 threads with 64 bytes each on their way are
// 32 KB of a multiprocessor's loads, twice what the latency of an H100's memory asks for.
constexpr int kBlocksPerMultiprocessor = 2;

template <class Rule>
constexpr int kUsedOperands = kFirstSlot + Rule::kSlots;

// kN neighbouring elements, at an address for each operand; none for one that is not there.
template <int kN, class Storage, class Rule, class T>
__device__ void update_lanes(const Update<Rule, T>& update, Storage* const* operands,
                             LaneRange range) {
  bool aligned[kUsedOperands<Rule>];
#pragma unroll
  for (int k = 0; k < kUsedOperands<Rule>; ++k) aligned[k] = is_aligned<kN>(operands[k]);
  T param[kN];
  load_lanes<kN>(operands[kParam], aligned[kParam], range, param);
  if (operands[kGrad]) {
    T grad[kN], slots[kMaxSlots][kN];
    load_lanes<kN>(operands[kGrad], aligned[kGrad], range, grad);
#pragma unroll
    for (int s = 0; s < Rule::kSlots; ++s) {
      load_lanes<kN>(operands[kFirstSlot + s], aligned[kFirstSlot + s], range, slots[s]);
    }
    update.template change<Storage>(grad);
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) {
      T slot[kMaxSlots];
#pragma unroll
      for (int s = 0; s < Rule::kSlots; ++s) slot[s] = slots[s][lane];
      update.step(param[lane], grad[lane], slot);
#pragma unroll
      for (int s = 0; s < Rule::kSlots; ++s) slots[s][lane] = slot[s];
      param[lane] = rounded<Storage>(param[lane]);
      if (update.zero_grad) grad[lane] = 0;
    }
    store_lanes<kN>(operands[kParam], aligned[kParam], range, param);
#pragma unroll
    for (int s = 0; s < Rule::kSlots; ++s) {
      store_lanes<kN>(operands[kFirstSlot + s], aligned[kFirstSlot + s], range, slots[s]);
    }
    if (update.writes_gradients()) store_lanes<kN>(operands[kGrad], aligned[kGrad], range, grad);
  }
  if (operands[kAverage] && update.moves_average) {
    T average[kN];
    load_lanes<kN>(operands[kAverage], aligned[kAverage], range, average);
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) {
      average[lane] = update.averaged(average[lane], param[lane]);
    }
    store_lanes<kN>(operands[kAverage], aligned[kAverage], range, average);
  }
}

template <class Rule, class Storage, int kCapacity>
__global__ void __launch_bounds__(kStepThreads, kBlocksPerMultiprocessor)
    optimizer_step_kernel(const __grid_constant__ StepArguments args,
                          const __grid_constant__ GradAddresses<kCapacity> grads) {
  constexpr int kUsed = kUsedOperands<Rule>;
  visit_share<Storage>(args, grads, [&](const Share& share, const DeviceTask& task, Storage* grad) {
    Storage* operands[kUsed];
#pragma unroll
    for (int k = 0; k < kUsed; ++k) operands[k] = static_cast<Storage*>(task.operands[k]);
    operands[kGrad] = grad;
    const Update<Rule, ComputeType<Storage>> update(args, share.task);
    if (task.walk) {
      for (int64_t element = share.start + threadIdx.x; element < share.end;
           element += kStepThreads) {
        Storage* at[kUsed];
#pragma unroll
        for (int k = 0; k < kUsed; ++k) {
          at[k] = operands[k] ? operands[k] + offset_of(*task.walk, k, element) : nullptr;
        }
        update_lanes<1>(update, at, LaneRange{0, 1});
      }
      return;
    }
    const auto visit = [&](int64_t first, LaneRange range) {
      Storage* at[kUsed];
#pragma unroll
      for (int k = 0; k < kUsed; ++k) at[k] = operands[k] ? operands[k] + first : nullptr;
      update_lanes<kLanes<Storage>>(update, at, range);
    };
    for_each_pack(operands[kParam], share.start, share.end, visit);
  });
}

// One thread advances the counters of one task and folds its scalars.
template <class Rule, int kCapacity>
__global__ void __launch_bounds__(kStepThreads)
    advance_steps_kernel(const DeviceTask* tasks, int begin, int end,
                         const __grid_constant__ StepRule rule, const float* found_inf,
                         const __grid_constant__ GradAddresses<kCapacity> grads) {
  if (found_inf && *found_inf != 0) return;
  const int index = begin + static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (index >= end) return;
  void* const grad = grads.at[index - begin];
  if (!grad || grad == kLeaveAlone) return;
  double hyperparameters[kMaxHyperparameters];
#pragma unroll
  for (int i = 0; i < kMaxHyperparameters; ++i) {
    hyperparameters[i] = read(rule.hyperparameters[i]);
  }
  Progress progress = rule.progress;
  const Counter step = tasks[index].step, product = tasks[index].product;
  if (step.data) progress.step = advance(step, 1, 1);
  if constexpr (kHasFactor<Rule>) {
    if (product.data) {
      progress.product = advance(product, factor<Rule>(hyperparameters, progress.step), 0);
    }
  }
  bind_rule<Rule>(rule.functors + static_cast<int64_t>(index) * kFunctorBytes, hyperparameters,
                  progress);
}

// Kernels by the number of their rule.
template <class Storage, class Indices>
struct Kernels;

template <class Storage, std::size_t... kIndices>
struct Kernels<Storage, std::index_sequence<kIndices...>> {
  using T = ComputeType<Storage>;

  template <int kCapacity>
  static auto step(int rule) {
    using Kernel = void (*)(StepArguments, GradAddresses<kCapacity>);
    static constexpr Kernel kKernels[] = {
        optimizer_step_kernel<RuleAt<T, kIndices>, Storage, kCapacity>...};
    return kKernels[rule];
  }
  template <int kCapacity>
  static auto advance(int rule) {
    using Kernel =
        void (*)(const DeviceTask*, int, int, StepRule, const float*, GradAddresses<kCapacity>);
    static constexpr Kernel kKernels[] = {advance_steps_kernel<RuleAt<T, kIndices>, kCapacity>...};
    return kKernels[rule];
  }
};

// visit(kernels of the dtype)
template <class Visitor>
void with_kernels(DType dtype, const Visitor& visit) {
  switch (dtype) {
    case DType::kFloat32:
      return visit(Kernels<float, RuleIndices>{});
    case DType::kFloat64:
      return visit(Kernels<double, RuleIndices>{});
    case DType::kBFloat16:
      return visit(Kernels<BFloat16, RuleIndices>{});
    case DType::kFloat16:
      return visit(Kernels<Half, RuleIndices>{});
  }
}

}  // namespace

const UpdateRuleInfo* const kRuleInfo = AllRules::kInfo;
const int kRuleCount = static_cast<int>(kRules);

void load_kernels(DType dtype, int device) {
#if !defined(FASTOPT_HOST_SIM)
  const DeviceGuard guard(device);
#else
  (void)device;
#endif
  load_norm_kernels(dtype);
  load_layerwise_kernels(dtype);
  with_kernels(dtype, [](auto kernels) {
    for (int rule = 0; rule < kRuleCount; ++rule) {
      load_kernel(kernels.template step<kFewTensors>(rule));
      load_kernel(kernels.template step<kManyTensors>(rule));
      load_kernel(kernels.template advance<kFewTensors>(rule));
      load_kernel(kernels.template advance<kManyTensors>(rule));
    }
  });
}

void launch_advance_steps(const TaskRange& range, const StepRule& rule, const float* found_inf,
                          const Stream& stream) {
  const int64_t blocks = (range.end - range.begin + kStepThreads - 1) / kStepThreads;
  with_kernels(range.dtype, [&](auto kernels) {
    with_grad_addresses(range, [&](const auto& grads) {
      constexpr int kCapacity = sizeof(grads.at) / sizeof(void*);
      launch(kernel_name("advance_steps_kernel", rule.rule).c_str(), stream, {blocks, kStepThreads},
             kernels.template advance<kCapacity>(rule.rule), range.tasks, range.begin, range.end,
             rule, found_inf, grads);
    });
  });
}

void launch_optimizer_step(const TaskRange& range, const StepRule& rule, const DeviceTail& tail,
                           const Stream& stream) {
  const StepArguments args = step_arguments(range, rule, tail);
  with_kernels(range.dtype, [&](auto kernels) {
    with_grad_addresses(range, [&](const auto& grads) {
      constexpr int kCapacity = sizeof(grads.at) / sizeof(void*);
      launch(kernel_name("optimizer_step_kernel", rule.rule).c_str(), stream,
             {range.chunk_end - range.first_chunk, kStepThreads},
             kernels.template step<kCapacity>(rule.rule), args, grads);
    });
  });
}

}  // namespace fastopt::cuda
