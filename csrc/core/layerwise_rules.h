#pragma once

#include <cmath>

#include "core/update_rules.h"

namespace fastopt {

// Sums of squares over a parameter, or a part of it.
struct Squares {
  double param = 0, direction = 0;
};

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

// Rules whose step hangs on the whole parameter. They are rules as those of update_rules.h, whose
// loops step them; where kLayerwise is true, a pass before sums the squares of every parameter and
// of its direction, and folds both into the parameter's functor with fold_squares. That pass writes
// nothing: direction() finds state, gradient and parameter again as they were.

// You et al. 2020, "Large Batch Optimization for Deep Learning", algorithm 2, with apex's options
// m <- beta1 * m + gradient_weight * g
// v <- beta2 * v + (1 - beta2) * g^2
// r <- m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
// p <- p - lr * |p| / |r| * r    (kTrusts, and neither norm is zero)
// p <- p - lr * r                (otherwise)
template <class T, bool kTrusts>
struct Lamb {
  static constexpr const char* kName = kTrusts ? "lamb" : "lamb_without_trust";
  static constexpr int kSlots = 2;
  static constexpr unsigned kPositiveSlots = 0b10;
  static constexpr bool kLayerwise = kTrusts;
  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, gradient_weight, corrects_bias;
  };

  T step_size, beta1, gradient_weight;
  SecondMoment<T> average_square;
  T moment_scale, eps, weight_decay;

  HOST_DEVICE Lamb(const Hyperparameters& h, const Progress& now)
      : step_size(static_cast<T>(h.lr)),
        beta1(static_cast<T>(h.beta1)),
        gradient_weight(static_cast<T>(h.gradient_weight)),
        average_square(h.beta2),
        weight_decay(static_cast<T>(h.weight_decay)) {
    const bool corrects = h.corrects_bias != 0;
    const double first = corrects ? 1 - std::pow(h.beta1, now.step) : 1;
    const double root = corrects ? std::sqrt(1 - std::pow(h.beta2, now.step)) : 1;
    moment_scale = static_cast<T>(root / first);
    eps = static_cast<T>(h.eps * root);
  }

  HOST_DEVICE void fold_squares(const Squares& sum) {
    if (sum.param != 0 && sum.direction != 0) {
      step_size = static_cast<T>(step_size * std::sqrt(sum.param / sum.direction));
    }
  }

  template <class V>
  HOST_DEVICE V direction(V param, V grad, V* slot) const {
    V& first_moment = slot[0];
    V& second_moment = slot[1];
    first_moment = beta1 * first_moment + unfused(gradient_weight * grad);
    second_moment = average_square(second_moment, grad);
    return moment_scale * first_moment / (square_root(second_moment) + eps) + weight_decay * param;
  }

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    param = param - step_size * direction(param, grad, slot);
  }
};

// The update of one element as far as it is measured, in the place of a rule in update_element.
// `add` takes the parameter and its direction.
template <class Rule, class Add>
struct Measured {
  const Rule& rule;
  const Add& add;

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    add(param, rule.direction(param, grad, slot));
  }
};

FASTOPT_END_NAMESPACE
