#include "bindings/optimizer_plan.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

using torch_access::Description;

namespace {

int find_rule(const OptimizerKernels& kernels, py::handle name) {
  const char* wanted = PyUnicode_AsUTF8(name.ptr());
  if (!wanted) throw py::error_already_set();
  for (int i = 0; i < kernels.rule_count; ++i) {
    if (std::strcmp(kernels.rules[i].name, wanted) == 0) return i;
  }
  throw std::invalid_argument(std::string("no update rule is called ") + wanted);
}

PyObject* params_key() {
  static PyObject* key = PyUnicode_InternFromString("params");
  return key;
}

}  // namespace

OptimizerPlan::OptimizerPlan(py::dict state, py::list groups) {
  for (size_t g = 0; g < groups.size(); ++g) {
    py::list records = groups[g];
    group_sizes_.push_back(static_cast<int>(records.size()));
    int index = 0;
    for (py::handle record : records) add_entry(record, static_cast<int>(g), index++);
  }
  for (auto [key, value] : state) {
    StateEntry entry{key, value, {}};
    references.append(key);
    references.append(value);
    if (PyDict_Check(value.ptr())) {
      for (auto [name, item] : py::reinterpret_borrow<py::dict>(value)) {
        references.append(name);
        references.append(item);
        entry.items.emplace_back(name.ptr(), item.ptr());
      }
    }
    state_entries_.push_back(std::move(entry));
  }
  mark_shared_memory();
}

namespace {

Description described(py::handle tensor) {
  Description description;
  if (!torch_access::describe(tensor.ptr(), description) ||
      description.device_type != torch_access::kDLCPU) {
    throw std::invalid_argument("a tensor has no memory that CPU kernels can reach");
  }
  return description;
}

}  // namespace

OptimizerPlan::StateTensor::StateTensor(py::handle tensor)
    : handle(tensor), fingerprint(handle.describe()), layout(layout_of(described(tensor))) {}

void OptimizerPlan::add_entry(py::handle record, int group, int index) {
  auto [param, service, slots, step, average, is_new] =
      py::cast<std::tuple<py::object, int, py::tuple, py::object, py::object, bool>>(record);
  Entry& entry = entries_.emplace_back();
  references.append(param);
  entry.param = param;
  entry.group = group;
  entry.index = index;
  entry.service = static_cast<Service>(service);
  if (entry.service != Service::kServed) return;
  entry.is_new = is_new;
  const Description tensor = described(param);
  entry.fingerprint = torch_access::Fingerprint(tensor);
  entry.layout = layout_of(tensor);
  entry.numel = entry.layout.numel();
  if (static_cast<int>(entry.layout.sizes.size()) > kMaxDims) {
    throw std::invalid_argument("a parameter has too many dimensions");
  }
  const auto like_param = [&](StateTensor tensor) {
    const Layout& layout = tensor.layout;
    if (layout.dtype != entry.layout.dtype || layout.sizes != entry.layout.sizes) {
      throw std::invalid_argument("a state tensor differs from its parameter in shape or dtype");
    }
    return tensor;
  };
  for (py::handle slot : slots) {
    references.append(slot);
    entry.slots.push_back(like_param(StateTensor(slot)));
  }
  if (!average.is_none()) {
    references.append(average);
    entry.average = like_param(StateTensor(average));
  }
  plan_walk(entry, nullptr);
  if (step.is_none()) return;
  references.append(step);
  const Layout& counter = entry.step.emplace(step).layout;
  if (counter.numel() != 1 ||
      (counter.dtype != DType::kFloat32 && counter.dtype != DType::kFloat64)) {
    throw std::invalid_argument("a step counter is not one float");
  }
}

// Parameters may share memory with each other or with state: duplicates in a group, views of one
// buffer. Such tasks run one after the other, as a loop over the parameters would run them.
void OptimizerPlan::mark_shared_memory() {
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (entry.service != Service::kServed) continue;
    extents_.emplace_back(entry.fingerprint.data(), entry.layout.extent(), i);
    entry.for_each_tensor([&](const StateTensor& tensor) {
      extents_.emplace_back(tensor.fingerprint.data(), tensor.layout.extent(), i);
    });
  }
  sort_extents(extents_);
  for (size_t owner : sharing_owners(extents_, {})) entries_[owner].runs_alone = true;
}

bool OptimizerPlan::same_groups(py::list param_groups) const {
  if (param_groups.size() != group_sizes_.size()) return false;
  auto entry = entries_.begin();
  for (size_t g = 0; g < group_sizes_.size(); ++g) {
    PyObject* group = PyList_GET_ITEM(param_groups.ptr(), g);
    PyObject* params = PyDict_Check(group) ? PyDict_GetItem(group, params_key()) : nullptr;
    if (!params || !(PyList_Check(params) || PyTuple_Check(params))) return false;
    if (PySequence_Fast_GET_SIZE(params) != group_sizes_[g]) return false;
    for (Py_ssize_t i = 0; i < group_sizes_[g]; ++i, ++entry) {
      if (PySequence_Fast_GET_ITEM(params, i) != entry->param.ptr()) return false;
    }
  }
  return true;
}

bool OptimizerPlan::same_state(py::dict state) const {
  if (state.size() != state_entries_.size()) return false;
  PyObject *key, *value, *item;
  Py_ssize_t position = 0;
  for (const StateEntry& entry : state_entries_) {
    if (!PyDict_Next(state.ptr(), &position, &key, &value)) return false;
    if (key != entry.key.ptr() || value != entry.value.ptr()) return false;
    if (!PyDict_Check(value)) continue;
    if (PyDict_GET_SIZE(value) != static_cast<Py_ssize_t>(entry.items.size())) return false;
    Py_ssize_t inner = 0;
    for (const auto& [expected_key, expected_item] : entry.items) {
      if (!PyDict_Next(value, &inner, &key, &item)) return false;
      if (key != expected_key || item != expected_item) return false;
    }
  }
  return true;
}

// The state of a thousand parameters does not fit a cache that a training step has passed through:
// what the next entries are going to need is fetched while the present one is looked at.
constexpr size_t kEntriesAhead = 6;

bool OptimizerPlan::same_state_memory() const {
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (i + kEntriesAhead < entries_.size()) {
      const Entry& ahead = entries_[i + kEntriesAhead];
      ahead.for_each_tensor([](const StateTensor& tensor) { tensor.handle.prefetch(); });
      if (ahead.step) ahead.step->handle.prefetch();
    }
    bool unchanged = !entries_[i].step || entries_[i].step->unchanged();
    entries_[i].for_each_tensor(
        [&](const StateTensor& tensor) { unchanged = unchanged && tensor.unchanged(); });
    if (!unchanged) return false;
  }
  return true;
}

void OptimizerPlan::prefetch_descriptions(size_t index) const {
  if (index >= entries_.size()) return;
  const Entry& entry = entries_[index];
  __builtin_prefetch(entry.param.ptr());
  __builtin_prefetch(entry.traces.grad_object);
  for (const void* trace : {entry.traces.param, entry.traces.grad}) {
    if (!trace) continue;
    const char* description = static_cast<const char*>(trace);
    for (int line = -1; line <= 1; ++line) __builtin_prefetch(description + 64 * line);
  }
}

bool OptimizerPlan::same_memory(Entry& entry) const {
  Description tensor;
  if (!torch_access::describe(entry.param.ptr(), tensor)) return false;
  entry.traces.param = tensor.sizes;
  return entry.fingerprint.matches(tensor);
}

OptimizerPlan::Refusal OptimizerPlan::refuse_gradient(Entry& entry, bool writing) const {
  Gradient& grad = entry.grad;
  Description tensor;
  if (!torch_access::has_plain_type(grad.tensor.ptr())) {
    return {"the gradient is a subclass of torch.Tensor"};
  }
  if (!torch_access::describe(grad.tensor.ptr(), tensor)) {
    return {"the gradient is not a strided tensor with memory of its own"};
  }
  if (tensor.device_type != torch_access::kDLCPU || tensor.dtype != entry.fingerprint.dtype() ||
      !entry.fingerprint.has_sizes_of(tensor)) {
    return {"the gradient differs from the parameter in device, dtype or shape"};
  }
  if (torch_access::is_lazily_changed(grad.tensor.ptr(), tensor)) {
    return {"the gradient is a lazily conjugated or negated view"};
  }
  if (!grad.data || !std::equal(grad.strides.begin(), grad.strides.end(), tensor.strides)) {
    const Layout layout = layout_of(tensor);
    grad.strides.assign(tensor.strides, tensor.strides + tensor.dims);
    grad.lies_as_param = layout.strides == entry.layout.strides;
    grad.extent = layout.extent();
    grad.may_overlap_itself = layout.may_overlap_itself();
    grad.is_dense = !grad.may_overlap_itself && grad.extent == entry.numel * layout.element_size();
    plan_walk(entry, &layout);
    grad.data = nullptr;
  }
  if (grad.data != tensor.data) grad.check = 0;
  grad.data = tensor.data;
  entry.traces.grad_object = grad.tensor.ptr();
  entry.traces.grad = tensor.sizes;
  if (writing && grad.may_overlap_itself) return {"elements of the gradient share memory", true};
  const char* param = static_cast<const char*>(entry.fingerprint.data());
  const char* data = static_cast<const char*>(grad.data);
  const bool is_param = data == param && grad.lies_as_param;
  if (!is_param && data < param + entry.layout.extent() && param < data + grad.extent) {
    return {"the gradient shares memory with the parameter", true};
  }
  return {nullptr};
}

void OptimizerPlan::plan_walk(Entry& entry, const Layout* grad) const {
  std::vector<std::pair<int, const Layout*>> operands = {{kParam, &entry.layout}};
  if (grad) operands.emplace_back(kGrad, grad);
  if (entry.average) operands.emplace_back(kAverage, &entry.average->layout);
  for (size_t k = 0; k < entry.slots.size(); ++k) {
    operands.emplace_back(kFirstSlot + static_cast<int>(k), &entry.slots[k].layout);
  }
  entry.walk = walk_of(operands);
}

py::object OptimizerPlan::collect(py::list param_groups, py::dict state, bool writing) {
  refuse_other_threads();
  release();
  if (!same_groups(param_groups) || !same_state(state) || !same_state_memory()) return py::none();
  py::list refused;
  const auto refuse = [&](size_t i, Refusal refusal) {
    Entry& entry = entries_[i];
    entry.grad.tensor = py::object();
    entry.is_refused = true;
    refused.append(py::make_tuple(entry.group, entry.index, refusal.reason, refusal.shares_memory));
  };
  bool all_checked = true;
  for (size_t i = 0; i < entries_.size(); ++i) {
    Entry& entry = entries_[i];
    prefetch_descriptions(i + kEntriesAhead);
    entry.is_refused = false;
    if (entry.service == Service::kElsewhere) continue;
    py::object grad =
        py::reinterpret_steal<py::object>(torch_access::gradient_of(entry.param.ptr()));
    if (grad.is_none() && !entry.average) continue;  // an average moves without a gradient too
    if (entry.service == Service::kWithoutState || !same_memory(entry)) {
      release();
      return py::none();
    }
    if (grad.is_none()) continue;
    entry.grad.tensor = std::move(grad);
    const Refusal refusal = refuse_gradient(entry, writing);
    if (refusal.reason) {
      refuse(i, refusal);
    } else {
      all_checked = all_checked && entry.grad.check == grad_check_;
    }
  }
  if (writing && !all_checked) {
    for (size_t i : shared_gradients()) {
      if (!entries_[i].is_refused)
        refuse(i, {"the gradient shares memory with another tensor", true});
    }
  }
  collected_ = true;
  thread_ = PyThread_get_thread_ident();
  return refused;
}

// Of gradients that are going to be written, those that lie in memory of another tensor.
std::vector<size_t> OptimizerPlan::shared_gradients() {
  ++grad_check_;
  std::vector<Extent> gradients;
  gradients.reserve(entries_.size());
  for (size_t i = 0; i < entries_.size(); ++i) {
    if (!entries_[i].grad.tensor) continue;
    entries_[i].grad.check = grad_check_;
    gradients.emplace_back(entries_[i].grad.data, entries_[i].grad.extent, i);
  }
  sort_extents(gradients);
  return sharing_owners(gradients, extents_);
}

py::list OptimizerPlan::gradients() const {
  py::list result;
  for (const Entry& entry : entries_) {
    if (entry.grad.tensor) result.append(entry.grad.tensor);
  }
  return result;
}

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

// Another thread may come between collect() and run(), and while the kernels run.
void OptimizerPlan::refuse_other_threads() const {
  if (running_ || (collected_ && thread_ != PyThread_get_thread_ident())) {
    throw std::runtime_error("this optimizer is already stepping in another thread");
  }
}

void OptimizerPlan::release() {
  if (running_) return;
  collected_ = false;
  for (Entry& entry : entries_) entry.grad.tensor = py::object();
}

void OptimizerPlan::clear() {
  release();
  entries_.clear();
  state_entries_.clear();
  group_sizes_.clear();
  references = py::list();
}

std::vector<OptimizerPlan::GroupRule> OptimizerPlan::parse_rules(py::tuple rules) const {
  const OptimizerKernels& kernels = *chosen_instruction_set().optimizer;
  if (rules.size() != group_sizes_.size()) throw std::invalid_argument("one rule per group");
  std::vector<GroupRule> result;
  result.reserve(rules.size());
  for (py::handle item : rules) {
    py::tuple fields = py::reinterpret_borrow<py::tuple>(item);
    GroupRule& rule = result.emplace_back();
    rule.rule = find_rule(kernels, fields[0]);
    rule.weight_decay = static_cast<WeightDecay>(py::cast<int>(fields[1]));
    rule.decay = py::cast<double>(fields[2]);
    rule.maximize = py::cast<bool>(fields[3]);
    py::tuple values = fields[4];
    if (static_cast<int>(values.size()) != kernels.rules[rule.rule].hyperparameters) {
      throw std::invalid_argument("a rule takes another number of hyperparameters");
    }
    for (size_t i = 0; i < values.size(); ++i) {
      rule.hyperparameters[i] = py::cast<double>(values[i]);
    }
  }
  return result;
}

// torch counts in a tensor of one float; a rule without one only asks whether there was a step.
double OptimizerPlan::advance_step(const Entry& entry) const {
  if (!entry.step) return entry.is_new ? 1 : 2;
  void* counter = entry.step->fingerprint.data();
  if (entry.step->layout.dtype == DType::kFloat64) return *static_cast<double*>(counter) += 1;
  return *static_cast<float*>(counter) += 1;
}

// The rule with the numbers of the entry's step; entries at the same step share it.
void OptimizerPlan::bind_rule(GroupRule& rule, const Entry& entry) {
  const double step = advance_step(entry);
  const bool wide = entry.layout.dtype == DType::kFloat64;
  if (rule.bound[wide] >= 0 && rule.bound_step[wide] == step) return;
  BoundRule& bound = bound_rules_.emplace_back();
  bound.rule = rule.rule;
  bound.weight_decay = rule.weight_decay;
  bound.decay = rule.decay;
  bound.maximize = rule.maximize;
  chosen_instruction_set().optimizer->bind(bound, entry.layout.dtype, rule.hyperparameters, step);
  rule.bound[wide] = static_cast<int>(bound_rules_.size()) - 1;
  rule.bound_step[wide] = step;
}

StepTask OptimizerPlan::make_task(const Entry& entry, const GroupRule& rule) const {
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
  task.bound_rule = rule.bound[entry.layout.dtype == DType::kFloat64];
  return task;
}

py::list OptimizerPlan::run(py::tuple rules, py::tuple surroundings, int threads) {
  refuse_other_threads();
  const OptimizerKernels& kernels = *chosen_instruction_set().optimizer;
  std::vector<GroupRule> group_rules = parse_rules(rules);
  Tail tail;
  std::tie(tail.grad_scale, tail.clip_value, tail.zero_grad, tail.average_weight) =
      py::cast<std::tuple<double, double, bool, double>>(surroundings);
  for (const Entry& entry : entries_) {
    if (entry.grad.tensor && static_cast<int>(entry.slots.size()) !=
                                 kernels.rules[group_rules[entry.group].rule].slots) {
      throw std::invalid_argument("a rule needs another number of state tensors");
    }
  }
  bound_rules_.clear();
  std::vector<StepTask> together, alone;
  together.reserve(entries_.size());
  py::list written;
  int64_t tiles = 0;
  for (Entry& entry : entries_) {
    const bool has_grad = static_cast<bool>(entry.grad.tensor);
    if (!has_grad && (!entry.average || entry.is_refused)) continue;
    GroupRule& rule = group_rules[entry.group];
    if (has_grad) {
      bind_rule(rule, entry);
      entry.is_new = false;
      written.append(entry.param);
      if (tail.zero_grad || tail.changes_gradients()) written.append(entry.grad.tensor);
    }
    StepTask task = make_task(entry, rule);
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
