#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <limits>

namespace fastopt::host_sim {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// CUDA's conversions saturate, and turn NaN into 0.
template <class Integer, class Float>
Integer saturate(Float rounded) {
  if (rounded != rounded) return 0;
  if (rounded <= static_cast<Float>(std::numeric_limits<Integer>::min())) {
    return std::numeric_limits<Integer>::min();
  }
  if (rounded >= static_cast<Float>(std::numeric_limits<Integer>::max())) {
    return std::numeric_limits<Integer>::max();
  }
  return static_cast<Integer>(rounded);
}

inline float exp10_of(float x) { return powf(10.0f, x); }

}  // namespace fastopt::host_sim

inline unsigned __float_as_uint(float x) { return fastopt::host_sim::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return fastopt::host_sim::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return fastopt::host_sim::bit_cast<float>(x); }
inline float __int_as_float(int x) { return fastopt::host_sim::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) {
  return fastopt::host_sim::bit_cast<long long>(x);
}
inline double __longlong_as_double(long long x) { return fastopt::host_sim::bit_cast<double>(x); }

inline int __float2int_rn(float x) { return fastopt::host_sim::saturate<int>(nearbyintf(x)); }
inline int __float2int_rz(float x) { return fastopt::host_sim::saturate<int>(truncf(x)); }
inline int __float2int_rd(float x) { return fastopt::host_sim::saturate<int>(floorf(x)); }
inline int __float2int_ru(float x) { return fastopt::host_sim::saturate<int>(ceilf(x)); }
inline unsigned __float2uint_rn(float x) {
  return fastopt::host_sim::saturate<unsigned>(nearbyintf(x));
}
inline unsigned __float2uint_rz(float x) {
  return fastopt::host_sim::saturate<unsigned>(truncf(x));
}
inline long long __float2ll_rn(float x) {
  return fastopt::host_sim::saturate<long long>(nearbyintf(x));
}
inline int __double2int_rn(double x) { return fastopt::host_sim::saturate<int>(nearbyint(x)); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }

inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.0f / sqrtf(x); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __fma_rn(double a, double b, double c) { return fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }
inline float fdividef(float a, float b) { return a / b; }
inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline double rsqrt(double x) { return 1.0 / sqrt(x); }

// Macros, because glibc declares these names for itself.
#define __expf(x) expf(x)
#define __exp10f(x) ::fastopt::host_sim::exp10_of(x)
#define __logf(x) logf(x)
#define __log2f(x) log2f(x)
#define __log10f(x) log10f(x)
#define __powf(x, y) powf(x, y)
#define __sinf(x) sinf(x)
#define __cosf(x) cosf(x)
#define __tanf(x) tanf(x)

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline int __mulhi(int a, int b) { return static_cast<int>(static_cast<int64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}

// Of one signed and one unsigned argument, the signed one is converted, as in CUDA.
#define FASTOPT_MIN_MAX(type, first, second) \
  inline type min(first a, second b) {       \
    const type x = static_cast<type>(a);     \
    const type y = static_cast<type>(b);     \
    return y < x ? y : x;                    \
  }                                          \
  inline type max(first a, second b) {       \
    const type x = static_cast<type>(a);     \
    const type y = static_cast<type>(b);     \
    return x < y ? y : x;                    \
  }
#define FASTOPT_MIN_MAX_OF_SIZE(type)                          \
  FASTOPT_MIN_MAX(type, type, type)                            \
  FASTOPT_MIN_MAX(unsigned type, unsigned type, unsigned type) \
  FASTOPT_MIN_MAX(unsigned type, type, unsigned type)          \
  FASTOPT_MIN_MAX(unsigned type, unsigned type, type)
FASTOPT_MIN_MAX_OF_SIZE(int)
FASTOPT_MIN_MAX_OF_SIZE(long)
FASTOPT_MIN_MAX_OF_SIZE(long long)
#undef FASTOPT_MIN_MAX_OF_SIZE
#undef FASTOPT_MIN_MAX
// A NaN loses against a number.
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }
