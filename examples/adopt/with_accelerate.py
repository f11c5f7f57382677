"""Accelerate: convert the model, import the optimizer, and prepare both as ever."""

import torch
from accelerate import Accelerator

import fastopt

torch.manual_seed(0)
model = torch.nn.LSTM(8, 16, batch_first=True)
fastopt.convert(model)
optimizer = fastopt.optim.AdamW(model.parameters(), lr=1e-2)
rows = torch.randn(64, 12, 8)
loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=16)

accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
for epoch in range(5):
    for (inputs,) in loader:
        loss = (model(inputs)[0][..., :8] - inputs.roll(1, 1)).square().mean()  # recall the past
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    print(f"epoch {epoch}: loss {loss.item():.4f}")
