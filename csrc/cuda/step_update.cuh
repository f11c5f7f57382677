#pragma once

// What the kernels of optimizers' steps share: a block's work, and the arithmetic of a thread.

#include "core/rule_table.h"
#include "cuda/optimizer_step.h"
#include "cuda/task_range.cuh"
#include "cuda/vector_access.cuh"

namespace fastopt::cuda {

constexpr int kStepThreads = 256;

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

inline StepArguments step_arguments(const TaskRange& range, const StepRule& rule,
                                    const DeviceTail& tail) {
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
  return args;
}

inline std::string kernel_name(const char* kernel, int rule) {
  return std::string(kernel) + "<" + AllRules::kInfo[rule].name + ">";
}

// The scalars of a block.
template <class Rule, class T>
struct Update {
  Rule rule;
  bool is_l2;
  T sign, decay, grad_scale;
  Clamp<T> clamp;
  bool changes_gradients, zero_grad, moves_average, copies_average;
  Lerp<T> average;

  __device__ Update(const StepArguments& args, int task)
      : rule(*reinterpret_cast<const Rule*>(
            args.functors ? args.functors + static_cast<int64_t>(task) * kFunctorBytes
                          : args.functor)),
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

  __device__ bool writes_gradients() const { return zero_grad || changes_gradients; }

  // Scaled and clipped, as the rule sees gradients and as they are stored where they are not
  // zeroed.
  template <class Storage, int kN>
  __device__ void change(T (&grads)[kN]) const {
    if (!changes_gradients) return;
#pragma unroll
    for (T& grad : grads) grad = rounded<Storage>(clamp(grad_scale * grad));
  }

  __device__ void step(T& param, T grad, T* slot) const {
    if (is_l2) {
      update_element<WeightDecay::kL2>(rule, sign, decay, param, grad, slot);
    } else {
      update_element<WeightDecay::kDecoupled>(rule, sign, decay, param, grad, slot);
    }
  }

  __device__ T averaged(T old, T param) const {
    return copies_average ? param : average(old, param);
  }
};

template <class Storage>
__device__ void zero_share(Storage* grad, const DeviceTask& task, const Share& share) {
  if (!grad) return;
  for (int64_t element = share.start + threadIdx.x; element < share.end; element += kStepThreads) {
    const int64_t offset = task.walk ? offset_of(*task.walk, kGrad, element) : element;
    grad[offset] = Storage{};
  }
}

// visit(share, task, gradient) for the block's share, where it is to be stepped or averaged; no
// gradient: averaged only. Of a step that is skipped, gradients are zeroed here.
template <class Storage, int kCapacity, class Visitor>
__device__ void visit_share(const StepArguments& args, const GradAddresses<kCapacity>& grads,
                            const Visitor& visit) {
  const bool is_skipped = args.tail.found_inf && *args.tail.found_inf != 0;
  if (is_skipped && !args.tail.zero_grad) return;
  const Share share = find_share(args.tasks, args.begin, args.end, args.first_chunk);
  const DeviceTask& task = args.tasks[share.task];
  void* const address = grads.at[share.task - args.begin];
  if (address == kLeaveAlone) return;
  Storage* const grad = static_cast<Storage*>(address);
  if (!grad && !(task.operands[kAverage] && args.tail.moves_averages)) return;
  if (is_skipped) {
    zero_share(grad, task, share);
  } else {
    visit(share, task, grad);
  }
}

}  // namespace fastopt::cuda
