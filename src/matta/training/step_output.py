"""What a training step gives: the losses, and the logits of each model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from matta.errors import MattaError
from matta.objectives.heads import LaterLogits, deferred, undeferred
from matta.objectives.losses import LossWeights


@final
@dataclass(frozen=True, kw_only=True)
class CoTrainingOutput:
    """The losses of a batch, in nats, and the logits. Only `loss` carries a graph.

    Each loss is the mean over the `num_labels` labels of the batch that count: a number, or the sum of their weights,
    or one of these for each of several heads, whose logits are mappings by their names. `loss` is the batch's share of
    the mean over a whole step, if `CoTraining` was told the labels of that step. With several Students, `student_loss`,
    `distill_loss` and `student_logits` are the first one's. For an objective of several heads `head_losses`, of shape
    (3, heads), has what each adds to `student_loss`, `ta_loss` and `distill_loss`. Where the losses were fused with the
    heads, no logits were kept: reading them computes them, each time, and is refused once the optimizer has moved the
    head.

    With `CoTraining(turns=...)` a step may leave out the TA or the Students: `trains_ta` or `trains_students` is then
    False, the losses of those models are NaN, and reading their logits is refused.
    """

    loss: Tensor
    ta_loss: Tensor
    distill_weight: Tensor
    student_losses: tuple[Tensor, ...]
    distill_losses: tuple[Tensor, ...]
    logits: tuple[Any, ...]
    num_labels: Tensor
    weights: LossWeights
    num_students: int
    head_losses: Tensor | None = None
    trains_ta: bool = True
    trains_students: bool = True

    @property
    def total_weight(self) -> Tensor:
        """What the weights of the losses in `loss` add up to: those of `num_students` models, sampled ones too."""
        if not self.trains_ta:
            return torch.full_like(self.distill_weight, self.num_students * self.weights.student)
        return self.num_students * (self.weights.student + self.distill_weight) + self.weights.ta

    @property
    def student_loss(self) -> Tensor:
        """L_S (Eq. 1)."""
        return self.student_losses[0]

    @property
    def distill_loss(self) -> Tensor:
        """L_D (Eq. 3), not weighted."""
        return self.distill_losses[0]

    @property
    def student_logits(self) -> Tensor:
        """The Student's logits."""
        return _read(self.logits[1])

    @property
    def all_student_logits(self) -> tuple[Tensor, ...]:
        """The logits of each Student."""
        return tuple(_read(each) for each in self.logits[1:])

    @property
    def ta_logits(self) -> Tensor:
        """The TA's logits."""
        return _read(self.logits[0])


def kept_logits(logits: Any) -> Any:
    """The logits of a model for `CoTrainingOutput`: without their graph, and put off as they were."""
    if logits is None:
        return None
    if not isinstance(logits, Tensor):
        return tree_map_only(Tensor, kept_logits, logits)
    source = deferred(logits)
    return undeferred(logits).detach() if source is None else source.later()


def _read(logits: Any) -> Any:
    if logits is None:
        raise MattaError(
            "this step has not run that model, as CoTraining(turns=...) asks for; expected trains_ta and "
            "trains_students to be looked at first, or CoTraining without turns (progressive validation needs that)"
        )
    return tree_map_only(LaterLogits, LaterLogits.read, logits)
