#pragma once

#include <cmath>
#include <cstdint>
#include <tuple>

#include "core/elementary.h"

namespace fastopt {

// How a parameter is pulled towards zero. Rules do not know of it: the loop around them applies
// it, and the sign and scale of the gradient, before it calls the rule.
enum class WeightDecay : int32_t {
  kL2,         // gradient += weight_decay * parameter
  kDecoupled,  // parameter *= 1 - lr * weight_decay (Loshchilov and Hutter 2019)
};

constexpr int kMaxSlots = 3;            // state tensors of one parameter: amsgrad has three
constexpr int kMaxHyperparameters = 6;  // scalars that a front passes to its rule
constexpr int kFunctorBytes = 64;       // of a rule with its scalars folded

struct UpdateRuleInfo {
  const char* name;
  int slots;
  int hyperparameters;
};

}  // namespace fastopt

FASTOPT_BEGIN_NAMESPACE

// from + weight * (to - from), computed from the nearer end as torch.lerp does: near 1 the plain
// form would keep rounding errors of the size of `from`.
template <class T>
struct Lerp {
  T coefficient;
  bool nearer_to_end;

  HOST_DEVICE explicit Lerp(double weight)
      : coefficient(static_cast<T>(weight < 0.5 ? weight : weight - 1)),
        nearer_to_end(weight >= 0.5) {}

  template <class V>
  HOST_DEVICE V operator()(V from, V to) const {
    return (nearer_to_end ? to : from) + coefficient * (to - from);
  }
};

// The value brought into [-limit, limit]; a NaN stays.
template <class T>
struct Clamp {
  T limit;

  HOST_DEVICE explicit Clamp(double limit) : limit(static_cast<T>(limit)) {}

  template <class V>
  HOST_DEVICE V operator()(V value) const {
    const V upper = V() + limit, lower = V() - limit;
    return minimum(upper, maximum(lower, value));
  }
};

// Each rule is a functor for one element, or a vector V of elements, in the arithmetic type T. Its
// constructor folds the hyperparameters, given as doubles in the order of its Hyperparameters, and
// the number of the step, counted from 1; `slot` holds the element's state, kSlots values.

// p <- p - lr * g
template <class T>
struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr int kSlots = 0;
  struct Hyperparameters {
    double lr;
  };

  T lr;

  HOST_DEVICE Sgd(const Hyperparameters& h, double /*step*/) : lr(static_cast<T>(h.lr)) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* /*slot*/) const {
    param = param - lr * grad;
  }
};

// b <- momentum * b + gradient_weight * g
// p <- p - step_size * b                                              (Polyak 1964)
// p <- p - step_size * (undamped_gradient_weight * g + momentum * b)  (Nesterov 1983)
// torch's form has step_size = lr, gradient_weight = 1 - dampening, undamped_gradient_weight = 1.
// The classical form has step_size = 1 and both weights = lr: the learning rate enters the buffer.
// The first gradient enters the buffer undamped, as torch copies it there.
template <class T, bool kNesterov>
struct Momentum {
  static constexpr const char* kName = kNesterov ? "nesterov" : "momentum";
  static constexpr int kSlots = 1;
  struct Hyperparameters {
    double step_size, momentum, gradient_weight, undamped_gradient_weight;
  };

  T step_size, momentum, buffer_decay, gradient_weight, undamped_gradient_weight;

  HOST_DEVICE Momentum(const Hyperparameters& h, double step)
      : step_size(static_cast<T>(h.step_size)),
        momentum(static_cast<T>(h.momentum)),
        buffer_decay(static_cast<T>(step == 1 ? 0 : h.momentum)),
        gradient_weight(static_cast<T>(step == 1 ? h.undamped_gradient_weight : h.gradient_weight)),
        undamped_gradient_weight(static_cast<T>(h.undamped_gradient_weight)) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& buffer = slot[0];
    buffer = buffer_decay * buffer + gradient_weight * grad;
    const V update = kNesterov ? undamped_gradient_weight * grad + momentum * buffer : buffer;
    param = param - step_size * update;
  }
};

// Kingma and Ba 2015; with kAmsgrad the second moment's running maximum divides (Reddi et al. 2018)
// m <- m + (1 - beta1) * (g - m)
// v <- beta2 * v + (1 - beta2) * g^2
// p <- p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
template <class T, bool kAmsgrad>
struct Adam {
  static constexpr const char* kName = kAmsgrad ? "amsgrad" : "adam";
  static constexpr int kSlots = kAmsgrad ? 3 : 2;
  struct Hyperparameters {
    double lr, beta1, beta2, eps;
  };

  T step_size;
  Lerp<T> average;
  T beta2, second_weight, inverse_sqrt_correction, eps;

  HOST_DEVICE Adam(const Hyperparameters& h, double step)
      : step_size(static_cast<T>(h.lr / (1 - std::pow(h.beta1, step)))),
        average(1 - h.beta1),
        beta2(static_cast<T>(h.beta2)),
        second_weight(static_cast<T>(1 - h.beta2)),
        inverse_sqrt_correction(static_cast<T>(1 / std::sqrt(1 - std::pow(h.beta2, step)))),
        eps(static_cast<T>(h.eps)) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& first_moment = slot[0];
    V& second_moment = slot[1];
    first_moment = average(first_moment, grad);
    second_moment = beta2 * second_moment + second_weight * grad * grad;
    if (kAmsgrad) slot[2] = maximum(slot[2], second_moment);
    const V divisor = kAmsgrad ? slot[2] : second_moment;
    param =
        param - step_size * first_moment / (square_root(divisor) * inverse_sqrt_correction + eps);
  }
};

// Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2
// p <- p - lr * sign(beta1 * m + (1 - beta1) * g)
// m <- beta2 * m + (1 - beta2) * g
template <class T>
struct Lion {
  static constexpr const char* kName = "lion";
  static constexpr int kSlots = 1;
  struct Hyperparameters {
    double lr, beta1, beta2;
  };

  T lr;
  Lerp<T> update_average, moment_average;

  HOST_DEVICE Lion(const Hyperparameters& h, double /*step*/)
      : lr(static_cast<T>(h.lr)), update_average(1 - h.beta1), moment_average(1 - h.beta2) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& moment = slot[0];
    param = param - lr * sign_of(update_average(moment, grad));
    moment = moment_average(moment, grad);
  }
};

// A rule with what it does not know of: the sign of the gradient, which `maximize` turns, and
// weight decay. `decay` is the weight decay itself, or for the decoupled kind 1 - lr *
// weight_decay.
template <WeightDecay kWeightDecay, class Rule, class T, class V>
HOST_DEVICE void update_element(const Rule& rule, T sign, T decay, V& param, V grad, V* slot) {
  V g = sign * grad;
  if (kWeightDecay == WeightDecay::kL2) {
    g = g + decay * param;
  } else {
    param = decay * param;
  }
  rule(param, g, slot);
}

// Every rule there is: kernels instantiate this list, and the position in it is the rule's number.
template <class T>
using UpdateRules = std::tuple<Sgd<T>, Momentum<T, false>, Momentum<T, true>, Adam<T, false>,
                               Adam<T, true>, Lion<T>>;

FASTOPT_END_NAMESPACE
