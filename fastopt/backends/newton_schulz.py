"""Newton-Schulz iterations on batches of matrices, in torch's products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

# Bytes of a batch, which an iteration needs about four times: on a CPU so that it stays in the
# cache (1 MiB to 4 MiB are the fastest on a Xeon with 2 MiB of L2 per core, products of 64 to 384
# rows), elsewhere so that memory is bounded. A single matrix may have more.
BATCH_BYTES = {"cpu": 2**20}
BATCH_BYTES_ELSEWHERE = 2**27

# Rows from which on it pays to leave out what the symmetry of a product repeats: 17% of an
# iteration of 1024 rows on that CPU, nothing below.
SYMMETRIC_ROWS = 1024

# Columns per row from which on the iteration runs faster on the Gram matrix.
GRAM_ASPECT = 1.5


class Iteration(NamedTuple):
    """What a group's iteration is: ``x <- a x + (b x x' + c (x x')^2) x``, so many times.

    Attributes:
        coefficients: ``a``, ``b`` and ``c``.
        eps: The norm by which a matrix is divided first is at least so large.
        steps: How many times.
    """

    coefficients: tuple[float, float, float]
    eps: float
    steps: int

    def check(self) -> None:
        """Torch's checks.

        Raises:
            ValueError: There are too many steps, or there are not three coefficients.
        """
        if self.steps >= 100:
            raise ValueError("Number of steps must be less than 100 for computational efficiency")
        if len(self.coefficients) != 3:
            raise ValueError("Coefficients must be a tuple of exactly 3 values")


def orthogonalised(matrices: list[Tensor], iteration: Iteration) -> Tensor:
    """Brings the singular values of matrices of one shape near 1.

    Returns:
        ``[matrices, rows, columns]``, in the dtype of the products.
    """
    dtype = product_dtype(matrices[0].device)
    batch = matrices[0].new_empty(len(matrices), *matrices[0].shape, dtype=dtype)
    for place, matrix in zip(batch, matrices, strict=True):
        place.copy_(matrix)
    norm = torch.linalg.vector_norm(batch, dim=(1, 2), keepdim=True)
    batch.div_(norm.clamp_(min=iteration.eps))
    is_tall = batch.size(1) > batch.size(2)
    wide = batch.mT if is_tall else batch
    with _own_precision(batch.device):
        # Rounding errors of bf16 grow too large where products of products meet the matrix at last.
        if dtype is torch.float32 and wide.size(2) >= GRAM_ASPECT * wide.size(1):
            wide = _iterate_gram(wide, iteration)
        else:
            wide = _iterate(wide, iteration)
    return wide.mT if is_tall else wide


def product_dtype(device: torch.device) -> torch.dtype:
    """Torch's bf16 where there is hardware for such products, fp32 otherwise.

    A CPU without AMX multiplies bf16 more slowly than fp32: 1.8 times with AVX512-BF16, 5 times
    with AVX-512 alone, 50 times with AVX2.
    """
    if device.type == "cpu" and not torch.cpu._is_amx_tile_supported():
        return torch.float32
    return torch.bfloat16


def batches(matrices: Iterable[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Shares out rows of tensors by what they have in common with the first of a row.

    That is shape, dtype and device; and no more in a batch than the bound on its bytes. Matrices
    without elements are left out.
    """
    alike: dict[object, list[tuple[Tensor, ...]]] = {}
    for row in matrices:
        if row[0].numel() == 0:
            continue
        alike.setdefault((row[0].shape, row[0].dtype, row[0].device), []).append(row)
    for rows in alike.values():
        first, device = rows[0][0], rows[0][0].device
        bytes_each = first.numel() * product_dtype(device).itemsize
        size = BATCH_BYTES.get(device.type, BATCH_BYTES_ELSEWHERE) // max(bytes_each, 1)
        for start in range(0, len(rows), max(size, 1)):
            yield rows[start : start + max(size, 1)]


def _own_precision(device: torch.device) -> AbstractContextManager[None]:
    """Products in the dtype of their factors, whatever autocast says."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _iterate(x: Tensor, iteration: Iteration) -> Tensor:
    a, b, c = iteration.coefficients
    for _ in range(iteration.steps):
        x = torch.baddbmm(x, _polynomial(_product(x, x.mT), b, c), x, beta=a)
    return x


def _iterate_gram(x: Tensor, iteration: Iteration) -> Tensor:
    """The same on ``x x'``, a small square: all that multiplies ``x`` commutes.

    With ``q = a + b g + c g^2`` a step is ``x <- q x``, and so ``g <- q g q``.
    """
    if iteration.steps == 0:
        return x
    a, b, c = iteration.coefficients
    gram = _product(x, x.mT)
    total = torch.empty(0)
    for step in range(iteration.steps):
        factor = _polynomial(gram, b, c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        total = _product(factor, total) if step else factor
        if step + 1 < iteration.steps:
            gram = _product(_product(factor, gram), factor)
    return torch.bmm(total, x)


def _polynomial(gram: Tensor, b: float, c: float) -> Tensor:
    if c == 0:  # a cubic; torch 2.13's baddbmm of bf16 on a CPU is wrong where alpha is 0
        return gram * b
    if _is_halved(gram):
        return _product(gram, gram).mul_(c).add_(gram, alpha=b)
    return torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # rounds once


def _is_halved(left: Tensor) -> bool:
    return left.dtype is torch.float32 and left.size(1) >= SYMMETRIC_ROWS


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A product that is symmetric."""
    return _symmetric_product(left, right) if _is_halved(left) else torch.bmm(left, right)


def _symmetric_product(left: Tensor, right: Tensor) -> Tensor:
    """What is above the diagonal is computed once, blocks of 512 rows and fewer apart."""
    rows = left.size(1)
    if rows <= SYMMETRIC_ROWS // 2:
        return torch.bmm(left, right)
    half = rows // 2
    result = left.new_empty(left.size(0), rows, rows)
    result[:, :half, :half] = _symmetric_product(left[:, :half], right[:, :, :half])
    result[:, half:, half:] = _symmetric_product(left[:, half:], right[:, :, half:])
    corner = torch.bmm(left[:, :half], right[:, :, half:])
    result[:, :half, half:] = corner
    result[:, half:, :half] = corner.mT
    return result
