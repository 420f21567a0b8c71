"""Co-train in Lightning: `python examples/lightning_module.py`."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import matta


class CoTrainingModule(lightning.LightningModule):
    """A LightningModule around a CoTraining."""

    def __init__(self, cotrain: matta.CoTraining, lr: float) -> None:
        super().__init__()
        self.cotrain, self.lr = cotrain, lr

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        out = self.cotrain(batch)
        self.log_dict({"student_loss": out.student_loss, "ta_loss": out.ta_loss, "distill_loss": out.distill_loss})
        return out.loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        out = self.cotrain(batch)
        self.log_dict({"val_student_loss": out.student_loss, "val_ta_loss": out.ta_loss})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.cotrain.nested.parameters(), lr=self.lr)


def tower(width: int) -> nn.Sequential:
    """The model to serve; the Teaching Assistant is the same, built wider."""
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


def main() -> None:
    """Train on made classes, then take out the Student."""
    lightning.seed_everything(0, verbose=False)
    x = torch.randn(4096, 16)
    y = tower(32)(x).argmax(-1)
    train, val = (TensorDataset(x[part], y[part]) for part in (slice(0, 3584), slice(3584, None)))
    nested = matta.nest(tower(8), tower(32))
    cotrain = matta.CoTraining(nested, matta.objectives.Classification(), ramp=matta.Ramp(start=10, steps=30))
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loaders = DataLoader(train, batch_size=64, shuffle=True), DataLoader(val, batch_size=512)
    trainer.fit(CoTrainingModule(cotrain, lr=0.01), *loaders)
    losses = {name: f"{value:.3f}" for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    print("after training:", losses)
    print(matta.extract(nested))


if __name__ == "__main__":
    main()
