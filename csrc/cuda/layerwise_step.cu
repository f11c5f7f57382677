// The pass before the step of rules that hang on the whole parameter: squares of each chunk, which
// a block for each parameter then adds up in a fixed order. Parameters and state are only read.

#include "core/norm_orders.h"
#include "core/rule_table.h"
#include "core/with_storage.h"
#include "cuda/block_join.cuh"
#include "cuda/layerwise_step.h"
#include "cuda/task_range.cuh"
#include "cuda/vector_access.cuh"

namespace fastopt::cuda {

namespace {

constexpr int kThreads = 256;
// At least: left to itself, ptxas spills for more.
constexpr int kBlocksPerMultiprocessor = 2;

struct MeasureArguments {
  const DeviceTask* tasks;
  int begin, end;
  int64_t first_chunk;
  unsigned char* functors;
  WeightDecay weight_decay;
  Scalar decay;
  bool maximize;
  DeviceTail tail;
  Squares* squares;  // of each chunk of the table
};

__device__ inline bool is_stepped(const void* grad) { return grad && grad != kLeaveAlone; }

__device__ inline bool is_skipped(const DeviceTail& tail) {
  return tail.found_inf && *tail.found_inf != 0;
}

template <class Rule>
__device__ Rule* functor_of(const MeasureArguments& args, int task) {
  return reinterpret_cast<Rule*>(args.functors + static_cast<int64_t>(task) * kFunctorBytes);
}

// The block's sums in thread 0. Called by a whole block.
__device__ inline Squares join_squares(const Squares& mine) {
  const SumOfSquares sum;
  return {join_block(sum, mine.param), join_block(sum, mine.direction)};
}

template <class Rule, class Storage, int kCapacity>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    measure_squares_kernel(const __grid_constant__ MeasureArguments args,
                           const __grid_constant__ GradAddresses<kCapacity> grads) {
  using T = ComputeType<Storage>;
  constexpr int kUsed = kFirstSlot + Rule::kSlots;
  if (is_skipped(args.tail)) return;
  const Share share = find_share(args.tasks, args.begin, args.end, args.first_chunk);
  const DeviceTask& task = args.tasks[share.task];
  void* const grad = grads.at[share.task - args.begin];
  if (!is_stepped(grad)) return;
  const Storage* operands[kUsed];
#pragma unroll
  for (int k = 0; k < kUsed; ++k) operands[k] = static_cast<const Storage*>(task.operands[k]);
  operands[kGrad] = static_cast<const Storage*>(grad);

  const Rule rule = *functor_of<Rule>(args, share.task);
  const bool is_l2 = args.weight_decay == WeightDecay::kL2;
  const T sign = static_cast<T>(args.maximize ? -1 : 1);
  const T decay = static_cast<T>(read(args.decay));
  const T scale = static_cast<T>(read(args.tail.grad_scale));
  const Clamp<T> clamp(args.tail.clip_value);
  Squares sum;
  const auto add = [&](T param, T direction) {
    sum.param += static_cast<double>(param) * static_cast<double>(param);
    sum.direction += static_cast<double>(direction) * static_cast<double>(direction);
  };
  const Measured<Rule, decltype(add)> measured{rule, add};
  // An element of each operand, as lanes of any kind give it.
  const auto measure = [&](T* element) {
    T& g = element[kGrad];
    if (args.tail.changes_gradients) g = rounded<Storage>(clamp(scale * g));
    if (is_l2) {
      update_element<WeightDecay::kL2>(measured, sign, decay, element[kParam], g,
                                       element + kFirstSlot);
    } else {
      update_element<WeightDecay::kDecoupled>(measured, sign, decay, element[kParam], g,
                                              element + kFirstSlot);
    }
  };
  if (task.walk) {
    for (int64_t e = share.start + threadIdx.x; e < share.end; e += kThreads) {
      T element[kUsed];
#pragma unroll
      for (int k = 0; k < kUsed; ++k) {
        if (k != kAverage) element[k] = load(operands[k] + offset_of(*task.walk, k, e));
      }
      measure(element);
    }
  } else {
    constexpr int kN = kLanes<Storage>;
    for_each_pack(operands[kParam], share.start, share.end, [&](int64_t first, LaneRange range) {
      T lanes[kUsed][kN];
#pragma unroll
      for (int k = 0; k < kUsed; ++k) {
        if (k == kAverage) continue;
        load_lanes<kN>(operands[k] + first, is_aligned<kN>(operands[k] + first), range, lanes[k]);
      }
#pragma unroll
      for (int lane = 0; lane < kN; ++lane) {
        if (lane < range.begin || lane >= range.end) continue;
        T element[kUsed];
#pragma unroll
        for (int k = 0; k < kUsed; ++k) {
          if (k != kAverage) element[k] = lanes[k][lane];
        }
        measure(element);
      }
    });
  }
  sum = join_squares(sum);
  if (threadIdx.x == 0) args.squares[args.first_chunk + blockIdx.x] = sum;
}

// A block adds up the chunks of one task.
template <class Rule, int kCapacity>
__global__ void __launch_bounds__(kThreads)
    fold_squares_kernel(const __grid_constant__ MeasureArguments args,
                        const __grid_constant__ GradAddresses<kCapacity> grads) {
  if (is_skipped(args.tail) || !is_stepped(grads.at[blockIdx.x])) return;
  const int index = args.begin + static_cast<int>(blockIdx.x);
  const DeviceTask& task = args.tasks[index];
  const int64_t chunks = chunks_of(task.numel);
  Squares sum;
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
    const Squares part = args.squares[task.first_chunk + chunk];
    sum.param += part.param;
    sum.direction += part.direction;
  }
  sum = join_squares(sum);
  if (threadIdx.x == 0) functor_of<Rule>(args, index)->fold_squares(sum);
}

// visit(a constant that is the number of the rule), where that is a layer-wise one
template <class Visitor, std::size_t... kIndices>
void with_layerwise_rule(int rule, const Visitor& visit, std::index_sequence<kIndices...>) {
  const auto of_index = [&](auto index) {
    if constexpr (kIsLayerwise<RuleAt<float, decltype(index)::value>>) {
      if (rule == static_cast<int>(index)) visit(index);
    }
  };
  (of_index(std::integral_constant<std::size_t, kIndices>{}), ...);
}

}  // namespace

void load_layerwise_kernels(DType dtype) {
  with_storage(dtype, [](auto storage) {
    using Storage = decltype(storage);
    for (int rule = 0; rule < kRuleCount; ++rule) {
      const auto load = [](auto index) {
        using Rule = RuleAt<ComputeType<Storage>, decltype(index)::value>;
        load_kernel(measure_squares_kernel<Rule, Storage, kFewTensors>);
        load_kernel(measure_squares_kernel<Rule, Storage, kManyTensors>);
        load_kernel(fold_squares_kernel<Rule, kFewTensors>);
        load_kernel(fold_squares_kernel<Rule, kManyTensors>);
      };
      with_layerwise_rule(rule, load, RuleIndices{});
    }
  });
}

void launch_fold_squares(const TaskRange& range, const StepRule& rule, const DeviceTail& tail,
                         Squares* squares, const Stream& stream) {
  const MeasureArguments args = {range.tasks,   range.begin,
                                 range.end,     range.first_chunk,
                                 rule.functors, rule.weight_decay,
                                 rule.decay,    rule.maximize,
                                 tail,          squares};
  with_storage(range.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    with_grad_addresses(range, [&](const auto& grads) {
      constexpr int kCapacity = sizeof(grads.at) / sizeof(void*);
      const auto launch_both = [&](auto index) {
        using Rule = RuleAt<ComputeType<Storage>, decltype(index)::value>;
        launch("measure_squares_kernel", stream, {range.chunk_end - range.first_chunk, kThreads},
               measure_squares_kernel<Rule, Storage, kCapacity>, args, grads);
        launch("fold_squares_kernel", stream, {range.end - range.begin, kThreads},
               fold_squares_kernel<Rule, kCapacity>, args, grads);
      };
      with_layerwise_rule(rule.rule, launch_both, RuleIndices{});
    });
  });
}

}  // namespace fastopt::cuda
