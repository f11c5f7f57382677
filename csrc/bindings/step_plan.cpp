#include "bindings/step_plan.h"

#include <algorithm>
#include <stdexcept>
#include <tuple>

namespace py = pybind11;

namespace fastopt {

using torch_access::Description;

namespace {

PyObject* params_key() {
  static PyObject* key = PyUnicode_InternFromString("params");
  return key;
}

}  // namespace

StepPlan::StepPlan(py::dict state, py::list groups, Device device, bool counts_here_on_host)
    : device_(device), counts_here_on_host_(counts_here_on_host) {
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

StepPlan::StateTensor::StateTensor(py::handle tensor, const Description& description)
    : handle(tensor), fingerprint(handle.describe()), layout(layout_of(description)) {}

bool StepPlan::is_here(const Description& tensor) const {
  return tensor.device_type == device_.type && tensor.device_index == device_.index;
}

// A tensor of the parameter's shape and dtype, on its device.
StepPlan::StateTensor StepPlan::state_tensor(py::handle tensor, const Entry& entry) const {
  Description description;
  if (!torch_access::describe(tensor.ptr(), description) || !is_here(description)) {
    throw std::invalid_argument("a state tensor has no memory on the parameter's device");
  }
  StateTensor result(tensor, description);
  if (result.layout.dtype != entry.layout.dtype || result.layout.sizes != entry.layout.sizes) {
    throw std::invalid_argument("a state tensor differs from its parameter in shape or dtype");
  }
  return result;
}

void StepPlan::add_entry(py::handle record, int group, int index) {
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
  Description tensor;
  if (!torch_access::describe(param.ptr(), tensor) || !is_here(tensor)) {
    throw std::invalid_argument("a parameter has no memory on the plan's device");
  }
  entry.fingerprint = torch_access::Fingerprint(tensor);
  entry.layout = layout_of(tensor);
  entry.numel = entry.layout.numel();
  if (static_cast<int>(entry.layout.sizes.size()) > kMaxDims) {
    throw std::invalid_argument("a parameter has too many dimensions");
  }
  for (py::handle slot : slots) {
    references.append(slot);
    entry.slots.push_back(state_tensor(slot, entry));
  }
  if (!average.is_none()) {
    references.append(average);
    entry.average = state_tensor(average, entry);
  }
  plan_walk(entry, nullptr);
  if (step.is_none()) return;
  references.append(step);
  if (!torch_access::describe(step.ptr(), tensor) ||
      !(is_here(tensor) || tensor.device_type == torch_access::kDLCPU)) {
    throw std::invalid_argument("a step counter has no memory on the host or the device");
  }
  entry.counts_on_host = counts_here_on_host_ || !is_here(tensor);
  const Layout& counter = entry.step.emplace(step, tensor).layout;
  if (counter.numel() != 1 ||
      (counter.dtype != DType::kFloat32 && counter.dtype != DType::kFloat64)) {
    throw std::invalid_argument("a step counter is not one float");
  }
}

// Parameters may share memory with each other or with state: duplicates in a group, views of one
// buffer. Such tasks run one after the other, as a loop over the parameters would run them.
void StepPlan::mark_shared_memory() {
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

bool StepPlan::same_groups(py::list param_groups) const {
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

bool StepPlan::same_state(py::dict state) const {
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

bool StepPlan::same_state_memory() const {
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

void StepPlan::prefetch_descriptions(size_t index) const {
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

bool StepPlan::same_memory(Entry& entry) const {
  Description tensor;
  if (!torch_access::describe(entry.param.ptr(), tensor)) return false;
  entry.traces.param = tensor.sizes;
  return entry.fingerprint.matches(tensor);
}

StepPlan::Refusal StepPlan::refuse_gradient(Entry& entry, bool writing) {
  Gradient& grad = entry.grad;
  Description tensor;
  if (!torch_access::has_plain_type(grad.tensor.ptr())) {
    return {"the gradient is a subclass of torch.Tensor"};
  }
  if (!torch_access::describe(grad.tensor.ptr(), tensor)) {
    return {"the gradient is not a strided tensor with memory of its own"};
  }
  if (!is_here(tensor) || tensor.dtype != entry.fingerprint.dtype() ||
      !entry.fingerprint.has_sizes_of(tensor)) {
    return {"the gradient differs from the parameter in device, dtype or shape"};
  }
  if (torch_access::is_lazily_changed(grad.tensor.ptr(), tensor)) {
    return {"the gradient is a lazily conjugated or negated view"};
  }
  if (!grad.is_planned || !std::equal(grad.strides.begin(), grad.strides.end(), tensor.strides)) {
    const Layout layout = layout_of(tensor);
    grad.strides.assign(tensor.strides, tensor.strides + tensor.dims);
    grad.lies_as_param = layout.strides == entry.layout.strides;
    grad.extent = layout.extent();
    grad.may_overlap_itself = layout.may_overlap_itself();
    grad.is_dense = !grad.may_overlap_itself && grad.extent == entry.numel * layout.element_size();
    plan_walk(entry, &layout);
    grad.is_planned = true;
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

void StepPlan::plan_walk(Entry& entry, const Layout* grad) {
  std::vector<std::pair<int, const Layout*>> operands = {{kParam, &entry.layout}};
  if (grad) operands.emplace_back(kGrad, grad);
  if (entry.average) operands.emplace_back(kAverage, &entry.average->layout);
  for (size_t k = 0; k < entry.slots.size(); ++k) {
    operands.emplace_back(kFirstSlot + static_cast<int>(k), &entry.slots[k].layout);
  }
  const bool was_flat = !entry.walk;
  entry.walk = walk_of(operands);
  if (!was_flat || entry.walk) ++walks_version_;
}

py::object StepPlan::collect(py::list param_groups, py::dict state, bool writing) {
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
std::vector<size_t> StepPlan::shared_gradients() {
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

py::list StepPlan::gradients() const {
  py::list result;
  for (const Entry& entry : entries_) {
    if (entry.grad.tensor) result.append(entry.grad.tensor);
  }
  return result;
}

// Another thread may come between collect() and run(), and while the kernels run.
void StepPlan::refuse_other_threads() const {
  if (running_ || (collected_ && thread_ != PyThread_get_thread_ident())) {
    throw std::runtime_error("this optimizer is already stepping in another thread");
  }
}

void StepPlan::release() {
  if (running_) return;
  collected_ = false;
  for (Entry& entry : entries_) entry.grad.tensor = py::object();
}

void StepPlan::clear() {
  release();
  entries_.clear();
  state_entries_.clear();
  group_sizes_.clear();
  references = py::list();
}

// torch counts in a tensor of one float; a rule without one only asks whether there was a step.
double StepPlan::advance_step(const Entry& entry) const {
  if (!entry.step) return entry.is_new ? 1 : 2;
  void* counter = entry.step->fingerprint.data();
  if (entry.step->layout.dtype == DType::kFloat64) return *static_cast<double*>(counter) += 1;
  return *static_cast<float*>(counter) += 1;
}

void StepPlan::check_slots(const Entry& entry, int slots) const {
  if (entry.grad.tensor && static_cast<int>(entry.slots.size()) != slots) {
    throw std::invalid_argument("a rule needs another number of state tensors");
  }
}

void StepPlan::detach_gradient(const Entry& entry) const {
  if (torch_access::requires_grad(entry.grad.tensor.ptr())) entry.grad.tensor.attr("detach_")();
}

void StepPlan::note_written(const Entry& entry, bool gradients, py::list written) const {
  written.append(entry.param);
  if (gradients) written.append(entry.grad.tensor);
}

}  // namespace fastopt
