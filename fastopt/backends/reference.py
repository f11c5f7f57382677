"""Backend ``reference``: every formula as one would read it in the paper, in double precision.

It is the truth that tests hold the kernels to, chosen by name only. Each rule takes parameter and
gradient, its state, its hyperparameters in the order of ``csrc/core/update_rules.h`` and the number
of the step, counted from 1, and returns the new parameter and the new state. A rule whose name is
in ``FACTORS`` finds the product of its factors, this step's among them, behind its state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends import state_codes
from fastopt.backends.contract import (
    AttentionRequest,
    Created,
    LinearCrossEntropyRequest,
    LstmRequest,
    ParameterRequest,
    Refusal,
    SteppedOptimizer,
    Tail,
    UpdateRule,
    WeightDecay,
)
from fastopt.backends.plain_tensors import is_dtensor
from fastopt.backends.planning import PlannedParameter, Service, planned_parameters

Slots = list[Tensor]
Rule = Callable[[Tensor, Tensor, Slots, tuple[float, ...], int], tuple[Tensor, Slots]]


def sgd(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Gradient descent."""
    (lr,) = hyper
    return param - lr * grad, []


def momentum(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Polyak's heavy ball."""
    step_size, decay, gradient_weight, undamped_gradient_weight = hyper
    if step == 1:
        buffer = undamped_gradient_weight * grad
    else:
        buffer = decay * slots[0] + gradient_weight * grad
    return param - step_size * buffer, [buffer]


def nesterov(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Momentum that looks one step ahead."""
    step_size, decay, _, undamped_gradient_weight = hyper
    _, (buffer,) = momentum(param, grad, slots, hyper, step)
    return param - step_size * (undamped_gradient_weight * grad + decay * buffer), [buffer]


def adam(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Kingma and Ba 2015, algorithm 1."""
    lr, beta1, beta2, eps = hyper
    first_moment = beta1 * slots[0] + (1 - beta1) * grad
    second_moment = beta2 * slots[1] + (1 - beta2) * grad**2
    first_unbiased = first_moment / (1 - beta1**step)
    second_unbiased = second_moment / (1 - beta2**step)
    new_param = param - lr * first_unbiased / (second_unbiased.sqrt() + eps)
    return new_param, [first_moment, second_moment]


def amsgrad(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Reddi et al. 2018, with Adam's bias correction as torch has it."""
    lr, beta1, beta2, eps = hyper
    _, (first_moment, second_moment) = adam(param, grad, slots[:2], hyper, step)
    largest = torch.maximum(slots[2], second_moment)
    first_unbiased = first_moment / (1 - beta1**step)
    largest_unbiased = largest / (1 - beta2**step)
    new_param = param - lr * first_unbiased / (largest_unbiased.sqrt() + eps)
    return new_param, [first_moment, second_moment, largest]


def lion(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Chen et al. 2023, algorithm 2."""
    lr, beta1, beta2 = hyper
    direction = beta1 * slots[0] + (1 - beta1) * grad
    moment = beta2 * slots[0] + (1 - beta2) * grad
    return param - lr * torch.sign(direction), [moment]


def adagrad(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Duchi et al. 2011, with a learning rate that decays."""
    lr, lr_decay, eps = hyper
    total = slots[0] + grad**2
    return param - lr / (1 + (step - 1) * lr_decay) * grad / (total.sqrt() + eps), [total]


def rmsprop(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Hinton 2012, lecture 6."""
    lr, alpha, eps, _ = hyper
    square = alpha * slots[0] + (1 - alpha) * grad**2
    return param - lr * grad / (square.sqrt() + eps), [square]


def rmsprop_momentum(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """The quotient enters a velocity."""
    lr, alpha, eps, decay = hyper
    square = alpha * slots[0] + (1 - alpha) * grad**2
    velocity = decay * slots[1] + grad / (square.sqrt() + eps)
    return param - lr * velocity, [square, velocity]


def rmsprop_centered(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Graves 2013: the variance divides."""
    lr, alpha, eps, _ = hyper
    square = alpha * slots[0] + (1 - alpha) * grad**2
    mean = alpha * slots[1] + (1 - alpha) * grad
    return param - lr * grad / ((square - mean**2).sqrt() + eps), [square, mean]


def rmsprop_centered_momentum(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Both."""
    lr, alpha, eps, decay = hyper
    square = alpha * slots[0] + (1 - alpha) * grad**2
    mean = alpha * slots[1] + (1 - alpha) * grad
    velocity = decay * slots[2] + grad / ((square - mean**2).sqrt() + eps)
    return param - lr * velocity, [square, mean, velocity]


def adamax(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Kingma and Ba 2015, algorithm 2, with eps as torch has it."""
    lr, beta1, beta2, eps = hyper
    first_moment = beta1 * slots[0] + (1 - beta1) * grad
    infinity_norm = torch.maximum(beta2 * slots[1], grad.abs() + eps)
    new_param = param - lr / (1 - beta1**step) * first_moment / infinity_norm
    return new_param, [first_moment, infinity_norm]


def radam(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Liu et al. 2020, algorithm 2, with eps beside the uncorrected root as torch has it."""
    lr, beta1, beta2, eps = hyper
    first_moment = beta1 * slots[0] + (1 - beta1) * grad
    second_moment = beta2 * slots[1] + (1 - beta2) * grad**2
    update = first_moment / (1 - beta1**step)
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length > 5:
        rectification = math.sqrt(
            (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
        )
        update = update * rectification * math.sqrt(1 - beta2**step) / (second_moment.sqrt() + eps)
    return param - lr * update, [first_moment, second_moment]


def nadam_momentum(hyper: tuple[float, ...], step: int) -> float:
    """The momentum of a step; Dozat's schedule."""
    _, beta1, _, _, momentum_decay = hyper
    return float(beta1 * (1 - 0.5 * 0.96 ** (step * momentum_decay)))


def nadam(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Dozat 2016, algorithm 8."""
    lr, beta1, beta2, eps, _ = hyper
    product = slots[2]
    now, following = nadam_momentum(hyper, step), nadam_momentum(hyper, step + 1)
    first_moment = beta1 * slots[0] + (1 - beta1) * grad
    second_moment = beta2 * slots[1] + (1 - beta2) * grad**2
    ahead = (1 - now) * grad / (1 - product) + following * first_moment / (1 - product * following)
    second_unbiased = second_moment / (1 - beta2**step)
    new_param = param - lr * ahead / (second_unbiased.sqrt() + eps)
    return new_param, [first_moment, second_moment]


def schedule_free_adamw(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Defazio et al. 2024, algorithm 1: iterate z, average x, gradients between them at y."""
    lr, beta1, beta2, eps, weight_decay, average_weight, group_step = hyper
    iterate = slots[0]
    average = (param - (1 - beta1) * iterate) / beta1
    second_moment = beta2 * slots[1] + (1 - beta2) * grad**2
    second_unbiased = second_moment / (1 - beta2**group_step)
    direction = grad / (second_unbiased.sqrt() + eps) + weight_decay * param
    iterate = iterate - lr * direction
    average = (1 - average_weight) * average + average_weight * iterate
    return (1 - beta1) * iterate + beta1 * average, [iterate, second_moment]


def _lamb_direction(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    _, beta1, beta2, eps, weight_decay, gradient_weight, corrects_bias = hyper
    first_moment = beta1 * slots[0] + gradient_weight * grad
    second_moment = beta2 * slots[1] + (1 - beta2) * grad**2
    first_unbiased = first_moment / (1 - beta1**step if corrects_bias else 1)
    second_unbiased = second_moment / (1 - beta2**step if corrects_bias else 1)
    direction = first_unbiased / (second_unbiased.sqrt() + eps) + weight_decay * param
    return direction, [first_moment, second_moment]


def lamb(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """You et al. 2020, algorithm 2, with apex's options."""
    direction, slots = _lamb_direction(param, grad, slots, hyper, step)
    norm, length = param.norm().item(), direction.norm().item()
    trust = norm / length if norm != 0 and length != 0 else 1.0
    return param - hyper[0] * trust * direction, slots


def lamb_without_trust(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """The same where a parameter has no trust ratio."""
    direction, slots = _lamb_direction(param, grad, slots, hyper, step)
    return param - hyper[0] * direction, slots


def orthogonalised(matrix: Tensor, hyper: tuple[float, ...]) -> Tensor:
    """Newton-Schulz: the singular values of a matrix brought near 1."""
    a, b, c, eps, steps = hyper
    x: Tensor = matrix / matrix.norm().clamp(min=eps)
    for _ in range(int(steps)):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Jordan et al. 2024, with torch's momentum and its "original" learning rate."""
    lr, decay, look_ahead, *iteration = hyper
    buffer = decay * slots[0] + (1 - decay) * grad
    update = orthogonalised((1 - look_ahead) * grad + look_ahead * buffer, tuple(iteration))
    return param - lr * math.sqrt(max(1, len(param) / param.size(1))) * update, [buffer]


def muon_match_rms_adamw(
    param: Tensor, grad: Tensor, slots: Slots, hyper: tuple[float, ...], step: int
) -> tuple[Tensor, Slots]:
    """Liu et al. 2025: steps of the size of AdamW's."""
    lr, *others = hyper
    moved, slots = muon(torch.zeros_like(param), grad, slots, (1.0, *others), step)
    ratio = 0.2 * math.sqrt(max(param.shape)) / math.sqrt(max(1, len(param) / param.size(1)))
    return param + lr * ratio * moved, slots


RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (
        *(sgd, momentum, nesterov, adam, amsgrad, lion, adagrad),
        *(rmsprop, rmsprop_momentum, rmsprop_centered, rmsprop_centered_momentum),
        *(adamax, radam, nadam, schedule_free_adamw),
        *(lamb, lamb_without_trust, muon, muon_match_rms_adamw),
    )
}

# By which the product of a parameter grows in a step.
FACTORS: dict[str, Callable[[tuple[float, ...], int], float]] = {"nadam": nadam_momentum}


def numbers_of(rule: UpdateRule) -> tuple[float, ...]:
    """The hyperparameters, read from where they are."""
    return tuple(float(value) for value in rule.hyperparameters)


def update(
    param: Tensor, grad: Tensor, slots: Slots, rule: UpdateRule, step: int
) -> tuple[Tensor, Slots]:
    """Weight decay and the rule, on real tensors of any one dtype."""
    if rule.maximize:
        grad = -grad
    if rule.weight_decay is WeightDecay.DECOUPLED:
        param = param * rule.decay
    elif rule.decay != 0:
        grad = grad + rule.decay * param
    return RULES[rule.name](param, grad, slots, numbers_of(rule), step)


def surrounded_update(
    param: Tensor,
    grad: Tensor,
    slots: Slots,
    average: Tensor | None,
    rule: UpdateRule,
    step: int,
    tail: Tail,
) -> tuple[Tensor, Tensor, Slots, Tensor | None]:
    """The whole tail of a training step, on real tensors of any one dtype.

    Returns:
        The new parameter, gradient, state and average.
    """
    grad = (grad * tail.grad_scale).clamp(-tail.clip_value, tail.clip_value)
    param, slots = update(param, grad, slots, rule, step)
    if average is not None:
        average = average + tail.average_weight * (param - average)
    return param, torch.zeros_like(grad) if tail.zero_grad else grad, slots, average


def total_norm(grads: Sequence[Tensor], order: float) -> Tensor:
    """The norm of the norms, as torch.nn.utils.get_total_norm has it."""
    norms = torch.stack([torch.linalg.vector_norm(grad.double(), order) for grad in grads])
    norm: Tensor = torch.linalg.vector_norm(norms, order)
    return norm


class ReferenceBackend:
    """Slow and plain."""

    name = "reference"

    def supports(self, request: ParameterRequest) -> str | None:
        """Dense tensors; not what autograd or an accelerator's graph has to record."""
        if request.rule not in RULES:
            return f"the reference has no update rule {request.rule!r}"
        if request.group.get("differentiable"):
            return "differentiable=True has autograd record the step"
        if request.group.get("capturable"):
            return "capturable=True is for parameters on an accelerator"
        if is_dtensor(request.param):
            return "the parameter is a DTensor, and its step hangs on the whole of it"
        tensors = [request.param, *request.slots]
        tensors += [] if request.grad is None else [request.grad]
        for tensor in tensors:
            if tensor.layout is not torch.strided:
                return f"a tensor has layout {tensor.layout}"
        return None

    def supports_attention(self, request: AttentionRequest) -> str | None:
        """Always None."""
        return None

    def supports_lstm(self, request: LstmRequest) -> str | None:
        """Everything that torch's operations take."""
        return None

    def supports_linear_cross_entropy(self, request: LinearCrossEntropyRequest) -> str | None:
        """Always None."""
        return None

    def plan_optimizer_step(
        self,
        optimizer: SteppedOptimizer,
        served: Sequence[Sequence[bool]],
        created: Created,
    ) -> ReferencePlan:
        """Looks everything up."""
        return ReferencePlan(planned_parameters(optimizer, served, created))


class ReferencePlan:
    """Steps one parameter after the other, once: it is made anew for each step."""

    def __init__(self, groups: Sequence[Sequence[PlannedParameter]]) -> None:
        self._groups = groups
        self._used = False

    def collect(self, optimizer: SteppedOptimizer, writing: bool) -> Sequence[Refusal] | None:
        """Nothing is fetched."""
        return None if self._used else ()

    @torch.no_grad()
    def grad_norm(self, optimizer: SteppedOptimizer, order: float) -> float | None:
        """In double precision; complex tensors by their absolute values."""
        grads = [planned.param.grad for group in self._groups for planned in group]
        there = [grad.abs() if grad.is_complex() else grad for grad in grads if grad is not None]
        return total_norm(there, order).item() if there else None

    @torch.no_grad()
    def run(self, optimizer: SteppedOptimizer, rules: tuple[UpdateRule, ...], tail: Tail) -> None:
        """Computes in double precision and rounds once, when storing."""
        self._used = True
        for rule, group in zip(rules, self._groups, strict=True):
            for planned in group:
                if planned.service is Service.SERVED:
                    _step_parameter(planned, rule, tail)

    def release(self) -> None:
        """Nothing is held."""


def _step_parameter(planned: PlannedParameter, rule: UpdateRule, tail: Tail) -> None:
    param, grad, average = planned.param, planned.param.grad, planned.average
    if grad is None:
        if average is not None:
            average.copy_(average + tail.average_weight * (param - average))
        return
    step = 1 if planned.is_new else 2
    if planned.step is not None:
        planned.step.add_(1)
        step = int(planned.step.item())
    slots = planned.slots
    if rule.name in FACTORS:
        assert planned.product is not None
        planned.product.mul_(FACTORS[rule.name](numbers_of(rule), step))
        slots += (planned.product,)
    coded = planned.coding
    stored = (param, *slots)
    if coded is not None:
        stored = tuple(state_codes.read(param, slots, coded, rule.name))
    old_param, *old_slots = [_widened(t) for t in stored]
    old_grad = _widened(grad)
    old_average = None if average is None else _widened(average)
    new_param, new_grad, new_slots, new_average = surrounded_update(
        old_param, old_grad, old_slots, old_average, rule, step, tail
    )
    if tail.zero_grad or tail.changes_gradients:
        _real(grad).copy_(new_grad)
    new_values = (new_param, *new_slots)
    if coded is not None:
        alike = [torch.empty_like(param, dtype=torch.float64).copy_(v) for v in new_values]
        state_codes.write(param, planned.slots, alike, coded, rule.name, step)
    else:
        for tensor, value in zip((param, *planned.slots), new_values, strict=True):
            _real(tensor).copy_(value)
    if average is not None and new_average is not None:
        _real(average).copy_(new_average)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _widened(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def reference_lstm(layer: LstmRequest) -> tuple[Tensor, Tensor, Tensor]:
    """One layer of an LSTM, step by step in double precision; autograd has its gradients."""
    input, batch_sizes, weights = layer.input, layer.batch_sizes, layer.weights
    initial_hidden, initial_cell = layer.initial_hidden, layer.initial_cell
    dtype, wide = input.dtype, torch.float64
    per_direction = len(weights) // initial_hidden.size(0)
    steps = list(
        input.to(wide).unbind(0)
        if batch_sizes is None
        else input.to(wide).split(batch_sizes.tolist())
    )
    outputs, hidden_states, cell_states = [], [], []
    for direction, (h_0, c_0) in enumerate(zip(initial_hidden, initial_cell, strict=True)):
        own = [w.to(wide) for w in weights[direction * per_direction :][:per_direction]]
        weight_ih, weight_hh, bias = own[0], own[1], own[2] + own[3] if layer.has_biases else 0.0
        projection = own[-1] if per_direction in (3, 5) else None
        h, c = h_0.to(wide), c_0.to(wide)
        produced: list[Tensor] = []
        for x in steps if direction == 0 else reversed(steps):
            rows = x.size(0)  # the sequences that have this step
            gates = x @ weight_ih.T + h[:rows] @ weight_hh.T + bias
            i, f, g, o = gates.chunk(4, dim=1)
            c_now = f.sigmoid() * c[:rows] + i.sigmoid() * g.tanh()
            h_now = o.sigmoid() * c_now.tanh()
            if projection is not None:
                h_now = h_now @ projection.T
            h, c = torch.cat([h_now, h[rows:]]), torch.cat([c_now, c[rows:]])
            produced.append(h_now)
        produced = produced if direction == 0 else produced[::-1]
        outputs.append(torch.stack(produced) if batch_sizes is None else torch.cat(produced))
        hidden_states.append(h)
        cell_states.append(c)
    output = torch.cat(outputs, dim=-1).to(dtype)
    return output, torch.stack(hidden_states).to(dtype), torch.stack(cell_states).to(dtype)


def reference_attention(request: AttentionRequest) -> tuple[Tensor, Tensor]:
    """Output and logsumexp, in double precision; autograd has their gradients."""
    if request.query_starts is None and request.used_keys is None:
        return _reference_attention(request, 0)
    heads = request.query.size(1)
    parts = [
        _reference_attention(one, number * heads) for number, one in enumerate(_sequences(request))
    ]
    dim = 0 if request.query_starts is None else 2
    outputs, sums = zip(*parts, strict=True)
    return torch.cat(outputs, dim), torch.cat(sums, dim)


def _sequences(request: AttentionRequest) -> Iterator[AttentionRequest]:
    """Each sequence of a batch as a request of its own."""
    starts, key_starts, used = request.query_starts, request.key_starts, request.used_keys
    count = request.query.size(0) if starts is None else len(starts) - 1
    for number in range(count):
        parts: dict[str, Any] = {}
        for name in ("query", "key", "value"):
            tensor: Tensor = getattr(request, name)
            where = starts if name == "query" else key_starts
            if where is None:
                tensor = tensor[number : number + 1]
            else:
                tensor = tensor[:, :, int(where[number]) : int(where[number + 1])]
            if used is not None and name != "query":
                tensor = tensor[:, :, : int(used[number])]
            parts[name] = tensor
        keys = parts["key"].size(2)
        for name in ("bias", "allowed"):
            mask = getattr(request, name)
            if mask is not None:
                mask = mask[number : number + 1] if mask.size(0) > 1 else mask
                parts[name] = mask[..., :keys] if mask.size(-1) > 1 else mask
        if request.slopes is not None:
            parts["slopes"] = request.slopes[number : number + 1]
        yield replace(request, query_starts=None, key_starts=None, used_keys=None, **parts)


def _reference_attention(request: AttentionRequest, first_head: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64
    group = request.query.size(1) // request.key.size(1)
    query = request.query.to(wide)
    key, value = (t.to(wide).repeat_interleave(group, 1) for t in (request.key, request.value))
    scores = query @ key.transpose(-2, -1) * request.scale
    if request.softcap:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    rows, columns = scores.shape[-2:]
    diagonal = columns - rows if request.bottom_right else 0
    device = request.device
    places = torch.arange(rows, device=device)[:, None] + diagonal
    distance = torch.arange(columns, device=device) - places
    if request.slopes is not None:
        scores = scores - request.slopes.to(wide)[..., None, None] * distance.abs()
    if request.bias is not None:
        scores = scores + request.bias.to(wide)
    seen = torch.ones(scores.shape, dtype=torch.bool, device=device)
    if request.allowed is not None:
        seen = seen & request.allowed
    if request.left >= 0:
        seen = seen & (distance >= -request.left)
    if request.right >= 0:
        seen = seen & (distance <= request.right)
    scores = scores.masked_fill(~seen, -torch.inf)
    everything = scores
    if request.sinks is not None:
        column = request.sinks.to(wide)[:, None, None].expand(*scores.shape[:3], 1)
        everything = torch.cat([scores, column], -1)
    # A row that sees no key is zeros, and so are its gradients.
    unseen = (everything == -torch.inf).all(-1, keepdim=True)
    finite = everything.masked_fill(unseen, 0).logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - finite)
    logsumexp = finite.masked_fill(unseen, -torch.inf).squeeze(-1)
    if request.dropout:
        weights = weights * dropout_factors(request, first_head)
    output = (weights @ value).to(request.query.dtype)
    return output, logsumexp.to(wide if request.query.dtype is wide else torch.float32)


def dropout_factors(request: AttentionRequest, first_head: int = 0) -> Tensor:
    """What each weight is multiplied by: 0, or ``1 / (1 - dropout)``.

    Args:
        request: Of one length for all of its sequences.
        first_head: The number of its first head in the whole batch.
    """
    assert request.seed is not None
    batch, heads, rows = request.query.shape[:3]
    columns = request.key.size(2)
    shape = (batch * heads, rows, max(-(-columns // 64), 1) * 64)
    words = torch.empty(shape, dtype=torch.int32, device="cpu")
    for head, own in enumerate(words):
        _native_cpu.random_words(int(request.seed), first_head + head, 0, own)
    kept = (words.long() & 0xFFFFFFFF) >= int(request.dropout * 2**32)
    kept = kept[..., :columns].view(batch, heads, rows, columns)
    return kept.to(request.device).double() / (1 - request.dropout)


def reference_linear_cross_entropy(request: LinearCrossEntropyRequest) -> Tensor:
    """The loss, in double precision; autograd has its gradients."""
    wide, smoothing = torch.float64, request.label_smoothing
    features = [request.input.dim() - 1], [request.linear_weight.dim() - 1]
    scores = torch.tensordot(request.input.to(wide), request.linear_weight.to(wide), features)
    if request.linear_bias is not None:
        scores = scores + request.linear_bias.to(wide)
    if request.softcap:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    classes = scores.size(1)
    if request.target.shape == scores.shape:
        counted = torch.ones_like(scores[:, 0])
        shares = request.target.to(wide)
    else:
        is_counted = request.target != request.ignore_index
        indices = torch.where(is_counted, request.target, 0)
        counted = is_counted.to(wide)
        shares = torch.nn.functional.one_hot(indices, classes).movedim(-1, 1).to(wide)
    of_classes = torch.ones(classes, dtype=wide, device=request.device)
    if request.weight is not None:
        of_classes = request.weight.to(wide)
    of_classes = of_classes.view(-1, *[1] * (scores.dim() - 2))
    divisor = counted.sum()
    if request.target.shape != scores.shape:
        divisor = (shares * of_classes).sum(1).mul(counted).sum()
    shares = ((1 - smoothing) * shares + smoothing / classes) * of_classes
    logsumexp = scores.logsumexp(1)
    losses: Tensor = (shares * (logsumexp.unsqueeze(1) - scores)).sum(1) * counted
    squares: Tensor = request.z_loss * logsumexp**2 * counted
    if request.reduction == "none":
        return losses + squares
    if request.reduction == "sum":
        return (losses + squares).sum()
    return losses.sum() / divisor + squares.sum() / counted.sum()
