"""The attention of backend ``triton``: what it takes, forward and backward.

Kernels need a request's layout only; which keys a sequence has is found on the card.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastopt.backends import attention_requests
from fastopt.backends.attention_requests import KernelArguments
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.cuda_attention import DROPS_THE_SAME, DTYPES
from fastopt.backends.cuda_context import is_capturing, multiplies_in_tf32
from fastopt.backends.triton import attention_tiles, launch
from fastopt.backends.triton.attention_tiles import Kernel, Scores, Tile

MOST_FEATURES = 256

# Of a head of queries: fewer share the tile with those of other heads over the same keys.
FEW_QUERIES = 16
DECODED_ROWS = 16  # of the smallest tile
MOST_SPLITS = 64
LEAST_SPLIT = 128  # keys that are worth a program of their own


def refuse(request: AttentionRequest, device: str) -> str | None:
    """Why the kernels do not run this attention, or None."""
    if reason := attention_requests.refuse_attention(request, device, DTYPES):
        return reason
    for name, tensor in ("query", request.query), ("value", request.value):
        if tensor.size(-1) > MOST_FEATURES:
            return (
                f"{name} has {tensor.size(-1)} features, of which the kernels take {MOST_FEATURES}"
            )
    if is_capturing(request.device):
        if request.dropout > 0:
            return DROPS_THE_SAME
        passes = ["forward"]
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad
            for tensor in (request.query, request.key, request.value, request.bias, request.sinks)
        ):
            passes.append("backward")
        if not all(
            launch.is_loaded(request.device, *_compiled_apart(name, request)) for name in passes
        ):
            return "a graph's capture needs a call before it, which compiles the kernels"
    return None


def _compiled_apart(name: str, request: AttentionRequest) -> tuple[Any, ...]:
    """What tells compiled kernels apart, and more: a request like it has run through them all."""
    tensors = (request.query, request.key, request.value, request.bias, request.allowed)
    few = None
    if request.query.size(2) <= FEW_QUERIES or request.query_starts is not None:
        few = *request.query.shape[:3], request.key.size(2) >= 2 * LEAST_SPLIT
    return (
        name, request.query.dtype, multiplies_in_tf32(), few,
        request.query.size(1), request.key.size(1), request.softcap != 0, request.scale > 0,
        request.left < 0, request.right < 0, request.bottom_right,
        *[tensor is None for tensor in (request.slopes, request.sinks, request.query_starts,
                                        request.used_keys)],
        *[None if tensor is None else (tensor.size(-1) % 512, tensor.data_ptr() % 16,
                                       *[s % 128 for s in tensor.stride()]) for tensor in tensors],
    )  # fmt: skip


def _begin(name: str, request: AttentionRequest) -> None:
    """Inside a capture nothing is compiled, nor are the same weights dropped at every replay."""
    if is_capturing(request.device):
        if request.dropout > 0:  # of compiled code, say
            raise RuntimeError(DROPS_THE_SAME)
    else:
        launch.mark_loaded(request.device, *_compiled_apart(name, request))


class Layer(NamedTuple):
    """What kernels read of a request besides its tensors; None: there is none of it."""

    mask: Tensor | None  # a bias, or uint8
    mask_strides: tuple[int, ...] | None
    mask_columns: int | None
    slopes: Tensor | None
    sinks: Tensor | None
    query_starts: Tensor | None
    key_starts: Tensor | None
    used_keys: Tensor | None
    heads: int
    scale: float
    softcap: float | None
    growth: float | None  # of the weights that dropout keeps


class Call:
    """A request's arguments of kernels, by the names that they have in all of them."""

    def __init__(self, request: AttentionRequest) -> None:
        self.arguments = arguments = attention_requests.kernel_arguments(request)
        query, key, value = self.operands = [
            _near(tensor) for tensor in (arguments.query, arguments.key, arguments.value)
        ]
        mask = arguments.allowed if arguments.bias is None else arguments.bias
        # A cap so far away that the quotient is no normal number is none.
        smallest = torch.finfo(torch.float32).tiny
        has_cap = abs(arguments.scale) >= smallest * arguments.softcap > 0
        self.layer = Layer(
            mask,
            None if mask is None else mask.stride()[:3],
            None if mask is None else mask.size(3),
            arguments.slopes,
            arguments.sinks,
            arguments.query_starts,
            arguments.key_starts,
            arguments.used_keys,
            query.size(1),
            arguments.scale,
            arguments.softcap if has_cap else None,
            1 / (1 - arguments.dropout) if arguments.dropout > 0 else None,
        )
        # Scores are products times a factor above zero: where one is largest, so is the other.
        is_plain = arguments.scale >= smallest and not (
            has_cap or arguments.dropout or mask is not None or arguments.slopes is not None
        )
        starts = arguments.query_starts
        self.sequences = query.size(0) if starts is None else starts.size(0) - 1
        self.query_rows, self.key_rows = query.size(2), key.size(2)
        # How many a sequence has is for the card to know.
        self.mean_queries = self.query_rows / (1 if starts is None else max(self.sequences, 1))
        self.heads, self.key_heads = query.size(1), key.size(1)
        # No key is further away than all rows.
        furthest = self.query_rows + self.key_rows
        self.numbers = (
            self.sequences, self.query_rows, self.key_rows,
            *[None if bound < 0 else min(bound, furthest)
              for bound in (arguments.left, arguments.right)],
            *_words(int(arguments.dropout * 2**32), arguments.seed, arguments.seed >> 32),
        )  # fmt: skip
        tf32 = query.dtype is torch.float32 and multiplies_in_tf32()
        self.constants = {
            "GROUP": self.heads // self.key_heads,
            "FEATURES": query.size(3),
            "VALUE_FEATURES": value.size(3),
            "BOTTOM_RIGHT": arguments.bottom_right,
            "GENERAL": not is_plain,
            "PRECISION": "tf32" if tf32 else "ieee",
        }
        self.device = query.device
        self._tile_key = (
            launch.capability(self.device), query.dtype, tf32, max(query.size(3), value.size(3)),
            Scores.PLAIN if is_plain else Scores.GENERAL,
        )  # fmt: skip

    def tile(self, kernel: Kernel) -> Tile:
        """What a program of a kernel owns."""
        return attention_tiles.tile(kernel, *self._tile_key)

    def tiles(self, rows: int, side: int) -> int:
        """How many there are of one head. Sequences are cut from their own beginnings."""
        if self.layer.query_starts is None:
            return self.sequences * -(-rows // side)
        return rows // side + self.sequences

    def launch(
        self, kernel: Any, grid: tuple[int, ...], tile: Tile, *arguments: Any, **constants: Any
    ) -> None:
        """Launches a kernel over tiles of scores."""
        launch.launch(
            kernel, grid, self.device, *arguments, self.layer, *self.numbers,
            num_warps=tile.warps, num_stages=tile.stages, fuses=False, TILE_QUERIES=tile.queries,
            TILE_KEYS=tile.keys, **self.constants, **constants,
        )  # fmt: skip


def _words(*numbers: int) -> list[int]:
    """The lowest 32 bits, as int32."""
    return [((number + 2**31) & 0xFFFFFFFF) - 2**31 for number in numbers]


def _near(tensor: Tensor) -> Tensor:
    """With rows so near to each other that places in a tile of 128 have 32 bits."""
    return tensor if tensor.stride(2) < 2**24 else tensor.contiguous()


def _unit(*tensors: Tensor) -> int:
    """The number of elements that all strides are multiples of: 16 bytes, or 1."""
    unit = 16 // tensors[0].element_size()
    strides = (stride for tensor in tensors for stride in tensor.stride()[:3])
    return unit if all(stride % unit == 0 for stride in strides) else 1


def _laid_out(unit: int, *tensors: Tensor) -> list[Any]:
    """Each with its strides in units."""
    found: list[Any] = []
    for tensor in tensors:
        found += [tensor, tuple(stride // unit for stride in tensor.stride()[:3])]
    return found


def forward(request: AttentionRequest, inference: bool = False) -> tuple[Tensor, Tensor]:
    """Output and logsumexp."""

    def run(output: Tensor, logsumexp: Tensor) -> None:
        _begin("forward", request)
        call = Call(request)
        if call.mean_queries <= FEW_QUERIES:
            _run_few(call, output, logsumexp)
        else:
            tile = call.tile(Kernel.FORWARD)
            grid = call.tiles(call.query_rows, tile.queries), call.heads
            _launch_forward(call, grid, tile, output, logsumexp)

    return attention_requests.forward(request, run)


def _launch_forward(
    call: Call, grid: tuple[int, ...], tile: Tile, output: Tensor, logsumexp: Tensor,
    packed: int = 1,
) -> None:  # fmt: skip
    unit = _unit(*call.operands, output)
    call.launch(
        launch.kernels("attention_forward")._attention_forward_kernel, grid, tile,
        *_laid_out(unit, *call.operands, output), logsumexp,
        UNIT=unit, PACKED=packed, SPLIT=len(grid) > 2,
    )  # fmt: skip


def _run_few(call: Call, output: Tensor, logsumexp: Tensor) -> None:
    """Few queries: the keys set the pace, which are read once for all heads that share them."""
    packed = call.heads // call.key_heads
    is_small = call.mean_queries * packed <= DECODED_ROWS
    tile = call.tile(Kernel.DECODE if is_small else Kernel.FORWARD)
    programs = call.tiles(call.query_rows * packed, tile.queries), call.key_heads
    wanted = 2 * launch.processors(call.device) // (programs[0] * programs[1])
    splits = min(wanted, MOST_SPLITS, call.key_rows // LEAST_SPLIT)
    if splits <= 1 or call.layer.query_starts is not None:
        _launch_forward(call, programs, tile, output, logsumexp, packed)
        return
    parts = output.new_empty((splits, *output.shape), dtype=torch.float32)
    sums = logsumexp.new_empty((splits, *logsumexp.shape))
    _launch_forward(call, (*programs, splits), tile, parts[0], sums, packed)
    count = logsumexp.numel()
    launch.launch(
        launch.kernels("attention_forward")._attention_merge_kernel,
        (-(-count // attention_tiles.MERGED_ROWS),), call.device,
        parts, sums, *_laid_out(1, output), logsumexp, call.layer.sinks,
        count, call.query_rows, call.heads, splits,
        VALUE_FEATURES=output.size(3), TILE_ROWS=attention_tiles.MERGED_ROWS,
    )  # fmt: skip


def backward(
    request: AttentionRequest,
    output_gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    bias_wanted: bool,
    sinks_wanted: bool,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias and sinks; the latter are empty where not wanted."""

    def run(gradient: Tensor, gradients: list[Tensor | None]) -> None:
        _begin("backward", request)
        call, gradient = Call(request), _near(gradient)
        of_query, of_key, of_value, of_bias, of_sinks = gradients
        assert of_query is not None and of_key is not None and of_value is not None
        deltas = torch.empty_like(logsumexp)
        count, rows = deltas.numel(), attention_tiles.DELTA_ROWS
        both_unit = _unit(output, gradient)
        module = launch.kernels("attention_backward")
        launch.launch(
            module._attention_delta_kernel, (-(-count // rows),), call.device,
            *_laid_out(both_unit, output, gradient), deltas, count, call.query_rows, call.heads,
            VALUE_FEATURES=output.size(3), UNIT=both_unit, TILE_ROWS=rows,
        )  # fmt: skip
        unit = _unit(*call.operands, gradient, of_query, of_key, of_value)
        read = *_laid_out(unit, *call.operands, gradient), logsumexp, deltas
        tile = call.tile(Kernel.KEY_GRADIENT)
        call.launch(
            module._attention_key_gradient_kernel,
            (call.tiles(call.key_rows, tile.keys), call.key_heads), tile,
            *read, *_laid_out(unit, of_key, of_value), UNIT=unit,
        )  # fmt: skip
        tile = call.tile(Kernel.QUERY_GRADIENT)
        call.launch(
            module._attention_query_gradient_kernel,
            (call.tiles(call.query_rows, tile.queries), call.heads), tile,
            *read, *_laid_out(unit, of_query), UNIT=unit,
        )  # fmt: skip
        if of_bias is not None and bias_sums is not None:
            _run_bias_gradient(call, read, bias_sums, unit)
        if of_sinks is not None:
            of_sinks[0] = _sink_gradient(call.arguments, logsumexp, deltas)

    bias_sums = attention_requests.full_bias_sums(request) if bias_wanted else None
    return attention_requests.backward(request, output_gradient, bias_sums, sinks_wanted, run)


def _run_bias_gradient(call: Call, read: tuple[Any, ...], sums: Tensor, unit: int) -> None:
    """``sums`` are of the batches and heads that the bias has."""
    tile = call.tile(Kernel.BIAS_GRADIENT)
    squares = -(-call.query_rows // tile.queries) * -(-call.key_rows // tile.keys)
    batches, heads = sums.shape[:2]
    constants = {name: value for name, value in call.constants.items() if name != "GENERAL"}
    launch.launch(
        launch.kernels("attention_backward")._attention_bias_gradient_kernel,
        (squares * batches * heads,), call.device,
        *read, sums, call.layer, *call.numbers, batches, heads,
        num_warps=tile.warps, num_stages=tile.stages, fuses=False, TILE_QUERIES=tile.queries,
        TILE_KEYS=tile.keys, UNIT=unit, **constants,
    )  # fmt: skip


def _sink_gradient(arguments: KernelArguments, logsumexp: Tensor, deltas: Tensor) -> Tensor:
    """By heads, of all batches and queries; a query that sees nothing has no weights."""
    assert arguments.sinks is not None
    weights = (arguments.sinks[:, None] - logsumexp).exp()
    return -torch.where(logsumexp == -torch.inf, 0.0, weights * deltas).sum((0, 2))
