#pragma once

#include <cstdint>

#include "core/dtypes.h"
#include "core/operands.h"
#include "core/update_rules.h"
#include "cuda/device.h"

namespace fastopt::cuda {

// What a block works on: so many elements of one tensor.
constexpr int64_t kChunk = 4096;

constexpr int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Gradient addresses of one launch: they travel by value in the kernel's arguments, of which there
// are at most 32764 bytes.
constexpr int kFewTensors = 64;
constexpr int kManyTensors = 3968;

// A number known on the host, or to be read on the device.
struct Scalar {
  double value = 0;
  const void* address = nullptr;  // of a float or a double
  bool is_double = false;
};

// In the place of a gradient's address: nothing is done for its task.
inline void* const kLeaveAlone = reinterpret_cast<void*>(1);
// A gradient without elements, whose step counts all the same.
inline void* const kNoElements = reinterpret_cast<void*>(16);

// One parameter, in a table in the device's memory.
struct DeviceTask {
  void* operands[kOperands];  // but for the gradient: addresses that stay
  void* step;                 // a counter on the device, or nullptr
  const Walk* walk;           // in the device's memory; nullptr: all dense and alike
  int64_t numel;
  int64_t first_chunk;  // chunks of the tasks before this one
  bool step_is_double;
  bool grad_is_dense;  // whatever the walk says
};

// What surrounds the update of every parameter in one step.
struct DeviceTail {
  Scalar grad_scale;
  double clip_value;
  bool changes_gradients;
  bool zero_grad;
  bool moves_averages;
  double average_weight;
  const float* found_inf;  // nonzero: nothing is stepped or counted, gradients are zeroed all the
                           // same; nullptr: it is zero
};

// Neighbouring tasks of one group and dtype.
struct TaskRange {
  const DeviceTask* tasks;  // on the device; all of the table
  int begin, end;
  int64_t first_chunk, chunk_end;
  void* const* grads;  // on the host, [end - begin]; nullptr: no gradient, the average only;
                       // kLeaveAlone
  DType dtype;
};

// The rule of one group in one step.
struct StepRule {
  int rule;
  WeightDecay weight_decay;
  Scalar decay;
  bool maximize;
  Scalar hyperparameters[kMaxHyperparameters];
  double step;              // where the host counts
  unsigned char* functors;  // on the device, [tasks, kFunctorBytes]: where the device counts or a
                            // hyperparameter is read there; otherwise nullptr
};

extern const UpdateRuleInfo* const kRuleInfo;
extern const int kRuleCount;

// Loads all kernels of a dtype on a device, so that none is loaded inside a graph's capture.
void load_kernels(DType dtype, int device);
void load_norm_kernels(DType dtype);

// Counts the step of each task that has a gradient and folds its scalars into rule.functors.
void launch_advance_steps(const TaskRange& range, const StepRule& rule, const float* found_inf,
                          const Stream& stream);

void launch_optimizer_step(const TaskRange& range, const StepRule& rule, const DeviceTail& tail,
                           const Stream& stream);

// The reductions of the chunks, partials[first_chunk, chunk_end), for an order other than 0.
void launch_grad_norm(const TaskRange& range, double order, double* partials, const Stream& stream);

// The norm of all chunks together.
void launch_join_norms(const double* partials, int64_t chunks, double order, double* norm,
                       const Stream& stream);

}  // namespace fastopt::cuda
