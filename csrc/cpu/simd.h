#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/dtypes.h"
#include "core/elementary.h"

FASTOPT_BEGIN_NAMESPACE

// Vectors of the width of the instruction set, on GCC's vector extensions: arithmetic needs no
// intrinsics. Only what the extensions lack is spelled per instruction set, here and nowhere else.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct NativeVector;
template <>
struct NativeVector<float> {
  static constexpr int kWidth = kVectorBytes / 4;
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct NativeVector<double> {
  static constexpr int kWidth = kVectorBytes / 8;
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};

// kWidth values of T. The second operand of an operation may be a scalar.
template <class T>
struct Vec {
  static constexpr int kWidth = NativeVector<T>::kWidth;
  using Native = typename NativeVector<T>::type;
  using Mask = typename NativeVector<T>::mask;

  Native value;

  friend HOST_DEVICE Vec operator+(Vec a, Vec b) { return {a.value + b.value}; }
  friend HOST_DEVICE Vec operator-(Vec a, Vec b) { return {a.value - b.value}; }
  friend HOST_DEVICE Vec operator*(Vec a, Vec b) { return {a.value * b.value}; }
  friend HOST_DEVICE Vec operator/(Vec a, Vec b) { return {a.value / b.value}; }
  friend HOST_DEVICE Vec operator+(Vec a, T b) { return {a.value + b}; }
  friend HOST_DEVICE Vec operator-(Vec a, T b) { return {a.value - b}; }
  friend HOST_DEVICE Vec operator*(Vec a, T b) { return {a.value * b}; }
  friend HOST_DEVICE Vec operator*(T a, Vec b) { return {a * b.value}; }
};

template <class T>
HOST_DEVICE Vec<T> maximum(Vec<T> left, Vec<T> right) {
  const typename Vec<T>::Mask right_wins =
      (right.value > left.value) | (right.value != right.value);
  return {right_wins ? right.value : left.value};
}

template <class T>
HOST_DEVICE Vec<T> minimum(Vec<T> left, Vec<T> right) {
  const typename Vec<T>::Mask right_wins =
      (right.value < left.value) | (right.value != right.value);
  return {right_wins ? right.value : left.value};
}

template <class T>
HOST_DEVICE Vec<T> magnitude(Vec<T> vector) {
  using Mask = typename Vec<T>::Mask;
  const typename Vec<T>::Native minus_zero = -typename Vec<T>::Native{};
  return {(typename Vec<T>::Native)((Mask)vector.value & ~(Mask)minus_zero)};
}

HOST_DEVICE Vec<double> power(Vec<double> vector, double exponent) {
  for (int i = 0; i < Vec<double>::kWidth; ++i) {
    vector.value[i] = std::pow(vector.value[i], exponent);
  }
  return vector;
}

template <class T>
HOST_DEVICE Vec<T> is_nonzero(Vec<T> vector) {
  const typename Vec<T>::Native zero{}, one = zero + 1;
  return {vector.value != 0 ? one : zero};
}

template <class T>
HOST_DEVICE Vec<T> sign_of(Vec<T> vector) {
  const typename Vec<T>::Native zero{}, one = zero + 1;
  return {vector.value > zero ? one : vector.value < zero ? -one : zero};
}

// As in core/activations.h. Unsigned: a NaN has any bits.
HOST_DEVICE Vec<float> power_of_two(Vec<float> shifted) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  return {(Vec<float>::Native)(((Bits)shifted.value + 127u) << 23)};
}
HOST_DEVICE Vec<double> power_of_two(Vec<double> shifted) {
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  return {(Vec<double>::Native)(((Bits)shifted.value + 1023u) << 52)};
}

#if defined(__AVX512DQ__)
// AVX-512 has instructions for both; what they make of infinities needs no bounds.
template <class T>
HOST_DEVICE Vec<T> split_power(Vec<T> x, Vec<T>& whole) {
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  Vec<T> r;
  if constexpr (sizeof(T) == 4) {
    r.value = (typename Vec<T>::Native)_mm512_reduce_ps((__m512)x.value, kNearest);
  } else {
    r.value = (typename Vec<T>::Native)_mm512_reduce_pd((__m512d)x.value, kNearest);
  }
  whole = x - r;
  return r;
}
template <class T>
HOST_DEVICE Vec<T> times_power_of_two(Vec<T> value, Vec<T> whole) {
  if constexpr (sizeof(T) == 4) {
    return {(typename Vec<T>::Native)_mm512_scalef_ps((__m512)value.value, (__m512)whole.value)};
  } else {
    return {(typename Vec<T>::Native)_mm512_scalef_pd((__m512d)value.value, (__m512d)whole.value)};
  }
}
#endif

template <class T>
HOST_DEVICE Vec<T> with_sign_of(Vec<T> magnitude, Vec<T> sign) {
  using Mask = typename Vec<T>::Mask;
  const typename Vec<T>::Native minus_zero = -typename Vec<T>::Native{};
  const Mask top = (Mask)minus_zero;
  return {(typename Vec<T>::Native)(((Mask)magnitude.value & ~top) | ((Mask)sign.value & top))};
}

template <class T>
HOST_DEVICE Vec<T> at_least(Vec<T> x, Vec<T> bound) {
  return {bound.value > x.value ? bound.value : x.value};
}
template <class T>
HOST_DEVICE Vec<T> at_least(Vec<T> x, T bound) {
  return at_least(x, Vec<T>{} + bound);
}
template <class T>
HOST_DEVICE Vec<T> at_most(Vec<T> x, T bound) {
  const typename Vec<T>::Native bounds = typename Vec<T>::Native{} + bound;
  return {bounds < x.value ? bounds : x.value};
}

template <class T>
HOST_DEVICE Vec<T> zero_below(Vec<T> value, Vec<T> x, T bound) {
  const typename Vec<T>::Native zero{};
  return {x.value < bound ? zero : value.value};
}

template <class T>
HOST_DEVICE Vec<T> number_or(Vec<T> value, Vec<T> otherwise) {
  return {value.value != value.value ? otherwise.value : value.value};
}

HOST_DEVICE Vec<float> square_root(Vec<float> vector) {
#if defined(__AVX512F__)
  return {(Vec<float>::Native)_mm512_sqrt_ps((__m512)vector.value)};
#elif defined(__AVX2__)
  return {(Vec<float>::Native)_mm256_sqrt_ps((__m256)vector.value)};
#elif defined(__SSE2__)
  return {(Vec<float>::Native)_mm_sqrt_ps((__m128)vector.value)};
#else
  for (int i = 0; i < Vec<float>::kWidth; ++i) vector.value[i] = std::sqrt(vector.value[i]);
  return vector;
#endif
}

HOST_DEVICE Vec<double> square_root(Vec<double> vector) {
#if defined(__AVX512F__)
  return {(Vec<double>::Native)_mm512_sqrt_pd((__m512d)vector.value)};
#elif defined(__AVX2__)
  return {(Vec<double>::Native)_mm256_sqrt_pd((__m256d)vector.value)};
#elif defined(__SSE2__)
  return {(Vec<double>::Native)_mm_sqrt_pd((__m128d)vector.value)};
#else
  for (int i = 0; i < Vec<double>::kWidth; ++i) vector.value[i] = std::sqrt(vector.value[i]);
  return vector;
#endif
}

template <class T>
HOST_DEVICE Vec<T> unfused(Vec<T> vector) {
  return {unfused(vector.value)};
}

// load_as<V>: one value or a vector of them, from storage of any kind. store: the way back.

template <class V, class Storage>
struct Lanes {  // V is a scalar
  static HOST_DEVICE V load(const Storage* source) { return fastopt::load(source); }
};

template <class T>
struct Lanes<Vec<T>, T> {
  static HOST_DEVICE Vec<T> load(const T* source) {
    Vec<T> result;
    memcpy(&result, source, sizeof result);
    return result;
  }
};

template <class T>
HOST_DEVICE void store(T* target, Vec<T> vector) {
  memcpy(target, &vector, sizeof vector);
}

constexpr int kFloatLanes = Vec<float>::kWidth;
typedef uint32_t Bits32 __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));

// 16 bits to 32 and back, exact: GCC 12 compiles __builtin_convertvector to twice the instructions.
HOST_DEVICE Bits32 widened(const void* source) {
#if defined(__AVX512F__)
  return (Bits32)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)source));
#elif defined(__AVX2__)
  return (Bits32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)source));
#else
  Bits16 bits;
  memcpy(&bits, source, sizeof bits);
  return __builtin_convertvector(bits, Bits32);
#endif
}

HOST_DEVICE void store_narrowed(void* target, Bits32 bits) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)target, _mm512_cvtepi32_epi16((__m512i)bits));
#elif defined(__AVX2__)
  const __m256i wide = (__m256i)bits;
  _mm_storeu_si128((__m128i*)target, _mm_packus_epi32(_mm256_castsi256_si128(wide),
                                                      _mm256_extracti128_si256(wide, 1)));
#else
  const Bits16 narrow = __builtin_convertvector(bits, Bits16);
  memcpy(target, &narrow, sizeof narrow);
#endif
}

template <>
struct Lanes<Vec<float>, BFloat16> {
  static HOST_DEVICE Vec<float> load(const BFloat16* source) {
    return {(Vec<float>::Native)(widened(source) << 16)};
  }
};

// As store(BFloat16*, float) in core/dtypes.h.
HOST_DEVICE void store(BFloat16* target, Vec<float> vector) {
  const Bits32 bits = (Bits32)vector.value;
#if defined(__AVX512BF16__)
  // The instruction takes subnormal numbers for zeros.
  const __m512i exponent = _mm512_set1_epi32(0x7F800000);
  const __mmask16 tiny = _mm512_testn_epi32_mask((__m512i)bits, exponent);
  if (__builtin_expect(
          _mm512_mask_test_epi32_mask(tiny, (__m512i)bits, _mm512_set1_epi32(0x007FFFFF)) == 0,
          true)) {
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)vector.value);
    memcpy(target, &rounded, sizeof rounded);
    return;
  }
#endif
  const Bits32 rounded = bits + 0x7FFFu + ((bits >> 16) & 1u);
  const Bits32 quiet_nan = bits | 0x00400000u;
  store_narrowed(target, (vector.value != vector.value ? quiet_nan : rounded) >> 16);
}

template <>
struct Lanes<Vec<float>, Half> {
  static HOST_DEVICE Vec<float> load(const Half* source) {
#if defined(__AVX512F__)
    return {(Vec<float>::Native)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)source))};
#elif defined(__F16C__)
    return {(Vec<float>::Native)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)source))};
#else
    Vec<float> result;
    for (int i = 0; i < kFloatLanes; ++i) result.value[i] = fastopt::load(source + i);
    return result;
#endif
  }
};

HOST_DEVICE void store(Half* target, Vec<float> vector) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)target,
                      _mm512_cvtps_ph((__m512)vector.value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)target,
                   _mm256_cvtps_ph((__m256)vector.value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kFloatLanes; ++i) store(target + i, vector.value[i]);
#endif
}

template <class V, class Storage>
HOST_DEVICE V load_as(const Storage* source) {
  return Lanes<V, Storage>::load(source);
}

// Of `count` elements, fewer than a vector has: the other lanes are zero, nothing beyond is
// touched.
template <class V, class Storage>
HOST_DEVICE V load_first(const Storage* source, int64_t count) {
  Storage lanes[V::kWidth] = {};
  memcpy(lanes, source, count * sizeof(Storage));
  return load_as<V>(lanes);
}

template <class V, class Storage>
HOST_DEVICE void store_first(Storage* target, V vector, int64_t count) {
  Storage lanes[V::kWidth];
  store(lanes, vector);
  memcpy(target, lanes, count * sizeof(Storage));
}

// 0 and 1 as numbers, of bytes.
template <class T>
struct Lanes<Vec<T>, uint8_t> {
  static HOST_DEVICE Vec<T> load(const uint8_t* source) {
    Vec<T> result;
    for (int i = 0; i < Vec<T>::kWidth; ++i) result.value[i] = source[i];
    return result;
  }
};
HOST_DEVICE Vec<float> multiply_add(Vec<float> factor, float other, float summand) {
  return factor * other + summand;
}
HOST_DEVICE Bits32 bits_of(Vec<float> vector) { return (Bits32)vector.value; }

HOST_DEVICE Bits32 load_bits(const uint32_t* source) {
  Bits32 bits;
  memcpy(&bits, source, sizeof bits);
  return bits;
}

// The lower and the upper halves, as 16-bit words in memory.
HOST_DEVICE void store_low_halves(void* target, Bits32 bits) {
#if defined(__AVX512F__)
  store_narrowed(target, bits);
#else
  store_narrowed(target, bits & 0xFFFFu);
#endif
}
HOST_DEVICE void store_high_halves(void* target, Bits32 bits) {
#if defined(__AVX512F__)
  // Words 1, 3, 5, ...: one instruction, where a shift and a conversion are three.
  static constexpr uint16_t kOdd[32] = {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31};
  const __m512i upper = _mm512_permutexvar_epi16(_mm512_loadu_si512(kOdd), (__m512i)bits);
  _mm256_storeu_si256((__m256i*)target, _mm512_castsi512_si256(upper));
#else
  store_narrowed(target, bits >> 16);
#endif
}

HOST_DEVICE Bits32 unless_nan(Vec<float> vector, Bits32 bits) {
#if defined(__AVX512F__)
  const __m512i quiet_for_nan = _mm512_set1_epi32(0x22);  // as the instruction's tables go
  return (Bits32)_mm512_fixupimm_ps((__m512)bits, (__m512)vector.value, quiet_for_nan, 0);
#else
  return vector.value != vector.value ? (Bits32)vector.value | 0x00400000u : bits;
#endif
}

// Bytes to 32 bits, extended by their sign or by zeros.
template <bool kSigned>
HOST_DEVICE Bits32 load_bytes(const uint8_t* source) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128((const __m128i*)source);
  return (Bits32)(kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)source);
  return (Bits32)(kSigned ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
  Bits32 bits;
  for (int i = 0; i < kFloatLanes; ++i) {
    bits[i] = kSigned ? static_cast<uint32_t>(static_cast<int8_t>(source[i])) : source[i];
  }
  return bits;
#endif
}
// The lowest bytes of four vectors, of which no other is to be set.
HOST_DEVICE void store_bytes(uint8_t* target, const Bits32 (&bits)[4]) {
#if defined(__AVX512F__)
  const __m512i pairs[2] = {_mm512_packus_epi32((__m512i)bits[0], (__m512i)bits[1]),
                            _mm512_packus_epi32((__m512i)bits[2], (__m512i)bits[3])};
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_packus_epi16(pairs[0], pairs[1]);
  _mm512_storeu_si512(target, _mm512_maskz_permutexvar_epi32(0xFFFF, order, bytes));
#elif defined(__AVX2__)
  const __m256i pairs[2] = {_mm256_packus_epi32((__m256i)bits[0], (__m256i)bits[1]),
                            _mm256_packus_epi32((__m256i)bits[2], (__m256i)bits[3])};
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_packus_epi16(pairs[0], pairs[1]);
  _mm256_storeu_si256((__m256i*)target, _mm256_permutevar8x32_epi32(bytes, order));
#else
  for (int k = 0; k < 4; ++k) {
    for (int i = 0; i < kFloatLanes; ++i) {
      target[k * kFloatLanes + i] = static_cast<uint8_t>(bits[k][i]);
    }
  }
#endif
}

// 0, 1, 2, ...
template <class V>
HOST_DEVICE V lane_numbers() {
  V result;
  for (int i = 0; i < V::kWidth; ++i) result.value[i] = i;
  return result;
}

template <class T>
HOST_DEVICE Vec<T> unless_zero(Vec<T> gate, Vec<T> value, T otherwise) {
  const typename Vec<T>::Native others = typename Vec<T>::Native{} + otherwise;
  return {gate.value != 0 ? value.value : others};
}

// All lanes in one, by halves.
template <class T, int kLanes, class Native, class Join>
HOST_DEVICE T joined_lanes(const Native& lanes, const Join& join) {
  if constexpr (kLanes == 1) {
    return lanes[0];
  } else {
    typedef T Half __attribute__((vector_size(kLanes / 2 * sizeof(T))));
    Half halves[2];
    memcpy(halves, &lanes, sizeof halves);
    return joined_lanes<T, kLanes / 2>(join(halves[0], halves[1]), join);
  }
}
template <class T>
HOST_DEVICE T sum_of_lanes(Vec<T> vector) {
  return joined_lanes<T, Vec<T>::kWidth>(vector.value, [](auto a, auto b) { return a + b; });
}
template <class T>
HOST_DEVICE T largest_lane(Vec<T> vector) {
  return joined_lanes<T, Vec<T>::kWidth>(vector.value,
                                         [](auto a, auto b) { return b > a ? b : a; });
}
HOST_DEVICE uint32_t largest_lane(Bits32 bits) {
  return joined_lanes<uint32_t, kFloatLanes>(bits, [](auto a, auto b) { return b > a ? b : a; });
}

// The doubles in a vector of T.
template <class T>
constexpr int kDoubles = Vec<T>::kWidth / Vec<double>::kWidth;

HOST_DEVICE void widen(Vec<double> vector, Vec<double>* halves) { halves[0] = vector; }
// GCC 12 makes a dozen shuffles of __builtin_convertvector.
HOST_DEVICE void widen(Vec<float> vector, Vec<double>* halves) {
#if defined(__AVX512F__)
  const __m512 floats = (__m512)vector.value;
  halves[0] = {(Vec<double>::Native)_mm512_cvtps_pd(_mm512_castps512_ps256(floats))};
  halves[1] = {(Vec<double>::Native)_mm512_cvtps_pd(_mm512_extractf32x8_ps(floats, 1))};
#elif defined(__AVX2__)
  const __m256 floats = (__m256)vector.value;
  halves[0] = {(Vec<double>::Native)_mm256_cvtps_pd(_mm256_castps256_ps128(floats))};
  halves[1] = {(Vec<double>::Native)_mm256_cvtps_pd(_mm256_extractf128_ps(floats, 1))};
#else
  typedef float Half __attribute__((vector_size(kVectorBytes / 2)));
  Half parts[2];
  memcpy(parts, &vector, sizeof vector);
  for (int h = 0; h < 2; ++h) {
    halves[h] = {__builtin_convertvector(parts[h], Vec<double>::Native)};
  }
#endif
}

// Calls body(i, V()) for all i in [0, n): with V a vector while one fits, then with V = T.
template <class T, class Body>
HOST_DEVICE void for_each_lanes(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + Vec<T>::kWidth <= n; i += Vec<T>::kWidth) body(i, Vec<T>());
  for (; i < n; ++i) body(i, T());
}

// While it lives, this thread takes subnormal numbers for zeros: arithmetic on one costs hundreds
// of cycles, and a state that fades away runs through them.
class SubnormalsFlushed {
 public:
#if defined(__SSE2__)
  SubnormalsFlushed() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
  ~SubnormalsFlushed() { _mm_setcsr(before_); }

 private:
  unsigned before_;
#else
  SubnormalsFlushed() {}
#endif
};

FASTOPT_END_NAMESPACE
