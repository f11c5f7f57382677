#pragma once

#include <atomic>
#include <cstdint>

#include "core/platform.h"
#include "cpu/threads.h"

FASTOPT_BEGIN_NAMESPACE

// Calls body(begin, end) on `threads` threads for portions of [0, count) until all are done.
// Threads take portions as they come, so that one that loses its core does not hold up the rest.
template <class Body>
void for_each_portion(int64_t threads, int64_t count, const Body& body) {
  if (threads <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  constexpr int64_t kPortionsPerThread = 8;
  struct Shared {
    const Body& body;
    int64_t count, grain;
    std::atomic<int64_t> next;
  } shared{body, count, count / (threads * kPortionsPerThread) + 1, {0}};
  const auto take_portions = [](void* context) {
    Shared& mine = *static_cast<Shared*>(context);
    for (;;) {
      const int64_t begin = mine.next.fetch_add(mine.grain, std::memory_order_relaxed);
      if (begin >= mine.count) return;
      const int64_t end = begin + mine.grain;
      mine.body(begin, end < mine.count ? end : mine.count);
    }
  };
  parallel_run(static_cast<int>(threads), take_portions, &shared);
}

// How many threads are worth waking: waking one costs about as much as 32 tiles of AdamW.
HOST_DEVICE int64_t useful_threads(int64_t tiles, int threads) {
  constexpr int64_t kTilesPerThread = 32;
  const int64_t useful = tiles / kTilesPerThread;
  return useful < threads ? useful : threads;
}

FASTOPT_END_NAMESPACE
