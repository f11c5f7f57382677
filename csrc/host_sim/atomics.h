#pragma once

#include <cstring>
#include <type_traits>

#include "host_sim/device.h"

namespace fastopt::host_sim {

// Truly atomic, as several host threads may launch kernels on the same memory.
template <class T, class Update>
T atomic_update(T* address, Update update) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics take 32 or 64 bits");
  begin_atomic(address, sizeof(T));
  T old;
  T desired;
  __atomic_load(address, &old, __ATOMIC_SEQ_CST);
  do {
    desired = update(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, false, __ATOMIC_SEQ_CST,
                                      __ATOMIC_SEQ_CST));
  end_atomic(address, sizeof(T), memcmp(&old, &desired, sizeof(T)) != 0);
  return old;
}

// Keeps the second argument out of template deduction: atomicAdd(unsigned*, 1) is a valid call.
template <class T>
using Value = std::common_type_t<T>;

template <class T>
constexpr bool kIsAtomicInteger = std::is_integral_v<T> && sizeof(T) >= 4;

}  // namespace fastopt::host_sim

template <class T>
T atomicAdd(T* address, fastopt::host_sim::Value<T> value) {
  return fastopt::host_sim::atomic_update(address, [=](T old) { return old + value; });
}

template <class T>
T atomicSub(T* address, fastopt::host_sim::Value<T> value) {
  return fastopt::host_sim::atomic_update(address, [=](T old) { return old - value; });
}

template <class T>
T atomicExch(T* address, fastopt::host_sim::Value<T> value) {
  return fastopt::host_sim::atomic_update(address, [=](T) { return value; });
}

template <class T>
T atomicMax(T* address, fastopt::host_sim::Value<T> value) {
  static_assert(fastopt::host_sim::kIsAtomicInteger<T>);
  return fastopt::host_sim::atomic_update(address,
                                          [=](T old) { return old < value ? value : old; });
}

template <class T>
T atomicMin(T* address, fastopt::host_sim::Value<T> value) {
  static_assert(fastopt::host_sim::kIsAtomicInteger<T>);
  return fastopt::host_sim::atomic_update(address,
                                          [=](T old) { return value < old ? value : old; });
}

template <class T>
T atomicAnd(T* address, fastopt::host_sim::Value<T> value) {
  static_assert(fastopt::host_sim::kIsAtomicInteger<T>);
  return fastopt::host_sim::atomic_update(address, [=](T old) { return old & value; });
}

template <class T>
T atomicOr(T* address, fastopt::host_sim::Value<T> value) {
  static_assert(fastopt::host_sim::kIsAtomicInteger<T>);
  return fastopt::host_sim::atomic_update(address, [=](T old) { return old | value; });
}

template <class T>
T atomicXor(T* address, fastopt::host_sim::Value<T> value) {
  static_assert(fastopt::host_sim::kIsAtomicInteger<T>);
  return fastopt::host_sim::atomic_update(address, [=](T old) { return old ^ value; });
}

template <class T>
T atomicCAS(T* address, fastopt::host_sim::Value<T> compare, fastopt::host_sim::Value<T> value) {
  static_assert(fastopt::host_sim::kIsAtomicInteger<T>);
  return fastopt::host_sim::atomic_update(address,
                                          [=](T old) { return old == compare ? value : old; });
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return fastopt::host_sim::atomic_update(
      address, [=](unsigned old) { return old >= limit ? 0u : old + 1; });
}

inline unsigned atomicDec(unsigned* address, unsigned limit) {
  return fastopt::host_sim::atomic_update(
      address, [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}
