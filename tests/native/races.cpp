// Makes every call of kernel_calls.h on several numbers of threads and compares the memory that it
// leaves with that of one thread, byte by byte. To be built with -fsanitize=thread.
//
// `races` makes all calls, `races WORDS` those with these words in their names. After `--racy` each
// call is made by two threads at once on the same memory, which has to be reported.

#include <cstdio>
#include <cstring>
#include <thread>

#include "kernel_calls.h"

using namespace fastopt;

namespace {

constexpr int kThreads[] = {2, 3, 5};

bool leaves_the_same(KernelCall& call, const InstructionSet& set) {
  const Memory::Contents before = call.memory.contents();
  call.run(set, 1);
  const Memory::Contents expected = call.memory.contents();
  for (int threads : kThreads) {
    call.memory.restore(before);
    call.run(set, threads);
    if (call.memory.contents() != expected) return false;
  }
  return true;
}

void run_twice_at_once(KernelCall& call, const InstructionSet& set) {
  std::thread other([&] { call.run(set, 1); });
  call.run(set, 1);
  other.join();
}

}  // namespace

int main(int count, char** words) {
  const bool racy = count > 1 && strcmp(words[1], "--racy") == 0;
  const char* wanted = count > 1 + racy ? words[1 + racy] : "";
  int calls = 0, sets = 0, different = 0;
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.runs_here) continue;
    ++sets;
    for (const KernelCase& one : kernel_cases()) {
      if (one.name.find(wanted) == std::string::npos) continue;
      ++calls;
      KernelCall call;
      one.prepare(call);
      if (racy) {
        run_twice_at_once(call, set);
      } else if (!leaves_the_same(call, set)) {
        ++different;
        std::fprintf(stderr, "%s on %s depends on the number of threads\n", one.name.c_str(),
                     set.name);
      }
    }
  }
  std::printf("%d calls, %d instruction sets, %d different\n", calls, sets, different);
  return different != 0;
}
