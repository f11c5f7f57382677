"""``fastopt.optim.Lion``."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import (
    FusedOptimizer,
    Options,
    check_hyperparameters,
    weight_decay_of,
)


class Lion(FusedOptimizer):
    r"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms").

    .. math::
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{weight\_decay}) \, \theta
            - \mathrm{lr} \, \mathrm{sign}(\beta_1 m + (1 - \beta_1) g) \\
        m &\leftarrow \beta_2 m + (1 - \beta_2) g

    One moment instead of Adam's two. Every element moves by the learning rate, so a good one is 3
    to 10 times smaller than AdamW's, and a good weight decay as much larger.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the moment, in the update and in the moment itself.
        weight_decay: Decay per unit of the learning rate, decoupled.
        maximize: Ascend instead of descend.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    _stores_state = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        *,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        check_hyperparameters(lr, betas, weight_decay)
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        beta1, beta2 = group["betas"]
        numbers = (scalar(group["lr"]), scalar(beta1), scalar(beta2))
        return UpdateRule("lion", *weight_decay_of(group, True), group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("exp_avg",)

    def _torch_update(self, group: ParamGroup, param: Tensor, grad: Tensor, *slots: Tensor) -> None:
        (exp_avg,) = slots
        lr, (beta1, beta2) = float(group["lr"]), group["betas"]
        if group["maximize"]:
            grad = -grad
        param.mul_(1 - lr * float(group["weight_decay"]))
        param.sub_(exp_avg.lerp(grad, 1 - beta1).sign_(), alpha=lr)
        exp_avg.lerp_(grad, 1 - beta2)
