#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <tuple>
#include <vector>

#include "bindings/step_plan.h"
#include "core/card_tasks.h"
#include "core/layerwise_rules.h"

namespace fastopt {

// Steps parameters in the memory of one card. Addresses of parameters and state lie in a table on
// the card, which the caller allocates and fills with table(); nothing here allocates or waits. A
// derived class launches kernels, or says which ones are to be launched.
class CardPlan : public StepPlan {
 public:
  // `device_type` as DLPack numbers it: the host where that plays the card, and there
  // `counts_here_on_host` says who counts steps. A launch takes `most_tasks` at most, or
  // `most_coded_tasks` where they are coded.
  CardPlan(pybind11::dict state, pybind11::list groups, int device_type, int device_index,
           bool counts_here_on_host, int most_tasks, int most_coded_tasks);

  // The table for a place in the card's memory, and which one it is: another one is due when this
  // number changes, after a collect() that met a gradient of another layout.
  int64_t table_bytes() const;
  pybind11::bytes table(uintptr_t address) const;
  int64_t table_version() const { return walks_version(); }

  // On the card: room for the functors of all tasks, and behind them for the Squares of all chunks,
  // of rules that are layer-wise.
  int64_t functor_bytes() const {
    return squares_offset() + chunks_ * static_cast<int64_t>(sizeof(Squares));
  }
  int64_t squares_offset() const { return static_cast<int64_t>(tasks_.size()) * kFunctorBytes; }

  int64_t chunk_count() const { return chunks_; }

 protected:
  // What the tasks of a launch have in common.
  struct Kind {
    int group;
    DType dtype;
    SlotCode slots;  // of all; kAsParameter: nothing is coded
    ParamCode param;

    bool is_coded() const { return slots != SlotCode::kAsParameter; }
    auto order() const { return std::make_tuple(group, dtype, slots, param); }
  };
  // Neighbouring tasks of one kind, as many as a launch takes.
  struct Part : Kind {
    int begin, end;
    int64_t first_chunk, chunk_end;
  };
  // Addresses, [end - begin]; nullptr: no gradient, the average only; kLeaveAlone.
  using Gradients = std::vector<void*>;
  using Launch =
      std::function<void(const Part&, const StepRule&, const DeviceTail&, const Gradients&)>;

  // Counts the host's steps of what collect() fetched, calls `launch` for one launch after the
  // other, and returns the tensors that are written and autograd may have saved. `rules` as for
  // OptimizerPlan, `tail` the fields of DeviceTail, where a number may be (address, is double).
  // `functors` has room for functor_bytes().
  pybind11::list step(pybind11::tuple rules, pybind11::tuple tail, uintptr_t functors,
                      const UpdateRuleInfo* rule_info, int rule_count, const Launch& launch);

  // Of what collect() fetched; nullptr where that is nothing.
  Gradients gradients_of(const Part& part) const;

  std::vector<Part> parts_;
  int64_t chunks_ = 0;

 private:
  struct Batch {
    Progress progress;
    Gradients grads;
  };

  static Kind kind_of(const Entry& entry);
  std::vector<Batch> batches_of(const Part& part, const StepRule& rule, const UpdateRuleInfo& info);
  const Entry& entry_of(int task) const { return entries_[tasks_[task]]; }

  std::vector<size_t> tasks_;  // entries, in the order of the table
  std::vector<int64_t> first_chunks_;
};

}  // namespace fastopt
