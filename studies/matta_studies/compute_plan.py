"""What the study of the family at equal compute runs: arms, trials, and what each may spend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, final

from matta_studies.compute_tasks import NARROWEST, SIZES, WIDEST
from matta_studies.compute_training import (
    ALONE,
    DOWNWARDS,
    FAMILY,
    PRUNED,
    RANDOM,
    SANDWICH,
    STAGES,
    TOGETHER,
    Attempt,
)
from matta_studies.experiment import Arm, Plan
from matta_studies.labelled_films import TupleSettings
from matta_studies.study_settings import ComputeSettings
from matta_studies.tuning import Search

WANTED: Final[Mapping[int, tuple[str, ...]]] = {
    8: SIZES,
    4: (NARROWEST, "nww", "wnn", WIDEST),
    2: (NARROWEST, WIDEST),
}
WAYS: Final[Mapping[str, str]] = {
    TOGETHER: "MatTA, all in every step",
    RANDOM: "one random sub-model a step, labels alone",
    SANDWICH: "sandwich rule, in-place distillation",
    PRUNED: "TA first, then pruned and distilled",
    STAGES: "TA first, then distilled into new models",
}
PEERS: Final = (RANDOM, SANDWICH, PRUNED, STAGES, ALONE)
TA_SHARE: Final = 0.5  # of the time, where the TA is trained first
SHORT_ALONE: Final = 0.5  # of the passes, the TA alone, where data are short
LATER_SHARE: Final = 1 / 3  # passes of each later size, of those of the TA, where data are short
FIRST_FRESH_SEED: Final = 12_000
SEARCH: Final = Search(seeds=(100,), num_finalists=1)
COSTS, FLOPS = "costs", "flops"  # what the timing measures, in place of models
TIMED_STEPS: Final = 40


@final
@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is tried for a task; every arm has as many trials.

    `trials` are (batch, rate); `family_trials` (rate, share of the passes that train the Student alone, chance of the
    Student in later steps) at `family_batch`. `budget_passes` of MatTA with all in every step, at the first batch, are
    the time that every arm gets.

    Where data are short: the first `short_examples`, `short_trials` of (passes, weight decay) at one batch and rate.
    """

    trials: tuple[tuple[int, float], ...]
    family_trials: tuple[tuple[float, float, float], ...]
    family_batch: int
    budget_passes: float
    short_examples: int
    short_batch: int
    short_rate: float
    short_trials: tuple[tuple[float, float], ...]

    def with_examples(self, num_examples: int) -> Grid:
        """The grid for another number of examples: fewer steps to a pass take more passes, and more weight decay."""
        scale = self.short_examples / num_examples
        trials = tuple(
            (_two_digits(passes * math.sqrt(scale)), _two_digits(decay * scale)) for passes, decay in self.short_trials
        )
        return replace(self, short_examples=num_examples, short_trials=trials)

    @property
    def batches(self) -> tuple[int, ...]:
        """All batch sizes, each once."""
        return tuple(dict.fromkeys((*(batch for batch, _ in self.trials), self.family_batch)))


GRIDS: Final[Mapping[str, Grid]] = {
    "films": Grid(
        trials=((2048, 0.03), (2048, 0.045), (4096, 0.045), (4096, 0.06)),
        family_trials=((0.03, 0.6, 0.5), (0.045, 0.6, 0.5), (0.06, 0.6, 0.5), (0.045, 0.5, 0.3)),
        family_batch=4096,
        budget_passes=5.0,
        short_examples=100_000,
        short_batch=1024,
        short_rate=0.03,
        short_trials=((20.0, 0.1), (30.0, 0.03), (30.0, 0.1), (45.0, 0.1)),
    ),
    "flights": Grid(
        trials=((512, 0.01), (512, 0.02), (1024, 0.02), (1024, 0.04)),
        family_trials=((0.01, 0.6, 0.5), (0.02, 0.6, 0.5), (0.04, 0.6, 0.5), (0.02, 0.5, 0.3)),
        family_batch=512,
        budget_passes=1.0,
        short_examples=25_000,
        short_batch=512,
        short_rate=0.005,
        short_trials=((2.0, 0.1), (2.0, 0.5), (4.0, 0.1), (4.0, 0.5)),
    ),
    "text": Grid(
        trials=((8, 0.016), (8, 0.03), (16, 0.03), (16, 0.045)),
        family_trials=((0.016, 0.6, 0.5), (0.022, 0.6, 0.5), (0.03, 0.6, 0.5), (0.022, 0.5, 0.3)),
        family_batch=16,
        budget_passes=1.0,
        short_examples=725,
        short_batch=16,
        short_rate=0.016,
        short_trials=((12.0, 0.3), (18.0, 0.3), (24.0, 0.3), (24.0, 0.6)),
    ),
}
DATA, COMPUTE = "data", "compute"


@final
@dataclass(frozen=True, kw_only=True)
class Timing:
    """The job that measures what a pass costs, in place of an attempt."""

    num_steps: int
    grid: Grid


Costs = Mapping[str, float]
"""Processor seconds of a pass, by `cost_key`."""


def cost_key(way: str, batch: int, sizes: Sequence[str] = SIZES) -> str:
    """The name of what is timed; rates cost nothing. Of a family it is what follows the Student alone."""
    return f"{way} {'+'.join(sizes)} {batch}"


def timed(grid: Grid) -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """What is timed: the ways that train sizes together, and sizes alone, from the labels or also from a TA."""
    yield from ((FAMILY, grid.family_batch, sizes) for sizes in WANTED.values())
    for batch in grid.batches:
        yield from ((way, batch, SIZES) for way in (TOGETHER, RANDOM, SANDWICH))
        yield from ((way, batch, (size,)) for way in (ALONE, STAGES) for size in SIZES)


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """Processor seconds for an arm, and what passes cost: how many of them a way to train can afford."""

    grid: Grid
    seconds: float
    costs: Costs

    def attempts(self, way: str, sizes: tuple[str, ...]) -> tuple[Attempt, ...]:
        """The trials of an arm."""
        if way == FAMILY:
            return tuple(self._family(sizes, *trial) for trial in self.grid.family_trials)
        return tuple(self._attempt(way, sizes, *trial) for trial in self.grid.trials)

    def _attempt(self, way: str, sizes: tuple[str, ...], batch: int, lr: float) -> Attempt:
        attempt = Attempt(way=way, batch=batch, lr=lr, sizes=sizes)
        if way not in (PRUNED, STAGES):
            return replace(attempt, passes=self._passes(1.0, way, batch, sizes))
        others = [size for size in sizes if size != WIDEST]
        share = (1.0 - TA_SHARE) / len(others)
        later = tuple(self._passes(share, STAGES, batch, (size,)) for size in others)
        return replace(attempt, passes=self._passes(TA_SHARE, ALONE, batch, (WIDEST,)), later_passes=later)

    def _family(self, sizes: tuple[str, ...], lr: float, alone: float, chance: float) -> Attempt:
        batch = self.grid.family_batch
        first, second = self.costs[cost_key(ALONE, batch, (NARROWEST,))], self.costs[cost_key(FAMILY, batch, sizes)]
        passes = _two_digits(self.seconds / (alone * first + (1.0 - alone) * second))
        of_family = Attempt(way=FAMILY, batch=batch, lr=lr, alone=alone, sizes=sizes, passes=passes)
        return replace(of_family, student_chance=chance)

    def _passes(self, share: float, way: str, batch: int, sizes: Sequence[str]) -> float:
        return _two_digits(share * self.seconds / self.costs[cost_key(way, batch, sizes)])


def spent(trial: Attempt, costs: Costs) -> float:
    """What a run costs, from the costs of passes.

    Example:
        >>> costs = {cost_key(ALONE, 8, ("nnn",)): 2.0}
        >>> spent(Attempt(way=ALONE, batch=8, lr=0.1, sizes=("nnn",), passes=1.5), costs)
        3.0
    """
    if trial.way == FAMILY:
        first = costs[cost_key(ALONE, trial.batch, (NARROWEST,))]
        later = costs[cost_key(FAMILY, trial.batch, trial.sizes)]
        return trial.passes * (trial.alone * first + (1.0 - trial.alone) * later)
    if trial.later_passes:
        others = zip([size for size in trial.sizes if size != WIDEST], trial.later_passes, strict=True)
        later = sum(passes * costs[cost_key(STAGES, trial.batch, (size,))] for size, passes in others)
        return trial.passes * costs[cost_key(ALONE, trial.batch, (WIDEST,))] + later
    return trial.passes * costs[cost_key(trial.way, trial.batch, trial.sizes)]


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


def short_attempts(grid: Grid, way: str, sizes: tuple[str, ...] = SIZES) -> tuple[Attempt, ...]:
    """The trials of an arm where data are short."""
    attempts = []
    for passes, weight_decay in grid.short_trials:
        plain = Attempt(way=way, batch=grid.short_batch, lr=grid.short_rate, sizes=sizes, passes=passes)
        attempt = replace(plain, weight_decay=weight_decay)
        if way == DOWNWARDS:
            attempt = replace(attempt, alone=SHORT_ALONE, student_chance=0.3)
        if way in (PRUNED, STAGES):
            attempt = replace(attempt, later_passes=(_two_digits(LATER_SHARE * passes),) * (len(sizes) - 1))
        attempts.append(attempt)
    return tuple(attempts)


@final
@dataclass(frozen=True, kw_only=True)
class ComputePlan(Plan):
    """What `ComputeSettings` asks for, spelled out; where compute is short the arms follow from the costs.

    `setting` is how many examples there are; None: all.
    """

    task: str = "films"
    regime: str = COMPUTE
    arms: tuple[Arm, ...] = ()
    setting: Any = None
    first_seed: int = FIRST_FRESH_SEED
    search: Search | None = SEARCH
    grid: Grid = GRIDS["films"]
    tuples: TupleSettings = field(default_factory=TupleSettings)
    timed_steps: int = TIMED_STEPS

    @property
    def wanted(self) -> Mapping[int, tuple[str, ...]]:
        """The sizes wanted, by their number; it says nothing where only data are short."""
        return WANTED if self.regime == COMPUTE else {len(SIZES): SIZES}

    def with_costs(self, costs: Costs) -> ComputePlan:
        """The plan with its arms, whose passes all take the same time."""
        seconds = self.grid.budget_passes * costs[cost_key(TOGETHER, self.grid.trials[0][0])]
        whole = Budget(grid=self.grid, seconds=seconds, costs=costs)
        arms = [
            Arm(name=family(count), title=f"MatTA in turns, {count} wanted", trials=whole.attempts(FAMILY, sizes))
            for count, sizes in self.wanted.items()
        ]
        arms += [Arm(name=way, title=title, trials=whole.attempts(way, SIZES)) for way, title in WAYS.items()]
        for count, sizes in self.wanted.items():
            share = replace(whole, seconds=seconds / count)
            for size in sizes:
                title = f"alone, {count} wanted: {size}"
                arms.append(Arm(name=alone(count, size), title=title, trials=share.attempts(ALONE, (size,))))
        return replace(self, arms=tuple(arms))

    def with_short_data(self) -> ComputePlan:
        """The plan with its arms, each with as many passes as are best for it."""
        titles = {DOWNWARDS: "MatTA downwards", **WAYS}
        arms = [
            Arm(
                name=family(len(SIZES)) if way == DOWNWARDS else way, title=title, trials=short_attempts(self.grid, way)
            )
            for way, title in titles.items()
        ]
        arms += [
            Arm(name=alone(len(SIZES), size), title=f"alone: {size}", trials=short_attempts(self.grid, ALONE, (size,)))
            for size in SIZES
        ]
        return replace(self, arms=tuple(arms), setting=self.grid.short_examples)

    @property
    def num_runs(self) -> int:
        """Training runs in all, and the timing."""
        if self.regime == DATA:
            return self.with_short_data().num_arm_runs
        return self.with_costs({cost_key(*each): 1.0 for each in timed(self.grid)}).num_arm_runs + 1


def family(count: int) -> str:
    """The arm of a family of which so many sizes are wanted."""
    return f"{FAMILY} {count}"


def alone(count: int, size: str) -> str:
    """The arm of a size that is trained alone, for its share where so many are wanted."""
    return f"{ALONE} {count} {size}"


def plan_of(settings: ComputeSettings) -> ComputePlan:
    """The plan behind the settings of the command line."""
    grid = GRIDS[settings.data]
    if settings.examples is not None:
        grid = grid.with_examples(settings.examples)
    plan = ComputePlan(task=settings.data, regime=settings.short, num_seeds=settings.num_seeds, grid=grid)
    if not settings.quick:
        return plan
    small = replace(
        grid,
        budget_passes=grid.budget_passes / 20,
        short_trials=tuple((passes / 10, decay) for passes, decay in grid.short_trials),
    )
    few = Search(seeds=(100,), num_trials=1, num_finalists=1)
    return replace(plan, search=few, grid=small, timed_steps=5)
