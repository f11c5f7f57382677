"""``fastopt.optim.Adamax``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamax import adamax
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import Options, weight_decay_of
from fastopt.optim.torch_twin import TorchTwin


class Adamax(TorchTwin, torch.optim.Adamax, functional=adamax):
    r"""Adamax (Kingma and Ba 2015, section 7.1), a drop-in for :class:`torch.optim.Adamax`.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        u &\leftarrow \max(\beta_2 u, |g| + \epsilon) \\
        \theta &\leftarrow \theta - \frac{\mathrm{lr}}{1 - \beta_1^t} \frac{m}{u}

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the moment and of the largest gradient.
        eps: Added to the gradient's absolute value.
        weight_decay: L2 penalty.
        foreach: Accepted and checked as torch does; the kernels do not depend on it.
        maximize: Ascend instead of descend.
        differentiable: Let autograd record the step; torch's own implementation steps then.
        capturable: For accelerators' graphs; steps are counted on the device then.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range, as in torch.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            foreach,
            maximize=maximize,
            differentiable=differentiable,
            capturable=capturable,
        )

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        beta1, beta2 = group["betas"]
        numbers = (scalar(group["lr"]), scalar(beta1), scalar(beta2), group["eps"])
        decay = weight_decay_of(group, decoupled=False)
        return UpdateRule("adamax", *decay, group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("exp_avg", "exp_inf")
