#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>
#include <vector>

#include "bindings/layout.h"
#include "cpu/grad_norm.h"

namespace fastopt {

// Numbers the chunks of the tasks and runs the kernel.
double total_norm(std::vector<GradTask>& tasks, double order, int threads);

// Tensors to be measured and clipped together, as they are at one moment.
class GradientList {
 public:
  // `tensors` themselves, or, where `of_parameters`, their gradients, as far as they have one.
  GradientList(pybind11::list tensors, bool of_parameters);

  pybind11::list dtypes() const;  // numbers of DType

  // Why the kernels cannot measure, or change, these tensors; empty where they can.
  const std::string& unreadable() const { return unreadable_; }
  std::string unwritable() const;

  double norm(double order, int threads);
  // g <- g * scale, brought into [-clip_value, clip_value]. Returns what was written.
  pybind11::list clip(double scale, double clip_value, int threads);

  pybind11::list tensors;  // with or without elements
  bool has_complex = false, has_empty = false;

 private:
  void add(pybind11::handle tensor);

  std::string unreadable_;
  bool overlaps_itself_ = false;
  unsigned dtypes_ = 0;  // a bit each
  std::vector<GradTask> tasks_;
  std::vector<Extent> extents_;
  std::vector<std::unique_ptr<Walk>> walks_;
};

}  // namespace fastopt
