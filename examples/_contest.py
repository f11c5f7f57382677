"""Trains several contenders on the same batches and times each of their steps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import torch
from _tail import StockTail, Tail
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

Item = TypeVar("Item")
SummedLoss = Callable[[Tensor, Tensor], Tensor]  # of what a model gives, and of its targets

TURN = 25  # batches a contender trains on before the next one takes over the machine


class CheckpointError(Exception):
    """The checkpoint does not fit this run."""


class Batch(NamedTuple):
    inputs: Any  # what the model takes
    targets: Tensor  # the classes of its rows of logits, or what its numbers should be


@dataclass(frozen=True)
class Contender:
    """What one contender changes: optimizer, its flags, what surrounds it, a part of the model."""

    name: str
    optimizer: Callable[..., Optimizer]
    flags: dict[str, Any] = field(default_factory=dict)
    tail: Callable[..., Tail] = StockTail
    part: Any = nn.LSTM  # the model's recurrent layer, or the parts of a transformer


@dataclass(frozen=True)
class Recipe:
    """How every contender trains."""

    epochs: int
    lr: float
    weight_decay: float
    patience: int  # epochs without a better validation loss before training stops
    warmup: float = 0.1  # share of all steps
    max_grad_norm: float = 1.0
    ema_decay: float | None = None  # None: parameters themselves are evaluated, not averages
    seed: int = 0


@dataclass
class Record:
    """What happened while a contender trained; one entry per step or per epoch."""

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tail_seconds: list[float] = field(default_factory=list)  # clip, step, average, zero_grad
    epoch_ends: list[int] = field(default_factory=list)  # in steps
    validation_losses: list[float] = field(default_factory=list)

    @property
    def epoch_seconds(self) -> list[float]:
        return [sum(self.step_seconds[a:b]) for a, b in pairwise([0, *self.epoch_ends])]


class OneProcess:
    """Whoever trains alone: its loss is the whole batch's."""

    rank, count = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reports and writes the checkpoint."""
        return self.rank == 0

    def loss_of(self, model: Any) -> Callable[..., Tensor]:
        """What turns a batch into the loss to go backward from."""
        loss: Callable[..., Tensor] = model.loss
        return loss

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        return values


class Trainee:
    """A contender with its model, its optimizer and its record."""

    def __init__(
        self,
        contender: Contender,
        model: nn.Module,
        recipe: Recipe,
        steps: int,
        processes: OneProcess,
    ) -> None:
        self.name = contender.name
        self.model = model
        self.recipe = recipe
        self.processes = processes
        self.loss = processes.loss_of(model)
        groups = parameter_groups(model, recipe.weight_decay)
        optimizer = partial(contender.optimizer, groups, lr=recipe.lr, **contender.flags)
        self.tail = contender.tail(model, optimizer, recipe.max_grad_norm, recipe.ema_decay)
        self.schedule = LambdaLR(self.tail.optimizer, warmup_then_cosine(recipe.warmup, steps))
        self.record = Record()
        self.best: dict[str, Any] = {}

    @property
    def stopped(self) -> bool:
        losses = self.record.validation_losses
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.recipe.patience

    def train_on(self, batch: Batch) -> None:
        # Dropout draws the same masks for every contender.
        torch.manual_seed(self.recipe.seed + len(self.record.losses))
        start = perf_counter()
        loss = self.loss(*batch)
        loss.backward()  # type: ignore[no-untyped-call]
        loss.item()  # waits for it where a device computes
        tail_start = perf_counter()
        self.tail.step()
        end = perf_counter()
        self.schedule.step()
        self.record.losses.append(self.processes.mean(loss.detach()).item())
        self.record.step_seconds.append(end - start)
        self.record.tail_seconds.append(end - tail_start)

    def end_epoch(self, validation: Sequence[Batch], summed_loss: SummedLoss) -> None:
        with self.tail.evaluated() as model:
            total, count = self.processes.mean(evaluate(model, validation, summed_loss)).tolist()
            loss = total / count
            if loss < min(self.record.validation_losses, default=math.inf):
                self.best = copy.deepcopy(model.state_dict())
        self.record.epoch_ends.append(len(self.record.losses))
        self.record.validation_losses.append(loss)

    def restore_best(self) -> None:
        if self.best:
            self.model.load_state_dict(self.best)

    @torch.no_grad()
    def predict(self, batches: Sequence[Batch]) -> Tensor:
        """Returns what the best model gives, logits [examples, classes] say, batch after batch."""
        self.restore_best()
        self.model.eval()
        predicted = torch.cat([self.model(batch.inputs) for batch in batches])
        self.model.train()
        return predicted

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "tail": self.tail.state_dict(),
            "schedule": self.schedule.state_dict(),
            "record": asdict(self.record),
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.tail.load_state_dict(state["tail"])
        self.schedule.load_state_dict(state["schedule"])
        self.record = Record(**state["record"])
        self.best = state["best"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Exempts biases and embeddings.

    Adam divides the decay of a rare token's row by the small gradients that the row has,
    so that the decay would outweigh what the row learns.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    embedded = {id(p) for module in embeddings for p in module.parameters()}
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_exempt = parameter.ndim < 2 or id(parameter) in embedded
        (exempt if is_exempt else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]


def warmup_then_cosine(warmup: float, steps: int) -> Callable[[int], float]:
    warmup_steps = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


def squared_errors(predicted: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.mse_loss(predicted, targets, reduction="sum")


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], summed_loss: SummedLoss) -> Tensor:
    """Returns the sum of the losses of all targets, and how many targets there are."""
    model.eval()
    total = sum(summed_loss(model(batch.inputs), batch.targets).item() for batch in batches)
    model.train()
    count = sum(batch.targets.numel() for batch in batches)
    return torch.tensor([total, count], dtype=torch.float64)


@dataclass(frozen=True)
class Contest:
    """What the contenders compete in.

    Attributes:
        recipe: How each of them trains.
        make_model: A contender's model, after torch's seed has been set.
        batches_of: The batches of an epoch.
        steps_per_epoch: How many they are, in every epoch.
        validation: What is evaluated after an epoch.
        origin: All that a checkpoint must have been made with.
        unit: What a target is, in the plural.
        summed_loss: What validation measures of a model's answers and their targets.
        processes: Those that train together.
    """

    recipe: Recipe
    make_model: Callable[[Contender], nn.Module]
    batches_of: Callable[[int], list[Batch]]
    steps_per_epoch: int
    validation: Sequence[Batch]
    origin: dict[str, Any]
    unit: str = "examples"
    summed_loss: SummedLoss = cross_entropies
    processes: OneProcess = field(default_factory=OneProcess)

    def run(
        self, contenders: Sequence[Contender], checkpoint: Path | None, resume: bool
    ) -> dict[str, Trainee]:
        """Trains all of them, and writes the checkpoint after each epoch."""
        steps = self.recipe.epochs * self.steps_per_epoch
        trainees = []
        for contender in contenders:
            torch.manual_seed(self.recipe.seed)
            model = self.make_model(contender)
            trainees.append(Trainee(contender, model, self.recipe, steps, self.processes))
        origin = self.origin | {"contenders": [contender.name for contender in contenders]}
        if checkpoint and resume:
            load_checkpoint(checkpoint, trainees, origin)
        done = max(len(trainee.record.epoch_ends) for trainee in trainees)
        with progress_bar(self.unit, self.processes.is_first) as progress:
            task = progress.add_task("", total=None, loss=math.nan, speed=0.0)
            for epoch in range(done, self.recipe.epochs):
                running = [trainee for trainee in trainees if not trainee.stopped]
                if not running:
                    break
                progress.update(task, description=f"epoch {epoch + 1}/{self.recipe.epochs}")
                self._run_epoch(running, self.batches_of(epoch), progress, task)
                if checkpoint and self.processes.is_first:
                    save_checkpoint(checkpoint, trainees, origin)
        return {trainee.name: trainee for trainee in trainees}

    def _run_epoch(
        self, running: list[Trainee], batches: list[Batch], progress: Progress, task: TaskID
    ) -> None:
        """In turns, so that a slow minute of the machine slows all of them."""
        progress.reset(task, total=len(batches) * len(running))
        for turn, chunk in enumerate(chunks(batches, TURN)):
            first = turn % len(running)  # nobody always follows the same neighbour
            for trainee in running[first:] + running[:first]:
                take_turn(trainee, chunk, progress, task)
        for trainee in running:
            trainee.end_epoch(self.validation, self.summed_loss)


def take_turn(trainee: Trainee, chunk: list[Batch], progress: Progress, task: TaskID) -> None:
    for batch in chunk:
        trainee.train_on(batch)
    record = trainee.record
    progress.update(
        task,
        advance=len(chunk),
        loss=fmean(record.losses[-len(chunk) :]),
        speed=trainee.processes.count
        * sum(batch.targets.numel() for batch in chunk)
        / sum(record.step_seconds[-len(chunk) :]),
    )


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk


def progress_bar(unit: str, shown: bool) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[speed]:,.0f} " + unit + "/s"),
        TimeRemainingColumn(),
        disable=not shown,
    )


def save_checkpoint(path: Path, trainees: Sequence[Trainee], origin: dict[str, Any]) -> None:
    """Writes beside the target first: an interrupted save leaves the last checkpoint whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    states = {trainee.name: trainee.state_dict() for trainee in trainees}
    partial = path.with_name(path.name + ".partial")
    torch.save({"origin": origin, "contenders": states}, partial)
    partial.replace(path)


def read_checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint was made with, and the state of each contender.

    Raises:
        CheckpointError: The file is missing or something else.
    """
    try:
        saved = torch.load(path, weights_only=True)
        return dict(saved["origin"]), dict(saved["contenders"])
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except Exception as error:  # damaged bytes raise whatever their reader runs into
        raise CheckpointError(f"{path} is not a checkpoint of this program") from error


def load_checkpoint(path: Path, trainees: Sequence[Trainee], origin: dict[str, Any]) -> None:
    """Resumes where the checkpoint was written.

    Raises:
        CheckpointError: The file is something else, or comes from other data or settings.
    """
    saved_origin, states = read_checkpoint(path)
    if saved_origin != origin:
        changed = sorted(key for key in origin if saved_origin.get(key) != origin[key])
        raise CheckpointError(f"{path} was made with another setting of {', '.join(changed)}")
    for trainee in trainees:
        trainee.load_state_dict(states[trainee.name])
