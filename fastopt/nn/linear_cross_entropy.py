"""The last linear layer and its cross-entropy in one, as torch 2.13 has them, for each torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as torch_functional

from fastopt.backends import registry
from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.plain_tensors import autocast_dtype, transformed
from fastopt.nn.torch_2_13 import LinearCrossEntropyLoss as StockLoss
from fastopt.nn.torch_2_13 import LinearCrossEntropyOptions
from fastopt.ops.arguments import is_scalar
from fastopt.ops.linear_cross_entropy import linear_cross_entropy as run
from fastopt.ops.linear_cross_entropy import stock_linear_cross_entropy

__all__ = ["LinearCrossEntropyLoss", "LinearCrossEntropyOptions", "linear_cross_entropy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: LinearCrossEntropyOptions | None = None,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """The twin of ``torch.nn.functional.linear_cross_entropy``.

    The logits are never in memory as a whole, with or without ``options``, and gradients are formed
    in the forward pass, unless each row's loss may get a gradient of its own. Derivatives of higher
    order, ``torch.func`` and ``retain_graph`` work. What the kernels do not take, K-dimensional
    losses among them, runs in torch.

    Args:
        input: ``[rows, features]`` or ``[features]``.
        linear_weight: ``[classes, features]``, or ``[classes, d_1, ..., d_K, features]`` of a
            K-dimensional loss.
        target: Classes ``[rows]`` or ``[rows, d_1, ..., d_K]``, int64, or their probabilities,
            ``[rows, classes]`` or ``[rows, classes, d_1, ..., d_K]``; without rows where the input
            has none.
        linear_bias: ``[classes]`` or ``[classes, d_1, ..., d_K]``.
        weight: Of each class in the loss, ``[classes]``.
        reduction: ``mean``, ``sum`` or ``none``.
        ignore_index: Rows of this target have no part in loss and gradients; None is -100, and the
            only value that goes with probabilities.
        label_smoothing: How much of the target is spread over all classes, from 0 to 1.
        options: A chunk has no more rows than they say, where they name a size or a method; by
            themselves they change nothing.
        softcap: Logits become ``softcap * tanh(logit / softcap)``; 0: they stay.
        z_loss: The weight of each row's squared logsumexp, added to its loss (Chowdhery et al.
            2022, "PaLM"). ``weight`` does not scale it; its mean is over the rows that have a part.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton``, ``torch`` (stock's own) or ``reference``.

    Returns:
        A number, or with ``none`` the shape of a target of classes.

    Raises:
        RuntimeError: As torch; or no backend takes the tensors.
        IndexError: A target is no class; on a card the row becomes NaN instead.
        TypeError: An argument is of another type.
        ValueError: ``softcap`` or ``z_loss`` is out of its range, or as torch.
    """
    _check_shapes(input, linear_weight, linear_bias)
    probabilities = target.shape == (*input.shape[:-1], *linear_weight.shape[:-1])
    if probabilities and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    check_extras(softcap, z_loss)
    if weight is not None and not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor or None, got {weight!r}")
    if not is_scalar(label_smoothing):
        raise TypeError(f"label_smoothing must be a number, got {label_smoothing!r}")
    chunk_rows = 0
    if options is not None:
        chunk_rows = _chunk_rows(options, input, linear_weight.size(0))
    request = LinearCrossEntropyRequest(
        input, linear_weight, target, linear_bias, weight, reduction,
        -100 if ignore_index is None else ignore_index, float(label_smoothing), float(softcap),
        float(z_loss), chunk_rows,
    )  # fmt: skip
    dtype = input.dtype
    lower = autocast_dtype(input.device)
    if lower is not None:
        request = _autocast(request, lower, probabilities)
        dtype = torch.float32 if request.input.dtype is lower else dtype
    loss = run(_batched(request), backend)
    if loss is None:
        return _stock(request, options, probabilities)
    return loss.to(dtype) if input.dim() == 2 or reduction != "none" else loss.to(dtype).squeeze(0)


class LinearCrossEntropyLoss(StockLoss):
    """The twin of ``torch.nn.LinearCrossEntropyLoss``: constructor, ``state_dict``, results.

    Args:
        in_features: Of each row.
        num_classes: How many classes there are.
        out_features: ``(d_1, ..., d_K)`` of a K-dimensional loss.
        bias: Whether the linear layer has one.
        device: Of the linear layer.
        dtype: Of the linear layer.
        reduction: ``mean``, ``sum`` or ``none``.
        weight: Of each class in the loss, ``[num_classes]``.
        ignore_index: Rows of this target have no part in loss and gradients.
        label_smoothing: How much of the target is spread over all classes, from 0 to 1.
        options: A chunk has no more rows than they say.
        softcap: As in :func:`linear_cross_entropy`.
        z_loss: As in :func:`linear_cross_entropy`.
        backend: ``auto``, ``cpu``, ``cuda``, ``triton``, ``torch`` (stock's own) or
            ``reference``; None leaves the choice to ``fastopt.use_backend`` and
            ``FASTOPT_BACKEND``.

    Raises:
        RuntimeError: As torch.
        ValueError: ``softcap``, ``z_loss`` or ``backend`` is out of its range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        softcap: float = 0.0,
        z_loss: float = 0.0,
        backend: str | None = None,
    ) -> None:
        check_extras(softcap, z_loss)
        if backend is not None:
            registry.check_name(backend)
        super().__init__(
            in_features, num_classes, out_features=out_features, bias=bias, device=device,
            dtype=dtype, reduction=reduction, weight=weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, options=options,
        )  # fmt: skip
        self.softcap = softcap
        self.z_loss = z_loss
        self._backend = backend

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of a layer's input, as :func:`linear_cross_entropy`.

        Args:
            input: ``[rows, in_features]``.
            target: Classes or probabilities, as ``torch.nn.CrossEntropyLoss`` takes them.

        Returns:
            The loss, reduced as the module says.
        """
        shape = self.num_classes, *self.out_features
        bias = self.linear.bias
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if bias is None else bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            softcap=self.softcap,
            z_loss=self.z_loss,
            backend=self._backend,
        )

    def extra_repr(self) -> str:
        """Torch's, with what is ours where it is used."""
        extras = {"softcap": self.softcap, "z_loss": self.z_loss, "backend": self._backend}
        return ", ".join([super().extra_repr(), *(f"{k}={v!r}" for k, v in extras.items() if v)])


def check_extras(softcap: float, z_loss: float) -> None:
    """Raises ValueError for what is out of its range."""
    if not (is_scalar(softcap) and 0 <= softcap < math.inf):
        raise ValueError(f"softcap must be finite and not negative, got {softcap!r}")
    # Bounds, which Dynamo follows where the number is symbolic.
    if not (is_scalar(z_loss) and -math.inf < z_loss < math.inf):
        raise ValueError(f"z_loss must be finite, got {z_loss!r}")


def _check_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """Torch's checks, in its words."""
    if not 1 <= input.dim() <= 2:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, "
            f"got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {input.shape[-1]}), got unbatched input with shape "
            f"{tuple(input.shape)}"
        )


def _chunk_rows(options: LinearCrossEntropyOptions, input: Tensor, classes: int) -> int:
    """The size of a chunk that the options ask for, by torch's rule; 0: they leave it to us.

    Raises:
        ValueError: They name a size and a method that gives another one.
        RuntimeError: Their dtype of sums does not go with the input.
    """
    narrow = input.dtype in (torch.float16, torch.bfloat16)
    sums = options.acc_dtype
    if sums not in (None, input.dtype) and not (narrow and sums is torch.float32):
        raise RuntimeError(
            "linear_cross_entropy supports float32 acc_dtype with float16/bfloat16 inputs, but "
            f"got {sums} acc_dtype and {input.dtype} inputs."
        )
    size, method = options.batch_chunk_size, options.chunking_method
    if method in (None, "auto"):
        return size or 0
    assert method is not None
    rows = input.size(0) if input.dim() == 2 else 1
    share = -(-rows // max(-(-classes // max(input.size(-1), 1)), 1))
    power = 1 << max(share - 1, 0).bit_length()
    factor = int(method.partition(":")[2] or 1)
    found = min(power // factor, rows)
    if size is not None and size != found:
        raise ValueError(
            f"batch_chunk_size (={size}) and chunking_method ('{method}') give different chunk "
            f"sizes ({size} vs {found}); pass only one."
        )
    return max(found, 1)


def _autocast(
    request: LinearCrossEntropyRequest, dtype: torch.dtype, probabilities: bool
) -> LinearCrossEntropyRequest:
    """As autocast runs a linear layer and a cross-entropy: in the lower precision and in fp32."""

    def cast(tensor: Tensor | None, to: torch.dtype) -> Any:
        if tensor is None or not tensor.is_floating_point() or tensor.dtype is torch.float64:
            return tensor
        return tensor.to(to)

    return dataclasses.replace(
        request,
        input=cast(request.input, dtype),
        linear_weight=cast(request.linear_weight, dtype),
        target=cast(request.target, torch.float32) if probabilities else request.target,
        linear_bias=cast(request.linear_bias, dtype),
        weight=cast(request.weight, torch.float32),
    )


def _batched(request: LinearCrossEntropyRequest) -> LinearCrossEntropyRequest:
    """With a dimension of rows, of which an input without one has one."""
    if request.input.dim() == 2:
        return request
    return dataclasses.replace(
        request, input=request.input.unsqueeze(0), target=request.target.unsqueeze(0)
    )


def _stock(
    request: LinearCrossEntropyRequest,
    options: LinearCrossEntropyOptions | None,
    probabilities: bool,
) -> Tensor:
    """What torch makes of it, in chunks where it knows how to."""
    stock = getattr(torch_functional, "linear_cross_entropy", None)
    extras = request.softcap or request.z_loss
    if stock is None or options is None or extras or transformed():
        return stock_linear_cross_entropy(request)
    loss: Tensor = stock(
        request.input, request.linear_weight, request.target, linear_bias=request.linear_bias,
        weight=request.weight, reduction=request.reduction,
        ignore_index=None if probabilities else request.ignore_index,
        label_smoothing=request.label_smoothing, options=options,
    )  # fmt: skip
    return loss
