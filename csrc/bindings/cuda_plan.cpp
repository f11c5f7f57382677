#include "bindings/cuda_plan.h"

#include <vector>

#include "bindings/simulated_memory.h"
#include "cuda/layerwise_step.h"

namespace py = pybind11;

namespace fastopt {

using namespace cuda;

CudaPlan::CudaPlan(py::dict state, py::list groups, int device_type, int device_index,
                   bool counts_here_on_host)
    : CardPlan(state, groups, device_type, device_index, counts_here_on_host, kManyTensors,
               kCodedTensors),
      device_index_(device_index) {
  for (const Part& part : parts_) {
    load_kernels(part.dtype, device_index_);
    if (part.is_coded()) load_coded_kernels(part.dtype, part.slots, device_index_);
  }
}

namespace {

template <class Part>
TaskRange range_of(const Part& part, uintptr_t table, void* const* grads) {
  return {reinterpret_cast<const DeviceTask*>(table),
          part.begin,
          part.end,
          part.first_chunk,
          part.chunk_end,
          grads,
          part.dtype};
}

}  // namespace

void CudaPlan::grad_norm(double order, uintptr_t table, uintptr_t partials, uintptr_t norm,
                         uintptr_t stream) const {
  refuse_other_threads();
  const Stream on{device_index_, reinterpret_cast<void*>(stream)};
  auto* const sums = reinterpret_cast<double*>(partials);
  for (const Part& part : parts_) {
    if (part.first_chunk == part.chunk_end) continue;
    const Gradients grads = gradients_of(part);
    launch_grad_norm(range_of(part, table, grads.data()), order, sums, on);
  }
  launch_join_norms(sums, chunks_, order, reinterpret_cast<double*>(norm), on);
}

py::list CudaPlan::run(py::tuple rules, py::tuple tail, uintptr_t table, uintptr_t functors,
                       uintptr_t stream) {
  const Stream on{device_index_, reinterpret_cast<void*>(stream)};
  std::vector<Extent> memory = extents_;
  for (const Entry& entry : entries_) {
    if (entry.grad.tensor) memory.emplace_back(entry.grad.data, entry.grad.extent, 0);
  }
  const SimulatedMemory simulated(memory);
  auto* const squares = reinterpret_cast<Squares*>(functors + squares_offset());
  return step(
      rules, tail, functors, kRuleInfo, kRuleCount,
      [&](const Part& part, const StepRule& rule, const DeviceTail& tail, const Gradients& grads) {
        const TaskRange range = range_of(part, table, grads.data());
        if (rule.functors) launch_advance_steps(range, rule, tail.found_inf, on);
        if (part.first_chunk == part.chunk_end) return;
        if (kRuleInfo[rule.rule].layerwise) launch_fold_squares(range, rule, tail, squares, on);
        if (part.is_coded()) {
          launch_coded_step(range, part.slots, rule, tail, on);
        } else {
          launch_optimizer_step(range, rule, tail, on);
        }
      });
}

}  // namespace fastopt
