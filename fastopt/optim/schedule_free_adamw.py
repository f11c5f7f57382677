"""``fastopt.optim.ScheduleFreeAdamW``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule, WeightDecay
from fastopt.backends.planning import new_average
from fastopt.ops.arguments import is_number
from fastopt.optim.fused_optimizer import FusedOptimizer, Options, check_hyperparameters


class ScheduleFreeAdamW(FusedOptimizer):
    r"""Schedule-free AdamW (Defazio et al. 2024, "The Road Less Scheduled").

    Instead of a learning rate that falls, an average :math:`x` of the iterates :math:`z`; gradients
    are taken between them, at :math:`y`:

    .. math::
        y &= (1 - \beta_1) z + \beta_1 x \\
        d &= \frac{g(y)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon} + \mathrm{weight\_decay} \cdot y \\
        z &\leftarrow z - \mathrm{lr}_t \, d \\
        x &\leftarrow (1 - c_t) x + c_t z, \qquad
        c_t = \frac{w_t}{w_1 + \dots + w_t}, \quad
        w_t = t^r \max(\mathrm{lr}_1, \dots, \mathrm{lr}_t)^\mathrm{weight\_lr\_power}

    The parameters are :math:`y` while training and :math:`x` for evaluation and checkpoints: call
    :meth:`train` before the first step and :meth:`eval` before evaluating. Names, defaults and
    state are those of ``schedulefree.AdamWScheduleFree``, whose checkpoints load here, and ours
    there; unlike there, a step leaves the gradients as they are.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        betas: Share of the average in :math:`y`, and decay rate of the second moment.
        eps: Added to the denominator.
        weight_decay: Decay per unit of the learning rate, at :math:`y`.
        warmup_steps: The learning rate rises linearly for so many steps.
        r: Power of the step in the weights of the average.
        weight_lr_power: Power of the learning rate in them, which counts while it rises.
        foreach: Kept for those who load the checkpoint; the kernels do not depend on it.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        foreach: bool | None = True,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        check_hyperparameters(lr, betas, weight_decay, eps)
        if betas[0] == 0:
            raise ValueError(f"Invalid beta parameter at index 0: {betas[0]}")
        if not (is_number(warmup_steps) and 0 <= warmup_steps < math.inf):
            raise ValueError(f"Invalid warmup_steps value: {warmup_steps!r}")
        for name, power in {"r": r, "weight_lr_power": weight_lr_power}.items():
            if not (is_number(power) and math.isfinite(power)):
                raise ValueError(f"Invalid {name} value: {power!r}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "r": r, "k": 0}
        defaults |= {"warmup_steps": warmup_steps, "train_mode": False, "weight_sum": 0.0}
        defaults |= {"lr_max": -1.0, "scheduled_lr": 0.0, "weight_lr_power": weight_lr_power}
        super().__init__(params, {**defaults, "weight_decay": weight_decay, "foreach": foreach})

    def train(self) -> None:
        """Moves the parameters to where gradients are taken."""
        self._exchange("train()", True)

    def eval(self) -> None:
        """Moves the parameters to the average, which is what has been learned."""
        self._exchange("eval()", False)

    @torch.no_grad()
    def _exchange(self, what: str, train_mode: bool) -> None:
        self._refuse_inside_average(what)
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            beta1, _ = group["betas"]
            towards_iterate = 1 - beta1 if train_mode else 1 - 1 / beta1
            for param in group["params"]:
                iterate = self.state.get(param, {}).get("z")
                if iterate is not None:
                    param.lerp_(iterate, towards_iterate)
            group["train_mode"] = train_mode

    def _check_mode(self) -> None:
        super()._check_mode()
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError("step() in eval mode: the optimizer needs train() before it")

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        after, weight = _after_step(group)
        average_weight = weight / after["weight_sum"] if after["weight_sum"] else 0.0
        own = group["eps"], group["weight_decay"], average_weight, after["k"]
        no_decay = WeightDecay.DECOUPLED, 1.0  # the rule has its own, at another place
        numbers = (after["scheduled_lr"], *group["betas"], *own)
        return UpdateRule("schedule_free_adamw", *no_decay, False, numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("z", "exp_avg_sq")

    def _new_state(self, key: str, param: Tensor) -> Tensor:
        return new_average(param) if key == "z" else super()._new_state(key, param)

    def _torch_update(self, group: ParamGroup, param: Tensor, grad: Tensor, *slots: Tensor) -> None:
        iterate, exp_avg_sq = slots
        numbers = self._update_rule(group).hyperparameters
        lr, beta1, beta2, eps, weight_decay, average_weight, step = (float(n) for n in numbers)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq / (1 - beta2**step)).sqrt_().add_(eps)
        direction = grad / denominator + weight_decay * param
        param.lerp_(iterate, average_weight)
        param.sub_(direction, alpha=lr * (1 - beta1 * (1 - average_weight)))
        iterate.sub_(direction, alpha=lr)

    def _count_step(self) -> None:
        for group in self.param_groups:
            group.update(_after_step(group)[0])


def _after_step(group: ParamGroup) -> tuple[ParamGroup, float]:
    """What a group counts, after its next step, and the weight of that step in the average."""
    step, warmup_steps = group["k"] + 1, group["warmup_steps"]
    lr = float(group["lr"]) * (min(1.0, step / warmup_steps) if warmup_steps else 1.0)
    lr_max = max(lr, group["lr_max"])
    weight = float(step ** group["r"] * lr_max ** group["weight_lr_power"])
    weight_sum = group["weight_sum"] + weight
    return {"k": step, "scheduled_lr": lr, "lr_max": lr_max, "weight_sum": weight_sum}, weight
