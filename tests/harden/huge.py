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


# Heads of a batch that repeats: 64 queries of 64 features, few keys.
HEADS, QUERIES, FEATURES, KEYS = 4, 64, 64, 8
OF_BATCH = HEADS * QUERIES * FEATURES
BATCHES = PERIOD // OF_BATCH  # before they repeat


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of the batches of a period."""
    keys = (BATCHES, HEADS, KEYS, FEATURES)
    key, value = (torch.randn(keys).to(DTYPE) for _ in range(2))
    return period(2).view(BATCHES, HEADS, QUERIES, FEATURES), key, value


def whole_batch(tensor: Tensor) -> Tensor:
    """The same for all periods."""
    repeats = tensor.expand(PERIODS, *tensor.shape)
    return repeats.reshape(PERIODS * tensor.size(0), *tensor.shape[1:])


def attention_forward() -> None:
    """Query and output have more than 2^31 elements."""
    query, key, value = attention_inputs()
    expected = attention(query, key, value, backend="cpu")
    large = repeated(query.reshape(-1)).view(-1, HEADS, QUERIES, FEATURES)
    output = attention(large, whole_batch(key), whole_batch(value), backend="cpu")
    check(output.view(-1), expected)


def attention_backward() -> None:
    """Query, output and the gradient of the query have more than 2^31 elements."""
    query, key, value = attention_inputs()
    gradient = torch.randn(FEATURES).to(DTYPE)
    small = query.clone().requires_grad_()
    attention(small, key, value, backend="cpu").backward(gradient.expand_as(small))
    assert small.grad is not None
    large = repeated(query.reshape(-1)).view(-1, HEADS, QUERIES, FEATURES).requires_grad_()
    output = attention(large, whole_batch(key), whole_batch(value), backend="cpu")
    output.backward(gradient.expand_as(output))
    assert large.grad is not None
    check(large.grad.view(-1), small.grad)


# With the memory that each needs.
CHECKS: tuple[tuple[Callable[[], None], int], ...] = (
    (optimizer_step, 8 * GIB),
    (strided_optimizer_step, 4 * GIB),
    (grad_norm, 4 * GIB),
    (attention_forward, 10 * GIB),
    (attention_backward, 14 * GIB),
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
        done.append(run.__name__)
    seconds = time.monotonic() - start
    print(f"huge: {len(done)} of {len(CHECKS)} with {COUNT} elements, {seconds:.0f} s: {done}")


if __name__ == "__main__":
    main()
