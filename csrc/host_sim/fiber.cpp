#include "host_sim/fiber.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <mutex>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace fastopt::host_sim {
namespace {

#if !defined(FASTOPT_FIBER_UCONTEXT)
// Saves what the calling convention asks a function to keep. MXCSR and the x87 control word stay:
// kernels do not change them. `noipa`, or callers would trust registers that the assembly does not
// name as clobbered.
__attribute__((naked, noipa)) void switch_stack(void** /*save*/, void* /*load*/) {
  asm volatile(
      "pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret\n");
}
constexpr size_t kSavedRegisters = 6;
#endif

struct StackPool {
  std::mutex mutex;
  std::vector<std::byte*> idle;
};

// Never destroyed: a launch may outlive static destructors.
StackPool& stack_pool() {
  static StackPool* pool = new StackPool;
  return *pool;
}

std::byte* map_stack() {
  const size_t guard = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, guard, PROT_NONE) != 0) throw std::bad_alloc();
  return static_cast<std::byte*>(memory) + guard;
}

}  // namespace

std::vector<std::byte*> take_stacks(size_t count) {
  std::vector<std::byte*> stacks;
  stacks.reserve(count);
  StackPool& pool = stack_pool();
  {
    std::lock_guard<std::mutex> lock(pool.mutex);
    while (stacks.size() < count && !pool.idle.empty()) {
      stacks.push_back(pool.idle.back());
      pool.idle.pop_back();
    }
  }
  while (stacks.size() < count) stacks.push_back(map_stack());
  return stacks;
}

void give_back_stacks(const std::vector<std::byte*>& stacks) {
#if defined(__SANITIZE_ADDRESS__)
  // Threads of a failed launch never left their frames, whose red zones are still poisoned.
  for (std::byte* stack : stacks) ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
#endif
  StackPool& pool = stack_pool();
  std::lock_guard<std::mutex> lock(pool.mutex);
  pool.idle.insert(pool.idle.end(), stacks.begin(), stacks.end());
}

void Fiber::attach_native_stack() {
  pthread_attr_t attributes;
  void* address = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &address, &stack_bytes_);
  pthread_attr_destroy(&attributes);
  stack_ = static_cast<std::byte*>(address);
}

void Fiber::prepare(std::byte* stack, void (*entry)()) {
  stack_ = stack;
  stack_bytes_ = kStackBytes;
  fake_stack_ = nullptr;
#if defined(FASTOPT_FIBER_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#else
  auto* top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // entry's return address: it does not return
  *--top = reinterpret_cast<void*>(entry);
  for (size_t i = 0; i < kSavedRegisters; ++i) *--top = nullptr;
  stack_pointer_ = top;
#endif
}

void Fiber::switch_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_bytes_);
#endif
#if defined(FASTOPT_FIBER_UCONTEXT)
  swapcontext(&from.context_, &to.context_);
#else
  switch_stack(&from.stack_pointer_, to.stack_pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
}

void Fiber::leave_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(nullptr, to.stack_, to.stack_bytes_);
#endif
#if defined(FASTOPT_FIBER_UCONTEXT)
  swapcontext(&from.context_, &to.context_);
#else
  switch_stack(&from.stack_pointer_, to.stack_pointer_);
#endif
  __builtin_unreachable();
}

void Fiber::arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace fastopt::host_sim
