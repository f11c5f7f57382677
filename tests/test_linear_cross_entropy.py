"""The linear cross-entropy against the reference in double precision, stock, and as an operator."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import fastopt
from cards import BACKENDS, CARD_BACKENDS, card, placed  # noqa: F401 (a fixture)
from fastopt import _native_cpu, use_backend
from fastopt.backends import registry, selfcheck
from fastopt.backends.contract import LinearCrossEntropyRequest
from fastopt.backends.triton import launch
from fastopt.backends.triton import linear_cross_entropy as triton_linear_cross_entropy
from fastopt.nn import LinearCrossEntropyLoss, LinearCrossEntropyOptions, torch_2_13
from fastopt.nn.functional import linear_cross_entropy
from linear_cross_entropy_cases import (
    CASES,
    NARROW,
    WIDE,
    Case,
    assert_agrees,
    problem,
    results,
    run,
    table_of,
)
from tolerances import assert_matches, assert_no_worse_than_stock

ROOT = Path(fastopt.__file__).parents[1]
stock = getattr(torch.nn.functional, "linear_cross_entropy", None)
needs_stock = pytest.mark.skipif(stock is None, reason="torch has had it since 2.13")
on_backends = pytest.mark.parametrize("name_of_backend", BACKENDS)


def composed(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """What every torch has."""
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias)
    return torch.nn.functional.cross_entropy(logits, target, **options)


def small(dtype: torch.dtype = torch.float64, **leaf: Any) -> tuple[Tensor, Tensor, Tensor]:
    input, weight = torch.randn(5, 3, dtype=dtype, **leaf), torch.randn(7, 3, dtype=dtype, **leaf)
    return input, weight, torch.tensor([0, 6, -100, 3, 3])


@pytest.mark.usefixtures("card")
@on_backends
@pytest.mark.parametrize("dtype", [*WIDE, *NARROW], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, name_of_backend: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    given = problem(case, dtype)
    assert_agrees(case, dtype, run(case, dtype, name_of_backend, given), given)


@pytest.mark.usefixtures("card")
@on_backends
@pytest.mark.parametrize("name", CASES)
def test_the_reference_and_the_backend_torch_agree(name: str, name_of_backend: str) -> None:
    """Without gradients: nothing but the loss is computed."""
    case, dtype = CASES[name], torch.float64
    given = problem(case, dtype)
    truth = run(case, dtype, "torch", given)["loss"]
    given.pop("gradient")
    for one in ("reference", name_of_backend):
        actual = linear_cross_entropy(**placed(given, one), **case.options, backend=one)
        assert_matches(actual.cpu(), truth, op="linear_cross_entropy", dtype=dtype)


@pytest.mark.usefixtures("card")
@on_backends
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_sizes_and_strides(name_of_backend: str, data: st.DataObject) -> None:
    def draw(*values: Any) -> Any:
        return data.draw(st.sampled_from(values))

    sizes = tuple(data.draw(st.integers(1, limit)) for limit in (30, 20, 70))
    options = {
        "reduction": draw("mean", "sum", "none"),
        "label_smoothing": draw(0.0, 0.3),
        "softcap": draw(0.0, 2.0),
        "z_loss": draw(0.0, 0.1),
        "options": LinearCrossEntropyOptions(batch_chunk_size=draw(1, 4, 100)),
    }
    case = Case(
        sizes, options, draw("classes", "probabilities"), draw(False, True), draw(False, True)
    )
    given = problem(case, torch.float32)
    expected = run(case, torch.float32, "reference", given)
    for name in ("input", "linear_weight", "target"):
        layout, tensor = draw("plain", "transposed", "padded"), given[name]
        if layout == "transposed" and tensor.dim() == 2:
            given[name] = tensor.t().contiguous().t()
        elif layout == "padded":
            given[name] = torch.stack([tensor, tensor], -1)[..., 0]
    tensors = {name: placed(tensor, name_of_backend) for name, tensor in given.items()}
    actual = results(
        linear_cross_entropy, tensors, torch.float32, backend=name_of_backend, **options
    )
    for name, value in expected.items():
        assert_matches(actual[name], value.float(), op=table_of(name), dtype=torch.float32)


def test_expanded_inputs() -> None:
    """One row for all, one class weight for all."""
    case = Case((9, 4, 6), {"reduction": "sum"}, weight=True)
    given = problem(case, torch.float64)
    given["input"] = given["input"][:1].expand(9, 4)
    given["weight"] = given["weight"][:1].expand(6)
    given["linear_weight"] = given["linear_weight"][:1].expand(6, 4)
    expected = results(composed, given, torch.float64, **case.options)
    actual = results(linear_cross_entropy, given, torch.float64, backend="cpu", **case.options)
    for name, value in expected.items():
        assert_matches(actual[name], value, op=table_of(name), dtype=torch.float64)


@pytest.mark.usefixtures("card")
@on_backends
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 4])
def test_no_rows_and_none_that_has_a_part_as_stock(
    reduction: str, rows: int, name_of_backend: str
) -> None:
    input, weight, _ = small(requires_grad=True)
    given = placed([input[:rows], weight, torch.full((rows,), -100)], name_of_backend)
    actual = linear_cross_entropy(*given, reduction=reduction, backend=name_of_backend)
    expected = composed(*given, reduction=reduction)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    for gradient in torch.autograd.grad(actual.sum(), [input, weight]):
        assert not gradient.any()


@pytest.mark.usefixtures("card")
@on_backends
def test_outputs_are_written_whole(name_of_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that torch hands out holds NaN."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for name in ("ignored", "several chunks", "everything", "no row has a part"):
            for dtype in (torch.float32, torch.bfloat16):
                given = problem(CASES[name], dtype)
                assert_agrees(
                    CASES[name], dtype, run(CASES[name], dtype, name_of_backend, given), given
                )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [1e3, 1e5, 1e30])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_logits_may_be_large(size: float, smoothing: float) -> None:
    """They nearly agree, or one has all the weight."""
    input, weight = torch.full((4, 1), size), 1 + torch.rand(50, 1) / 100
    target = torch.tensor([0, 1, 2, int(weight.argmax())])

    def outcome(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaf = weight.to(dtype).requires_grad_()
        loss = function(input.to(dtype), leaf, target, label_smoothing=smoothing)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    truth = outcome(composed, torch.float64)
    for ours, theirs, exact in zip(
        outcome(linear_cross_entropy, torch.float32), outcome(composed, torch.float32), truth,
        strict=True,
    ):  # fmt: skip
        assert_no_worse_than_stock(ours, theirs, exact)


@pytest.mark.parametrize("features", [1, 5, 40])
def test_subnormal_halves_are_numbers(features: int) -> None:
    """They are no subnormals of what computes: a large feature makes a logit of one."""
    hidden = torch.full((3, features), 6e4).half()
    weight = torch.zeros(7, features).half()
    weight[2] = 2.0**-16 / features
    target = torch.tensor([2, 0, 2])
    actual = linear_cross_entropy(hidden, weight, target, reduction="none", backend="cpu")
    logits = hidden.double() @ weight.double().T
    truth = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert_matches(actual, truth.half(), op="rounded once", dtype=torch.float16)


@pytest.mark.usefixtures("card")
@on_backends
def test_classes_may_be_ruled_out(name_of_backend: str) -> None:
    """By a bias of minus infinity, as long as no target is one of them."""
    case = Case((6, 4, 1300), target="classes", bias=True)
    given = problem(case, torch.float32)
    given["linear_bias"][:1200] = -torch.inf
    given["target"] += 1200 - given["target"].clamp_max(1200)
    copies = {name: None if t is None else t.clone() for name, t in given.items()}
    expected = results(composed, copies, torch.float64)
    actual = run(case, torch.float32, name_of_backend, given)
    for name, value in expected.items():
        assert_matches(actual[name], value.float(), op=table_of(name), dtype=torch.float32)


@pytest.mark.usefixtures("card")
@on_backends
@pytest.mark.parametrize("name", ["input", "linear_weight", "linear_bias"])
def test_nan_propagates(name: str, name_of_backend: str) -> None:
    case = Case((4, 5, 600), {"reduction": "none"}, target="classes", bias=True)
    given = problem(case, torch.float32)
    given[name].view(-1)[7] = torch.nan
    copies = {key: None if t is None else t.clone() for key, t in given.items()}
    expected = results(composed, copies, torch.float64, reduction="none")
    for key, actual in run(case, torch.float32, name_of_backend, given).items():
        assert torch.equal(actual.isnan(), expected[key].isnan()), key


def test_a_cap_that_is_far_away_is_none() -> None:
    input, weight, target = small(torch.float32)
    assert_matches(
        linear_cross_entropy(input, weight, target, softcap=1e38),
        linear_cross_entropy(input, weight, target), op="linear_cross_entropy", dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("wrong", [7, -1, -99])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_target_that_is_no_class_raises_as_stock(wrong: int, reduction: str) -> None:
    input, weight, target = small(requires_grad=True)
    target[1] = wrong
    with pytest.raises(IndexError) as theirs:
        composed(input, weight, target, reduction=reduction)
    with pytest.raises(IndexError) as ours:
        linear_cross_entropy(input, weight, target, reduction=reduction)
    assert str(ours.value) == str(theirs.value) == f"Target {wrong} is out of bounds."


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("backend", CARD_BACKENDS)
def test_on_a_card_a_row_whose_target_is_no_class_is_nan(backend: str) -> None:
    """Nobody waits for the card to find out."""
    input, weight, target = placed(small(requires_grad=True), backend)
    target[1] = 7
    loss = linear_cross_entropy(input, weight, target, reduction="none", backend=backend)
    (gradient,) = torch.autograd.grad(loss[[0, 1, 3]].sum(), input)
    expected = [False, True, False, False, False]
    assert loss.isnan().tolist() == expected
    assert gradient.isnan().all(1).tolist() == expected


def test_bits_of_losses_do_not_depend_on_the_threads() -> None:
    logits = torch.randn(60, 700)
    target = torch.randint(700, (60,))
    target[::5] = -100
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        own, scale = logits.clone(), torch.full((60,), 0.5)
        losses, logsumexps = torch.full((2, 60), torch.nan)
        rows = _native_cpu.CrossEntropyRows(
            own, target, None, scale, scale, -100, 0.1, 2.0, losses, logsumexps
        )
        _native_cpu.cross_entropy(rows, threads)
        found.append(torch.cat([own.flatten(), losses, logsumexps]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.isfinite(found[0]).all()


@pytest.mark.parametrize("isa", _native_cpu.instruction_sets)
def test_each_instruction_set(isa: str) -> None:
    program = (
        "import torch, test_linear_cross_entropy as t\n"
        "for name in ('plain', 'many classes', 'everything', 'everything, probabilities'):\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "        torch.manual_seed(0)\n"
        "        t.test_agrees_with_the_reference(name, 'cpu', dtype)\n"
        "print(t._native_cpu.instruction_set)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "FASTOPT_CPU_ISA": isa, "PYTHONPATH": str(ROOT)},
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(isa)


@pytest.mark.parametrize(
    "changed",
    [
        {"logits": torch.zeros(3, 0)}, {"logits": torch.zeros(7, 3).t()},
        {"targets": torch.zeros(4, dtype=torch.int64)}, {"targets": torch.tensor([0, 7, 1])},
        {"targets": torch.zeros(3, dtype=torch.int32)}, {"targets": torch.zeros(3, 6)},
        {"class_weights": torch.zeros(6)}, {"loss_scale": torch.zeros(2)},
        {"z_scale": torch.zeros(3).double()}, {"losses": torch.zeros(6)[::2]},
        {"logsumexps": None},
    ],
    ids=lambda changed: str(*changed),
)  # fmt: skip
def test_the_native_call_compares_what_it_is_given(changed: dict[str, Any]) -> None:
    arguments = {
        "logits": torch.zeros(3, 7), "targets": torch.zeros(3, dtype=torch.int64),
        "class_weights": None, "loss_scale": torch.ones(3), "z_scale": torch.ones(3),
        "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0,
        "losses": torch.zeros(3), "logsumexps": torch.zeros(3), **changed,
    }  # fmt: skip
    with pytest.raises(ValueError, match=next(iter(changed))):
        _native_cpu.cross_entropy(_native_cpu.CrossEntropyRows(**arguments), 1)


def test_the_self_check_passes(card: Any) -> None:  # noqa: F811
    device = torch.device(card.device)
    outcomes = selfcheck.run("linear_cross_entropy", card, device)
    assert len(outcomes) > 10 and not [outcome for outcome in outcomes if outcome.error]


def test_a_graphs_capture_needs_the_kernels_that_it_launches(
    card: Any,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton compiles the one with gradients at its own first launch."""
    monkeypatch.setattr(launch, "_loaded", set())
    kernels = registry.kernels("triton")
    asked = LinearCrossEntropyRequest(*placed(small(torch.float32), "triton"))

    def is_refused(request: LinearCrossEntropyRequest) -> bool:
        with monkeypatch.context() as capture:
            capture.setattr(triton_linear_cross_entropy, "is_capturing", lambda device: True)
            reason = registry.BACKENDS["triton"].supports_linear_cross_entropy(request)
        assert reason is None or "needs a call before it" in reason
        return reason is not None

    assert is_refused(asked)
    kernels.linear_cross_entropy_forward(asked, [False] * 3)
    assert not is_refused(asked) and not is_refused(dataclasses.replace(asked, ignore_index=16))
    asked.input.requires_grad_()
    assert is_refused(asked)
    with torch.no_grad():
        assert not is_refused(asked)
        kernels.linear_cross_entropy_forward(asked, [True, False, False])
    assert not is_refused(asked) and is_refused(dataclasses.replace(asked, reduction="none"))


# Autograd.


def tensors_for(reduction: str) -> tuple[Any, list[Tensor]]:
    input, weight, target = small(requires_grad=True)
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def call(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_cross_entropy(
            input, weight, target, linear_bias=bias, reduction=reduction, label_smoothing=0.1,
            softcap=2.0, z_loss=0.1,
        )  # fmt: skip

    return call, [input, weight, bias]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_and_gradgradcheck(reduction: str) -> None:
    call, leaves = tensors_for(reduction)
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("wanted", range(1, 8))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_wanted(wanted: int, reduction: str) -> None:
    call, leaves = tensors_for(reduction)
    expected = torch.autograd.grad(call(*leaves).sum(), leaves)
    for place, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(wanted >> place & 1))
    call(*leaves).sum().backward()
    for place, (leaf, value) in enumerate(zip(leaves, expected, strict=True)):
        assert (leaf.grad is not None) == bool(wanted >> place & 1)
        if leaf.grad is not None:
            assert_matches(leaf.grad, value, op=table_of("gradient"), dtype=torch.float64)


@pytest.mark.parametrize("upstream", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_kept(upstream: float, reduction: str) -> None:
    call, leaves = tensors_for(reduction)
    loss = call(*leaves)
    upstreams = torch.full_like(loss, upstream)
    first = torch.autograd.grad(loss, leaves, upstreams, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    loss.backward(upstreams, retain_graph=True)
    loss.backward(upstreams, retain_graph=True)
    loss.backward(upstreams)
    for leaf, gradient, before in zip(leaves, first, kept, strict=True):
        assert torch.equal(gradient, before)
        assert leaf.grad is not None
        assert_matches(leaf.grad, 3 * before, op=table_of("gradient"), dtype=torch.float64)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward(upstreams)


def test_gradients_accumulate() -> None:
    call, leaves = tensors_for("mean")
    expected = torch.autograd.grad(call(*leaves), leaves)
    for _ in range(3):
        (call(*leaves) * 2).backward()
    for leaf, value in zip(leaves, expected, strict=True):
        assert leaf.grad is not None
        assert_matches(leaf.grad, 6 * value, op=table_of("gradient"), dtype=torch.float64)


def test_one_leaf_in_two_places() -> None:
    """Tied embeddings: the weight has a gradient from elsewhere too."""
    _, weight, target = small(requires_grad=True)

    def gradient(function: Any) -> Tensor:
        loss = function(weight[target % 7] * 2, weight, target)
        return torch.autograd.grad(loss, weight)[0]

    assert_matches(
        gradient(linear_cross_entropy), gradient(composed), op=table_of("gradient"),
        dtype=torch.float64,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(
        lambda w: linear_cross_entropy(w[target % 7], w, target), weight
    )


def test_several_gradients_at_once() -> None:
    for reduction in ("mean", "none"):
        call, leaves = tensors_for(reduction)
        loss = call(*leaves)
        several = torch.randn(3, *loss.shape, dtype=torch.float64)
        found = torch.autograd.grad(loss, leaves, several, is_grads_batched=True, retain_graph=True)
        for number, one in enumerate(several):
            alone = torch.autograd.grad(loss, leaves, one, retain_graph=True)
            for batched, expected in zip(found, alone, strict=True):
                assert_matches(
                    batched[number], expected, op=table_of("gradient"), dtype=torch.float64
                )


def test_a_written_weight_is_noticed() -> None:
    call, leaves = tensors_for("mean")
    loss = call(*leaves)
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_gradient_becomes_the_parameters_own() -> None:
    """Nothing is copied on its way: neither for an upstream gradient of 1 nor for another."""
    program = (
        "import resource, torch\n"
        "from fastopt.nn.functional import linear_cross_entropy as f\n"
        "x, w = torch.randn(64, 64, requires_grad=True), torch.randn(400_000, 64)\n"
        "w.requires_grad_()\n"
        "t = torch.arange(64)\n"
        "f(x, w[:9], t % 9).backward()\n"
        "for factor in (1, 2):\n"
        "    w.grad = None\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "    (f(x, w, t) * factor).backward()\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    first, second = map(int, result.stdout.split())
    assert first < 250 * 1024 and second < 20 * 1024  # KiB; weight and logits have 98 MiB each


def test_memory_is_that_of_a_chunk() -> None:
    """All logits would take 400 MiB, and their gradients as much."""
    program = (
        "import resource, torch\n"
        "from fastopt.nn.functional import linear_cross_entropy as f\n"
        "x, w = torch.randn(4096, 16, requires_grad=True), torch.randn(25_000, 16)\n"
        "w.requires_grad_()\n"
        "t = torch.arange(4096)\n"
        "f(x[:64], w[:64], t[:64] % 64).backward()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for reduction in ('mean', 'none'):\n"
        "    f(x, w, t, reduction=reduction).sum().backward()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True,
        cwd=ROOT,
    )  # fmt: skip
    assert int(result.stdout) < 100 * 1024  # KiB


def test_half_precision_and_a_scaler() -> None:
    """The mean's gradients are below fp16's numbers until the scaler's factor is in them."""
    given = problem(Case((900, 8, 3000), target="classes"), torch.float16)
    given["input"] *= 0.1
    given["gradient"] = torch.tensor(2.0**14, dtype=torch.float16)
    truth = results(composed, {k: t for k, t in given.items() if t is not None or k in
                               ("linear_bias", "weight")}, torch.float64)  # fmt: skip
    actual = results(linear_cross_entropy, given, torch.float16)
    theirs = results(composed, given, torch.float16)
    for name, value in truth.items():
        if name.startswith("gradient"):
            assert_no_worse_than_stock(actual[name], theirs[name], value)


# Torch around the operator.


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str) -> None:
    input, weight, target = small(torch.float32, requires_grad=True)
    bias = torch.randn(7, requires_grad=True)
    numbers = (reduction, -100, 0.1, 2.0, 0.1, 2)
    for formed in ([False] * 3, [reduction != "none"] * 3):
        arguments = (input, weight, target, bias, torch.rand(7), *numbers, *formed, "cpu")
        torch.library.opcheck(torch.ops.fastopt.linear_cross_entropy, arguments)
    detached = [t.detach() for t in (input, weight)]
    gradient = torch.ones(5 if reduction == "none" else ())
    arguments = (gradient, *detached, target, None, None, *numbers, True, True, False, "cpu")
    torch.library.opcheck(torch.ops.fastopt.linear_cross_entropy_backward, arguments)


def test_fake_results_are_laid_out_as_the_real_ones() -> None:
    input = torch.randn(3, 5).t().requires_grad_()
    weight = torch.randn(3, 7).t().requires_grad_()
    arguments = (input, weight, small()[2], None, None, "mean", -100, 0.0, 0.0, 0.0, 0)
    torch.library.opcheck(
        torch.ops.fastopt.linear_cross_entropy, (*arguments, True, True, False, "cpu")
    )


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [None, LinearCrossEntropyOptions()])
def test_compiles_into_one_graph(reduction: str, options: LinearCrossEntropyOptions | None) -> None:
    input, weight, target = small(torch.float32, requires_grad=True)

    def call(input: Tensor, weight: Tensor) -> Tensor:
        loss = linear_cross_entropy(
            input, weight, target, reduction=reduction, options=options, z_loss=0.1
        )
        return loss.sin().sum() * 2

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(input, weight), [input, weight])
    for gradient, value in zip(
        torch.autograd.grad(compiled(input, weight), [input, weight]), expected, strict=True
    ):
        assert_matches(gradient, value, op=table_of("gradient"), dtype=torch.float32)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_once_for_any_number_of_rows(reduction: str) -> None:
    """And for any weight of what is added to the loss."""

    def call(input: Tensor, weight: Tensor, target: Tensor, z_loss: float) -> Tensor:
        loss = linear_cross_entropy(input, weight, target, reduction=reduction, z_loss=z_loss)
        return loss.sum()

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    input, weight, target = small(torch.float32, requires_grad=True)
    for rows in (5, 3, 2):
        given = input[:rows], weight, target[:rows], 0.1 * rows
        expected = torch.autograd.grad(call(*given), [input, weight])
        for gradient, value in zip(
            torch.autograd.grad(compiled(*given), [input, weight]), expected, strict=True
        ):
            assert_matches(gradient, value, op=table_of("gradient"), dtype=torch.float32)


@pytest.mark.parametrize("transform", ["vmap", "jvp", "dual", "grad", "hessian"])
@pytest.mark.parametrize("options", [None, LinearCrossEntropyOptions()])
def test_transforms_go_to_torch(transform: str, options: LinearCrossEntropyOptions | None) -> None:
    input, weight, target = small()

    def ours(input: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(input, weight, target, options=options)

    def outcome(function: Any) -> Tensor:
        given = input, weight
        if transform == "vmap":
            return torch.vmap(function)(*[x[None].expand(2, *x.shape) for x in given])
        if transform == "jvp":
            return torch.func.jvp(function, given, given)[1]
        if transform == "dual":
            with forward_ad.dual_level():
                duals = [forward_ad.make_dual(x, x) for x in given]
                return forward_ad.unpack_dual(function(*duals)).tangent
        if transform == "hessian":
            return torch.func.hessian(function)(*given)
        return torch.func.grad(function)(*given)

    assert_matches(
        outcome(ours), outcome(lambda x, w: composed(x, w, target)), op=table_of("gradient"),
        dtype=torch.float64,
    )  # fmt: skip


def test_traces() -> None:
    input, weight, target = small()
    traced = torch.jit.trace(lambda x: linear_cross_entropy(x, weight, target) * 1, input)
    other = torch.randn_like(input)
    assert torch.equal(traced(other), linear_cross_entropy(other, weight, target))


@pytest.mark.usefixtures("card")
@on_backends
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_autocast_as_stock(kind: str, name_of_backend: str) -> None:
    given = problem(Case((30, 8, 50), target=kind, bias=True, weight=True), torch.float32)
    given = placed(given, name_of_backend)
    device = given["input"].device.type
    truth = results(
        composed,
        {name: t if name in ("target", "weight", "gradient") else t.bfloat16() for name, t in
         given.items()},
        torch.float64,
    )  # fmt: skip
    with torch.autocast(device, dtype=torch.bfloat16), use_backend(name_of_backend):
        actual = results(linear_cross_entropy, given, torch.float32)
        theirs = results(composed, given, torch.float32)
    for name, value in truth.items():
        assert actual[name].dtype is theirs[name].dtype is torch.float32
        rounded = [result[name].bfloat16() for result in (actual, theirs)]
        assert_no_worse_than_stock(rounded[0], rounded[1], value)


def test_meta_tensors() -> None:
    input, weight, target = (tensor.to("meta") for tensor in small())
    assert linear_cross_entropy(input, weight, target, reduction="none").shape == (5,)


# The front.


@needs_stock
def test_signatures_are_stocks_with_extras() -> None:
    for ours, theirs in (
        (linear_cross_entropy, stock),
        (LinearCrossEntropyLoss.__init__, torch.nn.LinearCrossEntropyLoss.__init__),
    ):
        mine, their = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        assert list(mine) == [*their, "softcap", "z_loss", "backend"]
        for name, parameter in their.items():
            assert (mine[name].kind, mine[name].default) == (parameter.kind, parameter.default)


@needs_stock
@pytest.mark.parametrize("target", [torch.tensor(3), torch.rand(7).softmax(0)], ids=["3", "p"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", [None, LinearCrossEntropyOptions(batch_chunk_size=4)])
def test_one_row_without_a_dimension(target: Tensor, reduction: str, options: Any) -> None:
    input, weight = torch.randn(3, requires_grad=True), torch.randn(7, 3)
    actual = linear_cross_entropy(
        input, weight, target, reduction=reduction, options=options, backend="cpu"
    )
    expected = stock(input, weight, target, reduction=reduction)
    assert_matches(actual, expected, op="linear_cross_entropy", dtype=torch.float32)
    for ours, theirs in zip(
        torch.autograd.grad(actual, input), torch.autograd.grad(expected, input), strict=True
    ):
        assert_matches(ours, theirs, op=table_of("gradient"), dtype=torch.float32)


@needs_stock
@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0, "z_loss": 0.1}], ids=str)
def test_k_dimensional_losses(probabilities: bool, extras: dict[str, float]) -> None:
    input, weight, bias = torch.randn(4, 3), torch.randn(5, 2, 6, 3), torch.randn(5, 2, 6)
    target = torch.randint(5, (4, 2, 6))
    if probabilities:
        target = torch.randn(4, 5, 2, 6).softmax(1)
    else:
        target[1] = -100
    actual = linear_cross_entropy(input, weight, target, linear_bias=bias, **extras)
    truth = linear_cross_entropy(
        input, weight, target, linear_bias=bias, backend="reference", **extras
    )
    assert_matches(actual, truth, op="linear_cross_entropy", dtype=torch.float32)
    if not extras:
        assert torch.equal(actual, stock(input, weight, target, linear_bias=bias))


@needs_stock
@pytest.mark.parametrize("bias", [None, torch.randn(7)], ids=["plain", "bias"])
def test_no_features_as_stock(bias: Tensor | None) -> None:
    given = torch.zeros(4, 0), torch.zeros(7, 0), torch.tensor([0, 6, -100, 3])
    actual = linear_cross_entropy(*given, linear_bias=bias)
    assert torch.equal(actual, stock(*given, linear_bias=bias))


Shape = tuple[int, ...]
WRONG: dict[str, tuple[tuple[Shape, Shape, Shape], dict[str, Any]]] = {
    "input of 3 dimensions": (((2, 4, 3), (7, 3), (2,)), {}),
    "input of none": (((), (7, 3), (2,)), {}),
    "weight of 1 dimension": (((4, 3), (3,), (4,)), {}),
    "features": (((4, 3), (7, 2), (4,)), {}),
    "bias": (((4, 3), (7, 3), (4,)), {"linear_bias": torch.zeros(6)}),
    "K-dimensional, no rows": (((3,), (7, 2, 3), ()), {}),
    "rows of the target": (((4, 3), (7, 3), (5,)), {}),
    "dimensions of the target": (((4, 3), (7, 3), (4, 1)), {}),
    "class weights": (((4, 3), (7, 3), (4,)), {"weight": torch.zeros(6)}),
    "dtype of class weights": (((4, 3), (7, 3), (4,)), {"weight": torch.zeros(7).double()}),
    "label smoothing": (((4, 3), (7, 3), (4,)), {"label_smoothing": 1.5}),
    "reduction": (((4, 3), (7, 3), (4,)), {"reduction": "max"}),
    "classes in the shape of probabilities": (((4, 3), (7, 3), (4, 7)), {}),
    "the same in chunks": (((4, 3), (7, 3), (4, 7)), {"options": LinearCrossEntropyOptions()}),
    "ignored probabilities": (((4, 3), (7, 3), (4, 7)), {"ignore_index": 2}),
    "size and method": (((4, 3), (7, 3), (4,)), {"options": LinearCrossEntropyOptions(
        batch_chunk_size=3, chunking_method="aspect_ratio")}),
    "dtype of sums": (((4, 3), (7, 3), (4,)), {"options": LinearCrossEntropyOptions(
        acc_dtype=torch.float64)}),
}  # fmt: skip


@needs_stock
@pytest.mark.parametrize("name", WRONG)
def test_errors_are_torchs(name: str) -> None:
    (input, weight, target), options = WRONG[name]
    tensors = torch.randn(input), torch.randn(weight), torch.zeros(target, dtype=torch.int64)
    with pytest.raises(Exception) as theirs:
        stock(*tensors, **options)
    with pytest.raises(type(theirs.value)) as ours:
        linear_cross_entropy(*tensors, **options)
    assert str(ours.value) == str(theirs.value)


@needs_stock
@pytest.mark.parametrize("target_dtype", [torch.float64, torch.bfloat16])
def test_probabilities_of_another_dtype_as_stock(target_dtype: torch.dtype) -> None:
    target = torch.rand(4, 7).softmax(1).to(target_dtype)
    tensors = torch.randn(4, 3), torch.randn(7, 3), target
    assert torch.equal(linear_cross_entropy(*tensors), stock(*tensors))


def test_gradients_of_probabilities_are_torchs() -> None:
    input, weight, _ = small(requires_grad=True)
    target = torch.rand(5, 7, dtype=torch.float64).softmax(1).requires_grad_()
    call = torch.autograd.grad(linear_cross_entropy(input, weight, target), target)
    expected = torch.autograd.grad(composed(input, weight, target), target)
    assert torch.equal(call[0], expected[0])
    with pytest.raises(RuntimeError, match="the gradient of target is torch's"):
        linear_cross_entropy(input, weight, target, backend="cpu")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"softcap": -1.0}, "softcap must be finite and not negative, got -1.0"),
        ({"softcap": float("nan")}, "softcap must be finite and not negative, got nan"),
        ({"z_loss": float("inf")}, "z_loss must be finite, got inf"),
        ({"backend": "gpu"}, "gpu"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        linear_cross_entropy(*small(), **options)
    with pytest.raises(ValueError, match=text):
        LinearCrossEntropyLoss(3, 7, **options)


@pytest.mark.parametrize(
    "options",
    [
        LinearCrossEntropyOptions(),
        LinearCrossEntropyOptions(batch_chunk_size=7),
        LinearCrossEntropyOptions(chunking_method="aspect_ratio:2", acc_policy="accurate"),
        LinearCrossEntropyOptions(chunking_method=None, allow_retain_graph=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("case", ["ignored", "everything", "probabilities"])
def test_options_change_no_numbers_and_warn_of_nothing(
    options: LinearCrossEntropyOptions, case: str, recwarn: pytest.WarningsRecorder
) -> None:
    given = problem(CASES[case], torch.float64)
    expected = run(CASES[case], torch.float64, "reference", given)
    chunked = CASES[case]._replace(options={**CASES[case].options, "options": options})
    for name, value in run(chunked, torch.float64, "cpu", given).items():
        assert_matches(value, expected[name], op=table_of(name), dtype=torch.float64)
    assert not recwarn.list


def test_the_module_is_stocks() -> None:
    arguments: dict[str, Any] = {
        "bias": True, "weight": torch.rand(7), "ignore_index": 2, "label_smoothing": 0.1,
        "reduction": "sum",
    }  # fmt: skip
    base = torch_2_13.LinearCrossEntropyLoss
    theirs, ours = base(3, 7, **arguments), LinearCrossEntropyLoss(3, 7, **arguments)
    assert isinstance(ours, base)
    assert ours.extra_repr() == theirs.extra_repr()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    input, target = torch.randn(4, 3), torch.tensor([0, 2, 5, 6])
    for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_matches(
            module(input, target),
            composed(input, theirs.linear.weight, target, theirs.linear.bias,
                     **{k: v for k, v in arguments.items() if k != "bias"}),
            op="linear_cross_entropy", dtype=torch.float32,
        )  # fmt: skip
    several = LinearCrossEntropyLoss(3, 7, out_features=(2,), bias=True)
    assert several(input, torch.randint(7, (4, 2))).shape == ()
    capped = LinearCrossEntropyLoss(3, 7, softcap=2.0, z_loss=0.1, backend="cpu")
    assert capped.extra_repr().endswith("softcap=2.0, z_loss=0.1, backend='cpu'")
    expected = linear_cross_entropy(
        input, capped.linear.weight, target, softcap=2.0, z_loss=0.1, backend="reference"
    )
    assert_matches(capped(input, target), expected, op="linear_cross_entropy", dtype=torch.float32)


@needs_stock
def test_the_twins_for_older_torch_are_torchs() -> None:
    """What is taken where torch has neither the module nor the options."""
    for ours, theirs in (
        (torch_2_13._Options, torch.nn.LinearCrossEntropyOptions),
        (torch_2_13._Loss, torch.nn.LinearCrossEntropyLoss),
    ):
        mine, their = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
        assert [(p.name, p.kind, p.default) for p in mine.values()] == [
            (p.name, p.kind, p.default) for p in their.values()
        ]
    for wrong in (
        {"acc_policy": "best"}, {"chunking_method": "aspect_ratio:0"}, {"batch_chunk_size": 0},
        {"chunking_method": "size"}, {"acc_dtype": torch.int8},
    ):  # fmt: skip
        texts = []
        for kind in (torch_2_13._Options, torch.nn.LinearCrossEntropyOptions):
            with pytest.raises(ValueError) as error:
                kind(**wrong)  # type: ignore[arg-type]
            texts.append(str(error.value))
        assert texts[0] == texts[1]
    arguments: dict[str, Any] = {"bias": True, "out_features": (2,), "weight": torch.rand(7)}
    modules = (
        torch_2_13._Loss(3, 7, **arguments),
        torch.nn.LinearCrossEntropyLoss(3, 7, **arguments),
    )
    assert modules[0].extra_repr() == modules[1].extra_repr()
    assert list(modules[0].state_dict()) == list(modules[1].state_dict())
    for wrong in ({"weight": torch.rand(6)}, {"label_smoothing": 1.5}):
        texts = []
        for module in (torch_2_13._Loss, torch.nn.LinearCrossEntropyLoss):
            with pytest.raises(RuntimeError) as failure:
                module(3, 7, **wrong)
            texts.append(str(failure.value))
        assert texts[0] == texts[1]
