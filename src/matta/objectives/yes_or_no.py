"""Labels that are yes or no, each with a logit of its own: one for each example, or several."""

from __future__ import annotations

from typing import final

from torch import Tensor

from matta.errors import LabelError
from matta.objectives.elementwise import Elementwise
from matta.objectives.labels import Labels, refuse_improbable
from matta.objectives.losses import at_least_float32, binary_cross_entropy
from matta.objectives.objective import check_labels


class _Sigmoid(Elementwise):
    """f and g are the cross-entropy of two classes, −y·log σ(z) − (1 − y)·log(1 − σ(z)), in nats; y = σ(z_TA) in g."""

    def soft(self, scores: Tensor) -> Tensor:
        return scores.sigmoid()

    def targets(self, scores: Tensor, labels: Tensor) -> Tensor:
        probs = self.fitted(labels, scores)
        check_labels(self, probs, refuse_improbable)
        return probs

    def total(self, scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
        return binary_cross_entropy(scores, targets, shares)


@final
class Binary(_Sigmoid):
    """One logit an example, for the probability of the positive class (a click, a late flight).

    Logits of shape (batch) or (batch, 1). Labels of either shape: 0 or 1, or probabilities.

    Args:
        ignore_index: Marks the labels that do not count.
        weights: The field of the batch that says what each example weighs in the mean; None: all the same.

    Example:
        >>> import torch
        >>> loss = Binary().cross_entropy(torch.zeros(2), torch.tensor([0.0, 0.8]))
        >>> round(loss.item(), 4)
        0.6931
    """

    element = "example"
    is_one_label = True

    def scores(self, logits: Tensor, labels: Labels | None) -> Tensor:
        if logits.ndim > 2 or (logits.ndim == 2 and logits.shape[1] != 1):
            raise LabelError(
                f"the logits have shape {tuple(logits.shape)}; expected (batch) or (batch, 1) for Binary; for several "
                f"classes use Classification, for several labels of an example MultiLabel"
            )
        return at_least_float32(logits.reshape(-1))


@final
class MultiLabel(_Sigmoid):
    """Several labels of an example, each of which may hold or not (the tags of a film).

    Logits and labels of the same shape (..., labels): 0 or 1, or probabilities. Each loss is the mean over all labels
    that count, in nats; a label that is not known is `ignore_index`, whatever the others of its example are.

    Args:
        ignore_index: Marks the labels that do not count.
        weights: The field of the batch that says what each example weighs in the mean; None: all the same.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[1, 0, -100]])
        >>> round(MultiLabel().cross_entropy(torch.tensor([[0.0, 0.0, 9.0]]), labels).item(), 4)
        0.6931
    """

    element = "logit"
