"""Losses from functions of your own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from matta.errors import LabelError
from matta.objectives.labels import Labels, num_examples, unweighted, weighted_counts
from matta.objectives.losses import at_least_float32, averaged
from matta.objectives.objective import Losses, Objective

LossFunction = Callable[[Any, Any], Tensor]


@final
class Custom(Objective):
    """Any f and g of Eq. 1 to 3: `loss(logits, labels)` and `distill(student_logits, ta_logits)`.

    Each gives the losses of the examples, of shape (batch), or their mean, of shape (); the TA's logits are detached.
    Logits are what the modules return, or what `CoTraining(logits=...)` takes from it; labels are those of the batch,
    tensors in any structure. For losses that ignore labels in some batches, subclass `Objective` and count them.

    Args:
        loss: f, for L_S and L_TA.
        distill: g, for L_D; None: `loss`, with the TA's logits for labels. That suits logits that are values in the
            labels' unit: give a function where they are turned into probabilities, classes or counts.
        weights: The field of the batch that says what each example weighs in the mean, for functions that give the
            losses of the examples; None: all the same.

    Raises:
        LabelError: no `distill`, and logits of another shape than the labels.

    Example:
        >>> objective = Custom(loss=lambda z, y: (z - y).abs(), distill=lambda z, ta: (z - ta).square())
        >>> losses = objective.losses([torch.zeros(2)], torch.ones(2), torch.tensor([1.0, 3.0]))
        >>> losses.students[0].item(), losses.ta.item(), losses.distill[0].item()
        (2.0, 1.0, 1.0)
    """

    makes_probabilities = False

    def __init__(self, loss: LossFunction, distill: LossFunction | None = None, *, weights: str | None = None) -> None:
        self._loss, self._distill, self.weights = loss, distill or loss, weights
        self.loss, self.distill = _named(loss), None if distill is None else _named(distill)  # for a resume to compare

    def losses(self, students: Sequence[Any], ta: Any, labels: Labels) -> Losses:
        own, weights = unweighted(labels)
        taught = tree_map_only(Tensor, Tensor.detach, ta)
        if self.distill is None and students and isinstance(own, Tensor) and isinstance(ta, Tensor):
            _require_values(ta, own)
        return Losses(
            students=tuple(self._mean("loss", self._loss(each, own), weights) for each in students),
            ta=self._mean("loss", self._loss(ta, own), weights),
            distill=tuple(self._mean("distill", self._distill(each, taught), weights) for each in students),
        )

    def cross_entropy(self, logits: Any, labels: Labels) -> Tensor:
        own, weights = unweighted(labels)
        return self._mean("loss", self._loss(logits, own), weights)

    def num_counted(self, labels: Labels) -> int | Tensor:
        own, weights = unweighted(labels)
        return at_least_float32(weights).sum() if weights is not None else num_examples(own)

    def teach(self, logits: Any, labels: Labels | None) -> Any:
        return logits

    @staticmethod
    def _mean(name: str, found: Tensor, weights: Tensor | None) -> Tensor:
        if found.ndim == 0 and weights is None:
            return found
        if found.ndim != 1:
            raise LabelError(
                f"Custom({name}=...) returned a tensor of shape {tuple(found.shape)}; expected one loss for each "
                f"example, (batch)" + (", since they have weights" if weights is not None else ", or their mean, ()")
            )
        return averaged(found, weighted_counts(torch.ones_like(found, dtype=torch.bool), weights))


def _require_values(ta: Tensor, labels: Tensor) -> None:
    if ta.numel() != labels.numel():
        raise LabelError(
            f"received Custom without distill, which takes the TA's logits, of shape {tuple(ta.shape)}, for labels, of "
            f"shape {tuple(labels.shape)}; expected distill=, a function of the Student's and the TA's logits"
        )


def _named(function: LossFunction) -> str:
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
