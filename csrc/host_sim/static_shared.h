#pragma once

#include <cstddef>

namespace fastopt::host_sim {

// The memory that holds the static shared variables of a kernel's module on the calling OS thread:
// all of the module's thread-local variables.
struct StaticShared {
  std::byte* address = nullptr;
  size_t bytes = 0;
};

// `kernel` is any address in the module.
StaticShared find_static_shared(const void* kernel);

}  // namespace fastopt::host_sim
