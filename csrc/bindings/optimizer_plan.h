#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "bindings/torch_access.h"
#include "cpu/optimizer_step.h"

namespace fastopt {

// Sizes and strides in elements of the real dtype: a complex tensor gets a last dimension of 2.
struct Layout {
  DType dtype;
  std::vector<int64_t> sizes, strides;

  int64_t numel() const;
  // Bytes from the first element to the end of the last.
  int64_t extent() const;
  // True where two indices may mean one address; never false where they do.
  bool may_overlap_itself() const;
};

// Throws std::invalid_argument for a dtype that no kernel takes.
Layout layout_of(const torch_access::Description& tensor);

enum class Service {
  kElsewhere,     // another backend steps the parameter
  kServed,        // the plan does
  kWithoutState,  // it would, but the parameter has had no gradient and therefore has no state yet
};

// What stays the same from step to step: where the parameters and their state are. Each step
// compares it with the optimizer, fetches the gradients, and runs the kernels.
class OptimizerPlan {
 public:
  // `state` is optimizer.state. `groups` has a list per parameter group and in it for each
  // parameter (param, Service, slot tensors, step tensor or None, is_new); the last three count
  // where served.
  OptimizerPlan(pybind11::dict state, pybind11::list groups);
  ~OptimizerPlan() { release(); }

  // Fetches the gradients. None: the plan no longer describes the optimizer, make a new one.
  // Otherwise (group, index, reason) for each gradient that the kernels do not take; the others
  // wait for run() or release(). With `unscaling`, gradients are to be written.
  pybind11::object collect(pybind11::list param_groups, pybind11::dict state, bool unscaling);

  // Steps what collect() fetched and returns the tensors that it wrote and autograd may have saved.
  // `rules` has for each group (rule's name, weight decay kind, decay, maximize, hyperparameters).
  pybind11::list run(pybind11::tuple rules, double unscale, int threads);

  // Drops what collect() fetched.
  void release();

  // Forgets everything: for the garbage collector.
  void clear();

  // For Python's garbage collector: everything that the plan refers to.
  pybind11::list references;

 private:
  struct StateTensor {
    explicit StateTensor(pybind11::handle tensor);
    bool unchanged() const { return fingerprint.matches(handle.describe()); }

    torch_access::TensorHandle handle;
    torch_access::Fingerprint fingerprint;
    Layout layout;
  };
  struct Gradient {
    pybind11::object tensor;  // empty between steps
    void* data = nullptr;
    std::vector<int64_t> strides;  // as torch has them
    bool lies_as_param = false;
    int64_t extent = 0;
    bool may_overlap_itself = false;
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
    int group = 0;
    Service service = Service::kElsewhere;
    bool is_new = false;      // its first step: there was no state before
    bool runs_alone = false;  // shares memory with another
    torch_access::Fingerprint fingerprint;
    Layout layout;
    std::vector<StateTensor> slots;
    std::optional<StateTensor> step;
    Gradient grad;
    std::unique_ptr<Walk> walk;  // of parameter, gradient and slots; none: all lie alike
  };
  struct StateEntry {
    pybind11::handle key, value;
    std::vector<std::pair<PyObject*, PyObject*>> items;  // of the inner dict, in its order
  };
  struct GroupRule {
    int rule;
    WeightDecay weight_decay;
    double decay;
    bool maximize;
    double hyperparameters[kMaxHyperparameters];
    int bound[2] = {-1, -1};  // the last rule bound, by arithmetic type: fp32, fp64
    double bound_step[2] = {0, 0};
  };

  void refuse_other_threads() const;
  void add_entry(pybind11::handle record, int group);
  void mark_shared_memory();
  bool same_groups(pybind11::list param_groups) const;
  bool same_state(pybind11::dict state) const;
  bool same_state_memory() const;
  bool same_memory(Entry& entry) const;
  void prefetch_descriptions(size_t index) const;
  const char* refuse_gradient(Entry& entry, bool unscaling) const;
  void plan_walk(Entry& entry, const Layout& grad) const;
  double advance_step(const Entry& entry) const;
  std::vector<GroupRule> parse_rules(pybind11::tuple rules) const;
  StepTask make_task(Entry& entry, GroupRule& rule, double unscale);

  std::vector<Entry> entries_;
  std::vector<int> group_sizes_;
  std::vector<StateEntry> state_entries_;
  bool collected_ = false;    // collect() succeeded, and run() or release() is still to come
  bool running_ = false;      // the kernels run
  unsigned long thread_ = 0;  // that collects and runs
  std::vector<BoundRule> bound_rules_;
};

}  // namespace fastopt
