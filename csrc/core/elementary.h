#pragma once

#include <cmath>

#include "core/dtypes.h"

FASTOPT_BEGIN_NAMESPACE

// Scalars here, vectors of the CPU in cpu/simd.h: a formula is written once for both.
template <class T>
HOST_DEVICE T square_root(T value) {
  return std::sqrt(value);
}
// The larger and the smaller one; a NaN wins, as in torch.maximum and torch.minimum.
template <class T>
HOST_DEVICE T maximum(T left, T right) {
  return right > left || right != right ? right : left;
}
template <class T>
HOST_DEVICE T minimum(T left, T right) {
  return right < left || right != right ? right : left;
}
template <class T>
HOST_DEVICE T magnitude(T value) {
  return value < 0 ? -value : value;
}
HOST_DEVICE double power(double base, double exponent) { return std::pow(base, exponent); }
// 1, and 0 for a zero; a NaN is none.
template <class T>
HOST_DEVICE T is_nonzero(T value) {
  return static_cast<T>(value != 0);
}
// -1, 0 or 1; 0 for a NaN, as in torch.sign.
template <class T>
HOST_DEVICE T sign_of(T value) {
  return static_cast<T>(value > 0) - static_cast<T>(value < 0);
}
// Bounds that leave a NaN alone; a bound that is NaN is none.
HOST_DEVICE float at_least(float x, float bound) { return x < bound ? bound : x; }
HOST_DEVICE double at_least(double x, double bound) { return x < bound ? bound : x; }
HOST_DEVICE float at_most(float x, float bound) { return x > bound ? bound : x; }
HOST_DEVICE double at_most(double x, double bound) { return x > bound ? bound : x; }
// The value, and zero where x is below the bound.
HOST_DEVICE float zero_below(float value, float x, float bound) { return x < bound ? 0.0f : value; }
HOST_DEVICE double zero_below(double value, double x, double bound) {
  return x < bound ? 0.0 : value;
}
// The value, and the other where it is a NaN.
template <class T>
HOST_DEVICE T number_or(T value, T otherwise) {
  return value != value ? otherwise : value;
}
// The value as it is rounded, on a CPU: the compiler does not fuse what made it with what uses it.
// In a sum of two products it may fuse either, and not the same one in every loop.
template <class T>
HOST_DEVICE T unfused(T value) {
#if defined(__x86_64__) && !defined(__CUDACC__)
  asm("" : "+x"(value));
#elif defined(__aarch64__) && !defined(__CUDACC__)
  asm("" : "+w"(value));
#endif
  return value;
}
// Rounded once, by a CPU where it has instructions for it.
HOST_DEVICE float multiply_add(float factor, float other, float summand) {
  return std::fma(factor, other, summand);
}
// The bits of an fp32 number, and the number of them.
HOST_DEVICE uint32_t bits_of(float value) { return float_bits(value); }
template <class V>
using BitsOf = decltype(bits_of(V()));
template <class V>
HOST_DEVICE V from_bits(BitsOf<V> bits) {
  V value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
// `bits`, or those of a quiet NaN where the number is a NaN.
HOST_DEVICE uint32_t unless_nan(float value, uint32_t bits) {
  return value != value ? float_bits(value) | 0x00400000u : bits;
}

FASTOPT_END_NAMESPACE
