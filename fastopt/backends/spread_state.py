"""State of ``DTensor`` parameters that torch would store otherwise: whole tensors, and their parts.

Everything is placed as its parameter is. The scales of 8-bit state belong to blocks of one rank's
part: they are ``[shards of each dimension..., blocks]``, a row for each part, the shorter ones
filled up with zeros, so that what is saved names the parts that it was saved from. Remainders of
masters are 16-bit integers, which neither gloo nor NCCL moves: a whole one has their bits as those
of a bf16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from fastopt.backends import state_codes
from fastopt.backends.plain_tensors import is_dtensor
from fastopt.backends.state_codes import BLOCK, REMAINDERS, ParamCode, StateCoding

MASTER, _ = REMAINDERS[ParamCode.MASTER]


def local_of(tensor: Any) -> Any:
    """This rank's part of a ``DTensor``; anything else as it is."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def takes_codes(param: Any) -> bool:
    """Whether parts fill their memory and no dimension is cut twice, which scales do not show."""
    if not is_dtensor(param):
        return True
    from torch.distributed.tensor import Replicate, Shard

    dims = [placement.dim for placement in param.placements if type(placement) is Shard]
    replicas = [placement for placement in param.placements if type(placement) is Replicate]
    known = len(dims) + len(replicas) == len(param.placements) and len({*dims}) == len(dims)
    return known and state_codes.is_dense(local_of(param))


def add_missing(
    state: dict[str, Any],
    keys: Sequence[str],
    param: Tensor,
    coding: StateCoding,
    counter_device: torch.device,
) -> list[str]:
    """As ``state_codes.add_missing``."""
    parts = parts_of(state, param)
    made = state_codes.add_missing(parts, keys, local_of(param), coding, counter_device)
    state.update({key: _whole(key, parts[key], param) for key in made})
    return made


def bring_to(
    state: dict[str, Any],
    keys: Sequence[str],
    param: Tensor,
    coding: StateCoding | None,
    rule: str,
    counter_device: torch.device,
) -> None:
    """As ``state_codes.bring_to``.

    Raises:
        RuntimeError: The parameter is not spread as it was where 8-bit state comes from.
    """
    if not is_dtensor(param):
        return state_codes.bring_to(state, keys, param, coding, rule, counter_device)
    before = parts_of(state, param)
    after = dict(before)
    state_codes.bring_to(after, keys, local_of(param), coding, rule, counter_device)
    for key in before.keys() - after.keys():
        del state[key]
    for key, part in after.items():
        if part is not before.get(key):
            state[key] = _whole(key, part, param)


def parts_of(state: dict[str, Any], param: Tensor) -> dict[str, Any]:
    """This rank's part of a parameter's state.

    Raises:
        RuntimeError: The parameter is not spread as it was where 8-bit state comes from.
    """
    if not is_dtensor(param):
        return {key: local_of(value) for key, value in state.items()}
    return {key: _part(key, value, param) for key, value in state.items()}


def _part(key: str, whole: Any, param: Tensor) -> Any:
    if _are_scales(key):
        return _scales_of_part(whole, param)
    own = local_of(whole)
    return own.view(torch.int16) if key == MASTER else own


def _are_scales(key: str) -> bool:
    return key.endswith(state_codes.largest_key(""))


def _scales_of_part(scales: Any, param: Any) -> Tensor:
    expected = _shape_of_scales(param)
    if not is_dtensor(scales) or tuple(scales.shape) != expected:
        raise RuntimeError(
            f"8-bit state with scales of shape {tuple(scales.shape)} is of other shards than the "
            f"parameter's of shape {tuple(param.shape)}, which need {expected}: load it where "
            "parameters are spread as they were, or save state_storage='fp32' to change that"
        )
    blocks = -(-local_of(param).numel() // BLOCK)
    own: Tensor = local_of(scales).view(-1)[:blocks]
    return own


def _shape_of_scales(param: Any) -> tuple[int, ...]:
    """How many shards there are along each dimension, and how many blocks the first one has."""
    shards = [1] * param.dim()
    for size, placement in zip(param.device_mesh.shape, param.placements, strict=True):
        if placement.is_shard():
            shards[placement.dim] *= size
    sizes = [-(-size // count) for size, count in zip(param.shape, shards, strict=True)]
    return *shards, -(-math.prod(sizes) // BLOCK)


def _whole(key: str, part: Tensor, param: Any) -> Tensor:
    """What all ranks' parts are together."""
    if not is_dtensor(param) or key == "step":
        return part
    shape, stride = param.shape, param.stride()
    if key == MASTER:
        part = part.view(torch.bfloat16)
    if _are_scales(key):
        shape = torch.Size(_shape_of_scales(param))
        stride = torch.empty(shape, device="meta").stride()
        row = part.new_zeros(shape[-1])
        row[: part.numel()] = part
        part = row.view([1] * param.dim() + [-1])
    whole: Any = type(param).from_local(
        part, param.device_mesh, param.placements, run_check=False, shape=shape, stride=stride
    )
    whole._local_tensor = part  # instead of a view, whose strides differ where a size is 1
    return cast(Tensor, whole)
