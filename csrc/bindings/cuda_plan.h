#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings/card_plan.h"
#include "cuda/optimizer_step.h"

namespace fastopt {

// Launches the kernels of csrc/cuda.
class CudaPlan : public CardPlan {
 public:
  CudaPlan(pybind11::dict state, pybind11::list groups, int device_type, int device_index,
           bool counts_here_on_host);

  // The norm of what collect() fetched, to the double at `norm`; `partials` has room for
  // chunk_count() doubles.
  void grad_norm(double order, uintptr_t table, uintptr_t partials, uintptr_t norm,
                 uintptr_t stream) const;

  // Steps what collect() fetched; arguments and result are those of step().
  pybind11::list run(pybind11::tuple rules, pybind11::tuple tail, uintptr_t table,
                     uintptr_t functors, uintptr_t stream);

 private:
  int device_index_;
};

}  // namespace fastopt
