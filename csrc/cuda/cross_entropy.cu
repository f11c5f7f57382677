// A block takes a row of logits: one walk gathers its sums, a second one writes its gradients.

#include <cmath>

#include "core/with_storage.h"
#include "cuda/cross_entropy.h"
#include "cuda/vector_access.cuh"

namespace fastopt::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

template <class T>
__device__ RowSums<T> joined_warp(RowSums<T> sums) {
  for (int distance = 16; distance > 0; distance /= 2) {
    RowSums<T> other;
    other.largest = __shfl_xor_sync(0xFFFFFFFFu, sums.largest, distance);
    other.exponentials = __shfl_xor_sync(0xFFFFFFFFu, sums.exponentials, distance);
    other.shares = __shfl_xor_sync(0xFFFFFFFFu, sums.shares, distance);
    other.scores = __shfl_xor_sync(0xFFFFFFFFu, sums.scores, distance);
    sums = sums.joined(other);
  }
  return sums;
}

// Of all threads, in every thread. Called by a whole block.
template <class T>
__device__ RowSums<T> joined_block(RowSums<T> sums) {
  __shared__ T of_warps[kWarps][4];
  sums = joined_warp(sums);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) {
    of_warps[warp][0] = sums.largest;
    of_warps[warp][1] = sums.exponentials;
    of_warps[warp][2] = sums.shares;
    of_warps[warp][3] = sums.scores;
  }
  __syncthreads();
  RowSums<T> result;
  for (int other = 0; other < kWarps; ++other) {
    RowSums<T> theirs;
    theirs.largest = of_warps[other][0];
    theirs.exponentials = of_warps[other][1];
    theirs.shares = of_warps[other][2];
    theirs.scores = of_warps[other][3];
    result = result.joined(theirs);
  }
  return result;
}

template <Shares kShares, class T>
__device__ T share_of(const CrossEntropyRule<T>& rule, const T* probabilities, int64_t c) {
  if (kShares == Shares::kNone) return T(0);
  T share = rule.uniform;
  if (kShares == Shares::kGiven) {
    if (probabilities) share += probabilities[c] * rule.certain;
    if (rule.class_weights) share *= rule.class_weights[c];
  }
  return share;
}

template <class Storage, Shares kShares>
__global__ void __launch_bounds__(kThreads) cross_entropy_kernel(const CrossEntropyCall call) {
  using T = ComputeType<Storage>;
  constexpr int kN = kLanes<Storage>;
  const CrossEntropyRule<T> rule(call);
  const int64_t row = blockIdx.x, classes = call.classes;
  Storage* logits = static_cast<Storage*>(call.logits) + row * call.row_stride;
  T* const loss = static_cast<T*>(call.losses) + row;
  T* const logsumexp = static_cast<T*>(call.logsumexps) + row;
  const T* probabilities = rule.probabilities ? rule.probabilities + row * classes : nullptr;
  const int64_t target = call.targets ? call.targets[row] : -1;
  if (call.targets && target == call.ignore_index) {
    if (threadIdx.x == 0) *loss = *logsumexp = 0;
    if (!call.loss_scale) return;
    for_each_pack(logits, 0, classes, [&](int64_t first, LaneRange range) {
      const T zeros[kN] = {};
      store_lanes<kN>(logits + first, true, range, zeros);
    });
    return;
  }
  T certain = 0, target_logit = 0;
  if (call.targets) {
    const bool is_class = target >= 0 && target < classes;
    certain = is_class ? rule.certain_share(target) : static_cast<T>(NAN);
    target_logit = is_class ? load(logits + target) : static_cast<T>(NAN);
  }
  const T shift = score_shift(rule.capped(static_cast<T>(load(logits))));

  RowSums<T> sums;
  for_each_pack(logits, 0, classes, [&](int64_t first, LaneRange range) {
    T scores[kN];
    load_lanes<kN>(logits + first, true, range, scores);
    T largest = sums.largest;
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) {
      if (lane < range.begin || lane >= range.end) continue;
      scores[lane] = rule.capped(scores[lane]);
      largest = maximum(largest, scores[lane]);
    }
    if (!(largest <= sums.largest)) sums.raise(largest);
    const bool is_seen = largest != -NumbersOf<T>::kInfinity;
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) {
      if (lane < range.begin || lane >= range.end) continue;
      if (is_seen) sums.exponentials += exponential<T>(scores[lane] - sums.largest);
      if (kShares != Shares::kNone) {
        const T share = share_of<kShares>(rule, probabilities, first + lane);
        sums.shares += share;
        sums.scores += (scores[lane] - shift) * share;
      }
    }
  });
  sums = joined_block(sums);

  const T loss_scale = call.loss_scale ? static_cast<const T*>(call.loss_scale)[row] : T(0);
  const T z_scale = call.z_scale ? static_cast<const T*>(call.z_scale)[row] : T(0);
  const RowResult<T> result(sums, shift, certain, rule.capped(target_logit), loss_scale, z_scale);
  if (threadIdx.x == 0) {
    *loss = result.loss;
    *logsumexp = result.logsumexp;
  }
  if (!call.loss_scale) return;
  for_each_pack(logits, 0, classes, [&](int64_t first, LaneRange range) {
    T values[kN];
    load_lanes<kN>(logits + first, true, range, values);
#pragma unroll
    for (int lane = 0; lane < kN; ++lane) {
      if (lane < range.begin || lane >= range.end) continue;
      T share = share_of<kShares>(rule, probabilities, first + lane);
      if (first + lane == target) share += certain;
      values[lane] = result.gradient(rule, values[lane], share * loss_scale);
    }
    store_lanes<kN>(logits + first, true, range, values);
  });
}

template <class Storage>
auto kernel_for(Shares shares) {
  switch (shares) {
    case Shares::kNone:
      return cross_entropy_kernel<Storage, Shares::kNone>;
    case Shares::kUniform:
      return cross_entropy_kernel<Storage, Shares::kUniform>;
    default:
      return cross_entropy_kernel<Storage, Shares::kGiven>;
  }
}

}  // namespace

void load_cross_entropy_kernels(DType dtype, int device) {
#if !defined(FASTOPT_HOST_SIM)
  const DeviceGuard guard(device);
#else
  (void)device;
#endif
  with_storage(dtype, [](auto storage) {
    for (Shares shares : {Shares::kNone, Shares::kUniform, Shares::kGiven}) {
      load_kernel(kernel_for<decltype(storage)>(shares));
    }
  });
}

void launch_cross_entropy(const CrossEntropyCall& call, const Stream& stream) {
  with_storage(call.dtype, [&](auto storage) {
    launch("cross_entropy_kernel", stream, {call.rows, kThreads},
           kernel_for<decltype(storage)>(shares_of(call)), call);
  });
}

}  // namespace fastopt::cuda
