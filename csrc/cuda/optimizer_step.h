#pragma once

#include <cstdint>

#include "core/card_tasks.h"
#include "cuda/device.h"

namespace fastopt::cuda {

// Gradient addresses of one launch: they travel by value in the kernel's arguments, of which there
// are at most 32764 bytes.
constexpr int kFewTensors = 64;
constexpr int kManyTensors = 3968;
constexpr int kCodedTensors = 448;  // of a launch of coded ones, the only size there is

// Neighbouring tasks of one group and dtype.
struct TaskRange {
  const DeviceTask* tasks;  // on the device; all of the table
  int begin, end;
  int64_t first_chunk, chunk_end;
  void* const* grads;  // on the host, [end - begin]; nullptr: no gradient, the average only;
                       // kLeaveAlone
  DType dtype;
};

extern const UpdateRuleInfo* const kRuleInfo;
extern const int kRuleCount;

// Loads all kernels of a dtype on a device, so that none is loaded inside a graph's capture.
void load_kernels(DType dtype, int device);
void load_norm_kernels(DType dtype);
void load_coded_kernels(DType dtype, SlotCode slots, int device);

// Advances the counters of each task that has a gradient and folds its scalars into rule.functors.
void launch_advance_steps(const TaskRange& range, const StepRule& rule, const float* found_inf,
                          const Stream& stream);

void launch_optimizer_step(const TaskRange& range, const StepRule& rule, const DeviceTail& tail,
                           const Stream& stream);

// The same of tasks that have a coding, all with this code of their slots.
void launch_coded_step(const TaskRange& range, SlotCode slots, const StepRule& rule,
                       const DeviceTail& tail, const Stream& stream);

// The reductions of the chunks, partials[first_chunk, chunk_end), for an order other than 0.
void launch_grad_norm(const TaskRange& range, double order, double* partials, const Stream& stream);

// The norm of all chunks together.
void launch_join_norms(const double* partials, int64_t chunks, double order, double* norm,
                       const Stream& stream);

}  // namespace fastopt::cuda
