"""Keras 3 on torch: its models with our LSTM and Adam, `compile` and `fit` unchanged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras")

import fastopt  # noqa: E402
from fastopt.integrations import keras as ours  # noqa: E402
from tolerances import assert_matches  # noqa: E402

BATCH, STEPS, FEATURES, UNITS = 4, 6, 3, 5
F32 = torch.float32

LAYERS: dict[str, dict[str, Any]] = {
    "last output": {},
    "sequences": {"return_sequences": True},
    "states": {"return_sequences": True, "return_state": True},
    "backwards": {"return_sequences": True, "return_state": True, "go_backwards": True},
    "no bias": {"use_bias": False},
    "zeros where masked": {"return_sequences": True, "zero_output_for_mask": True},
    "other activation": {"recurrent_activation": "hard_sigmoid", "return_sequences": True},
    "unrolled": {"return_sequences": True, "unroll": True},
}
MASKS = {
    "none": None,
    "right": [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 0, 1], [0, 1, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1, 1], [0] * 6, [0, 1, 0, 0, 1, 0], [1] * 6],
}


def results(layer: Any, mask: Any) -> list[Tensor]:
    """Outputs, then gradients of input, states and weights."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(BATCH, STEPS, FEATURES, generator=generator).requires_grad_()
    states = [torch.randn(BATCH, UNITS, generator=generator).requires_grad_() for _ in range(2)]
    seen = None if mask is None else torch.tensor(mask, dtype=torch.bool)
    outputs = layer(inputs, mask=seen, initial_state=states, training=True)
    outputs = list(outputs) if isinstance(outputs, list | tuple) else [outputs]
    sum((output * (place + 1)).sin().sum() for place, output in enumerate(outputs)).backward()
    weights = [weight.value for weight in layer.trainable_weights]
    gradients = [tensor.grad for tensor in (inputs, *states, *weights)]
    for weight in weights:
        weight.grad = None
    return [*outputs, *gradients]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_keras(name: str, mask: str) -> None:
    layers = [cls(UNITS, **LAYERS[name]) for cls in (ours.LSTM, keras.layers.LSTM)]
    for layer in layers:
        layer.build((BATCH, STEPS, FEATURES))
    layers[0].set_weights(layers[1].get_weights())
    actual, expected = (results(layer, MASKS[mask]) for layer in layers)
    assert len(actual) == len(expected)
    for mine, other in zip(actual, expected, strict=True):
        assert_matches(mine, other, op="lstm gradients", dtype=F32)


def test_our_kernel_runs() -> None:
    layer = ours.LSTM(UNITS)
    (call,) = fastopt.explain(layer, torch.randn(BATCH, STEPS, FEATURES)).calls
    assert call.backend == "cpu"


def test_dropout_of_the_input() -> None:
    layers = [cls(UNITS, dropout=0.5, seed=3) for cls in (ours.LSTM, keras.layers.LSTM)]
    for layer in layers:
        layer.build((BATCH, STEPS, FEATURES))
    layers[0].set_weights(layers[1].get_weights())
    actual, expected = (results(layer, None) for layer in layers)
    for mine, other in zip(actual, expected, strict=True):
        assert_matches(mine, other, op="lstm gradients", dtype=F32)


def test_configuration_is_keras() -> None:
    layer, stock = (
        ours.LSTM(UNITS, dropout=0.1, name="x"),
        keras.layers.LSTM(UNITS, dropout=0.1, name="x"),
    )
    assert layer.get_config() == stock.get_config()
    assert type(ours.LSTM.from_config(stock.get_config())) is ours.LSTM
    for cls in ("Adam", "AdamW"):
        mine, other = getattr(ours, cls)(1e-2), getattr(keras.optimizers, cls)(1e-2)
        assert {**mine.get_config(), "name": ""} == {**other.get_config(), "name": ""}


OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Adam": ("Adam", {}),
    "large epsilon": ("Adam", {"epsilon": 1e-2, "beta_2": 0.9}),
    "amsgrad": ("Adam", {"amsgrad": True}),
    "clipped": ("Adam", {"global_clipnorm": 0.1}),
    "decay": ("AdamW", {"weight_decay": 0.1}),
    "averaged": ("Adam", {"use_ema": True, "ema_momentum": 0.9}),
    "accumulated": ("Adam", {"gradient_accumulation_steps": 2}),
    "schedule": ("Adam", {"learning_rate": "schedule"}),
}


def optimizer(name: str, of_ours: bool) -> Any:
    cls, options = OPTIMIZERS[name]
    options = {"learning_rate": 0.02, **options}
    if options["learning_rate"] == "schedule":
        options["learning_rate"] = keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.5)
    return getattr(ours if of_ours else keras.optimizers, cls)(**options)


def model(of_ours: bool, wrapped: bool = False) -> Any:
    keras.utils.set_random_seed(7)
    layer = (ours if of_ours else keras.layers).LSTM(UNITS)
    return keras.Sequential(
        [
            keras.layers.Embedding(20, FEATURES, mask_zero=wrapped),
            keras.layers.Bidirectional(layer) if wrapped else layer,
            keras.layers.Dense(3, activation="softmax"),
        ]
    )


def data() -> tuple[Any, Any]:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 20, (32, STEPS))
    return tokens, tokens[:, 0] % 3


def fit(net: Any, step: Any, epochs: int = 2, **options: Any) -> list[float]:
    net.compile(optimizer=step, loss="sparse_categorical_crossentropy", metrics=["accuracy"])
    history = net.fit(*data(), batch_size=8, epochs=epochs, verbose=0, shuffle=False, **options)
    losses: list[float] = history.history["loss"]
    return losses


def assert_same_weights(mine: Any, other: Any, op: str = "optimizer") -> None:
    for weight, twin in zip(mine.get_weights(), other.get_weights(), strict=True):
        assert_matches(torch.tensor(weight), torch.tensor(twin), op=op, dtype=F32)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_compile_and_fit_unchanged(name: str, wrapped: bool) -> None:
    nets = [model(True, wrapped), model(False, wrapped)]
    losses = [
        fit(net, optimizer(name, of_ours)) for net, of_ours in zip(nets, (True, False), strict=True)
    ]
    assert_matches(torch.tensor(losses[0]), torch.tensor(losses[1]), op="optimizer", dtype=F32)
    assert_same_weights(*nets, op="mixed")


def test_our_step_runs_on_keras_variables() -> None:
    net, step = model(True), optimizer("Adam", True)
    fit(net, step, epochs=1)
    assert {row.backend for row in fastopt.explain(step._fused).parameters} == {"cpu"}
    state = step._fused.state[net.trainable_variables[0].value]
    assert state["exp_avg"] is step._momentums[0].value and state["step"] == 4
    assert int(step.iterations) == 4


@pytest.mark.parametrize("name", ["Adam", "amsgrad"])
def test_saved_in_the_middle_of_a_run(tmp_path: Path, name: str) -> None:
    """Moments and iterations are Keras's variables: its files hold them, either way."""
    whole, part = model(True), model(True)
    fit(whole, optimizer(name, True), epochs=3)
    fit(part, optimizer(name, True), epochs=1)
    part.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is ours.Adam and type(loaded.layers[1]) is ours.LSTM
    loaded.fit(*data(), batch_size=8, epochs=2, verbose=0, shuffle=False)
    assert_same_weights(loaded, whole)
    objects = {"fastopt>LSTM": keras.layers.LSTM, "fastopt>Adam": keras.optimizers.Adam}
    stock = keras.saving.load_model(tmp_path / "model.keras", custom_objects=objects)
    stock.fit(*data(), batch_size=8, epochs=2, verbose=0, shuffle=False)
    assert_same_weights(stock, whole, op="mixed")


def test_a_variable_without_a_gradient_keeps_count() -> None:
    """Keras corrects every bias by the steps of all, not by those of the variable."""
    after = []
    for of_ours in (True, False):
        variables = [keras.Variable(np.ones(3, np.float32)) for _ in range(2)]
        step = optimizer("Adam", of_ours)
        step.build(variables)
        for number in range(4):
            there = variables if number != 1 else variables[:1]
            step.apply([torch.full((3,), 0.1 * (number + 1)) for _ in there], there)
        after.append(variables)
    for mine, other in zip(*after, strict=True):
        assert_matches(mine.value.detach(), other.value.detach(), op="optimizer", dtype=F32)


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="needs the torch backend: set KERAS_BACKEND=torch"):
        importlib.reload(ours)
