"""The forecasting example: how it cuts a series, and a short run that is killed and goes on."""

import numpy as np
import pytest
import torch

from examples import assert_goes_on_after_a_kill, assert_reports, run_example
from tolerances import assert_matches

pytest.importorskip("statsmodels")

import forecast_series  # isort: skip


@pytest.fixture(scope="module", params=forecast_series.SERIES)
def task(request):
    return forecast_series.prepare(forecast_series.SERIES[request.param]())


def test_windows_and_targets_lie_behind_each_other(task):
    values = task.series.values
    for part in (task.train, task.validation, task.test):
        for row in (0, len(part.windows) - 1):
            start = part.first + row
            window, targets = (
                task.in_units(part, steps)[row] for steps in (part.windows, part.targets)
            )
            expected = values[start - task.window : start], values[start : start + task.horizon]
            for found, own in zip((window, targets), expected, strict=True):
                actual, truth = (torch.tensor(v, dtype=torch.float32) for v in (found, own))
                assert_matches(actual, truth, op="rounded once", dtype=torch.float32)


def test_no_part_is_followed_by_values_of_another(task):
    parts = (task.train, task.validation, task.test)
    ends = [part.first + len(part.windows) - 1 + task.horizon for part in parts]
    assert ends == [task.validation.first, task.test.first, len(task.series.values)]


def test_last_year_repeats_the_year_before(task):
    repeated, values = forecast_series.last_year(task), task.series.values
    start = task.test.first - task.series.year
    assert np.array_equal(repeated[0], values[start : start + task.horizon])
    assert repeated.shape == (len(task.test.windows), task.horizon)


def test_smoke_run_reports_draws_and_goes_on_after_a_kill(tmp_path):
    plot, checkpoint = tmp_path / "losses.png", tmp_path / "whole.pt"
    arguments = "--smoke", "--series", "elnino"
    result = run_example(
        "forecast_series.py", *arguments, "--plot", plot, "--checkpoint", checkpoint
    )
    contenders = ["stock", "stock, fused", "fastopt optimizer", "fastopt LSTM", "fastopt"]
    assert_reports(result, contenders)
    for expected in ("MSE, °C²", "MAE, °C", *forecast_series.BASELINES):
        assert expected in result.stdout
    for picture in (plot, tmp_path / "losses_forecasts.png"):
        assert picture.read_bytes().startswith(b"\x89PNG")
    assert_goes_on_after_a_kill("forecast_series.py", checkpoint, *arguments)

    arguments = "--smoke", "--series", "co2", "--checkpoint", checkpoint, "--resume"
    refused = run_example("forecast_series.py", *arguments)
    assert refused.returncode == 2 and "another setting of series" in refused.stderr
