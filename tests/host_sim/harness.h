#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "host_sim/cuda.h"

// A program of cases: `program CASE FIRST_SEED SEEDS` prints one line per seed, which is "right",
// "wrong" or "error: " and the simulator's text.
namespace sim = fastopt::host_sim;

struct Case {
  const char* name;
  bool (*is_right)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registration {
  Registration(const char* name, bool (*is_right)()) { cases().push_back({name, is_right}); }
};

#define CASE(name)                                            \
  static bool name();                                         \
  static const Registration name##_registration(#name, name); \
  static bool name()

struct Registered {
  Registered(void* address, size_t bytes) : address(address) {
    sim::register_memory(address, bytes);
  }
  ~Registered() { sim::unregister_memory(address); }
  void* address;
};

inline std::string run_case(const char* name, uint64_t seed) {
  for (const Case& one : cases()) {
    if (strcmp(one.name, name) != 0) continue;
    sim::set_seed(seed);
    try {
      return one.is_right() ? "right" : "wrong";
    } catch (const sim::Error& error) {
      return std::string("error: ") + error.what();
    }
  }
  return "no such case";
}

#if defined(CASES_IN_A_LIBRARY)
extern "C" __attribute__((visibility("default"))) bool is_right(const char* name, uint64_t seed) {
  return run_case(name, seed) == "right";
}
#else
int main(int count, char** arguments) {
  if (count != 4) return 2;
  const uint64_t first = strtoull(arguments[2], nullptr, 10);
  const uint64_t seeds = strtoull(arguments[3], nullptr, 10);
  for (uint64_t seed = first; seed < first + seeds; ++seed) {
    puts(run_case(arguments[1], seed).c_str());
    fflush(stdout);
  }
}
#endif
