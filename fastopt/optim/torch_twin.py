"""What the optimizers share that torch has too: its state and its own code come from its class."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from fastopt.backends.contract import ParamGroup
from fastopt.optim.fused_optimizer import FusedOptimizer


class TorchTwin(FusedOptimizer):
    """Mixed in before a class of ``torch.optim``, whose functional form is named beside it.

    Constructor, checks and state are torch's. Its ``_init_group`` fills lists, and the functional
    form steps what is in them; the names of both say what belongs where.
    """

    _functional: ClassVar[Callable[..., None]]
    _list_names: ClassVar[tuple[str, ...]]
    _option_names: ClassVar[tuple[str, ...]]

    def __init_subclass__(
        cls, functional: Callable[..., None] | None = None, **kwargs: Any
    ) -> None:
        super().__init_subclass__(**kwargs)
        if functional is None:  # a subclass of such a subclass
            return
        cls._functional = staticmethod(functional)
        names = list(inspect.signature(functional).parameters)
        # Both take parameters and gradients first, under different names.
        lists = names[:2] + list(inspect.signature(cls._init_group).parameters)[4:]  # type: ignore[attr-defined]
        cls._list_names = tuple(lists)
        cls._option_names = tuple(name for name in names if name not in lists)

    def _prepare(self, group: ParamGroup) -> None:
        """Runs stock's checks of the gradients and makes the state that stock makes lazily."""
        self._torch_lists(group)

    def _torch_lists(self, group: ParamGroup) -> dict[str, list[Any]]:
        """The lists of the parameters with gradients, by the functional form's names."""
        lists: dict[str, list[Any]] = {name: [] for name in self._list_names}
        self._init_group(group, *lists.values())  # type: ignore[attr-defined]
        return lists

    def _torch_step(self, group: ParamGroup) -> None:
        self._torch_function(group, self._torch_lists(group))

    def _torch_function(self, group: ParamGroup, lists: dict[str, list[Any]]) -> None:
        """Calls the functional form with what it wants to know of the group."""
        params_name, grads_name, *_ = self._list_names
        # Torch's loops view complex gradients as real, which fails for a lazily conjugated one.
        grads = [grad.resolve_conj() for grad in lists[grads_name]]
        known = {
            **group,
            **dict(zip(("beta1", "beta2"), group.get("betas", ()), strict=False)),
            "has_complex": any(param.is_complex() for param in lists[params_name]),
            "has_sparse_grad": any(grad.is_sparse for grad in grads),
        }
        options = {name: known[name] for name in self._option_names if name in known}
        self._functional(**{**lists, grads_name: grads}, **options)
