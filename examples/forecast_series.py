"""Forecasts half a year of a series from the two years before, by an LSTM trained five ways.

    python examples/forecast_series.py                    # carbon dioxide on Mauna Loa, weekly
    python examples/forecast_series.py --series elnino    # temperature of the Pacific, monthly
    python examples/forecast_series.py --full             # a larger LSTM for longer

The series are those that statsmodels' wheel carries; nothing is downloaded. The last tenth of the
years is held out to test, the tenth before to validate. Beside the LSTMs stand last year's values,
exponential smoothing by statsmodels and ridge regression on the same windows by scikit-learn.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _command import compete, make_parser, parse, run_command, settings_of
from _contenders import CONTENDERS
from _contest import Batch, Contender, Contest, Recipe, Record, Trainee, squared_errors
from _report import figures_table
from matplotlib.figure import Figure
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import RidgeCV
from sklearn.metrics import mean_absolute_error, mean_squared_error
from statsmodels.datasets import co2, elnino
from statsmodels.tsa.exponential_smoothing.ets import ETSModel
from torch import Tensor, nn

Numbers = NDArray[np.float64]

WINDOW, HORIZON = 2.0, 0.5  # years
HELD_OUT = 0.1  # of the years, to validate, and as much to test
EVALUATION_BATCH = 256


class Series(NamedTuple):
    """A measurement at equal distances."""

    name: str
    unit: str
    times: Numbers  # years
    values: Numbers
    year: int  # values in a year
    smoothed: int  # years that exponential smoothing sees: 52 weeks drift away from the seasons


def read_co2() -> Series:
    """Weeks without a measurement lie on the line between their neighbours."""
    column = co2.load_pandas().data["co2"].interpolate()
    times = column.index.year + column.index.day_of_year / 366
    return Series("carbon dioxide", "ppm", times.to_numpy(), column.to_numpy(), 52, 5)


def read_elnino() -> Series:
    table = elnino.load_pandas().data
    values = table.drop(columns="YEAR").to_numpy().ravel()
    times = table["YEAR"].iloc[0] + np.arange(len(values)) / 12
    return Series("sea surface", "°C", times, values, 12, 20)


SERIES: dict[str, Callable[[], Series]] = {"co2": read_co2, "elnino": read_elnino}


@dataclass(frozen=True)
class Settings:
    """One size of the run."""

    recipe: Recipe
    batch_size: int = 32
    hidden_size: int = 64


DEFAULT = Settings(Recipe(epochs=20, lr=2e-3, weight_decay=1e-5, patience=20, ema_decay=0.99))
FULL = replace(DEFAULT, recipe=replace(DEFAULT.recipe, epochs=60), hidden_size=128)
SMOKE = replace(DEFAULT, recipe=replace(DEFAULT.recipe, epochs=2), batch_size=64, hidden_size=16)


class Part(NamedTuple):
    """Windows and what follows them, both as steps from the window's last value, scaled."""

    first: int  # value of the series that the first window is followed by
    last: Numbers  # [windows, 1]
    windows: Tensor  # [windows, window]
    targets: Tensor  # [windows, horizon]

    def batches(self, order: Tensor, size: int) -> list[Batch]:
        return [Batch(self.windows[rows], self.targets[rows]) for rows in order.split(size)]


class Task(NamedTuple):
    """Everything the contenders share."""

    series: Series
    window: int
    horizon: int
    scale: float
    train: Part
    validation: Part
    test: Part

    def in_units(self, part: Part, steps: Tensor | Numbers) -> Numbers:
        return part.last + self.scale * np.asarray(steps, np.float64)


def prepare(series: Series) -> Task:
    """Cuts the series in time: no window is followed by values of another part."""
    window, horizon = round(WINDOW * series.year), round(HORIZON * series.year)
    count = round(HELD_OUT * len(series.values))
    end = len(series.values) - 2 * count
    known = series.values[:end]
    scale = float(np.std(known[horizon:] - known[:-horizon]))

    def part(first: int, end: int) -> Part:
        rows = sliding_window_view(series.values[first - window : end], window + horizon)
        last = rows[:, window - 1 : window]
        steps = torch.tensor((rows - last) / scale, dtype=torch.float32)
        return Part(first, last, *steps.split((window, horizon), dim=1))

    bounds = (window, end, end + count, end + 2 * count)
    parts = map(part, bounds[:-1], bounds[1:])
    return Task(series, window, horizon, scale, *parts)


class Forecaster(nn.Module):
    """An LSTM corrects a linear forecast (Lai et al. 2018), both of the whole window."""

    def __init__(self, settings: Settings, task: Task, lstm: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.lstm = lstm(1, settings.hidden_size, batch_first=True)
        self.correction = nn.Linear(settings.hidden_size, task.horizon)
        self.linear = nn.Linear(task.window, task.horizon)

    def forward(self, windows: Tensor) -> Tensor:
        """Maps windows [batch, window] to forecasts [batch, horizon]."""
        states, _ = self.lstm(windows[:, :, None])
        forecasts: Tensor = self.linear(windows) + self.correction(states[:, -1])
        return forecasts

    def loss(self, windows: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(self(windows), targets)


def contest_of(task: Task, settings: Settings) -> Contest:
    def make_model(contender: Contender) -> Forecaster:
        return Forecaster(settings, task, contender.part)

    def batches_of(epoch: int) -> list[Batch]:
        random = np.random.default_rng((settings.recipe.seed, epoch))
        order = torch.from_numpy(random.permutation(len(task.train.windows)))
        return task.train.batches(order, settings.batch_size)

    return Contest(
        settings.recipe,
        make_model,
        batches_of,
        steps_per_epoch=math.ceil(len(task.train.windows) / settings.batch_size),
        validation=ordered(task.validation),
        origin=asdict(settings) | {"series": task.series.name},
        unit="values",
        summed_loss=squared_errors,
    )


def ordered(part: Part) -> list[Batch]:
    return part.batches(torch.arange(len(part.windows)), EVALUATION_BATCH)


def forecasts_of(trainee: Trainee, task: Task) -> Numbers:
    """What the best model of a contender says of the test part, [windows, horizon]."""
    return task.in_units(task.test, trainee.predict(ordered(task.test)))


def last_year(task: Task) -> Numbers:
    values, year = task.series.values, task.series.year
    starts = task.test.first - year + np.arange(len(task.test.windows))
    return values[starts[:, None] + np.arange(task.horizon)]


def exponential_smoothing(task: Task) -> Numbers:
    """With trend and season; its parameters are fitted to what the LSTM was trained on."""
    series = task.series

    def model(end: int) -> ETSModel:
        return ETSModel(
            series.values[end - series.smoothed * series.year : end],
            trend="add",
            seasonal="add",
            seasonal_periods=series.year,
            initialization_method="heuristic",
        )

    fitted = model(task.validation.first).fit(disp=False).params
    ends = task.test.first + np.arange(len(task.test.windows))
    return np.stack([model(end).smooth(fitted).forecast(task.horizon) for end in ends])


def ridge(task: Task) -> Numbers:
    regression = RidgeCV(np.logspace(-3, 3, 13)).fit(task.train.windows, task.train.targets)
    return task.in_units(task.test, regression.predict(task.test.windows))


BASELINES = {
    "last year's values": last_year,
    "exponential smoothing, statsmodels": exponential_smoothing,
    "ridge regression, scikit-learn": ridge,
}


def data_table(task: Task) -> Table:
    title = f"Data: {task.series.name}, {task.series.unit}"
    table = Table("part", "forecasts from", "to", "windows", title=title, title_justify="left")
    for name in ("train", "validation", "test"):
        part = getattr(task, name)
        count = len(part.windows)
        years = task.series.times[[part.first, part.first + count - 1]]
        table.add_row(name, *(f"{year:.1f}" for year in years), f"{count:,}")
    table.columns[3].justify = "right"
    return table


def quality_table(forecasts: Mapping[str, Numbers], truth: Numbers, unit: str) -> Table:
    heads = "model", f"MSE, {unit}²", f"MAE, {unit}"
    table = figures_table("Years that were held out", *heads)
    for name, forecast in forecasts.items():
        squared, absolute = (m(truth, forecast) for m in (mean_squared_error, mean_absolute_error))
        table.add_row(name, f"{squared:.4f}", f"{absolute:.4f}")
    return table


def draw_forecasts(
    task: Task, forecasts: Mapping[str, Numbers], truth: Numbers, path: Path
) -> None:
    """Draws the held-out years with one forecast after the other, and errors by their distance."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    over_time, by_lead = figure.subplots(1, 2, width_ratios=(2, 1))
    first, series = task.test.first, task.series
    shown = slice(first - series.year, None)
    over_time.plot(series.times[shown], series.values[shown], color="black", label="measured")
    label = "forecast"
    for start in range(0, len(truth), task.horizon):
        times = series.times[first + start : first + start + task.horizon]
        over_time.plot(times, forecasts["fastopt"][start], color="C3", label=label)
        over_time.axvline(times[0], color="grey", linewidth=0.5, linestyle=":")
        label = "_"  # one entry in the legend is enough
    over_time.set(xlabel="year", ylabel=series.unit, title=f"{series.name}: fastopt's LSTM")
    leads = np.arange(1, task.horizon + 1) * 12 / series.year
    for name in ("fastopt", *BASELINES):
        errors = np.abs(forecasts[name] - truth).mean(0)
        by_lead.plot(leads, errors, color="C3" if name == "fastopt" else None, label=name)
    by_lead.set(xlabel="months ahead", ylabel=series.unit, title="Mean absolute error", ylim=0)
    for axes in (over_time, by_lead):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser(__doc__, Path("build/forecast_series.png"))
    parser.add_argument("--series", choices=SERIES, default="co2")
    return parse(parser, arguments)


def run(options: argparse.Namespace, console: Console) -> dict[str, Record]:
    settings = settings_of(options, DEFAULT, FULL, SMOKE)
    task = prepare(SERIES[options.series]())
    console.print(data_table(task))

    trainees, records = compete(contest_of(task, settings), CONTENDERS, options, console)

    forecasts = {name: forecasts_of(trainee, task) for name, trainee in trainees.items()}
    forecasts |= {name: baseline(task) for name, baseline in BASELINES.items()}
    truth = task.in_units(task.test, task.test.targets)
    console.print(quality_table(forecasts, truth, task.series.unit))
    picture = options.plot.with_stem(f"{options.plot.stem}_forecasts")
    draw_forecasts(task, forecasts, truth, picture)
    console.print(f"forecasts: {picture}", soft_wrap=True)

    return records


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(run, parse_arguments(arguments), loss="mean squared error, scaled")


if __name__ == "__main__":
    sys.exit(main())
