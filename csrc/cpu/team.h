#pragma once

#include <sched.h>

#include <atomic>
#include <cstdint>

#include "core/range.h"
#include "cpu/simd.h"

FASTOPT_BEGIN_NAMESPACE

// Where a fixed number of threads wait for each other. They spin for some microseconds, then let
// others have the core: a thread that has lost its own would otherwise be waited for in vain.
class Barrier {
 public:
  void wait(int threads) {
    if (threads <= 1) return;
    const int64_t round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < kSpins) {
#if defined(__SSE2__)
        _mm_pause();
#endif
      } else {
        sched_yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 2000;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int64_t> round_{0};
};

// One of several threads that work together.
struct Team {
  int rank, size;
  Barrier* barrier;

  void wait() const { barrier->wait(size); }

  // This thread's part of [0, count), in multiples of `grain`.
  Range share(int64_t count, int64_t grain = 1) const {
    const int64_t grains = (count + grain - 1) / grain;
    const int64_t begin = grains * rank / size * grain;
    const int64_t end = grains * (rank + 1) / size * grain;
    return {begin < count ? begin : count, end < count ? end : count};
  }
};

FASTOPT_END_NAMESPACE
