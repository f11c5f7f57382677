"""The attention of backend ``cpu``: forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from fastopt import _native_cpu
from fastopt.backends import attention_requests
from fastopt.backends.contract import AttentionRequest


def check(request: AttentionRequest) -> None:
    """Whether sequences and caches fit the rows that there are.

    Raises:
        ValueError: They do not; it names the argument.
    """
    if request.device.type == "cpu":  # elsewhere, reading them would wait for a device
        _native_cpu.attention_check(attention_requests.native_tensors(_native_cpu, request))


def forward(request: AttentionRequest, inference: bool = False) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; ``inference``: as in the request."""

    def run(output: Tensor, logsumexp: Tensor) -> None:
        tensors = attention_requests.native_tensors(_native_cpu, request)
        threads = torch.get_num_threads()
        inferring = inference or request.inference
        _native_cpu.attention_forward(tensors, output, logsumexp, inferring, threads)

    return attention_requests.forward(request, run)


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
        tensors = attention_requests.native_tensors(_native_cpu, request)
        threads = torch.get_num_threads()
        _native_cpu.attention_backward(tensors, output, logsumexp, gradient, gradients, threads)

    bias_sums = None
    if bias_wanted and request.bias is not None:
        shape = (*request.bias.shape[:3], request.key.size(2))
        bias_sums = torch.zeros(shape, dtype=attention_requests.precise_dtype(request))
    return attention_requests.backward(request, output_gradient, bias_sums, sinks_wanted, run)
