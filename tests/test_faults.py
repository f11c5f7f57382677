"""Memory that runs out, and checkpoints that are broken or another's: all stays as it was."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import ALL, OptimizerCase, clones, parameters
from fastopt import optim
from fastopt.backends.state_codes import is_coded

CASES = [
    *ALL,
    *(
        OptimizerCase(f"{case.name}-{storage}", case.ours, None, {**case.options, **stored})
        for case in ALL
        if case.name in ("momentum-dampening-l2", "adam-amsgrad-maximize", "adamw", "lion")
        for storage, stored in {
            "8bit": {"state_storage": "8bit", "min_8bit_size": 1},
            "average": {"ema_decay": 0.9, "max_grad_norm": 1.0},
        }.items()
    ),
    OptimizerCase("muon", optim.Muon, torch.optim.Muon, {"lr": 0.01}),
]
NAMED = {"ids": lambda case: case.name}
SHAPES = ((4, 3), (2, 5), (3, 3))


def with_gradients(case: OptimizerCase) -> tuple[list[torch.nn.Parameter], Any]:
    params = parameters(torch.float32, shapes=SHAPES)
    for param, grad in zip(params, parameters(torch.float32, 1, SHAPES), strict=True):
        param.grad = grad.detach()
    return params, case.make(params)


def contents(params: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Copies of the parameters and of all state."""
    states = [optimizer.state.get(param, {}) for param in params]
    values = [value for state in states for _, value in sorted(state.items())]
    return [t.detach().clone() for t in (*params, *values) if isinstance(t, Tensor)]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


@contextmanager
def memory_for(allocations: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Memory runs out after so many tensors were made by the functions that make state."""
    left = [allocations]

    def limited(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            if left[0] == 0:
                raise MemoryError("no memory is left")
            left[0] -= 1
            return make(*args, **kwargs)

        return made

    with monkeypatch.context() as patch:
        for owner, name in (
            (torch, "zeros_like"), (torch, "full_like"), (torch, "zeros"), (torch, "empty_like"),
            (torch, "tensor"), (torch, "clone"), (Tensor, "clone"), (Tensor, "new_zeros"),
        ):  # fmt: skip
            patch.setattr(owner, name, limited(getattr(owner, name)))
        yield


@pytest.mark.parametrize("case", CASES, **NAMED)
def test_a_step_without_memory_changes_nothing_and_the_next_one_works(
    case: OptimizerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_params, expected = with_gradients(case)
    expected.step()
    for allocations in range(100):
        params, optimizer = with_gradients(case)
        before = contents(params, optimizer)
        try:
            with memory_for(allocations, monkeypatch):
                optimizer.step()
        except MemoryError:
            assert equal(contents(params, optimizer), before)
            optimizer.step()
        else:
            break
        finally:
            assert equal(contents(params, optimizer), contents(expected_params, expected)), (
                f"memory for {allocations} tensors"
            )
    assert allocations < 99


LIMITED = """
import resource, torch, fastopt
from fastopt import nn, optim
from fastopt.nn.functional import attention, linear_cross_entropy

torch.set_num_threads(1)
SIZE = 1 << 22


def made_adamw():
    param = torch.nn.Parameter(torch.ones(SIZE))
    param.grad = torch.ones(SIZE)
    return optim.AdamW([param], max_grad_norm=1.0, ema_decay=0.9), param


def run_adamw(optimizer, param):
    optimizer.step()
    return param


def made_lstm():
    torch.manual_seed(0)
    return nn.LSTM(256, 256, 2, bidirectional=True), torch.ones(64, 32, 256)


def run_lstm(lstm, sequence):
    output = lstm(sequence)[0]
    output.sum().backward()
    return torch.cat([output.flatten(), lstm.weight_hh_l1.grad.flatten()])


def made_attention():
    torch.manual_seed(0)
    return torch.randn(3, 4, 8, 600, 64), torch.ones(8)


def run_attention(rows, slopes):
    query, key, value = rows.detach().requires_grad_()
    leaves = [t.detach().requires_grad_() for t in rows]
    output = attention(*leaves, causal=True, alibi_slopes=slopes)
    return torch.cat([t.flatten() for t in torch.autograd.grad(output.sum(), leaves)])


def made_loss():
    torch.manual_seed(0)
    return torch.randn(700, 256), torch.randn(5000, 256)


def run_loss(rows, weight):
    rows, weight = (t.detach().requires_grad_() for t in (rows, weight))
    loss = linear_cross_entropy(rows, weight, torch.arange(700))
    return torch.cat([t.flatten() for t in torch.autograd.grad(loss, (rows, weight))])


make, run = {"adamw": (made_adamw, run_adamw), "lstm": (made_lstm, run_lstm),
             "attention": (made_attention, run_attention), "loss": (made_loss, run_loss)}[WHAT]
expected = run(*make()).detach().clone()
failures = 0
for megabytes in (0, 1, 2, 3, 5, 8, 12, 18, 27, 40, 60):
    given = make()
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        result = run(*given)
    except (RuntimeError, MemoryError):
        failures += 1
        result = None
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if result is None:
        for tensor in given:
            if isinstance(tensor, torch.nn.Module):
                tensor.zero_grad()
        result = run(*given)
    assert torch.equal(result, expected), megabytes
    del given, result
assert failures > 0
print("failures", failures)
"""


@pytest.mark.parametrize("what", ["adamw", "lstm", "attention", "loss"])
def test_the_system_gives_no_memory(what: str) -> None:
    root = str(Path(__file__).parents[1])
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back to the system
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }
    result = subprocess.run(
        [sys.executable, "-c", f"WHAT = {what!r}\n{LIMITED}"],
        capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("failures")


def saved(case: OptimizerCase, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> dict[str, Any]:
    params = parameters(torch.float32, shapes=shapes)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = case.make(params)
    optimizer.step()
    return copy.deepcopy(optimizer.state_dict())


def refused(case: OptimizerCase, state_dict: Any, error: type[Exception], text: str) -> None:
    """Loading raises, and the optimizer goes on as if nothing had been loaded."""
    params, optimizer = with_gradients(case)
    optimizer.step()
    twins = clones(params)
    twin = case.make(twins)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, groups = contents(params, optimizer), repr(optimizer.param_groups)
    with pytest.raises(error, match=text):
        optimizer.load_state_dict(state_dict)
    assert equal(contents(params, optimizer), before)
    assert repr(optimizer.param_groups) == groups
    for param, other in zip(params, twins, strict=True):
        other.grad = param.grad.clone()
    optimizer.step()
    twin.step()
    assert equal(contents(params, optimizer), contents(twins, twin))


WITH_STATE = [case for case in CASES if case.name not in ("sgd", "sgd-l2-maximize")]


@pytest.mark.parametrize("shape", [(3, 5), (3, 4), (1, 3)], ids=str)
@pytest.mark.parametrize("case", WITH_STATE, **NAMED)
def test_state_of_other_shapes_is_refused(case: OptimizerCase, shape: tuple[int, ...]) -> None:
    state_dict = saved(case, (shape, *SHAPES[1:]))
    refused(case, state_dict, ValueError, "of parameter 0 must have its shape")


OTHERS = [case for case in CASES if case.name in ("momentum", "adam", "adagrad", "adamax", "lion")]


@pytest.mark.parametrize("other", OTHERS, **NAMED)
@pytest.mark.parametrize("case", WITH_STATE, **NAMED)
def test_state_of_another_optimizer_is_refused(case: OptimizerCase, other: OptimizerCase) -> None:
    _, optimizer = with_gradients(case)
    needed = {*optimizer._state_keys(optimizer.param_groups[0])} - {"max_exp_avg_sq"}
    if needed <= saved(other)["state"][0].keys():
        pytest.skip("it has all that is needed")
    refused(case, saved(other), ValueError, f"the state is not that of {case.ours.__name__}")


@pytest.mark.parametrize("case", WITH_STATE, **NAMED)
def test_state_that_lacks_a_part_is_refused(case: OptimizerCase) -> None:
    state = saved(case)["state"][0]
    _, optimizer = with_gradients(case)
    keys = optimizer._state_keys(optimizer.param_groups[0])
    if is_coded(state) or "step" not in state:
        pytest.skip("codes may be made anew, and without the one key there is no state")
    for lacking in ({keys[0]}, {keys[-1]}, {*keys}):
        state_dict = saved(case)
        for key in lacking:
            del state_dict["state"][0][key]
        refused(
            case,
            state_dict,
            ValueError,
            rf"parameter 0 has .*, no \['{min(lacking, key=keys.index)}",
        )


@pytest.mark.parametrize("case", WITH_STATE, **NAMED)
@pytest.mark.parametrize("value", ["one", 3.0, [1.0]], ids=str)
def test_state_that_is_no_tensor_is_refused(case: OptimizerCase, value: object) -> None:
    state_dict = saved(case)
    _, optimizer = with_gradients(case)
    key = optimizer._state_keys(optimizer.param_groups[0])[-1]
    state_dict["state"][1][key] = value
    refused(case, state_dict, ValueError, f"state '{key}' of parameter 1 must have its shape")


def test_what_a_hook_raises_leaves_all_as_it_was() -> None:
    case = CASES[6]
    params, optimizer = with_gradients(case)
    optimizer.step()
    before = contents(params, optimizer)

    def fail(_: object) -> None:
        raise KeyError("of the user")

    optimizer.register_load_state_dict_post_hook(fail)
    with pytest.raises(KeyError, match="of the user"):
        optimizer.load_state_dict(saved(case))
    assert equal(contents(params, optimizer), before)
