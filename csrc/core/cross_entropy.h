#pragma once

#include <cstdint>
#include <limits>

#include "core/activations.h"
#include "core/dtypes.h"

namespace fastopt {

// Cross-entropy of rows of logits. Numbers beside the logits are of the arithmetic type: double for
// logits in double precision, float for all others.
struct CrossEntropyCall {
  DType dtype;  // of the logits
  int64_t rows, classes;
  void* logits;  // [rows, classes]; with loss_scale, their gradients afterwards
  int64_t row_stride;
  const int64_t* targets;     // [rows]; nullptr: the targets are probabilities
  const void* probabilities;  // [rows, classes]
  const void* class_weights;  // [classes]; nullptr: all are 1
  const void* loss_scale;     // [rows]: the gradient of each loss; nullptr: no gradients are wanted
  const void* z_scale;        // [rows]: that of each logsumexp^2; nullptr: zeros
  int64_t ignore_index;       // a row of this target has loss, logsumexp and gradients of zero
  double label_smoothing, softcap;
  void* losses;      // [rows]
  void* logsumexps;  // [rows]
};

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

// Constants: device code may not call what gives them.
template <class T>
struct NumbersOf {
  static constexpr T kInfinity = std::numeric_limits<T>::infinity();
  static constexpr T kSmallest = std::numeric_limits<T>::min();  // that is normal
  static constexpr T kLargest = std::numeric_limits<T>::max();
};

// With the logits z of a row,
//   s_c = softcap * tanh(z_c / softcap), or z_c without a cap,
//   q_c = weight_c * ((1 - label_smoothing) * p_c + label_smoothing / classes),
// where p_c are the target's probabilities, 1 for its index and 0 for others:
//   loss = sum of q_c * (logsumexp(s) - s_c).

// Where q_c comes from, but for the index's own share.
enum class Shares {
  kNone,     // nowhere: an index, not smoothed
  kUniform,  // label_smoothing / classes
  kGiven,    // class weights, probabilities or both are read
};

inline Shares shares_of(const CrossEntropyCall& call) {
  if (call.probabilities) return Shares::kGiven;
  if (call.label_smoothing == 0) return Shares::kNone;
  return call.class_weights ? Shares::kGiven : Shares::kUniform;
}

// V is a scalar T or a vector of them.
template <class T>
struct CrossEntropyRule {
  T softcap, uniform, certain;  // uniform + certain * probability
  const T* class_weights;
  const T* probabilities;  // [rows, classes]

  HOST_DEVICE explicit CrossEntropyRule(const CrossEntropyCall& call)
      : softcap(has_reciprocal(call.softcap) ? static_cast<T>(call.softcap) : T(0)),
        uniform(static_cast<T>(call.label_smoothing / static_cast<double>(call.classes))),
        certain(static_cast<T>(1 - call.label_smoothing)),
        class_weights(static_cast<const T*>(call.class_weights)),
        probabilities(static_cast<const T*>(call.probabilities)) {}

  template <class V>
  HOST_DEVICE V capped(V logit) const {
    return softcap != 0 ? hyperbolic_tangent<T>(logit * (T(1) / softcap)) * softcap : logit;
  }
  // Of the gradient with respect to s, the one with respect to z.
  template <class V>
  HOST_DEVICE V through_cap(V score, V gradient) const {
    if (softcap == 0) return gradient;
    const V saturation = score * (T(1) / softcap);
    return gradient * (V{} + T(1) - saturation * saturation);
  }
  // The share of an index in its own q_c.
  HOST_DEVICE T certain_share(int64_t target) const {
    return class_weights ? certain * class_weights[target] : certain;
  }

 private:
  // No cap has none, and one that is so far away that it does not matter.
  HOST_DEVICE static bool has_reciprocal(double cap) {
    const double reciprocal = 1 / cap;
    return reciprocal >= static_cast<double>(NumbersOf<T>::kSmallest) &&
           reciprocal <= static_cast<double>(NumbersOf<T>::kLargest);
  }
};

// What is gathered of a row on the way to its loss.
template <class T>
struct RowSums {
  T largest = -NumbersOf<T>::kInfinity;
  T exponentials = 0;  // sum of e^(s_c - largest)
  T shares = 0;        // sum of q_c
  T scores = 0;        // sum of q_c * (s_c - a shift that the whole row has)

  // e^(s - largest) for another, larger one.
  HOST_DEVICE void raise(T now_largest) {
    if (exponentials != 0) exponentials *= exponential<T>(largest - now_largest);
    largest = now_largest;
  }
  HOST_DEVICE RowSums joined(RowSums other) const {
    RowSums sums = *this;
    const T together = maximum(largest, other.largest);
    sums.raise(together);
    other.raise(together);
    sums.exponentials += other.exponentials;
    sums.shares += other.shares;
    sums.scores += other.scores;
    return sums;
  }
};

// A logit that sums of scores are counted from: they do not cancel where all logits are large.
template <class T>
HOST_DEVICE T score_shift(T first_score) {
  return magnitude(first_score) < NumbersOf<T>::kInfinity ? first_score : T(0);
}

// Loss and logsumexp of a row, and what the gradients of its logits have in common.
template <class T>
struct RowResult {
  T loss, logsumexp;
  T largest, factor;  // the gradient is factor * e^(s_c - largest) - loss_scale * q_c

  // `certain` is the share of the target's index and `target_score` its s_c; zeros without one.
  HOST_DEVICE RowResult(const RowSums<T>& sums, T shift, T certain, T target_score, T loss_scale,
                        T z_scale)
      : largest(sums.largest) {
    const T log_sum = std::log(sums.exponentials);
    logsumexp = sums.largest + log_sum;
    loss = 0;
    if (certain != 0) loss += certain * ((sums.largest - target_score) + log_sum);
    if (sums.shares != 0) loss += sums.shares * ((sums.largest - shift) + log_sum) - sums.scores;
    const T wanted = loss_scale * (certain + sums.shares) + 2 * z_scale * logsumexp;
    factor = wanted / sums.exponentials;
  }

  // The gradient of a logit whose scaled share is loss_scale * q_c.
  template <class V>
  HOST_DEVICE V gradient(const CrossEntropyRule<T>& rule, V logit, V scaled_share) const {
    const V score = rule.capped(logit);
    return rule.through_cap(score, exponential<T>(score - largest) * factor - scaled_share);
  }
};

FASTOPT_END_NAMESPACE
