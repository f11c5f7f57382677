#pragma once

#include <cstdint>

#include "core/dtypes.h"

namespace fastopt {

// How a state tensor is stored. The numbers are those of fastopt/backends/state_codes.py.
enum class SlotCode : int32_t {
  kAsParameter,
  kFloat32,
  kBFloat16,
  kBlockwise8,  // a byte for each element, and the largest magnitude of each block in fp32
};

// What a bf16 parameter is beside its own 16 bits.
enum class ParamCode : int32_t {
  kRounded,
  kStochastic,  // nothing, but rounded up or down by chance, in proportion
  kKahan,       // what rounding lost, in bf16: about 16 bits together (Kahan 1965)
  kMaster,      // what rounding lost, as the difference of the bits: exactly an fp32 number
};

// Elements that share a scale.
constexpr int64_t kCodeBlock = 256;

// Random numbers of one parameter in one step are words of core/philox.h, with the parameter's
// number for a head and the step for a row. Of `kParamDraws + seed`, each element has a word, whose
// lower half rounds the parameter. Of `seed`, each 512 elements share a group of 64, whose upper
// halves round the state: nobody adds up errors of the state of different elements.
constexpr uint64_t kParamDraws = 1;
constexpr int64_t kElementsOfGroup = 512;

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

// Bytes of a block are numbers relative to its largest magnitude, with four bits of exponent: three
// of mantissa beside a sign, or four for state that is never negative. A second moment changes by a
// thousandth in a step, far less than a code: rounded to the nearest it would hardly ever move. So
// codes are rounded by chance, as is bf16 state, and keep the mean.
//
// Bits is uint32_t or a vector of them.
template <bool kSigned>
struct ByteCode {
  static constexpr int kShift = kSigned ? 20 : 19;  // bits of fp32 that are cut off
  static constexpr uint32_t kTop = kSigned ? 127 : 255;
  static constexpr uint32_t kBase = 111u << 23;                    // 2^-16
  static constexpr float kLargest = kSigned ? 0.9375f : 0.96875f;  // what kTop stands for

  // What elements are multiplied by before they are encoded, and after they are decoded. A block
  // whose largest is next to nothing is one of zeros.
  static HOST_DEVICE float to_relative(float largest) {
    return largest < 1e-37f ? 0.0f : kLargest / largest;
  }
  static HOST_DEVICE float from_relative(float largest) { return largest / kLargest; }

  // Of the bits of a relative value; chance < 2^16.
  template <class Bits>
  static HOST_DEVICE Bits encode(Bits bits, Bits chance) {
    const Bits zero{}, one = zero + 1u, top = zero + kTop;
    const Bits magnitude = bits & 0x7FFFFFFFu;
    const Bits drawn = magnitude + (chance << (kShift - 16));
    const Bits steps = (drawn - kBase) >> kShift;
    Bits code = drawn < kBase ? zero : steps > kTop ? top : steps;
    if (kSigned) return code | (bits >> 31 << 7);
    // A second moment of zero beside a first one would be a step without bounds.
    return code == 0u ? (magnitude == 0u ? zero : one) : code;
  }

  template <class Bits>
  static HOST_DEVICE Bits decode(Bits code) {
    const Bits steps = code & kTop;
    const Bits zero{};
    const Bits magnitude = steps == 0u ? zero : (steps << kShift) + kBase;
    return kSigned ? magnitude | (code >> 7 << 31) : magnitude;
  }
};

FASTOPT_END_NAMESPACE
