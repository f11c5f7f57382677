"""``fastopt.optim.RMSprop``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.rmsprop import rmsprop
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import Options, weight_decay_of
from fastopt.optim.torch_twin import TorchTwin


class RMSprop(TorchTwin, torch.optim.RMSprop, functional=rmsprop):
    r"""RMSprop (Hinton 2012), a drop-in for :class:`torch.optim.RMSprop`.

    .. math::
        v &\leftarrow \alpha v + (1 - \alpha) g^2 \\
        \theta &\leftarrow \theta - \mathrm{lr} \, \frac{g}{\sqrt{v} + \epsilon}

    With ``centered``, :math:`v - a^2` stands for :math:`v` in the root, where :math:`a` is the
    average of the gradients themselves (Graves 2013). With ``momentum``, the quotient enters a
    velocity and the velocity moves the parameter.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        alpha: Decay rate of both averages.
        eps: Added to the denominator.
        weight_decay: L2 penalty.
        momentum: Decay rate of the velocity.
        centered: Divide by the standard deviation.
        capturable: For accelerators' graphs; steps are counted on the device then.
        foreach: Accepted and checked as torch does; the kernels do not depend on it.
        maximize: Ascend instead of descend.
        differentiable: Let autograd record the step; torch's own implementation steps then.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range, as in torch.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum,
            centered,
            capturable,
            foreach,
            maximize,
            differentiable,
        )

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        name = "rmsprop"
        name += "_centered" if group["centered"] else ""
        name += "_momentum" if group["momentum"] > 0 else ""
        numbers = (scalar(group["lr"]), group["alpha"], group["eps"], group["momentum"])
        decay = weight_decay_of(group, decoupled=False)
        return UpdateRule(name, *decay, group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        mean = ("grad_avg",) if group["centered"] else ()
        velocity = ("momentum_buffer",) if group["momentum"] > 0 else ()
        return ("square_avg", *mean, *velocity)
