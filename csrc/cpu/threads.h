#pragma once

#include <cstdint>

namespace fastopt {

// Calls body(context) on `threads` threads at once and returns when all are done. The body shares
// out the work itself. One thread, a nested call and a forked child run inline: a child of a
// process that has used OpenMP would wait for ever for threads that the fork did not copy.
void parallel_run(int threads, void (*body)(void* context), void* context);

// The same for threads that work together: the body is told which of how many it is. The system may
// grant fewer than asked for.
void parallel_team(int threads, void (*body)(void* context, int rank, int size), void* context);

// To be called once, before the first fork.
void install_fork_guard();

}  // namespace fastopt
