"""fastopt.convert and fastopt.revert: what changes, what survives, what is left and why."""

from __future__ import annotations

import copy
import io
import pickle
import time
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrizations

import fastopt
from fastopt.nn.convert import TWINS
from fastopt.nn.torch_2_13 import LinearCrossEntropyLoss
from tolerances import assert_matches

WIDTH, HEADS, BATCH, LENGTH, CLASSES = 8, 2, 3, 5, 7


class Model(torch.nn.Module):
    """Every class that has a twin, some of them inside of others, one of them twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(CLASSES, WIDTH)
        self.lstm = torch.nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.same_lstm = self.lstm
        self.attention = torch.nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.transformer = torch.nn.Transformer(WIDTH, HEADS, 2, 2, 12, 0.0, batch_first=True)
        self.loss = LinearCrossEntropyLoss(WIDTH, CLASSES)
        self.loss.linear.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.embedding(tokens)
        states, _ = self.lstm(states)
        states, _ = self.same_lstm(states)
        states = states + self.attention(states, states, states)[0]
        states = self.transformer(states, states)
        return self.loss(states.flatten(0, 1), tokens.flatten())


PATHS = (
    "lstm",
    "attention",
    *(
        f"transformer.encoder.layers.{layer}{part}"
        for layer in (0, 1)
        for part in ("", ".self_attn")
    ),
    *(
        f"transformer.decoder.layers.{layer}{part}"
        for layer in (0, 1)
        for part in ("", ".self_attn", ".multihead_attn")
    ),
    "loss",
)


class OwnLSTM(torch.nn.LSTM):
    """Somebody's class."""


def tokens() -> Tensor:
    return torch.randint(CLASSES, (BATCH, LENGTH), generator=torch.Generator().manual_seed(3))


def classes(model: torch.nn.Module) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()}


def reason(module: torch.nn.Module, **options: Any) -> str:
    """Why convert leaves a module."""
    before = type(module)
    (row,) = fastopt.convert(module, **options).left
    assert type(module) is before
    return row.reason


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(tokens())
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_what_changes_and_what_does_not() -> None:
    model = Model()
    before, keys = dict(model.named_parameters()), list(model.state_dict())
    conversion = fastopt.convert(model)
    assert [row.path for row in conversion.changed] == list(PATHS) and not conversion.left
    for path in PATHS:
        module = model.get_submodule(path)
        assert type(module).__module__.startswith("fastopt.nn")
        assert type(module) is getattr(fastopt.nn, type(module).__name__)
    assert model.same_lstm is model.lstm
    assert model.loss.linear.weight is model.embedding.weight
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_model_computes_the_same(training: bool) -> None:
    model = Model().train(training)
    expected = model(tokens())
    expected.backward()
    gradients = [param.grad for param in model.parameters()]
    model.zero_grad()
    fastopt.convert(model)
    actual = model(tokens())
    actual.backward()
    assert_matches(actual, expected, op="attention", dtype=torch.float32)
    for param, gradient in zip(model.parameters(), gradients, strict=True):
        assert_matches(param.grad, gradient, op="attention gradients", dtype=torch.float32)


def test_a_running_optimizer_goes_on() -> None:
    stock = Model()
    ours = copy.deepcopy(stock)
    losses = []
    for model in (stock, ours):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        losses.append(train(model, optimizer, 2))
        if model is ours:
            assert fastopt.convert(model).changed
        losses[-1] += train(model, optimizer, 3)
    assert losses[1][:2] == losses[0][:2]
    for actual, expected in zip(losses[1], losses[0], strict=True):
        assert_matches(actual, expected, op="optimizer", dtype=torch.float32)


def saved(model: torch.nn.Module) -> torch.nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: torch.nn.Module = torch.load(file, weights_only=False)
    return loaded


def restored(model: torch.nn.Module) -> torch.nn.Module:
    fresh = Model()
    fastopt.convert(fresh)
    fresh.load_state_dict(model.state_dict())
    return fresh


WAYS = {
    "nothing": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved,
    "state_dict": restored,
}


@pytest.mark.parametrize("way", WAYS)
def test_revert_undoes_it(way: str) -> None:
    model = Model()
    expected, before = model(tokens()), classes(model)
    attributes = {path: set(vars(module)) for path, module in model.named_modules()}
    fastopt.convert(model)
    model(tokens())
    model = WAYS[way](model)
    conversion = fastopt.revert(model)
    assert [row.path for row in conversion.changed] == list(PATHS) and not conversion.left
    assert classes(model) == before
    assert {path: set(vars(module)) for path, module in model.named_modules()} == attributes
    assert torch.equal(model(tokens()), expected)
    assert not fastopt.revert(model).changed


def test_twice_is_once() -> None:
    model = Model()
    fastopt.convert(model)
    before = classes(model)
    again = fastopt.convert(model)
    assert not again.changed and {row.reason for row in again.left} == {"it is already"}
    assert classes(model) == before


def test_the_model_itself_may_be_one() -> None:
    lstm = torch.nn.LSTM(3, 4)
    (row,) = fastopt.convert(lstm).changed
    assert (row.path, row.before, row.after) == ("", "torch.nn.LSTM", "fastopt.nn.LSTM")
    assert type(lstm) is fastopt.nn.LSTM and lstm.weight_dropout == 0
    assert repr(lstm) == repr(torch.nn.LSTM(3, 4))


def test_the_table() -> None:
    model = torch.nn.Sequential(torch.nn.LSTM(3, 4), OwnLSTM(3, 4))
    assert str(fastopt.convert(model)) == (
        "module  was                   is\n"
        "0       torch.nn.LSTM         fastopt.nn.LSTM\n"
        "1       test_convert.OwnLSTM  left: its class is derived from torch.nn.LSTM"
    )
    assert str(fastopt.convert(torch.nn.Linear(1, 1))) == (
        "no module that torch and fastopt both have"
    )


def test_attributes_that_torch_has_not_got_are_listed() -> None:
    """A constructor of ours that sets another one has to be told to convert."""
    arguments = {
        "LSTM": (2, 2),
        "MultiheadAttention": (2, 1),
        "TransformerEncoderLayer": (2, 1),
        "TransformerDecoderLayer": (2, 1),
        "LinearCrossEntropyLoss": (2, 2),
    }
    for twin in TWINS:
        ours, stock = (cls(*arguments[twin.ours.__name__]) for cls in (twin.ours, twin.stock))
        assert vars(ours).keys() - vars(stock).keys() == twin.own.keys()
        for name, usual in twin.own.items():
            assert getattr(ours, name) == usual


def test_every_module_of_ours_with_a_twin_is_listed() -> None:
    modules = [getattr(fastopt.nn, name) for name in fastopt.nn.__all__]
    modules = [m for m in modules if isinstance(m, type) and issubclass(m, torch.nn.Module)]
    assert {twin.ours for twin in TWINS} == {*modules}
    assert all(issubclass(twin.ours, twin.stock) for twin in TWINS)


def test_modules_made_as_ours_become_torchs() -> None:
    layer = fastopt.nn.TransformerEncoderLayer(WIDTH, HEADS, 12)
    lstm = fastopt.nn.LSTM(WIDTH, WIDTH, backend="cpu").freeze()
    model = torch.nn.ModuleList([layer, lstm])
    assert len(fastopt.revert(model).changed) == 3
    assert type(layer.self_attn) is torch.nn.MultiheadAttention
    assert type(lstm) is torch.nn.LSTM and not hasattr(lstm, "_frozen")


def test_what_torch_cannot_compute_stays_ours() -> None:
    lstm = fastopt.nn.LSTM(2, 3, weight_dropout=0.5)
    loss = fastopt.nn.LinearCrossEntropyLoss(2, 3, softcap=5.0)
    conversion = fastopt.revert(torch.nn.ModuleList([lstm, loss]))
    assert not conversion.changed
    assert [row.reason for row in conversion.left] == [
        "torch has no weight_dropout=0.5",
        "torch has no softcap=5.0",
    ]
    assert lstm.weight_dropout == 0.5 and loss.softcap == 5.0


def test_names_and_classes_choose() -> None:
    model = Model()
    decoder = [path for path in PATHS if path.startswith("transformer.decoder")]
    kept = [*decoder, "loss"]
    exclude = ("transformer.decoder", torch.nn.Transformer, LinearCrossEntropyLoss)
    conversion = fastopt.convert(model, exclude=exclude)
    assert [row.path for row in conversion.left] == kept
    assert {row.reason for row in conversion.left} == {"excluded"}
    included = fastopt.convert(model, include=["transformer.decoder.layers.1"]).changed
    assert [row.path for row in included] == [path for path in decoder if ".1" in path]
    with pytest.raises(ValueError, match=r"no module named 'decoder'"):
        fastopt.convert(model, include=["decoder"])
    assert not fastopt.convert(model, include=["transformer.decoder.layers.1"]).changed
    assert len(fastopt.convert(model, include=[""]).changed) == len(kept) - len(included)


def test_a_shared_module_may_be_named_by_either_path() -> None:
    model = Model()
    fastopt.convert(model, exclude=["same_lstm"])
    assert type(model.same_lstm) is torch.nn.LSTM


def test_classes_of_others_are_left() -> None:
    assert reason(OwnLSTM(2, 3)) == "its class is derived from torch.nn.LSTM"
    assert reason(type("LSTM", (torch.nn.Linear,), {})(2, 3)) == "its class is not torch.nn.LSTM"
    ours = type("Mine", (fastopt.nn.LSTM,), {})(2, 3)
    assert reason(ours) == "its class is derived from torch.nn.LSTM"
    (row,) = fastopt.revert(ours).left
    assert row.reason == "its class is derived from fastopt.nn.LSTM"


def test_a_replaced_forward_is_left() -> None:
    lstm = torch.nn.LSTM(2, 3)
    lstm.forward = lambda *args: torch.nn.LSTM.forward(lstm, *args)
    assert reason(lstm) == "its forward was replaced"


def test_a_layer_around_another_attention_is_left() -> None:
    """In ``eval`` torch's layer does not call it, ours would."""

    class Attention(torch.nn.MultiheadAttention):
        pass

    for kind in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        layer = getattr(torch.nn, kind)(WIDTH, HEADS, 12)
        layer.self_attn = Attention(WIDTH, HEADS)
        conversion = fastopt.convert(layer)
        assert {row.path for row in conversion.left} == {"", "self_attn"}
        assert "its self_attn is a test_convert." in conversion.left[0].reason
        assert all(row.path == "multihead_attn" for row in conversion.changed)


def test_parametrized_modules_are_left_and_may_be_parametrized_afterwards() -> None:
    lstm = torch.nn.LSTM(2, 3)
    parametrizations.weight_norm(lstm, "weight_hh_l0")
    assert "ParametrizedLSTM" in str(fastopt.convert(lstm))
    assert reason(lstm) == "its class is derived from torch.nn.LSTM"
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS)
    stock = copy.deepcopy(attention)
    fastopt.convert(attention)
    inputs = torch.randn(LENGTH, BATCH, WIDTH)
    outputs = []
    for module in (attention, stock):
        parametrizations.weight_norm(module, "in_proj_weight")
        outputs.append(module(inputs, inputs, inputs)[0])
    assert_matches(*outputs, op="attention", dtype=torch.float32)
    torch.nn.utils.parametrize.remove_parametrizations(attention, "in_proj_weight")
    assert type(attention) is fastopt.nn.MultiheadAttention
    assert fastopt.revert(attention).changed


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_the_old_weight_norm_goes_on() -> None:
    lstm = torch.nn.utils.weight_norm(torch.nn.LSTM(2, 3), "weight_hh_l0")
    inputs = torch.randn(LENGTH, BATCH, 2)
    results = []
    for _ in range(2):
        output = lstm(inputs)[0]
        lstm.zero_grad()
        output.sin().sum().backward()
        results.append((output, *[param.grad for param in lstm.parameters()]))
        fastopt.convert(lstm)
    assert type(lstm) is fastopt.nn.LSTM
    for actual, expected in zip(results[1], results[0], strict=True):
        assert_matches(actual, expected, op="lstm gradients", dtype=torch.float32)


def test_compiled_by_jit_is_left() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(torch.nn.Sequential(torch.nn.LSTM(2, 3)))
    (row,) = fastopt.convert(scripted).left
    assert (row.path, row.reason) == ("0", "torch.jit has compiled it")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantized_modules_are_left() -> None:
    model = torch.nn.Sequential(torch.nn.LSTM(2, 3))
    dynamic = torch.ao.quantization.quantize_dynamic(model, {torch.nn.LSTM}, torch.qint8)
    (row,) = fastopt.convert(dynamic).left
    assert row.reason == "its class is not torch.nn.LSTM"
    assert "quantized" in row.before
    quantizable = torch.ao.nn.quantizable.MultiheadAttention(WIDTH, HEADS)
    rows = fastopt.convert(quantizable).left
    assert [row.reason for row in rows] == ["its class is derived from torch.nn.MultiheadAttention"]


def test_lazy_modules_around_go_on() -> None:
    model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.TransformerEncoderLayer(4, 2, 8))
    assert len(fastopt.convert(model).changed) == 2
    model(torch.randn(LENGTH, BATCH, 6)).sum().backward()
    assert type(model[0]) is torch.nn.Linear


def test_hooks_run_on() -> None:
    attention = torch.nn.MultiheadAttention(WIDTH, HEADS)
    seen = []
    attention.register_forward_hook(lambda module, *_: seen.append(type(module)))
    inputs = torch.randn(LENGTH, BATCH, WIDTH)
    attention(inputs, inputs, inputs)
    fastopt.convert(attention)
    attention(inputs, inputs, inputs)
    assert seen == [torch.nn.MultiheadAttention, fastopt.nn.MultiheadAttention]


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_compiled_anew(in_place: bool) -> None:
    """Dynamo guards on the class of each module."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 12, 0.0, batch_first=True)
    model = torch.nn.Sequential(layer)
    if in_place:
        model.compile(backend="eager")
    compiled: Any = model if in_place else torch.compile(model, backend="eager")
    inputs = torch.randn(BATCH, LENGTH, WIDTH)
    expected = compiled(inputs)
    assert len(fastopt.convert(compiled).changed) == 2

    assert_matches(compiled(inputs), expected, op="attention", dtype=torch.float32)
    with torch.profiler.profile() as profile:
        compiled(inputs)
    assert any(event.name.startswith("fastopt::attention") for event in profile.events())
    fastopt.revert(compiled)
    assert torch.equal(compiled(inputs), expected)
    torch._dynamo.reset()


def test_an_exported_program_holds_our_operator() -> None:
    model = torch.nn.Sequential(torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 12)).eval()
    inputs = torch.randn(LENGTH, BATCH, WIDTH)
    expected = model(inputs)
    fastopt.convert(model)
    exported = torch.export.export(model, (inputs,))
    assert "fastopt.attention" in exported.graph_module.code
    assert_matches(exported.module()(inputs), expected, op="attention", dtype=torch.float32)


def test_a_hundred_layers_take_no_second() -> None:
    model = torch.nn.TransformerEncoder(
        torch.nn.TransformerEncoderLayer(WIDTH, HEADS, 12), 100, enable_nested_tensor=False
    )
    begin = time.perf_counter()
    conversion = fastopt.convert(model)
    assert time.perf_counter() - begin < 1
    assert len(conversion.changed) == 200


@pytest.mark.parametrize("change", [fastopt.convert, fastopt.revert])
def test_what_is_no_module_is_named(change: Any) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got 3"):
        change(3)
