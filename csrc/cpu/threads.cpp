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

void parallel_run(int threads, void (*body)(void* context), void* context) {
  if (threads <= 1 || forked_child || omp_in_parallel()) {
    body(context);
    return;
  }
#pragma omp parallel num_threads(threads)
  body(context);
}

}  // namespace fastopt
