"""A linear layer with its cross-entropy, by chunks of rows: the logits are never there as a whole.

Torch multiplies matrices; a backend brings one kernel, which turns the logits of some rows into
losses and, in place, into their own gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.linear_cross_entropy_requests import has_probabilities
from fastopt.backends.plain_tensors import compute_dtype

# Classes whose part of the weight is in memory a second time, in the dtype of sums or products.
BLOCK = 4096


class Rows(NamedTuple):
    """What a backend's kernel gets: some rows of logits.

    It writes the loss and logsumexp of each row, zeros where its target is ``ignore_index``, and,
    with ``loss_scale``, gradients in the place of the logits. Numbers beside the logits have the
    type of the arithmetic.

    Attributes:
        logits: ``[rows, classes]``, with any stride between rows.
        targets: int64 ``[rows]``, or probabilities ``[rows, classes]``.
        class_weights: ``[classes]``.
        loss_scale: ``[rows]``: the gradient of each loss.
        z_scale: ``[rows]``: the gradient of each squared logsumexp.
        ignore_index: Of rows that have no part.
        label_smoothing: As in the request.
        softcap: As in the request.
        losses: ``[rows]``, to be written, without the squared logsumexp.
        logsumexps: ``[rows]``, to be written.
    """

    logits: Tensor
    targets: Tensor
    class_weights: Tensor | None
    loss_scale: Tensor | None
    z_scale: Tensor | None
    ignore_index: int
    label_smoothing: float
    softcap: float
    losses: Tensor
    logsumexps: Tensor


@dataclass(frozen=True)
class Chunks:
    """How a backend runs its kernel.

    Attributes:
        kernel: The kernel.
        product_dtype: In which dtype tensors of a dtype are multiplied.
        bytes_per_class: Of the logits in memory at once: a chunk has as many rows.
        row_multiple: Rows of logits begin at multiples of this many elements.
        reads_targets: Targets can be read without waiting: a wrong one raises, and ignored rows
            are left out of the products.
    """

    kernel: Callable[[Rows], None]
    product_dtype: Callable[[torch.dtype], torch.dtype]
    bytes_per_class: int
    row_multiple: int
    reads_targets: bool


# On a card, 2048 rows of bf16. By count, not by measurement: a chunk moves about 16 bytes for each
# element of the weight, and multiplies 6 * rows times; on an H100 that is 15% of the products.
CARD_BYTES_PER_CLASS = 4096
CARD_ROW_MULTIPLE = 64  # tensor cores want rows that begin at multiples of 16 bytes


def chunks_on_card(kernel: Callable[[Rows], None]) -> Chunks:
    """How a kernel of a card is run; nothing is waited for."""
    return Chunks(
        kernel,
        lambda dtype: dtype,
        bytes_per_class=CARD_BYTES_PER_CLASS,
        row_multiple=CARD_ROW_MULTIPLE,
        reads_targets=False,
    )


def forward(
    request: LinearCrossEntropyRequest, wanted: Sequence[bool], chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and gradients of input, weight and bias as if the loss had a gradient of 1."""
    if chunks.reads_targets:
        _check_targets(request)
    loss_divisor, z_divisor = divisors = _divisors(request)
    precise = compute_dtype(request.input.dtype)
    scales = None
    if any(wanted):
        scales = _scales(request, request.input.new_ones((), dtype=precise), divisors)
    losses, logsumexps, gradients = _run(request, scales, wanted, chunks)
    squares = logsumexps * logsumexps * request.z_loss
    if request.reduction == "none":
        loss = losses + squares
    else:
        loss = losses.sum() / loss_divisor
        if request.z_loss:
            loss = loss + squares.sum() / z_divisor
    return loss, *gradients


def backward(
    request: LinearCrossEntropyRequest, gradient: Tensor, wanted: Sequence[bool], chunks: Chunks
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of input, weight and bias, with the logits computed once more."""
    return _run(request, _scales(request, gradient, _divisors(request)), wanted, chunks)[2]


def _check_targets(request: LinearCrossEntropyRequest) -> None:
    """Raises what torch raises, before anything is written."""
    if has_probabilities(request):
        return
    target = request.target
    wrong = (target < 0) | (target >= request.linear_weight.size(0))
    wrong &= target != request.ignore_index
    if wrong.any():
        raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")


Divisors = tuple[Tensor | int, Tensor | int]


def _divisors(request: LinearCrossEntropyRequest) -> Divisors:
    """Of the sums of losses and of squared logsumexps, which class weights do not scale."""
    if request.reduction != "mean":
        return 1, 1
    rows = request.input.size(0)
    if has_probabilities(request):
        return rows, rows
    counted = request.target != request.ignore_index
    if request.weight is None:
        return counted.sum(), counted.sum()
    classes = request.target.clamp(0, request.weight.numel() - 1)
    weights = request.weight.to(compute_dtype(request.input.dtype))[classes]
    return torch.where(counted, weights, 0).sum(), counted.sum()


def _scales(
    request: LinearCrossEntropyRequest, gradient: Tensor, divisors: Divisors
) -> tuple[Tensor, Tensor]:
    """The gradients of each row's loss and of its squared logsumexp."""
    loss_divisor, z_divisor = divisors
    of_rows = gradient.expand(request.input.size(0))
    of_squares = of_rows / z_divisor * request.z_loss
    return (of_rows / loss_divisor).contiguous(), of_squares.contiguous()


def _run(
    request: LinearCrossEntropyRequest,
    scales: tuple[Tensor, Tensor] | None,
    wanted: Sequence[bool],
    chunks: Chunks,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Losses and logsumexps by rows, and the gradients."""
    input, classes = request.input, request.linear_weight.size(0)
    precise = compute_dtype(input.dtype)
    probabilities = has_probabilities(request)
    kept = None
    if chunks.reads_targets and not probabilities:
        kept = (request.target != request.ignore_index).nonzero().squeeze(1)
        kept = kept if len(kept) < input.size(0) else None
    count = input.size(0) if kept is None else len(kept)
    rows = _chunk_rows(request, count, chunks)
    products = _Products(request, chunks.product_dtype(input.dtype), wanted, count <= rows)
    losses, logsumexps = input.new_zeros((2, input.size(0)), dtype=precise)
    class_weights = None if request.weight is None else request.weight.to(precise).contiguous()
    width = -(-classes // chunks.row_multiple) * chunks.row_multiple
    space = input.new_empty((rows, width), dtype=products.dtype)
    space[:, classes:].zero_()  # oneDNN reads an odd number of bf16 and one more, times zero
    for start in range(0, count, rows):
        stop = min(start + rows, count)
        here = slice(start, stop) if kept is None else kept[start:stop]
        logits = space[: stop - start, :classes]
        factor = input[here].to(products.dtype)
        products.logits(factor, logits)
        targets = request.target[here].contiguous()
        own_losses, own_sums = logsumexps.new_empty((2, stop - start))
        loss_scale, z_scale = (None, None) if scales is None else (scale[here] for scale in scales)
        chunks.kernel(
            Rows(
                logits,
                targets.to(precise) if probabilities else targets,
                class_weights,
                loss_scale,
                z_scale,
                request.ignore_index,
                request.label_smoothing,
                request.softcap,
                own_losses,
                own_sums,
            )
        )
        losses[here], logsumexps[here] = own_losses, own_sums
        if scales is not None:
            products.add_gradients(logits, factor, here)
    return losses, logsumexps, products.gradients()


def _chunk_rows(request: LinearCrossEntropyRequest, count: int, chunks: Chunks) -> int:
    """How many rows at once: chunks of equal size."""
    size = chunks.product_dtype(request.input.dtype).itemsize
    most = max(chunks.bytes_per_class // size, 1)
    if request.chunk_rows:
        most = min(most, request.chunk_rows)
    parts = max(-(-count // most), 1)
    return max(-(-count // parts), 1)


class _Products:
    """The three products of a chunk, and sums of gradients over all chunks.

    They have ``out=``: autocast, which may be on around an operator, leaves those alone.

    Args:
        request: The layer.
        dtype: Of factors and logits: the tensors' own, or a wider one.
        wanted: Gradients of input, weight and bias.
        at_once: There is one chunk: nothing has to be summed up.
    """

    def __init__(
        self,
        request: LinearCrossEntropyRequest,
        dtype: torch.dtype,
        wanted: Sequence[bool],
        at_once: bool,
    ) -> None:
        input, self._weight, self._bias = request.input, request.linear_weight, request.linear_bias
        self.dtype = dtype
        self._own_dtype = input.dtype
        precise = compute_dtype(input.dtype)
        classes = self._weight.size(0)
        is_own = dtype is input.dtype
        self._all = [slice(0, classes)]
        self._blocks = [slice(first, first + BLOCK) for first in range(0, classes, BLOCK)]
        # Of classes whose weights are brought to the dtype of the products at once.
        self._widened = self._all if is_own else self._blocks
        self._is_first = True
        self._input = self._weight_sums = self._bias_sums = None
        if wanted[0]:
            self._input = torch.zeros_like(input)  # rows that have no part stay so
        if wanted[1]:
            sums = dtype if is_own and at_once else precise
            self._weight_sums = torch.empty_like(self._weight, dtype=sums)
        if wanted[2] and self._bias is not None:
            self._bias_sums = torch.zeros_like(self._bias, dtype=precise)

    def logits(self, factor: Tensor, out: Tensor) -> None:
        """Of the rows of a chunk."""
        for block in self._widened:
            weight = self._weight[block].to(self.dtype).t()
            if self._bias is None:
                torch.mm(factor, weight, out=out[:, block])
            else:
                torch.addmm(self._bias[block].to(self.dtype), factor, weight, out=out[:, block])

    def add_gradients(self, logit_gradients: Tensor, factor: Tensor, rows: Tensor | slice) -> None:
        """Takes a chunk in: ``logit_gradients`` of ``rows``, whose input is ``factor``."""
        if self._input is not None:
            own = torch.empty_like(factor, memory_format=torch.contiguous_format)
            for block in self._widened:
                weight = self._weight[block].to(self.dtype)
                own.addmm_(logit_gradients[:, block], weight, beta=int(block.start > 0))
            self._input[rows] = own.to(self._own_dtype)
        if self._weight_sums is not None:
            self._add_to_weight(self._weight_sums, logit_gradients.t(), factor)
        if self._bias_sums is not None:
            self._bias_sums += logit_gradients.sum(0, dtype=self._bias_sums.dtype)
        self._is_first = False

    def _add_to_weight(self, sums: Tensor, logit_gradients: Tensor, factor: Tensor) -> None:
        if sums.dtype is self.dtype:
            sums.addmm_(logit_gradients, factor, beta=int(not self._is_first))
            return
        if sums.is_cuda:  # cuBLAS adds products of halves to fp32 by itself
            if self._is_first:
                torch.mm(logit_gradients, factor, out_dtype=sums.dtype, out=sums)
            else:
                torch.addmm(sums, logit_gradients, factor, out_dtype=sums.dtype, out=sums)
            return
        for block in self._blocks:
            part = logit_gradients[block]
            product = torch.mm(part, factor, out=part.new_empty((part.size(0), factor.size(1))))
            if self._is_first:
                sums[block] = product
            else:
                sums[block] += product

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of input, weight and bias, in their dtype; empty where not wanted."""
        if self._is_first and self._weight_sums is not None:
            self._weight_sums.zero_()
        found = []
        for sums in (self._input, self._weight_sums, self._bias_sums):
            found.append(self._weight.new_empty(0) if sums is None else sums.to(self._own_dtype))
        return found[0], found[1], found[2]
