#pragma once

#include <cstdint>

#include "core/platform.h"

FASTOPT_BEGIN_NAMESPACE

// Philox 4x32 with seven rounds, the fewest that pass BigCrush (Salmon et al., SC 2011): random
// numbers that are a function of a seed and a counter, so that whoever computes an element's draws
// the same. Word is uint32_t, or a vector of them in 64-bit lanes; Wide has multiply(Word,
// constant, high, low).
constexpr int kPhiloxRounds = 7;

template <class Wide, class Word>
HOST_DEVICE void philox(Word (&counter)[4], uint64_t seed) {
  constexpr uint32_t kMultipliers[2] = {0xD2511F53u, 0xCD9E8D57u};
  constexpr uint32_t kWeyl[2] = {0x9E3779B9u, 0xBB67AE85u};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  FASTOPT_UNROLL
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Word high[2], low[2];
    Wide::multiply(counter[0], kMultipliers[0], high[0], low[0]);
    Wide::multiply(counter[2], kMultipliers[1], high[1], low[1]);
    const Word second = counter[1], fourth = counter[3];
    counter[0] = high[1] ^ second ^ key[0];
    counter[1] = low[1];
    counter[2] = high[0] ^ fourth ^ key[1];
    counter[3] = low[0];
    key[0] += kWeyl[0];
    key[1] += kWeyl[1];
  }
}

struct ScalarWords {
  static HOST_DEVICE void multiply(uint32_t value, uint32_t factor, uint32_t& high, uint32_t& low) {
    const uint64_t product = static_cast<uint64_t>(value) * factor;
    high = static_cast<uint32_t>(product >> 32);
    low = static_cast<uint32_t>(product);
  }
};

// Words of a row come in groups of 64: lane l of a group makes those of its places l, l + 16, l +
// 32 and l + 48, from counters of lane, row and head.
constexpr int kRandomLanes = 16, kRandomGroup = 4 * kRandomLanes;

FASTOPT_END_NAMESPACE
