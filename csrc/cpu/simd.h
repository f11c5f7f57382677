#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "core/dtypes.h"

FASTOPT_BEGIN_NAMESPACE

// source[0..n) -> target[0..n), contiguous. The loops vectorise; half precision has instructions
// of its own, which GCC does not find by itself.
template <class Target, class Source>
inline void convert(Target* __restrict target, const Source* __restrict source, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(target + i, load(source + i));
}

#if defined(__F16C__)
inline void convert(float* __restrict target, const Half* __restrict source, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i));
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(halves));
  }
  for (; i < n; ++i) store(target + i, load(source + i));
}

inline void convert(Half* __restrict target, const float* __restrict source, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i halves = _mm256_cvtps_ph(_mm256_loadu_ps(source + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), halves);
  }
  for (; i < n; ++i) store(target + i, load(source + i));
}
#endif

FASTOPT_END_NAMESPACE
