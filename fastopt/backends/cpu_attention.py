"""The attention of backend ``cpu``: forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends.attention_requests import (
    contiguous_features,
    empty_gradient,
    empty_output,
    expanded,
)
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.plain_tensors import compute_dtype


def _layer(request: AttentionRequest) -> _native_cpu.AttentionTensors:
    query, key = request.query, request.key
    allowed, slopes, seed = request.allowed, request.slopes, request.seed
    sinks = request.sinks
    starts, key_starts, used = (
        None if tensor is None else tensor.contiguous()
        for tensor in (request.query_starts, request.key_starts, request.used_keys)
    )
    return _native_cpu.AttentionTensors(
        contiguous_features(query), contiguous_features(key), contiguous_features(request.value),
        expanded(request.bias, query, key),
        expanded(None if allowed is None else allowed.view(torch.uint8), query, key),
        None if slopes is None else slopes.float().contiguous(),
        None if sinks is None else sinks.to(compute_dtype(query.dtype)).contiguous(),
        starts, key_starts, used, request.scale, request.softcap, request.left, request.right,
        request.bottom_right, request.dropout,
        0 if seed is None else int(seed) & 0xFFFFFFFFFFFFFFFF,
    )  # fmt: skip


def check(request: AttentionRequest) -> None:
    """Whether sequences and caches fit the rows that there are.

    Raises:
        ValueError: They do not; it names the argument.
    """
    if request.device.type == "cpu":  # elsewhere, reading them would wait for a device
        _native_cpu.attention_check(_layer(request))


def _is_empty(request: AttentionRequest) -> bool:
    return 0 in (request.query.size(0), request.query.size(2), request.key.size(2))


def forward(request: AttentionRequest, inference: bool = False) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; ``inference``: as in the request."""
    inference = inference or request.inference
    output = empty_output(request.query, request.value)
    logsumexp = torch.empty(request.query.shape[:3], dtype=compute_dtype(output.dtype))
    if _is_empty(request):
        nothing = -torch.inf if request.sinks is None else request.sinks.unsqueeze(1)
        logsumexp.copy_(torch.as_tensor(nothing))
        return output.zero_(), logsumexp
    threads = torch.get_num_threads()
    _native_cpu.attention_forward(_layer(request), output, logsumexp, inference, threads)
    return output, logsumexp


def backward(
    request: AttentionRequest,
    output_gradient: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    bias_wanted: bool,
    sinks_wanted: bool,
) -> tuple[Tensor, ...]:
    """Gradients of query, key, value, bias and sinks; the latter are empty where not wanted."""
    query, key, value = request.query, request.key, request.value
    bias = request.bias if bias_wanted else None
    sinks = request.sinks if sinks_wanted else None
    gradients = [empty_gradient(tensor) for tensor in (query, key, value)]
    if request.used_keys is not None or _is_empty(request):  # some of them nobody writes
        for gradient in gradients:
            gradient.zero_()
    precise = compute_dtype(query.dtype)
    bias_sums = sink_sums = None
    if bias is not None:
        bias_sums = torch.zeros((*bias.shape[:3], key.size(2)), dtype=precise)
    if sinks is not None:
        starts = request.query_starts
        batch = query.size(0) if starts is None else starts.size(0) - 1
        sink_sums = torch.zeros((batch, query.size(1)), dtype=precise)
    if not _is_empty(request):
        _native_cpu.attention_backward(
            _layer(request), output, logsumexp, contiguous_features(output_gradient),
            [*gradients, expanded(bias_sums, query, key), sink_sums], torch.get_num_threads(),
        )  # fmt: skip
    if bias is None or bias_sums is None:
        gradients.append(query.new_empty(0))
    else:
        gradients.append(bias_sums.sum_to_size(bias.shape).to(bias.dtype))
    if sinks is None or sink_sums is None:
        gradients.append(query.new_empty(0))
    else:
        gradients.append(sink_sums.sum(0).to(sinks.dtype))
    return tuple(gradients)
