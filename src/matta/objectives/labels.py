"""What labels may be, and which are refused: classes, probabilities, values, a Teacher's top k, all with weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.utils._pytree import tree_leaves

from matta.errors import LabelError
from matta.objectives.losses import log_probabilities

_SUM_TOLERANCE = 1e-2


class TopK(NamedTuple):
    """Labels of a batch: the classes that the Teacher holds likeliest at each position, and the class observed there.

    What the k probabilities leave of 1 belongs to all other classes together, so that the Teacher gives a
    distribution over the k classes and the rest: Eq. 1 of that, and, where the class observed is one of the rest, its
    cross-entropy given that it is. If events come as the Teacher says, this is on average Eq. 1 of all of the Teacher's
    probabilities. With k = all classes it is just that.

    Devices, DataLoaders and Accelerate move and collate it as they do tuples.

    Attributes:
        indices: The k classes at each position, of shape (..., k).
        log_probs: The logarithms of their probabilities, of shape (..., k), in any floating type.
        observed: Hard labels, of shape (...), or the objective's ignore_index. Where nothing was observed, any of the
            k: then how the rest is divided is left open.

    Example:
        >>> import matta
        >>> labels = matta.objectives.top_k(torch.tensor([[0.1, 0.7, 0.2]]).log(), 2, torch.tensor([2]))
        >>> labels.indices.tolist(), [round(p, 4) for p in labels.log_probs[0].exp().tolist()], labels.shape
        ([[1, 2]], [0.7, 0.2], torch.Size([1]))
    """

    indices: Int[Tensor, "*batch k"]
    log_probs: Float[Tensor, "*batch k"]
    observed: Int[Tensor, "*batch"]

    @property
    def shape(self) -> torch.Size:
        """The shape of the positions, as of hard labels; `len` is that of any tuple."""
        return self.observed.shape

    def at(self, index: Any) -> TopK:
        """The labels at some positions."""
        return TopK(*(each[index] for each in self))


class Weighted(NamedTuple):
    """Labels, and what each of them weighs in the mean: the importance of events, say.

    `CoTraining` makes it of a batch that is a mapping, for an objective with `weights="importance"`, where that is the
    name of a field. Where the batch is a pair, make it yourself. Weights of 1 change nothing.

    Attributes:
        labels: Labels as without weights.
        weights: Numbers of 0 or more, one for each example, of shape (batch), or one for each label, of the labels'
            shape (without the classes).

    Example:
        >>> import matta
        >>> labels = Weighted(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]))
        >>> loss = matta.objectives.Binary().cross_entropy(torch.tensor([0.0, 100.0]), labels)
        >>> round(4 * loss.item(), 4)  # the first one's, 0.6931, weighs 1 of 4
        0.6931
    """

    labels: Tensor | TopK
    weights: Float[Tensor, "*batch"]

    @property
    def shape(self) -> torch.Size:
        """The shape of the labels."""
        return self.labels.shape


Labels = Tensor | TopK | Weighted


def unweighted(labels: Labels) -> tuple[Tensor | TopK, Tensor | None]:
    """The labels themselves, and their weights where they have some."""
    return (labels.labels, labels.weights) if isinstance(labels, Weighted) else (labels, None)


def weighted_counts(kept: Bool[Tensor, "*batch"], weights: Tensor | None) -> Shaped[Tensor, "*batch"]:
    """Which labels count, or, where they have weights, the weight of each, which is 0 for those that do not.

    Raises:
        LabelError: weights of another shape, below 0 or not finite.
    """
    if weights is None:
        return kept
    if weights.shape != kept.shape and weights.numel() in (len(kept), kept.numel()):
        weights = weights.reshape(kept.shape if weights.numel() == kept.numel() else [-1, *[1] * (kept.ndim - 1)])
    elif weights.shape != kept.shape:
        raise LabelError(
            f"the weights have shape {tuple(weights.shape)}, and the labels {tuple(kept.shape)}; expected one weight "
            f"for each example or for each label"
        )
    if is_here(weights) and weights.numel() and not torch.compiler.is_compiling():
        low, high = torch.aminmax(weights)
        if not (low >= 0 and high < torch.inf):
            raise LabelError(
                f"the weights lie between {float(low):.4g} and {float(high):.4g}; expected finite numbers of 0 or "
                f"more; look for NaN in them"
            )
    return weights.to(torch.promote_types(weights.dtype, torch.float32)) * kept


def top_k(logits: Float[Tensor, "*batch classes"], k: int, observed: Int[Tensor, "*batch"] | None = None) -> TopK:
    """The k likeliest classes of a Teacher's logits, with their log-probabilities in float32 at least.

    Raises:
        LabelError: k is not from 1 up to the number of classes.

    Example:
        >>> top_k(torch.tensor([[0.1, 0.7, 0.2]]).log(), k=2).indices
        tensor([[1, 2]])
    """
    if not 1 <= k <= logits.shape[-1]:
        raise LabelError(f"received k={k}; expected 1 to {logits.shape[-1]}, the number of classes")
    log_probs, indices = log_probabilities(logits).topk(k)
    return TopK(indices, log_probs, indices[..., 0] if observed is None else observed)


def whole(labels: Labels, use: str) -> Tensor:
    """Labels that are a tensor.

    Raises:
        LabelError: a `TopK`.
    """
    if not isinstance(labels, Tensor):
        raise LabelError(f"received a {type(labels).__name__} as labels {use}; expected a tensor of labels")
    return labels


def is_here(tensor: Tensor) -> bool:
    """Whether the host can look into a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def num_examples(labels: Any) -> int:
    """The length of the first axis, of labels or logits in any structure."""
    return len(tree_leaves(labels)[0])


def ignored_positions(labels: Tensor | TopK, ignore_index: int) -> Bool[Tensor, "*batch"]:
    """Which positions do not count, whatever the form of the labels."""
    ignored = is_equal(labels.observed if isinstance(labels, TopK) else labels, ignore_index)
    return ignored.all(-1) if isinstance(labels, Tensor) and labels.is_floating_point() else ignored


def is_equal(labels: Shaped[Tensor, "*batch"], value: float) -> Bool[Tensor, "*batch"]:
    """Which labels are a value, compared as numbers: torch takes -100 for 156 where labels are bytes."""
    return (labels if labels.is_floating_point() else labels.long()) == value


def refuse_infinite(values: Tensor) -> None:
    """Refuse what is no number.

    Raises:
        LabelError: NaN, or an infinite value.
    """
    if not bool(torch.isfinite(values).all()):
        raise LabelError(
            "a label is NaN or infinite; expected finite values; to leave out what is missing give the objective "
            "ignore_index, such as float('nan')"
        )


def refuse_improbable(probs: Tensor) -> None:
    """Refuse what is no probability.

    Raises:
        LabelError: a value below 0 or over 1, or NaN.
    """
    low, high = torch.aminmax(probs)
    if not (low >= 0 and high <= 1):
        raise LabelError(
            f"the labels lie between {float(low):.4g} and {float(high):.4g}; expected 0 or 1, or probabilities between "
            f"them; scale or clip the labels, and look for NaN in them"
        )


def refuse_improbable_rows(probs: Float[Tensor, "rows classes"]) -> None:
    """Refuse rows that are no distributions.

    Raises:
        LabelError: a value that is no probability, or a sum far from 1.
    """
    refuse_improbable(probs)
    error = float((probs.sum(-1) - 1).abs().max())
    if not error <= _SUM_TOLERANCE:
        raise LabelError(
            f"a row of the soft labels sums to 1 with an error of {error:.4g}; expected probabilities that sum to 1; "
            f"are they logits? take their softmax"
        )


def refuse_out_of_range(labels: Int[Tensor, ...], num_classes: int) -> None:
    """Refuse classes that there are not.

    Raises:
        LabelError: a class below 0, or beyond the last.
    """
    low, high = torch.aminmax(labels)
    if low < 0 or high >= num_classes:
        wrong = int(low) if low < 0 else int(high)
        raise LabelError(
            f"a label is {wrong}; expected 0 to {num_classes - 1}, as the logits have {num_classes} classes, or the "
            f"ignore_index of the objective"
        )


def refuse_improper(labels: TopK, num_classes: int) -> None:
    """Refuse rows that are no part of a distribution over the classes.

    Raises:
        LabelError: a class that there is not, or twice in a row; no log-probability; a sum over 1.
    """
    for classes in (labels.indices, labels.observed):
        refuse_out_of_range(classes, num_classes)
    ordered = labels.indices.sort(-1).values
    if bool((twice := ordered[:, 1:] == ordered[:, :-1]).any()):
        raise LabelError(
            f"class {int(ordered[:, 1:][twice][0])} is listed twice at a position; expected each of the k classes once"
        )
    high = labels.log_probs.max()
    total = labels.log_probs.double().exp().sum(-1).max()
    if not (high <= _SUM_TOLERANCE and total <= 1 + _SUM_TOLERANCE):
        raise LabelError(
            f"the log-probabilities of the top-k labels reach {float(high):.4g}, and their probabilities sum to "
            f"{float(total):.4g} at most; expected logarithms of probabilities, of a sum up to 1; are they logits? "
            f"take their log-softmax over all classes, and look for NaN in them"
        )
