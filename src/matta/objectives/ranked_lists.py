"""Lists to be ranked: the scores of the items of each list, and what each item gains.

Scores and labels of shape (batch, items). Items with a label of `ignore_index` are padding: they take no part,
whatever their scores are. With a Teacher, too, the labels tell what is padding. Where one item was picked and its index
is the label, use `Classification`, with scores of -inf for padding.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from matta.errors import LabelError
from matta.objectives.elementwise import Elementwise
from matta.objectives.labels import Labels, whole
from matta.objectives.losses import at_least_float32, binary_cross_entropy, log_probabilities
from matta.objectives.objective import check_labels


class _Lists(Elementwise):
    """Lists, of which those without anything to learn from do not count, with a Teacher neither."""

    element = "item of a list"

    def __init__(self, ignore_index: float = -100, *, weights: str | None = None) -> None:
        super().__init__(ignore_index, weights=weights)

    def taught(self, labels: Tensor) -> Tensor:
        return self.known(labels) & self.counted(labels).unsqueeze(1)

    def targets(self, scores: Tensor, labels: Tensor) -> Tensor:
        gains = self.fitted(labels, scores)
        check_labels(self, gains, _refuse_losses)
        return gains

    def _present(self, labels: Labels | None, scores: Tensor) -> Tensor | None:
        """Which items are no padding, where labels tell.

        Raises:
            LabelError: scores that are not those of lists.
        """
        if scores.ndim != 2:
            raise LabelError(f"the scores have shape {tuple(scores.shape)}; expected (batch, items)")
        if labels is None:
            return None
        self.fitted(own := self._whole(labels), scores)
        return self.known(own)


@final
class Listwise(_Lists):
    """The softmax cross-entropy over the items of a list (ListNet's top one, Cao et al. 2007), in nats.

    f(z, y) = −Σ y_i/Σy · log softmax(z)_i, g(z_S, z_TA) = −Σ p_TA,i · log softmax(z_S)_i with p_TA = softmax(z_TA),
    over the items that are no padding. Each loss is the mean over the lists in which something has a gain.

    Scores of shape (batch, items). Labels of the same shape: gains of 0 or more (grades, a watch time, 1 for the item
    that was picked), `ignore_index` for padding. For ListNet's own labels, give the softmax of the grades. Gains are
    divided by their sum before they are mixed with a Teacher's labels.

    Args:
        ignore_index: Marks the items that are padding.
        weights: The field of the batch that says what each list weighs in the mean; None: all the same.

    Example:
        >>> scores = torch.tensor([[0.0, 0.0, 5.0]])
        >>> round(Listwise().cross_entropy(scores, torch.tensor([[3.0, 0.0, -100.0]])).item(), 4)
        0.6931
    """

    def scores(self, logits: Tensor, labels: Labels | None) -> Tensor:
        present = self._present(labels, logits)
        scores = at_least_float32(logits)
        return scores if present is None else scores.masked_fill(~present, torch.finfo(scores.dtype).min)

    def counted(self, labels: Tensor) -> Tensor:
        return (labels.where(self.known(labels), 0) > 0).any(-1)

    def soft(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1)

    def targets(self, scores: Tensor, labels: Tensor) -> Tensor:
        return _shares_of(super().targets(scores, labels))

    def mixed(self, labels: Labels, taught: Tensor, share: float) -> Tensor:
        gains = self.fitted(whole(labels, "to be mixed with a Teacher's"), taught)
        return super().mixed(_shares_of(gains), taught, share)  # a Teacher's sum to 1, whatever the unit of the gains

    def spread(self, shares: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        return shares.unsqueeze(-1)

    def total(self, scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        log_probs = log_probabilities(scores).clamp(min=torch.finfo(scores.dtype).min)
        return -(targets * log_probs * shares).sum()


@final
class Pairwise(_Lists):
    """The logistic loss over the pairs of a list (RankNet, Burges et al. 2005), in nats.

    For each pair with y_i > y_j, with d = z_i − z_j: f = −log σ(d), g = −σ(d_TA)·log σ(d_S) − σ(−d_TA)·log σ(−d_S).
    Each loss is the mean over the pairs of a list, and then over the lists that have such pairs. It takes memory for
    items² pairs of each list.

    Scores of shape (batch, items). Labels of the same shape, of which only the order counts; `ignore_index` for
    padding.

    Args:
        ignore_index: Marks the items that are padding.
        weights: The field of the batch that says what each list weighs in the mean; None: all the same.

    Example:
        >>> scores = torch.tensor([[0.0, 0.0, 5.0]])
        >>> round(Pairwise().cross_entropy(scores, torch.tensor([[3.0, 0.0, -100.0]])).item(), 4)
        0.6931
    """

    makes_probabilities = False

    def scores(self, logits: Tensor, labels: Labels | None) -> Tensor:
        present = self._present(labels, logits)
        scores = at_least_float32(logits)
        scores = scores if present is None else scores.masked_fill(~present, 0.0)
        return scores.unsqueeze(2) - scores.unsqueeze(1)

    def counted(self, labels: Tensor) -> Tensor:
        return self._pairs(labels).flatten(1).any(1)

    def soft(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()

    def targets(self, scores: Tensor, labels: Tensor) -> Tensor:
        return torch.ones_like(scores)

    def spread(self, shares: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        pairs = self._pairs(labels).to(shares.dtype)
        return pairs * (shares / pairs.sum((1, 2)).clamp(min=1)).view(-1, 1, 1)

    def total(self, scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        return binary_cross_entropy(scores, targets, shares)

    def as_labels(self, logits: Tensor, labels: Labels | None) -> Tensor:
        return at_least_float32(logits)

    def mixed(self, labels: Labels, taught: Tensor, share: float) -> Tensor:
        """Refuse: the order of gains and scores added up would depend on their units.

        Raises:
            LabelError: always.
        """
        raise LabelError(
            f"received labels={share} for Pairwise, whose labels are an order: gains and scores have no mean; expected "
            f"labels=0.0, the Teacher's order alone, or the objective Listwise"
        )

    def _pairs(self, labels: Tensor) -> Tensor:
        """Which of the pairs (i, j) are to be in this order."""
        known = self.known(labels)
        over = labels.unsqueeze(2) > labels.unsqueeze(1)
        return over & known.unsqueeze(2) & known.unsqueeze(1)


def _shares_of(gains: Tensor) -> Tensor:
    return gains / gains.sum(-1, keepdim=True).clamp(min=torch.finfo(gains.dtype).tiny)


def _refuse_losses(gains: Tensor) -> None:
    """Refuse gains below 0 and those that are no numbers.

    Raises:
        LabelError: there are some.
    """
    low, high = torch.aminmax(gains)
    if not (low >= 0 and high < torch.inf):
        raise LabelError(
            f"the gains lie between {float(low):.4g} and {float(high):.4g}; expected finite numbers of 0 or more, or "
            f"the ignore_index of the objective for padding; look for NaN in them"
        )
