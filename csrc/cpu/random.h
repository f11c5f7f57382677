#pragma once

#include <cstdint>

#include "core/philox.h"
#include "cpu/simd.h"

FASTOPT_BEGIN_NAMESPACE

struct WideLanes {
  static constexpr int kWidth = kVectorBytes / 8;
  typedef uint64_t Word __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t Narrow __attribute__((vector_size(kVectorBytes / 2)));

  static HOST_DEVICE void multiply(Word value, uint32_t factor, Word& high, Word& low) {
#if defined(__AVX512F__)
    const Word product = (Word)_mm512_mul_epu32((__m512i)value, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
    const Word product = (Word)_mm256_mul_epu32((__m256i)value, _mm256_set1_epi64x(factor));
#else
    const Word product = value * static_cast<uint64_t>(factor);
#endif
    high = product >> 32;
    low = product & 0xFFFFFFFFu;
  }
};

// Words of the places [begin, end) of one row, both multiples of kRandomGroup.
inline void random_row(uint64_t seed, int64_t head, int64_t row, int64_t begin, int64_t end,
                       uint32_t* words) {
  using Word = WideLanes::Word;
  Word numbers;
  for (int i = 0; i < WideLanes::kWidth; ++i) numbers[i] = i;
  for (int64_t group = begin / kRandomGroup; group < end / kRandomGroup; ++group) {
    uint32_t* target = words + group * kRandomGroup - begin;
    for (int lane = 0; lane < kRandomLanes; lane += WideLanes::kWidth) {
      Word counter[4] = {(numbers + (group * kRandomLanes + lane)) & 0xFFFFFFFFu,
                         Word{} + static_cast<uint32_t>(row), Word{} + static_cast<uint32_t>(head),
                         Word{}};
      philox<WideLanes>(counter, seed);
      for (int i = 0; i < 4; ++i) {
        const WideLanes::Narrow narrow = __builtin_convertvector(counter[i], WideLanes::Narrow);
        memcpy(target + i * kRandomLanes + lane, &narrow, sizeof narrow);
      }
    }
  }
}

FASTOPT_END_NAMESPACE
