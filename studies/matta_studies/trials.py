"""How a model of a study is trained: what is tuned, the losses, and the one loop of all studies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

import torch
from torch import Tensor, nn

from matta.nesting.batches import Batch, call, logits_of, split_labels
from matta.nesting.nested import Nested
from matta.objectives import Objective
from matta.sizes.extraction import extract
from matta.sizes.submodels import SubModel
from matta.training.cotraining import CoTraining
from matta.training.loss_schedule import Ramp, Weights

Method = Literal["baseline", "matta", "unshared", "separate"]
SHARES: Final = {"matta": "all", "unshared": "embeddings", "separate": "none"}  # what each way of training nests
BASELINE, STUDENT, TA = "baseline", "Student", "TA"
EVALUATION_BATCH: Final = 10_000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What every study tunes: the optimizer and its rate; for MatTA ω₁ and ω₃.

    ω₂ is 1: only ratios matter to these optimizers.
    """

    method: Method
    optimizer: str
    lr: float
    student_weight: float = 1.0
    distill_weight: float = 1.0

    @property
    def models(self) -> tuple[str, ...]:
        """What it trains."""
        return (STUDENT,) if self.method == "baseline" else (STUDENT, TA)

    def __str__(self) -> str:
        told = f"{self.optimizer}, rate {self.lr:g}{self.told_rates()}"
        if self.method == "baseline":
            return told
        return f"{told}, ω₁ {self.student_weight:g}, ω₃ {self.distill_weight:g}{self.told_ramp()}"

    def told_rates(self) -> str:
        """What else there is to say of the rates."""
        return ""

    def told_ramp(self) -> str:
        """How the distillation comes in, if that is tuned."""
        return ""


Step = Callable[[Batch], tuple[Tensor, Callable[[], list[Tensor]]]]
"""Maps a batch to the loss, and to what reads the logits of both models while the weights are those of the loss."""


def step_of(
    model: nn.Module,
    objective: Objective,
    trial: Trial,
    ramp_steps: int,
    sample: Callable[[Random], SubModel] | None = None,
) -> Step:
    """What is minimised: a baseline's cross-entropy, or the three losses of a pair (`Nested`)."""
    if not isinstance(model, Nested):

        def alone(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
            inputs, labels = split_labels(batch)
            logits = logits_of(call(model, inputs))
            return objective.cross_entropy(logits, labels), lambda: [logits.detach()]

        return alone
    weights = Weights(student=trial.student_weight, ta=1.0, distill=trial.distill_weight)
    ramp = Ramp(start=0, steps=ramp_steps)
    return step_of_pair(CoTraining(model, objective, weights=weights, ramp=ramp, sample=sample))


def step_of_pair(cotrain: CoTraining) -> Step:
    """The losses that a co-training minimises."""

    def together(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        out = cotrain(batch)
        return out.loss, lambda: [out.student_logits, out.ta_logits]

    return together


def descend(
    step: Step,
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    batches: Iterable[Batch],
    num_learned: int | None = None,
) -> Iterator[Callable[[], list[Tensor]]]:
    """One update for each batch; what reads its logits is given before the update.

    Args:
        step: The losses.
        optimizer: Has the highest rates.
        rate: The factor of the rates, by step.
        batches: The data.
        num_learned: After so many batches nothing is learned any more; None: all are learned from.
    """
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for index, batch in enumerate(batches):
        loss, logits = step(batch)
        yield logits
        if num_learned is not None and index >= num_learned:
            continue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def models_of(model: nn.Module) -> dict[str, nn.Module]:
    """The trained models by name: a baseline, or the extracted Student and its TA."""
    return {STUDENT: extract(model), TA: model.ta} if isinstance(model, Nested) else {STUDENT: model}


def count_parameters(module: nn.Module) -> int:
    """Numbers that a module is made of, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


@torch.no_grad()
def auc_loss(logits: Tensor, label: Tensor) -> float:
    """1 - AUROC.

    Example:
        >>> auc_loss(torch.tensor([0.1, 0.4, 0.2]), torch.tensor([0.0, 1.0, 1.0]))
        0.0
    """
    from torchmetrics.functional.classification import binary_auroc

    return 1.0 - float(binary_auroc(logits.double().sigmoid(), label.long()))


@torch.no_grad()
def logits_over(module: nn.Module, ids: Tensor) -> Tensor:
    """Logits of many rows, some at a time."""
    return torch.cat([module(rows) for rows in ids.split(EVALUATION_BATCH)])
