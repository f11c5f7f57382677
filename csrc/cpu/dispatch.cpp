#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace fastopt {

// FASTOPT_FOR_EACH_ISA(X) expands to X(name) for each set that was built; the build defines it.
#define FASTOPT_DECLARE_KERNELS(isa)                     \
  namespace isa {                                        \
  extern const OptimizerKernels kOptimizerKernels;       \
  extern const LayerwiseKernels kLayerwiseKernels;       \
  extern const GradNormKernels kGradNormKernels;         \
  extern const LstmKernels kLstmKernels;                 \
  extern const AttentionKernels kAttentionKernels;       \
  extern const CrossEntropyKernels kCrossEntropyKernels; \
  }
FASTOPT_FOR_EACH_ISA(FASTOPT_DECLARE_KERNELS)

namespace {

bool cpu_runs(const std::string& isa) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  if (isa == "avx2") return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == "avx512") return avx512;
  if (isa == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == "baseline";
}

}  // namespace

const std::vector<InstructionSet>& instruction_sets() {
#define FASTOPT_LIST_KERNELS(isa) \
  {#isa,                          \
   cpu_runs(#isa),                \
   &isa::kOptimizerKernels,       \
   &isa::kLayerwiseKernels,       \
   &isa::kGradNormKernels,        \
   &isa::kLstmKernels,            \
   &isa::kAttentionKernels,       \
   &isa::kCrossEntropyKernels},
  static const std::vector<InstructionSet> sets = {FASTOPT_FOR_EACH_ISA(FASTOPT_LIST_KERNELS)};
  return sets;
}

const InstructionSet& chosen_instruction_set() {
  static const InstructionSet& chosen = []() -> const InstructionSet& {
    const char* wanted = std::getenv("FASTOPT_CPU_ISA");
    const InstructionSet* widest = nullptr;
    std::string available;
    for (const InstructionSet& set : instruction_sets()) {
      if (!set.runs_here) continue;
      if (wanted && wanted == std::string(set.name)) return set;
      widest = &set;
      available += (available.empty() ? "" : ", ") + std::string(set.name);
    }
    if (wanted && *wanted) {
      throw std::invalid_argument("FASTOPT_CPU_ISA must be one of " + available +
                                  " on this machine, got '" + wanted + "'");
    }
    return *widest;
  }();
  return chosen;
}

}  // namespace fastopt
