"""The three losses of MatTA (Eq. 1-3): all of them cross-entropies, in nats.

Rows that are ignored do not count in the mean; a batch in which every row is ignored gives zero.
Losses are computed in float32 at least, whatever the type of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int, Real, Shaped
from torch import Tensor
from torch.nn import functional


@final
@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """ω₁, ω₂ and ω₃·ramp(t) of one step."""

    student: float
    ta: float
    distill: Float[Tensor, ""]

    def combine(self, ta: Tensor, students: Sequence[Tensor], distill: Sequence[Tensor]) -> Float[Tensor, ""]:
        """L = ω₁·L_S + ω₂·L_TA + ω₃·L_D, with L_S and L_D of each Student."""
        loss = self.ta * ta
        for student, distilled in zip(students, distill, strict=True):
            loss = loss + self.student * student + self.distill * distilled
        return loss


def log_probabilities(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
    """Log-softmax over the last axis, in float32 at least."""
    return functional.log_softmax(at_least_float32(logits), dim=-1)


def at_least_float32(logits: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """`logits` in a type that losses can be summed in."""
    return logits if logits.dtype.itemsize >= 4 else logits.float()


def divisor(total: Real[Tensor, "*parts"]) -> Real[Tensor, "*parts"]:
    """What a sum over labels is divided by for their mean: their number, or the sum of their weights; 1 for none."""
    return total.clamp(min=1) if not total.is_floating_point() else total.where(total > 0, 1.0)


def averaged(rows: Float[Tensor, " rows"], counts: Shaped[Tensor, " rows"]) -> Float[Tensor, ""]:
    """The mean of the rows that count: `counts` tells which do, or gives the weight of each."""
    if counts.dtype == torch.bool:
        return rows.masked_fill(~counts, 0.0).sum() / divisor(counts.sum())
    return (rows.masked_fill(counts == 0, 0.0) * counts).sum() / divisor(counts.sum())


def hard_cross_entropy(
    log_probs: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    ignore_index: int,
    counts: Shaped[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 1 and 2 for labels that are classes, averaged over the rows that are not ignored, or by their weights."""
    if counts is not None and counts.dtype != torch.bool:
        return averaged(functional.nll_loss(log_probs, labels, ignore_index=ignore_index, reduction="none"), counts)
    total = functional.nll_loss(log_probs, labels, ignore_index=ignore_index, reduction="sum")
    return total / divisor((labels != ignore_index).sum())


def soft_cross_entropy(
    log_probs: Float[Tensor, "rows classes"],
    probs: Float[Tensor, "rows classes"],
    counts: Shaped[Tensor, " rows"] | None = None,
) -> Float[Tensor, ""]:
    """Eq. 1 and 2 for labels that are probabilities, and Eq. 3, averaged over the rows that count.

    Example:
        >>> import torch
        >>> half = torch.full((1, 2), 0.5)
        >>> round(soft_cross_entropy(half.log(), half).item(), 4)
        0.6931
    """
    lowest = torch.finfo(log_probs.dtype).min  # a class that is masked out, with a logit of -inf: 0 times it is 0
    rows = -(probs * log_probs.clamp(min=lowest)).sum(-1)
    return rows.mean() if counts is None else averaged(rows, counts)


def binary_cross_entropy(
    logits: Float[Tensor, "*rows"], probs: Float[Tensor, "*rows"], shares: Float[Tensor, "*rows"]
) -> Float[Tensor, ""]:
    """Eq. 1-3 for two classes and one logit, that of the positive class.

    `shares` are the weights of the rows in the mean: one over the number of rows kept, and zero.
    """
    return functional.binary_cross_entropy_with_logits(logits, probs, weight=shares, reduction="sum")
