"""``fastopt.optim.NAdam``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.nadam import nadam
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import Options, weight_decay_of
from fastopt.optim.torch_twin import TorchTwin


class NAdam(TorchTwin, torch.optim.NAdam, functional=nadam):
    r"""Adam with Nesterov momentum (Dozat 2016), a drop-in for :class:`torch.optim.NAdam`.

    .. math::
        \mu_t &= \beta_1 \left(1 - \tfrac{1}{2} \, 0.96^{t \psi}\right), \qquad
        M_t = \mu_1 \mu_2 \cdots \mu_t \\
        \theta &\leftarrow \theta - \mathrm{lr} \,
            \frac{\mu_{t+1} m / (1 - M_{t+1}) + (1 - \mu_t) g / (1 - M_t)}
                 {\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    with Adam's moments :math:`m` and :math:`v`. :math:`M_t` is the state ``mu_product``.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: L2 penalty.
        momentum_decay: :math:`\psi`, how fast the momentum rises to :math:`\beta_1`.
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
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
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
            momentum_decay,
            decoupled_weight_decay,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
        )

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        beta1, beta2 = (float(beta) for beta in group["betas"])  # the host may count with them
        numbers = (scalar(group["lr"]), beta1, beta2, group["eps"], group["momentum_decay"])
        decay = weight_decay_of(group, group["decoupled_weight_decay"])
        return UpdateRule("nadam", *decay, group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")
