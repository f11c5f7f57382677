#include "cpu/threads.h"

#include <omp.h>
#include <pthread.h>

namespace fastopt {

namespace {
bool forked_child = false;
}

void install_fork_guard() {
  pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
}

void parallel_team(int threads, void (*body)(void* context, int rank, int size), void* context) {
  if (threads <= 1 || forked_child || omp_in_parallel()) {
    body(context, 0, 1);
    return;
  }
#pragma omp parallel num_threads(threads)
  body(context, omp_get_thread_num(), omp_get_num_threads());
}

void parallel_run(int threads, void (*body)(void* context), void* context) {
  struct Call {
    void (*body)(void*);
    void* context;
  } call{body, context};
  const auto run = [](void* given, int, int) {
    const Call& mine = *static_cast<Call*>(given);
    mine.body(mine.context);
  };
  parallel_team(threads, run, &call);
}

}  // namespace fastopt
