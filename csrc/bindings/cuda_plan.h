#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings/group_rules.h"
#include "bindings/step_plan.h"
#include "cuda/optimizer_step.h"

namespace fastopt {

// Steps parameters in the memory of one card. Addresses of parameters and state lie in a table on
// the card, which the caller allocates and fills with table(); nothing here allocates or waits.
class CudaPlan : public StepPlan {
 public:
  // `device_type` as DLPack numbers it: the host where the simulator is the card, and there
  // `counts_here_on_host` says who counts steps.
  CudaPlan(pybind11::dict state, pybind11::list groups, int device_type, int device_index,
           bool counts_here_on_host);

  // The table for a place in the card's memory, and which one it is: another one is due when this
  // number changes, after a collect() that met a gradient of another layout.
  int64_t table_bytes() const;
  pybind11::bytes table(uintptr_t address) const;
  int64_t table_version() const { return walks_version(); }

  int64_t task_count() const { return static_cast<int64_t>(tasks_.size()); }
  int64_t chunk_count() const { return chunks_; }

  // The norm of what collect() fetched, to the double at `norm`; `partials` has room for
  // chunk_count() doubles.
  void grad_norm(double order, uintptr_t table, uintptr_t partials, uintptr_t norm,
                 uintptr_t stream) const;

  // Steps what collect() fetched and returns the tensors that it wrote and autograd may have saved.
  // `rules` as for OptimizerPlan, `tail` the fields of cuda::DeviceTail, where a number may be
  // (address, is double). `functors` has room for task_count() * 64 bytes.
  pybind11::list run(pybind11::tuple rules, pybind11::tuple tail, uintptr_t table,
                     uintptr_t functors, uintptr_t stream);

 private:
  // Neighbouring tasks of one group and dtype, as many as fit a launch.
  struct Part {
    int group;
    DType dtype;
    int begin, end;
    int64_t first_chunk, chunk_end;
  };
  // What a launch does for the tasks of a part.
  struct Launch {
    double step;
    std::vector<void*> grads;
  };

  cuda::TaskRange range_of(const Part& part, uintptr_t table, void* const* grads) const;
  std::vector<Launch> launches_of(const Part& part);
  const Entry& entry_of(int task) const { return entries_[tasks_[task]]; }

  int device_index_;
  std::vector<size_t> tasks_;  // entries, in the order of the table
  std::vector<int64_t> first_chunks_;
  std::vector<Part> parts_;
  int64_t chunks_ = 0;
};

}  // namespace fastopt
