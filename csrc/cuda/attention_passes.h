#pragma once

#include "cuda/attention.h"

namespace fastopt::cuda {

// Parts of launch_attention_backward and of load_attention_kernels.
void launch_query_gradients(const AttentionBackward& call, const float* deltas,
                            const AttentionWork& work);
void launch_bias_gradient(const AttentionBackward& call, const float* deltas,
                          const AttentionWork& work);
void load_forward_kernels(DType dtype, Float32 float32);
void load_backward_kernels(DType dtype, Float32 float32);
void load_query_kernels(DType dtype, Float32 float32);

}  // namespace fastopt::cuda
