"""Labels that are values: the mean of a distribution, one that outliers move less, or its quantiles.

Each loss is a mean over the labels that count, in the unit of the labels, or in its square. L_D has the same formula as
L_S, with the TA's values, detached, for labels: it is least where the Student gives what the TA gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from matta.errors import LabelError
from matta.objectives.elementwise import Elementwise
from matta.objectives.labels import refuse_infinite
from matta.objectives.objective import check_labels


class _Values(Elementwise):
    """Outputs that are in the labels' unit themselves."""

    makes_probabilities = False
    is_one_label = True

    def __init__(self, *, ignore_index: float | None = None, weights: str | None = None) -> None:
        super().__init__(ignore_index, weights=weights)

    def soft(self, scores: Tensor) -> Tensor:
        return scores

    def targets(self, scores: Tensor, labels: Tensor) -> Tensor:
        values = self.fitted(labels, scores)
        check_labels(self, values, refuse_infinite)
        return values


@final
class SquaredError(_Values):
    """Values by their squared error: f(z, y) = (z − y)², g = f(z_S, z_TA), in the square of the labels' unit.

    Outputs and labels of the same shape, (batch) or (batch, 1) say.

    Args:
        ignore_index: A value that marks the labels that do not count, `float("nan")` say; None: all count.
        weights: The field of the batch that says what each example weighs in the mean; None: all the same.

    Example:
        >>> SquaredError().cross_entropy(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]))
        tensor(4.5000)
    """

    def total(self, scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        return ((scores - targets).square() * shares).sum()


@final
class Huber(_Values):
    """Values by the Huber loss: with d = |z − y|, f(z, y) = d²/2 up to d = `delta`, and delta·(d − delta/2) beyond.

    g = f(z_S, z_TA). Outputs and labels of the same shape. The loss is in the square of the labels' unit, `delta` in
    that unit.

    Args:
        delta: Where the square becomes a line.
        ignore_index: A value that marks the labels that do not count, `float("nan")` say; None: all count.
        weights: The field of the batch that says what each example weighs in the mean; None: all the same.

    Raises:
        LabelError: delta is not a number over 0.

    Example:
        >>> Huber().cross_entropy(torch.tensor([0.0, 9.0]), torch.tensor([1.0, 2.0]))  # 0.5 and 6.5
        tensor(3.5000)
    """

    def __init__(self, delta: float = 1.0, *, ignore_index: float | None = None, weights: str | None = None) -> None:
        super().__init__(ignore_index=ignore_index, weights=weights)
        if not 0 < delta < float("inf"):
            raise LabelError(f"received delta={delta!r}; expected a number over 0")
        self.delta = delta

    def total(self, scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        return (functional.huber_loss(scores, targets, reduction="none", delta=self.delta) * shares).sum()


@final
class Quantiles(_Values):
    """Several quantiles of a value by the pinball loss: with d = y − z of level q, f(z, y) = max(q·d, (q − 1)·d).

    Outputs of shape (..., levels). Labels of shape (...), one value for all levels, or (..., levels), a value for each,
    as a Teacher gives them. Each loss is the mean over labels and levels, in the labels' unit. g = f(z_S, z_TA), level
    by level.

    Args:
        levels: Numbers between 0 and 1.
        ignore_index: A value that marks the labels that do not count, `float("nan")` say; None: all count.
        weights: The field of the batch that says what each example weighs in the mean; None: all the same.

    Raises:
        LabelError: a level that is not between 0 and 1, or none.

    Example:
        >>> Quantiles([0.1, 0.9]).cross_entropy(torch.tensor([[1.0, 1.0]]), torch.tensor([2.0]))  # 0.1 and 0.9
        tensor(0.5000)
    """

    element = "row of logits, or for each level"

    def __init__(
        self, levels: Sequence[float], *, ignore_index: float | None = None, weights: str | None = None
    ) -> None:
        super().__init__(ignore_index=ignore_index, weights=weights)
        self.levels = list(levels) if isinstance(levels, Iterable) else [levels]
        if not self.levels or not all(0 < level < 1 for level in self.levels):
            raise LabelError(
                f"received levels={self.levels}; expected numbers between 0 and 1, such as [0.1, 0.5, 0.9]"
            )

    def targets(self, scores: Tensor, labels: Tensor) -> Tensor:
        if scores.shape[-1] != len(self.levels):
            raise LabelError(
                f"the logits have shape {tuple(scores.shape)}; expected (..., {len(self.levels)}), one for each level"
            )
        if labels.shape == scores.shape:
            return super().targets(scores, labels)
        return super().targets(scores[..., 0], labels).unsqueeze(-1).expand_as(scores)

    def spread(self, shares: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
        if shares.numel() == targets.numel():
            return shares.reshape(targets.shape)
        return shares.reshape(*targets.shape[:-1], 1) / len(self.levels)

    def total(self, scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        levels = torch.tensor(self.levels, dtype=scores.dtype, device=scores.device)
        short = targets - scores
        return (torch.maximum(levels * short, (levels - 1) * short) * shares).sum()
