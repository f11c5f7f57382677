"""``make harden-huge``: more than 2^31 elements in one tensor, bf16, one tensor after the other.

Values repeat every ``PERIOD`` elements, so that what is right is known of a small tensor. What
does not fit into the memory that is free is left out, with a word about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from fastopt import optim
from fastopt.nn import utils
from fastopt.nn.functional import attention

PERIOD = 1 << 20
PERIODS = (1 << 11) + 1
COUNT = PERIODS * PERIOD  # 2^31 + 2^20
DTYPE = torch.bfloat16
GIB = 1 << 30
SPARE = 2 * GIB


def available() -> int:
    """Bytes that may be used without swapping."""
    with open("/proc/meminfo") as lines:
        values = dict(line.split(":", 1) for line in lines)
    return int(values["MemAvailable"].split()[0]) * 1024


def period(seed: int) -> Tensor:
    """The values that repeat."""
    return torch.randn(PERIOD, generator=torch.Generator().manual_seed(seed)).to(DTYPE)


def repeated(values: Tensor) -> Tensor:
    """A flat tensor of them."""
    whole = torch.empty(COUNT, dtype=DTYPE)
    whole.view(PERIODS, PERIOD).copy_(values)
    return whole


def check(whole: Tensor, values: Tensor) -> None:
    """Compares every element, a period at a time."""
    for number, part in enumerate(whole.view(PERIODS, PERIOD)):
        if not torch.equal(part, values.view(PERIOD)):
            raise SystemExit(f"elements from {number * PERIOD} on differ")


def step(values: Tensor, gradient: Tensor) -> Tensor:
    """A parameter after a step of SGD."""
    param = torch.nn.Parameter(values)
    param.grad = gradient
    optim.SGD([param], lr=0.1, weight_decay=0.1, backend="cpu").step()
    return param.detach()


def optimizer_step() -> None:
    """Parameter and gradient lie in the same order."""
    expected = step(period(0), period(1))
    check(step(repeated(period(0)), repeated(period(1))), expected)


def strided_optimizer_step() -> None:
    """The gradient is one value for each row: another order, and no memory to speak of."""
    rows = period(1)[:PERIODS, None]
    values = period(0)
    whole = step(repeated(values).view(PERIODS, PERIOD), rows.expand(PERIODS, PERIOD))
    for number in (*range(0, PERIODS, 97), PERIODS - 2, PERIODS - 1):
        expected = step(values.clone(), rows[number].expand(PERIOD))
        if not torch.equal(whole[number], expected):
            raise SystemExit(f"row {number} differs")


def grad_norm() -> None:
    """The norm in double precision, and clipping."""
    values = period(1)
    expected = values.double().norm() * PERIODS**0.5
    whole = repeated(values)
    norm = utils.get_total_norm([whole])
    if norm != expected.to(norm.dtype):
        raise SystemExit(f"the norm is {norm}, not {expected}")
    param = torch.nn.Parameter(torch.empty(1, dtype=DTYPE).expand(COUNT))
    param.grad = whole
    utils.clip_grad_value_([param], 0.5)
    check(whole, values.clamp(-0.5, 0.5))


HEADS, QUERIES, FEATURES, KEYS = 4, 64, 64, 8
BATCHES = COUNT // (HEADS * QUERIES * FEATURES)


def attention_inputs(batches: int) -> list[Tensor]:
    """Query, key and value."""
    shapes = [(batches, HEADS, rows, FEATURES) for rows in (QUERIES, KEYS, KEYS)]
    return [torch.randn(shape).to(DTYPE) for shape in shapes]


def attention_results(inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients; the output's own is the same for every query."""
    gradient = torch.linspace(-1, 1, FEATURES).to(DTYPE)
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = attention(*leaves, backend="cpu")
    gradients = torch.autograd.grad(output, leaves, gradient.expand_as(output))
    return [output.detach(), *gradients]


def check_batches(whole: Tensor, truth: Tensor) -> None:
    """Compares every batch with the one that all are, in any order of memory."""
    for number, part in enumerate(whole.split(PERIOD // truth.numel())):
        if not torch.equal(part, truth.expand_as(part)):
            raise SystemExit(f"the {number}-th part of the batches differs")


def far_apart(tensor: Tensor, dim: int) -> Tensor:
    """A copy whose last index along ``dim`` is beyond 2^31; what lies between is not touched."""
    strides = list(tensor.stride())
    strides[dim] = COUNT // (tensor.size(dim) - 1)
    return torch.empty(COUNT + PERIOD, dtype=DTYPE).as_strided(tensor.shape, strides).copy_(tensor)


def attention_with_large_strides() -> None:
    """Batches, heads and rows more than 2^31 elements away from the first."""
    inputs = attention_inputs(2)
    expected = attention_results(inputs)
    found = attention_results([far_apart(x, dim) for x, dim in zip(inputs, (0, 1, 2), strict=True)])
    for number, (result, truth) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(result, truth):
            raise SystemExit(f"result {number} differs")


def attention_forward() -> None:
    """The output has more than 2^31 elements, and so would the query, if it did not repeat."""
    inputs = attention_inputs(1)
    expected = attention(*inputs, backend="cpu")
    output = attention(*[x.expand(BATCHES, -1, -1, -1) for x in inputs], backend="cpu")
    check_batches(output, expected)


def attention_backward() -> None:
    """The output and the query's gradient have more than 2^31 elements."""
    inputs = attention_inputs(1)
    expected = attention_results(inputs)
    found = attention_results([x.expand(BATCHES, -1, -1, -1) for x in inputs])
    for result, truth in zip(found[:2], expected[:2], strict=True):
        check_batches(result, truth)


# With the memory that each needs.
CHECKS: tuple[tuple[Callable[[], None], int], ...] = (
    (optimizer_step, 8 * GIB),
    (strided_optimizer_step, 4 * GIB),
    (grad_norm, 4 * GIB),
    (attention_with_large_strides, GIB),
    (attention_forward, 5 * GIB),
    (attention_backward, 10 * GIB),
)


def main() -> None:
    """Prints a line of figures.

    Raises:
        SystemExit: A value is wrong.
    """
    start = time.monotonic()
    done = []
    for run, needed in CHECKS:
        if available() < needed + SPARE:
            print(f"{run.__name__} is left out: {available() / GIB:.0f} GiB are free of the "
                  f"{(needed + SPARE) / GIB:.0f} that it needs")  # fmt: skip
            continue
        torch.manual_seed(0)
        run()
        done.append(run.__name__.replace("_", " "))
    seconds = time.monotonic() - start
    print(
        f"huge: {len(done)} of {len(CHECKS)} with {COUNT:,} elements, {seconds:.0f} s: "
        f"{', '.join(done)}"
    )


if __name__ == "__main__":
    main()
