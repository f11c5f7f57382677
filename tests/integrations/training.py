"""A small model with data and a loss, which each framework trains its way."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

FEATURES, STEPS, CLASSES = 6, 5, 3


class Classifier(torch.nn.Module):
    """An LSTM, a transformer layer and a linear layer, of torch or of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(FEATURES, 8, batch_first=True)
        self.layer = torch.nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = torch.nn.Linear(8, CLASSES)

    def forward(self, inputs: Tensor) -> Tensor:
        states: Tensor = self.layer(self.lstm(inputs)[0])
        logits: Tensor = self.head(states.mean(1))
        return logits


def classifier() -> Classifier:
    """The same parameters each time."""
    torch.manual_seed(11)
    return Classifier()


def data(rows: int = 48) -> tuple[Tensor, Tensor]:
    """Inputs and classes that can be learned."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(rows, STEPS, FEATURES, generator=generator)
    return inputs, inputs[:, :, :CLASSES].sum(1).argmax(1)


def loader(batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """Batches in one order."""
    return DataLoader(TensorDataset(*data()), batch_size)


def loss_of(model: torch.nn.Module, inputs: Tensor, classes: Tensor) -> Tensor:
    """The cross-entropy."""
    return torch.nn.functional.cross_entropy(model(inputs), classes)
