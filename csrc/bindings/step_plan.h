#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/layout.h"
#include "bindings/torch_access.h"
#include "core/counter.h"
#include "core/operands.h"
#include "core/state_codes.h"

namespace fastopt {

// As DLPack numbers it.
struct Device {
  int32_t type, index;
};

enum class Service {
  kElsewhere,     // another backend steps the parameter
  kServed,        // the plan does
  kWithoutState,  // it would, but the parameter has had no gradient and therefore has no state yet
};

// What stays the same from step to step: where the parameters and their state are. Each step
// compares it with the optimizer and fetches the gradients; a derived class runs its kernels.
class StepPlan {
 public:
  // `state` is optimizer.state. `groups` has a list per parameter group and in it for each
  // parameter (param, Service, slot tensors, step tensor or None, product tensor or None, average
  // or None, is_new, coding); what follows the service counts where served. Counters elsewhere than
  // on the device are the host's to advance; `counts_here_on_host`: those on the device too,
  // because it is the host. A coding is None, or (SlotCode of each slot, the largest magnitudes of
  // its blocks or None, ParamCode, remainder or None, seed, number).
  StepPlan(pybind11::dict state, pybind11::list groups, Device device, bool counts_here_on_host);
  ~StepPlan() { release(); }

  // Fetches the gradients. None: the plan no longer describes the optimizer, make a new one.
  // Otherwise (group, index, reason, shares memory) for each gradient that the kernels do not take;
  // the others wait for run() or release(). With `writing`, gradients are to be written.
  pybind11::object collect(pybind11::list param_groups, pybind11::dict state, bool writing);

  // What collect() fetched.
  pybind11::list gradients() const;

  // Drops what collect() fetched.
  void release();

  // Forgets everything: for the garbage collector.
  void clear();

  // For Python's garbage collector: everything that the plan refers to.
  pybind11::list references;

 protected:
  struct StateTensor {
    StateTensor(pybind11::handle tensor, const torch_access::Description& description);
    StateTensor(pybind11::handle tensor, Layout layout, int64_t element_size);
    bool unchanged() const { return fingerprint.matches(handle.describe()); }

    torch_access::TensorHandle handle;
    torch_access::Fingerprint fingerprint;
    Layout layout;
    int64_t extent;  // bytes
  };
  // State that is not stored in the parameter's dtype.
  struct Coding {
    std::vector<SlotCode> slots;
    std::vector<std::optional<StateTensor>> largest;
    ParamCode param;
    std::optional<StateTensor> remainder;
    uint64_t seed;
    int64_t number;

    StateCoding at_step(int64_t step) const;
  };
  struct CounterTensor : StateTensor {
    using StateTensor::StateTensor;
    Counter counter() const { return {fingerprint.data(), layout.dtype}; }

    bool is_on_host = true;  // and the host's to advance
  };
  struct Gradient {
    pybind11::object tensor;  // empty between steps
    void* data = nullptr;
    std::vector<int64_t> strides;  // as torch has them
    bool is_planned = false;       // what follows is that of `strides`
    bool lies_as_param = false;
    bool is_dense = false;
    int64_t extent = 0;
    bool may_overlap_itself = false;
    int64_t check = 0;  // the last one of shared_gradients() that saw it where it is
  };
  // Where a tensor's description was last step. Only ever prefetched: it may have moved.
  struct Traces {
    const void* param = nullptr;
    const void* grad_object = nullptr;
    const void* grad = nullptr;
  };
  struct Entry {
    pybind11::handle param;
    Traces traces;
    int group = 0, index = 0;
    Service service = Service::kElsewhere;
    bool is_new = false;      // its first step: there was no state before
    bool is_refused = false;  // another backend steps it this time
    bool runs_alone = false;  // shares memory with another
    torch_access::Fingerprint fingerprint;
    Layout layout;
    int64_t numel = 0;
    std::vector<StateTensor> slots;
    std::optional<StateTensor> average;
    std::optional<CounterTensor> step, product;
    std::optional<Coding> coding;
    Gradient grad;
    std::unique_ptr<Walk> walk;  // of all operands; none: all are dense and lie alike

    bool counts_on_host() const {
      return (!step || step->is_on_host) && (!product || product->is_on_host);
    }
    // But for the counters.
    template <class Visitor>
    void for_each_tensor(const Visitor& visit) const {
      for (const StateTensor& slot : slots) visit(slot);
      if (average) visit(*average);
      if (!coding) return;
      for (const auto& largest : coding->largest) {
        if (largest) visit(*largest);
      }
      if (coding->remainder) visit(*coding->remainder);
    }
    template <class Visitor>
    void for_each_counter(const Visitor& visit) const {
      if (step) visit(*step);
      if (product) visit(*product);
    }
  };
  struct Refusal {
    const char* reason;  // in words; nullptr: none
    bool shares_memory = false;
  };
  struct StateEntry {
    pybind11::handle key, value;
    std::vector<std::pair<PyObject*, PyObject*>> items;  // of the inner dict, in its order
  };
  void refuse_other_threads() const;
  // Changes with any walk.
  int64_t walks_version() const { return walks_version_; }
  // Advances the counters that are on the host; what they are then. Those elsewhere are left out.
  Progress advance_counters(const Entry& entry, const UpdateRuleInfo& rule,
                            const double* hyperparameters) const;
  // Refuses rules whose state is not that of the entries.
  void check_state(const Entry& entry, const UpdateRuleInfo& rule) const;
  // What a step writes and autograd may have saved.
  void note_written(const Entry& entry, bool gradients, pybind11::list written) const;
  // A gradient that is to be zeros leaves the graph that made it, as in torch's zero_grad.
  void detach_gradient(const Entry& entry) const;

  std::vector<Entry> entries_;
  std::vector<int> group_sizes_;
  std::vector<Extent> extents_;  // of parameters and state, sorted; owners are entries
  bool running_ = false;         // the kernels run

 private:
  void add_entry(pybind11::handle record, int group, int index);
  void mark_shared_memory();
  bool same_groups(pybind11::list param_groups) const;
  bool same_state(pybind11::dict state) const;
  bool same_state_memory() const;
  bool same_memory(Entry& entry) const;
  void prefetch_descriptions(size_t index) const;
  Refusal refuse_gradient(Entry& entry, bool writing);
  std::vector<size_t> shared_gradients();
  void plan_walk(Entry& entry, const Layout* grad);
  bool is_here(const torch_access::Description& tensor) const;
  StateTensor state_tensor(pybind11::handle tensor, const Entry& entry) const;
  StateTensor coded_tensor(pybind11::handle tensor, std::vector<int64_t> sizes,
                           std::vector<int64_t> strides, torch_access::DLDataType dtype) const;
  void add_coding(pybind11::handle coding, pybind11::tuple slots, Entry& entry);
  std::optional<CounterTensor> counter_tensor(pybind11::handle tensor);

  Device device_;
  bool counts_here_on_host_;
  std::vector<StateEntry> state_entries_;
  int64_t grad_check_ = 1;
  int64_t walks_version_ = 0;
  bool collected_ = false;    // collect() succeeded, and run() or release() is still to come
  unsigned long thread_ = 0;  // that collects and runs
};

}  // namespace fastopt
