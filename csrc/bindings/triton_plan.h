#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "bindings/card_plan.h"

namespace fastopt {

// Says which of Triton's kernels are to be launched, and writes down what each of them reads.
class TritonPlan : public CardPlan {
 public:
  TritonPlan(pybind11::dict state, pybind11::list groups, int device_type, int device_index,
             bool counts_here_on_host);

  // The launches that measure what collect() fetched: (number of the dtype, place of the record,
  // chunks) each.
  pybind11::list measure(uintptr_t table);

  // Counts the steps of what collect() fetched. Returns the tensors that the launches write and
  // autograd may have saved, and the launches: (rule's name, slots, number of the dtype, place of
  // the record, tasks, or 0 where the functor is in the record, chunks, SlotCode, ParamCode) each.
  // Arguments are those of step().
  pybind11::tuple run(pybind11::tuple rules, pybind11::tuple tail, uintptr_t table,
                      uintptr_t functors);

  // The records of the last call of either, in words of eight bytes. Places count words.
  pybind11::memoryview records();

 private:
  struct Record;
  int64_t add_record(const Record& record, const Gradients& grads);
  Record record_of(const Part& part, uintptr_t table) const;

  std::vector<int64_t> words_;
};

}  // namespace fastopt
