"""Objectives that are sums over the elements of one tensor: values, yes-or-no labels, items or pairs of a list."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from matta.errors import LabelError
from matta.objectives.labels import Labels, is_equal, unweighted, weighted_counts, whole
from matta.objectives.losses import at_least_float32, divisor
from matta.objectives.objective import Losses, Objective, require_same_shape


class Elementwise(Objective):
    """What such objectives share; a subclass says what the elements are and what the loss of one is.

    L_S and L_TA are `total(scores, targets, shares)` of the labels, and L_D is that of the labels that the TA makes:
    `soft(scores of the TA)`, detached. `shares` are what each element weighs in the mean.
    """

    element = "value"
    is_one_label = False  # whether each label stands for itself, and not for one of an example's

    def __init__(self, ignore_index: float | None = -100, *, weights: str | None = None) -> None:
        self.ignore_index, self.weights = ignore_index, weights

    def losses(self, students: Sequence[Tensor], ta: Tensor, labels: Labels) -> Losses:
        require_same_shape(students, ta)
        own, _ = unweighted(labels)
        ta_scores = self.scores(ta, own)
        targets, shares = self._targets(ta_scores, labels)
        soft = self.soft(ta_scores.detach())
        scores = [self.scores(logits, own) for logits in students]
        return Losses(
            students=tuple(self.total(each, targets, shares) for each in scores),
            ta=self.total(ta_scores, targets, shares),
            distill=tuple(self.total(each, soft, shares) for each in scores),
        )

    def cross_entropy(self, logits: Tensor, labels: Labels) -> Tensor:
        scores = self.scores(logits, unweighted(labels)[0])
        return self.total(scores, *self._targets(scores, labels))

    def num_counted(self, labels: Labels) -> Tensor:
        own, weights = unweighted(labels)
        return weighted_counts(self.counted(self._whole(own)), weights).sum()

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As for any objective, without the labels that are not known, where an example has one."""
        known = self.known(labels)
        logits, labels = super().judged(logits, labels)
        if not self.is_one_label or bool(known.all()):
            return logits, labels
        return logits[known.reshape(labels.shape)], labels[known.reshape(labels.shape)]

    def teach(self, logits: Tensor, labels: Labels | None) -> Tensor:
        made = self.as_labels(logits, labels)
        if labels is None or self.ignore_index is None:
            return made
        taught = self.taught(self._whole(labels))
        taught = taught.reshape(made.shape) if taught.numel() == made.numel() else taught.unsqueeze(-1)
        return made.masked_fill(~taught, self.ignore_index)

    def as_labels(self, logits: Tensor, labels: Labels | None) -> Tensor:
        """The labels that a Teacher's logits make."""
        return self.soft(self.scores(logits, labels))

    def taught(self, labels: Tensor) -> Tensor:
        """Which elements a Teacher makes labels for."""
        return self.known(labels)

    def scores(self, logits: Tensor, labels: Labels | None) -> Tensor:
        """What the loss is a function of, in float32 at least; `labels` tell where a list is padded."""
        return at_least_float32(logits)

    def known(self, labels: Tensor) -> Tensor:
        """Which elements of the labels are not ignored."""
        if self.ignore_index is None:
            return torch.ones_like(labels, dtype=torch.bool)
        return ~(labels.isnan() if self.ignore_index != self.ignore_index else is_equal(labels, self.ignore_index))

    def counted(self, labels: Tensor) -> Tensor:
        """Which rows the losses are means of: all elements that are known, or lists, say."""
        return self.known(labels)

    @abstractmethod
    def soft(self, scores: Tensor) -> Tensor:
        """The labels that a model makes: its probabilities, or its values."""

    @abstractmethod
    def targets(self, scores: Tensor, labels: Tensor) -> Tensor:
        """The labels, checked, in the form of `soft`; where they do not count, any finite value.

        Raises:
            LabelError: labels that do not fit.
        """

    @abstractmethod
    def total(self, scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        """The sum of the losses of all elements, each times its share."""

    def spread(self, shares: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        """The share of each element, from that of each row that counts."""
        return shares.reshape(targets.shape)

    def fitted(self, labels: Tensor, scores: Tensor) -> Tensor:
        """The labels in the shape and type of the scores; where they are not known, 0.

        Raises:
            LabelError: another shape, but for an axis of one.
        """
        if [each for each in labels.shape if each != 1] != [each for each in scores.shape if each != 1]:
            raise LabelError(
                f"the labels have shape {tuple(labels.shape)} and the logits {tuple(scores.shape)}; expected one "
                f"label for each {self.element}"
            )
        return labels.where(self.known(labels), 0).reshape(scores.shape).to(scores.dtype)

    def _targets(self, scores: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """The labels of each element, and what it weighs in the mean."""
        own, weights = unweighted(labels)
        own = self._whole(own)
        targets = self.targets(scores, own)
        counts = weighted_counts(self.counted(own), weights)
        return targets, self.spread(counts.to(scores.dtype) / divisor(counts.sum()), targets, own)

    def _whole(self, labels: Labels) -> Tensor:
        return whole(labels, f"of {type(self).__name__}")
