"""Linear heads and the three losses in one, over chunks of rows: the logits are never whole in memory.

With p = softmax(logits), rows of labels y that sum to Y, and L = ω₁·L_S + ω₂·L_TA + ω₃·L_D, Eq. 1-3 give

    d L / d logits_S = (ω₁Y + ω₃)·p_S − ω₁·y − ω₃·p_TA
    d L / d logits_TA = ω₂·(Y·p_TA − y)

so the forward pass can turn each chunk of logits into gradients of the hidden states and of the heads in
place, and drop it. Nothing is computed twice: the backward pass only scales what the forward pass left.
Each gradient of logits is kept with the factor of its p taken out, which goes into the smaller matrices.

Labels of k classes and y_rest for all others together have the loss −Σ y_i·log p_i − y_rest·log p_rest. Its gradient
is that of labels which divide y_rest among the others as the model itself does: y_j = y_rest·p_j/p_rest. If one of the
others was observed, −log(p_observed/p_rest) is added: 1 goes over from the rest to that class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from matta.errors import MattaError
from matta.objectives.heads import LinearLogits
from matta.objectives.losses import LossWeights, averaged, divisor

_CHUNK_ELEMENTS = 2**23  # logits at a time: large enough for matrix products at full speed
_STRIP_ELEMENTS = 2**18  # of an intermediate product that should stay in the cache


@final
@dataclass(frozen=True, kw_only=True)
class Rest:
    """What labels of k classes leave over: `prob` for all others together, and `weight` for the one `observed`.

    The weight is 1 if that class is not among the k, else 0; `prob` is less by it, and may be below 0.
    """

    prob: Float[Tensor, "rows 1"]
    observed: Int[Tensor, "rows 1"]
    weight: Float[Tensor, "rows 1"]

    def __getitem__(self, rows: slice | Tensor) -> Rest:
        return Rest(prob=self.prob[rows], observed=self.observed[rows], weight=self.weight[rows])

    def felt(self, left: Float[Tensor, "rows 1"]) -> Float[Tensor, "rows 1"]:
        """`prob` where the model leaves anything for the others: the logarithm of nothing has no gradient."""
        return self.prob.where(left >= torch.finfo(left.dtype).tiny, 0.0)


@final
@dataclass(frozen=True, kw_only=True)
class RowLabels:
    """Labels as rows of probabilities: of the classes at `indices`, or of all classes if that is None.

    `rest`, if given, is about the classes that are not at `indices`, each of which is then there once.
    """

    probs: Float[Tensor, "rows k"]
    indices: Int[Tensor, "rows k"] | None = None
    rest: Rest | None = None

    def __getitem__(self, rows: slice | Tensor) -> RowLabels:
        return RowLabels(
            probs=self.probs[rows],
            indices=None if self.indices is None else self.indices[rows],
            rest=None if self.rest is None else self.rest[rows],
        )

    def cross_entropy(
        self, log_probs: Float[Tensor, "rows classes"], counts: Shaped[Tensor, " rows"]
    ) -> Float[Tensor, ""]:
        """Eq. 1 and 2 in the plain form, of labels with a `rest`, averaged over the rows that count."""
        assert self.indices is not None and self.rest is not None
        limits = torch.finfo(log_probs.dtype)
        left = log_probs.scatter(1, self.indices, -torch.inf).logsumexp(1, keepdim=True)
        rows = -self.dot(log_probs.clamp(min=limits.min)) - self.rest.prob * left.clamp(min=math.log(limits.tiny))
        return averaged(rows.squeeze(1), counts)

    def mass(self, left: Float[Tensor, "rows 1"] | None) -> Float[Tensor, "rows 1"]:
        """Y of each row, which rounding leaves beside 1; `left` is what `left_by` gave."""
        return self.listed() if left is None or self.rest is None else self.listed() + self.rest.felt(left)

    def listed(self) -> Float[Tensor, "rows 1"]:
        """The sum of y over the classes that it names."""
        listed = self.probs.sum(1, keepdim=True)
        return listed if self.rest is None else listed + self.rest.weight

    def dot(self, logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows 1"]:
        """The sum of y times `logits` in each row, over the classes that it names."""
        if self.indices is None:
            return _row_dot(self.probs, logits)
        products = (self.probs * logits.gather(1, self.indices)).sum(1, keepdim=True)
        return products if self.rest is None else products + self.rest.weight * logits.gather(1, self.rest.observed)

    def left_by(self, probs: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows 1"] | None:
        """What `probs` give to all classes that are not at `indices`, where labels have a `rest`.

        Summed, and not taken from 1, which would leave nothing but rounding of a small remainder.
        """
        if self.rest is None or self.indices is None:
            return None
        ours = probs.gather(1, self.indices)
        left = probs.scatter_(1, self.indices, 0.0).sum(1, keepdim=True)
        probs.scatter_(1, self.indices, ours)
        return left

    def rest_loss(self, left: Float[Tensor, "rows 1"] | None) -> Float[Tensor, "rows 1"] | float:
        """The loss of what is not at `indices`, but for the class observed."""
        if left is None or self.rest is None:
            return 0.0
        return -self.rest.prob * left.clamp(min=torch.finfo(left.dtype).tiny).log()

    def subtract_from(
        self,
        probs: Float[Tensor, "rows classes"],
        factor: Float[Tensor, "rows 1"],
        left: Float[Tensor, "rows 1"] | None,
    ) -> None:
        """Take `factor` times y from `probs`, in place; `left` is what `left_by` gave for them."""
        if self.indices is None:
            probs.addcmul_(self.probs, factor, value=-1)
        elif left is None or self.rest is None:
            probs.scatter_add_(1, self.indices, -factor * self.probs)
        else:
            listed = probs.gather(1, self.indices) - factor * self.probs
            probs.mul_(1 - factor * _ratio(self.rest.felt(left), left)).scatter_(1, self.indices, listed)
            probs.scatter_add_(1, self.rest.observed, -factor * self.rest.weight)


@final
@dataclass(frozen=True, kw_only=True)
class FusedLosses:
    """L, which carries the graph, and what it consists of, which does not."""

    loss: Tensor
    ta: Tensor
    students: tuple[Tensor, ...]
    distill: tuple[Tensor, ...]


def fused_losses(
    ta: LinearLogits,
    students: Sequence[LinearLogits],
    labels: RowLabels,
    counts: Tensor,
    weights: LossWeights,
    *,
    chunk: int | None = None,
) -> FusedLosses:
    """The three losses of logits that are never whole in memory.

    Args:
        ta: Hidden states (rows, width) and head of the TA.
        students: Those of each Student.
        labels: In the type that the losses are computed in.
        counts: Which rows count in the mean, or the weight of each.
        weights: ω₁, ω₂ and ω₃.
        chunk: Rows at a time; by default some eight million logits.

    Raises:
        MattaError: on the backward pass, if it is run twice or is to be differentiated itself.
    """
    models = [ta, *students]
    inputs = list({id(each): each for model in models for each in (model.hidden, *model.parameters)}.values())
    wanted = [each for each in inputs if each.requires_grad] if torch.is_grad_enabled() else []
    with torch.no_grad(), torch.autocast(ta.hidden.device.type, enabled=False):
        gradients = {id(each): torch.zeros_like(each, dtype=labels.probs.dtype) for each in wanted}
        heads = [_Head(model, gradients) for model in models]
        rows = chunk or max(1, _CHUNK_ELEMENTS // ta.shape[-1])
        totals = _sum_over_chunks(heads, labels, counts, weights, rows)
        means = [total / divisor(counts.sum()) for total in totals]
    distill, plain = means[: len(students)], means[len(students) :]
    loss = weights.combine(plain[0], plain[1:], distill)
    if wanted:
        left = _Left(loss, gradients, divisor(counts.sum()))
        loss = _Attach.apply(left, *wanted)
    return FusedLosses(loss=loss, ta=plain[0], students=tuple(plain[1:]), distill=tuple(distill))


@final
class _Head:
    """Hidden states and head of one model, and the gradients that gather for them."""

    def __init__(self, source: LinearLogits, gradients: dict[int, Tensor]) -> None:
        self.hidden, self.weight = source.hidden.to(source.dtype), source.weight.to(source.dtype)
        self.bias = None if source.bias is None else source.bias.to(source.dtype)
        self.d_hidden, self.d_weight = gradients.get(id(source.hidden)), gradients.get(id(source.weight))
        self.d_bias = gradients.get(id(source.bias))
        self.learns = any(each is not None for each in (self.d_hidden, self.d_weight, self.d_bias))

    def logits_into(self, out: Tensor, rows: slice) -> None:
        """The logits of some rows."""
        hidden = self.hidden[rows]
        if out.dtype != self.weight.dtype:
            out.copy_(torch.nn.functional.linear(hidden, self.weight, self.bias))
        elif self.bias is None:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            torch.addmm(self.bias, hidden, self.weight.t(), out=out)
        if self.bias is not None:  # of -inf, it masks a class out; then 0 times its logit is 0
            out.clamp_(min=torch.finfo(out.dtype).min)

    def gather(self, d_logits: Tensor, scale: Tensor, rows: slice) -> None:
        """Add what the gradient `scale` times `d_logits` of some rows gives for the hidden states and the head."""
        narrow = d_logits.to(self.weight.dtype)
        if self.d_hidden is not None:
            self.d_hidden[rows].addcmul_((narrow @ self.weight).to(scale.dtype), scale)
        if self.d_weight is not None:
            scaled = self.hidden[rows] * scale
            if narrow.dtype == self.d_weight.dtype:
                self.d_weight.addmm_(narrow.t(), scaled.to(narrow.dtype))
            else:
                self.d_weight.add_(_narrow_product(narrow.t(), scaled))
        if self.d_bias is not None:
            self.d_bias.addmv_(d_logits.t(), scale.squeeze(1))


def _narrow_product(
    narrow: Float[Tensor, "classes rows"], wide: Float[Tensor, "rows width"]
) -> Float[Tensor, "classes width"]:
    """The product in the type of `narrow`, whose elements are 2 at most; a sum over many rows may leave float16."""
    if narrow.dtype != torch.float16:
        return narrow @ wide.to(narrow.dtype)
    most = 2.0 * len(wide) * wide.abs().amax()
    factor = torch.exp2(torch.log2(most / torch.finfo(narrow.dtype).max).ceil().clamp(min=0.0))
    return (narrow @ (wide / factor).to(narrow.dtype)).to(wide.dtype) * factor


def _sum_over_chunks(
    heads: Sequence[_Head], labels: RowLabels, counts: Tensor, weights: LossWeights, chunk: int
) -> Tensor:
    """Sums over the rows of L_D of each Student, L_TA and L_S of each Student; gradients are gathered."""
    num_rows, num_classes = heads[0].hidden.shape[0], heads[0].weight.shape[0]
    buffers = labels.probs.new_empty((2, min(chunk, num_rows), num_classes))
    totals = labels.probs.new_zeros(2 * len(heads) - 1)
    for start in range(0, num_rows, chunk):
        rows = slice(start, min(start + chunk, num_rows))
        ours, theirs = buffers[:, : rows.stop - start]
        step = _Chunk(rows, labels[rows], counts[rows].unsqueeze(1), weights)
        values = step.run(heads, ours, theirs)
        totals += (torch.cat(values, 1).masked_fill(step.counts == 0, 0.0) * step.counts).sum(0)
    return totals


@final
@dataclass(frozen=True)
class _Chunk:
    rows: slice
    labels: RowLabels
    counts: Tensor
    weights: LossWeights

    def run(self, heads: Sequence[_Head], student_buffer: Tensor, ta_buffer: Tensor) -> list[Tensor]:
        """The losses of each row, in the order of `_sum_over_chunks`."""
        ta, *students = heads
        ta.logits_into(ta_buffer, self.rows)
        ta_loss, listed = -self.labels.dot(ta_buffer), self.labels.listed()
        ta_loss += listed * _softmax_(ta_buffer)
        ta_left = self.labels.left_by(ta_buffer)
        ta_loss += self.labels.rest_loss(ta_left)
        distill_losses, student_losses = [], []
        for student in students:
            student.logits_into(student_buffer, self.rows)
            student_loss, distill = -self.labels.dot(student_buffer), -_row_dot(ta_buffer, student_buffer)
            log_total = _softmax_(student_buffer)
            left = self.labels.left_by(student_buffer)
            student_losses.append(student_loss + listed * log_total + self.labels.rest_loss(left))
            distill_losses.append(distill + log_total)
            if student.learns:
                self._gather_student(student, student_buffer, ta_buffer, left)
        if ta.learns:
            mass = self.labels.mass(ta_left)
            self.labels.subtract_from(ta_buffer, _ratio(torch.ones_like(mass), mass), ta_left)
            ta.gather(ta_buffer, self.counts * mass * self.weights.ta, self.rows)
        return [*distill_losses, ta_loss, *student_losses]

    def _gather_student(self, student: _Head, probs: Tensor, ta_probs: Tensor, left: Tensor | None) -> None:
        """With a = ω₁Y + ω₃: the gradient is a times (p_S − ω₁/a·y − ω₃/a·p_TA)."""
        scale = self.weights.student * self.labels.mass(left) + self.weights.distill
        self.labels.subtract_from(probs, _ratio(torch.full_like(scale, self.weights.student), scale), left)
        probs.addcmul_(ta_probs, _ratio(self.weights.distill.expand_as(scale), scale), value=-1)
        student.gather(probs, self.counts * scale, self.rows)


def _softmax_(logits: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows 1"]:
    """Turn logits into probabilities in place; gives the logarithm of what they were divided by."""
    top = logits.amax(1, keepdim=True)
    torch.softmax(logits, 1, out=logits)
    return top - logits.amax(1, keepdim=True).log()


def _row_dot(one: Float[Tensor, "rows classes"], other: Float[Tensor, "rows classes"]) -> Float[Tensor, "rows 1"]:
    strip = max(1, _STRIP_ELEMENTS // one.shape[1])
    products = [(a * b).sum(1) for a, b in zip(one.split(strip), other.split(strip), strict=True)]
    return torch.cat(products).unsqueeze(1)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient; zero over zero is zero: a loss without weight, a row without labels."""
    return torch.where(below == 0, 0.0, above / below)


@final
@dataclass(frozen=True)
class _Left:
    """What the forward pass leaves for the backward pass."""

    loss: Tensor
    gradients: dict[int, Tensor]
    count: Tensor


class _Attach(torch.autograd.Function):
    """Gives the loss its gradients."""

    @staticmethod
    def forward(ctx: Any, left: _Left, *wanted: Tensor) -> Tensor:
        ctx.gradients = [left.gradients[id(each)] for each in wanted]
        ctx.dtypes, ctx.count = [each.dtype for each in wanted], left.count
        return left.loss

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise MattaError(
                "received a backward pass that is to be differentiated itself (create_graph=True); expected a plain "
                "one: the fused losses keep no graph; give the objective fused=False"
            )
        if ctx.gradients is None:
            raise MattaError(
                "received a second backward pass through the fused losses; expected one, as its gradients are handed "
                "over; give the objective fused=False to run several"
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = gradient / ctx.count
        return None, *(each.mul_(factor).to(dtype) for each, dtype in zip(gradients, ctx.dtypes, strict=True))
