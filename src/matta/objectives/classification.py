"""One of several classes: for each example, each position, or the next token of each position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from matta.errors import LabelError
from matta.objectives.fused_losses import Rest, RowLabels, fused_losses
from matta.objectives.heads import LinearLogits, deferred
from matta.objectives.labels import (
    Labels,
    TopK,
    Weighted,
    ignored_positions,
    is_here,
    refuse_improbable_rows,
    refuse_improper,
    refuse_out_of_range,
    unweighted,
    weighted_counts,
)
from matta.objectives.losses import (
    LossWeights,
    at_least_float32,
    hard_cross_entropy,
    log_probabilities,
    soft_cross_entropy,
)
from matta.objectives.objective import Joint, Losses, Objective, check_labels, require_same_shape

_FUSED_FROM = 2**20  # logits of one model, from which on the fused form is the better one


@final
class Classification(Objective):
    """One of C classes for each example or position.

    Position t predicts label t: classification, tagging of tokens, masked language models, and decoders that get their
    inputs shifted (sequence to sequence). `CausalLM` shifts.

    Logits of shape (..., classes). Labels: integers of shape (...), probabilities of shape
    (..., classes), or a `TopK` with positions of shape (...).

    Args:
        ignore_index: Marks the labels that do not count.
        weights: The field of the batch that says what each example or position weighs in the mean; None: all the same.
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

    ignore_index: int

    def __init__(
        self,
        ignore_index: int = -100,
        *,
        weights: str | None = None,
        fused: bool | None = None,
        chunk: int | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise LabelError(f"received chunk={chunk}; expected a number of rows from 1 up, or None")
        self.ignore_index, self.weights, self.fused, self.chunk = ignore_index, weights, fused, chunk

    def least_deferred(self, labels: Labels) -> int | None:
        if self.fused is not None:
            return 1 if self.fused else None
        own, _ = unweighted(labels)
        is_soft = isinstance(own, Tensor) and own.is_floating_point()
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
        targets, counts = self._targets(heads[0], labels)
        rows, kept = [head.rows() for head in heads], counts != 0
        if is_here(kept) and not kept.all():  # elsewhere the host would wait
            rows, targets, counts, kept = [head[kept] for head in rows], targets[kept], counts[kept], kept[kept]
        made = fused_losses(
            rows[0], rows[1:], self._row_labels(targets, kept, rows[0]), counts, weights, chunk=self.chunk
        )
        losses = Losses(students=made.students, ta=made.ta, distill=made.distill)
        return Joint(loss=made.loss, losses=losses)

    @staticmethod
    def _row_labels(targets: Tensor | RowLabels, kept: Tensor, logits: LinearLogits) -> RowLabels:
        """The labels for the fused form; what is ignored becomes class 0, or no class."""
        if isinstance(targets, RowLabels):
            return targets
        if targets.is_floating_point():
            return RowLabels(probs=targets if is_here(kept) else targets * kept.unsqueeze(1))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        indices = targets.where(kept, 0).unsqueeze(1)
        return RowLabels(probs=torch.ones_like(indices, dtype=dtype), indices=indices)

    def losses(self, students: Sequence[Tensor], ta: Tensor, labels: Labels) -> Losses:
        require_same_shape(students, ta)
        targets, counts = self._targets(ta, labels)
        ta_log_probs = log_probabilities(ta.flatten(0, -2))
        soft = ta_log_probs.detach().exp()
        log_probs = [log_probabilities(logits.flatten(0, -2)) for logits in students]
        return Losses(
            students=tuple(self._cross_entropy(each, targets, counts) for each in log_probs),
            ta=self._cross_entropy(ta_log_probs, targets, counts),
            distill=tuple(soft_cross_entropy(each, soft, counts) for each in log_probs),
        )

    def cross_entropy(self, logits: Tensor, labels: Labels) -> Tensor:
        targets, counts = self._targets(logits, labels)
        return self._cross_entropy(log_probabilities(logits.flatten(0, -2)), targets, counts)

    def num_counted(self, labels: Labels) -> Tensor:
        own, weights = unweighted(labels)
        return weighted_counts(~ignored_positions(own, self.ignore_index), weights).sum()

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As for any objective, without the positions that are ignored."""
        counts = ~ignored_positions(labels, self.ignore_index)
        return super().judged(logits[counts], labels[counts])

    def teach(self, logits: Tensor, labels: Labels | None) -> Tensor:
        probs = at_least_float32(logits).softmax(-1)
        if labels is None:
            return probs
        ignored = ignored_positions(unweighted(labels)[0], self.ignore_index)
        return probs.masked_fill(ignored.unsqueeze(-1), self.ignore_index)

    def is_left_out(self, taught: Tensor) -> Tensor:
        return ignored_positions(taught, self.ignore_index).unsqueeze(-1)

    def _cross_entropy(self, log_probs: Tensor, targets: Tensor | RowLabels, counts: Tensor) -> Tensor:
        if isinstance(targets, RowLabels):
            return targets.cross_entropy(log_probs, counts)
        if targets.is_floating_point():
            return soft_cross_entropy(log_probs, targets, counts)
        return hard_cross_entropy(log_probs, targets, self.ignore_index, counts)

    def _targets(self, logits: Tensor | LinearLogits, labels: Labels) -> tuple[Tensor | RowLabels, Tensor]:
        """The labels as rows, and which rows count, or what each weighs."""
        own, weights = unweighted(labels)
        targets, kept = self._rows(logits, own)
        if weights is None:
            return targets, kept
        shape = logits.shape[:-1]
        counts = weighted_counts(kept.reshape(shape), weights).reshape(-1)
        return targets, counts.to(torch.promote_types(logits.dtype, torch.float32))

    def _rows(self, logits: Tensor | LinearLogits, labels: Tensor | TopK) -> tuple[Tensor | RowLabels, Tensor]:
        """The labels as rows, and which of them are not ignored."""
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
            check_labels(self, probs, refuse_improbable_rows, kept)
            return probs, kept
        targets = labels.reshape(-1).long()
        kept = targets != self.ignore_index
        check_labels(self, targets.where(kept, 0), lambda rows: refuse_out_of_range(rows, logits.shape[-1]))
        return targets, kept

    def _top_rows(self, logits: Tensor | LinearLogits, labels: TopK) -> tuple[RowLabels, Tensor]:
        """The k probabilities and the rest, which sum to 1; of what is ignored, zeros."""
        if labels.indices.shape != labels.log_probs.shape or labels.indices.shape[:-1] != labels.shape:
            shapes = [tuple(each.shape) for each in labels]
            raise LabelError(
                f"the TopK has indices, log_probs and observed of shapes {shapes[0]}, {shapes[1]} and {shapes[2]}; "
                f"expected (..., k), the same, and (...)"
            )
        indices, observed = labels.indices.flatten(0, -2).long(), labels.observed.reshape(-1).long()
        rows = TopK(indices, labels.log_probs.flatten(0, -2), observed)
        kept = rows.observed != self.ignore_index
        check_labels(self, rows.indices, lambda _: refuse_improper(rows.at(kept), logits.shape[-1]), kept)
        count = kept.unsqueeze(1)
        probs = rows.log_probs.to(torch.promote_types(logits.dtype, torch.float32)).exp().where(count, 0.0)
        total = probs.sum(1, keepdim=True)
        whole = torch.full_like(total, float(probs.shape[1] < logits.shape[-1]))  # 0 if there are no other classes
        probs = probs / torch.maximum(total, whole).clamp(min=torch.finfo(probs.dtype).tiny)
        observed = rows.observed.unsqueeze(1).where(count, 0)
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

    ignore_index: int

    def __init__(
        self,
        ignore_index: int = -100,
        *,
        weights: str | None = None,
        fused: bool | None = None,
        chunk: int | None = None,
    ) -> None:
        self._classes = Classification(ignore_index, weights=weights, fused=fused, chunk=chunk)
        self.ignore_index, self.weights = ignore_index, weights

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

    def judged(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As for `Classification`, with the next token beside each position."""
        return self._classes.judged(logits[:, :-1], labels[:, 1:])

    def teach(self, logits: Tensor, labels: Labels | None) -> Tensor:
        tail = None if labels is None else _after_first(labels)
        probs = self._classes.teach(logits[:, :-1], tail)
        first = torch.full_like(probs[:, :1], self.ignore_index)
        return torch.cat([first, probs], dim=1)

    def is_left_out(self, taught: Tensor) -> Tensor:
        return self._classes.is_left_out(taught)

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
    if isinstance(labels, Weighted):
        of_tokens = labels.weights.ndim > 1 and labels.weights.shape[1] == labels.shape[1]
        own, _ = unweighted(_after_first(labels.labels))
        return Weighted(own, labels.weights[index] if of_tokens else labels.weights)
    return labels.at(index) if isinstance(labels, TopK) else labels[index]
