"""Lightning: configure_optimizers gives ours, and its loop, clipping and checkpoints go on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
from fastopt import optim
from tolerances import assert_matches
from training import classifier, loader, loss_of

lightning = pytest.importorskip("lightning")

F32 = torch.float32
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):
    """As people write it."""

    def __init__(self, of: Any, converted: bool = False, manual: bool = False, **options: Any):
        super().__init__()
        self.model = classifier()
        self.of, self.options = of, options
        self.automatic_optimization = not manual
        self.losses: list[Tensor] = []
        if converted:
            fastopt.convert(self)

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = loss_of(self.model, *batch)
        self.losses.append(loss.detach())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = self.of.AdamW(self.parameters(), lr=0.02, **self.options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def trainer(folder: Path, epochs: int = 2, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip


def fit(module: Module, folder: Path, **options: Any) -> Module:
    trainer(folder, enable_checkpointing=False, **options).fit(module, loader())
    return module


LOOPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped by norm": {"gradient_clip_val": 0.3},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("loop", LOOPS)
def test_trains_to_the_same_losses(loop: str, tmp_path: Path) -> None:
    ours = fit(Module(optim, converted=True), tmp_path, **LOOPS[loop])
    stock = fit(Module(torch.optim), tmp_path, **LOOPS[loop])
    assert type(ours.model.lstm) is fastopt.nn.LSTM
    assert isinstance(ours.optimizers().optimizer, optim.AdamW)
    assert ours.optimizers().optimizer._plan is not None
    for actual, expected in zip(ours.losses, stock.losses, strict=True):
        assert_matches(actual, expected, op="mixed", dtype=F32)


def test_clipping_inside_the_step(tmp_path: Path) -> None:
    inside = fit(Module(optim, max_grad_norm=0.3), tmp_path)
    outside = fit(Module(optim), tmp_path, gradient_clip_val=0.3)
    for actual, expected in zip(inside.losses, outside.losses, strict=True):
        assert_matches(actual, expected, op="optimizer", dtype=F32)


def test_manual_optimization(tmp_path: Path) -> None:
    manual = fit(Module(optim, manual=True), tmp_path)
    stock = fit(Module(torch.optim, manual=True), tmp_path)
    for actual, expected in zip(manual.losses, stock.losses, strict=True):
        assert_matches(actual, expected, op="mixed", dtype=F32)


def test_bf16_mixed(tmp_path: Path) -> None:
    losses = fit(Module(optim, converted=True), tmp_path, epochs=3, precision="bf16-mixed").losses
    assert sum(losses[-6:]) < sum(losses[:6])


@pytest.mark.parametrize("other", [optim, torch.optim])
def test_a_checkpoint_resumes(tmp_path: Path, other: Any) -> None:
    whole = fit(Module(optim), tmp_path, epochs=3)
    first = trainer(tmp_path, epochs=1)
    first.fit(Module(optim), loader())
    path = os.path.join(tmp_path, "half.ckpt")
    first.save_checkpoint(path)
    rest = Module(other)
    trainer(tmp_path, epochs=3).fit(rest, loader(), ckpt_path=path, weights_only=False)
    for actual, expected in zip(rest.losses, whole.losses[6:], strict=True):
        if other is optim:
            assert torch.equal(actual, expected)
        assert_matches(actual, expected, op="mixed", dtype=F32)
