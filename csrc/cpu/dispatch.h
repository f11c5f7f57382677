#pragma once

#include <string>
#include <vector>

#include "cpu/attention.h"
#include "cpu/cross_entropy.h"
#include "cpu/grad_norm.h"
#include "cpu/layerwise_step.h"
#include "cpu/lstm.h"
#include "cpu/optimizer_step.h"

namespace fastopt {

struct InstructionSet {
  const char* name;
  bool runs_here;  // this CPU and its operating system have it
  const OptimizerKernels* optimizer;
  const LayerwiseKernels* layerwise;
  const GradNormKernels* grad_norm;
  const LstmKernels* lstm;
  const AttentionKernels* attention;
  const CrossEntropyKernels* cross_entropy;
};

// The sets that this build carries, from the plainest to the widest.
const std::vector<InstructionSet>& instruction_sets();

// The set in use: the widest that runs here, or the one that FASTOPT_CPU_ISA names. Throws
// std::invalid_argument for a name that is unknown or does not run here.
const InstructionSet& chosen_instruction_set();

}  // namespace fastopt
