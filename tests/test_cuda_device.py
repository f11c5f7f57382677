"""What only a real card shows: graphs, streams, devices, sizes past 32 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cards import IS_SIMULATED, card  # noqa: F401
from fastopt import nn, optim
from tolerances import assert_matches

pytestmark = [
    pytest.mark.usefixtures("card"),
    pytest.mark.skipif(IS_SIMULATED, reason="needs a card: FASTOPT_TEST_DEVICE=cuda"),
]


def parameters(count: int = 5, device: str = "cuda") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(100 * i + 7, generator=generator) for i in range(count)]
    return [torch.nn.Parameter(value.to(device)) for value in values]


def set_gradients(params: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        grad = torch.randn(param.shape, generator=generator).to(param.device)
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def assert_same(ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert_matches(mine.detach(), other.detach(), op="optimizer", dtype=mine.dtype)


@pytest.mark.parametrize("tail", [{}, {"max_grad_norm": 1.0, "ema_decay": 0.9}], ids=str)
def test_capture_then_eager_steps_then_replay(tail: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    lr = torch.tensor(0.01, device="cuda")
    optimizer = optim.AdamW(ours, lr, capturable=True, backend="cuda", **tail)
    stock = torch.optim.AdamW(theirs, 0.01, foreach=False)

    def stock_step(seed: int) -> None:
        set_gradients(theirs, seed)
        if tail:
            torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        stock.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(2):  # warm-up
            set_gradients(ours, seed)
            optimizer.step()
            stock_step(seed)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    set_gradients(ours, 2)
    with torch.cuda.graph(graph):
        optimizer.step()
    for seed in range(2, 5):
        set_gradients(ours, seed)
        graph.replay()
        stock_step(seed)
    assert_same(ours, theirs)
    set_gradients(ours, 5)
    optimizer.step()
    stock_step(5)
    lr.fill_(0.001)
    for group in stock.param_groups:
        group["lr"] = 0.001
    set_gradients(ours, 6)
    graph.replay()
    stock_step(6)
    torch.cuda.synchronize()
    assert_same(ours, theirs)
    assert optimizer.state[ours[0]]["step"].item() == 7


@pytest.mark.parametrize("storage", ["8bit", "bf16"])
def test_each_replay_draws_anew_for_state_rounded_by_chance(storage: str) -> None:
    results = []
    for captured in (False, True):
        params = parameters()
        optimizer = optim.AdamW(
            params, lr=0.01, capturable=True, state_storage=storage, min_8bit_size=0,
            backend="cuda",
        )  # fmt: skip
        set_gradients(params, 0)
        optimizer.step()
        step: Callable[[], Any] = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for seed in range(1, 4):
            set_gradients(params, seed)
            step()
        torch.cuda.synchronize()
        tensors = [(param.detach(), *optimizer.state[param].values()) for param in params]
        results.append([tensor for each in tensors for tensor in each])
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_new_gradients_each_step_and_moved_parameters() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = optim.SGD(ours, lr=0.1, momentum=0.9, backend="cuda")
    stock = torch.optim.SGD(theirs, lr=0.1, momentum=0.9, foreach=False)
    for seed in range(6):
        for params, each in ((ours, optimizer), (theirs, stock)):
            each.zero_grad(set_to_none=True)
            set_gradients(params, seed)
            each.step()
        if seed == 3:
            for params in (ours, theirs):
                for param in params:
                    param.data = param.data.clone()
    assert_same(ours, theirs)


def test_two_streams_at_once() -> None:
    streams = [torch.cuda.Stream() for _ in range(2)]
    runs = [parameters(), parameters()]
    optimizers = [optim.AdamW(params, lr=0.01, backend="cuda") for params in runs]
    torch.cuda.synchronize()
    for seed in range(20):
        for stream, params, optimizer in zip(streams, runs, optimizers, strict=True):
            with torch.cuda.stream(stream):
                set_gradients(params, seed)
                optimizer.step()
                optimizer.zero_grad()
    torch.cuda.synchronize()
    theirs = parameters()
    stock = torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    for seed in range(20):
        set_gradients(theirs, seed)
        stock.step()
    for params in runs:
        assert_same(params, theirs)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_two_devices_in_one_optimizer() -> None:
    ours = [*parameters(device="cuda:0"), *parameters(device="cuda:1")]
    theirs = [*parameters(device="cuda:0"), *parameters(device="cuda:1")]
    optimizer = optim.AdamW(ours, lr=0.01, max_grad_norm=1.0, backend="cuda")
    stock = torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    for seed in range(3):
        set_gradients(ours, seed)
        set_gradients(theirs, seed)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        optimizer.step()
        stock.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_more_than_two_to_the_31_elements(dtype: torch.dtype) -> None:
    size = 2**31 + 4099
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * size * dtype.itemsize:
        pytest.skip("too little memory on the card")
    param = torch.nn.Parameter(torch.ones(size, dtype=dtype, device="cuda"))
    param.grad = torch.zeros(size, dtype=dtype, device="cuda")
    places = [0, 2**31 - 1, 2**31, size - 1]
    param.grad[places] = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype, device="cuda")
    optimizer = optim.SGD([param], lr=0.25, max_grad_norm=100.0, backend="cuda")
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(30**0.5, rel=1e-2)
    assert param.detach()[places].tolist() == [0.75, 0.5, 0.25, 0.0]
    assert (param.detach() != 1).sum().item() == 4


def test_gradient_scaler_without_a_synchronisation() -> None:
    ours, theirs = parameters(), parameters()
    optimizer = optim.AdamW(ours, lr=0.01, fused=True, max_grad_norm=1.0, backend="cuda")
    stock = torch.optim.AdamW(theirs, lr=0.01, foreach=False)
    for seed in range(4):
        set_gradients(ours, seed)
        for param in ours:
            param.grad.mul_(16)
        optimizer.grad_scale = torch.tensor(16.0, device="cuda")
        optimizer.found_inf = torch.tensor(float(seed == 1), device="cuda")
        optimizer.step()  # plans
        if seed == 1:
            continue
        set_gradients(theirs, seed)
        torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        stock.step()
    optimizer.found_inf = torch.tensor(1.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(ours, theirs)


def trained(lstm: nn.LSTM, data: torch.Tensor) -> list[torch.Tensor]:
    """The output, and what its sum leaves in the gradients."""
    output, _ = lstm(data)
    output.sum().backward()
    return [output.detach(), *[param.grad for param in lstm.parameters() if param.grad is not None]]


@pytest.mark.parametrize("options", [{}, {"proj_size": 8}], ids=str)
def test_an_lstm_is_captured_and_replayed(options: dict[str, Any]) -> None:
    lstm = nn.LSTM(16, 64, 2, bidirectional=True, device="cuda", backend="cuda", **options)
    data = torch.randn(7, 20, 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        trained(lstm, data)
    torch.cuda.current_stream().wait_stream(side)
    lstm.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = trained(lstm, data)
    for _ in range(3):
        data.copy_(torch.randn_like(data))
        for grad in captured[1:]:
            grad.zero_()
        graph.replay()
        replayed = [tensor.clone() for tensor in captured]
        again = nn.LSTM(16, 64, 2, bidirectional=True, device="cuda", backend="cuda", **options)
        again.load_state_dict(lstm.state_dict())
        for mine, theirs in zip(replayed, trained(again, data), strict=True):
            assert_matches(mine, theirs, op="lstm gradients", dtype=torch.float32)


def test_two_lstms_on_two_streams() -> None:
    lstm = nn.LSTM(16, 256, bidirectional=True, device="cuda", backend="cuda")
    data = torch.randn(50, 64, 16, device="cuda")
    with torch.no_grad():
        expected, _ = lstm(data)
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        results = []
        for _ in range(10):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(lstm(data)[0])
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)
