"""The registered operators, called by hand: they refuse what would have them leave a tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

import fastopt  # registers the operators

STEPS, BATCH, INPUTS, HIDDEN = 4, 3, 5, 6


def arguments(**changes: Any) -> dict[str, Any]:
    """A call of ``lstm_layer`` that fits, but for the changes."""
    fitting: dict[str, Any] = {
        "input": torch.randn(STEPS, BATCH, INPUTS),
        "batch_sizes": None,
        "initial_hidden": torch.zeros(1, BATCH, HIDDEN),
        "initial_cell": torch.zeros(1, BATCH, HIDDEN),
        "weights": [torch.randn(4 * HIDDEN, INPUTS), torch.randn(4 * HIDDEN, HIDDEN)],
        "has_biases": False,
        "packed": None,
        "save": True,
        "backend": "cpu",
    }
    return fitting | changes


def packed(*sizes: int) -> dict[str, Any]:
    """A packed input of as many tokens as there are."""
    return {
        "input": torch.randn(STEPS * BATCH, INPUTS),
        "batch_sizes": torch.tensor(sizes),
    }


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "weight_ih": (
        {"weights": [torch.randn(4 * HIDDEN, INPUTS - 1), torch.randn(4 * HIDDEN, HIDDEN)]},
        r"weight_ih must be contiguous, of shape \[24, 5\]",
    ),
    "weight_hh": (
        {"weights": [torch.randn(4 * HIDDEN, INPUTS), torch.randn(4, HIDDEN)]},
        r"weight_hh must be contiguous, of shape \[24, 6\]",
    ),
    "dtype": (
        {"initial_cell": torch.zeros(1, BATCH, HIDDEN, dtype=torch.float64)},
        "initial_cell must be contiguous",
    ),
    "state": ({"initial_hidden": torch.zeros(1, BATCH, HIDDEN - 1)}, "weight_hh must be"),
    "directions": ({"initial_hidden": torch.zeros(3, BATCH, HIDDEN)}, r"\[1 or 2, batch"),
    "batch": ({"initial_cell": torch.zeros(1, BATCH - 1, HIDDEN)}, "initial_cell must be"),
    "tokens": (packed(3, 3, 3), "must sum to the tokens"),
    "growing": (packed(3, 2, 3, 4), "must not grow"),
    "empty step": (packed(3, 3, 3, 3, 0), "must be positive"),
    "first step": (
        packed(3, 3, 3, 3) | {"initial_hidden": torch.zeros(1, 4, HIDDEN)},
        "must begin with the batch|initial_cell must be",
    ),
    "packed weights": ({"packed": torch.zeros(1, 8, dtype=torch.uint8)}, "packed must be"),
    "dimensions": ({"input": torch.randn(BATCH, INPUTS)}, r"must be \[steps, batch, features\]"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    changes, text = WRONG[name]
    with pytest.raises(ValueError, match=text):
        torch.ops.fastopt.lstm_layer(**arguments(**changes))


def test_a_gradient_that_does_not_fit_is_refused() -> None:
    call = arguments()
    output, _, _, gates, cells = torch.ops.fastopt.lstm_layer(**call)
    layer = [call[name] for name in list(call)[:6]]
    short: Tensor = output[1:]
    with pytest.raises(ValueError, match=r"gradient of output must be contiguous, of shape \[4, 3"):
        torch.ops.fastopt.lstm_layer_backward(
            short, None, None, *layer, output, gates, cells, [True] * 5, "cpu"
        )


def test_a_call_that_fits_runs() -> None:
    results = torch.ops.fastopt.lstm_layer(**arguments())
    assert results[0].shape == (STEPS, BATCH, HIDDEN)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"device": "meta"}, "is on meta"), ({"dtype": torch.complex64}, "complex64")],
    ids=["meta", "complex"],
)
def test_what_cannot_be_packed_cannot_be_frozen(options: dict[str, Any], text: str) -> None:
    with pytest.raises(RuntimeError, match=f"cannot pack the weights: .*{text}"):
        fastopt.nn.LSTM(INPUTS, HIDDEN, **options).freeze()


def compiled(lstm: torch.nn.Module) -> Any:
    return torch.compile(lstm, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("backend", ["cpu", "reference", "torch"])
def test_the_modules_own_backend_counts_in_compiled_code(backend: str) -> None:
    torch._dynamo.reset()
    lstm = fastopt.nn.LSTM(INPUTS, HIDDEN, backend=backend)
    data = torch.randn(STEPS, BATCH, INPUTS)
    seen: list[str] = []

    def recording(graph: torch.fx.GraphModule, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():
        output, _ = torch.compile(lstm, backend=recording, fullgraph=True)(data)
        torch.testing.assert_close(output, lstm(data)[0])
    assert any("fastopt" in target for target in seen) == (backend == "cpu")


def test_a_backend_that_cannot_run_is_refused_in_compiled_code() -> None:
    torch._dynamo.reset()
    lstm = fastopt.nn.LSTM(INPUTS, HIDDEN, backend="cpu", dtype=torch.complex64)
    refused = pytest.raises(Exception, match=r"no kernel has the dtype torch\.complex64")
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad(), refused:
        compiled(lstm)(torch.ones(STEPS, BATCH, INPUTS, dtype=torch.complex64))


def test_compiled_training_runs_both_operators() -> None:
    torch._dynamo.reset()
    seen: dict[str, list[str]] = {}

    def recording(name: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            seen[name] = [str(node.target) for node in graph.graph.nodes]
            return make_boxed_func(graph.forward)

        return compiler

    backend = aot_autograd(fw_compiler=recording("forward"), bw_compiler=recording("backward"))
    lstm = fastopt.nn.LSTM(INPUTS, HIDDEN)
    with torch._dynamo.config.patch(allow_rnn=True):
        output, _ = torch.compile(lstm, backend=backend, fullgraph=True)(
            torch.randn(STEPS, BATCH, INPUTS)
        )
        output.sum().backward()
    assert any("fastopt.lstm_layer.default" in target for target in seen["forward"])
    assert any("fastopt.lstm_layer_backward" in target for target in seen["backward"])
