"""Train Students and Teaching Assistant together by the three losses (3.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from random import Random
from types import NoneType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from matta.errors import MattaError, require_kind
from matta.nesting.batches import Batch, call, logits_of
from matta.nesting.nested import Nested, require_nested
from matta.nesting.sharded_slices import follow_shards
from matta.objectives.classification import CausalLM
from matta.objectives.heads import deferring
from matta.objectives.labels import Labels
from matta.objectives.losses import LossWeights, divisor
from matta.objectives.objective import Joint, Losses, Objective
from matta.sizes.submodels import SubModel, live, random_sub_model, sizes_between, without_ends
from matta.training.known_step import KnownStep
from matta.training.loss_schedule import Ramp, Turns, Weights
from matta.training.processes import num_processes, summed
from matta.training.step_labels import Teachers, as_teachers, has_labels, refuse_shifted_twice, weighted_batch
from matta.training.step_output import CoTrainingOutput, kept_logits


@dataclass(frozen=True, kw_only=True)
class _Cast:
    """What a step trains: the TA, the Students, and a sub-model that stands beside or in for them."""

    ta: bool = True
    students: bool = True
    sampled: tuple[nn.Module, ...] = ()


_MOST_LIVE = 16  # sub-models that are kept to be sampled again; of N layers there are 2ᴺ


def _detached(losses: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(each.detach() for each in losses)


def _of_heads(losses: Losses, cast: _Cast) -> Tensor | None:
    """L_S of the first Student, L_TA and L_D by head; NaN where a model takes no part."""
    if not losses.heads:
        return None
    absent = torch.full_like(losses.ta.detach(), float("nan"))
    rows = [
        (
            head.students[0] if cast.students else absent,
            head.ta if cast.ta else absent,
            head.distill[0] if cast.students and cast.ta else absent,
        )
        for head in losses.heads
    ]
    return torch.stack([torch.stack(_detached(row)) for row in rows], dim=1)


def _on_device(count: float | Tensor, device: torch.device) -> Tensor:
    """A count as a tensor; a number is filled in on the device, since copying it there would make the host wait."""
    return count.to(device) if isinstance(count, Tensor) else torch.full((), count, device=device)


def _share(joint: Joint, count: Tensor, total: float | Tensor | None) -> Tensor:
    """The mean over `count` labels as its part of the mean over `total`; the same bits if they are as many."""
    if total is None:
        return joint.loss
    mean = joint.loss if joint.parts is None else joint.parts
    return (mean / (_on_device(total, mean.device).to(mean.dtype) / divisor(count))).sum()


@final
class CoTraining(nn.Module):
    """The training step's forward: L = ω₁·L_S + ω₂·L_TA + ω₃·ramp(t)·L_D.

    One forward and one backward for the whole pair, so that DDP and FSDP see one module. Each
    forward in training mode advances `step`, which the ramp reads and which is saved with the
    state.

    Where labels are ignored, or batches differ in size, the mean of the batches' means is not that of the step.
    A loop that accumulates batches, or runs in several processes, therefore counts the labels of the whole step
    with `num_labels` and passes the number with each batch, as `matta.fit` does, in place of dividing the loss:

        num_labels = cotrain.num_labels(batches)
        for batch in batches:
            cotrain(batch, num_labels=num_labels).loss.backward()

    Args:
        nested: The pair; pass its parameters to the optimizer.
        objective: How logits and labels become losses.
        weights: ω₁, ω₂ and ω₃; with several Students they hold for each.
        ramp: When L_D comes in; None is from the start.
        teacher: A module that labels each batch, without gradient and in eval mode, or several, of whose
            labels (probabilities or values) the mean is taken. It is moved along by `to`, but is no part of
            the parameters or the state. Labels of the batch are then used only for the positions that they
            ignore, and as `labels` says.
        temperature: What a Teacher's logits are divided by, before they become probabilities.
        labels: What the labels of the batch weigh beside a Teacher's, from 0 (the Teacher's alone) to 1: L_S and L_TA
            are those of labels·y + (1 − labels)·y_Teacher.
        logits: Where the logits are in what the modules return: the name of a field, or a function of the output;
            None: a tensor, `.logits`, or the key "logits".
        sample: Draws a sub-model for each step, which is trained as one more Student. Under `torch.compile` each that
            is drawn has a graph of its own, up to torch's `recompile_limit` (8 by default); the others run uncompiled.
        turns: Which of the models a step trains; None: all of them.
        accumulate: Forwards to one optimizer step.

    Raises:
        MattaError: no nesting, no objective (its class, say), weights that are no field's name, a Teacher that is no
            module, fewer than one forward to a step, or temperature and labels that are out of range, or without a
            Teacher that can use them.

    Example:
        >>> import matta
        >>> nested = matta.nest(nn.Linear(4, 1), nn.Linear(4, 1))
        >>> out = CoTraining(nested, matta.objectives.Binary())((torch.zeros(2, 4), torch.ones(2)))
        >>> out.loss.backward(); out.student_loss == out.ta_loss
        tensor(True)
    """

    def __init__(
        self,
        nested: Nested,
        objective: Objective,
        *,
        weights: Weights | None = None,
        ramp: Ramp | None = None,
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        temperature: float = 1.0,
        labels: float = 0.0,
        logits: str | Callable[[Any], Any] | None = None,
        sample: Callable[[Random], SubModel] | None = None,
        turns: Turns | None = None,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        require_nested(nested)
        require_kind("objective", objective, Objective, "such as matta.objectives.Binary()")
        require_kind(
            "weights", objective.weights, (str, NoneType), "the name of the field of the batch that holds them"
        )
        for name, found, kind in (("weights", weights, Weights), ("ramp", ramp, Ramp), ("turns", turns, Turns)):
            require_kind(name, found, (kind, NoneType), f"a matta.{kind.__name__}, or None")
        if not isinstance(accumulate, int) or accumulate < 1:
            raise MattaError(f"received accumulate={accumulate!r}; expected a whole number from 1 up")
        if temperature != 1.0 and not objective.makes_probabilities:
            raise MattaError(
                f"received temperature={temperature} and {objective!r}, whose Teacher gives no probabilities; expected "
                f"temperature=1.0"
            )
        self.nested = nested
        self.objective = objective
        self.logits = logits
        self.weights = weights or Weights()
        self.ramp = ramp
        self.sample = sample
        self.turns = turns
        self.accumulate = accumulate
        self.teachers = Teachers(modules=as_teachers(teacher), temperature=temperature, labels=labels)
        self._live: dict[SubModel, nn.Module] = {}
        self._has_shift_to_check = isinstance(objective, CausalLM)
        self._known_step = KnownStep()
        self.step: Tensor
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @classmethod
    def for_family(
        cls,
        nested: Nested,
        objective: Objective,
        *,
        num_steps: int,
        wanted: Sequence[SubModel] | None = None,
        alone: float = 0.5,
        student_chance: float = 0.3,
        distill: float = 0.5,
        teacher: nn.Module | Sequence[nn.Module] | None = None,
        labels: float = 0.0,
    ) -> CoTraining:
        """The training that gives the best family for its compute, or from few data (`matta study compute`).

        Where data are without end: the Student alone for a share of the steps, then the TA and one other model a step
        (see `Turns`). Nest with `warm_start=True`; keep the learning rate while the Student is alone and let it fall to
        zero after that.

        Where data are short: train the TA first, put it in order (`matta.order`), nest with `warm_start="ta"`, and
        take `alone=0`, the trained TA as the Teacher, and `labels=0.5`.

        Where each event can be used once, `CoTraining(sample=...)`, with everything in every step, was better.

        Args:
            nested: The pair.
            objective: How logits and labels become losses.
            num_steps: Optimizer steps of the whole run.
            wanted: The sizes that you want; None: all mixtures of wide and narrow layers.
            alone: Share of the steps that train the Student alone.
            student_chance: Of a later step, to train the Student and not a size between.
            distill: ω₃.
            teacher: As in the constructor.
            labels: As in the constructor.

        Raises:
            MattaError: a share or a chance outside of 0 to 1, or as in the constructor.

        Example:
            >>> import matta
            >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
            >>> nested = matta.nest(tower(4), tower(8), warm_start=True)
            >>> CoTraining.for_family(nested, matta.objectives.Binary(), num_steps=1000).turns
            Turns(alone_steps=500, student_chance=0.3)
        """
        if not 0 <= alone <= 1:
            raise MattaError(f"received alone={alone}; expected a share of the steps, from 0 to 1")
        between = sizes_between(nested) if wanted is None else without_ends(nested, wanted)
        return cls(
            nested,
            objective,
            weights=Weights(distill=distill),
            teacher=teacher,
            labels=labels,
            sample=None if between == [] else random_sub_model(nested, between),
            turns=Turns(alone_steps=int(alone * num_steps), student_chance=student_chance),
        )

    @property
    def has_teacher(self) -> bool:
        """Whether a Teacher labels the batches."""
        return bool(self.teachers.modules)

    def count_by(self, accumulate: int, *, is_counted: bool = False) -> None:
        """Another number of forwards to a step, at the same optimizer step; `is_counted`: `step` is in it already."""
        if accumulate != self.accumulate and not is_counted:
            self.step.mul_(accumulate).div_(self.accumulate, rounding_mode="floor")
        self.accumulate = accumulate

    def num_labels(self, batches: Iterable[Batch]) -> Tensor:
        """The labels that count in the batches of an optimizer step, or the sum of their weights, for `forward`.

        In several processes, which must all call this, it is the mean of their numbers: DDP and FSDP then average
        the gradients. A batch without labels is given to the Teacher to be counted, and once more in `forward`.

        Raises:
            LabelError: labels are missing.
        """
        total = torch.zeros_like(self.step)
        for batch in batches:
            inputs, labels = weighted_batch(batch, self.objective)
            total = total + self._num_counted(labels, None if has_labels(labels) else self._labels(inputs, labels))
        total = divisor(summed(total))
        return total if num_processes() == 1 else total.double() / num_processes()

    def forward(self, batch: Batch, *, num_labels: float | Tensor | None = None) -> CoTrainingOutput:
        """The losses of a batch; with `num_labels`, those of the whole step, `loss` is divided by them.

        Raises:
            LabelError: labels are missing, do not fit the logits, or would be shifted twice.
            MattaError: `num_labels` is a number that is not over 0.
        """
        if not isinstance(num_labels, Tensor | NoneType) and not num_labels > 0:
            raise MattaError(f"received num_labels={num_labels}; expected a number over 0, as cotrain.num_labels gives")
        inputs, given = weighted_batch(batch, self.objective)
        if self._has_shift_to_check and not torch.compiler.is_compiling():
            self._has_shift_to_check = False
            refuse_shifted_twice(inputs, given)
        labels = self._labels(inputs, given)
        cast = self._cast()
        own = list(self.nested.students)
        models = [*([self.nested.ta] if cast.ta else []), *(own if cast.students else []), *cast.sampled]
        follow_shards(models, self.nested.ta)
        logits = self._logits(models, inputs, labels)
        weight = self._distill_weight(logits[0])
        num_counted = _on_device(self._num_counted(given, labels), weight.device)
        joint = self._joint(cast, logits, labels, weight, lambda each: _share(each, num_counted, num_labels))
        if self.training:
            self._known_step.advance(self.step)
        losses, absent = joint.losses, (torch.full_like(joint.loss.detach(), float("nan")),) * len(own)
        of_students = logits[int(cast.ta) :][: len(own)] if cast.students else [None] * len(own)
        return CoTrainingOutput(
            loss=joint.loss,
            ta_loss=losses.ta.detach() if cast.ta else absent[0],
            distill_weight=weight,
            student_losses=_detached(losses.students[: len(own)]) if cast.students else absent,
            distill_losses=_detached(losses.distill[: len(own)]) if cast.students and cast.ta else absent,
            logits=tuple(kept_logits(each) for each in (logits[0] if cast.ta else None, *of_students)),
            num_labels=num_counted,
            weights=LossWeights(student=self.weights.student, ta=self.weights.ta, distill=weight),
            num_students=len(logits) - int(cast.ta),
            head_losses=_of_heads(losses, cast),
            trains_ta=cast.ta,
            trains_students=cast.students,
        )

    def _joint(
        self, cast: _Cast, logits: list[Any], labels: Labels, weight: Tensor, share: Callable[[Joint], Tensor]
    ) -> Joint:
        """L of the models that take part; of Students alone it is the sum of their cross-entropies, times ω₁."""
        if cast.ta:
            weights = LossWeights(student=self.weights.student, ta=self.weights.ta, distill=weight)
            ta, *students = logits
            joint = self.objective.joint(students, ta, labels, weights)
            joint = replace(joint, loss=share(joint))
        else:
            weights = LossWeights(student=0.0, ta=self.weights.student, distill=torch.zeros_like(weight))
            alone = [self.objective.joint([], each, labels, weights) for each in logits]
            heads = tuple(Losses(students=(head.ta,), ta=head.ta, distill=()) for head in alone[0].losses.heads)
            of_students = tuple(each.losses.ta for each in alone)
            losses = Losses(students=of_students, ta=of_students[0], distill=(), heads=heads)
            joint = Joint(loss=torch.stack([share(each) for each in alone]).sum(), losses=losses)
        idle = self._idle_parameters(cast)
        here = [each.to_local() if hasattr(each, "to_local") else each for each in idle]
        return replace(joint, loss=joint.loss + sum(each.flatten()[:0].sum() for each in here)) if idle else joint

    def _idle_parameters(self, cast: _Cast) -> list[nn.Parameter]:
        """Trainable parameters that no model of the step has: DDP expects a gradient for each."""
        if cast.ta and cast.students:
            return []
        if cast.ta:  # of a Student's parameters only the private ones are its own
            idle = [each for student in self.nested.students for each in student.parameters()]
        else:
            idle = [self.nested.ta.get_parameter(name) for name in self._of_the_ta_alone]
        return [each for each in idle if each.requires_grad]

    @cached_property
    def _of_the_ta_alone(self) -> tuple[str, ...]:
        """The TA's parameters in which no Student has a part, by name."""
        sources = (self.nested.sources(index) for index in range(len(self.nested.students)))
        shared = {each.key[0] for found in sources for each in found.values()}
        return tuple(name for name, each in self.nested.ta.named_parameters() if id(each) not in shared)

    def _num_counted(self, given: Any, labels: Labels | None) -> int | Tensor:
        """The labels of a batch that count: by its own where it has some, which a Teacher's follow."""
        return self.objective.num_counted(given if has_labels(given) else labels)  # type: ignore[arg-type]

    def read(self, output: Any) -> Any:
        """The logits in what a module returned, as `logits` says; a mapping of them for an objective of several heads.

        Raises:
            LabelError: there are none.
        """
        return logits_of(output, self.logits, self.objective.outputs)

    def _logits(self, models: Sequence[nn.Module], inputs: Any, labels: Labels) -> list[Any]:
        """The logits of each model; those of large heads are put off, for the objective to fuse with its losses."""
        least = None if torch.compiler.is_compiling() else self.objective.least_deferred(labels)
        with nullcontext() if least is None else deferring(models, least):
            return [self.read(call(model, inputs)) for model in models]

    def _labels(self, inputs: Any, labels: Any) -> Labels:
        return self.teachers.label(inputs, labels, self.objective, self.read)

    def _distill_weight(self, outputs: Any) -> Tensor:
        """ω₃·ramp(t), in the type of the losses, where they are."""
        logits = next(each for each in tree_leaves(outputs) if isinstance(each, Tensor))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        if self.ramp is None:
            return torch.full((), self.weights.distill, dtype=dtype, device=logits.device)
        return self.weights.distill * self.ramp.at_tensor(self.step // self.accumulate, dtype)

    def _cast(self) -> _Cast:
        """What this step trains; the same in all its batches and on every process, and again after a resume."""
        if not self.training or (self.sample is None and self.turns is None):
            return _Cast()
        return self._draw()

    @torch.compiler.disable  # it reads the step and makes modules; what it gives is compiled, one graph for each
    def _draw(self) -> _Cast:
        step = self._known_step.read(self.step) // self.accumulate
        if self.turns is not None and step < self.turns.alone_steps:
            return _Cast(ta=False)
        if self.sample is None:
            return _Cast()
        random = Random(step)
        students = self.turns is None or random.random() < self.turns.student_chance
        if students and self.turns is not None:
            return _Cast()
        return _Cast(students=students, sampled=(self._live_of(self.sample(random)),))

    def _live_of(self, spec: SubModel) -> nn.Module:
        """The sampled sub-model, which is kept to be sampled again."""
        made = self._live.pop(spec, None)
        if made is None:
            made = live(self.nested, spec)
        if len(self._live) >= _MOST_LIVE:
            del self._live[next(iter(self._live))]
        self._live[spec] = made
        return made.train()

    def _apply(self, fn: Any, recurse: bool = True) -> CoTraining:
        super()._apply(fn, recurse)
        for extra in (*self.teachers.modules, *self._live.values()):
            extra._apply(fn)
        return self
