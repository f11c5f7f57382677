#include "bindings/optimizer_plan.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

using torch_access::Description;

namespace {

int64_t element_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    default:
      return 2;
  }
}

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

int64_t Layout::numel() const {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<>());
}

int64_t Layout::extent() const {
  if (numel() == 0) return 0;
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return (last + 1) * element_size(dtype);
}

bool Layout::may_overlap_itself() const {
  if (numel() == 0) return false;
  std::vector<size_t> order(sizes.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t reach = 0;  // of all dimensions with smaller strides
  for (size_t d : order) {
    if (sizes[d] == 1) continue;
    if (strides[d] <= reach) return true;
    reach += (sizes[d] - 1) * strides[d];
  }
  return false;
}

Layout layout_of(const Description& tensor) {
  Layout layout;
  const int bits = tensor.dtype.bits;
  const bool is_complex = tensor.dtype.code == torch_access::kDLComplex;
  if (tensor.dtype.code == torch_access::kDLBfloat && bits == 16) {
    layout.dtype = DType::kBFloat16;
  } else if (tensor.dtype.code == torch_access::kDLFloat && bits == 16) {
    layout.dtype = DType::kFloat16;
  } else if ((tensor.dtype.code == torch_access::kDLFloat && bits == 32) ||
             (is_complex && bits == 64)) {
    layout.dtype = DType::kFloat32;
  } else if ((tensor.dtype.code == torch_access::kDLFloat && bits == 64) ||
             (is_complex && bits == 128)) {
    layout.dtype = DType::kFloat64;
  } else {
    throw std::invalid_argument("no kernel takes this dtype");
  }
  layout.sizes.assign(tensor.sizes, tensor.sizes + tensor.dims);
  layout.strides.assign(tensor.strides, tensor.strides + tensor.dims);
  if (is_complex) {
    for (int64_t& stride : layout.strides) stride *= 2;
    layout.sizes.push_back(2);
    layout.strides.push_back(1);
  }
  return layout;
}

OptimizerPlan::OptimizerPlan(py::dict state, py::list groups) {
  for (size_t g = 0; g < groups.size(); ++g) {
    py::list records = groups[g];
    group_sizes_.push_back(static_cast<int>(records.size()));
    for (py::handle record : records) add_entry(record, static_cast<int>(g));
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

void OptimizerPlan::add_entry(py::handle record, int group) {
  auto [param, service, slots, step, is_new] =
      py::cast<std::tuple<py::object, int, py::tuple, py::object, bool>>(record);
  Entry& entry = entries_.emplace_back();
  references.append(param);
  entry.param = param;
  entry.group = group;
  entry.service = static_cast<Service>(service);
  if (entry.service != Service::kServed) return;
  entry.is_new = is_new;
  const Description tensor = described(param);
  entry.fingerprint = torch_access::Fingerprint(tensor);
  entry.layout = layout_of(tensor);
  if (static_cast<int>(entry.layout.sizes.size()) > kMaxDims) {
    throw std::invalid_argument("a parameter has too many dimensions");
  }
  for (py::handle slot : slots) {
    references.append(slot);
    const Layout& layout = entry.slots.emplace_back(slot).layout;
    if (layout.dtype != entry.layout.dtype || layout.sizes != entry.layout.sizes) {
      throw std::invalid_argument("a state tensor differs from its parameter in shape or dtype");
    }
  }
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
  struct Interval {
    uintptr_t begin, end;
    Entry* entry;
  };
  std::vector<Interval> intervals;
  const auto add = [&](Entry& entry, void* data, const Layout& layout) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (layout.numel()) {
      intervals.push_back({begin, begin + static_cast<uintptr_t>(layout.extent()), &entry});
    }
  };
  for (Entry& entry : entries_) {
    if (entry.service != Service::kServed) continue;
    add(entry, entry.fingerprint.data(), entry.layout);
    for (StateTensor& slot : entry.slots) add(entry, slot.fingerprint.data(), slot.layout);
  }
  std::sort(intervals.begin(), intervals.end(),
            [](const Interval& a, const Interval& b) { return a.begin < b.begin; });
  Interval furthest{0, 0, nullptr};
  for (const Interval& interval : intervals) {
    if (furthest.entry && interval.begin < furthest.end) {
      interval.entry->runs_alone = furthest.entry->runs_alone = true;
    }
    if (interval.end > furthest.end) furthest = interval;
  }
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
      for (const StateTensor& slot : ahead.slots) slot.handle.prefetch();
      if (ahead.step) ahead.step->handle.prefetch();
    }
    for (const StateTensor& slot : entries_[i].slots) {
      if (!slot.unchanged()) return false;
    }
    if (entries_[i].step && !entries_[i].step->unchanged()) return false;
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

// Returns why the kernels do not take the gradient, in words, or nullptr.
const char* OptimizerPlan::refuse_gradient(Entry& entry, bool unscaling) const {
  Gradient& grad = entry.grad;
  Description tensor;
  if (!torch_access::has_plain_type(grad.tensor.ptr())) {
    return "the gradient is a subclass of torch.Tensor";
  }
  if (!torch_access::describe(grad.tensor.ptr(), tensor)) {
    return "the gradient is not a strided tensor with memory of its own";
  }
  if (tensor.device_type != torch_access::kDLCPU || tensor.dtype != entry.fingerprint.dtype() ||
      !entry.fingerprint.has_sizes_of(tensor)) {
    return "the gradient differs from the parameter in device, dtype or shape";
  }
  if (torch_access::is_lazily_changed(grad.tensor.ptr(), tensor)) {
    return "the gradient is a lazily conjugated or negated view";
  }
  if (!grad.data || !std::equal(grad.strides.begin(), grad.strides.end(), tensor.strides)) {
    const Layout layout = layout_of(tensor);
    grad.strides.assign(tensor.strides, tensor.strides + tensor.dims);
    grad.lies_as_param = layout.strides == entry.layout.strides;
    grad.extent = layout.extent();
    grad.may_overlap_itself = layout.may_overlap_itself();
    plan_walk(entry, layout);
  }
  grad.data = tensor.data;
  entry.traces.grad_object = grad.tensor.ptr();
  entry.traces.grad = tensor.sizes;
  if (unscaling && grad.may_overlap_itself) return "elements of the gradient share memory";
  const char* param = static_cast<const char*>(entry.fingerprint.data());
  const char* data = static_cast<const char*>(grad.data);
  const bool is_param = data == param && grad.lies_as_param;
  if (!is_param && data < param + entry.layout.extent() && param < data + grad.extent) {
    return "the gradient shares memory with the parameter";
  }
  return nullptr;
}

// Orders the dimensions as the parameter lies in memory and joins those that all operands walk
// through without a gap. One dimension of stride 1 needs no walk.
void OptimizerPlan::plan_walk(Entry& entry, const Layout& grad) const {
  std::vector<const Layout*> operands = {&entry.layout, &grad};
  for (const StateTensor& slot : entry.slots) operands.push_back(&slot.layout);
  const std::vector<int64_t>& sizes = entry.layout.sizes;
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] != 1) order.push_back(d);
  }
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return entry.layout.strides[a] > entry.layout.strides[b];
  });
  Walk walk{};
  for (size_t d : order) {
    const int last = walk.dims - 1;
    bool joins = last >= 0;
    for (size_t k = 0; k < operands.size() && joins; ++k) {
      joins = walk.strides[k][last] == operands[k]->strides[d] * sizes[d];
    }
    const int target = joins ? last : walk.dims++;
    walk.sizes[target] = joins ? walk.sizes[last] * sizes[d] : sizes[d];
    for (size_t k = 0; k < operands.size(); ++k) walk.strides[k][target] = operands[k]->strides[d];
  }
  bool flat = walk.dims <= 1;
  for (size_t k = 0; k < operands.size() && flat; ++k) {
    flat = walk.dims == 0 || walk.strides[k][0] == 1;
  }
  entry.walk = flat ? nullptr : std::make_unique<Walk>(walk);
}

py::object OptimizerPlan::collect(py::list param_groups, py::dict state, bool unscaling) {
  refuse_other_threads();
  release();
  if (!same_groups(param_groups) || !same_state(state) || !same_state_memory()) return py::none();
  py::list refused;
  int index = 0;
  for (size_t i = 0; i < entries_.size(); ++i, ++index) {
    Entry& entry = entries_[i];
    if (i > 0 && entry.group != entries_[i - 1].group) index = 0;
    prefetch_descriptions(i + kEntriesAhead);
    if (entry.service == Service::kElsewhere) continue;
    py::object grad =
        py::reinterpret_steal<py::object>(torch_access::gradient_of(entry.param.ptr()));
    if (grad.is_none()) continue;
    if (entry.service == Service::kWithoutState || !same_memory(entry)) {
      release();
      return py::none();
    }
    entry.grad.tensor = std::move(grad);
    if (const char* reason = refuse_gradient(entry, unscaling)) {
      entry.grad.tensor = py::object();
      refused.append(py::make_tuple(entry.group, index, reason));
    }
  }
  collected_ = true;
  thread_ = PyThread_get_thread_ident();
  return refused;
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

StepTask OptimizerPlan::make_task(Entry& entry, GroupRule& rule, double unscale) {
  const double step = advance_step(entry);
  const bool wide = entry.layout.dtype == DType::kFloat64;
  if (rule.bound[wide] < 0 || rule.bound_step[wide] != step) {
    BoundRule& bound = bound_rules_.emplace_back();
    bound.rule = rule.rule;
    bound.weight_decay = rule.weight_decay;
    bound.decay = rule.decay;
    bound.maximize = rule.maximize;
    bound.unscale = unscale;
    chosen_instruction_set().optimizer->bind(bound, entry.layout.dtype, rule.hyperparameters, step);
    rule.bound[wide] = static_cast<int>(bound_rules_.size()) - 1;
    rule.bound_step[wide] = step;
  }
  StepTask task{};
  task.operands[0] = entry.fingerprint.data();
  task.operands[1] = entry.grad.data;
  for (size_t k = 0; k < entry.slots.size(); ++k)
    task.operands[2 + k] = entry.slots[k].fingerprint.data();
  task.walk = entry.walk.get();
  task.numel = entry.layout.numel();
  task.dtype = entry.layout.dtype;
  task.bound_rule = rule.bound[wide];
  return task;
}

py::list OptimizerPlan::run(py::tuple rules, double unscale, int threads) {
  refuse_other_threads();
  const OptimizerKernels& kernels = *chosen_instruction_set().optimizer;
  std::vector<GroupRule> group_rules = parse_rules(rules);
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
    if (!entry.grad.tensor) continue;
    StepTask task = make_task(entry, group_rules[entry.group], unscale);
    if (entry.runs_alone) {
      alone.push_back(task);
    } else {
      task.first_tile = tiles;
      tiles += (task.numel + kTile - 1) / kTile;
      together.push_back(task);
    }
    entry.is_new = false;
    written.append(entry.param);
    if (unscale != 1) written.append(entry.grad.tensor);
  }
  running_ = true;
  {
    py::gil_scoped_release unlocked;
    const auto step = [&](const StepTask* tasks, size_t count, int64_t tile_count) {
      if (tile_count == 0) return;
      kernels.step({tasks, static_cast<int64_t>(count), tile_count, bound_rules_.data(), threads});
    };
    step(together.data(), together.size(), tiles);
    for (const StepTask& task : alone) step(&task, 1, (task.numel + kTile - 1) / kTile);
  }
  running_ = false;
  release();
  return written;
}

}  // namespace fastopt
