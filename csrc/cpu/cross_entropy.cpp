#include "cpu/cross_entropy.h"

#include <type_traits>

#include "cpu/portions.h"
#include "cpu/simd.h"

FASTOPT_BEGIN_NAMESPACE

namespace {

// Elements whose largest one is sought before their exponentials are added: they stay in L1.
constexpr int64_t kBlock = 512;

// A sum over vectors and over the scalars that a row ends with.
template <class T>
struct LaneSum {
  Vec<T> lanes{};
  T rest = 0;

  HOST_DEVICE void add(Vec<T> value) { lanes = lanes + value; }
  HOST_DEVICE void add(T value) { rest += value; }
  HOST_DEVICE T total() const { return rest + sum_of_lanes(lanes); }
};

template <class Storage, Shares kShares>
class RowPass {
 public:
  using T = ComputeType<Storage>;

  explicit RowPass(const CrossEntropyCall& call) : call_(call), rule_(call) {}

  void run(int64_t row) const {
    Storage* logits = static_cast<Storage*>(call_.logits) + row * call_.row_stride;
    T* const loss = static_cast<T*>(call_.losses) + row;
    T* const logsumexp = static_cast<T*>(call_.logsumexps) + row;
    T certain = 0, target_logit = 0;
    if (call_.targets) {
      const int64_t target = call_.targets[row];
      if (target == call_.ignore_index) {
        *loss = *logsumexp = 0;
        if (call_.loss_scale) memset(logits, 0, call_.classes * sizeof(Storage));
        return;
      }
      certain = rule_.certain_share(target);
      target_logit = load(logits + target);
    }
    const T shift = score_shift(rule_.capped(static_cast<T>(load(logits))));
    const T loss_scale = scale_of(call_.loss_scale, row), z_scale = scale_of(call_.z_scale, row);
    const RowResult<T> result(gathered(logits, row, shift), shift, certain,
                              rule_.capped(target_logit), loss_scale, z_scale);
    *loss = result.loss;
    *logsumexp = result.logsumexp;
    if (!call_.loss_scale) return;
    for_each_lanes<T>(call_.classes, [&](int64_t i, auto lanes) {
      using V = decltype(lanes);
      const V share = shares<V>(row, i) * loss_scale;
      store(logits + i, result.gradient(rule_, load_as<V>(logits + i), share));
    });
    if (call_.targets) {
      const int64_t target = call_.targets[row];
      const T share = (shares<T>(row, target) + certain) * loss_scale;
      store(logits + target, result.gradient(rule_, target_logit, share));
    }
  }

 private:
  static T scale_of(const void* scales, int64_t row) {
    return scales ? static_cast<const T*>(scales)[row] : T(0);
  }

  // q of one class or of several, but for the index's own share.
  template <class V>
  HOST_DEVICE V shares(int64_t row, int64_t first) const {
    if constexpr (kShares == Shares::kNone) return V{};
    V share = V{} + rule_.uniform;
    if constexpr (kShares == Shares::kGiven) {
      if (rule_.probabilities) {
        const T* probabilities = rule_.probabilities + row * call_.classes + first;
        share = share + load_as<V>(probabilities) * rule_.certain;
      }
      if (rule_.class_weights) share = share * load_as<V>(rule_.class_weights + first);
    }
    return share;
  }

  RowSums<T> gathered(const Storage* logits, int64_t row, T shift) const {
    RowSums<T> sums;
    LaneSum<T> of_shares, of_scores;
    for (int64_t first = 0; first < call_.classes; first += kBlock) {
      const int64_t left = call_.classes - first, size = left < kBlock ? left : kBlock;
      const Storage* block = logits + first;
      const T largest = rule_.capped(largest_of(block, size));  // a cap keeps the order
      // Nothing but logits of minus infinity adds nothing.
      if (!(largest <= sums.largest)) sums.raise(largest);
      LaneSum<T> exponentials;
      for_each_lanes<T>(size, [&](int64_t i, auto lanes) {
        using V = decltype(lanes);
        const V score = rule_.capped(load_as<V>(block + i));
        exponentials.add(exponential<T>(score - sums.largest));
        if constexpr (kShares != Shares::kNone) {
          const V share = shares<V>(row, first + i);
          of_shares.add(share);
          of_scores.add((score - shift) * share);
        }
      });
      if (sums.largest != -NumbersOf<T>::kInfinity) {
        sums.exponentials += exponentials.total();
      }
    }
    sums.shares = of_shares.total();
    sums.scores = of_scores.total();
    return sums;
  }

  HOST_DEVICE static T largest_of(const Storage* block, int64_t size) {
    Vec<T> lanes = Vec<T>{} + -NumbersOf<T>::kInfinity;
    T rest = -NumbersOf<T>::kInfinity;
    for_each_lanes<T>(size, [&](int64_t i, auto kind) {
      using V = decltype(kind);
      const V values = load_as<V>(block + i);
      if constexpr (std::is_same_v<V, T>) {
        rest = maximum(rest, values);
      } else {
        lanes = maximum(lanes, values);
      }
    });
    for (int lane = 0; lane < Vec<T>::kWidth; ++lane) {
      rest = maximum(rest, static_cast<T>(lanes.value[lane]));
    }
    return rest;
  }

  const CrossEntropyCall& call_;
  const CrossEntropyRule<T> rule_;
};

template <class Storage, Shares kShares>
void run_rows(const CrossEntropyCall& call, int threads) {
  const RowPass<Storage, kShares> pass(call);
  constexpr int64_t kTile = 512;                               // of useful_threads
  const int64_t tiles = call.rows * call.classes / kTile * 4;  // an exponential is four of AdamW's
  for_each_portion(useful_threads(tiles, threads), call.rows, [&](int64_t begin, int64_t end) {
    const SubnormalsFlushed flushed;
    for (int64_t row = begin; row < end; ++row) pass.run(row);
  });
}

template <class Storage>
void rows_of(const CrossEntropyCall& call, int threads) {
  switch (shares_of(call)) {
    case Shares::kNone:
      return run_rows<Storage, Shares::kNone>(call, threads);
    case Shares::kUniform:
      return run_rows<Storage, Shares::kUniform>(call, threads);
    case Shares::kGiven:
      return run_rows<Storage, Shares::kGiven>(call, threads);
  }
}

void rows(const CrossEntropyCall& call, int threads) {
  static void (*const kRun[kDTypes])(const CrossEntropyCall&, int) = {
      rows_of<float>, rows_of<double>, rows_of<BFloat16>, rows_of<Half>};
  kRun[static_cast<int>(call.dtype)](call, threads);
}

}  // namespace

extern const CrossEntropyKernels kCrossEntropyKernels;
const CrossEntropyKernels kCrossEntropyKernels = {rows};

FASTOPT_END_NAMESPACE
