#pragma once

#include <limits>

#include "core/activations.h"
#include "core/attention_layer.h"
#include "core/philox.h"

FASTOPT_BEGIN_NAMESPACE

// The score of a key that is not seen.
template <class T>
constexpr T kNever = -std::numeric_limits<T>::infinity();

template <class T>
constexpr T kSmallestNormal = std::numeric_limits<T>::min();

// What the product of a query and a key becomes before biases and masks, in one head:
//   cap(scale * product) - slope * distance
// V is a scalar T or a vector of them.
template <class T>
struct ScoreRule {
  T scale, softcap, slope;

  HOST_DEVICE ScoreRule(const AttentionLayer& layer, int64_t head)
      : scale(static_cast<T>(layer.scale)),
        softcap(static_cast<T>(layer.softcap)),
        slope(layer.slopes ? static_cast<T>(layer.slopes[head]) : T(0)) {
    // A cap so far away that the quotient is no normal number is none.
    if (magnitude(layer.scale) < kSmallestNormal<T> * layer.softcap) softcap = 0;
  }

  // Scores are products times a factor above zero: where one is largest, so is the other.
  HOST_DEVICE bool only_scales() const {
    return softcap == 0 && slope == 0 && scale >= kSmallestNormal<T>;
  }

  // tanh(scale * product / softcap), where there is a cap.
  template <class V>
  HOST_DEVICE V saturation(V product) const {
    return hyperbolic_tangent<T>(product * (scale / softcap));
  }

  template <class V>
  HOST_DEVICE V score(V product, V distance) const {
    V result = softcap != 0 ? saturation(product) * softcap : product * scale;
    if (slope != 0) result = result - magnitude(distance) * slope;
    return result;
  }

  // The gradient with respect to scale * product, of the one with respect to the score.
  template <class V>
  HOST_DEVICE V through_cap(V product, V gradient) const {
    if (softcap == 0) return gradient;
    const V saturated = saturation(product);
    return gradient * (V{} + T(1) - saturated * saturated);
  }
};

// e^(factor * difference)
template <class V, class T>
HOST_DEVICE V exponential_of(V difference, T factor) {
  constexpr T kLog2E = static_cast<T>(1.44269504088896340735992468100189);
  return exponential_of_two<T>(difference * (factor * kLog2E));
}

// Dropout. A weight is dropped where its word of random numbers is below the threshold: that of its
// key, in the row of its query, of its head counted through the batch.

HOST_DEVICE uint32_t dropout_threshold(const AttentionLayer& layer) {
  return static_cast<uint32_t>(layer.dropout * 4294967296.0);
}
template <class T>
HOST_DEVICE T growth_of_kept(const AttentionLayer& layer) {
  return static_cast<T>(1 / (1 - layer.dropout));
}

FASTOPT_END_NAMESPACE
