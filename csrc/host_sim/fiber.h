#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__)
#define FASTOPT_FIBER_UCONTEXT
#endif

#if defined(FASTOPT_FIBER_UCONTEXT)
#include <ucontext.h>
#endif

namespace fastopt::host_sim {

// A stack, and where its code stopped. A default-constructed fiber is the stack of the OS thread
// that switches away from it.
class Fiber {
 public:
  void attach_native_stack();
  // `stack` is of kStackBytes. `entry` starts with arrived() and never returns.
  void prepare(std::byte* stack, void (*entry)());

  static void switch_to(Fiber& from, Fiber& to);
  // `from` will not run again until it is prepared anew.
  [[noreturn]] static void leave_to(Fiber& from, Fiber& to);
  static void arrived();

 private:
  std::byte* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
#if defined(FASTOPT_FIBER_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 512 << 10;
#else
constexpr size_t kStackBytes = 256 << 10;
#endif

// Stacks with a guard page below each, kept for the next launch.
std::vector<std::byte*> take_stacks(size_t count);
void give_back_stacks(const std::vector<std::byte*>& stacks);

}  // namespace fastopt::host_sim
