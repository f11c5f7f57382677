"""Losses of rows of logits and, in their place, their gradients.

The formulas are those of ``csrc/core/cross_entropy.h``. Arithmetic is in the type of the losses.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastopt.backends.triton.kernels.elementary import hyperbolic_tangent
from fastopt.backends.triton.kernels.precision import store_rounded


@triton.jit
def capped(logit, cap, CAPPED: tl.constexpr):
    """Return softcap * tanh(logit / softcap)."""
    return hyperbolic_tangent(logit / cap) * cap if CAPPED else logit


@triton.jit
def through_cap(score, gradient, cap, CAPPED: tl.constexpr):
    """Of the gradient of a score, that of its logit."""
    if CAPPED:
        saturation = score / cap
        gradient = gradient * (1 - saturation * saturation)
    return gradient


@triton.jit
def shares_of(probabilities_ptr, class_weights_ptr, classes, inside, uniform, certain):
    """What a row's target gives to each class, but for an index's own."""
    shares = tl.where(inside, uniform, 0)
    if probabilities_ptr is not None:
        shares += certain * tl.load(probabilities_ptr + classes, mask=inside, other=0)
    if class_weights_ptr is not None:
        shares *= tl.load(class_weights_ptr + classes, mask=inside, other=0)
    return shares


# Numbers of rows, of which a chunk may begin anywhere, and what no address is a multiple of: one
# compiled kernel is for all of them.
_OF_ROWS = ("targets_ptr", "loss_scale_ptr", "z_scale_ptr", "losses_ptr", "logsumexps_ptr")


@triton.jit(do_not_specialize=("ignore_index",), do_not_specialize_on_alignment=_OF_ROWS)
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    probabilities_ptr,
    class_weights_ptr,
    loss_scale_ptr,
    z_scale_ptr,
    losses_ptr,
    logsumexps_ptr,
    row_stride,
    classes,
    ignore_index,
    SMOOTHING: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program has a row: one walk gathers its sums, a second one writes its gradients."""
    precise: tl.constexpr = losses_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    if probabilities_ptr is not None:
        probabilities_ptr += row * classes
    smoothing = tl.full((), SMOOTHING, precise)
    cap = tl.full((), CAP, precise)
    uniform = smoothing / classes
    target = tl.full((), -1, tl.int64)
    is_counted = True
    certain = tl.zeros((), precise)
    target_score = tl.zeros((), precise)
    if targets_ptr is not None:
        target = tl.load(targets_ptr + row)
        is_counted = target != ignore_index
        is_class = (target >= 0) & (target < classes)
        certain = 1 - smoothing
        if class_weights_ptr is not None:
            certain *= tl.load(class_weights_ptr + target, mask=is_class, other=0)
        logit = tl.load(logits_ptr + target, mask=is_class, other=0).to(precise)
        certain = tl.where(is_class, certain, float("nan"))
        target_score = capped(logit, cap, CAP != 0)
    first = capped(tl.load(logits_ptr).to(precise), cap, CAP != 0)
    shift = tl.where(tl.abs(first) < float("inf"), first, 0)

    largest = tl.full((), float("-inf"), precise)
    exponentials = tl.zeros((), precise)
    all_shares = tl.zeros((), precise)
    shared_scores = tl.zeros((), precise)
    for start in range(0, tl.where(is_counted, classes, 0), BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < classes
        logits = tl.load(logits_ptr + index, mask=inside, other=float("-inf")).to(precise)
        scores = tl.where(inside, capped(logits, cap, CAP != 0), float("-inf"))
        now_largest = tl.maximum(largest, tl.max(scores, 0))
        base = tl.where(now_largest == float("-inf"), 0, now_largest)
        exponentials = exponentials * tl.exp(largest - base) + tl.sum(tl.exp(scores - base), 0)
        largest = now_largest
        if SMOOTHING != 0 or probabilities_ptr is not None:
            shares = shares_of(
                probabilities_ptr, class_weights_ptr, index, inside, uniform, 1 - smoothing
            )
            all_shares += tl.sum(shares, 0)
            shared_scores += tl.sum(tl.where(inside, (scores - shift) * shares, 0), 0)

    log_sum = tl.log(exponentials)
    logsumexp = largest + log_sum
    loss = tl.zeros((), precise)
    if targets_ptr is not None:
        loss += tl.where(certain == 0, 0, certain * ((largest - target_score) + log_sum))
    if SMOOTHING != 0 or probabilities_ptr is not None:
        shared = all_shares * ((largest - shift) + log_sum) - shared_scores
        loss += tl.where(all_shares == 0, 0, shared)
    tl.store(losses_ptr + row, tl.where(is_counted, loss, 0))
    tl.store(logsumexps_ptr + row, tl.where(is_counted, logsumexp, 0))

    if loss_scale_ptr is not None:
        loss_scale = tl.load(loss_scale_ptr + row)
        wanted = loss_scale * (certain + all_shares)
        if z_scale_ptr is not None:
            wanted += 2 * tl.load(z_scale_ptr + row) * logsumexp
        factor = wanted / exponentials
        for start in range(0, classes, BLOCK):
            index = start + tl.arange(0, BLOCK)
            inside = index < classes
            logits = tl.load(logits_ptr + index, mask=inside, other=0).to(precise)
            scores = capped(logits, cap, CAP != 0)
            gradients = tl.exp(scores - largest) * factor
            if SMOOTHING != 0 or probabilities_ptr is not None:
                gradients -= loss_scale * shares_of(
                    probabilities_ptr, class_weights_ptr, index, inside, uniform, 1 - smoothing
                )
            gradients -= tl.where(index == target, loss_scale * certain, 0)
            gradients = through_cap(scores, gradients, cap, CAP != 0)
            store_rounded(logits_ptr + index, tl.where(is_counted, gradients, 0), inside)
