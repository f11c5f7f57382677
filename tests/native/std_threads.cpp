// csrc/cpu/threads.h on std::thread, whose starts and joins ThreadSanitizer understands: it reports
// false races through libgomp, which is not instrumented.

#include <thread>
#include <vector>

#include "cpu/threads.h"

namespace fastopt {

void parallel_team(int threads, void (*body)(void* context, int rank, int size), void* context) {
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) others.emplace_back(body, context, rank, threads);
  body(context, 0, threads < 1 ? 1 : threads);
  for (std::thread& other : others) other.join();
}

void parallel_run(int threads, void (*body)(void* context), void* context) {
  std::vector<std::thread> others;
  for (int rank = 1; rank < threads; ++rank) others.emplace_back(body, context);
  body(context);
  for (std::thread& other : others) other.join();
}

void install_fork_guard() {}

}  // namespace fastopt
