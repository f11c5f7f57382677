"""Random shapes, strides, dtypes and hyperparameters against the fp64 reference.

Gradients, parameters, averages' weights and weight decays are multiples of a power of two, so that
a decay added to a gradient and a gradient added to an average are exact: where the two nearly
cancel, a rounding would be all that is left, and rules divide by that or take its sign.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cases import COUNTERS, DTYPES, OptimizerCase
from fastopt import optim
from strategies import on_grid, sizes, strided
from tolerances import assert_matches

unit = st.integers(0, 63).map(lambda k: k / 64)
rate = st.sampled_from([1e-4, 0.01, 0.1, 1.0])
decay = st.sampled_from([0.0, 1 / 64, 0.25])
flag = st.booleans()
eps = st.sampled_from([1e-8, 1e-3])
betas = st.tuples(unit, st.floats(0.5, 0.999))

moments = {"lr": rate, "betas": betas, "eps": eps, "weight_decay": decay, "maximize": flag}
adam_options = st.fixed_dictionaries({**moments, "amsgrad": flag})
sgd_options = st.fixed_dictionaries(
    {"lr": rate, "momentum": unit, "dampening": unit, "weight_decay": decay, "maximize": flag}
)
lion_options = st.fixed_dictionaries(
    {"lr": rate, "betas": st.tuples(unit, unit), "weight_decay": decay, "maximize": flag}
)
adagrad_options = st.fixed_dictionaries(
    {
        "lr": rate,
        "lr_decay": decay,
        "weight_decay": decay,
        "initial_accumulator_value": decay,
        "eps": eps,
        "maximize": flag,
    }
)
rmsprop_options = st.fixed_dictionaries(
    {
        "lr": rate,
        "alpha": st.floats(0.5, 0.99),  # a shorter average leaves nothing of the variance
        "eps": eps,
        "weight_decay": decay,
        "momentum": unit,
        "centered": flag,
        "maximize": flag,
    }
)
adamax_options = st.fixed_dictionaries(moments)
radam_options = st.fixed_dictionaries({**moments, "decoupled_weight_decay": flag})
nadam_options = st.fixed_dictionaries(
    {**moments, "decoupled_weight_decay": flag, "momentum_decay": decay}
)
schedule_free_options = st.fixed_dictionaries(
    {
        "lr": rate,
        "betas": st.tuples(st.floats(0.1, 0.99), st.floats(0.5, 0.999)),
        "eps": eps,
        "weight_decay": decay,
        "warmup_steps": st.integers(0, 3),
        "r": decay,
    }
)
lamb_options = st.fixed_dictionaries(
    {
        **moments,
        "bias_correction": flag,
        "adam_w_mode": flag,
        "grad_averaging": flag,
        "use_nvlamb": flag,
        "max_grad_norm": st.sampled_from([None, 1.0]),
    }
)
optimizers = st.one_of(
    st.tuples(st.sampled_from([optim.Adam, optim.AdamW]), adam_options),
    st.tuples(st.just(optim.SGD), sgd_options),
    st.tuples(st.just(optim.Lion), lion_options),
    st.tuples(st.just(optim.Adagrad), adagrad_options),
    st.tuples(st.just(optim.RMSprop), rmsprop_options),
    st.tuples(st.just(optim.Adamax), adamax_options),
    st.tuples(st.just(optim.RAdam), radam_options),
    st.tuples(st.just(optim.NAdam), nadam_options),
    st.tuples(st.just(optim.ScheduleFreeAdamW), schedule_free_options),
    st.tuples(st.just(optim.LAMB), lamb_options),
)


@settings(max_examples=300, deadline=None)
@given(data=st.data(), shape=sizes, dtype=st.sampled_from(DTYPES), optimizer=optimizers)
def test_any_step_is_the_references(
    data: Any, shape: tuple[int, ...], dtype: torch.dtype, optimizer: Any
) -> None:
    cls, options = optimizer
    if dtype is torch.float16 and "eps" in options:
        options = {**options, "eps": 1e-2}  # 1e-8 is nothing beside what rounding leaves in halves
    if dtype.itemsize == 2 and "max_grad_norm" in options:
        options = {**options, "max_grad_norm": None}  # a clipped gradient is rounded, then squared
    values = data.draw(strided(shape, dtype, writable=True))
    ours = torch.nn.Parameter(values)
    truth = torch.nn.Parameter(values.detach().clone().contiguous())
    case = OptimizerCase(cls.__name__, cls, None, options)
    mine = case.make([ours], backend="cpu")
    reference = case.make([truth], backend="reference")
    for _ in range(2):
        grad = data.draw(strided(shape, dtype, writable=False))
        ours.grad, truth.grad = grad, grad.clone()
        # Equal states before the step that is compared.
        with torch.no_grad():
            ours.copy_(on_grid(ours.detach()))
            truth.copy_(ours)
        for key, value in mine.state.get(ours, {}).items():
            reference.state[truth][key].copy_(value)
        mine.step()
        reference.step()
        near = ours.detach().isfinite().all() and truth.detach().isfinite().all()
        if options["lr"] < 1 and near:
            assert_matches(ours.detach(), truth.detach(), op="optimizer", dtype=dtype)
        for key, value in reference.state.get(truth, {}).items():
            exact = value.dtype if key in COUNTERS else dtype
            assert_matches(mine.state[ours][key], value, op="rounded once", dtype=exact)
