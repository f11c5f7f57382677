"""``fastopt.optim.LAMB``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule, WeightDecay
from fastopt.backends.planning import counter_device, scalar
from fastopt.optim.fused_optimizer import FusedOptimizer, Options, check_hyperparameters


class LAMB(FusedOptimizer):
    r"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning").

    .. math::
        r &= \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}
            + \mathrm{weight\_decay} \cdot \theta \\
        \theta &\leftarrow \theta - \mathrm{lr} \frac{\|\theta\|}{\|r\|} r

    with Adam's moments :math:`m` and :math:`v`. The norms are those of one parameter; where one of
    them is zero, their quotient, the trust ratio, is 1. Names and defaults are those of
    ``apex.optimizers.FusedLAMB``, gradients clipped to a norm of 1 among them:
    ``max_grad_norm=None`` leaves them as they are. The norms of a ``DTensor`` are those of all its
    parts; torch's operations step it, where there is a trust ratio. The state has ``step``,
    ``exp_avg`` and ``exp_avg_sq`` of each parameter, as that of torch's Adam.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        bias_correction: Divide the moments by :math:`1 - \beta^t`.
        betas: Decay rates of the two moments.
        eps: Added to the denominator.
        weight_decay: Of :math:`\theta` in the direction. Without it there is no trust ratio.
        adam_w_mode: Otherwise the decay enters the gradient, as an L2 penalty.
        grad_averaging: :math:`m` takes :math:`1 - \beta_1` of a gradient, otherwise all of it.
        use_nvlamb: A trust ratio without weight decay too.
        maximize: Ascend instead of descend.
        capturable: For accelerators' graphs; steps are counted on the device then.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    max_grad_norm: float | None = 1.0

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        use_nvlamb: bool = False,
        maximize: bool = False,
        capturable: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        check_hyperparameters(lr, betas, weight_decay, eps)
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "adam_w_mode": adam_w_mode}
        defaults |= {"grad_averaging": grad_averaging, "use_nvlamb": use_nvlamb}
        super().__init__(params, {**defaults, "maximize": maximize, "capturable": capturable})

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        beta1, beta2 = group["betas"]
        weight_decay = float(group["weight_decay"])
        own = weight_decay if group["adam_w_mode"] else 0.0
        weights = group["eps"], own, _gradient_weight(group), float(group["bias_correction"])
        numbers = (scalar(group["lr"]), beta1, beta2, *weights)
        name = "lamb" if _has_trust_ratio(group) else "lamb_without_trust"
        if group["adam_w_mode"] or weight_decay == 0:  # the rule's own, at another place
            return UpdateRule(name, WeightDecay.DECOUPLED, 1.0, group["maximize"], numbers)
        return UpdateRule(name, WeightDecay.L2, weight_decay, group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _prepare(self, group: ParamGroup) -> None:
        super()._prepare(group)
        for param in group["params"]:
            if param.grad is None or "step" in self.state[param]:
                continue
            state, place = self.state[param], counter_device(group, param)
            state["step"] = torch.zeros((), dtype=torch.float32, device=place)
            for key in self._state_keys(group):
                state[key] = self._new_state(key, param)

    def _torch_update(self, group: ParamGroup, param: Tensor, grad: Tensor, *slots: Tensor) -> None:
        step, exp_avg, exp_avg_sq = slots
        (beta1, beta2), weight_decay = group["betas"], group["weight_decay"]
        step.add_(1)
        corrects = group["bias_correction"]
        correction1 = 1 - beta1 ** step.double() if corrects else 1.0
        correction2 = 1 - beta2 ** step.double() if corrects else 1.0
        if group["maximize"]:
            grad = -grad
        if not group["adam_w_mode"]:
            grad = grad.add(param, alpha=weight_decay)
        exp_avg.mul_(beta1).add_(grad, alpha=_gradient_weight(group))
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        direction = exp_avg / correction1 / ((exp_avg_sq / correction2).sqrt_() + group["eps"])
        if group["adam_w_mode"]:
            direction.add_(param, alpha=weight_decay)
        if _has_trust_ratio(group):
            norm, length = (
                torch.linalg.vector_norm(tensor, dtype=torch.float64)
                for tensor in (param, direction)
            )
            direction.mul_(torch.where((norm != 0) & (length != 0), norm / length, 1.0))
        param.sub_(direction, alpha=float(group["lr"]))


def _gradient_weight(group: ParamGroup) -> float:
    return 1 - float(group["betas"][0]) if group["grad_averaging"] else 1.0


def _has_trust_ratio(group: ParamGroup) -> bool:
    return bool(group["use_nvlamb"] or group["weight_decay"] != 0)
