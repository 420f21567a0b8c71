"""Co-train in Lightning: `python examples/lightning_module.py`."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import matta


class CoTrainingModule(lightning.LightningModule):
    """A LightningModule around a CoTraining; a step is the mean over its labels in all batches and processes.

    Lightning gives one batch at a time, so that the labels of a step are known at its end: gradients are of sums
    until then.
    """

    def __init__(self, cotrain: matta.CoTraining, lr: float) -> None:
        super().__init__()
        self.cotrain, self.lr = cotrain, lr
        self.num_labels: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        out = self.cotrain(batch)
        losses = {"student_loss": out.student_loss, "ta_loss": out.ta_loss, "distill_loss": out.distill_loss}
        self.log_dict(losses, batch_size=int(out.num_labels), sync_dist=True)
        self.num_labels.append(out.num_labels)
        return out.loss * out.num_labels

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Make means of the sums: Lightning has divided by the number of batches, DDP by that of processes."""
        total = self.trainer.strategy.reduce(torch.stack(self.num_labels).sum(), reduce_op="sum").clamp(min=1)
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / total
        self.num_labels.clear()
        for parameter in self.cotrain.parameters():
            if parameter.grad is not None:
                parameter.grad *= scale

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        out = self.cotrain(batch)
        losses = {"val_student_loss": out.student_loss, "val_ta_loss": out.ta_loss}
        self.log_dict(losses, batch_size=int(out.num_labels), sync_dist=True)

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
