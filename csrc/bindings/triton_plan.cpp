#include "bindings/triton_plan.h"

#include <cstring>
#include <limits>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

// What the kernels of one launch read, in words of eight bytes whose places
// backends/triton/kernels/optimizer_step.py knows, as it knows those of DeviceTask, Walk and
// StateCoding. Gradient addresses follow it.
struct TritonPlan::Record {
  struct Number {
    double value;
    const void* address;
    int64_t is_double;

    Number(const Scalar& scalar = {})
        : value(scalar.value), address(scalar.address), is_double(scalar.is_double) {}
  };

  uintptr_t tasks;
  int64_t begin, end, first_chunk;
  const void* functors = nullptr;  // of each task; nullptr: `functor` serves all
  const void* found_inf = nullptr;
  double step = 0, product = 1;  // of the rule's Progress, as far as the host counts
  int64_t maximize = 0, is_l2 = 0, changes_gradients = 0, zero_grad = 0, moves_averages = 0;
  double clip_value = 0, average_weight = 0;
  Number decay, grad_scale, hyperparameters[kMaxHyperparameters];
  unsigned char functor[kFunctorBytes] = {};
};

static_assert(sizeof(DeviceTask) == 15 * 8 && sizeof(Walk) == (1 + 7 * kMaxDims) * 8 &&
                  sizeof(StateCoding) == 10 * 8,
              "Triton's kernels know where their words are");

TritonPlan::TritonPlan(py::dict state, py::list groups, int device_type, int device_index,
                       bool counts_here_on_host)
    : CardPlan(state, groups, device_type, device_index, counts_here_on_host,
               std::numeric_limits<int>::max(), std::numeric_limits<int>::max()) {}

TritonPlan::Record TritonPlan::record_of(const Part& part, uintptr_t table) const {
  Record record;
  record.tasks = table;
  record.begin = part.begin;
  record.end = part.end;
  record.first_chunk = part.first_chunk;
  return record;
}

int64_t TritonPlan::add_record(const Record& record, const Gradients& grads) {
  static_assert(sizeof record == 50 * 8, "Triton's kernels know where the gradients are");
  const size_t place = words_.size();
  words_.resize(place + sizeof record / 8 + grads.size());
  std::memcpy(&words_[place], &record, sizeof record);
  std::memcpy(&words_[place + sizeof record / 8], grads.data(), grads.size() * 8);
  return static_cast<int64_t>(place);
}

py::list TritonPlan::measure(uintptr_t table) {
  refuse_other_threads();
  words_.clear();
  py::list launches;
  for (const Part& part : parts_) {
    if (part.first_chunk == part.chunk_end) continue;
    const int64_t place = add_record(record_of(part, table), gradients_of(part));
    launches.append(
        py::make_tuple(static_cast<int>(part.dtype), place, part.chunk_end - part.first_chunk));
  }
  return launches;
}

py::tuple TritonPlan::run(py::tuple rules, py::tuple tail, uintptr_t table, uintptr_t functors) {
  const OptimizerKernels& kernels = *chosen_instruction_set().optimizer;
  words_.clear();
  py::list launches;
  const auto add = [&](const Part& part, const StepRule& rule, const DeviceTail& tail,
                       const Gradients& grads) {
    Record record = record_of(part, table);
    record.functors = rule.functors;
    record.found_inf = tail.found_inf;
    record.step = rule.progress.step;
    record.product = rule.progress.product;
    record.maximize = rule.maximize;
    record.is_l2 = rule.weight_decay == WeightDecay::kL2;
    record.changes_gradients = tail.changes_gradients;
    record.zero_grad = tail.zero_grad;
    record.moves_averages = tail.moves_averages;
    record.clip_value = tail.clip_value;
    record.average_weight = tail.average_weight;
    record.decay = rule.decay;
    record.grad_scale = tail.grad_scale;
    double hyperparameters[kMaxHyperparameters];
    for (int i = 0; i < kMaxHyperparameters; ++i) {
      record.hyperparameters[i] = rule.hyperparameters[i];
      hyperparameters[i] = rule.hyperparameters[i].value;
    }
    if (!rule.functors) {
      BoundRule bound{};
      bound.rule = rule.rule;
      kernels.bind(bound, part.dtype, hyperparameters, rule.progress);
      std::memcpy(record.functor, bound.functor, sizeof record.functor);
    }
    const UpdateRuleInfo& info = kernels.rules[rule.rule];
    launches.append(py::make_tuple(
        info.name, info.slots, static_cast<int>(part.dtype), add_record(record, grads),
        rule.functors ? part.end - part.begin : 0, part.chunk_end - part.first_chunk,
        static_cast<int>(part.slots), static_cast<int>(part.param)));
  };
  py::list written = step(rules, tail, functors, kernels.rules, kernels.rule_count, add);
  return py::make_tuple(written, launches);
}

py::memoryview TritonPlan::records() {
  return py::memoryview::from_memory(words_.data(),
                                     static_cast<py::ssize_t>(words_.size() * sizeof(int64_t)));
}

}  // namespace fastopt
