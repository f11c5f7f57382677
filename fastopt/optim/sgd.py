"""``fastopt.optim.SGD``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd
from typing_extensions import Unpack

from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import Options, weight_decay_of
from fastopt.optim.torch_twin import TorchTwin


class SGD(TorchTwin, torch.optim.SGD, functional=sgd):
    r"""Stochastic gradient descent, a drop-in for :class:`torch.optim.SGD`.

    With momentum, torch keeps the learning rate out of the velocity:

    .. math::
        b &\leftarrow \mu b + (1 - \mathrm{dampening}) \, g \\
        \theta &\leftarrow \theta - \mathrm{lr} \, b

    ``classical_momentum=True`` puts it in, as textbooks and Keras do:

    .. math::
        v &\leftarrow \mu v + \mathrm{lr} \, g \\
        \theta &\leftarrow \theta - v

    The two agree while the learning rate stays the same. When it drops, the first slows down at
    once and the second coasts on what it has gathered. With ``nesterov`` the last line becomes
    :math:`\theta \leftarrow \theta - \mathrm{lr}(g + \mu b)`, respectively
    :math:`\theta \leftarrow \theta - (\mathrm{lr} \, g + \mu v)`.

    Args:
        params: Parameters, groups of them, or named parameters.
        lr: Learning rate, a number or a tensor of one element.
        momentum: Decay rate of the velocity.
        dampening: Share of the gradient that does not enter the velocity after the first step.
        weight_decay: L2 penalty.
        nesterov: Look one step ahead (Nesterov 1983).
        maximize: Ascend instead of descend.
        foreach: Accepted and checked as torch does; the kernels do not depend on it.
        differentiable: Let autograd record the step; torch's own implementation steps then.
        fused: Accepted and checked as torch does; the kernels do not depend on it.
        classical_momentum: The velocity contains the learning rate. An option of a group as well.
            A checkpoint says so; torch ignores the entry and would take the velocity for its own.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range, as in torch;
            ``classical_momentum`` without momentum or with dampening.
        RuntimeError: ``fused`` together with ``foreach`` or ``differentiable``.
    """

    _stores_state = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        classical_momentum: bool = False,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        if classical_momentum and (momentum <= 0 or dampening != 0):
            raise ValueError("Classical momentum requires a momentum and zero dampening")
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

        if classical_momentum:
            # Only where it is asked for, so that state_dict is torch's to the letter otherwise.
            self.defaults["classical_momentum"] = True
            for group in self.param_groups:
                group.setdefault("classical_momentum", True)

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        decay = weight_decay_of(group, decoupled=False)
        lr, momentum = scalar(group["lr"]), scalar(group["momentum"])
        if momentum == 0:
            return UpdateRule("sgd", *decay, group["maximize"], (lr,))
        step_size, weight = (1.0, lr) if group.get("classical_momentum") else (lr, 1.0)
        numbers = (step_size, momentum, weight * (1 - scalar(group["dampening"])), weight)
        name = "nesterov" if group["nesterov"] else "momentum"
        return UpdateRule(name, *decay, group["maximize"], numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return () if group["momentum"] == 0 else ("momentum_buffer",)

    def _torch_step(self, group: ParamGroup) -> None:
        lists = self._torch_lists(group)
        if group.get("classical_momentum") and group["momentum"] != 0:
            # Torch's form at a learning rate of 1, of a loss multiplied by ours.
            lr = scalar(group["lr"])
            lists["d_p_list"] = [grad * lr for grad in lists["d_p_list"]]
            group = {**group, "lr": 1.0, "weight_decay": group["weight_decay"] * lr}
        self._torch_function(group, lists)
        buffers = lists["momentum_buffer_list"]
        for param, buffer in zip(lists["params"], buffers, strict=False):
            self.state[param]["momentum_buffer"] = buffer
