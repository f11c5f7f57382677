"""torch.distributed on 2 and 4 processes against one: DDP, FSDP2, meshes, checkpoints."""

from __future__ import annotations

import copy
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import fastopt
from fastopt import optim
from ranks import run_ranks
from tolerances import assert_matches
from training import classifier, data, loss_of

F32 = torch.float32
STEPS, ROWS = 4, 16
EPS = 1e-2  # a bias of the keys has a gradient of rounding errors alone, which a small one enlarges

ORDERS = (0.0, 1.0, 2.0, torch.inf)

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "AdamW": ("AdamW", {"lr": 0.02, "eps": EPS, "amsgrad": True}),
    "Adagrad": ("Adagrad", {"lr": 0.05, "eps": EPS}),
    "RMSprop": ("RMSprop", {"lr": 0.01, "eps": EPS, "centered": True, "momentum": 0.5}),
    "Adamax": ("Adamax", {"lr": 0.02, "eps": EPS}),
    "RAdam": ("RAdam", {"lr": 0.02, "eps": EPS}),
    "NAdam": ("NAdam", {"lr": 0.02, "eps": EPS}),
}


def optimizer_of(name: str, params: Any, of: Any = optim, **options: Any) -> Any:
    cls, usual = OPTIMIZERS[name]
    return getattr(of, cls)(params, **usual, **options)


def batch(step: int) -> tuple[Tensor, Tensor]:
    inputs, classes = data(STEPS * ROWS)
    rows = slice(step * ROWS, (step + 1) * ROWS)
    return inputs[rows], classes[rows]


def own_rows(step: int) -> tuple[Tensor, Tensor]:
    """This rank's part of a batch."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    inputs, classes = (tensor.tensor_split(ranks)[rank] for tensor in batch(step))
    return inputs, classes


def train(
    model: Any,
    optimizer: Any,
    rows: Any = batch,
    clip: float | None = None,
    steps: range = range(STEPS),
) -> list[float]:
    """Losses of the rows given."""
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, *rows(step))
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def whole(model: Any) -> list[Tensor]:
    """All parameters as one process has them."""
    return [
        (param.full_tensor() if isinstance(param, DTensor) else param).detach().clone()
        for param in model.parameters()
    ]


def alone(name: str, clip: float | None = None, steps: range = range(STEPS)) -> list[Tensor]:
    """Stock's training on one process."""
    model = classifier()
    train(model, optimizer_of(name, model.parameters(), torch.optim), clip=clip, steps=steps)
    return whole(model)


def assert_same(actual: list[Tensor], expected: list[Tensor], op: str = "mixed") -> None:
    for mine, other in zip(actual, expected, strict=True):
        assert_matches(mine, other, op=op, dtype=F32)


def _data_parallel() -> dict[str, list[Tensor]]:
    trained = {}
    for kind in ("before", "around", "clipped", "zero"):
        model = classifier()
        if kind == "before":
            fastopt.convert(model)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        if kind != "before":
            assert len(fastopt.convert(parallel).changed) == 3
        params = parallel.parameters()
        if kind == "zero":
            optimizer = ZeroRedundancyOptimizer(
                params, optim.AdamW, **OPTIMIZERS["AdamW"][1], ema_decay=0.9
            )
        else:
            options = {"max_grad_norm": 0.2} if kind == "clipped" else {}
            optimizer = optimizer_of("AdamW", params, **options)
        train(parallel, optimizer, own_rows)
        trained[kind] = whole(model)
    return trained


def test_data_parallel_and_zero_redundancy(tmp_path: Path) -> None:
    expected, clipped = alone("AdamW"), alone("AdamW", clip=0.2)
    for trained in run_ranks(_data_parallel, 2, tmp_path):
        for kind, params in trained.items():
            assert_same(params, clipped if kind == "clipped" else expected)


def sharded(mesh: Any) -> Any:
    """Its layers of their own, as people do; some dimensions are no multiple of the mesh."""
    model = classifier()
    fastopt.convert(model)
    for module in (model.layer, model.head, model):
        fully_shard(module, mesh=mesh)
    return model


def _fully_sharded(shape: tuple[int, ...]) -> dict[str, list[Tensor]]:
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    trained = {}
    for name in OPTIMIZERS if len(shape) == 1 else ("SGD",):
        model = sharded(mesh)
        optimizer = optimizer_of(name, model.parameters())
        train(model, optimizer, own_rows)
        rows = fastopt.explain(optimizer).parameters
        assert {row.backend for row in rows} == {"cpu"}, rows
        state = optimizer.state[next(model.parameters())]
        assert all(
            isinstance(state[key], DTensor)
            for key in optimizer._state_keys(optimizer.param_groups[0])
        ), state
        assert all(p._local_tensor.grad is None for p in model.parameters())
        trained[name] = whole(model)
    model = sharded(mesh)
    train(model, optimizer_of("AdamW", model.parameters()), own_rows, clip=0.2)
    trained["clipped outside"] = whole(model)
    model = sharded(mesh)
    optimizer = optimizer_of(
        "AdamW", model.parameters(), max_grad_norm=0.2, zero_grad_after_step=True, ema_decay=0.9
    )
    train(model, optimizer, own_rows)
    trained["clipped inside"] = whole(model)
    assert all((param.grad.full_tensor() == 0).all() for param in model.parameters())
    trained["averages"] = [average.full_tensor() for average in optimizer.ema_parameters()]
    with optimizer.average_parameters():
        trained["exchanged"] = whole(model)
    for order in ORDERS:
        model = sharded(mesh)
        optimizer = optimizer_of("SGD", model.parameters(), max_grad_norm=0.2, norm_type=order)
        loss_of(model, *own_rows(0)).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()], order)
        optimizer.step()
        trained[f"norm {order}"] = [norm.full_tensor(), optimizer.grad_norm]
    return trained


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=str)
def test_fully_sharded(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Two ranks with a part each, and two by two, which have each part twice."""
    ranks = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
    stock = {name: alone(name) for name in OPTIMIZERS}
    clipped = alone("AdamW", clip=0.2)
    model = classifier()
    averaging = optimizer_of("AdamW", model.parameters(), max_grad_norm=0.2, ema_decay=0.9)
    train(model, averaging)
    for trained in run_ranks(_fully_sharded, ranks, tmp_path, shape):
        for name in stock.keys() & trained.keys():
            assert_same(trained[name], stock[name])
        assert_same(trained["clipped outside"], clipped)
        assert_same(trained["clipped inside"], clipped)
        assert_same(trained["averages"], averaging.ema_parameters())
        assert_same(trained["exchanged"], trained["averages"])
        for order in ORDERS:
            expected_norm, norm = trained[f"norm {order}"]
            assert_matches(norm, expected_norm, op="grad_norm", dtype=F32)


# Their step hangs on whole parameters.
WHOLE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("LAMB", {"lr": 0.1}),
    ("LAMB", {"lr": 0.1, "max_grad_norm": None, "adam_w_mode": False, "clip_value": 0.5}),
    ("Muon", {"lr": 0.1, "max_grad_norm": 0.5, "zero_grad_after_step": True}),
)


def _train_whole(number: int, spread: Any) -> list[Tensor]:
    name, options = WHOLE[number]
    generator = torch.Generator().manual_seed(3)
    shapes = ((6, 5), (4, 3))
    draw = [torch.randn(shape, generator=generator) for _ in range(4) for shape in shapes]
    params = [torch.nn.Parameter(spread(values)) for values in draw[:2]]
    optimizer = getattr(optim, name)(params, **options)
    norms = []
    for step in (1, 2, 3):
        for param, grad in zip(params, draw[2 * step : 2 * step + 2], strict=True):
            param.grad = spread(grad.clone())
        optimizer.step()
        norms += [] if optimizer.grad_norm is None else [optimizer.grad_norm]
    assert all(type(norm) is Tensor for norm in norms)
    return [*whole(torch.nn.ParameterList(params)), *norms]


def _whole_parameters() -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (2,))
    trained = [
        _train_whole(number, lambda values, way=way: distribute_tensor(values, mesh, [way]))
        for number in range(len(WHOLE))
        for way in (Shard(0), Shard(1), Replicate())
    ]
    for name, backend in (("LAMB", "cpu"), ("LAMB", "reference"), ("Muon", "reference")):
        param = torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Shard(0)]))
        param.grad = torch.ones_like(param)
        with pytest.raises(RuntimeError, match="the parameter is a DTensor"):
            getattr(optim, name)([param], backend=backend).step()
    _count_gradients(mesh)
    return trained


def _count_gradients(mesh: Any) -> None:
    """A gradient has a part on each rank, on one, is zero on one of them, or on both."""
    values = ([1.0, 1.0, 1.0], [1.0], [0.0, 2.0], [0.0, 0.0])
    params = []
    for value in values:
        params.append(torch.nn.Parameter(distribute_tensor(torch.tensor(value), mesh, [Shard(0)])))
        params[-1].grad = params[-1].detach().clone()
    optimizer = optim.SGD(params, max_grad_norm=1.0, norm_type=0)
    norm = torch.nn.utils.get_total_norm([param.grad for param in params], 0.0)
    optimizer.step()
    assert optimizer.grad_norm == norm.full_tensor() == 3


def test_rules_of_whole_parameters(tmp_path: Path) -> None:
    """The norms and products of LAMB and Muon are not those of a rank's part."""
    expected = [_train_whole(number, lambda values: values) for number in range(len(WHOLE))]
    for trained in run_ranks(_whole_parameters, 2, tmp_path):
        for place, found in enumerate(trained):
            op = "muon" if WHOLE[place // 3][0] == "Muon" else "optimizer"
            assert_same(found, expected[place // 3], op)


class Feedforward(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.up, self.down = torch.nn.Linear(6, 8), torch.nn.Linear(8, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.down(self.up(inputs.mean(1)).relu())
        return logits


def _tensor_parallel() -> list[Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(
        Feedforward(), mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    optimizer = optimizer_of("AdamW", model.parameters(), max_grad_norm=0.2)
    train(model, optimizer)
    ways = {param.placements for param in model.parameters()}
    assert len(ways) == 3 and len(optimizer._plan._parts) == 3
    return whole(model)


def test_tensor_parallel(tmp_path: Path) -> None:
    """Parameters that are cut by rows, by columns and not at all have one norm."""
    model = Feedforward()
    train(model, optimizer_of("AdamW", model.parameters(), torch.optim), clip=0.2)
    for trained in run_ranks(_tensor_parallel, 2, tmp_path):
        assert_same(trained, whole(model))


def _changes() -> None:
    mesh = init_device_mesh("cpu", (2,))
    values = torch.arange(10.0).view(5, 2)

    def spread(tensor: Tensor, placement: Any) -> DTensor:
        return distribute_tensor(tensor, mesh, [placement])

    for placement in (Shard(0), Shard(1), Replicate()):
        param = torch.nn.Parameter(spread(values, placement))
        plain = torch.nn.Parameter(values.clone())
        beside = torch.nn.Parameter(torch.ones(3))
        ours = optim.Adam([param, beside], lr=0.1)
        stock = torch.optim.Adam([plain, torch.nn.Parameter(torch.ones(3))], lr=0.1)
        for step in range(6):
            gradient = torch.sin(values + step)
            plain.grad = gradient.clone()
            if step == 1:  # partial sums, each rank's a half
                param.grad = DTensor.from_local(gradient / 2, mesh, [Partial()])
            elif step == 2:
                param.grad = spread(gradient, Shard(0))
            elif step == 3:
                param.grad = plain.grad = None
            else:
                param.grad = spread(gradient, placement)
            if step == 4:  # everything is another object now
                ours.load_state_dict(ours.state_dict())
            if step == 5:
                for optimizer, tensor in ((ours, spread(values, placement)), (stock, values)):
                    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
                    state["exp_avg"] = tensor.clone()
            version = param._version
            ours.step()
            stock.step()
            assert (param._version > version) == (step != 3)
            assert_matches(param.full_tensor().detach(), plain.detach(), op="optimizer", dtype=F32)
    tiny = torch.nn.Parameter(spread(torch.ones(1), Shard(0)))  # nothing on the second rank
    tiny.grad = spread(torch.full((1,), 2.0), Shard(0))
    optim.SGD([tiny], lr=0.5, max_grad_norm=1.0).step()
    assert_matches(tiny.full_tensor().detach(), torch.full((1,), 0.5), op="grad_norm", dtype=F32)
    lstm = torch.nn.LSTM(2, 3)
    fully_shard(lstm, mesh=mesh)
    (row,) = fastopt.convert(lstm).left
    assert row.reason == "its class is derived from torch.nn.LSTM"
    _scale(spread(torch.ones(4), Shard(0)))


def _scale(values: DTensor) -> None:
    """An infinity on the second rank alone skips the step on both."""
    results = []
    for of in (optim, torch.optim):
        param = torch.nn.Parameter(values.clone())
        optimizer = optimizer_of("AdamW", [param], of)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for infinite in (False, True, False):
            gradient = torch.arange(1.0, 5.0)
            gradient[3] = torch.inf if infinite else 1.0
            param.grad = distribute_tensor(gradient, values.device_mesh, values.placements)
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
        results.append([param.full_tensor().detach(), torch.tensor(scaler.get_scale())])
    assert_same(*results, op="optimizer")


def test_gradients_and_state_that_change_their_kind(tmp_path: Path) -> None:
    run_ranks(_changes, 2, tmp_path)


def _save(folder: Path, part: range, first: bool, **options: Any) -> list[Tensor]:
    model = sharded(init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = optimizer_of("AdamW", model.parameters(), **options)
    if not first:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(
            model, optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )  # fmt: skip
    train(model, optimizer, own_rows, steps=part)
    if first:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    return whole(model)


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_four_ranks_loads_on_two(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    half, rest = range(STEPS // 2), range(STEPS // 2, STEPS)
    run_ranks(_save, 4, tmp_path / "four", folder, half, True)
    for trained in run_ranks(_save, 2, tmp_path / "two", folder, rest, False):
        assert_same(trained, alone("AdamW"))


def _resume(folder: Path) -> list[list[Tensor]]:
    options = {"state_storage": "8bit", "min_8bit_size": 0}
    half, rest = range(STEPS // 2), range(STEPS // 2, STEPS)
    at_once = _save(folder / "whole", range(STEPS), True, **options)
    _save(folder / "half", half, True, **options)
    return [at_once, _save(folder / "half", rest, False, **options)]


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_8_bit_state_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    for at_once, resumed in run_ranks(_resume, 2, tmp_path / "two", tmp_path):
        for param, other in zip(at_once, resumed, strict=True):
            assert torch.equal(param, other)


# Of bf16 parameters; which ones are in 8 bits is for the size of the whole parameter to say.
SMALL_STATE: tuple[dict[str, Any], ...] = (
    {"state_storage": "8bit", "min_8bit_size": 3000},
    {"state_storage": "8bit", "param_precision": "kahan", "min_8bit_size": 0},
    {"param_precision": "master"},
    {"state_storage": "fp32", "param_precision": "stochastic"},
)
SMALL_SHAPES = ((7, 700), (33, 300), (4, 3), (1, 5000))


def _small(options: dict[str, Any], spread: Any, steps: int = 3) -> Any:
    generator = torch.Generator().manual_seed(5)
    params = [
        torch.nn.Parameter(spread(torch.randn(shape, generator=generator).bfloat16()))
        for shape in SMALL_SHAPES
    ]
    optimizer = optim.AdamW(params, lr=0.01, **options)
    for _ in range(steps):
        for param, shape in zip(params, SMALL_SHAPES, strict=True):
            param.grad = spread(torch.randn(shape, generator=generator).bfloat16())
        optimizer.step()
    return params, optimizer


def _small_parts() -> None:
    """A rank's part has the bits of a parameter of its own."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    for options in SMALL_STATE:
        for way in (Shard(0), Shard(1), Replicate()):
            params, optimizer = _small(
                options, lambda t, way=way: distribute_tensor(t, mesh, [way])
            )
            rows = fastopt.explain(optimizer).parameters
            assert {row.backend for row in rows} == {"cpu"}, rows

            def own(tensor: Tensor, way: Any = way) -> Tensor:
                if way.is_replicate():
                    return tensor
                parts = tensor.chunk(2, way.dim)
                return (parts[rank] if rank < len(parts) else tensor[:0]).clone()

            least = 0 if options.get("state_storage") == "8bit" else 4096
            mine, alone = _small({**options, "min_8bit_size": least}, own)
            for param, part in zip(params, mine, strict=True):
                coding = optimizer._coding(optimizer.param_groups[0], param)
                if coding == alone._coding(alone.param_groups[0], part):
                    assert torch.equal(param.to_local(), part)


def test_small_state_of_parts(tmp_path: Path) -> None:
    run_ranks(_small_parts, 2, tmp_path)


def bits_of(tensor: Any) -> Tensor:
    """Gathered; remainders of masters are no numbers, some of them not a number."""
    whole: Tensor = tensor.full_tensor()
    return whole.view(torch.int16) if whole.dtype is torch.bfloat16 else whole


def _small_checkpoint(folder: Path, saves: bool) -> list[list[Tensor]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = []
    for number, options in enumerate(SMALL_STATE):
        params, optimizer = _small(
            options, lambda t: distribute_tensor(t, mesh, [Shard(0)]), steps=3 if saves else 1
        )
        if saves:
            dcp.save(optimizer.state_dict(), checkpoint_id=folder / str(number))
        elif options.get("state_storage") == "8bit":
            with pytest.raises(dcp.api.CheckpointException, match="Size mismatch"):
                dcp.load(optimizer.state_dict(), checkpoint_id=folder / str(number))
            state = optimizer.state[params[1]]
            state["exp_avg_largest"] = torch.ones(9)
            with pytest.raises(
                RuntimeError, match=r"shape \(9,\) is of other shards .* \(2, 1, 20\)"
            ):
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.step()
            continue
        else:
            state_dict = optimizer.state_dict()
            dcp.load(state_dict, checkpoint_id=folder / str(number))
            optimizer.load_state_dict(state_dict)
            optimizer.zero_grad()
            optimizer.step()  # keeps the state as it is
        state = [optimizer.state[param] for param in params]
        tensors = [tensor for own in state for tensor in own.values() if tensor.dim()]
        found.append([bits_of(tensor) for tensor in tensors])
    return found


@pytest.mark.filterwarnings("ignore")
def test_small_state_of_four_ranks_loads_on_two_unless_it_has_scales(tmp_path: Path) -> None:
    (saved, *_) = run_ranks(_small_checkpoint, 4, tmp_path / "four", tmp_path / "saved", True)
    for loaded in run_ranks(_small_checkpoint, 2, tmp_path / "two", tmp_path / "saved", False):
        for tensors, others in zip(loaded, saved[2:], strict=True):
            assert len(tensors) == len(others) > 0
            assert all(map(torch.equal, tensors, others))


class Bf16(torch.nn.Module):
    """One sharded bf16 matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.weight = torch.nn.Parameter(torch.randn(33, 20).bfloat16())

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs @ self.weight


def _gathered_masters(options: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    """Whole state as one process would save it, and parameters after loading that and a step."""
    mesh = init_device_mesh("cpu", (2,))
    inputs = torch.randn(8, 33, generator=torch.Generator().manual_seed(1)).bfloat16()

    def step(model: Any, optimizer: Any) -> None:
        model(inputs).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    model = Bf16()
    fully_shard(model, mesh=mesh)
    optimizer = optim.AdamW(model.parameters(), **options)
    step(model, optimizer)
    whole_states = StateDictOptions(full_state_dict=True)
    # Copied, as torch's optimizers load the step's very tensor.
    own, gathered = copy.deepcopy(get_state_dict(model, optimizer, options=whole_states))
    other = Bf16()
    fully_shard(other, mesh=mesh)
    others = optim.AdamW(other.parameters(), **options)
    set_state_dict(
        other, others, model_state_dict=own, optim_state_dict=gathered, options=whole_states
    )
    step(model, optimizer)
    step(other, others)
    return gathered["state"]["weight"], [*whole(model), *whole(other)]


@pytest.mark.filterwarnings("ignore")
def test_masters_are_gathered_and_spread_again(tmp_path: Path) -> None:
    options = {"lr": 0.01, "param_precision": "master"}
    for state, (param, other) in run_ranks(_gathered_masters, 2, tmp_path, options):
        assert torch.equal(param, other)
        assert state["master_remainder"].shape == (33, 20)


def test_torchrun_restarts_and_resumes_with_identical_losses(tmp_path: Path) -> None:
    """A rank dies in the middle; both start again from the last checkpoint."""
    written = []
    for dies in (False, True):
        folder = tmp_path / str(dies)
        folder.mkdir()
        arguments = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        script = Path(__file__).parent / "restarted.py"
        command = [sys.executable, "-m", "torch.distributed.run", *arguments, script, folder]
        root = Path(__file__).parent.parent.parent
        paths = (root, root / "examples", Path(__file__).parent)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "DIES": str(int(dies)),
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        written.append((folder / "losses").read_text().splitlines())
    assert written[0][:2] == written[1][:2]
    assert len(written[0]) == 6 and sorted({*written[1]}) == sorted(written[0])
    assert len(written[1]) == 7, "one step was taken twice"


def _many_small_parameters() -> float:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = torch.nn.Sequential(*[torch.nn.Linear(32, 32, bias=False) for _ in range(1000)])
    fully_shard(model, mesh=mesh)
    optimizers = [of.AdamW(model.parameters()) for of in (optim, torch.optim)]
    times: list[list[float]] = [[], []]
    for step in range(4):
        for param in model.parameters():
            local = torch.ones_like(param.to_local())
            param.grad = DTensor.from_local(local, mesh, param.placements)
        for optimizer, found in zip(optimizers, times, strict=True):
            begin = time.perf_counter()
            optimizer.step()
            if step > 0:
                found.append(time.perf_counter() - begin)
    ours, stock = (statistics.median(found) for found in times)
    return stock / ours


def test_a_thousand_small_sharded_parameters_step_five_times_as_fast(tmp_path: Path) -> None:
    assert min(run_ranks(_many_small_parameters, 2, tmp_path)) >= 5
