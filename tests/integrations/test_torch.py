"""What torch itself puts around training: a converted model and our optimizers inside of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import swa_utils
from torch.utils.checkpoint import checkpoint

import fastopt
from fastopt import optim
from tolerances import assert_matches
from training import Classifier, classifier, data, loader, loss_of

F32 = torch.float32


@pytest.fixture
def dynamo() -> Iterator[None]:
    """Lets Dynamo compile recurrent modules and forgets what it compiled."""
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def converted(**options: Any) -> Classifier:
    model = classifier()
    fastopt.convert(model, **options)
    return model


def step_of(model: Any, optimizer: Any) -> Any:
    def step(inputs: Tensor, classes: Tensor) -> Tensor:
        loss = loss_of(model, inputs, classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def train(model: Any, optimizer: Any, step: Any = None, epochs: int = 2) -> list[Tensor]:
    step = step or step_of(model, optimizer)
    return [step(*batch) for _ in range(epochs) for batch in loader()]


def assert_same_losses(actual: list[Tensor], expected: list[Tensor], op: str = "mixed") -> None:
    for mine, other in zip(actual, expected, strict=True):
        assert_matches(mine, other, op=op, dtype=F32)


def stock_losses(**options: Any) -> list[Tensor]:
    model = classifier()
    return train(model, torch.optim.AdamW(model.parameters(), lr=0.01), **options)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_whole_step_compiled(backend: str, dynamo: None) -> None:
    """Forward, backward and optimizer in one function; Dynamo breaks it at the backward alone."""
    model = converted()
    optimizer = optim.AdamW(model.parameters(), lr=0.01, max_grad_norm=100.0)
    step = torch.compile(step_of(model, optimizer), backend=backend)
    assert_same_losses(train(model, optimizer, step, epochs=1), stock_losses(epochs=1))


def test_exported_for_any_batch_with_both_operators() -> None:
    model = converted().eval()
    inputs, _ = data()
    dim = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(model, (inputs[:4],), dynamic_shapes={"inputs": {0: dim}})
    for operator in ("fastopt.attention", "fastopt.lstm_layer"):
        assert operator in program.graph_module.code
    loaded = program.module()
    for rows in (3, 17):
        expected = classifier().eval()(inputs[:rows])
        assert_matches(loaded(inputs[:rows]), expected, op="attention", dtype=F32)


@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_and_a_scaler(scaled: bool) -> None:
    """The LSTM, which stock cannot run so on every CPU, stays outside."""
    losses = []
    for of, model in ((optim, converted()), (torch.optim, classifier())):
        optimizer = of.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=1024.0)
        found = []
        for inputs, classes in loader():
            states = model.lstm(inputs)[0]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model.head(model.layer(states).mean(1))
                loss = torch.nn.functional.cross_entropy(logits, classes)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            found.append(loss.detach())
        losses.append(found)
    assert_same_losses(*losses, op="parameter by chance")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_activation_checkpoints(reentrant: bool, dropout: float) -> None:
    """What is computed again in the backward pass drops the same weights."""
    model = converted()
    model.layer.self_attn.dropout = dropout
    inputs, classes = data(8)
    gradients = []
    for recomputed in (True, False):
        torch.manual_seed(3)
        model.zero_grad()
        leaf = inputs.clone().requires_grad_()

        def run(given: Tensor) -> Tensor:
            return loss_of(model, given, classes)

        loss = checkpoint(run, leaf, use_reentrant=reentrant) if recomputed else run(leaf)
        loss.backward()
        gradients.append([leaf.grad, *[param.grad for param in model.parameters()]])
    for actual, expected in zip(*gradients, strict=True):
        assert torch.equal(actual, expected)


def test_torch_func_over_a_converted_model() -> None:
    """Transforms go to torch's own operations."""
    results = []
    inputs, classes = data(4)
    for model in (converted(), classifier()):
        params = {name: param.detach() for name, param in model.named_parameters()}

        def loss(params: Any, row: Tensor, kind: Tensor, model: Any = model) -> Tensor:
            logits = torch.func.functional_call(model, params, (row.unsqueeze(0),))
            return torch.nn.functional.cross_entropy(logits, kind.unsqueeze(0))

        whole = torch.func.grad(loss)(params, inputs[0], classes[0])
        results.append(whole.values())
    for actual, expected in zip(*results, strict=True):
        assert_matches(actual, expected, op="lstm gradients", dtype=F32)


def test_averaged_models_and_their_learning_rate() -> None:
    averages = []
    for of, model in ((optim, converted()), (torch.optim, classifier())):
        optimizer = of.SGD(model.parameters(), lr=0.1, momentum=0.9)
        averaged = swa_utils.AveragedModel(model)
        scheduler = swa_utils.SWALR(optimizer, swa_lr=0.02, anneal_epochs=2)
        for _ in range(3):
            train(model, optimizer, epochs=1)
            averaged.update_parameters(model)
            scheduler.step()
        assert isinstance(averaged.module.lstm, type(model.lstm))
        averages.append([*averaged.parameters(), torch.tensor(scheduler.get_last_lr())])
    for actual, expected in zip(*averages, strict=True):
        assert_matches(actual.detach(), expected.detach(), op="mixed", dtype=F32)


def test_the_profilers_ranges_have_readable_names() -> None:
    model = converted()
    optimizer = optim.AdamW(model.parameters())
    train(model, optimizer, epochs=1)
    with torch.profiler.profile() as profile:
        train(model, optimizer, epochs=1)
    names = {event.name for event in profile.events()}
    operators = ("attention", "attention_backward", "lstm_layer", "lstm_layer_backward")
    assert {f"fastopt::{name}" for name in operators} <= names
    assert {"Optimizer.step#AdamW.step", "Optimizer.zero_grad#AdamW.zero_grad"} <= names


def test_a_model_on_meta_gets_its_memory_later() -> None:
    with torch.device("meta"):
        model = Classifier()
    assert len(fastopt.convert(model).changed) == 3
    model.to_empty(device="cpu")
    model.load_state_dict(classifier().state_dict())
    assert_same_losses(
        train(model, optim.AdamW(model.parameters(), lr=0.01)), stock_losses(), op="mixed"
    )
