"""``fastopt.convert`` and ``fastopt.revert``: torch's modules in a model become ours, and back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import Module

from fastopt.nn.attention import (
    MultiheadAttention,
    TransformerDecoderLayer,
    TransformerEncoderLayer,
)
from fastopt.nn.linear_cross_entropy import LinearCrossEntropyLoss
from fastopt.nn.lstm import LSTM
from fastopt.nn.torch_2_13 import LinearCrossEntropyLoss as StockLinearCrossEntropyLoss


@dataclass(frozen=True, slots=True)
class Twin:
    """A class of torch's and ours.

    Attributes:
        stock: Torch's.
        ours: Ours, derived from it.
        own: The attributes that only ours has, with the values under which it does what torch's
            does. Those that begin with an underscore have no effect on results.
        attentions: The submodules that have to be a ``MultiheadAttention`` of either kind.
    """

    stock: type[Module]
    ours: type[Module]
    own: dict[str, Any] = field(default_factory=dict)
    attentions: tuple[str, ...] = ()


TWINS = (
    Twin(torch.nn.LSTM, LSTM, {"weight_dropout": 0.0, "_backend": None, "_frozen": None}),
    Twin(torch.nn.MultiheadAttention, MultiheadAttention),
    Twin(torch.nn.TransformerEncoderLayer, TransformerEncoderLayer, attentions=("self_attn",)),
    Twin(
        torch.nn.TransformerDecoderLayer,
        TransformerDecoderLayer,
        attentions=("self_attn", "multihead_attn"),
    ),
    Twin(
        StockLinearCrossEntropyLoss,
        LinearCrossEntropyLoss,
        {"softcap": 0.0, "z_loss": 0.0, "_backend": None},
    ),
)


@dataclass(frozen=True, slots=True)
class ConvertedModule:
    """What became of one module.

    Attributes:
        path: Its name in the model, as ``named_modules`` gives it; "" is the model itself.
        before: The class that it had.
        after: The class that it has now; the same where it was left.
        reason: Why it was left, or "".
    """

    path: str
    before: str
    after: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Conversion:
    """What ``convert`` or ``revert`` did; ``print`` shows it as a table."""

    modules: tuple[ConvertedModule, ...]

    @property
    def changed(self) -> tuple[ConvertedModule, ...]:
        """The modules that have another class now."""
        return tuple(module for module in self.modules if not module.reason)

    @property
    def left(self) -> tuple[ConvertedModule, ...]:
        """The modules that were left, each with its reason."""
        return tuple(module for module in self.modules if module.reason)

    def __str__(self) -> str:
        """A line for each module."""
        if not self.modules:
            return "no module that torch and fastopt both have"
        rows = [
            (m.path or "(the model)", m.before, f"left: {m.reason}" if m.reason else m.after)
            for m in self.modules
        ]
        rows.insert(0, ("module", "was", "is"))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows)


def convert(
    model: Module,
    *,
    include: Collection[str | type[Module]] | None = None,
    exclude: Collection[str | type[Module]] = (),
) -> Conversion:
    """Makes torch's modules in a model fastopt's, in place: a model trains on without a new line.

    Only ``__class__`` changes, of ``LSTM``, ``MultiheadAttention``, ``TransformerEncoderLayer``,
    ``TransformerDecoderLayer`` and ``LinearCrossEntropyLoss``. Parameters are the same objects, so
    that optimizers, tied weights, hooks and wrappers such as ``DistributedDataParallel`` and
    ``torch.compile`` go on with them; ``state_dict`` has the same keys.

    A class derived from torch's may do anything else, so it is left. ``fully_shard`` and
    ``torch.nn.utils.parametrize`` make such classes: convert before them. ``torch.jit.script`` and
    ``torch.fx.symbolic_trace`` know torch's classes alone: revert before them.

    Args:
        model: The model; it may be one of those modules itself.
        include: Change these only: names of modules as ``named_modules`` gives them, which stand
            for all inside as well, or classes.
        exclude: Leave these: names or classes, likewise.

    Returns:
        Each module of such a class, or of one derived from or called like it: what it was and is,
        or why it was left.

    Raises:
        TypeError: It is no module, or there is no list of names and classes.
        ValueError: The model has no module of a name.
    """
    _check_model(model)
    included = None if include is None else _chosen(model, "include", include)
    excluded = _chosen(model, "exclude", exclude)
    done = []
    for path, module, twin in _concerned(model):
        before, reason = _name(type(module)), _obstacle(module, twin.stock, twin)
        if included is not None and module not in included:
            reason = "not included"
        if module in excluded:
            reason = "excluded"
        if not reason:
            module.__class__ = twin.ours
            vars(module).update(twin.own)
        done.append(ConvertedModule(path, before, _name(type(module)), reason))
    return Conversion(tuple(done))


def revert(model: Module) -> Conversion:
    """Makes fastopt's modules in a model torch's, in place: what ``convert`` did is undone.

    Modules that were made as fastopt's become torch's as well, unless an option that torch has not
    got changes what they compute. A frozen LSTM is no longer.

    Args:
        model: The model; it may be one of those modules itself.

    Returns:
        As of ``convert``.

    Raises:
        TypeError: It is no module.
    """
    _check_model(model)
    done = []
    for path, module, twin in _concerned(model):
        before, reason = _name(type(module)), _obstacle(module, twin.ours, twin)
        for name, usual in twin.own.items():
            value = getattr(module, name, usual)
            if not name.startswith("_") and value != usual:
                reason = reason or f"torch has no {name}={value!r}"
        if not reason:
            for name in twin.own:
                vars(module).pop(name, None)
            module.__class__ = twin.stock
        done.append(ConvertedModule(path, before, _name(type(module)), reason))
    return Conversion(tuple(done))


def _check_model(model: Module) -> None:
    if not isinstance(model, Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r}")


def _concerned(model: Module) -> Iterator[tuple[str, Module, Twin]]:
    """The modules that are, are derived from, or are called like a twin."""
    for path, module in model.named_modules():
        name = type(module).__name__
        if isinstance(module, torch.jit.ScriptModule):  # of which only that name is left
            name = module.original_name
        for twin in TWINS:
            if isinstance(module, twin.stock) or name == twin.stock.__name__:
                yield path, module, twin
                break


def _obstacle(module: Module, expected: type[Module], twin: Twin) -> str:
    """Why the class of a module cannot be changed from the one expected, or ""."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit has compiled it"
    if cls in (twin.stock, twin.ours) and cls is not expected:
        return "it is already"
    if cls is not expected:
        relation = "derived from" if issubclass(cls, expected) else "not"
        return f"its class is {relation} {_name(expected)}"
    if "forward" in vars(module):
        return "its forward was replaced"
    for name in twin.attentions:
        attention = type(getattr(module, name))
        if attention not in (torch.nn.MultiheadAttention, MultiheadAttention):
            return f"its {name} is a {_name(attention)}"
    return ""


def _chosen(model: Module, argument: str, choices: Collection[str | type[Module]]) -> set[Module]:
    if not isinstance(choices, Collection) or isinstance(choices, str):
        raise TypeError(f"{argument} must be a list of names and classes, got {choices!r}")
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen: set[Module] = set()
    for choice in choices:
        if isinstance(choice, type):
            chosen.update(module for module in modules.values() if isinstance(module, choice))
        elif choice in modules:
            chosen.update(modules[choice].modules())
        else:
            raise ValueError(f"the model has no module named {choice!r}")
    return chosen


def _name(cls: type[Module]) -> str:
    for twin in TWINS:
        if cls in (twin.stock, twin.ours):
            return f"{'torch' if cls is twin.stock else 'fastopt'}.nn.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"
