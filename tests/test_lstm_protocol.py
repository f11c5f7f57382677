"""The LSTM as a module: torch's signature, state, errors, copies; backends by name."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastopt
from fastopt import nn
from lstm_cases import LstmCase, assert_same, forward, run

pytest.importorskip("expecttest", reason="torch's test utilities need it")
from torch.testing._internal.common_modules import module_db

STACK: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
CASE = LstmCase("stack", 4, 6, STACK, 5, 3, initial=True)
PACKED = LstmCase("packed", 4, 6, {"proj_size": 2}, 5, 3, (2, 5, 4))
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "projection": {**STACK, "proj_size": 3},
    "everything": {**STACK, "bias": False, "batch_first": True, "dropout": 0.25, "proj_size": 2},
}

Call = Callable[[type[torch.nn.LSTM]], Any]


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def packed(features: int = 4) -> torch.nn.utils.rnn.PackedSequence:
    return pack_padded_sequence(zeros(5, 3, features), torch.tensor([5, 4, 2]))


CONSTRUCTOR_ERRORS: dict[str, dict[str, Any]] = {
    "no hidden units": {"hidden_size": 0},
    "no input": {"input_size": 0},
    "negative": {"hidden_size": -1},
    "float": {"hidden_size": 2.0},
    "float input": {"input_size": 2.0},
    "no layers": {"num_layers": 0},
    "dropout above 1": {"dropout": 1.5},
    "dropout below 0": {"dropout": -0.1},
    "dropout of a flag": {"dropout": True},
    "dropout of a word": {"dropout": "a"},
    "negative projection": {"proj_size": -1},
    "large projection": {"proj_size": 6},
    "bias": {"bias": 1},
    "batch_first": {"batch_first": 1},
    "unknown": {"nonlinearity": "relu"},
}
CALL_ERRORS: dict[str, Call] = {
    "1D": lambda lstm: lstm(4, 6)(zeros(4)),
    "4D": lambda lstm: lstm(4, 6)(zeros(1, 2, 3, 4)),
    "input size": lambda lstm: lstm(4, 6)(zeros(5, 3, 7)),
    "double": lambda lstm: lstm(4, 6)(zeros(5, 3, 4, dtype=torch.float64)),
    "integers": lambda lstm: lstm(4, 6)(zeros(5, 3, 4, dtype=torch.int64)),
    "no step": lambda lstm: lstm(4, 6)(zeros(0, 3, 4)),
    "no step, batch first": lambda lstm: lstm(4, 6, batch_first=True)(zeros(3, 0, 4)),
    "no step, unbatched": lambda lstm: lstm(4, 6)(zeros(0, 4)),
    "2D states": lambda lstm: lstm(4, 6)(zeros(5, 3, 4), (zeros(1, 6), zeros(1, 6))),
    "3D states": lambda lstm: lstm(4, 6)(zeros(5, 4), (zeros(1, 1, 6), zeros(1, 1, 6))),
    "h_0": lambda lstm: lstm(4, 6)(zeros(5, 3, 4), (zeros(1, 2, 6), zeros(1, 3, 6))),
    "c_0": lambda lstm: lstm(4, 6)(zeros(5, 3, 4), (zeros(1, 3, 6), zeros(1, 3, 5))),
    "rows of h_0": lambda lstm: lstm(4, 6, 2)(zeros(5, 3, 4), (zeros(1, 3, 6), zeros(2, 3, 6))),
    "projected h_0": lambda lstm: lstm(4, 6, proj_size=2)(
        zeros(5, 3, 4), (zeros(1, 3, 6), zeros(1, 3, 6))
    ),
    "double states": lambda lstm: lstm(4, 6)(
        zeros(5, 3, 4), (zeros(1, 3, 6, dtype=torch.float64), zeros(1, 3, 6, dtype=torch.float64))
    ),
    "double c_0": lambda lstm: lstm(4, 6)(
        zeros(5, 3, 4), (zeros(1, 3, 6), zeros(1, 3, 6, dtype=torch.float64))
    ),
    "one state": lambda lstm: lstm(4, 6)(zeros(5, 3, 4), zeros(1, 3, 6)),
    "three states": lambda lstm: lstm(4, 6)(zeros(5, 3, 4), (zeros(1, 3, 6),) * 3),
    "meta states": lambda lstm: lstm(4, 6)(zeros(5, 3, 4), (zeros(1, 3, 6, device="meta"),) * 2),
    "meta input": lambda lstm: lstm(4, 6)(zeros(5, 3, 4, device="meta")),
    "a list": lambda lstm: lstm(4, 6)([1.0, 2.0]),
    "packed input size": lambda lstm: lstm(7, 6)(packed()),
    "packed double": lambda lstm: lstm(4, 6).double()(packed()),
    "packed h_0's batch": lambda lstm: lstm(4, 6)(packed(), (zeros(1, 2, 6), zeros(1, 2, 6))),
    "packed h_0's size": lambda lstm: lstm(4, 6)(packed(), (zeros(1, 3, 7), zeros(1, 3, 6))),
    "sparse": lambda lstm: lstm(4, 6)(zeros(5, 3, 4).to_sparse()),
}


def raised(function: Callable[[], Any]) -> tuple[type[BaseException], str]:
    with pytest.raises(Exception) as caught:
        function()
    return caught.type, str(caught.value)


def test_signature_is_torchs_and_two_more() -> None:
    base = inspect.signature(torch.nn.modules.rnn.RNNBase.__init__).parameters
    wanted = [p.replace(annotation=None) for name, p in base.items() if name != "mode"]
    mine = [
        p.replace(annotation=None) for p in inspect.signature(nn.LSTM.__init__).parameters.values()
    ]
    assert mine[: len(wanted)] == wanted
    assert [(p.name, p.default, p.kind) for p in mine[len(wanted) :]] == [
        ("weight_dropout", 0.0, inspect.Parameter.KEYWORD_ONLY),
        ("backend", None, inspect.Parameter.KEYWORD_ONLY),
    ]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_state_repr_and_first_weights(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    ours = nn.LSTM(4, 6, **options)
    torch.manual_seed(3)
    stock = torch.nn.LSTM(4, 6, **options)
    assert isinstance(ours, torch.nn.LSTM)
    assert repr(ours) == repr(stock)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert [name for name, _ in ours.named_parameters()] == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)
    assert ours.all_weights[0][0] is ours.weight_ih_l0
    assert [a for a in vars(stock) if a not in vars(ours)] == []


def test_repr_has_the_weight_dropout() -> None:
    assert repr(nn.LSTM(4, 6, weight_dropout=0.5)) == "LSTM(4, 6, weight_dropout=0.5)"


def test_positional_arguments_are_torchs() -> None:
    arguments = (4, 6, 2, False, True, 0.5, True, 3, "cpu", torch.float64)
    assert repr(nn.LSTM(*arguments)) == repr(torch.nn.LSTM(*arguments))
    assert nn.LSTM(*arguments).weight_hr_l1_reverse.dtype is torch.float64


@pytest.mark.parametrize("case", [CASE, PACKED], ids=lambda case: case.name)
def test_weights_load_both_ways(case: LstmCase) -> None:
    ours, stock = case.pair(torch.float64)
    expected = run(stock, case.sample(torch.float64))
    other = type(stock)(case.input_size, case.hidden_size, **case.options, dtype=torch.float64)
    other.load_state_dict(ours.state_dict())
    assert_same(run(other, case.sample(torch.float64)), expected, torch.float64)
    with torch.no_grad():
        ours.weight_ih_l0.zero_()
    run(ours, case.sample(torch.float64))
    ours.zero_grad()
    ours.load_state_dict(other.state_dict())
    assert_same(run(ours, case.sample(torch.float64)), expected, torch.float64)


def saved(lstm: torch.nn.LSTM) -> torch.nn.LSTM:
    file = io.BytesIO()
    torch.save(lstm, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, saved, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(copied: Callable[[nn.LSTM], nn.LSTM], used: bool) -> None:
    ours, stock = CASE.pair(torch.float64, weight_dropout=0.25)
    if used:
        run(ours, CASE.sample(torch.float64))
        ours.zero_grad(set_to_none=True)
    twin = copied(ours)
    assert type(twin) is nn.LSTM and repr(twin) == repr(ours)
    expected = run(stock, CASE.sample(torch.float64))
    assert_same(run(twin.eval(), CASE.sample(torch.float64)), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_conversions_of_a_used_module(dtype: torch.dtype) -> None:
    ours, stock = (lstm.to(torch.float32) for lstm in CASE.pair(torch.float32))
    for lstm in (ours, stock):
        run(lstm, CASE.sample(torch.float32))
        lstm.to(dtype).zero_grad()
    assert all(value.dtype is dtype for value in forward(ours, CASE.sample(dtype)).values())
    ours.to(torch.float64)
    stock.to(torch.float64)
    actual, expected = (forward(m, CASE.sample(torch.float64)) for m in (ours, stock))
    assert_same(actual, expected, torch.float64)


def test_flatten_parameters_and_reset() -> None:
    ours, _ = CASE.pair(torch.float32)
    ours.flatten_parameters()
    before = ours.weight_hh_l0.clone()
    ours.reset_parameters()
    assert not torch.equal(ours.weight_hh_l0, before)


@pytest.mark.parametrize("options", CONSTRUCTOR_ERRORS.values(), ids=CONSTRUCTOR_ERRORS.keys())
def test_every_error_of_the_constructor_is_torchs(options: dict[str, Any]) -> None:
    arguments = {"input_size": 4, "hidden_size": 6, **options}
    kind, text = raised(lambda: torch.nn.LSTM(**arguments))
    mine, mine_text = raised(lambda: nn.LSTM(**arguments))
    assert (mine, mine_text.replace("LSTM", "RNNBase")) == (kind, text.replace("LSTM", "RNNBase"))


@pytest.mark.parametrize("call", CALL_ERRORS.values(), ids=CALL_ERRORS.keys())
def test_every_error_of_a_call_is_torchs(call: Call) -> None:
    assert raised(lambda: call(nn.LSTM)) == raised(lambda: call(torch.nn.LSTM))


def test_lone_dropout_warns_as_torch_does() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        nn.LSTM(4, 6, dropout=0.5)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_weight_dropout_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=rf"weight_dropout.*got {value}"):
        nn.LSTM(4, 6, weight_dropout=value)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_an_empty_batch(options: dict[str, Any]) -> None:
    results = []
    for lstm in (nn.LSTM(4, 6, **options), torch.nn.LSTM(4, 6, **options)):
        shape = (0, 5, 4) if lstm.batch_first else (5, 0, 4)
        data = zeros(*shape).requires_grad_()
        output, (h_n, c_n) = lstm(data)
        (output.sum() + h_n.sum() + c_n.sum()).backward()
        grads = {f"d {name}": param.grad for name, param in lstm.named_parameters()}
        results.append({"output": output, "h_n": h_n, "c_n": c_n, "d input": data.grad, **grads})
    assert_same(*results, torch.float32)


@pytest.mark.parametrize("training", [False, True])
def test_torchs_own_samples(training: bool) -> None:
    infos = [info for info in module_db if info.module_cls is torch.nn.LSTM]
    samples = [
        sample
        for info in infos
        for sample in info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=True, training=training
        )
    ]
    assert len(samples) >= 32
    for sample in samples:
        constructor, call = sample.constructor_input, sample.forward_input
        stock = torch.nn.LSTM(*constructor.args, **constructor.kwargs, dtype=torch.float64)
        ours = nn.LSTM(*constructor.args, **constructor.kwargs, dtype=torch.float64, backend="cpu")
        ours.load_state_dict(stock.state_dict())
        results = []
        for lstm in (ours.train(training), stock.train(training)):
            output, (h_n, c_n) = lstm(*call.args, **call.kwargs)
            grads = torch.autograd.grad(
                output.sum() + h_n.sum() + 2 * c_n.sum(), [call.args[0], *lstm.parameters()]
            )
            named = {f"d {index}": grad for index, grad in enumerate(grads)}
            results.append({"output": output, "h_n": h_n, "c_n": c_n, **named})
        assert_same(*results, torch.float64)
        reference = sample.reference_fn(ours, *call.args, **call.kwargs)
        assert_same({"output": results[0]["output"]}, {"output": reference[0]}, torch.float64)


@pytest.mark.parametrize("backend", ["auto", "cpu", "torch", "reference"])
@pytest.mark.parametrize("case", [CASE, PACKED], ids=lambda case: case.name)
def test_every_backend_by_name(case: LstmCase, backend: str) -> None:
    ours, stock = case.pair(torch.float64, backend=backend)
    expected = run(stock, case.sample(torch.float64))
    assert_same(run(ours, case.sample(torch.float64)), expected, torch.float64)
    ours, _ = case.pair(torch.float64, backend=None)
    with fastopt.use_backend(backend):
        actual = run(ours, case.sample(torch.float64))
    assert_same(actual, expected, torch.float64)


def test_the_backend_of_the_constructor_goes_before_the_blocks() -> None:
    data = zeros(5, 3, 4, device="meta")
    ours = nn.LSTM(4, 6, device="meta", backend="torch")
    with fastopt.use_backend("cpu"):
        assert ours(data)[0].shape == (5, 3, 6)
        with pytest.raises(RuntimeError, match="backend 'cpu' cannot"):
            nn.LSTM(4, 6, device="meta")(data)


def test_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        nn.LSTM(4, 6, backend="gpu")


@pytest.mark.parametrize("options", [{"device": "meta"}, {"dtype": torch.complex64}], ids=str)
def test_what_only_torch_takes(options: dict[str, Any]) -> None:
    data = torch.ones(5, 3, 4, **options)
    output, _ = nn.LSTM(4, 6, **options)(data)
    assert (output.device, output.dtype) == (data.device, data.dtype)
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot"):
        nn.LSTM(4, 6, **options, backend="cpu")(data)
