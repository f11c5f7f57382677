"""The choice of a backend, and what the user is told of it."""

from __future__ import annotations

import functools
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import fastopt
from fastopt import optim
from fastopt.backends import measured, registry
from fastopt.backends.attention_requests import refuse_attention
from fastopt.backends.contract import AttentionRequest, LinearCrossEntropyRequest, LstmRequest
from fastopt.backends.linear_cross_entropy_requests import refuse_linear_cross_entropy
from fastopt.backends.lstm_requests import refuse_lstm


def with_gradient(shape: tuple[int, ...] = (4,), **options: object) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.ones(shape, **options))
    param.grad = torch.ones_like(param)
    return param


def backends_of(optimizer: torch.optim.Optimizer) -> list[str | None]:
    return [row.backend for row in fastopt.explain(optimizer).parameters]


def test_auto_takes_the_kernels_on_the_cpu_and_torch_elsewhere() -> None:
    params = [with_gradient(), with_gradient(device="meta"), with_gradient(dtype=torch.bfloat16)]
    assert backends_of(optim.AdamW(params)) == ["cpu", "torch", "cpu"]


def test_constructor_goes_before_the_block_and_the_block_before_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FASTOPT_BACKEND", "reference")
    optimizer, named = optim.SGD([with_gradient()]), optim.SGD([with_gradient()], backend="cpu")
    assert backends_of(optimizer) == ["reference"] and backends_of(named) == ["cpu"]
    with fastopt.use_backend("torch"):
        assert backends_of(optimizer) == ["torch"] and backends_of(named) == ["cpu"]
        with fastopt.use_backend("cpu"):
            assert backends_of(optimizer) == ["cpu"]
        assert backends_of(optimizer) == ["torch"]
    monkeypatch.setenv("FASTOPT_BACKEND", "")
    assert backends_of(optimizer) == ["cpu"]


def test_the_choice_takes_effect_between_two_steps() -> None:
    optimizer = optim.AdamW([with_gradient()])
    kinds = []
    for name in ("cpu", "reference", "torch", "auto"):
        with fastopt.use_backend(name):
            optimizer.step()
        kinds.append([type(part).__name__ for part in optimizer._plan._parts])
    assert kinds == [["CpuPlan"], ["ReferencePlan"], ["TorchPlan"], ["CpuPlan"]]


def test_unknown_names_say_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = (
        r"backend must be one of \['auto', 'cpu', 'cuda', 'triton', 'torch', 'reference'\], got "
        r"'cuda9'"
    )
    with pytest.raises(ValueError, match=expected), fastopt.use_backend("cuda9"):
        raise AssertionError("the block must not run")
    monkeypatch.setenv("FASTOPT_BACKEND", "cuda9")
    with pytest.raises(ValueError, match=expected.replace("backend", "FASTOPT_BACKEND", 1)):
        optim.SGD([with_gradient()]).step()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda p: setattr(p, "grad", p.grad.to_sparse()), "layout torch.sparse_coo"),
        (lambda p: setattr(p, "grad", torch._neg_view(torch.ones(4))), "negated view"),
        (lambda p: setattr(p, "grad", torch._efficientzerotensor((4,))), "no memory"),
    ],
)
def test_a_named_backend_never_falls_back(change: object, reason: str) -> None:
    other, param = with_gradient(), with_gradient()
    optimizer = optim.SGD([other, param], lr=0.5, momentum=0.9, backend="cpu")
    for planned in (False, True):
        if planned:
            param.grad = torch.ones(4)
            optimizer.step()
        before = [p.detach().clone() for p in (other, param)]
        change(param)  # type: ignore[operator]
        with pytest.raises(RuntimeError, match=f"backend 'cpu' cannot step .*{reason}"):
            optimizer.step()
        assert all(torch.equal(p, b) for p, b in zip((other, param), before, strict=True))
    assert [row.backend for row in fastopt.explain(optimizer).parameters] == ["cpu", None]


def test_kernels_come_back_after_an_odd_gradient() -> None:
    param = with_gradient()
    optimizer = optim.AdamW([param])
    param.grad = torch._neg_view(torch.ones(4))
    optimizer.step()
    assert [type(part).__name__ for part in optimizer._plan._this_step] == ["TorchPlan", "CpuPlan"]
    param.grad = torch.ones(4)
    optimizer.step()
    assert [type(part).__name__ for part in optimizer._plan._this_step] == ["CpuPlan"]


def test_explain_gives_the_reason_and_prints_a_line_for_each_parameter() -> None:
    model = torch.nn.Linear(3, 2)
    model.weight.grad = torch.ones(2, 3).to_sparse()
    explanation = fastopt.explain(optim.SGD(model.named_parameters(), lr=0.1))
    weight, bias = explanation.parameters
    assert (weight.name, weight.shape, weight.dtype) == ("weight", (2, 3), "torch.float32")
    assert weight.backend == "torch"
    assert weight.reasons == {"cpu": "the gradient has layout torch.sparse_coo"}
    assert bias.backend == "cpu" and bias.reasons == {}
    text = str(explanation).splitlines()
    assert text[0] == "backend requested: auto"
    assert text[1].endswith("torch; not cpu: the gradient has layout torch.sparse_coo")
    assert text[2] == "group 0, parameter 1 (bias), [2] torch.float32 on cpu: cpu"


def test_explain_says_that_nothing_ran() -> None:
    text = str(fastopt.explain(torch.nn.LSTM(2, 3), torch.ones(4, 2))).splitlines()
    assert text[1:] == ["none of fastopt's operators ran, or only as part of compiled code"]


def test_explain_reasons() -> None:
    reasons = {
        "differentiable": optim.SGD([with_gradient()], differentiable=True),
        "capturable": optim.Adam([with_gradient()], capturable=True),
        "dtype torch.float8_e5m2": optim.SGD(
            [torch.nn.Parameter(torch.ones(2).to(torch.float8_e5m2))]
        ),
    }
    for text, optimizer in reasons.items():
        (row,) = fastopt.explain(optimizer).parameters
        assert row.backend == "torch" and text in row.reasons["cpu"]


def test_explain_refuses_other_optimizers_and_arguments_beside_one() -> None:
    with pytest.raises(TypeError, match=r"an optimizer of fastopt\.optim or .*, got Adagrad"):
        fastopt.explain(torch.optim.Adagrad([with_gradient()]))
    with pytest.raises(TypeError, match="no further arguments"):
        fastopt.explain(optim.SGD([with_gradient()]), 1)


def test_explain_calls_a_module_and_tells_of_every_operator() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = fastopt.nn.LSTM(3, 4)
            self.attention = fastopt.nn.MultiheadAttention(4, 2)

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            output, _ = self.lstm(input)
            return self.attention(output, output, output)[0]

    explanation = fastopt.explain(Model(), torch.randn(5, 2, 3))
    assert [call.backend for call in explanation.calls] == ["cpu", "cpu"]
    first, second = str(explanation).splitlines()[1:]
    assert first == "run an LSTM over input of shape [5, 2, 3], torch.float32 on cpu: cpu"
    assert second.startswith("run an attention of queries of shape [")
    with fastopt.use_backend("torch"):
        explanation = fastopt.explain(Model(), input=torch.randn(5, 2, 3))
    assert explanation.requested == "torch"
    assert [call.backend for call in explanation.calls] == ["torch", "torch"]


def test_explain_gives_the_reason_of_a_call() -> None:
    query = torch.randn(1, 2, 3, 4).to(torch.float64)
    (call,) = fastopt.explain(
        lambda: torch.func.vmap(fastopt.nn.functional.scaled_dot_product_attention)(
            query, query, query
        )
    ).calls
    assert call.backend == "torch" and call.reasons == {"cpu": "a torch.func transform is active"}


def test_auto_asks_first_who_was_measured_to_be_the_fastest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class OnCard:
        operator, dtype, device = "attention", torch.bfloat16, torch.device("cuda")
        may_be_stock = False

    monkeypatch.setattr(measured, "_capability", lambda device: 90)
    monkeypatch.setattr(measured, "FASTEST", {})
    assert registry._allowed(OnCard(), "auto") == ("cuda", "triton", "torch")
    table = {("attention", "torch.bfloat16", 90): "triton"}
    monkeypatch.setattr(measured, "FASTEST", table)
    assert registry._allowed(OnCard(), "auto") == ("triton", "cuda", "torch")
    assert registry._allowed(OnCard(), "cuda") == ("cuda",)
    monkeypatch.setattr(OnCard, "dtype", torch.float16)
    assert registry._allowed(OnCard(), "auto") == ("triton", "cuda", "torch")
    table[("attention", "torch.bfloat16", 90)] = "torch"
    assert registry._allowed(OnCard(), "auto") == ("cuda", "triton", "torch")
    monkeypatch.setattr(OnCard, "may_be_stock", True)
    assert registry._allowed(OnCard(), "auto") == ("torch", "cuda", "triton")
    monkeypatch.setattr(measured, "_capability", lambda device: 80)
    assert registry._allowed(OnCard(), "auto") == ("cuda", "triton", "torch")


def test_stock_is_preferred_for_calls_of_its_own_functions_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where torch was measured to be faster; here the CPU stands for such a card."""

    def fastest(request: Any) -> str | None:
        return "torch" if request.may_be_stock else None

    monkeypatch.setattr(registry, "fastest_measured", fastest)
    functional = fastopt.nn.functional

    def backend_of(call: Callable[..., Any], *shape: int, **options: Any) -> str | None:
        query = torch.randn(shape)
        (found,) = fastopt.explain(partial(call, query, query, query, **options)).calls
        return found.backend

    assert backend_of(functional.scaled_dot_product_attention, 2, 2, 5, 8) == "torch"
    assert backend_of(functional.attention, 2, 2, 5, 8) == "cpu"
    assert backend_of(functional.attention, 2, 2, 5, 8, return_lse=True) == "cpu"
    attention = fastopt.nn.MultiheadAttention(8, 2).eval()
    assert backend_of(attention, 5, 2, 8, need_weights=False) == "torch"
    assert backend_of(attention, 5, 2, 8, need_weights=True) == "cpu"


def test_a_compiled_call_asks_for_the_card_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a constant: what Dynamo cannot trace would break its graph, and it warns of caches."""
    monkeypatch.setattr(measured, "compute_capability", functools.cache(lambda device: 90))
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def capability(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + measured._capability(tensor.device)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert capability(torch.zeros(1)).item() == 90


def test_nothing_is_said_where_torch_is_asked_first_and_refuses(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(registry.AUTO_ORDER, "cpu", ("torch", "cpu"))
    registry._logged.clear()
    query = torch.randn(1, 2, 3, 4)
    with caplog.at_level(logging.WARNING, logger="fastopt"):
        run = partial(fastopt.nn.functional.attention, query, query, query)
        (stock,) = fastopt.explain(run).calls
        (own,) = fastopt.explain(partial(run, softcap=1.0)).calls
    assert stock.backend == "torch" and own.backend == "cpu" and "torch" in own.reasons
    assert not caplog.records


def test_a_fall_through_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    registry._logged.clear()
    with caplog.at_level(logging.WARNING, logger="fastopt"):
        for _ in range(3):
            param = with_gradient()
            param.grad = param.grad.to_sparse()
            optimizer = optim.SGD([param], lr=0.1)
            optimizer.step()
            optimizer.step()
    assert len(caplog.records) == 1
    assert "the gradient has layout torch.sparse_coo" in caplog.text
    assert "backend 'torch'" in caplog.text


def test_a_torch_without_the_interfaces_is_served_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastopt.backends import cpu

    monkeypatch.setattr(cpu, "MISSING_IN_TORCH", "this torch has no stable C ABI")
    (row,) = fastopt.explain(optim.SGD([with_gradient()])).parameters
    assert row.backend == "torch" and "stable C ABI" in row.reasons["cpu"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )


def test_info_prints_what_a_bug_report_needs() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastopt", "info"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    for text in ("fastopt", f"torch {torch.__version__}", "instruction set", "CUDA", "Triton"):
        assert text in result.stdout


def test_info_needs_a_known_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "fastopt", "inof"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and "invalid choice: 'inof'" in result.stderr


def test_an_unknown_instruction_set_is_refused_at_import() -> None:
    result = run_python("import fastopt", FASTOPT_CPU_ISA="avx9")
    assert result.returncode != 0
    assert "FASTOPT_CPU_ISA must be one of baseline" in result.stderr
    assert "got 'avx9'" in result.stderr


def test_tensors_of_several_cards_are_torchs_to_refuse() -> None:
    """Kernels would take the address on one card for one on another."""

    def zeros(*shape: int, card: int = 0, **options: Any) -> torch.Tensor:
        with FakeTensorMode():
            return torch.zeros(shape, device=f"cuda:{card}", **options)

    target = zeros(4, dtype=torch.int64)
    cross_entropy = LinearCrossEntropyRequest(zeros(4, 8), zeros(6, 8, card=1), target)
    state, query = zeros(1, 4, 8), zeros(1, 1, 4, 8)
    lstm = LstmRequest(state, None, state, zeros(1, 4, 8, card=1), [], False, 1, False)
    attention = AttentionRequest(query, zeros(1, 1, 4, 8, card=1), query, scale=1.0)
    for reason in (
        refuse_linear_cross_entropy(cross_entropy, "cuda"),
        refuse_lstm(lstm, "cuda"),
        refuse_attention(attention, "cuda", [torch.float32]),
    ):
        assert reason is not None and "cuda:0" in reason and "cuda:1" in reason
