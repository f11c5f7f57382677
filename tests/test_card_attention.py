"""Attention on cards, beyond the cases that it shares with the CPU: arithmetic, order, layouts.

Of the CUDA simulator: whatever kernels write is known to it, and two blocks that leave different
values in a byte are an error in every test.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as stock_attention

import test_attention as cases
from cards import CARD_BACKENDS, DEVICE, IS_SIMULATED, card, placed  # noqa: F401 (a fixture)
from fastopt import nn, use_backend
from fastopt.backends import attention_requests, cuda_attention, registry, selfcheck
from fastopt.backends.contract import AttentionRequest
from fastopt.backends.cuda import CudaBackend
from fastopt.backends.cuda_context import tf32_products
from fastopt.backends.reference import reference_attention
from fastopt.backends.triton import attention as triton_attention
from fastopt.backends.triton import launch
from fastopt.nn import attention_self_check
from fastopt.nn.functional import attention, scaled_dot_product_attention
from fastopt.ops.attention import with_seed
from tolerances import (
    TF32_EPS,
    assert_matches,
    assert_no_worse_than_stock,
    assert_rounds_like_operands,
)

simulated = pytest.mark.skipif(not IS_SIMULATED, reason="of the simulator")
each_backend = pytest.mark.parametrize("backend", CARD_BACKENDS)
Case = cases.Case

# Each size that a kernel is made for, both kinds of scores, several tiles in both directions.
VARIANTS = {
    f"{features} features, {kind}": Case((1, 2, 1, 70, 90, features, features), options, mask)
    for features in (64, 128, 256)
    for kind, options, mask in (
        ("plain", {"causal": True}, None),
        ("general", {"dropout_p": 0.2, "softcap": 2.0}, (70, 90)),
    )
}


@pytest.fixture(autouse=True)
def _card(card: CudaBackend) -> Iterator[None]:  # noqa: F811
    yield


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def native() -> ModuleType:
    backend = registry.BACKENDS["cuda"]
    assert isinstance(backend, CudaBackend) and backend.native is not None
    assert not backend.missing
    return backend.native


def compare(
    case: Case, dtype: torch.dtype, backend: str = "cuda", eps: float | None = None
) -> dict[str, Tensor]:
    given = cases.tensors(case, dtype)
    actual = cases.run(case, dtype, backend, given)
    expected = cases.run(case, dtype, "reference", given)
    terms = cases.size_of_mask_terms(case, given)
    for key, value in expected.items():
        size = value[value.isfinite()].abs().max()
        size = terms if key == "gradient of mask" else size
        if eps is None and dtype is torch.float32:
            table = cases.table_of(key)
            assert_matches(actual[key], value.float(), op=table, dtype=torch.float32)
        elif key == "logsumexp" and eps is None:
            assert_matches(actual[key], value.float(), op="attention", dtype=torch.float32)
        else:
            assert_rounds_like_operands(actual[key], value, size, eps)
    return actual


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_each_kernel_agrees_with_the_reference(name: str, dtype: torch.dtype, backend: str) -> None:
    compare(VARIANTS[name], dtype, backend)


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_each_kernel_of_deterministic_gradients(name: str, dtype: torch.dtype) -> None:
    compare(VARIANTS[name], dtype)


@each_backend
@pytest.mark.parametrize("name", [*VARIANTS, "odd", "groups", "everything", "bias of groups"])
def test_tf32(name: str, backend: str) -> None:
    """Rounded factors, exact sums; and really rounded."""
    if backend == "triton" and IS_SIMULATED:
        pytest.skip("the interpreter multiplies in fp32 whatever it is told")
    case = VARIANTS.get(name) or cases.CASES[name]
    torch.manual_seed(1)
    with tf32_products(True):
        rounded = compare(case, torch.float32, backend, TF32_EPS)
    torch.manual_seed(1)
    exact = cases.run(case, torch.float32, backend, cases.tensors(case, torch.float32))
    assert not torch.equal(rounded["output"], exact["output"])


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("name", ["causal", "everything", "bias of heads", "groups"])
def test_deterministic_gradients_have_the_same_bits_in_any_order(name: str) -> None:
    given = cases.tensors(cases.CASES[name], torch.float32)
    found = []
    for seed in range(3):
        if IS_SIMULATED:
            native().set_seed(seed)
        found.append(cases.run(cases.CASES[name], torch.float32, "cuda", given))
    for other in found[1:]:
        for key, value in found[0].items():
            assert torch.equal(value, other[key]), key


@simulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["several tiles", "everything", "dropout", "window"])
def test_any_order_of_threads_and_blocks(name: str, dtype: torch.dtype) -> None:
    for seed in range(1, 6):
        native().set_seed(seed)
        torch.manual_seed(2)
        compare(cases.CASES[name], dtype)
    native().set_seed(0)


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_no_worse_than_stock(dtype: torch.dtype, backend: str) -> None:
    tensors = [torch.randn(2, 3, 100, 40).to(dtype) for _ in range(3)]
    truth = stock_attention(*[tensor.double() for tensor in tensors], is_causal=True)
    with use_backend(backend):
        actual = scaled_dot_product_attention(*placed(tensors, backend), is_causal=True).cpu()
    assert_no_worse_than_stock(actual, stock_attention(*tensors, is_causal=True), truth)


LAYOUTS = {
    "beside each other": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "misaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "rows apart": lambda t: torch.stack([t, t], 3)[:, :, :, 0],
    "features apart": lambda t: torch.stack([t, t], 4)[..., 1],
    "batch expanded": lambda t: t[:1].expand(t.shape),
}


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [5, 32])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, features: int, dtype: torch.dtype, backend: str) -> None:
    case = Case((2, 2, 2, 35, 40, features, features))
    inputs, _, gradient = cases.tensors(case, dtype)
    laid_out = [LAYOUTS[name](tensor) for tensor in inputs]
    given = (laid_out, None, LAYOUTS[name](gradient))
    actual = cases.run(case, dtype, backend, given)
    dense = ([tensor.contiguous() for tensor in laid_out], None, given[2].contiguous())
    for key, value in cases.run(case, dtype, backend, dense).items():
        if key == "gradient of q" and backend == "cuda":  # summed in no fixed order
            table = cases.table_of(key)
            if dtype is torch.float32:
                assert_matches(actual[key], value, op=table, dtype=dtype)
            else:
                assert_rounds_like_operands(actual[key], value.double(), value.abs().max())
        else:
            assert torch.equal(actual[key], value), key


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("features", [33, 64])
def test_nothing_is_written_beside_the_tensors(
    features: int, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results lie in larger tensors, with gaps between rows: those keep what they had."""
    guard = 7.0
    made: list[tuple[Tensor, Tensor]] = []

    def inside(batch: int, heads: int, rows: int, wide: int) -> Tensor:
        whole = torch.full((batch, heads + 1, rows + 2, wide + 8), guard, device=DEVICE).to(dtype)
        made.append((whole, whole[:, :heads, 1:-1, :wide]))
        return made[-1][1]

    monkeypatch.setattr(
        attention_requests, "empty_output", lambda q, v: inside(*q.shape[:3], v.size(3))
    )
    monkeypatch.setattr(attention_requests, "empty_gradient", lambda tensor: inside(*tensor.shape))
    asked = AttentionRequest(
        *[torch.randn(2, 2, n, features, device=DEVICE).to(dtype) for n in (37, 45, 45)], scale=0.2
    )
    kernels = registry.kernels(backend)
    output, logsumexp = kernels.attention_forward(asked)
    gradient = torch.ones_like(output)
    kernels.attention_backward(asked, gradient, output, logsumexp, False, False)
    assert len(made) == 4
    for whole, part in made:
        assert bool((part != guard).any())
        part.fill_(guard)
        assert (whole == guard).all()


@each_backend
@pytest.mark.parametrize("place", ["query", "key", "value", "mask"])
def test_nan_propagates(place: str, backend: str) -> None:
    query, key, value = (torch.randn(1, 2, 40, 8) for _ in range(3))
    mask = torch.zeros(40, 40)
    {"query": query, "key": key, "value": value, "mask": mask}[place].view(-1)[5] = torch.nan
    with use_backend(backend):
        actual = scaled_dot_product_attention(*placed([query, key, value, mask], backend))
    expected = stock_attention(query.double(), key.double(), value.double(), mask.double())
    assert torch.equal(actual.cpu().isnan(), expected.isnan())


@simulated
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_that_see_nothing_leave_zeros(dtype: torch.dtype) -> None:
    case = Case((1, 2, 1, 600, 1, 256, 256), {"causal": True})
    for seed in range(1, 9):
        native().set_seed(seed)
        results = cases.run(case, dtype, "cuda")
        for name in ("output", "gradient of q"):
            assert not results[name][:, :, :-1].any(), name
    native().set_seed(0)


@each_backend
@pytest.mark.parametrize("scale", [None, 1e-4])
def test_small_gradients_of_fp16(scale: float | None, backend: str) -> None:
    """What the scale makes small must not be rounded to fp16 on its way."""
    case = Case((1, 2, 2, 40, 600, 64, 64), {"scale": scale})
    inputs, _, gradient = cases.tensors(case, torch.float16)
    given = (inputs, None, gradient * 1e-3)
    actual = cases.run(case, torch.float16, backend, given)
    expected = cases.run(case, torch.float16, "reference", given)
    truth = expected["gradient of v"]
    assert_rounds_like_operands(actual["gradient of v"], truth, truth.abs().max())
    for name in ("gradient of q", "gradient of k"):
        # Results of fp16 themselves: what is subnormal there is lost.
        error = (actual[name].double() - expected[name]).abs().max()
        assert error <= SMALLEST_OF_FP16 + 2e-2 * expected[name].abs().max(), name


SMALLEST_OF_FP16 = 2.0**-24


@each_backend
def test_a_key_that_nobody_sees_may_be_nan(backend: str) -> None:
    case = Case((1, 1, 1, 10, 20, 8, 8))
    inputs, _, gradient = cases.tensors(case, torch.float32)
    leaves = [t.requires_grad_() for t in placed(inputs, backend)]
    with torch.no_grad():
        leaves[1][:, :, 15] = torch.nan
    with use_backend(backend):
        output = scaled_dot_product_attention(*leaves, is_causal=True)
    _, of_key, of_value = torch.autograd.grad(output, leaves, placed(gradient, backend))
    assert output.isfinite().all()
    assert not of_key[:, :, 10:].any() and not of_value[:, :, 10:].any()
    assert of_key.isfinite().all() and of_value.isfinite().all()


@each_backend
def test_an_infinite_sink_takes_everything(backend: str) -> None:
    inputs = [torch.randn(1, 2, 5, 8, device=DEVICE) for _ in range(3)]
    sink = torch.tensor([torch.inf, 0.0], device=DEVICE)
    output = attention(*inputs, learnable_sink=sink, backend=backend)
    assert isinstance(output, Tensor)
    assert not output[:, 0].any() and output[:, 1].isfinite().all()


def test_the_reference_stays_on_its_device() -> None:
    """Derivatives of higher order are its: nothing may be made on another device."""
    tensors = [torch.randn(1, 2, 5, 8, device="meta") for _ in range(3)]
    slopes, seed = torch.ones(1, 2, device="meta"), torch.tensor(3)
    output, logsumexp = reference_attention(
        AttentionRequest(
            *tensors, scale=0.5, slopes=slopes, left=2, right=1, seed=seed, dropout=0.1
        )
    )
    assert output.device.type == logsumexp.device.type == "meta"


def test_the_seed_is_the_cpus_whatever_the_default_device() -> None:
    with torch.device("meta"):
        seeded = with_seed(request(dropout=0.1))
    assert seeded.seed is not None and seeded.seed.device.type == "cpu"


@simulated
@each_backend
@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_first_call_may_be_compiled(fullgraph: bool, backend: str, tmp_path: Path) -> None:
    """The self-check runs then, and Dynamo does not look into it."""
    program = (
        "import torch, cards, conftest, warnings; warnings.simplefilter('error', RuntimeWarning)\n"
        "from fastopt.backends import registry\n"
        "from fastopt.nn.functional import attention\n"
        "registry.BACKENDS.update(cuda=cards.backend(), triton=cards.triton_backend())\n"
        "x = torch.randn(1, 2, 5, 8)\n"
        f"call = lambda t: attention(t, t, t, causal=True, backend='{backend}')\n"
        f"compiled = torch.compile(call, fullgraph={fullgraph}, backend='aot_eager')\n"
        "torch.testing.assert_close(compiled(x), call(x))\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "FASTOPT_SELFCHECK": "on"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=Path(__file__).parent, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.rglob("*.json"))


@each_backend
def test_large_scores(backend: str) -> None:
    """The largest weight is 1 exactly: differences come before the exponential."""
    query = torch.full((1, 1, 3, 8), 3e3, device=DEVICE)
    key = torch.eye(8, device=DEVICE)[None, None] * 1e3
    value = torch.randn(1, 1, 8, 8, device=DEVICE)
    output = attention(query, key, value, scale=1.0, backend=backend)
    assert_matches(output, value.mean(2, keepdim=True).expand(1, 1, 3, 8).contiguous(),
                   op="attention", dtype=torch.float32)  # fmt: skip


@each_backend
@pytest.mark.parametrize(
    ("dtype", "features", "text"),
    [
        (torch.float64, 8, "no kernel has the dtype torch.float64"),
        (torch.float32, 257, "query has 257 features, of which the kernels take 256"),
    ],
)
def test_what_the_kernels_do_not_take(
    dtype: torch.dtype, features: int, text: str, backend: str
) -> None:
    inputs = [torch.randn(1, 1, 4, features, dtype=dtype, device=DEVICE) for _ in range(3)]
    with pytest.raises(RuntimeError, match=text):
        attention(*inputs, backend=backend)


@each_backend
def test_what_a_graphs_capture_cannot_take(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = [True]
    module = {"cuda": cuda_attention, "triton": triton_attention}[backend]
    for place in module, launch:
        monkeypatch.setattr(place, "is_capturing", lambda device: captures[0])
        monkeypatch.setattr(place, "_loaded", set(), raising=False)
    kernels = registry.BACKENDS[backend]

    def refusal(**changes: Any) -> str:
        return kernels.supports_attention(request(**changes)) or ""

    assert "same numbers for dropout" in refusal(dropout=0.1)
    assert "needs a call before it" in refusal()
    with pytest.raises(RuntimeError, match="same numbers for dropout"):
        registry.kernels(backend).attention_forward(request(dropout=0.1, seed=torch.tensor(3)))
    captures[0] = False
    registry.kernels(backend).attention_forward(request())
    captures[0] = True
    assert not refusal()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_with_gradients_needs_both_passes_before_it(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton compiles each kernel at its first launch."""
    monkeypatch.setattr(launch, "_loaded", set())
    asked = request()
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (asked.query, asked.key, asked.value)]
    asked = AttentionRequest(*leaves, scale=0.5)
    kernels = registry.BACKENDS["triton"]
    with torch.no_grad():
        output, logsumexp = registry.kernels("triton").attention_forward(asked)

    def refusal() -> str | None:
        with monkeypatch.context() as capture:
            capture.setattr(triton_attention, "is_capturing", lambda device: True)
            return kernels.supports_attention(asked)

    assert refusal() is not None
    registry.kernels("triton").attention_backward(asked, output, output, logsumexp, False, False)
    assert refusal() is None


def test_a_capture_needs_a_call_of_as_many_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler makes use of their number where it is one or a multiple of 16."""
    monkeypatch.setattr(launch, "_loaded", set())

    def asked(heads: int) -> AttentionRequest:
        return AttentionRequest(*torch.randn(3, 1, heads, 32, 8, device=DEVICE), scale=0.5)

    registry.kernels("triton").attention_forward(asked(2))
    monkeypatch.setattr(triton_attention, "is_capturing", lambda device: True)
    kernels = registry.BACKENDS["triton"]
    assert kernels.supports_attention(asked(2)) is None
    assert "needs a call before it" in (kernels.supports_attention(asked(1)) or "")


def test_masks_may_have_more_elements_than_32_bits_can_count() -> None:
    """Of the last head; what lies between is memory that nobody touches."""
    head = 2**30 + 64
    rows = torch.empty(2 * head + 64, dtype=torch.bool, device=DEVICE)
    mask = rows.as_strided((1, 3, 4, 8), (0, head, 8, 1))
    mask[:] = torch.rand(1, 3, 4, 8, device=DEVICE) > 0.3
    mask[..., 0] = True
    query, key = (torch.randn(1, 3, length, 16, device=DEVICE) for length in (4, 8))
    asked = AttentionRequest(query, key, key, allowed=mask, scale=0.3)
    output, _ = registry.kernels("triton").attention_forward(asked)
    expected = stock_attention(query, key, key, attn_mask=mask.contiguous(), scale=0.3)
    assert_matches(output, expected, op="attention", dtype=torch.float32)


def test_rows_may_be_further_from_each_other_than_32_bits_can_count() -> None:
    """What lies between them is memory that nobody touches."""
    apart, keys = 2**24 + 2**18, 130
    far = torch.empty(apart * keys, dtype=torch.float16, device=DEVICE)
    far = far.as_strided((1, 1, keys, 16), (0, 0, apart, 1))
    far[:] = torch.randn(1, 1, keys, 16, device=DEVICE)
    query, near = torch.randn(1, 1, 20, 16, device=DEVICE).half(), far.contiguous()
    results = []
    for key in far, near:
        asked = AttentionRequest(query, key, key, scale=0.3)
        output, logsumexp = registry.kernels("triton").attention_forward(asked)
        gradients = registry.kernels("triton").attention_backward(
            asked, query, output, logsumexp, False, False
        )
        results.append((output, *gradients[:3]))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def request(**changes: Any) -> AttentionRequest:
    tensors = [torch.randn(1, 2, 5, 8, device=DEVICE) for _ in range(3)]
    return AttentionRequest(*tensors, scale=0.5, **changes)


@each_backend
def test_kernels_that_fail_their_self_check_are_not_used(
    backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("FASTOPT_SELFCHECK", "on")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(attention_self_check, "CASES", attention_self_check.CASES[:2])
    selfcheck.forget()
    kernels = registry.kernels(backend)
    assert registry.BACKENDS[backend].supports_attention(request()) is None
    selfcheck.forget()
    for file in selfcheck.cache_directory().glob("*"):
        file.unlink()
    run = kernels.attention_forward

    def wrong(*arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        output, logsumexp = run(*arguments, **keywords)
        return output + 0.1, logsumexp

    monkeypatch.setattr(kernels, "attention_forward", wrong)
    with pytest.warns(RuntimeWarning, match="kernels for attention failed their self-check"):
        reason = registry.BACKENDS[backend].supports_attention(request())
    assert reason is not None and "failed their self-check on this card (bf16, " in reason
    selfcheck.forget()


@each_backend
def test_opcheck(backend: str) -> None:
    inputs = [torch.randn(1, 2, n, 3, device=DEVICE, requires_grad=True) for n in (4, 5, 5)]
    bias = torch.randn(1, 1, 4, 5, device=DEVICE, requires_grad=True)
    numbers = (0.2, 0.5, 0.0, -1, 0, False, False, backend)
    arguments = (*inputs, bias, *(None,) * 6, torch.tensor(3), *numbers)
    torch.library.opcheck(torch.ops.fastopt.attention, arguments)


@each_backend
def test_a_module_trains(backend: str) -> None:
    torch.manual_seed(0)
    ours = nn.MultiheadAttention(24, 3, batch_first=True).to(DEVICE)
    stock = torch.nn.MultiheadAttention(24, 3, batch_first=True).to(DEVICE)
    stock.load_state_dict(ours.state_dict())
    data = torch.randn(2, 9, 24, device=DEVICE)
    with use_backend(backend):
        output, _ = ours(data, data, data, need_weights=False)
        output.sin().sum().backward()
    expected, _ = stock(data, data, data, need_weights=False)
    expected.sin().sum().backward()
    assert_matches(output.detach(), expected.detach(), op="attention", dtype=torch.float32)
    for mine, twin in zip(ours.parameters(), stock.parameters(), strict=True):
        assert mine.grad is not None and twin.grad is not None
        assert_matches(mine.grad, twin.grad, op="attention gradients", dtype=torch.float32)
