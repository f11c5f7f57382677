#pragma once

#include "core/cross_entropy.h"
#include "cuda/device.h"

namespace fastopt::cuda {

// Loads the kernels of a dtype on a device, so that none is loaded inside a graph's capture.
void load_cross_entropy_kernels(DType dtype, int device);

// A target that is no class, which nobody has read on the host, makes NaN of its row.
void launch_cross_entropy(const CrossEntropyCall& call, const Stream& stream);

}  // namespace fastopt::cuda
