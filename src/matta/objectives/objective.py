"""What the models are trained for: how logits and labels of a batch become the three losses.

Every objective takes hard labels (classes) and soft ones (probabilities); those of several classes also take a
`TopK`. Ignored positions are left out: hard labels (those of a `TopK` too) equal to `ignore_index`, soft ones with
that value in all of the row.
Labels are checked on every batch on a CPU; on an accelerator, where a check would make the host
wait, on the first batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from matta.errors import LabelError
from matta.objectives.fused_losses import Rest, RowLabels, fused_losses
from matta.objectives.heads import LinearLogits, deferred, undeferred
from matta.objectives.labels import (
    Labels,
    TopK,
    ignored_positions,
    num_examples,
    refuse_improbable,
    refuse_improbable_rows,
    refuse_improper,
    refuse_out_of_range,
)
from matta.objectives.losses import (
    LossWeights,
    at_least_float32,
    binary_cross_entropy,
    hard_cross_entropy,
    log_probabilities,
    soft_cross_entropy,
)

_FUSED_FROM = 2**20  # logits of one model, from which on the fused form is the better one


@final
@dataclass(frozen=True, kw_only=True)
class Losses:
    """The three losses of a batch, in nats: of each Student, of the TA, and the distillation of each.

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


@final
@dataclass(frozen=True, kw_only=True)
class Joint:
    """L of a batch, which carries the graph, and what it consists of.

    Example:
        >>> from matta.objectives import Losses
        >>> losses = Losses(students=(torch.ones(()),), ta=torch.ones(()), distill=(torch.ones(()),))
        >>> Joint(loss=losses.ta + losses.students[0] + 0.5 * losses.distill[0], losses=losses).loss
        tensor(2.5000)
    """

    loss: Tensor
    losses: Losses


class Objective(ABC):
    """How logits and labels become losses; subclass it for an objective of your own.

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

    def least_deferred(self, labels: Labels) -> int | None:
        """From how many classes on `joint` takes deferred logits of linear heads; None: never."""
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

    def num_counted(self, labels: Labels) -> int | Tensor:
        """How many rows the losses are means of; all examples, unless the objective says otherwise.

        A tensor where counting would make the host wait for the device.
        """
        return num_examples(labels)

    @abstractmethod
    def teach(self, logits: Tensor, labels: Labels | None) -> Tensor:
        """Soft labels from a Teacher's logits; positions that `labels` ignores stay ignored."""


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


@final
class Binary(Objective):
    """One logit an example, for the probability of the positive class (a click, a late flight).

    Logits of shape (batch) or (batch, 1). Labels of either shape: 0 or 1, or probabilities.

    Example:
        >>> loss = Binary().cross_entropy(torch.zeros(2), torch.tensor([0.0, 0.8]))
        >>> round(loss.item(), 4)
        0.6931
    """

    def __init__(self, ignore_index: int = -100) -> None:
        self.ignore_index = ignore_index

    def losses(self, students: Sequence[Tensor], ta: Tensor, labels: Labels) -> Losses:
        require_same_shape(students, ta)
        ta_logits = self._rows(ta)
        probs, shares = self._labels(ta_logits, labels)
        soft = ta_logits.detach().sigmoid()
        rows = [self._rows(logits) for logits in students]
        return Losses(
            students=tuple(binary_cross_entropy(logits, probs, shares) for logits in rows),
            ta=binary_cross_entropy(ta_logits, probs, shares),
            distill=tuple(binary_cross_entropy(logits, soft, shares) for logits in rows),
        )

    def cross_entropy(self, logits: Tensor, labels: Labels) -> Tensor:
        rows = self._rows(logits)
        return binary_cross_entropy(rows, *self._labels(rows, labels))

    def num_counted(self, labels: Labels) -> Tensor:
        return (_whole(labels) != self.ignore_index).sum()

    def teach(self, logits: Tensor, labels: Labels | None) -> Tensor:
        probs = self._rows(logits).sigmoid()
        if labels is None:
            return probs
        return probs.masked_fill(_whole(labels).reshape(-1) == self.ignore_index, self.ignore_index)

    @staticmethod
    def _rows(logits: Tensor) -> Tensor:
        if logits.ndim > 2 or (logits.ndim == 2 and logits.shape[1] != 1):
            raise LabelError(
                f"the logits have shape {tuple(logits.shape)}; expected (batch) or (batch, 1) for Binary; for several "
                f"classes use Classification"
            )
        return at_least_float32(logits.reshape(-1))

    def _labels(self, logits: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
        """The labels as probabilities, and the weight of each in the mean."""
        labels = _whole(labels)
        if labels.numel() != logits.numel() or labels.ndim > 2:
            raise LabelError(
                f"the labels have shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}; expected one "
                f"label for each example"
            )
        rows = labels.reshape(-1).to(logits.dtype)
        kept = rows != self.ignore_index
        probs = rows.where(kept, 0.0)
        _check(self, probs, refuse_improbable)
        return probs, kept.to(logits.dtype) / kept.sum().clamp(min=1)


@final
class Classification(Objective):
    """One of C classes for each example or position.

    Logits of shape (..., classes). Labels: integers of shape (...), probabilities of shape
    (..., classes), or a `TopK` with positions of shape (...).

    Args:
        ignore_index: Marks the labels that do not count.
        fused: Compute linear heads and losses over chunks of rows, so that the logits are never whole in
            memory; the losses are the same. None: where the logits are many and each is the untouched
            output of a linear layer. True: always, or fail.
        chunk: Rows at a time of the fused form.

    Raises:
        LabelError: chunk is not a positive number.

    Example:
        >>> logits = torch.zeros(1, 4)
        >>> hard = Classification().cross_entropy(logits, torch.tensor([2]))
        >>> soft = Classification().cross_entropy(logits, torch.tensor([[0.1, 0.2, 0.3, 0.4]]))
        >>> round(hard.item(), 4), round(soft.item(), 4)
        (1.3863, 1.3863)
    """

    def __init__(self, ignore_index: int = -100, *, fused: bool | None = None, chunk: int | None = None) -> None:
        if chunk is not None and chunk < 1:
            raise LabelError(f"received chunk={chunk}; expected a number of rows from 1 up, or None")
        self.ignore_index, self.fused, self.chunk = ignore_index, fused, chunk

    def least_deferred(self, labels: Labels) -> int | None:
        if self.fused is not None:
            return 1 if self.fused else None
        is_soft = isinstance(labels, Tensor) and labels.is_floating_point()
        num_rows = (labels.shape[:-1] if is_soft else labels.shape).numel()
        return -(-_FUSED_FROM // max(num_rows, 1))

    def joint(self, students: Sequence[Tensor], ta: Tensor, labels: Labels, weights: LossWeights) -> Joint:
        heads = self.heads(students, ta)
        if heads is None:
            return super().joint(students, ta, labels, weights)
        return self.joint_of_heads(heads, labels, weights)

    def heads(self, students: Sequence[Tensor], ta: Tensor) -> list[LinearLogits] | None:
        """The TA's logits and each Student's as linear heads, if they are and the fused form is to be used.

        Raises:
            LabelError: logits of different shapes; with `fused=True` also if they are no linear heads.
        """
        require_same_shape(students, ta)
        heads = [deferred(logits) for logits in (ta, *students)]
        found = [head for head in heads if head is not None]
        if len(found) == len(heads):
            return found if self.fused or ta.numel() >= _FUSED_FROM else None
        if self.fused:
            who = "the TA" if heads[0] is None else "a Student"
            raise LabelError(
                f"received fused=True, and the logits of {who} are not the untouched output of a linear head; expected "
                f"a module that ends with its last nn.Linear, one that is its direct child, or the one that its "
                f"get_output_embeddings() gives, without hooks; leave fused=None for the plain form"
            )
        return None

    def joint_of_heads(self, heads: Sequence[LinearLogits], labels: Labels, weights: LossWeights) -> Joint:
        """`joint` in the fused form, of the TA's head and each Student's."""
        targets, kept = self._targets(heads[0], labels)
        rows = [head.rows() for head in heads]
        if kept.device.type == "cpu" and not kept.all():  # elsewhere the host would wait
            rows, targets, kept = [head[kept] for head in rows], targets[kept], kept[kept]
        made = fused_losses(
            rows[0], rows[1:], self._row_labels(targets, kept, rows[0]), kept, weights, chunk=self.chunk
        )
        losses = Losses(students=made.students, ta=made.ta, distill=made.distill)
        return Joint(loss=made.loss, losses=losses)

    @staticmethod
    def _row_labels(targets: Tensor | RowLabels, kept: Tensor, logits: LinearLogits) -> RowLabels:
        """The labels for the fused form; what is ignored becomes class 0, or no class."""
        if isinstance(targets, RowLabels):
            return targets
        if targets.is_floating_point():
            return RowLabels(probs=targets if kept.device.type == "cpu" else targets * kept.unsqueeze(1))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        indices = targets.where(kept, 0).unsqueeze(1)
        return RowLabels(probs=torch.ones_like(indices, dtype=dtype), indices=indices)

    def losses(self, students: Sequence[Tensor], ta: Tensor, labels: Labels) -> Losses:
        require_same_shape(students, ta)
        targets, kept = self._targets(ta, labels)
        ta_log_probs = log_probabilities(ta.flatten(0, -2))
        soft = ta_log_probs.detach().exp()
        log_probs = [log_probabilities(logits.flatten(0, -2)) for logits in students]
        return Losses(
            students=tuple(self._cross_entropy(each, targets, kept) for each in log_probs),
            ta=self._cross_entropy(ta_log_probs, targets, kept),
            distill=tuple(soft_cross_entropy(each, soft, kept) for each in log_probs),
        )

    def cross_entropy(self, logits: Tensor, labels: Labels) -> Tensor:
        targets, kept = self._targets(logits, labels)
        return self._cross_entropy(log_probabilities(logits.flatten(0, -2)), targets, kept)

    def num_counted(self, labels: Labels) -> Tensor:
        return (~ignored_positions(labels, self.ignore_index)).sum()

    def teach(self, logits: Tensor, labels: Labels | None) -> Tensor:
        probs = at_least_float32(logits).softmax(-1)
        if labels is None:
            return probs
        return probs.masked_fill(ignored_positions(labels, self.ignore_index).unsqueeze(-1), self.ignore_index)

    def _cross_entropy(self, log_probs: Tensor, targets: Tensor | RowLabels, kept: Tensor) -> Tensor:
        if isinstance(targets, RowLabels):
            return targets.cross_entropy(log_probs, kept)
        if targets.is_floating_point():
            return soft_cross_entropy(log_probs, targets, kept)
        return hard_cross_entropy(log_probs, targets, self.ignore_index)

    def _targets(self, logits: Tensor | LinearLogits, labels: Labels) -> tuple[Tensor | RowLabels, Tensor]:
        """The labels as rows, and which rows count."""
        is_soft = isinstance(labels, Tensor) and labels.is_floating_point()
        expected = logits.shape if is_soft else logits.shape[:-1]
        if len(logits.shape) < 2 or labels.shape != expected:
            kind = labels.dtype if isinstance(labels, Tensor) else "a TopK"
            raise LabelError(
                f"the labels are {kind} of shape {tuple(labels.shape)} and the logits of shape "
                f"{tuple(logits.shape)}; expected integers or a TopK of shape {tuple(logits.shape[:-1])}, or "
                f"probabilities of shape {tuple(logits.shape)}"
            )
        if isinstance(labels, TopK):
            return self._top_rows(logits, labels)
        if is_soft:
            probs = labels.flatten(0, -2).to(torch.promote_types(logits.dtype, torch.float32))
            kept = (probs != self.ignore_index).any(-1)
            _check(self, probs[kept], refuse_improbable_rows)
            return probs, kept
        targets = labels.reshape(-1).long()
        kept = targets != self.ignore_index
        _check(self, targets.where(kept, 0), lambda rows: refuse_out_of_range(rows, logits.shape[-1]))
        return targets, kept

    def _top_rows(self, logits: Tensor | LinearLogits, labels: TopK) -> tuple[RowLabels, Tensor]:
        """The k probabilities and the rest, which sum to 1; of what is ignored, zeros."""
        if labels.indices.shape != labels.log_probs.shape or labels.indices.shape[:-1] != labels.shape:
            shapes = [tuple(each.shape) for each in labels]
            raise LabelError(
                f"the TopK has indices, log_probs and observed of shapes {shapes[0]}, {shapes[1]} and {shapes[2]}; "
                f"expected (..., k), the same, and (...)"
            )
        rows = TopK(labels.indices.flatten(0, -2).long(), labels.log_probs.flatten(0, -2), labels.observed.reshape(-1))
        kept = rows.observed != self.ignore_index
        _check(self, rows.indices[kept], lambda _: refuse_improper(rows.at(kept), logits.shape[-1]))
        count = kept.unsqueeze(1)
        probs = rows.log_probs.to(torch.promote_types(logits.dtype, torch.float32)).exp().where(count, 0.0)
        total = probs.sum(1, keepdim=True)
        whole = torch.full_like(total, float(probs.shape[1] < logits.shape[-1]))  # 0 if there are no other classes
        probs = probs / torch.maximum(total, whole).clamp(min=torch.finfo(probs.dtype).tiny)
        observed = rows.observed.long().unsqueeze(1).where(count, 0)
        weight = (count & (rows.indices != observed).all(1, keepdim=True)).to(probs.dtype)
        left_over = (whole - total).clamp(min=0).where(count, 0.0)
        rest = Rest(prob=left_over - weight, observed=observed, weight=weight)
        return RowLabels(probs=probs, indices=rows.indices.where(count, 0), rest=rest), kept


@final
class CausalLM(Objective):
    """The next token of each position.

    Logits of shape (batch, time, vocabulary). Labels: the tokens themselves, (batch, time), as
    Transformers takes them (position t predicts label t + 1), probabilities of the token at
    each position, (batch, time, vocabulary), or a `TopK` of it with positions (batch, time).
    The arguments are those of `Classification`.

    Example:
        >>> tokens = torch.tensor([[5, 1, 3, 2]])
        >>> logits = torch.zeros(1, 4, 8)  # batch, positions, vocabulary
        >>> round(CausalLM().cross_entropy(logits, tokens).item(), 4)
        2.0794
    """

    def __init__(self, ignore_index: int = -100, *, fused: bool | None = None, chunk: int | None = None) -> None:
        self._classes = Classification(ignore_index, fused=fused, chunk=chunk)
        self.ignore_index = ignore_index

    def least_deferred(self, labels: Labels) -> int | None:
        return self._classes.least_deferred(labels)

    def joint(self, students: Sequence[Tensor], ta: Tensor, labels: Labels, weights: LossWeights) -> Joint:
        heads = self._classes.heads(students, ta)
        if heads is None:
            return super().joint(students, ta, labels, weights)
        shifted = self._shifted(ta, labels)
        return self._classes.joint_of_heads([head[:, :-1] for head in heads], shifted, weights)

    def losses(self, students: Sequence[Tensor], ta: Tensor, labels: Labels) -> Losses:
        require_same_shape(students, ta)
        shifted = self._shifted(ta, labels)
        return self._classes.losses([logits[:, :-1] for logits in students], ta[:, :-1], shifted)

    def cross_entropy(self, logits: Tensor, labels: Labels) -> Tensor:
        return self._classes.cross_entropy(logits[:, :-1], self._shifted(logits, labels))

    def num_counted(self, labels: Labels) -> Tensor:
        return self._classes.num_counted(_after_first(labels))

    def teach(self, logits: Tensor, labels: Labels | None) -> Tensor:
        tail = None if labels is None else _after_first(labels)
        probs = self._classes.teach(logits[:, :-1], tail)
        first = torch.full_like(probs[:, :1], self.ignore_index)
        return torch.cat([first, probs], dim=1)

    @staticmethod
    def _shifted(logits: Tensor, labels: Labels) -> Labels:
        if logits.ndim != 3 or labels.shape[:2] != logits.shape[:2]:
            raise LabelError(
                f"the labels have shape {tuple(labels.shape)} and the logits {tuple(logits.shape)}; expected "
                f"(batch, time) and (batch, time, vocabulary)"
            )
        return _after_first(labels)


def _after_first(labels: Labels) -> Labels:
    """The labels of all tokens but the first."""
    index = (slice(None), slice(1, None))
    return labels.at(index) if isinstance(labels, TopK) else labels[index]


def _whole(labels: Labels) -> Tensor:
    if isinstance(labels, TopK):
        raise LabelError("received a TopK as labels of one logit; expected 0 or 1, or probabilities, of shape (batch)")
    return labels


def _check(objective: Objective, rows: Tensor, refuse) -> None:  # type: ignore[no-untyped-def]
    seen = getattr(objective, "_has_checked", False)
    if rows.numel() and (rows.device.type == "cpu" or not seen) and not torch.compiler.is_compiling():
        objective._has_checked = True  # type: ignore[attr-defined]
        refuse(rows.detach())
