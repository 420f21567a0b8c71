"""Every way to train the sizes that the study of equal compute compares; rates fall to zero in all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from matta.nesting.batches import Batch, call, logits_of, split_labels
from matta.nesting.nested import Nested
from matta.nesting.ordering import order
from matta.objectives.losses import LossWeights
from matta.optim.shampoo import Shampoo
from matta.sizes.extraction import extract
from matta.sizes.submodels import live, random_sub_model
from matta.training.cotraining import CoTraining
from matta_studies.compute_tasks import NARROWEST, SIZES, WIDEST, Task, spec_of
from matta_studies.trials import Step, Trial, descend, step_of, step_of_pair

FAMILY, DOWNWARDS = "family", "downwards"
TOGETHER, RANDOM, SANDWICH = "together", "random", "sandwich"
PRUNED, STAGES, ALONE = "pruned", "stages", "alone"
DISTILL_WEIGHT, RAMP = 0.5, 0.1  # ω₃, its ramp as a share of the steps
TEACHER_LABELS: Final = 0.5  # what the labels weigh beside those of a Teacher
ORDERING_BATCHES: Final = 8
NEVER: Final = 2**30  # steps of a run that is only timed


@final
@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One way to train; rates fall to zero.

    `sizes` are those wanted; where one alone is trained, there is one. Before a family comes the Student alone, for a
    share of the passes and at a constant rate; or, downwards, the TA. Where the TA is trained first and then each other
    size for itself, these have `later_passes`, in the order of `sizes`.
    """

    way: str
    batch: int
    lr: float
    weight_decay: float = 0.0
    alone: float = 0.0
    student_chance: float = 1.0
    sizes: tuple[str, ...] = SIZES
    passes: float = 0.0
    later_passes: tuple[float, ...] = ()

    def __str__(self) -> str:
        told = f"batch {self.batch:,}, rate {self.lr:g}, {self.passes:g} passes"
        if self.weight_decay:
            told += f", weight decay {self.weight_decay:g}"
        if self.way in (FAMILY, DOWNWARDS):
            first = "Student" if self.way == FAMILY else "TA"
            told += (
                f", {self.alone:g} of them the {first} alone, then the Student in {self.student_chance:g} of the steps"
            )
        if self.later_passes:
            told += f", then {min(self.later_passes):g} to {max(self.later_passes):g}"
        return told


def train(trial: Attempt, task: Task, seed: int) -> dict[str, nn.Module]:
    """A model of each size wanted."""
    return _train_stages(trial, task, seed) if trial.later_passes else _train_once(trial, task, seed)


def _train_once(trial: Attempt, task: Task, seed: int) -> dict[str, nn.Module]:
    """The sizes wanted, out of one co-training run; or one alone."""
    student = ta = None
    steps_alone = num_steps(trial.alone * trial.passes, trial, task)
    if trial.way == FAMILY:
        first = replace(trial, way=ALONE, sizes=(NARROWEST,))
        student = _finished(descent_of(first, task, seed, steps_alone, falls=False))
    if trial.way == DOWNWARDS:
        first = replace(trial, way=ALONE, sizes=(WIDEST,))
        ta = _finished(descent_of(first, task, seed, steps_alone)).eval()
    steps = num_steps((1.0 - trial.alone) * trial.passes, trial, task)
    model = _finished(descent_of(trial, task, seed, steps, student=student, ta=ta))
    if not isinstance(model, Nested):
        return {trial.sizes[0]: model}
    return {size: extract(model, spec_of(model, size)) for size in trial.sizes}


def _ordered(ta: nn.Module, task: Task, seed: int) -> nn.Module:
    """A TA with what matters most in front, so that every size starts as its best part."""
    rows = task.pruning_rows // ORDERING_BATCHES
    batches = [*islice(task.batches(rows, torch.Generator().manual_seed(seed)), ORDERING_BATCHES)]
    return order(ta, example=batches[0], data=batches, importance="taylor", loss=task.objective)


def _finished(made: tuple[nn.Module, Iterator[Any]]) -> nn.Module:
    """A model after all of its steps."""
    model, descent = made
    for _ in descent:
        pass
    return model


def num_steps(passes: float, trial: Attempt, task: Task) -> int:
    """Steps in so many passes."""
    return max(1, round(passes * task.num_examples / trial.batch))


def _train_stages(trial: Attempt, task: Task, seed: int) -> dict[str, nn.Module]:
    """The TA alone, then each smaller size for itself on the labels and the TA; pruned ones start as parts of it."""
    first = replace(trial, way=ALONE, sizes=(WIDEST,), later_passes=())
    ta = _train_once(first, task, seed)[WIDEST].eval()
    models: dict[str, nn.Module] = {}
    others = [size for size in trial.sizes if size != WIDEST]
    for size, passes in zip(others, trial.later_passes, strict=True):
        start = task.pruned(ta, size) if trial.way == PRUNED else None
        steps = num_steps(passes, trial, task)
        models[size] = _finished(later_descent(replace(trial, sizes=(size,)), task, seed, steps, ta=ta, start=start))
    return models | {WIDEST: ta}


def descent_of(
    trial: Attempt,
    task: Task,
    seed: int,
    steps: int,
    *,
    student: nn.Module | None = None,
    ta: nn.Module | None = None,
    falls: bool = True,
) -> tuple[nn.Module, Iterator[Any]]:
    """A fresh model, or a pair that starts from a trained Student or TA, and the steps that train it.

    The trained TA is the Teacher of the pair as well.
    """
    torch.manual_seed(seed)
    if trial.way == ALONE:
        model = task.build(trial.sizes[0])
    elif ta is not None:
        model = task.nested(task.build(NARROWEST), ta=_ordered(ta, task, seed), warm_start="ta")
    else:
        model = task.nested(student or task.build(NARROWEST), warm_start=student is not None)
    loss = loss_of(trial, task, model, seed, steps, teacher=ta)
    return model, _descent(trial, task, model, loss, seed, steps, falls=falls)


def later_descent(
    trial: Attempt, task: Task, seed: int, steps: int, *, ta: nn.Module, start: nn.Module | None
) -> tuple[nn.Module, Iterator[Any]]:
    """A model of one size, fresh or as it is given, and the steps that train it on the labels and the TA."""
    torch.manual_seed(seed)
    model = start or task.build(trial.sizes[0])
    weights = LossWeights(student=1.0, ta=0.0, distill=torch.tensor(DISTILL_WEIGHT))

    def step(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        inputs, labels = split_labels(batch)
        with torch.no_grad():
            taught = logits_of(call(ta, inputs))
        logits = logits_of(call(model, inputs))
        return task.objective.joint([logits], taught, labels, weights).loss, lambda: [logits.detach()]

    return model, _descent(trial, task, model.train(), step, seed, steps)


def _descent(
    trial: Attempt, task: Task, model: nn.Module, step: Step, seed: int, steps: int, *, falls: bool = True
) -> Iterator[Callable[[], list[Tensor]]]:
    batches = islice(task.batches(trial.batch, torch.Generator().manual_seed(seed)), steps)
    warm_up = task.warm_up * min(steps, NEVER)

    def rate(done: int) -> float:
        return min(1.0, (done + 1) / max(warm_up, 1.0)) * (1.0 - done / steps if falls else 1.0)

    return descend(step, Shampoo(model, lr=trial.lr, weight_decay=trial.weight_decay), rate, batches)


def loss_of(
    trial: Attempt, task: Task, model: nn.Module, seed: int, steps: int, *, teacher: nn.Module | None = None
) -> Step:
    """What a way to train minimises."""
    objective = task.objective
    if not isinstance(model, Nested):
        return step_of(model, objective, Trial(method="baseline", optimizer="shampoo", lr=trial.lr), 0)
    if trial.way in (FAMILY, DOWNWARDS):
        cotrain = CoTraining.for_family(
            model,
            objective,
            num_steps=steps,
            wanted=[spec_of(model, size) for size in trial.sizes],
            alone=0.0,
            student_chance=trial.student_chance,
            distill=DISTILL_WEIGHT,
            teacher=teacher,
            labels=0.0 if teacher is None else TEACHER_LABELS,
        )
        return step_of_pair(cotrain)
    if trial.way == TOGETHER:
        pair = Trial(method="matta", optimizer="shampoo", lr=trial.lr, distill_weight=DISTILL_WEIGHT)
        between = random_sub_model(model, [spec_of(model, size) for size in SIZES[1:-1]])
        return step_of(model, objective, pair, int(RAMP * steps), between)
    return _one_random(task, model, seed) if trial.way == RANDOM else _sandwich(task, model, seed)


def _one_random(task: Task, model: Nested, seed: int) -> Step:
    modules, random = _live(model), Random(seed)

    def step(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        inputs, labels = split_labels(batch)
        logits = logits_of(call(modules[random.choice(SIZES)], inputs))
        return task.objective.cross_entropy(logits, labels), lambda: [logits.detach()]

    return step


def _sandwich(task: Task, model: Nested, seed: int) -> Step:
    """The TA on the labels; the Student and one size between on the TA."""
    modules, random = _live(model), Random(seed)
    weights = LossWeights(student=0.0, ta=1.0, distill=torch.tensor(1.0))

    def step(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        inputs, labels = split_labels(batch)
        sizes = (WIDEST, NARROWEST, random.choice(SIZES[1:-1]))
        ta, *logits = (logits_of(call(modules[size], inputs)) for size in sizes)
        return task.objective.joint(logits, ta, labels, weights).loss, lambda: [logits[0].detach(), ta.detach()]

    return step


def _live(model: Nested) -> dict[str, nn.Module]:
    return {size: live(model, spec_of(model, size)).train() for size in SIZES}
