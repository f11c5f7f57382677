#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "core/elementary.h"

FASTOPT_BEGIN_NAMESPACE

// exp, sigmoid and tanh without branches, for scalars here and for vectors of the CPU in
// cpu/simd.h. Against the exact values they are within 4 units in the last place; e^x below 2^-125
// (2^-1021) is taken for zero. NaN stays NaN.

// What e^x is made of: x = n * ln 2 + r with |r| <= ln(2) / 2.
template <class T>
struct ExponentialConstants;

template <>
struct ExponentialConstants<float> {
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLn2High = 0.693145751953125f;  // 15 bits: n * high is exact
  static constexpr float kLn2Low = 1.42860682030941723212e-6f;
  static constexpr float kHighest = 89.0f;  // e^x overflows from 88.73
  static constexpr float kLowest = -86.9f;  // below, e^x / 2 is not a normal number
  static constexpr float kLowestPower = -127.0f;
  static constexpr int kTerms = 6;  // of the series of (e^r - 1 - r) / r^2
  static constexpr int kPowerDegree = 5;
};

template <>
struct ExponentialConstants<double> {
  static constexpr double kRounder = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2High = 6.93147180369123816490e-1;
  static constexpr double kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kHighest = 710.0;
  static constexpr double kLowest = -707.7;
  static constexpr double kLowestPower = -1023.0;
  static constexpr int kTerms = 13;
  static constexpr int kPowerDegree = 14;
};

// 1 / (k + 2)!
constexpr double series_coefficient(int k) {
  double factorial = 1;
  for (int i = 2; i <= k + 2; ++i) factorial *= i;
  return 1 / factorial;
}

// All of them, as a constant: nvcc folds no call, and would divide in each thread.
template <class T>
struct SeriesCoefficients {
  T at[ExponentialConstants<T>::kTerms] = {};
  constexpr SeriesCoefficients() {
    for (int k = 0; k < ExponentialConstants<T>::kTerms; ++k) {
      at[k] = static_cast<T>(series_coefficient(k));
    }
  }
};

// What is below is written for one value; a vector brings the same operations.
HOST_DEVICE float power_of_two(float shifted) {  // of the integer that kRounder was added to
  uint32_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127u) << 23;
  float result;
  memcpy(&result, &bits, sizeof result);
  return result;
}
HOST_DEVICE double power_of_two(double shifted) {
  uint64_t bits;
  memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 1023u) << 52;
  double result;
  memcpy(&result, &bits, sizeof result);
  return result;
}
HOST_DEVICE float with_sign_of(float magnitude, float sign) {
  return std::copysign(magnitude, sign);
}
HOST_DEVICE double with_sign_of(double magnitude, double sign) {
  return std::copysign(magnitude, sign);
}

// x = n * ln 2 + r: e^r - 1, and n with kRounder added.
template <class T, class V>
struct ReducedExponential {
  V remainder, shifted;

  // x must be within [kLowest, kHighest].
  HOST_DEVICE explicit ReducedExponential(V x) {
    using C = ExponentialConstants<T>;
    constexpr T kLog2E = static_cast<T>(1.44269504088896340735992468100189);
    shifted = x * kLog2E + C::kRounder;
    const V n = shifted - C::kRounder;
    const V r = x - n * C::kLn2High - n * C::kLn2Low;
    constexpr SeriesCoefficients<T> kSeries;
    V series = r * kSeries.at[C::kTerms - 1] + kSeries.at[C::kTerms - 2];
    FASTOPT_UNROLL
    for (int k = C::kTerms - 3; k >= 0; --k) series = series * r + kSeries.at[k];
    remainder = r * r * series + r;
  }
};

template <class T, class V>
HOST_DEVICE V exponential(V x) {
  using C = ExponentialConstants<T>;
  const ReducedExponential<T, V> e(at_most(at_least(x, C::kLowest), C::kHighest));
  const V half_power = power_of_two(e.shifted - T(1));  // 2^n may be too large
  const V result = (half_power + half_power * e.remainder) * T(2);
  return zero_below(result, x, C::kLowest);
}

// The polynomial for 2^r: in double precision its series, in single precision the one of degree 5
// that is nearest for |r| <= 1/2 and 1 for r = 0, to 9.2e-8 (a linear program over 4000 points).
template <class T>
constexpr T power_coefficient(int k);
template <>
constexpr float power_coefficient<float>(int k) {
  constexpr float kNearest[] = {1.0f,
                                0.6931469775950738f,
                                0.24022242071221056f,
                                0.055507337305915f,
                                0.009671513284886695f,
                                0.0013264739804956472f};
  return kNearest[k];
}
template <>
constexpr double power_coefficient<double>(int k) {
  double coefficient = 1;  // ln(2)^k / k!
  for (int i = 1; i <= k; ++i) coefficient *= 0.693147180559945309417232121458 / i;
  return coefficient;
}

template <class T>
struct PowerCoefficients {
  T at[ExponentialConstants<T>::kPowerDegree + 1] = {};
  constexpr PowerCoefficients() {
    for (int k = 0; k <= ExponentialConstants<T>::kPowerDegree; ++k) {
      at[k] = power_coefficient<T>(k);
    }
  }
};

// x = n + r, |r| <= 1/2: returns r, and n as times_power_of_two takes it.
template <class T, class V>
HOST_DEVICE V split_power(V x, V& whole) {
  using C = ExponentialConstants<T>;
  const V bounded = at_least(x, C::kLowestPower);
  whole = bounded + C::kRounder;
  return bounded - (whole - C::kRounder);
}
template <class T, class V>
HOST_DEVICE V times_power_of_two(V value, V whole) {
  return value * power_of_two(whole);
}

// 2^x for x up to 127 (1023), zero from -127 (-1023) down: cheaper than e^x, where x comes by a
// multiplication anyway.
template <class T, class V>
HOST_DEVICE V exponential_of_two(V x) {
  constexpr int kDegree = ExponentialConstants<T>::kPowerDegree;
  V whole;
  const V r = split_power<T>(x, whole);
  constexpr PowerCoefficients<T> kPowers;
  V series = r * kPowers.at[kDegree] + kPowers.at[kDegree - 1];
  FASTOPT_UNROLL
  for (int k = kDegree - 2; k >= 0; --k) series = series * r + kPowers.at[k];
  return times_power_of_two<T>(series, whole);
}

// 1 / (1 + e^-x)
template <class T, class V>
HOST_DEVICE V sigmoid(V x) {
  using C = ExponentialConstants<T>;
  const ReducedExponential<T, V> e(at_most(at_least(x * T(-1), C::kLowest), C::kHighest));
  // Where 2^n overflows, the result is subnormal: zero.
  const V power = power_of_two(e.shifted), one = V{} + T(1);
  return one / (one + power * (one + e.remainder));
}

// -expm1(-2|x|) / (2 + expm1(-2|x|)) with the sign of x: no digits are lost near zero.
template <class T, class V>
HOST_DEVICE V hyperbolic_tangent(V x) {
  constexpr T kSaturated = -48;  // tanh(24) is 1 in double precision
  const ReducedExponential<T, V> e(at_least(magnitude(x) * T(-2), kSaturated));
  const V power = power_of_two(e.shifted);
  const V expm1 = power * e.remainder + (power - T(1));
  return with_sign_of(expm1 / (expm1 + T(2)), x);
}

FASTOPT_END_NAMESPACE
