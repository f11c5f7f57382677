"""``fastopt.optim.Lion``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import FusedOptimizer, Options, weight_decay_of


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
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if len(betas) != 2:
            raise ValueError(f"betas must be two numbers, got {betas}")
        for index, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
        if not weight_decay >= 0:
            raise ValueError(f"Invalid weight_decay value: {weight_decay}")
        defaults = {"lr": lr, "betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        beta1, beta2 = group["betas"]
        numbers = (scalar(group["lr"]), scalar(beta1), scalar(beta2))
        return UpdateRule("lion", *weight_decay_of(group, True), group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("exp_avg",)

    def _prepare(self, group: ParamGroup) -> None:
        if any(param.grad is not None and param.grad.is_sparse for param in group["params"]):
            raise RuntimeError("Lion does not support sparse gradients")

    def _torch_step(self, group: ParamGroup) -> None:
        self._prepare(group)
        lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
        beta1, beta2 = group["betas"]
        for param in group["params"]:
            state = self.state[param]
            if "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            lion(
                *(_real(tensor) for tensor in (param, param.grad, state["exp_avg"])),
                lr=lr,
                beta1=beta1,
                beta2=beta2,
                weight_decay=weight_decay,
                maximize=group["maximize"],
            )


def lion(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: bool,
) -> None:
    """One step of Lion in torch's own operations, in place on ``param`` and ``exp_avg``.

    Args:
        param: The parameter, real, any shape.
        grad: Its gradient, the same shape.
        exp_avg: Its moment, the same shape.
        lr: Learning rate.
        beta1: Weight of the moment in the update.
        beta2: Decay rate of the moment.
        weight_decay: Decay per unit of the learning rate.
        maximize: Ascend instead of descend.
    """
    if maximize:
        grad = -grad
    param.mul_(1 - lr * weight_decay)
    param.sub_(exp_avg.lerp(grad, 1 - beta1).sign_(), alpha=lr)
    exp_avg.lerp_(grad, 1 - beta2)


def _real(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
