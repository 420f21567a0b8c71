"""What the models are trained for: how logits and labels of a batch become the three losses.

Objectives of classes take hard labels (classes) and soft ones (probabilities); those of several classes also take a
`TopK`. Ignored positions are left out: hard labels (those of a `TopK` too) equal to `ignore_index`, soft ones with
that value in all of the row. All labels may be `Weighted`.
Labels are checked on every batch on a CPU; on an accelerator, where a check would make the host
wait, on the first batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from matta.errors import LabelError
from matta.objectives.heads import undeferred
from matta.objectives.labels import Labels, Weighted, is_here, num_examples, whole
from matta.objectives.losses import LossWeights, at_least_float32


@final
@dataclass(frozen=True, kw_only=True)
class Losses:
    """The three losses of a batch, in nats: of each Student, of the TA, and the distillation of each.

    `heads`, for an objective of several, are those that the others are the sums of: each is a mean over its own labels.

    Example:
        >>> import matta
        >>> logits = torch.zeros(2)
        >>> losses = matta.objectives.Binary().losses([logits], logits, torch.tensor([0.0, 1.0]))
        >>> round(losses.ta.item(), 4), len(losses.students), len(losses.distill)
        (0.6931, 1, 1)
    """

    students: tuple[Tensor, ...]
    ta: Tensor
    distill: tuple[Tensor, ...]
    heads: tuple[Losses, ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Joint:
    """L of a batch, which carries the graph, and what it consists of.

    `parts`, for an objective of several heads, are the losses that L is the sum of: each is a mean over its own labels.

    Example:
        >>> from matta.objectives import Losses
        >>> losses = Losses(students=(torch.ones(()),), ta=torch.ones(()), distill=(torch.ones(()),))
        >>> Joint(loss=losses.ta + losses.students[0] + 0.5 * losses.distill[0], losses=losses).loss
        tensor(2.5000)
    """

    loss: Tensor
    losses: Losses
    parts: Tensor | None = None


class Objective(ABC):
    """How logits and labels become losses; subclass it for an objective of your own.

    Attributes:
        weights: The field of the batch with the weight of each example; its labels then come as `Weighted`.
        outputs: The names of several outputs, which `logits` and labels are mappings of; None: one.
        makes_probabilities: Whether a Teacher's labels are probabilities, which a temperature softens.

    Example:
        >>> from matta.objectives.objective import Losses
        >>> class SquaredError(Objective):
        ...     def losses(self, students, ta, labels):
        ...         return Losses(
        ...             students=tuple(self.cross_entropy(each, labels) for each in students),
        ...             ta=self.cross_entropy(ta, labels),
        ...             distill=tuple(self.cross_entropy(each, ta.detach()) for each in students),
        ...         )
        ...     def cross_entropy(self, logits, labels):
        ...         return (logits - labels).square().mean()
        ...     def teach(self, logits, labels):
        ...         return logits
        >>> SquaredError().losses([torch.zeros(2)], torch.ones(2), torch.ones(2)).distill
        (tensor(1.),)
    """

    weights: str | None = None
    outputs: tuple[str, ...] | None = None
    makes_probabilities: bool = True

    def __repr__(self) -> str:
        """The class with its settings, as they were given."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in settings.items())})"

    def least_deferred(self, labels: Labels) -> int | None:
        """The least number of classes for which `joint` takes deferred logits of linear heads; None: it never does."""
        return None

    def joint(self, students: Sequence[Tensor], ta: Tensor, labels: Labels, weights: LossWeights) -> Joint:
        """L and the three losses.

        Raises:
            LabelError: as `losses`.
        """
        losses = self.losses([undeferred(logits) for logits in students], undeferred(ta), labels)
        return Joint(loss=weights.combine(losses.ta, losses.students, losses.distill), losses=losses)

    @abstractmethod
    def losses(self, students: Sequence[Tensor], ta: Tensor, labels: Labels) -> Losses:
        """Eq. 1 of each Student, Eq. 2, and Eq. 3 of each Student against the TA.

        Raises:
            LabelError: logits of different shapes, or labels that do not fit them.
        """

    @abstractmethod
    def cross_entropy(self, logits: Tensor, labels: Labels) -> Float[Tensor, ""]:
        """Eq. 1 of one model: what it is trained on alone.

        Raises:
            LabelError: labels that do not fit the logits.
        """

    def cross_entropies(self, logits: Tensor, labels: Labels) -> Tensor:
        """What `cross_entropy` is the sum of, where `num_counted` gives several numbers: one term for each."""
        return self.cross_entropy(logits, labels)

    def num_counted(self, labels: Labels) -> int | Tensor:
        """How many rows the losses are means of, or the sum of their weights; all examples, unless overridden.

        A tensor where counting would make the host wait for the device.
        """
        if isinstance(labels, Weighted):
            return at_least_float32(labels.weights).sum()
        return num_examples(labels)

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels as metrics take them: those of the same example or position side by side.

        Logits come as (examples, classes), or in the shape of the labels if equally many.
        """
        return side_by_side(logits, labels)

    @abstractmethod
    def teach(self, logits: Tensor, labels: Labels | None) -> Tensor:
        """Soft labels from a Teacher's logits; positions that `labels` ignores stay ignored."""

    def mixed(self, labels: Labels, taught: Tensor, share: float) -> Tensor:
        """Labels of the batch and of a Teacher in one: `share` times the former, the rest the latter.

        Classes become probabilities. What is ignored in `taught` stays ignored.

        Raises:
            LabelError: labels that are a `TopK`.
        """
        own = whole(labels, "to be mixed with a Teacher's")
        if own.numel() == taught.numel():
            own = own.reshape(taught.shape)
        elif own.is_floating_point():
            own = own.unsqueeze(-1)
        else:
            own = own.unsqueeze(-1) == torch.arange(taught.shape[-1], device=taught.device)
        mixed = torch.lerp(taught, own.to(taught.dtype).expand_as(taught), share)
        return taught.where(self.is_left_out(taught), mixed)

    def is_left_out(self, taught: Tensor) -> Tensor:
        """Which of the labels that `teach` gave do not count."""
        ignored = getattr(self, "ignore_index", None)
        return torch.zeros_like(taught, dtype=torch.bool) if ignored is None else taught == ignored


def side_by_side(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits as (examples, classes) with a label for each, or in the shape of the labels if equally many."""
    if logits.numel() == labels.numel():
        return logits.reshape(labels.shape), labels
    return logits.flatten(0, -2), labels.flatten()


def require_same_shape(students: Sequence[Tensor], ta: Tensor) -> None:
    """Refuse logits of different shapes.

    Raises:
        LabelError: a Student's logits differ in shape from the TA's.
    """
    for logits in students:
        if logits.shape != ta.shape:
            raise LabelError(
                f"the Student's logits have shape {tuple(logits.shape)} and the TA's {tuple(ta.shape)}; expected the "
                f"same: both must have the same classes and positions"
            )


def check_labels(
    objective: Objective, rows: Tensor, refuse: Callable[[Tensor], None], kept: Tensor | None = None
) -> None:
    """Look for wrong labels: in every batch on a CPU, in the first elsewhere, where looking makes the host wait.

    `kept` says which rows count.
    """
    seen = getattr(objective, "_has_checked", False)
    if not (is_here(rows) or not seen) or torch.compiler.is_compiling():
        return
    rows = rows.detach() if kept is None else rows.detach()[kept]
    if rows.numel():
        objective._has_checked = True  # type: ignore[attr-defined]
        refuse(rows)
