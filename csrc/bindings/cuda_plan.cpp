#include "bindings/cuda_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "bindings/simulated_memory.h"

namespace py = pybind11;

namespace fastopt {

using namespace cuda;

namespace {

// A float, or (address, is double) of a number on the device.
Scalar scalar_of(py::handle value) {
  if (!py::isinstance<py::tuple>(value)) return {py::cast<double>(value), nullptr, false};
  const auto [address, is_double] = py::cast<std::pair<uintptr_t, bool>>(value);
  return {0, reinterpret_cast<const void*>(address), is_double};
}

}  // namespace

CudaPlan::CudaPlan(py::dict state, py::list groups, int device_type, int device_index,
                   bool counts_here_on_host)
    : StepPlan(state, groups, {device_type, device_index}, counts_here_on_host),
      device_index_(device_index) {
  for (int group = 0; group < static_cast<int>(group_sizes_.size()); ++group) {
    for (int dtype = 0; dtype < kDTypes; ++dtype) {
      for (size_t i = 0; i < entries_.size(); ++i) {
        const Entry& entry = entries_[i];
        if (entry.service != Service::kServed || entry.group != group ||
            entry.layout.dtype != static_cast<DType>(dtype)) {
          continue;
        }
        const int task = static_cast<int>(tasks_.size());
        if (parts_.empty() || parts_.back().group != group ||
            parts_.back().dtype != entry.layout.dtype ||
            task - parts_.back().begin == kManyTensors) {
          parts_.push_back({group, entry.layout.dtype, task, task, chunks_, chunks_});
        }
        tasks_.push_back(i);
        first_chunks_.push_back(chunks_);
        chunks_ += chunks_of(entry.numel);
        parts_.back().end = task + 1;
        parts_.back().chunk_end = chunks_;
      }
    }
  }
  for (const Part& part : parts_) load_kernels(part.dtype, device_index_);
}

int64_t CudaPlan::table_bytes() const {
  const auto walks = std::count_if(tasks_.begin(), tasks_.end(),
                                   [&](size_t i) { return entries_[i].walk != nullptr; });
  return static_cast<int64_t>(tasks_.size() * sizeof(DeviceTask) + walks * sizeof(Walk));
}

py::bytes CudaPlan::table(uintptr_t address) const {
  std::string bytes(static_cast<size_t>(table_bytes()), '\0');
  size_t walk_place = tasks_.size() * sizeof(DeviceTask);
  for (size_t t = 0; t < tasks_.size(); ++t) {
    const Entry& entry = entries_[tasks_[t]];
    DeviceTask task = {};
    task.operands[kParam] = entry.fingerprint.data();
    if (entry.average) task.operands[kAverage] = entry.average->fingerprint.data();
    for (size_t k = 0; k < entry.slots.size(); ++k) {
      task.operands[kFirstSlot + k] = entry.slots[k].fingerprint.data();
    }
    if (!entry.counts_on_host) {
      task.step = entry.step->fingerprint.data();
      task.step_is_double = entry.step->layout.dtype == DType::kFloat64;
    }
    task.numel = entry.numel;
    task.first_chunk = first_chunks_[t];
    task.grad_is_dense = entry.grad.is_dense;
    if (entry.walk) {
      task.walk = reinterpret_cast<const Walk*>(address + walk_place);
      std::memcpy(&bytes[walk_place], entry.walk.get(), sizeof(Walk));
      walk_place += sizeof(Walk);
    }
    std::memcpy(&bytes[t * sizeof(DeviceTask)], &task, sizeof task);
  }
  return py::bytes(bytes);
}

TaskRange CudaPlan::range_of(const Part& part, uintptr_t table, void* const* grads) const {
  return {reinterpret_cast<const DeviceTask*>(table),
          part.begin,
          part.end,
          part.first_chunk,
          part.chunk_end,
          grads,
          part.dtype};
}

void CudaPlan::grad_norm(double order, uintptr_t table, uintptr_t partials, uintptr_t norm,
                         uintptr_t stream) const {
  refuse_other_threads();
  const Stream on{device_index_, reinterpret_cast<void*>(stream)};
  auto* const sums = reinterpret_cast<double*>(partials);
  for (const Part& part : parts_) {
    if (part.first_chunk == part.chunk_end) continue;
    std::vector<void*> grads;
    for (int task = part.begin; task < part.end; ++task) {
      const Entry& entry = entry_of(task);
      grads.push_back(entry.grad.tensor ? entry.grad.data : nullptr);
    }
    launch_grad_norm(range_of(part, table, grads.data()), order, sums, on);
  }
  launch_join_norms(sums, chunks_, order, reinterpret_cast<double*>(norm), on);
}

// Tasks that the host counts go together where they are at the same step; those that share memory
// with another go one after the other.
std::vector<CudaPlan::Launch> CudaPlan::launches_of(const Part& part) {
  std::vector<Launch> launches;
  const std::vector<void*> left_alone(part.end - part.begin, kLeaveAlone);
  const auto open = [&](double step) -> Launch& {
    return launches.emplace_back(Launch{step, left_alone});
  };
  for (int task = part.begin; task < part.end; ++task) {
    Entry& entry = entries_[tasks_[task]];
    const bool has_grad = static_cast<bool>(entry.grad.tensor);
    if (!has_grad && (!entry.average || entry.is_refused)) continue;
    void* grad = entry.grad.data ? entry.grad.data : kNoElements;
    double step = 0;  // of one that is only averaged, or counted on the device
    if (has_grad && entry.counts_on_host) step = advance_step(entry);
    Launch* launch = nullptr;
    if (!entry.runs_alone) {
      for (Launch& other : launches) {
        if (!has_grad || other.step == step || other.step == 0) launch = &other;
      }
    }
    if (!launch) launch = &open(step);
    if (has_grad && launch->step == 0) launch->step = step;
    launch->grads[task - part.begin] = has_grad ? grad : nullptr;
    if (entry.runs_alone) open(0);
  }
  launches.erase(std::remove_if(launches.begin(), launches.end(),
                                [&](const Launch& launch) { return launch.grads == left_alone; }),
                 launches.end());
  return launches;
}

py::list CudaPlan::run(py::tuple rules, py::tuple surroundings, uintptr_t table, uintptr_t functors,
                       uintptr_t stream) {
  refuse_other_threads();
  const std::vector<GroupRule> group_rules =
      parse_rules(rules, group_sizes_.size(), kRuleInfo, kRuleCount);
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
    check_slots(entry, kRuleInfo[group_rules[entry.group].rule].slots);
  }
  const Stream on{device_index_, reinterpret_cast<void*>(stream)};
  py::list written;
  std::vector<Extent> memory = extents_;
  for (Entry& entry : entries_) {
    if (!entry.grad.tensor) continue;
    note_written(entry, zero_grad || changes, written);
    if (zero_grad) detach_gradient(entry);
    memory.emplace_back(entry.grad.data, entry.grad.extent, 0);
  }
  const SimulatedMemory simulated(memory);
  for (const Part& part : parts_) {
    const GroupRule& group = group_rules[part.group];
    StepRule rule{group.rule, group.weight_decay, scalar_of(group.decay), group.maximize, {}, 0,
                  nullptr};
    bool on_device = false;
    for (size_t i = 0; i < group.hyperparameters.size(); ++i) {
      rule.hyperparameters[i] = scalar_of(group.hyperparameters[i]);
      on_device = on_device || rule.hyperparameters[i].address;
    }
    for (int task = part.begin; task < part.end; ++task) {
      on_device = on_device || !entry_of(task).counts_on_host;
    }
    if (on_device) rule.functors = reinterpret_cast<unsigned char*>(functors);
    for (const Launch& launch : launches_of(part)) {
      rule.step = launch.step;
      const TaskRange range = range_of(part, table, launch.grads.data());
      if (on_device) launch_advance_steps(range, rule, tail.found_inf, on);
      if (part.first_chunk < part.chunk_end) launch_optimizer_step(range, rule, tail, on);
    }
  }
  for (Entry& entry : entries_) {
    if (entry.grad.tensor) entry.is_new = false;
  }
  release();
  return written;
}

}  // namespace fastopt
