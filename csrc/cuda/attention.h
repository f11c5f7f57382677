#pragma once

#include <cstdint>

#include "core/attention_layer.h"
#include "cuda/device.h"

namespace fastopt::cuda {

constexpr int64_t kMostFeatures = 256;

// How fp32 is multiplied; 16-bit types always go to tensor cores.
enum class Float32 { kExact, kTf32 };

struct AttentionWork {
  Float32 float32;
  Stream stream;
};

// Loads the kernels of a dtype on a device, so that none is loaded inside a graph's capture.
void load_attention_kernels(DType dtype, Float32 float32, int device);

void launch_attention_forward(const AttentionForward& call, const AttentionWork& work);

// `deltas` is [batch, heads, queries], to be written; `query_sums` is [batch, heads, queries,
// features], zeros, to which blocks add the gradients of queries in no fixed order, and nobody
// writes call.query_gradient; with nullptr they are written, always the same bits. The gradient of
// a bias has a row for each query.
void launch_attention_backward(const AttentionBackward& call, float* deltas, float* query_sums,
                               const AttentionWork& work);

}  // namespace fastopt::cuda
