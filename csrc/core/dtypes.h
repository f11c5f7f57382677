#pragma once

#include <cstdint>
#include <cstring>

#include "core/platform.h"

namespace fastopt {

// Storage types of tensors. The arithmetic type is double for kFloat64 and float for the rest.
enum class DType : int32_t { kFloat32, kFloat64, kBFloat16, kFloat16 };
constexpr int kDTypes = 4;

struct BFloat16 {
  uint16_t bits;
};

struct Half {
  uint16_t bits;
};

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

template <class Storage>
struct ComputeTypeOf {
  using type = float;
};
template <>
struct ComputeTypeOf<double> {
  using type = double;
};
template <class Storage>
using ComputeType = typename ComputeTypeOf<Storage>::type;

HOST_DEVICE uint32_t float_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

HOST_DEVICE float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

HOST_DEVICE float load(const float* source) { return *source; }
HOST_DEVICE double load(const double* source) { return *source; }
HOST_DEVICE float load(const uint8_t* source) { return *source; }
HOST_DEVICE void store(float* target, float value) { *target = value; }
HOST_DEVICE void store(double* target, double value) { *target = value; }

HOST_DEVICE float load(const BFloat16* source) {
  return float_from_bits(static_cast<uint32_t>(source->bits) << 16);
}

// Round to nearest, ties to even. A NaN keeps its sign and becomes quiet: rounding its payload up
// could turn it into an infinity.
HOST_DEVICE void store(BFloat16* target, float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x0040u;
  target->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? quiet_nan : rounded);
}

// Its arithmetic has no subnormal floats, so that threads that flush those keep subnormal halves.
HOST_DEVICE float load(const Half* source) {
  const uint32_t sign = static_cast<uint32_t>(source->bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(source->bits & 0x7FFFu) << 13;
  uint32_t bits;
  if (magnitude >= 0x0F800000u) {  // infinity or NaN
    bits = magnitude | 0x7F800000u;
  } else if (magnitude < 0x00800000u) {  // subnormal: the subtraction of 2^-14 normalises it
    bits = float_bits(float_from_bits(magnitude + 0x38800000u) - float_from_bits(0x38800000u));
  } else {  // from an exponent's bias of 15 to one of 127
    bits = magnitude + 0x38000000u;
  }
  return float_from_bits(bits | sign);
}

// Round to nearest, ties to even, through subnormals to zero and up to infinity.
HOST_DEVICE void store(Half* target, float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  uint32_t result;
  if (magnitude > 0x7F800000u) {
    result = 0x7E00u | (magnitude >> 13 & 0x03FFu);
  } else if (magnitude >= 0x477FF000u) {  // 65520, halfway from the largest half to 2^16
    result = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the addition aligns and rounds the bits
    result = float_bits(float_from_bits(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    const uint32_t odd = (magnitude >> 13) & 1u;
    result = (magnitude - 0x38000000u + 0x0FFFu + odd) >> 13;
  }
  target->bits = static_cast<uint16_t>(sign | result);
}

FASTOPT_END_NAMESPACE
