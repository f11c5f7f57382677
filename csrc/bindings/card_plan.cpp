#include "bindings/card_plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "bindings/group_rules.h"

namespace py = pybind11;

namespace fastopt {

namespace {

// A float, or (address, is double) of a number on the device.
Scalar scalar_of(py::handle value) {
  if (!py::isinstance<py::tuple>(value)) return {py::cast<double>(value), nullptr, false};
  const auto [address, is_double] = py::cast<std::pair<uintptr_t, bool>>(value);
  return {0, reinterpret_cast<const void*>(address), is_double};
}

}  // namespace

CardPlan::CardPlan(py::dict state, py::list groups, int device_type, int device_index,
                   bool counts_here_on_host, int most_tasks, int most_coded_tasks)
    : StepPlan(state, groups, {device_type, device_index}, counts_here_on_host) {
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (entries_[i].service == Service::kServed) tasks_.push_back(i);
  }
  std::stable_sort(tasks_.begin(), tasks_.end(), [&](size_t left, size_t right) {
    return kind_of(entries_[left]).order() < kind_of(entries_[right]).order();
  });
  for (int task = 0; task < static_cast<int>(tasks_.size()); ++task) {
    const Kind kind = kind_of(entry_of(task));
    const int most = kind.is_coded() ? most_coded_tasks : most_tasks;
    if (parts_.empty() || parts_.back().order() != kind.order() ||
        task - parts_.back().begin == most) {
      parts_.push_back({kind, task, task, chunks_, chunks_});
    }
    first_chunks_.push_back(chunks_);
    chunks_ += chunks_of(entry_of(task).numel);
    parts_.back().end = task + 1;
    parts_.back().chunk_end = chunks_;
  }
}

CardPlan::Kind CardPlan::kind_of(const Entry& entry) {
  Kind kind{entry.group, entry.layout.dtype, SlotCode::kAsParameter, ParamCode::kRounded};
  if (!entry.coding) return kind;
  const std::vector<SlotCode>& slots = entry.coding->slots;
  kind.slots = slots.empty() ? SlotCode::kFloat32 : slots.front();
  kind.param = entry.coding->param;
  if (std::any_of(slots.begin(), slots.end(), [&](SlotCode code) { return code != kind.slots; })) {
    throw std::invalid_argument("on a card all state of a parameter is stored alike");
  }
  return kind;
}

int64_t CardPlan::table_bytes() const {
  size_t bytes = tasks_.size() * sizeof(DeviceTask);
  for (size_t i : tasks_) {
    if (entries_[i].walk) bytes += sizeof(Walk);
    if (entries_[i].coding) bytes += sizeof(StateCoding);
  }
  return static_cast<int64_t>(bytes);
}

py::bytes CardPlan::table(uintptr_t address) const {
  std::string bytes(static_cast<size_t>(table_bytes()), '\0');
  size_t place = tasks_.size() * sizeof(DeviceTask);  // behind the tasks
  const auto add = [&](const auto& record) {
    std::memcpy(&bytes[place], &record, sizeof record);
    place += sizeof record;
    return reinterpret_cast<decltype(&record)>(address + place - sizeof record);
  };
  for (size_t t = 0; t < tasks_.size(); ++t) {
    const Entry& entry = entries_[tasks_[t]];
    DeviceTask task = {};
    task.operands[kParam] = entry.fingerprint.data();
    if (entry.average) task.operands[kAverage] = entry.average->fingerprint.data();
    for (size_t k = 0; k < entry.slots.size(); ++k) {
      task.operands[kFirstSlot + k] = entry.slots[k].fingerprint.data();
    }
    if (entry.step && !entry.step->is_on_host) task.step = entry.step->counter();
    if (entry.product && !entry.product->is_on_host) task.product = entry.product->counter();
    task.numel = entry.numel;
    task.first_chunk = first_chunks_[t];
    task.grad_is_dense = entry.grad.is_dense;
    if (entry.walk) task.walk = add(*entry.walk);
    if (entry.coding) task.coding = add(entry.coding->at_step(0));
    std::memcpy(&bytes[t * sizeof(DeviceTask)], &task, sizeof task);
  }
  return py::bytes(bytes);
}

// Tasks that the host counts go together where they are equally far; those that share memory with
// another go one after the other.
std::vector<CardPlan::Batch> CardPlan::batches_of(const Part& part, const StepRule& rule,
                                                  const UpdateRuleInfo& info) {
  double hyperparameters[kMaxHyperparameters];
  std::transform(std::begin(rule.hyperparameters), std::end(rule.hyperparameters), hyperparameters,
                 [](const Scalar& scalar) { return scalar.address ? std::nan("") : scalar.value; });
  std::vector<Batch> batches;
  const Gradients left_alone(part.end - part.begin, kLeaveAlone);
  const auto open = [&](const Progress& progress) -> Batch& {
    return batches.emplace_back(Batch{progress, left_alone});
  };
  const Progress unknown;  // of a task that is only averaged, or counted on the device
  for (int task = part.begin; task < part.end; ++task) {
    Entry& entry = entries_[tasks_[task]];
    const bool has_grad = static_cast<bool>(entry.grad.tensor);
    if (!has_grad && (!entry.average || entry.is_refused)) continue;
    void* grad = entry.grad.data ? entry.grad.data : kNoElements;
    const Progress progress = has_grad ? advance_counters(entry, info, hyperparameters) : unknown;
    Batch* batch = nullptr;
    if (!entry.runs_alone) {
      for (Batch& other : batches) {
        if (!has_grad || other.progress == progress || other.progress == unknown) batch = &other;
      }
    }
    if (!batch) batch = &open(progress);
    if (has_grad && batch->progress == unknown) batch->progress = progress;
    batch->grads[task - part.begin] = has_grad ? grad : nullptr;
    if (entry.runs_alone) open(unknown);
  }
  batches.erase(std::remove_if(batches.begin(), batches.end(),
                               [&](const Batch& batch) { return batch.grads == left_alone; }),
                batches.end());
  return batches;
}

CardPlan::Gradients CardPlan::gradients_of(const Part& part) const {
  Gradients grads;
  for (int task = part.begin; task < part.end; ++task) {
    const Entry& entry = entry_of(task);
    grads.push_back(entry.grad.tensor ? entry.grad.data : nullptr);
  }
  return grads;
}

py::list CardPlan::step(py::tuple rules, py::tuple surroundings, uintptr_t functors,
                        const UpdateRuleInfo* rule_info, int rule_count, const Launch& launch) {
  refuse_other_threads();
  const std::vector<GroupRule> group_rules =
      parse_rules(rules, group_sizes_.size(), rule_info, rule_count);
  const auto [grad_scale, clip_value, changes, zero_grad, averages, weight, found_inf] =
      py::cast<std::tuple<py::object, double, bool, bool, bool, double, uintptr_t>>(surroundings);
  const DeviceTail tail{scalar_of(grad_scale),
                        clip_value,
                        changes,
                        zero_grad,
                        averages,
                        weight,
                        reinterpret_cast<const float*>(found_inf)};
  for (const Entry& entry : entries_) {
    check_state(entry, rule_info[group_rules[entry.group].rule]);
  }
  py::list written;
  for (Entry& entry : entries_) {
    if (!entry.grad.tensor) continue;
    note_written(entry, zero_grad || changes, written);
    if (zero_grad) detach_gradient(entry);
  }
  for (const Part& part : parts_) {
    const GroupRule& group = group_rules[part.group];
    StepRule rule{group.rule, group.weight_decay, scalar_of(group.decay), group.maximize, {}, {},
                  nullptr};
    bool on_device = rule_info[group.rule].layerwise;
    for (size_t i = 0; i < group.hyperparameters.size(); ++i) {
      rule.hyperparameters[i] = scalar_of(group.hyperparameters[i]);
      on_device = on_device || rule.hyperparameters[i].address;
    }
    for (int task = part.begin; task < part.end; ++task) {
      on_device = on_device || !entry_of(task).counts_on_host();
    }
    if (on_device) rule.functors = reinterpret_cast<unsigned char*>(functors);
    for (const Batch& batch : batches_of(part, rule, rule_info[group.rule])) {
      rule.progress = batch.progress;
      launch(part, rule, tail, batch.grads);
    }
  }
  for (Entry& entry : entries_) {
    if (entry.grad.tensor) entry.is_new = false;
  }
  release();
  return written;
}

}  // namespace fastopt
