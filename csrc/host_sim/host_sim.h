#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <type_traits>
#include <utility>

#include "host_sim/vector_types.h"

// Runs CUDA kernels on a CPU: one fiber per thread of a block, in an order that is random by seed.
// It looks for wrong kernels rather than for speed: README.md says for which.
namespace fastopt::host_sim {

// What a GPU would answer with an error, a hang or garbage. Names kernel, block and thread.
class Error : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct LaunchShape {
  dim3 grid, block;
  size_t dynamic_shared = 0;  // bytes
  bool cooperative = false;
};

// Memory that blocks share through fences and atomics only. The call waits for running launches;
// a launch that sees registered memory runs alone.
void register_memory(void* address, size_t bytes);
void unregister_memory(void* address);

// The order of threads and blocks is a function of the seed, the kernel's name and the shape.
void set_seed(uint64_t seed);
// Cooperative grids with more blocks are refused.
void set_max_resident_blocks(int blocks);
int resident_blocks();
// How long a thread may run between two synchronisations.
void set_time_limit(double seconds);

namespace detail {

struct Kernel {
  const char* name;
  const void* address;  // anything in the module whose static shared memory the kernel uses
  void (*call)(const void* arguments);
  const void* arguments;
};

void run(const LaunchShape& shape, const Kernel& kernel);

}  // namespace detail

// Returns when the grid has run.
template <class... Params, class... Args>
void launch(const LaunchShape& shape, const char* kernel_name, void (*kernel)(Params...),
            Args&&... args) {
  static_assert(!(std::is_reference_v<Params> || ...), "a kernel takes its arguments by value");
  using Call = std::pair<void (*)(Params...), std::tuple<std::remove_cv_t<Params>...>>;
  const Call call(kernel, std::tuple<std::remove_cv_t<Params>...>(std::forward<Args>(args)...));
  const auto run_thread = [](const void* arguments) {
    const Call& call = *static_cast<const Call*>(arguments);
    std::apply(call.first, call.second);
  };
  detail::run(shape, {kernel_name, reinterpret_cast<const void*>(kernel), run_thread, &call});
}

}  // namespace fastopt::host_sim
