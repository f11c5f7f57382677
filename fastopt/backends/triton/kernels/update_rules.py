"""The update rules of csrc/core/update_rules.h: a function for each, and what folds its scalars.

A rule takes its functor, the parameter, the gradient and a tuple of the state, in the type of the
arithmetic. What comes back is the new parameter with the new state behind it. The functor is a
tuple of what the C++ functor consists of; ``fold_*`` computes it in fp64 from the hyperparameters,
in the order of the C++ struct, the number of the step and the product of the rule's factors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lerp_of(weight):
    """What ``lerp`` takes: a coefficient, and whether the weight is nearer to the end."""
    nearer_to_end = weight >= 0.5
    return tl.where(nearer_to_end, weight - 1, weight), nearer_to_end


@triton.jit
def lerp(start, end, coefficient, nearer_to_end):
    """As torch.lerp, from the nearer end."""
    return tl.where(nearer_to_end, end, start) + coefficient * (end - start)


@triton.jit
def _maximum(left, right):
    """A NaN wins."""
    return tl.where((right > left) | (right != right), right, left)


@triton.jit
def _square_root(x):
    """Correctly rounded: the quick one of fp32 takes subnormal numbers for zeros."""
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def _power(base, step):
    """Of whole exponents, by squaring."""
    exponent = step.to(tl.int64)
    result = tl.full(exponent.shape, 1.0, tl.float64)
    while tl.max(exponent, 0) > 0:
        result = tl.where(exponent % 2 == 1, result * base, result)
        base *= base
        exponent //= 2
    return result


@triton.jit
def sgd(functor, param, grad, slots):
    """Gradient descent."""
    (lr,) = functor
    return (param - lr * grad,)


@triton.jit
def fold_sgd(hyperparameters, step, product):
    """The learning rate."""
    return hyperparameters


@triton.jit
def momentum(functor, param, grad, slots):
    """Polyak's heavy ball."""
    step_size, _, buffer_decay, gradient_weight, _ = functor
    buffer = buffer_decay * slots[0] + gradient_weight * grad
    return param - step_size * buffer, buffer


@triton.jit
def nesterov(functor, param, grad, slots):
    """Momentum that looks one step ahead."""
    step_size, decay, _, _, undamped_gradient_weight = functor
    _, buffer = momentum(functor, param, grad, slots)
    return param - step_size * (undamped_gradient_weight * grad + decay * buffer), buffer


@triton.jit
def fold_momentum(hyperparameters, step, product):
    """The first gradient enters the buffer undamped."""
    step_size, decay, gradient_weight, undamped_gradient_weight = hyperparameters
    buffer_decay = tl.where(step == 1, 0.0, decay)
    weight = tl.where(step == 1, undamped_gradient_weight, gradient_weight)
    return step_size, decay, buffer_decay, weight, undamped_gradient_weight


@triton.jit
def adam(functor, param, grad, slots):
    """Kingma and Ba 2015, algorithm 1."""
    step_size, weight, nearer, beta2, second_weight, inverse_sqrt_correction, eps = functor
    first_moment = lerp(slots[0], grad, weight, nearer)
    second_moment = beta2 * slots[1] + second_weight * grad * grad
    divisor = _square_root(second_moment) * inverse_sqrt_correction + eps
    return param - step_size * first_moment / divisor, first_moment, second_moment


@triton.jit
def amsgrad(functor, param, grad, slots):
    """Reddi et al. 2018, with Adam's bias correction as torch has it."""
    step_size, _, _, _, _, inverse_sqrt_correction, eps = functor
    _, first_moment, second_moment = adam(functor, param, grad, slots)
    largest = _maximum(slots[2], second_moment)
    divisor = _square_root(largest) * inverse_sqrt_correction + eps
    return param - step_size * first_moment / divisor, first_moment, second_moment, largest


@triton.jit
def fold_adam(hyperparameters, step, product):
    """Bias corrections of both moments."""
    lr, beta1, beta2, eps = hyperparameters
    weight, nearer = lerp_of(1 - beta1)
    inverse_sqrt_correction = 1 / tl.sqrt(1 - _power(beta2, step))
    step_size = lr / (1 - _power(beta1, step))
    return step_size, weight, nearer, beta2, 1 - beta2, inverse_sqrt_correction, eps


@triton.jit
def lion(functor, param, grad, slots):
    """Chen et al. 2023, algorithm 2."""
    lr, update_weight, update_nearer, moment_weight, moment_nearer = functor
    moment = slots[0]
    update = lerp(moment, grad, update_weight, update_nearer)
    sign = (update > 0).to(param.dtype) - (update < 0).to(param.dtype)
    return param - lr * sign, lerp(moment, grad, moment_weight, moment_nearer)


@triton.jit
def fold_lion(hyperparameters, step, product):
    """Weights of two averages."""
    lr, beta1, beta2 = hyperparameters
    update_weight, update_nearer = lerp_of(1 - beta1)
    moment_weight, moment_nearer = lerp_of(1 - beta2)
    return lr, update_weight, update_nearer, moment_weight, moment_nearer


@triton.jit
def adagrad(functor, param, grad, slots):
    """Duchi et al. 2011."""
    step_size, eps = functor
    sum_of_squares = slots[0] + grad * grad
    return param - step_size * grad / (_square_root(sum_of_squares) + eps), sum_of_squares


@triton.jit
def fold_adagrad(hyperparameters, step, product):
    """The learning rate's decay."""
    lr, lr_decay, eps = hyperparameters
    return lr / (1 + (step - 1) * lr_decay), eps


@triton.jit
def _rmsprop(functor, param, grad, slots, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr):
    lr, alpha, square_weight, eps, decay, mean_weight, mean_nearer = functor
    square = alpha * slots[0] + square_weight * grad * grad
    state = (square,)
    variance = square
    if CENTERED:
        mean = lerp(slots[1], grad, mean_weight, mean_nearer)
        state = (square, mean)
        variance = square - mean * mean
    update = grad / (_square_root(variance) + eps)
    if MOMENTUM:
        update = decay * slots[-1] + update
        state = state + (update,)
    return (param - lr * update,) + state


@triton.jit
def rmsprop(functor, param, grad, slots):
    """Hinton 2012, lecture 6."""
    return _rmsprop(functor, param, grad, slots, False, False)


@triton.jit
def rmsprop_centered(functor, param, grad, slots):
    """Graves 2013: the variance divides."""
    return _rmsprop(functor, param, grad, slots, True, False)


@triton.jit
def rmsprop_momentum(functor, param, grad, slots):
    """The quotient enters a velocity."""
    return _rmsprop(functor, param, grad, slots, False, True)


@triton.jit
def rmsprop_centered_momentum(functor, param, grad, slots):
    """Both."""
    return _rmsprop(functor, param, grad, slots, True, True)


@triton.jit
def fold_rmsprop(hyperparameters, step, product):
    """Weights of the averages."""
    lr, alpha, eps, decay = hyperparameters
    mean_weight, mean_nearer = lerp_of(1 - alpha)
    return lr, alpha, 1 - alpha, eps, decay, mean_weight, mean_nearer


@triton.jit
def adamax(functor, param, grad, slots):
    """Kingma and Ba 2015, section 7.1."""
    step_size, weight, nearer, beta2, eps = functor
    first_moment = lerp(slots[0], grad, weight, nearer)
    infinity_norm = _maximum(beta2 * slots[1], tl.abs(grad) + eps)
    return param - step_size * first_moment / infinity_norm, first_moment, infinity_norm


@triton.jit
def fold_adamax(hyperparameters, step, product):
    """The first moment's bias correction."""
    lr, beta1, beta2, eps = hyperparameters
    weight, nearer = lerp_of(1 - beta1)
    return lr / (1 - _power(beta1, step)), weight, nearer, beta2, eps


@triton.jit
def radam(functor, param, grad, slots):
    """Liu et al. 2020, algorithm 2."""
    weight, nearer, step_size, beta2, second_weight, eps, is_adaptive = functor
    first_moment = lerp(slots[0], grad, weight, nearer)
    second_moment = beta2 * slots[1] + second_weight * grad * grad
    update = step_size * first_moment
    divided = update / (_square_root(second_moment) + eps)
    return param - tl.where(is_adaptive, divided, update), first_moment, second_moment


@triton.jit
def fold_radam(hyperparameters, step, product):
    """The second moment is trusted as far as its average is long."""
    lr, beta1, beta2, eps = hyperparameters
    weight, nearer = lerp_of(1 - beta1)
    decay = _power(beta2, step)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * decay / (1 - decay)
    is_adaptive = length > 5
    rectification = (length - 4) * (length - 2) * longest
    rectification /= (longest - 4) * (longest - 2) * length
    rectified = tl.where(is_adaptive, rectification * (1 - decay), 1.0)
    step_size = lr / (1 - _power(beta1, step)) * tl.sqrt(rectified)
    return weight, nearer, step_size, beta2, 1 - beta2, eps, is_adaptive


@triton.jit
def nadam(functor, param, grad, slots):
    """Dozat 2016."""
    (
        gradient_step, moment_step, weight, nearer, beta2, second_weight, inverse_sqrt_correction,
        eps,
    ) = functor  # fmt: skip
    first_moment = lerp(slots[0], grad, weight, nearer)
    second_moment = beta2 * slots[1] + second_weight * grad * grad
    numerator = gradient_step * grad + moment_step * first_moment
    divisor = _square_root(second_moment) * inverse_sqrt_correction + eps
    return param - numerator / divisor, first_moment, second_moment


@triton.jit
def factor_nadam(hyperparameters, step):
    """The momentum of a step."""
    _, beta1, _, _, momentum_decay = hyperparameters
    LOG_096: tl.constexpr = -0.040821994520255166
    return beta1 * (1 - 0.5 * tl.exp(step * momentum_decay * LOG_096))


@triton.jit
def fold_nadam(hyperparameters, step, product):
    """Weights of the gradient and of the moment that looks one step ahead."""
    lr, beta1, beta2, eps, _ = hyperparameters
    weight, nearer = lerp_of(1 - beta1)
    next_factor = factor_nadam(hyperparameters, step + 1)
    gradient_step = lr * (1 - factor_nadam(hyperparameters, step)) / (1 - product)
    moment_step = lr * next_factor / (1 - product * next_factor)
    inverse_sqrt_correction = 1 / tl.sqrt(1 - _power(beta2, step))
    return (
        gradient_step, moment_step, weight, nearer, beta2, 1 - beta2, inverse_sqrt_correction, eps,
    )  # fmt: skip


@triton.jit
def schedule_free_adamw(functor, param, grad, slots):
    """Defazio et al. 2024, algorithm 1; the parameter is the point where gradients are taken."""
    (
        lr, param_step, average_weight, weight_decay, beta2, second_weight, inverse_sqrt_correction,
        eps,
    ) = functor  # fmt: skip
    iterate = slots[0]
    second_moment = beta2 * slots[1] + second_weight * grad * grad
    divisor = _square_root(second_moment) * inverse_sqrt_correction + eps
    direction = grad / divisor + weight_decay * param
    param += average_weight * (iterate - param) - param_step * direction
    return param, iterate - lr * direction, second_moment


@triton.jit
def fold_schedule_free_adamw(hyperparameters, step, product):
    """By the steps of the whole group."""
    lr, beta1, beta2, eps, weight_decay, average_weight, group_step = hyperparameters
    correction = 1 - _power(beta2, tl.zeros_like(step) + group_step)
    param_step = lr * (1 - beta1 * (1 - average_weight))
    return (
        lr, param_step, average_weight, weight_decay, beta2, 1 - beta2, 1 / tl.sqrt(correction),
        eps,
    )  # fmt: skip


@triton.jit
def lamb_direction(functor, param, grad, slots):
    """You et al. 2020, algorithm 2: what the trust ratio is taken of, and the moments."""
    _, beta1, gradient_weight, beta2, second_weight, moment_scale, eps, weight_decay = functor
    first_moment = beta1 * slots[0] + gradient_weight * grad
    second_moment = beta2 * slots[1] + second_weight * grad * grad
    quotient = moment_scale * first_moment / (_square_root(second_moment) + eps)
    return quotient + weight_decay * param, first_moment, second_moment


@triton.jit
def lamb(functor, param, grad, slots):
    """With the trust ratio in the step size."""
    direction, first_moment, second_moment = lamb_direction(functor, param, grad, slots)
    return param - functor[0] * direction, first_moment, second_moment


@triton.jit
def lamb_without_trust(functor, param, grad, slots):
    """The same formula."""
    return lamb(functor, param, grad, slots)


@triton.jit
def fold_lamb(hyperparameters, step, product):
    """Bias corrections of both moments, where there are any."""
    lr, beta1, beta2, eps, weight_decay, gradient_weight, corrects_bias = hyperparameters
    first = tl.where(corrects_bias != 0, 1 - _power(beta1, step), 1.0)
    root = tl.sqrt(tl.where(corrects_bias != 0, 1 - _power(beta2, step), 1.0))
    return lr, beta1, gradient_weight, beta2, 1 - beta2, root / first, eps * root, weight_decay
