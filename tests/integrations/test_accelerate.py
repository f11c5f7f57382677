"""Accelerate: what it prepares are our optimizers and modules, and nothing has to be told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from fastopt import optim
from tolerances import assert_matches
from training import classifier, loader, loss_of

accelerate = pytest.importorskip("accelerate")

F32 = torch.float32


class Run:
    """Everything that Accelerate prepares, of ours or of torch."""

    def __init__(self, ours: bool, taken: bool = False, **options: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(True)
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        model = classifier()
        if ours:
            fastopt.convert(model)
        of = optim if ours and not taken else torch.optim
        optimizer = of.AdamW(model.parameters(), lr=0.02)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.5)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader(), scheduler
        )
        if taken:
            optim.from_torch(self.optimizer.optimizer)

    def epoch(self) -> list[Tensor]:
        losses = []
        for batch in self.loader:
            with self.accelerator.accumulate(self.model):
                loss = loss_of(self.model, *batch)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        return losses


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_trains_to_the_same_losses(accumulated: int, taken: bool) -> None:
    runs = [
        Run(True, taken, gradient_accumulation_steps=accumulated),
        Run(False, gradient_accumulation_steps=accumulated),
    ]
    assert type(runs[0].optimizer.optimizer) is optim.AdamW
    for _ in range(2):
        for actual, expected in zip(*(run.epoch() for run in runs), strict=True):
            assert_matches(actual, expected, op="mixed", dtype=F32)
    assert runs[0].optimizer.optimizer._plan is not None
    assert runs[0].scheduler.get_last_lr() == runs[1].scheduler.get_last_lr() != [0.02]


def test_mixed_precision() -> None:
    run = Run(True, mixed_precision="bf16")
    losses = [*run.epoch(), *run.epoch(), *run.epoch()]
    assert sum(losses[-6:]) < sum(losses[:6])


def test_state_is_saved_and_loaded(tmp_path: Path) -> None:
    run = Run(True)
    run.epoch()
    run.accelerator.save_state(str(tmp_path))
    expected = run.epoch()
    again = Run(True)
    again.accelerator.load_state(str(tmp_path))
    assert again.epoch() == expected
    stock = Run(False)
    stock.accelerator.load_state(str(tmp_path))
    for actual, other in zip(stock.epoch(), expected, strict=True):
        assert_matches(actual, other, op="mixed", dtype=F32)
