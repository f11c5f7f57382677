"""``fastopt.optim.Adam``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import Options, weight_decay_of
from fastopt.optim.torch_twin import TorchTwin


class Adam(TorchTwin, torch.optim.Adam, functional=adam):
    r"""Adam (Kingma and Ba 2015), a drop-in for :class:`torch.optim.Adam`.

    .. math::
        m &\leftarrow \beta_1 m + (1 - \beta_1) g \\
        v &\leftarrow \beta_2 v + (1 - \beta_2) g^2 \\
        \theta &\leftarrow \theta - \mathrm{lr} \,
            \frac{m / (1 - \beta_1^t)}{\sqrt{v / (1 - \beta_2^t)} + \epsilon}

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        betas: Decay rates of the two moments, two numbers or two tensors of one element.
        eps: Added to the denominator.
        weight_decay: L2 penalty.
        amsgrad: Divide by the largest second moment so far (Reddi et al. 2018).
        foreach: Accepted and checked as torch does; the kernels do not depend on it.
        maximize: Ascend instead of descend.
        capturable: For accelerators' graphs; torch's own implementation steps then.
        differentiable: Let autograd record the step; torch's own implementation steps then.
        fused: Accepted and checked as torch does; the kernels do not depend on it.
        decoupled_weight_decay: Decay as AdamW does.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range, as in torch.
        RuntimeError: ``fused`` together with ``foreach`` or ``differentiable``.
    """

    _stores_state = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        beta1, beta2 = group["betas"]
        return UpdateRule(
            "amsgrad" if group["amsgrad"] else "adam",
            *weight_decay_of(group, group["decoupled_weight_decay"]),
            group["maximize"],
            (scalar(group["lr"]), scalar(beta1), scalar(beta2), group["eps"]),
        )

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        if group["amsgrad"]:
            return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        return ("exp_avg", "exp_avg_sq")
