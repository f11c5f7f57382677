"""Lightning: convert the model, and give the optimizer in configure_optimizers."""

from typing import Any

import lightning
import torch

import fastopt


class Recall(lightning.LightningModule):
    """Says what it saw one step ago."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = torch.nn.LSTM(8, 16, batch_first=True)
        fastopt.convert(self)

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        (inputs,) = batch
        loss = (self.lstm(inputs)[0][..., :8] - inputs.roll(1, 1)).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return fastopt.optim.AdamW(self.parameters(), lr=1e-2, max_grad_norm=1.0)


lightning.seed_everything(0, verbose=False)
rows = torch.utils.data.TensorDataset(torch.randn(64, 12, 8))
trainer = lightning.Trainer(
    accelerator="cpu", max_epochs=5, logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Recall(), torch.utils.data.DataLoader(rows, batch_size=16))
print(f"loss {trainer.callback_metrics['loss'].item():.4f}")
