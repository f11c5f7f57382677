#include "bindings/optimizer_plan.h"

#include <algorithm>
#include <tuple>

#include "bindings/gradient_list.h"
#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

double OptimizerPlan::grad_norm(double order, int threads) const {
  refuse_other_threads();
  std::vector<GradTask> tasks;
  for (const Entry& entry : entries_) {
    const Walk* walk = entry.grad.is_dense ? nullptr : entry.walk.get();
    if (entry.grad.tensor) {
      tasks.push_back({entry.grad.data, walk, entry.numel, 0, entry.layout.dtype});
    }
  }
  py::gil_scoped_release unlocked;
  return total_norm(tasks, order, threads);
}

// The number of the bound rule for the entry's step; entries that are equally far share it,
// unless each folds its own sums into it.
int OptimizerPlan::bind(BoundGroup& group, const Entry& entry, const Progress& progress) {
  const bool wide = entry.layout.dtype == DType::kFloat64;
  if (group.bound[wide] < 0 || group.info->layerwise || !(group.bound_progress[wide] == progress)) {
    BoundRule& bound = bound_rules_.emplace_back();
    bound.rule = group.rule->rule;
    bound.weight_decay = group.rule->weight_decay;
    bound.decay = group.decay;
    bound.maximize = group.rule->maximize;
    chosen_instruction_set().optimizer->bind(bound, entry.layout.dtype, group.hyperparameters,
                                             progress);
    group.bound[wide] = static_cast<int>(bound_rules_.size()) - 1;
    group.bound_progress[wide] = progress;
  }
  return group.bound[wide];
}

StepTask OptimizerPlan::make_task(const Entry& entry) const {
  StepTask task{};
  task.operands[kParam] = entry.fingerprint.data();
  if (entry.average) task.operands[kAverage] = entry.average->fingerprint.data();
  task.walk = entry.walk.get();
  task.numel = entry.numel;
  task.dtype = entry.layout.dtype;
  if (!entry.grad.tensor) return task;
  task.operands[kGrad] = entry.grad.data;
  for (size_t k = 0; k < entry.slots.size(); ++k) {
    task.operands[kFirstSlot + k] = entry.slots[k].fingerprint.data();
  }
  return task;
}

void OptimizerPlan::fold_squares(const StepTask* tasks, int64_t count, const Tail& tail,
                                 int threads) {
  const InstructionSet& kernels = chosen_instruction_set();
  std::vector<StepTask> layerwise;
  int64_t tiles = 0;
  for (const StepTask* task = tasks; task < tasks + count; ++task) {
    if (!task->operands[kGrad] ||
        !kernels.optimizer->rules[bound_rules_[task->bound_rule].rule].layerwise) {
      continue;
    }
    layerwise.push_back(*task);
    layerwise.back().first_tile = tiles;
    tiles += tiles_of(task->numel);
  }
  if (tiles == 0) return;
  squares_.resize(tiles);
  kernels.layerwise->fold_squares({layerwise.data(), static_cast<int64_t>(layerwise.size()), tiles,
                                   bound_rules_.data(), tail, threads},
                                  bound_rules_.data(), squares_.data());
}

py::list OptimizerPlan::run(py::tuple rules, py::tuple surroundings, int threads) {
  refuse_other_threads();
  const OptimizerKernels& kernels = *chosen_instruction_set().optimizer;
  const std::vector<GroupRule> group_rules =
      parse_rules(rules, group_sizes_.size(), kernels.rules, kernels.rule_count);
  std::vector<BoundGroup> groups;
  for (const GroupRule& rule : group_rules) {
    BoundGroup& group = groups.emplace_back(
        BoundGroup{&rule, &kernels.rules[rule.rule], py::cast<double>(rule.decay)});
    std::transform(rule.hyperparameters.begin(), rule.hyperparameters.end(), group.hyperparameters,
                   [](const py::object& value) { return py::cast<double>(value); });
  }
  Tail tail;
  std::tie(tail.grad_scale, tail.clip_value, tail.zero_grad, tail.average_weight) =
      py::cast<std::tuple<double, double, bool, double>>(surroundings);
  for (const Entry& entry : entries_) check_state(entry, *groups[entry.group].info);
  bound_rules_.clear();
  codings_.clear();
  codings_.reserve(entries_.size());  // tasks point into it
  std::vector<StepTask> together, alone;
  together.reserve(entries_.size());
  py::list written;
  int64_t tiles = 0;
  for (Entry& entry : entries_) {
    const bool has_grad = static_cast<bool>(entry.grad.tensor);
    if (!has_grad && (!entry.average || entry.is_refused)) continue;
    StepTask task = make_task(entry);
    if (has_grad) {
      BoundGroup& group = groups[entry.group];
      const Progress progress = advance_counters(entry, *group.info, group.hyperparameters);
      task.bound_rule = bind(group, entry, progress);
      if (entry.coding) {
        codings_.push_back(entry.coding->at_step(static_cast<int64_t>(progress.step)));
        task.coding = &codings_.back();
      }
      entry.is_new = false;
      note_written(entry, tail.zero_grad || tail.changes_gradients(), written);
      if (tail.zero_grad) detach_gradient(entry);
    }
    if (entry.runs_alone) {
      alone.push_back(task);
    } else {
      task.first_tile = tiles;
      tiles += tiles_of(task.numel);
      together.push_back(task);
    }
  }
  running_ = true;
  {
    py::gil_scoped_release unlocked;
    const auto step = [&](const StepTask* tasks, size_t count, int64_t tile_count) {
      if (tile_count == 0) return;
      const auto task_count = static_cast<int64_t>(count);
      fold_squares(tasks, task_count, tail, threads);
      kernels.step({tasks, task_count, tile_count, bound_rules_.data(), tail, threads});
    };
    step(together.data(), together.size(), tiles);
    for (const StepTask& task : alone) step(&task, 1, tiles_of(task.numel));
  }
  running_ = false;
  release();
  return written;
}

}  // namespace fastopt
