#include "bindings/cross_entropy_calls.h"

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace fastopt {

void cross_entropy(const CrossEntropyRows& rows, int threads) {
  const CrossEntropyCall call = cross_entropy_call(rows, Place{});
  check_targets(call);
  py::gil_scoped_release released;
  chosen_instruction_set().cross_entropy->rows(call, threads);
}

}  // namespace fastopt
