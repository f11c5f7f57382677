#pragma once

#include <cstdint>
#include <limits>

#include "core/activations.h"
#include "core/philox.h"
#include "cpu/attention.h"
#include "cpu/gemm.h"
#include "cpu/team.h"
#include "cpu/workspace.h"

FASTOPT_BEGIN_NAMESPACE

// Words of random numbers come in groups of 64 keys: lane l of a group makes those of its keys
// l, l + 16, l + 32 and l + 48.
constexpr int kRandomLanes = 16, kRandomGroup = 4 * kRandomLanes;

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

// Words of the keys [begin, end) of one row, both multiples of kRandomGroup.
inline void random_row(uint64_t seed, int64_t head, int64_t row, int64_t begin, int64_t end,
                       uint32_t* words) {
  using Word = WideLanes::Word;
  for (int64_t group = begin / kRandomGroup; group < end / kRandomGroup; ++group) {
    uint32_t* target = words + group * kRandomGroup - begin;
    for (int lane = 0; lane < kRandomLanes; lane += WideLanes::kWidth) {
      Word lanes{};
      for (int i = 0; i < WideLanes::kWidth; ++i) {
        lanes[i] = static_cast<uint32_t>(group * kRandomLanes + lane + i);
      }
      Word counter[4] = {lanes, Word{} + static_cast<uint32_t>(row),
                         Word{} + static_cast<uint32_t>(head), Word{}};
      philox<WideLanes>(counter, seed);
      for (int i = 0; i < 4; ++i) {
        const WideLanes::Narrow narrow = __builtin_convertvector(counter[i], WideLanes::Narrow);
        memcpy(target + i * kRandomLanes + lane, &narrow, sizeof narrow);
      }
    }
  }
}

HOST_DEVICE int64_t rounded_down(int64_t value, int64_t grain) { return value / grain * grain; }
HOST_DEVICE int64_t rounded_up(int64_t value, int64_t grain) {
  return (value + grain - 1) / grain * grain;
}

// What two ranges have in common; nothing is {place, place}.
HOST_DEVICE Range common(Range left, Range right, int64_t place = 0) {
  const int64_t begin = left.begin > right.begin ? left.begin : right.begin;
  const int64_t end = left.end < right.end ? left.end : right.end;
  return begin < end ? Range{begin, end} : Range{place, place};
}

// What the softmax needs of a layer, and the geometry of its tiles.
template <class Storage>
struct AttentionWalk {
  using T = ComputeType<Storage>;
  using F = typename FactorOf<Storage>::type;
  static constexpr int64_t kSkew = 16;  // rows a power of two apart would share cache sets
  static constexpr int64_t kPanel = Tiling<T>::kPanel;
  static constexpr int kMostThreads = 64;

  static int threads(const AttentionLayer& layer) {
    return layer.threads < kMostThreads ? layer.threads : kMostThreads;
  }

  const AttentionLayer& layer;

  // Where row `number` of a head begins, for tensors that are read and for those that are written.
  static const Storage* row(const AttentionTensor& tensor, int64_t batch, int64_t head,
                            int64_t number) {
    return written_row(tensor, batch, head, number);
  }
  static Storage* written_row(const AttentionTensor& tensor, int64_t batch, int64_t head,
                              int64_t number) {
    return static_cast<Storage*>(tensor.data) + batch * tensor.batch_stride +
           head * tensor.head_stride + number * tensor.row_stride;
  }
  int64_t key_head(int64_t head) const { return head / (layer.heads / layer.key_heads); }

  // The keys that a query sees, as far as left and right bound them.
  Range visible(int64_t query) const {
    const int64_t center = query + layer.diagonal;
    int64_t begin = layer.left < 0 ? 0 : center - layer.left;
    int64_t end = layer.right < 0 ? layer.keys : center + layer.right + 1;
    if (begin < 0) begin = 0;
    if (end > layer.keys) end = layer.keys;
    return {begin < end ? begin : end, end < 0 ? 0 : end};
  }
  // Those of any of the queries [begin, end); bounds never move back.
  Range visible(int64_t begin, int64_t end) const {
    return {visible(begin).begin, visible(end - 1).end};
  }

  // Keys of a tile, brought to the panels in which the tile is packed.
  static Range whole_panels(Range keys, Range tile) {
    const int64_t end = tile.begin + rounded_up(keys.end - tile.begin, kPanel);
    return {tile.begin + rounded_down(keys.begin - tile.begin, kPanel),
            end < tile.end ? end : tile.end};
  }
};

// One row of scores.
template <class Storage>
struct ScoreRow {
  using T = ComputeType<Storage>;
  static constexpr T kNever = -std::numeric_limits<T>::infinity();

  T scale, softcap, slope;
  T center;  // the key at no distance, for slopes
  const Storage* bias;
  const uint8_t* allowed;

  ScoreRow(const AttentionLayer& layer, int64_t batch, int64_t head, int64_t query)
      : scale(static_cast<T>(layer.scale)),
        softcap(static_cast<T>(layer.softcap)),
        slope(0),
        center(static_cast<T>(query + layer.diagonal)),
        bias(nullptr),
        allowed(nullptr) {
    const int64_t place = batch * layer.mask_strides[0] + head * layer.mask_strides[1] +
                          query * layer.mask_strides[2];
    if (layer.bias) bias = static_cast<const Storage*>(layer.bias) + place;
    if (layer.allowed) allowed = layer.allowed + place;
    if (layer.slopes) slope = layer.slopes[batch * layer.slope_batch_stride + head];
  }

  // e^(score - reference)
  template <class V>
  static HOST_DEVICE V weight(V score, T reference) {
    constexpr T kLog2E = static_cast<T>(1.44269504088896340735992468100189);
    return exponential_of_two<T>((score - reference) * kLog2E);
  }

  bool is_plain() const { return softcap == 0 && slope == 0 && !bias && !allowed; }

  // tanh(scale * product / softcap), where there is a cap.
  template <class V>
  HOST_DEVICE V saturation(V product) const {
    return hyperbolic_tangent<T>(product * (scale / softcap));
  }

  // The score of key `column` and, for a vector, of those after it.
  template <bool kPlain, class V>
  HOST_DEVICE V score(V product, int64_t column) const {
    if (kPlain) return product * scale;
    V result = softcap != 0 ? saturation(product) * softcap : product * scale;
    if (slope != 0) {
      const V distance = lane_numbers<V>() + (static_cast<T>(column) - center);
      result = result - magnitude(distance) * slope;
    }
    if (bias) result = result + load_as<V>(bias + column);
    if (allowed) result = unless_zero(load_as<V>(allowed + column), result, kNever);
    return result;
  }
};

// Factors of dropout for the keys [begin, end) of a row: 0, or 1 / (1 - dropout).
template <class T>
void dropout_factors(const AttentionLayer& layer, int64_t head, int64_t row, Range keys,
                     uint32_t* words, T* factors) {
  const int64_t begin = rounded_down(keys.begin, kRandomGroup);
  random_row(layer.seed, head, row, begin, rounded_up(keys.end, kRandomGroup), words);
  const uint32_t threshold = static_cast<uint32_t>(layer.dropout * 4294967296.0);
  const T kept = static_cast<T>(1 / (1 - layer.dropout));
  const uint32_t* own = words + (keys.begin - begin);
  for (int64_t i = 0; i < keys.end - keys.begin; ++i) {
    factors[i] = own[i] >= threshold ? kept : T(0);
  }
}

template <class F>
HOST_DEVICE void store_zeros(F* target, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store(target + i, ComputeType<F>(0));
}

// Copies rows as factors, with zeros up to whole words.
template <class F, class Storage>
void gather_rows(const Storage* source, int64_t source_stride, int64_t rows, int64_t count,
                 F* target, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    convert_row(source + row * source_stride, count, target + row * stride);
  }
  fill_last_words(target, rows, stride, count);
}

FASTOPT_END_NAMESPACE
