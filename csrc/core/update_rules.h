#pragma once

#include <cmath>
#include <cstdint>

#include "core/elementary.h"

namespace fastopt {

// How a parameter is pulled towards zero. Rules do not know of it: the loop around them applies
// it, and the sign and scale of the gradient, before it calls the rule.
enum class WeightDecay : int32_t {
  kL2,         // gradient += weight_decay * parameter
  kDecoupled,  // parameter *= 1 - lr * weight_decay (Loshchilov and Hutter 2019)
};

constexpr int kMaxSlots = 3;            // state tensors of one parameter: amsgrad has three
constexpr int kMaxHyperparameters = 7;  // scalars that a front passes to its rule
constexpr int kFunctorBytes = 64;       // of a rule with its scalars folded

struct UpdateRuleInfo {
  const char* name;
  int slots;
  int hyperparameters;
  // By which a parameter's product grows in a step, see Progress; nullptr: the rule keeps none.
  double (*factor)(const double* hyperparameters, double step);
  unsigned positive_slots;  // a bit for each slot that is never negative
  bool layerwise;           // its step hangs on sums over the whole parameter: layerwise_rules.h
  bool takes_codes;         // its state may be stored in codes: state_codes.h
};

// How far a parameter is: what torch keeps beside its state in tensors of one float.
struct Progress {
  double step = 0;     // the number of this step, counted from 1
  double product = 1;  // of the rule's factors, this step's among them

  bool operator==(const Progress& other) const {
    return step == other.step && product == other.product;
  }
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

// v <- beta2 * v + (1 - beta2) * g^2
template <class T>
struct SecondMoment {
  T decay, weight;

  HOST_DEVICE explicit SecondMoment(double beta2)
      : decay(static_cast<T>(beta2)), weight(static_cast<T>(1 - beta2)) {}

  template <class V>
  HOST_DEVICE V operator()(V moment, V grad) const {
    return decay * moment + unfused(weight * grad * grad);
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
// the parameter's progress; `slot` holds the element's state, kSlots values, of which
// kPositiveSlots, where it is there, has a bit for each that is never negative. A rule with a
// member factor(hyperparameters, step) has a product kept for it, whatever the learning rate is.

// p <- p - lr * g
template <class T>
struct Sgd {
  static constexpr const char* kName = "sgd";
  static constexpr int kSlots = 0;
  struct Hyperparameters {
    double lr;
  };

  T lr;

  HOST_DEVICE Sgd(const Hyperparameters& h, const Progress&) : lr(static_cast<T>(h.lr)) {}

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

  HOST_DEVICE Momentum(const Hyperparameters& h, const Progress& now)
      : step_size(static_cast<T>(h.step_size)),
        momentum(static_cast<T>(h.momentum)),
        buffer_decay(static_cast<T>(now.step == 1 ? 0 : h.momentum)),
        gradient_weight(
            static_cast<T>(now.step == 1 ? h.undamped_gradient_weight : h.gradient_weight)),
        undamped_gradient_weight(static_cast<T>(h.undamped_gradient_weight)) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& buffer = slot[0];
    buffer = buffer_decay * buffer + unfused(gradient_weight * grad);
    const V update =
        kNesterov ? undamped_gradient_weight * grad + unfused(momentum * buffer) : buffer;
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
  static constexpr unsigned kPositiveSlots = 0b110;
  struct Hyperparameters {
    double lr, beta1, beta2, eps;
  };

  T step_size;
  Lerp<T> average;
  SecondMoment<T> average_square;
  T inverse_sqrt_correction, eps;

  HOST_DEVICE Adam(const Hyperparameters& h, const Progress& now)
      : step_size(static_cast<T>(h.lr / (1 - std::pow(h.beta1, now.step)))),
        average(1 - h.beta1),
        average_square(h.beta2),
        inverse_sqrt_correction(static_cast<T>(1 / std::sqrt(1 - std::pow(h.beta2, now.step)))),
        eps(static_cast<T>(h.eps)) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& first_moment = slot[0];
    V& second_moment = slot[1];
    first_moment = average(first_moment, grad);
    second_moment = average_square(second_moment, grad);
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

  HOST_DEVICE Lion(const Hyperparameters& h, const Progress&)
      : lr(static_cast<T>(h.lr)), update_average(1 - h.beta1), moment_average(1 - h.beta2) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& moment = slot[0];
    param = param - lr * sign_of(update_average(moment, grad));
    moment = moment_average(moment, grad);
  }
};

// Duchi et al. 2011
// s <- s + g^2
// p <- p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)
template <class T>
struct Adagrad {
  static constexpr const char* kName = "adagrad";
  static constexpr int kSlots = 1;
  struct Hyperparameters {
    double lr, lr_decay, eps;
  };

  T step_size, eps;

  HOST_DEVICE Adagrad(const Hyperparameters& h, const Progress& now)
      : step_size(static_cast<T>(h.lr / (1 + (now.step - 1) * h.lr_decay))),
        eps(static_cast<T>(h.eps)) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& sum = slot[0];
    sum = sum + grad * grad;
    param = param - step_size * grad / (square_root(sum) + eps);
  }
};

// Hinton 2012, "Neural Networks for Machine Learning", lecture 6; with kCentered the variance
// divides (Graves 2013), with kMomentum the quotient enters a velocity.
// v <- alpha * v + (1 - alpha) * g^2
// a <- a + (1 - alpha) * (g - a)                       (centered)
// b <- momentum * b + g / (sqrt(v - a^2) + eps)
// p <- p - lr * b
template <class T, bool kCentered, bool kMomentum>
struct RmsProp {
  static constexpr const char* kName =
      kCentered ? (kMomentum ? "rmsprop_centered_momentum" : "rmsprop_centered")
                : (kMomentum ? "rmsprop_momentum" : "rmsprop");
  static constexpr int kSlots = 1 + kCentered + kMomentum;
  struct Hyperparameters {
    double lr, alpha, eps, momentum;
  };

  T lr, alpha, square_weight, eps, momentum;
  Lerp<T> average;

  HOST_DEVICE RmsProp(const Hyperparameters& h, const Progress&)
      : lr(static_cast<T>(h.lr)),
        alpha(static_cast<T>(h.alpha)),
        square_weight(static_cast<T>(1 - h.alpha)),
        eps(static_cast<T>(h.eps)),
        momentum(static_cast<T>(h.momentum)),
        average(1 - h.alpha) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V variance = slot[0] = alpha * slot[0] + square_weight * grad * grad;
    if constexpr (kCentered) {
      V& mean = slot[1];
      mean = average(mean, grad);
      variance = variance - mean * mean;
    }
    V update = grad / (square_root(variance) + eps);
    if constexpr (kMomentum) {
      V& velocity = slot[kSlots - 1];
      update = velocity = momentum * velocity + update;
    }
    param = param - lr * update;
  }
};

// Kingma and Ba 2015, section 7.1
// m <- m + (1 - beta1) * (g - m)
// u <- max(beta2 * u, |g| + eps)
// p <- p - lr / (1 - beta1^t) * m / u
template <class T>
struct Adamax {
  static constexpr const char* kName = "adamax";
  static constexpr int kSlots = 2;
  struct Hyperparameters {
    double lr, beta1, beta2, eps;
  };

  T step_size;
  Lerp<T> average;
  T beta2, eps;

  HOST_DEVICE Adamax(const Hyperparameters& h, const Progress& now)
      : step_size(static_cast<T>(h.lr / (1 - std::pow(h.beta1, now.step)))),
        average(1 - h.beta1),
        beta2(static_cast<T>(h.beta2)),
        eps(static_cast<T>(h.eps)) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& first_moment = slot[0];
    V& infinity_norm = slot[1];
    first_moment = average(first_moment, grad);
    infinity_norm = maximum(beta2 * infinity_norm, magnitude(grad) + eps);
    param = param - step_size * first_moment / infinity_norm;
  }
};

// Liu et al. 2020, algorithm 2, which trusts the second moment as far as its average is long:
// rho_inf = 2 / (1 - beta2) - 1
// rho = rho_inf - 2 t beta2^t / (1 - beta2^t)
// r = sqrt((rho - 4)(rho - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho))
// m, v as in Adam
// p <- p - lr / (1 - beta1^t) * m * r * sqrt(1 - beta2^t) / (sqrt(v) + eps)    (rho > 5)
// p <- p - lr / (1 - beta1^t) * m                                              (otherwise)
template <class T>
struct RAdam {
  static constexpr const char* kName = "radam";
  static constexpr int kSlots = 2;
  struct Hyperparameters {
    double lr, beta1, beta2, eps;
  };

  Lerp<T> average;
  T step_size;
  SecondMoment<T> average_square;
  T eps;
  bool is_adaptive;

  HOST_DEVICE RAdam(const Hyperparameters& h, const Progress& now)
      : average(1 - h.beta1), average_square(h.beta2), eps(static_cast<T>(h.eps)) {
    const double decay = std::pow(h.beta2, now.step);
    const double longest = 2 / (1 - h.beta2) - 1;
    const double length = longest - 2 * now.step * decay / (1 - decay);
    const double rectification =
        (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length);
    is_adaptive = length > 5;
    step_size = static_cast<T>(h.lr / (1 - std::pow(h.beta1, now.step)) *
                               (is_adaptive ? std::sqrt(rectification * (1 - decay)) : 1));
  }

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& first_moment = slot[0];
    V& second_moment = slot[1];
    first_moment = average(first_moment, grad);
    second_moment = average_square(second_moment, grad);
    V update = step_size * first_moment;
    if (is_adaptive) update = update / (square_root(second_moment) + eps);
    param = param - update;
  }
};

// Dozat 2016, "Incorporating Nesterov Momentum into Adam", with its schedule of momenta
// mu(t) = beta1 * (1 - 0.96^(t * momentum_decay) / 2); M is the product of mu(1) to mu(t).
// m, v as in Adam
// p <- p - lr * ((1 - mu(t)) / (1 - M) * g + mu(t + 1) / (1 - M mu(t + 1)) * m)
//          / (sqrt(v / (1 - beta2^t)) + eps)
template <class T>
struct NAdam {
  static constexpr const char* kName = "nadam";
  static constexpr int kSlots = 2;
  struct Hyperparameters {
    double lr, beta1, beta2, eps, momentum_decay;
  };

  T gradient_step, moment_step;
  Lerp<T> average;
  SecondMoment<T> average_square;
  T inverse_sqrt_correction, eps;

  static HOST_DEVICE double factor(const Hyperparameters& h, double step) {
    return h.beta1 * (1 - 0.5 * std::pow(0.96, step * h.momentum_decay));
  }

  HOST_DEVICE NAdam(const Hyperparameters& h, const Progress& now)
      : average(1 - h.beta1),
        average_square(h.beta2),
        inverse_sqrt_correction(static_cast<T>(1 / std::sqrt(1 - std::pow(h.beta2, now.step)))),
        eps(static_cast<T>(h.eps)) {
    const double next = factor(h, now.step + 1);
    gradient_step = static_cast<T>(h.lr * (1 - factor(h, now.step)) / (1 - now.product));
    moment_step = static_cast<T>(h.lr * next / (1 - now.product * next));
  }

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& first_moment = slot[0];
    V& second_moment = slot[1];
    first_moment = average(first_moment, grad);
    second_moment = average_square(second_moment, grad);
    const V numerator = gradient_step * grad + moment_step * first_moment;
    param = param - numerator / (square_root(second_moment) * inverse_sqrt_correction + eps);
  }
};

// Defazio et al. 2024, "The Road Less Scheduled", algorithm 1. The parameter is the point y where
// gradients are taken, between the iterate z and the average x = (y - (1 - beta1) z) / beta1, which
// is never stored; average_weight is that of the new z in the new x.
// v <- beta2 * v + (1 - beta2) * g^2
// d <- g / (sqrt(v / (1 - beta2^step)) + eps) + weight_decay * y
// y <- y + average_weight * (z - y) - lr * (1 - beta1 * (1 - average_weight)) * d
// z <- z - lr * d
template <class T>
struct ScheduleFreeAdamW {
  static constexpr const char* kName = "schedule_free_adamw";
  static constexpr int kSlots = 2;
  struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay, average_weight, step;  // steps of the whole group
  };

  T lr, param_step, average_weight, weight_decay;
  SecondMoment<T> average_square;
  T inverse_sqrt_correction, eps;

  HOST_DEVICE ScheduleFreeAdamW(const Hyperparameters& h, const Progress&)
      : lr(static_cast<T>(h.lr)),
        param_step(static_cast<T>(h.lr * (1 - h.beta1 * (1 - h.average_weight)))),
        average_weight(static_cast<T>(h.average_weight)),
        weight_decay(static_cast<T>(h.weight_decay)),
        average_square(h.beta2),
        inverse_sqrt_correction(static_cast<T>(1 / std::sqrt(1 - std::pow(h.beta2, h.step)))),
        eps(static_cast<T>(h.eps)) {}

  template <class V>
  HOST_DEVICE void operator()(V& param, V grad, V* slot) const {
    V& iterate = slot[0];
    V& second_moment = slot[1];
    second_moment = average_square(second_moment, grad);
    const V direction =
        grad / (square_root(second_moment) * inverse_sqrt_correction + eps) + weight_decay * param;
    param = param + average_weight * (iterate - param) - param_step * direction;
    iterate = iterate - lr * direction;
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

FASTOPT_END_NAMESPACE
