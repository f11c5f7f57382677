"""The LSTM under autograd's checks, torch.func, torch.compile, torch.export and opcheck."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from lstm_cases import LstmCase, assert_same, forward, gradients, run
from tolerances import assert_matches

STACK: dict[str, Any] = {"num_layers": 2, "bidirectional": True}
WIDE = (torch.float32, torch.float64)
NAMED = {"ids": lambda value: value.name if isinstance(value, LstmCase) else str(value)}
SMALL = [
    LstmCase("plain", 2, 3, {}, 3, 2, initial=True),
    LstmCase("bidirectional", 2, 3, STACK, 2, 2, initial=True),
    LstmCase("projection", 2, 3, {"proj_size": 2, "bias": False}, 3, 2, initial=True),
    LstmCase(
        "packed", 2, 3, {"bidirectional": True, "proj_size": 2}, 3, 3, (2, 3, 1), initial=True
    ),
    LstmCase("batch first", 2, 3, {"batch_first": True}, 3, 2, initial=True),
]
CASE = LstmCase("stack", 4, 6, STACK, 5, 3, initial=True)


@pytest.fixture(autouse=True)
def _dynamo_takes_rnns() -> Iterator[None]:
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


def as_function(
    lstm: torch.nn.LSTM, case: LstmCase
) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The module as a function of its leaves, and the leaves."""
    sample = case.sample(torch.float64)
    names = [name for name, _ in lstm.named_parameters()]

    def function(leaf: Tensor, h_0: Tensor, c_0: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        call = sample._replace(leaf=leaf, states=(h_0, c_0)).arguments()
        swapped = dict(zip(names, weights, strict=True))
        output, (h_n, c_n) = torch.func.functional_call(lstm, swapped, call)
        return output if isinstance(output, Tensor) else output.data, h_n, c_n

    weights = [param.detach().clone().requires_grad_() for param in lstm.parameters()]
    return function, (sample.leaf, *sample.states, *weights)


@pytest.mark.parametrize("case", SMALL, **NAMED)
def test_gradcheck(case: LstmCase) -> None:
    ours, _ = case.pair(torch.float64)
    assert torch.autograd.gradcheck(*as_function(ours, case))


@pytest.mark.parametrize("case", SMALL, **NAMED)
def test_gradcheck_of_second_and_forward_derivatives(case: LstmCase) -> None:
    ours, _ = case.pair(torch.float64, backend=None)
    function, leaves = as_function(ours, case)
    dual = case.lengths is None  # torch packs no dual tensors
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=dual, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("case", [CASE, *SMALL[2:4]], **NAMED)
def test_a_gradient_penalty_is_stocks(case: LstmCase, dtype: torch.dtype) -> None:
    results = []
    for lstm in case.pair(dtype, backend=None):
        sample = case.sample(dtype)
        outputs = forward(lstm, sample)
        loss = outputs["output"].pow(2).sum() + outputs["c_n"].sum()
        wanted = [sample.leaf, *lstm.parameters()]
        grads = torch.autograd.grad(loss, wanted, create_graph=True)
        (loss + sum(grad.pow(2).sum() for grad in grads)).backward()
        results.append(gradients(lstm, sample))
    assert_same(*results, dtype)


@pytest.mark.parametrize("case", [CASE, *SMALL[2:4]], **NAMED)
def test_dual_tensors(case: LstmCase) -> None:
    results = []
    for lstm in case.pair(torch.float64, backend=None):
        data, states = case.sample(torch.float64).arguments()
        packed = data if isinstance(data, PackedSequence) else None
        primal = (data if packed is None else packed.data).detach()
        with forward_ad.dual_level():
            dual: Any = forward_ad.make_dual(primal, torch.ones_like(primal))
            output, (h_n, c_n) = lstm(
                dual if packed is None else packed._replace(data=dual), states
            )
            outputs = {
                "d output": output if packed is None else output.data,
                "d h_n": h_n,
                "d c_n": c_n,
            }
            results.append({k: forward_ad.unpack_dual(v).tangent for k, v in outputs.items()})
    assert_same(*results, torch.float64)


@pytest.mark.parametrize("place", ["input", "weight"])
def test_the_native_backend_refuses_dual_tensors(place: str) -> None:
    ours, _ = CASE.pair(torch.float64)
    data = CASE.sample(torch.float64).leaf.detach()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="backend 'cpu' cannot"):
        if place == "input":
            ours(forward_ad.make_dual(data, torch.ones_like(data)))
        else:
            weight = ours.weight_hh_l0.detach()
            dual = forward_ad.make_dual(weight, torch.ones_like(weight))
            torch.func.functional_call(ours, {"weight_hh_l0": dual}, (data,))


def output_of(lstm: torch.nn.LSTM) -> Callable[[Tensor], Tensor]:
    return lambda data: lstm(data)[0]


def ensemble(lstm: torch.nn.LSTM, data: Tensor) -> Tensor:
    params, buffers = torch.func.stack_module_state([lstm, lstm])
    return torch.func.vmap(lambda p: torch.func.functional_call(lstm, (p, buffers), data)[0])(
        params
    )


def grad_of_weights(lstm: torch.nn.LSTM, data: Tensor) -> Tensor:
    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(lstm, weights, data)[0].pow(2).sum()

    grads = torch.func.grad(loss)({k: v.detach() for k, v in lstm.named_parameters()})
    return torch.cat([grad.flatten() for grad in grads.values()])


func = torch.func
TRANSFORMS: dict[str, Callable[[torch.nn.LSTM, Tensor], Tensor]] = {
    "vmap": lambda lstm, x: func.vmap(output_of(lstm))(torch.stack([x, x])),
    "vmap, other randomness": lambda lstm, x: func.vmap(output_of(lstm), randomness="different")(
        torch.stack([x, x])
    ),
    "ensemble": ensemble,
    "grad": lambda lstm, x: func.grad(lambda y: output_of(lstm)(y).sum())(x),
    "grad of the weights": grad_of_weights,
    "grad of grad": lambda lstm, x: func.grad(
        lambda y: func.grad(lambda z: output_of(lstm)(z).sum())(y).pow(2).sum()
    )(x),
    "vmap of grad": lambda lstm, x: func.vmap(func.grad(lambda y: output_of(lstm)(y).sum()))(
        torch.stack([x, x])
    ),
    "jvp": lambda lstm, x: func.jvp(output_of(lstm), (x,), (torch.ones_like(x),))[1],
    "vjp": lambda lstm, x: func.vjp(output_of(lstm), x)[1](torch.ones(5, 3, 12, dtype=x.dtype))[0],
    "jacrev": lambda lstm, x: func.jacrev(output_of(lstm))(x),
    "jacfwd": lambda lstm, x: func.jacfwd(output_of(lstm))(x),
    "hessian": lambda lstm, x: func.hessian(lambda y: output_of(lstm)(y).sum())(x),
    "functionalize": lambda lstm, x: func.functionalize(output_of(lstm))(x),
}


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_transforms_do_what_they_do_with_stock(
    transform: Callable[[torch.nn.LSTM, Tensor], Tensor], dtype: torch.dtype
) -> None:
    ours, stock = CASE.pair(dtype, backend=None)
    data = CASE.sample(dtype).leaf.detach()
    try:
        expected = transform(stock, data)
    except (RuntimeError, NotImplementedError) as error:
        with pytest.raises(type(error)):
            transform(ours, data)
    else:
        assert_same({"d": transform(ours, data)}, {"d": expected}, dtype)


class Tagged(torch.Tensor):
    """A tensor subclass without behaviour."""


@pytest.mark.parametrize("place", ["input", "weight"])
def test_subclasses_come_out_as_from_stock(place: str) -> None:
    results = []
    for lstm in CASE.pair(torch.float64, backend=None):
        data = CASE.sample(torch.float64).leaf.detach()
        if place == "input":
            data = data.as_subclass(Tagged)
        else:
            lstm.weight_hh_l0 = torch.nn.Parameter(lstm.weight_hh_l0.detach().as_subclass(Tagged))
        results.append(lstm(data)[0])
    assert type(results[0]) is type(results[1])
    plain = [{"output": result.as_subclass(torch.Tensor)} for result in results]
    assert_same(*plain, torch.float64)


def compiled(case: LstmCase, backend: str, **options: Any) -> tuple[Any, torch.nn.LSTM]:
    """Ours compiled, with the attributes of a module, and stock as it is."""
    ours, stock = case.pair(torch.float32, backend=None)
    return torch.compile(ours, backend=backend, **options), stock


@pytest.mark.parametrize("case", [CASE, SMALL[2], SMALL[4]], **NAMED)
def test_compiled_training_and_inference(case: LstmCase) -> None:
    lstm, stock = compiled(case, "aot_eager", fullgraph=True)
    actual, expected = (run_whole(m, case) for m in (lstm, stock))
    assert_same(actual, expected, torch.float32)
    with torch.no_grad():
        actual, expected = (forward(m.eval(), case.sample(torch.float32)) for m in (lstm, stock))
    assert_same(actual, expected, torch.float32)


def run_whole(lstm: Any, case: LstmCase) -> dict[str, Tensor]:
    """As ``run``, for a compiled module, whose parameters have a prefix."""
    results = run(lstm, case.sample(torch.float32))
    return {name.replace("_orig_mod.", ""): value for name, value in results.items()}


def test_compiled_by_inductor() -> None:
    lstm, stock = compiled(SMALL[0], "inductor", fullgraph=True)
    assert_same(run_whole(lstm, SMALL[0]), run_whole(stock, SMALL[0]), torch.float32)


def test_compiled_for_any_length() -> None:
    lstm, stock = compiled(CASE, "aot_eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for steps, batch in ((3, 4), (6, 2), (9, 5)):
            data = torch.randn(steps, batch, 4)
            assert_same({"output": lstm(data)[0]}, {"output": stock(data)[0]}, torch.float32)


def test_compiled_with_packed_input() -> None:
    lstm, stock = compiled(SMALL[3], "aot_eager")
    assert_same(run_whole(lstm, SMALL[3]), run_whole(stock, SMALL[3]), torch.float32)


def test_compiled_weight_dropout_drops_in_training_alone() -> None:
    ours, stock = CASE.pair(torch.float32, backend=None, weight_dropout=0.5)
    lstm = torch.compile(ours, backend="aot_eager", fullgraph=True)
    run_whole(lstm, CASE)
    dropped = (ours.weight_hh_l1.grad == 0).double().mean()
    assert 0.25 < dropped < 0.75
    ours.zero_grad(set_to_none=True)
    ours.eval()
    assert_same(run_whole(lstm, CASE), run_whole(stock, CASE), torch.float32)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", [CASE, SMALL[2]], **NAMED)
def test_export(case: LstmCase, strict: bool) -> None:
    ours, stock = case.pair(torch.float32, backend=None)
    call = case.sample(torch.float32).arguments()
    exported = torch.export.export(ours.eval(), call, strict=strict).module()
    actual, expected = (forward(m, case.sample(torch.float32)) for m in (exported, stock.eval()))
    assert_same(actual, expected, torch.float32)


class _Calls(TorchDispatchMode):
    """Notes the arguments of fastopt's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "fastopt":
            self.seen.setdefault(function._opname, (args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", SMALL, **NAMED)
@pytest.mark.parametrize("operator", ["lstm_layer", "lstm_layer_backward"])
def test_opcheck(operator: str, case: LstmCase) -> None:
    ours, _ = case.pair(torch.float64)
    with _Calls() as calls, fastopt.use_backend("cpu"):
        run(ours, case.sample(torch.float64))

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        trained = operator == "lstm_layer" and value.is_floating_point()
        return value.detach().clone().requires_grad_(trained)

    args, kwargs = torch.utils._pytree.tree_map(leaf, calls.seen[operator])
    torch.library.opcheck(getattr(torch.ops.fastopt, operator), args, kwargs)


def test_states_may_be_made_from_the_input() -> None:
    module = fastopt.nn.LSTM(3, 3, dtype=torch.float64)
    leaf = torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)

    def gradient(create_graph: bool) -> Tensor:
        output, _ = module(leaf, (leaf, leaf * 2))
        (found,) = torch.autograd.grad(output.sum(), leaf, create_graph=create_graph)
        return found

    assert_matches(gradient(True), gradient(False), op="lstm", dtype=torch.float64)
