"""The LSTM's weights: dropped, frozen, swapped, changed between calls."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import nn
from lstm_cases import LstmCase, assert_same, forward, run, weighted

STACK: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
CASE = LstmCase("stack", 5, 17, STACK, 6, 3, initial=True)
BOTH_DROPOUTS = LstmCase("dropout", 5, 17, {**STACK, "dropout": 0.5}, 6, 3)
PROJECTED = LstmCase("projected, packed", 5, 17, {**STACK, "proj_size": 6}, 6, 3, (2, 6, 3))
WIDE = (torch.float32, torch.float64)
HALF = 0.5


def dropped_stock(
    stock: torch.nn.LSTM, case: LstmCase, dtype: torch.dtype, probability: float
) -> dict[str, Tensor]:
    """Stock on recurrent weights that were dropped in the order of layers and directions."""
    sample = case.sample(dtype)
    weights = {
        name: torch.nn.functional.dropout(weight, probability, training=True)
        for name, weight in stock.named_parameters()
        if "weight_hh" in name
    }
    output, (h_n, c_n) = torch.func.functional_call(stock, weights, sample.arguments())
    if case.lengths is not None:
        output = output.data
    weighted([output, h_n, c_n]).backward()
    grads = {f"d {name}": param.grad for name, param in stock.named_parameters()}
    grads |= {"d input": sample.leaf.grad}
    if sample.states is not None:
        grads |= {"d h_0": sample.states[0].grad, "d c_0": sample.states[1].grad}
    return {"output": output.detach(), "h_n": h_n.detach(), "c_n": c_n.detach(), **grads}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("probability", [0.2, HALF, 1.0])
@pytest.mark.parametrize("case", [CASE, BOTH_DROPOUTS, PROJECTED], ids=lambda case: case.name)
def test_weight_dropout_is_dropout_of_the_weights(
    case: LstmCase, probability: float, dtype: torch.dtype
) -> None:
    ours, stock = case.pair(dtype, weight_dropout=probability)
    torch.manual_seed(5)
    expected = dropped_stock(stock, case, dtype, probability)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    actual = run(ours, case.sample(dtype))
    assert torch.equal(torch.get_rng_state(), after)
    assert_same({name: actual[name] for name in expected}, expected, dtype)


def test_one_mask_for_all_steps_and_another_for_each_call() -> None:
    ours, _ = CASE.pair(torch.float64, weight_dropout=HALF)
    masks = []
    for _ in range(3):
        ours.zero_grad()
        run(ours, CASE.sample(torch.float64))
        masks.append(ours.weight_hh_l1.grad == 0)
        kept = 1 - masks[-1].double().mean()
        assert abs(kept - HALF) < 4 * (HALF * HALF / masks[-1].numel()) ** 0.5  # four sigma
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_weight_dropout_keeps_keys_values_and_evaluation() -> None:
    ours, stock = CASE.pair(torch.float64, weight_dropout=HALF)
    before = copy.deepcopy(ours.state_dict())
    run(ours, CASE.sample(torch.float64))
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())
    ours.eval().zero_grad(set_to_none=True)
    random = torch.get_rng_state()
    actual = run(ours, CASE.sample(torch.float64))
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(actual, run(stock, CASE.sample(torch.float64)), torch.float64)


def test_weight_dropout_in_training_without_gradients() -> None:
    ours, _ = CASE.pair(torch.float64, weight_dropout=HALF)
    torch.manual_seed(6)
    expected = forward(ours, CASE.sample(torch.float64))
    torch.manual_seed(6)
    with torch.no_grad():
        assert_same(forward(ours, CASE.sample(torch.float64)), expected, torch.float64)


CHANGES: dict[str, Callable[[torch.nn.LSTM], Any]] = {
    "in place": lambda lstm: torch.no_grad()(lambda: lstm.weight_hh_l0.mul_(2))(),
    "data": lambda lstm: lstm.weight_hh_l0.data.mul_(2),
    "new data": lambda lstm: setattr(lstm.weight_hh_l0, "data", lstm.weight_hh_l0.data * 2),
    "new parameter": lambda lstm: setattr(
        lstm, "weight_hh_l0", torch.nn.Parameter(lstm.weight_hh_l0.detach() * 2)
    ),
    "numpy": lambda lstm: lstm.bias_hh_l0.detach().numpy().fill(HALF),
    "optimizer": lambda lstm: torch.optim.SGD(lstm.parameters(), lr=HALF).step(),
    "loaded": lambda lstm: lstm.load_state_dict({k: v / 2 for k, v in lstm.state_dict().items()}),
    "tied": lambda lstm: setattr(lstm, "weight_hh_l1", lstm.weight_hh_l0),
    "converted": lambda lstm: lstm.float().double(),
    "shared memory": lambda lstm: lstm.share_memory().weight_ih_l0.data.mul_(2),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_weights_that_changed_are_seen(
    change: Callable[[torch.nn.LSTM], Any], training: bool
) -> None:
    results = []
    for lstm in CASE.pair(torch.float64):
        lstm.train(training)
        run(lstm, CASE.sample(torch.float64))
        change(lstm)
        lstm.zero_grad(set_to_none=True)
        results.append(run(lstm, CASE.sample(torch.float64)))
    assert_same(*results, torch.float64)


def test_weights_changed_before_backward_are_refused() -> None:
    for lstm in CASE.pair(torch.float32):
        outputs = forward(lstm, CASE.sample(torch.float32))
        with torch.no_grad():
            lstm.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            weighted([outputs["output"]]).backward()


@pytest.mark.parametrize(
    "norm",
    [torch.nn.utils.parametrizations.weight_norm, torch.nn.utils.parametrizations.spectral_norm],
)
def test_parametrized_weights(norm: Callable[..., Any]) -> None:
    results = []
    for lstm in CASE.pair(torch.float64):
        torch.manual_seed(7)
        norm(lstm, "weight_hh_l0")
        norm(lstm, "weight_ih_l1_reverse")
        results.append(run(lstm, CASE.sample(torch.float64)))
    assert "d parametrizations.weight_hh_l0.original" in " ".join(results[1])
    assert_same(*results, torch.float64)


def test_weight_dropout_of_a_parametrized_weight_reaches_the_original() -> None:
    ours, _ = CASE.pair(torch.float64, weight_dropout=HALF)
    torch.nn.utils.parametrizations.weight_norm(ours, "weight_hh_l0")
    run(ours, CASE.sample(torch.float64))
    assert ours.parametrizations.weight_hh_l0.original1.grad.count_nonzero() > 0


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [CASE, PROJECTED], ids=lambda case: case.name)
def test_frozen_weights_change_nothing(case: LstmCase, dtype: torch.dtype) -> None:
    ours, _ = case.pair(dtype)
    ours.eval()
    with torch.no_grad():
        expected = forward(ours, case.sample(dtype))
        ours.freeze()
        for _ in range(2):
            for name, value in forward(ours, case.sample(dtype)).items():
                assert torch.equal(value, expected[name]), name
        ours.unfreeze()
        ours.unfreeze()


def frozen() -> nn.LSTM:
    ours, _ = CASE.pair(torch.float64)
    ours.eval().freeze()
    with torch.no_grad():
        forward(ours, CASE.sample(torch.float64))
    return ours


@pytest.mark.parametrize("change", ["in place", "new data", "new parameter"])
def test_a_frozen_weight_that_changed_is_named(change: str) -> None:
    ours = frozen()
    CHANGES[change](ours)
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight_hh_l0"):
        forward(ours, CASE.sample(torch.float64))
    ours.unfreeze()
    with torch.no_grad():
        forward(ours, CASE.sample(torch.float64))
        ours.freeze()
        forward(ours, CASE.sample(torch.float64))


@pytest.mark.parametrize(
    "drop",
    [
        lambda lstm: (lstm.load_state_dict(lstm.state_dict()), lstm)[1],
        lambda lstm: lstm.float().double(),
        copy.deepcopy,
        lambda lstm: pickle.loads(pickle.dumps(lstm)),
    ],
    ids=["load_state_dict", "to", "deepcopy", "pickle"],
)
def test_freezing_is_dropped_with(drop: Callable[[nn.LSTM], nn.LSTM]) -> None:
    ours = drop(frozen())
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
        actual = forward(ours, CASE.sample(torch.float64))
        stock = CASE.stock(torch.float64)
        stock.load_state_dict(ours.state_dict())
        assert_same(actual, forward(stock, CASE.sample(torch.float64)), torch.float64)


def test_a_copy_leaves_the_original_frozen() -> None:
    ours = frozen()
    copy.deepcopy(ours)
    with torch.no_grad():
        ours.weight_hh_l0.mul_(2)
        with pytest.raises(RuntimeError, match="weight_hh_l0"):
            forward(ours, CASE.sample(torch.float64))
