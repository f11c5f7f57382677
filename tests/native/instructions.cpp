// Makes every call of kernel_calls.h once on one thread, under callgrind, which dumps how many
// instructions each of them took.

#include <valgrind/callgrind.h>

#include "kernel_calls.h"

using namespace fastopt;

int main() {
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.runs_here) continue;
    for (const KernelCase& one : kernel_cases()) {
      KernelCall call;
      one.prepare(call);
      CALLGRIND_START_INSTRUMENTATION;
      call.run(set, 1);
      CALLGRIND_STOP_INSTRUMENTATION;
      const std::string name = std::string(set.name) + ": " + one.name;
      CALLGRIND_DUMP_STATS_AT(name.c_str());
    }
  }
}
