#pragma once

#include <cstdint>

namespace fastopt::host_sim {

// splitmix64
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}

  uint64_t next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
  }

  uint32_t below(uint32_t bound) {
    return static_cast<uint32_t>((next() >> 32) * static_cast<uint64_t>(bound) >> 32);
  }

  bool one_in(uint32_t times) { return below(times) == 0; }

  // The position of one of the bits that are set in `mask`, which is not 0.
  int bit_of(uint32_t mask) {
    for (uint32_t skip = below(__builtin_popcount(mask)); skip > 0; --skip) mask &= mask - 1;
    return __builtin_ctz(mask);
  }

  // The same in a fifth of the time, for the scheduler's inner loop. Not uniform: the share of a
  // bit grows with its distance from the others.
  int some_bit_of(uint32_t mask) {
    const uint64_t random = next();
    const auto rotation = static_cast<int>(random >> 59);
    const uint32_t rotated = mask >> rotation | mask << (-rotation & 31);
    const int bit = (random & 1) != 0 ? __builtin_ctz(rotated) : 31 - __builtin_clz(rotated);
    return (bit + rotation) & 31;
  }

 private:
  uint64_t state_;
};

}  // namespace fastopt::host_sim
