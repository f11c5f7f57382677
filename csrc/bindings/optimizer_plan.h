#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "bindings/group_rules.h"
#include "bindings/step_plan.h"
#include "cpu/layerwise_step.h"
#include "cpu/optimizer_step.h"

namespace fastopt {

// Steps parameters in the host's memory.
class OptimizerPlan : public StepPlan {
 public:
  OptimizerPlan(pybind11::dict state, pybind11::list groups)
      : StepPlan(state, groups, {torch_access::kDLCPU, 0}, true) {}

  // Of what collect() fetched.
  double grad_norm(double order, int threads) const;

  // Steps what collect() fetched and returns the tensors that it wrote and autograd may have saved.
  // `rules` has for each group (rule's name, weight decay kind, decay, maximize, hyperparameters),
  // `tail` the fields of struct Tail.
  pybind11::list run(pybind11::tuple rules, pybind11::tuple tail, int threads);

 private:
  // A group's rule, bound for the last progress asked for, by arithmetic type: fp32, fp64.
  struct BoundGroup {
    const GroupRule* rule;
    const UpdateRuleInfo* info;
    double decay;
    double hyperparameters[kMaxHyperparameters] = {};
    int bound[2] = {-1, -1};
    Progress bound_progress[2] = {};
  };

  int bind(BoundGroup& group, const Entry& entry, const Progress& progress);
  StepTask make_task(const Entry& entry) const;
  // The pass before the step, of those tasks whose rules need one.
  void fold_squares(const StepTask* tasks, int64_t count, const Tail& tail, int threads);

  std::vector<BoundRule> bound_rules_;
  std::vector<StateCoding> codings_;
  std::vector<Squares> squares_;
};

}  // namespace fastopt
