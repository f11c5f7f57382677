#include "bindings/step_plan.h"

#include <pybind11/stl.h>

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
    : StateTensor(tensor, layout_of(description), 0) {
  extent = layout.extent();
}

StepPlan::StateTensor::StateTensor(py::handle tensor, Layout own_layout, int64_t element_size)
    : handle(tensor),
      fingerprint(handle.describe()),
      layout(std::move(own_layout)),
      extent(layout.extent() / layout.element_size() * element_size) {}

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

// A tensor of coded state, which lies exactly as it should.
StepPlan::StateTensor StepPlan::coded_tensor(py::handle tensor, std::vector<int64_t> sizes,
                                             std::vector<int64_t> strides,
                                             torch_access::DLDataType dtype) const {
  Description description;
  if (!torch_access::describe(tensor.ptr(), description) || !is_here(description) ||
      description.dtype != dtype || description.dims != static_cast<int>(sizes.size()) ||
      !std::equal(sizes.begin(), sizes.end(), description.sizes) ||
      !std::equal(strides.begin(), strides.end(), description.strides)) {
    throw std::invalid_argument("coded state does not lie as its parameter does");
  }
  Layout layout{DType::kFloat32, std::move(sizes), std::move(strides)};
  return StateTensor(tensor, std::move(layout), dtype.bits / 8);
}

void StepPlan::add_coding(py::handle record, py::tuple slots, Entry& entry) {
  using torch_access::DLDataType;
  auto [codes, largest, param, remainder, seed, number] =
      py::cast<std::tuple<std::vector<int>, py::tuple, int, py::object, uint64_t, int64_t>>(record);
  const Layout& layout = entry.layout;
  const int64_t elements = layout.numel();
  if (layout.dtype == DType::kFloat64 || layout.may_overlap_itself() ||
      layout.extent() != elements * layout.element_size()) {
    throw std::invalid_argument("the state of this parameter cannot be coded");
  }
  if (codes.size() != slots.size() || largest.size() != slots.size()) {
    throw std::invalid_argument("one code per state tensor");
  }
  Coding& coding = entry.coding.emplace();
  coding.param = static_cast<ParamCode>(param);
  coding.seed = seed;
  coding.number = number;
  const auto as_param = [&](py::handle tensor, DLDataType dtype) {
    references.append(tensor);
    return coded_tensor(tensor, layout.sizes, layout.strides, dtype);
  };
  for (size_t k = 0; k < codes.size(); ++k) {
    SlotCode code = static_cast<SlotCode>(codes[k]);
    if (code == SlotCode::kAsParameter) {
      if (layout.dtype == DType::kFloat16) {
        throw std::invalid_argument("state beside an fp16 parameter is fp32, bf16 or in blocks");
      }
      code = layout.dtype == DType::kFloat32 ? SlotCode::kFloat32 : SlotCode::kBFloat16;
    }
    coding.slots.push_back(code);
    coding.largest.emplace_back();
    if (code == SlotCode::kBlockwise8) {
      entry.slots.push_back(as_param(slots[k], {torch_access::kDLUInt, 8, 1}));
      references.append(largest[k]);
      coding.largest.back().emplace(coded_tensor(largest[k],
                                                 {(elements + kCodeBlock - 1) / kCodeBlock}, {1},
                                                 {torch_access::kDLFloat, 32, 1}));
    } else {
      const bool wide = code == SlotCode::kFloat32;
      entry.slots.push_back(
          as_param(slots[k], {wide ? torch_access::kDLFloat : torch_access::kDLBfloat,
                              static_cast<uint8_t>(wide ? 32 : 16), 1}));
    }
  }
  if (coding.param == ParamCode::kRounded) return;
  if (layout.dtype != DType::kBFloat16) {
    throw std::invalid_argument("only bf16 parameters have a code of their own");
  }
  if (coding.param == ParamCode::kStochastic) return;
  const bool kahan = coding.param == ParamCode::kKahan;
  coding.remainder.emplace(
      as_param(remainder, {kahan ? torch_access::kDLBfloat : torch_access::kDLInt, 16, 1}));
}

StateCoding StepPlan::Coding::at_step(int64_t step) const {
  StateCoding result{};
  for (size_t k = 0; k < slots.size(); ++k) {
    result.slots[k] = slots[k];
    if (largest[k]) result.largest[k] = static_cast<float*>(largest[k]->fingerprint.data());
  }
  result.param = param;
  if (remainder) result.remainder = remainder->fingerprint.data();
  result.seed = seed;
  result.number = number;
  result.step = step;
  return result;
}

void StepPlan::add_entry(py::handle record, int group, int index) {
  auto [param, service, slots, step, product, average, is_new, coding] = py::cast<
      std::tuple<py::object, int, py::tuple, py::object, py::object, py::object, bool, py::object>>(
      record);
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
  if (!coding.is_none()) {
    add_coding(coding, slots, entry);
  } else {
    for (py::handle slot : slots) {
      references.append(slot);
      entry.slots.push_back(state_tensor(slot, entry));
    }
  }
  if (!average.is_none()) {
    references.append(average);
    entry.average = state_tensor(average, entry);
  }
  plan_walk(entry, nullptr);
  entry.step = counter_tensor(step);
  entry.product = counter_tensor(product);
}

std::optional<StepPlan::CounterTensor> StepPlan::counter_tensor(py::handle tensor) {
  if (tensor.is_none()) return std::nullopt;
  references.append(tensor);
  Description description;
  if (!torch_access::describe(tensor.ptr(), description) ||
      !(is_here(description) || description.device_type == torch_access::kDLCPU)) {
    throw std::invalid_argument("a counter has no memory on the host or the device");
  }
  CounterTensor result(tensor, description);
  result.is_on_host = counts_here_on_host_ || !is_here(description);
  if (result.layout.numel() != 1) throw std::invalid_argument("a counter is not one number");
  return result;
}

// Parameters may share memory with each other or with state: duplicates in a group, views of one
// buffer. Such tasks run one after the other, as a loop over the parameters would run them.
void StepPlan::mark_shared_memory() {
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (entry.service != Service::kServed) continue;
    extents_.emplace_back(entry.fingerprint.data(), entry.layout.extent(), i);
    entry.for_each_tensor([&](const StateTensor& tensor) {
      extents_.emplace_back(tensor.fingerprint.data(), tensor.extent, i);
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
      ahead.for_each_counter([](const StateTensor& counter) { counter.handle.prefetch(); });
    }
    bool unchanged = true;
    const auto compare = [&](const StateTensor& tensor) {
      unchanged = unchanged && tensor.unchanged();
    };
    entries_[i].for_each_counter(compare);
    entries_[i].for_each_tensor(compare);
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
  // Coded state lies as the parameter does, which is walked in the order of its memory.
  for (size_t k = 0; k < entry.slots.size() && !entry.coding; ++k) {
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

// Without a counter nobody asks for more than whether there was a step before.
Progress StepPlan::advance_counters(const Entry& entry, const UpdateRuleInfo& rule,
                                    const double* hyperparameters) const {
  Progress progress;
  if (!entry.step) {
    progress.step = entry.is_new ? 1 : 2;
  } else if (entry.step->is_on_host) {
    progress.step = advance(entry.step->counter(), 1, 1);
  }
  if (rule.factor && entry.product->is_on_host) {
    progress.product =
        advance(entry.product->counter(), rule.factor(hyperparameters, progress.step), 0);
  }
  return progress;
}

void StepPlan::check_state(const Entry& entry, const UpdateRuleInfo& rule) const {
  if (!entry.grad.tensor) return;
  if (static_cast<int>(entry.slots.size()) != rule.slots) {
    throw std::invalid_argument("a rule needs another number of state tensors");
  }
  if (rule.factor && !entry.product) throw std::invalid_argument("a rule needs a product");
  if (entry.coding && !rule.takes_codes) {
    throw std::invalid_argument("a rule does not know the codes that state is stored in");
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
