#pragma once

#include "bindings/checked_tensor.h"

namespace fastopt {

// Where the tensors of this module's kernels lie: on a card, or on the host in the simulator.
inline Place cuda_place(int device_index) {
#if defined(FASTOPT_HOST_SIM)
  return {torch_access::kDLCPU, device_index};
#else
  return {torch_access::kDLCUDA, device_index};
#endif
}

}  // namespace fastopt
