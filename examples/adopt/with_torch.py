"""A running training loop of plain torch, handed over and taken back, a line each."""

import torch

import fastopt

torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
model = torch.nn.Sequential(layer, torch.nn.Flatten(), torch.nn.Linear(32 * 10, 2))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
inputs = torch.randn(64, 10, 32)
classes = (inputs.sum((1, 2)) > 0).long()


def train(steps: int) -> None:
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(model(inputs), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    print(f"{type(model[0]).__module__}, {type(optimizer).__module__}: loss {loss.item():.4f}")


train(10)
print(fastopt.convert(model))
fastopt.optim.from_torch(optimizer, max_grad_norm=1.0)
train(10)
fastopt.revert(model)
fastopt.optim.to_torch(optimizer)
train(10)
