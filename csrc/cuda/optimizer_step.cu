// One loop for every optimizer: a block takes a chunk of a tensor, a thread 16 bytes of each
// operand at a time. Clipping, zeroing and averaging happen in registers around the rule.

#include "core/rule_table.h"
#include "cuda/optimizer_step.h"
#include "cuda/task_range.cuh"
#include "cuda/vector_access.cuh"

namespace fastopt::cuda {

namespace {

constexpr int kThreads = 256;
// At least: left to itself, ptxas spills for more. 512 threads with 64 bytes each on their way are
// 32 KB of a multiprocessor's loads, twice what the latency of an H100's memory asks for.
constexpr int kBlocksPerMultiprocessor = 2;

struct StepArguments {
  const DeviceTask* tasks;
  int begin, end;
  int64_t first_chunk;
  alignas(16) unsigned char functor[kFunctorBytes];
  const unsigned char* functors;  // of each task; nullptr: `functor` serves all
  WeightDecay weight_decay;
  Scalar decay;
  bool maximize;
  DeviceTail tail;
};

// The scalars of a block.
template <class Rule, class T>
struct Update {
  Rule rule;
  bool is_l2;
  T sign, decay, grad_scale;
  Clamp<T> clamp;
  bool changes_gradients, zero_grad, moves_average, copies_average;
  Lerp<T> average;

  __device__ Update(const StepArguments& args, const Rule& rule)
      : rule(rule),
        is_l2(args.weight_decay == WeightDecay::kL2),
        sign(static_cast<T>(args.maximize ? -1 : 1)),
        decay(static_cast<T>(read(args.decay))),
        grad_scale(static_cast<T>(read(args.tail.grad_scale))),
        clamp(args.tail.clip_value),
        changes_gradients(args.tail.changes_gradients),
        zero_grad(args.tail.zero_grad),
        moves_average(args.tail.moves_averages),
        copies_average(args.tail.average_weight == 1),
        average(args.tail.average_weight) {}
};

template <class Rule>
constexpr int kUsedOperands = kFirstSlot + Rule::kSlots;

// kN neighbouring elements, at an address for each operand; none for one that is not there.
template <int kN, class Storage, class Rule, class T>
__device__ void update_lanes(const Update<Rule, T>& update, Storage* const* operands,
                             LaneRange range) {
  bool aligned[kUsedOperands<Rule>];
#pragma unroll
  for (int k = 0; k < kUsedOperands<Rule>; ++k) aligned[k] = is_aligned(operands[k]);
  T param[kN];
  load_lanes<kN>(operands[kParam], aligned[kParam], range, param);
  if (operands[kGrad]) {
    T grad[kN], slots[kMaxSlots][kN];
    load_lanes<kN>(operands[kGrad], aligned[kGrad], range, grad);
#pragma unroll
    for (int s = 0; s < Rule::kSlots; ++s) {
      load_lanes<kN>(operands[kFirstSlot + s], aligned[kFirstSlot + s], range, slots[s]);
    }
    if (update.changes_gradients) {
#pragma unroll
      for (int lane = 0; lane < kN; ++lane) {
        grad[lane] = rounded<Storage>(update.clamp(update.grad_scale * grad[lane]));
      }
    }
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) {
      T slot[kMaxSlots];
#pragma unroll
      for (int s = 0; s < Rule::kSlots; ++s) slot[s] = slots[s][lane];
      if (update.is_l2) {
        update_element<WeightDecay::kL2>(update.rule, update.sign, update.decay, param[lane],
                                         grad[lane], slot);
      } else {
        update_element<WeightDecay::kDecoupled>(update.rule, update.sign, update.decay, param[lane],
                                                grad[lane], slot);
      }
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
    if (update.zero_grad || update.changes_gradients) {
      store_lanes<kN>(operands[kGrad], aligned[kGrad], range, grad);
    }
  }
  if (operands[kAverage] && update.moves_average) {
    T average[kN];
    load_lanes<kN>(operands[kAverage], aligned[kAverage], range, average);
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) {
      average[lane] =
          update.copies_average ? param[lane] : update.average(average[lane], param[lane]);
    }
    store_lanes<kN>(operands[kAverage], aligned[kAverage], range, average);
  }
}

template <class Storage>
__device__ void zero_share(Storage* grad, const DeviceTask& task, const Share& share) {
  if (!grad) return;
  for (int64_t element = share.start + threadIdx.x; element < share.end; element += kThreads) {
    const int64_t offset = task.walk ? offset_of(*task.walk, kGrad, element) : element;
    grad[offset] = Storage{};
  }
}

template <class Rule, class Storage, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    optimizer_step_kernel(const __grid_constant__ StepArguments args,
                          const __grid_constant__ GradAddresses<kCapacity> grads) {
  using T = ComputeType<Storage>;
  constexpr int kUsed = kUsedOperands<Rule>;
  const bool is_skipped = args.tail.found_inf && *args.tail.found_inf != 0;
  if (is_skipped && !args.tail.zero_grad) return;
  const Share share = find_share(args.tasks, args.begin, args.end, args.first_chunk);
  const DeviceTask& task = args.tasks[share.task];
  Storage* operands[kUsed];
#pragma unroll
  for (int k = 0; k < kUsed; ++k) operands[k] = static_cast<Storage*>(task.operands[k]);
  void* const grad = grads.at[share.task - args.begin];
  if (grad == kLeaveAlone) return;
  operands[kGrad] = static_cast<Storage*>(grad);
  if (!operands[kGrad] && !(operands[kAverage] && args.tail.moves_averages)) return;
  if (is_skipped) {
    zero_share(operands[kGrad], task, share);
    return;
  }
  const unsigned char* functor =
      args.functors ? args.functors + static_cast<int64_t>(share.task) * kFunctorBytes
                    : args.functor;
  Rule rule = *reinterpret_cast<const Rule*>(functor);
  const Update<Rule, T> update(args, rule);
  if (task.walk) {
    for (int64_t element = share.start + threadIdx.x; element < share.end; element += kThreads) {
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
}

// One thread advances the counters of one task and folds its scalars.
template <class Rule, int kCapacity>
__global__ void __launch_bounds__(kThreads)
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
  if constexpr (kFactor<Rule> != nullptr) {
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

std::string kernel_name(const char* kernel, int rule) {
  return std::string(kernel) + "<" + AllRules::kInfo[rule].name + ">";
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
  const int64_t blocks = (range.end - range.begin + kThreads - 1) / kThreads;
  with_kernels(range.dtype, [&](auto kernels) {
    with_grad_addresses(range, [&](const auto& grads) {
      constexpr int kCapacity = sizeof(grads.at) / sizeof(void*);
      launch(kernel_name("advance_steps_kernel", rule.rule).c_str(), stream, {blocks, kThreads},
             kernels.template advance<kCapacity>(rule.rule), range.tasks, range.begin, range.end,
             rule, found_inf, grads);
    });
  });
}

void launch_optimizer_step(const TaskRange& range, const StepRule& rule, const DeviceTail& tail,
                           const Stream& stream) {
  StepArguments args = {range.tasks,   range.begin,       range.end,  range.first_chunk, {},
                        rule.functors, rule.weight_decay, rule.decay, rule.maximize,     tail};
  if (!rule.functors) {
    double hyperparameters[kMaxHyperparameters];
    for (int i = 0; i < kMaxHyperparameters; ++i) {
      hyperparameters[i] = rule.hyperparameters[i].value;
    }
    const auto bind =
        range.dtype == DType::kFloat64 ? AllRules::bind<double> : AllRules::bind<float>;
    bind(rule.rule, args.functor, hyperparameters, rule.progress);
  }
  with_kernels(range.dtype, [&](auto kernels) {
    with_grad_addresses(range, [&](const auto& grads) {
      constexpr int kCapacity = sizeof(grads.at) / sizeof(void*);
      launch(kernel_name("optimizer_step_kernel", rule.rule).c_str(), stream,
             {range.chunk_end - range.first_chunk, kThreads},
             kernels.template step<kCapacity>(rule.rule), args, grads);
    });
  });
}

}  // namespace fastopt::cuda
