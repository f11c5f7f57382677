"""``fastopt.optim.Muon``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr, muon
from torch.optim.optimizer import ParamsT
from typing_extensions import Unpack

from fastopt.backends import newton_schulz
from fastopt.backends.contract import ParamGroup, UpdateRule
from fastopt.backends.newton_schulz import Iteration
from fastopt.backends.planning import scalar
from fastopt.optim.fused_optimizer import Options, weight_decay_of
from fastopt.optim.torch_twin import TorchTwin


class Muon(TorchTwin, torch.optim.Muon, functional=muon):
    r"""Momentum whose matrices are made orthogonal (Jordan et al. 2024), for matrices alone.

    .. math::
        b &\leftarrow \mu b + (1 - \mu) g \\
        \theta &\leftarrow (1 - \mathrm{lr} \cdot \mathrm{weight\_decay}) \, \theta
            - \mathrm{lr} \cdot s \cdot \mathrm{NS}(\mu b + (1 - \mu) g)

    A drop-in for :class:`torch.optim.Muon`. :math:`\mathrm{NS}` brings all singular values near 1
    by a Newton-Schulz iteration, :math:`s` is what ``adjust_lr_fn`` says of the shape.

    Matrices of one shape are iterated together, in batches of up to 128 MiB on accelerators and 1
    MiB on a CPU. Products are torch's, so that backend ``torch`` runs them whatever the device; in
    bf16, but in fp32 on a CPU without instructions for such matrices. Where the parameters are bf16
    and ``nesterov`` is off, torch 2.13 divides the momentum itself by its norm: here it stays. Of
    ``DTensor`` and other subclasses, torch's own loop steps one matrix after the other.

    Args:
        params: Matrices, groups of them, or named ones.
        lr: Learning rate, a number or a tensor of one element.
        weight_decay: Decay per unit of the learning rate, decoupled.
        momentum: :math:`\mu`, the momentum's decay rate.
        nesterov: Look one step ahead; otherwise :math:`\mathrm{NS}(b)` is the update.
        ns_coefficients: Of the iteration's polynomial.
        eps: The least norm that matrices are divided by.
        ns_steps: Steps of the iteration.
        adjust_lr_fn: ``"original"``, also None, which makes :math:`s` the root of the rows per
            column, at least 1; or ``"match_rms_adamw"``, a fifth of the root of the longer side.
        options: What surrounds the update, and the backend; see
            :class:`fastopt.optim.Options`.

    Raises:
        ValueError: A hyperparameter is out of range, or a parameter is no matrix, as in torch.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        self._take_options(options)
        torch.optim.Muon.__init__(
            self,
            params,
            lr,  # type: ignore[arg-type]  # torch takes a tensor too
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's, which does not see what is no matrix.

        Raises:
            ValueError: A parameter is no matrix. Nothing has been added then.
        """
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            if param.ndim != 2:
                self.param_groups.pop()
                raise ValueError(
                    "Muon only supports 2D parameters whereas we found a parameter with size: "
                    f"{param.size()}"
                )

    def _update_rule(self, group: ParamGroup) -> UpdateRule:
        iteration = _iteration(group)
        iteration.check()
        momentum = group["momentum"]
        look_ahead = momentum if group["nesterov"] else 1.0
        own = *iteration.coefficients, iteration.eps, float(iteration.steps)
        numbers = (scalar(group["lr"]), momentum, look_ahead, *own)
        plain = group["adjust_lr_fn"] in (None, "original")
        name = "muon" if plain else f"muon_{group['adjust_lr_fn']}"
        return UpdateRule(name, *weight_decay_of(group, True), False, numbers)

    def _state_keys(self, group: ParamGroup) -> tuple[str, ...]:
        return ("momentum_buffer",)

    def _torch_function(self, group: ParamGroup, lists: dict[str, list[Any]]) -> None:
        """Batches of plain tensors; torch's own loop for subclasses, such as DTensor."""
        rows = list(zip(*lists.values(), strict=True))
        plain = [row for row in rows if all(_is_plain(tensor) for tensor in row)]
        odd = [row for row in rows if not all(_is_plain(tensor) for tensor in row)]
        if odd:
            columns = [list(column) for column in zip(*odd, strict=True)]
            super()._torch_function(group, dict(zip(lists, columns, strict=True)))
        iteration = _iteration(group)
        iteration.check()
        lr, momentum = float(group["lr"]), group["momentum"]
        for batch in newton_schulz.batches(plain):
            params, grads, buffers = (list(column) for column in zip(*batch, strict=True))
            torch._foreach_lerp_(buffers, grads, 1 - momentum)
            ahead = torch._foreach_lerp(grads, buffers, momentum) if group["nesterov"] else buffers
            updates = newton_schulz.orthogonalised(list(ahead), iteration)
            adjusted_lr = _adjust_lr(lr, group["adjust_lr_fn"], params[0].shape)
            for param in params:  # torch._foreach_mul_ would round the factor to bf16 on a CPU
                param.mul_(1 - lr * group["weight_decay"])
            torch._foreach_add_(params, list(updates.unbind()), alpha=-adjusted_lr)


def _iteration(group: ParamGroup) -> Iteration:
    return Iteration(group["ns_coefficients"], group["eps"], group["ns_steps"])


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)
