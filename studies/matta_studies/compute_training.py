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
from matta.objectives.losses import LossWeights
from matta.optim.shampoo import Shampoo
from matta.sizes.extraction import extract
from matta.sizes.submodels import live, random_sub_model
from matta.training.cotraining import CoTraining
from matta_studies.compute_tasks import NARROWEST, SIZES, WIDEST, Task, spec_of
from matta_studies.trials import Step, Trial, descend, step_of, step_of_pair

FAMILY, TOGETHER, RANDOM, SANDWICH = "family", "together", "random", "sandwich"
PRUNED, STAGES, ALONE = "pruned", "stages", "alone"
DISTILL_WEIGHT, RAMP = 0.5, 0.1  # ω₃, its ramp as a share of the steps
NEVER: Final = 2**30  # steps of a run that is only timed


@final
@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One way to train; rates fall to zero.

    `sizes` are those wanted; where one alone is trained, there is one. Before a family comes the Student alone, for a
    share of the passes and at a constant rate. Where the TA is trained first, each other size has `later_passes`, in
    the order of `sizes`.
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
        if self.way == FAMILY:
            told += f", {self.alone:g} of them the Student alone, in {self.student_chance:g} of the later steps too"
        if self.later_passes:
            told += f", then {min(self.later_passes):g} to {max(self.later_passes):g}"
        return told


def train(trial: Attempt, task: Task, seed: int) -> dict[str, nn.Module]:
    """A model of each size wanted."""
    return _train_stages(trial, task, seed) if trial.later_passes else _train_once(trial, task, seed)


def _train_once(trial: Attempt, task: Task, seed: int) -> dict[str, nn.Module]:
    """The sizes wanted, out of one co-training run; or one alone."""
    start = None
    if trial.way == FAMILY:
        first = replace(trial, way=ALONE, sizes=(NARROWEST,))
        start = _trained(first, task, seed, num_steps(trial.alone * trial.passes, trial, task), falls=False)
    steps = num_steps((1.0 - trial.alone) * trial.passes, trial, task)
    model = _trained(trial, task, seed, steps, start=start)
    if not isinstance(model, Nested):
        return {trial.sizes[0]: model}
    return {size: extract(model, spec_of(model, size)) for size in trial.sizes}


def _trained(
    trial: Attempt, task: Task, seed: int, steps: int, *, start: nn.Module | None = None, falls: bool = True
) -> nn.Module:
    """A model after so many steps; its Student starts as it is given."""
    model, descent = descent_of(trial, task, seed, steps, start=start, falls=falls)
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
        model, descent = later_descent(replace(trial, sizes=(size,)), task, seed, steps, ta=ta, start=start)
        for _ in descent:
            pass
        models[size] = model
    return models | {WIDEST: ta}


def descent_of(
    trial: Attempt, task: Task, seed: int, steps: int, *, start: nn.Module | None = None, falls: bool = True
) -> tuple[nn.Module, Iterator[Any]]:
    """A fresh model, or one whose Student starts as it is given, and the steps that train it."""
    torch.manual_seed(seed)
    if trial.way == ALONE:
        model = task.build(trial.sizes[0])
    else:
        model = task.nested(start or task.build(NARROWEST), warm_start=start is not None)
    return model, _descent(trial, task, model, loss_of(trial, task, model, seed, steps), seed, steps, falls=falls)


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


def loss_of(trial: Attempt, task: Task, model: nn.Module, seed: int, steps: int) -> Step:
    """What a way to train minimises."""
    objective = task.objective
    if not isinstance(model, Nested):
        return step_of(model, objective, Trial(method="baseline", optimizer="shampoo", lr=trial.lr), 0)
    if trial.way == FAMILY:
        cotrain = CoTraining.for_family(
            model,
            objective,
            num_steps=steps,
            wanted=[spec_of(model, size) for size in trial.sizes],
            alone=0.0,
            student_chance=trial.student_chance,
            distill=DISTILL_WEIGHT,
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
