#pragma once

#include <cstdint>

namespace fastopt {

// Calls body(context) on `threads` threads at once and returns when all are done. The body shares
// out the work itself. One thread, a nested call and a forked child run inline: a child of a
// process that has used OpenMP would wait for ever for threads that the fork did not copy.
void parallel_run(int threads, void (*body)(void* context), void* context);

// To be called once, before the first fork.
void install_fork_guard();

}  // namespace fastopt
