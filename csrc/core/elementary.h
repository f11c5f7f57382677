#pragma once

#include <cmath>

#include "core/platform.h"

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

FASTOPT_END_NAMESPACE
