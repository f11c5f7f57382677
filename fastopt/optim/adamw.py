"""``fastopt.optim.AdamW``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.optim.adam import Adam
from fastopt.optim.fused_optimizer import Options


class AdamW(Adam, torch.optim.AdamW):
    r"""Adam with decoupled weight decay (Loshchilov and Hutter 2019).

    A drop-in for :class:`torch.optim.AdamW`: :class:`fastopt.optim.Adam` whose parameters are
    multiplied by :math:`1 - \mathrm{lr} \cdot \mathrm{weight\_decay}` first.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the two moments, two numbers or two tensors of one element.
        eps: Added to the denominator.
        weight_decay: Decay per unit of the learning rate.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018).
        maximize: Ascend instead of descend.
        foreach: Accepted and checked as torch does; the kernels do not depend on it.
        capturable: For accelerators' graphs; torch's own implementation steps then.
        differentiable: Let autograd record the step; torch's own implementation steps then.
        fused: Accepted and checked as torch does; the kernels do not depend on it.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range, as in torch.
        RuntimeError: ``fused`` together with ``foreach`` or ``differentiable``.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        torch.optim.AdamW.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
