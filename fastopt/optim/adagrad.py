"""``fastopt.optim.Adagrad``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adagrad import adagrad
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import Options, weight_decay_of
from fastopt.optim.torch_twin import TorchTwin


class Adagrad(TorchTwin, torch.optim.Adagrad, functional=adagrad):
    r"""Adagrad (Duchi et al. 2011), a drop-in for :class:`torch.optim.Adagrad`.

    .. math::
        s &\leftarrow s + g^2 \\
        \theta &\leftarrow \theta - \frac{\mathrm{lr}}{1 + (t - 1) \, \mathrm{lr\_decay}}
            \frac{g}{\sqrt{s} + \epsilon}

    The sum exists from the constructor on. Sparse gradients go to torch's own implementation.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        lr_decay: How fast the learning rate falls.
        weight_decay: L2 penalty.
        initial_accumulator_value: The sum before the first step.
        eps: Added to the denominator.
        foreach: Accepted and checked as torch does; the kernels do not depend on it.
        maximize: Ascend instead of descend.
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
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr,
            lr_decay,
            weight_decay,
            initial_accumulator_value,
            eps,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
        )

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        numbers = (scalar(group["lr"]), group["lr_decay"], group["eps"])
        decay = weight_decay_of(group, decoupled=False)
        return UpdateRule("adagrad", *decay, group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("sum",)
