"""``fastopt.optim.RAdam``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.radam import radam
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import Options, weight_decay_of
from fastopt.optim.torch_twin import TorchTwin


class RAdam(TorchTwin, torch.optim.RAdam, functional=radam):
    r"""Rectified Adam (Liu et al. 2020), a drop-in for :class:`torch.optim.RAdam`.

    Adam whose step is multiplied by how far the second moment can be trusted yet,

    .. math::
        \rho_\infty &= \frac{2}{1 - \beta_2} - 1, \qquad
        \rho = \rho_\infty - \frac{2 t \beta_2^t}{1 - \beta_2^t} \\
        r &= \sqrt{\frac{(\rho - 4)(\rho - 2) \rho_\infty}
            {(\rho_\infty - 4)(\rho_\infty - 2) \rho}},

    and that follows the first moment alone while :math:`\rho \le 5`.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty.
        decoupled_weight_decay: Decay as AdamW does.
        foreach: Accepted and checked as torch does; the kernels do not depend on it.
        maximize: Ascend instead of descend.
        capturable: For accelerators' graphs; steps are counted on the device then.
        differentiable: Let autograd record the step; torch's own implementation steps then.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range, as in torch.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        beta1, beta2 = group["betas"]
        numbers = (scalar(group["lr"]), scalar(beta1), scalar(beta2), group["eps"])
        decay = weight_decay_of(group, group["decoupled_weight_decay"])
        return UpdateRule("radam", *decay, group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")
