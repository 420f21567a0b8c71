"""Is the family worth its compute: why not train each size for itself? In two regimes that are told apart.

*Compute is short*: data without end, and every arm gets the same processor time, which its own measured cost turns into
passes. Sizes alone share it among those wanted. *Data are short*: a fixed set, and every arm trains as long as is best
for it, with the weight decay that is best for it.

Where compute is short the family begins with the Student, trained alone; then it is nested, and each step trains the TA
and one other model (`CoTraining.for_family`). Where data are short it goes downwards: the TA is trained alone, its
channels are put in order (`matta.order`), each size starts as its best part (`warm_start="ta"`), and then come the same
steps, with the TA as it was for a Teacher. "Together" is the family with everything in every step. The peers are one
random sub-model a step on the labels alone (MatFormer), the sandwich rule with in-place distillation (slimmable
networks), a TA that is trained first and then pruned to each size by importance and distilled (Minitron), or distilled
into new models (two stages), and each size alone. Every arm is tuned with as many trials, on a validation part, and
runs with fresh seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any, Final, final

import torch
from rich.console import Console

from matta_studies.compute_tasks import NARROWEST, SIZES, WIDEST, Task, load_task, prepare
from matta_studies.compute_training import (
    ALONE,
    DOWNWARDS,
    FAMILY,
    NEVER,
    PRUNED,
    RANDOM,
    SANDWICH,
    STAGES,
    TOGETHER,
    Attempt,
    descent_of,
    later_descent,
    train,
)
from matta_studies.experiment import Arm, Found, Job, Measured, Plan, RunJobs, Training, conduct, plain
from matta_studies.intervals import Change, relative_change
from matta_studies.labelled_films import TupleSettings
from matta_studies.presentation import Notes, Part, Table, report, told_machine
from matta_studies.study_settings import ComputeSettings
from matta_studies.trials import count_parameters
from matta_studies.tuning import Search
from matta_studies.worker_pool import counted

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
COSTS: Final = "costs"  # what the timing measures, in place of models
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
        """The same for another number of short data: fewer steps to a pass take more passes, and more weight decay."""
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
        short_examples=2_900,
        short_batch=8,
        short_rate=0.011,
        short_trials=((6.0, 0.1), (12.0, 0.1), (12.0, 0.3), (24.0, 0.3)),
    ),
}
TITLES: Final[Mapping[str, str]] = {"films": "film ranker", "flights": "late flights", "text": "GPT-2 on bytes"}
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


def run_job(job: Job, task: Task) -> Measured:
    """Train and score every size wanted; or time all ways, in turn."""
    trial, num_examples = job.training.trial, job.training.setting
    if isinstance(trial, Timing):
        return {"tuning": 0.0, "models": {COSTS: measure_costs(task, trial.grid, trial.num_steps)}}
    of_run = task if num_examples is None else task.limited(num_examples)
    start = time.process_time()
    modules = train(trial, of_run, job.seed)
    seconds = time.process_time() - start
    models: dict[str, dict[str, Any]] = {
        size: {
            **task.losses(module.eval()),
            "parameters": count_parameters(module),
            "seconds": seconds,
            "widths": task.widths(size),
        }
        for size, module in modules.items()
    }
    return {"tuning": fmean(each["validation"] for each in models.values()), "models": models}


def measure_costs(task: Task, grid: Grid, num_steps: int) -> dict[str, float]:
    """Processor seconds of a pass by `cost_key`, all ways in turn: a step each, after as many that are not counted.

    The longest steps, such as those in which Shampoo computes its roots, are left out, the same for all.
    """
    torch.manual_seed(0)
    ta = task.build(WIDEST).eval()
    descents = {}
    for way, batch, sizes in timed(grid):
        trial = Attempt(way=way, batch=batch, lr=0.01, sizes=sizes, student_chance=grid.family_trials[0][2])
        if way == STAGES:
            made = later_descent(trial, task, 0, NEVER, ta=ta, start=None)
        else:
            made = descent_of(trial, task, 0, NEVER)
        descents[cost_key(way, batch, sizes)] = made[1]
    seconds: dict[str, list[float]] = {key: [] for key in descents}
    for _ in range(2 * num_steps):
        for key, descent in descents.items():
            start = time.process_time()
            next(descent)
            seconds[key].append(time.process_time() - start)
    batches = {cost_key(*each): each[1] for each in timed(grid)}
    return {key: fmean(_middle(each[num_steps:])) * task.num_examples / batches[key] for key, each in seconds.items()}


def _middle(seconds: Sequence[float]) -> Sequence[float]:
    """All but the longest eighth: steps differ by the model that they train, and some are disturbed."""
    return sorted(seconds)[: max(1, len(seconds) - len(seconds) // 8)]


def run(settings: ComputeSettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    plan = plan_of(settings)
    data, study = partial(prepare, plan.task, plan.tuples), partial(run_study, plan)
    return conduct("compute", settings.out, prepare=data, load=load_task, run_job=run_job, study=study)[1]


def run_study(plan: ComputePlan, run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
    """Time all ways if compute is short, tune, run the fresh seeds, report; all files are written to `folder`."""
    with counted(run_jobs, plan.num_runs, console) as run_counted:
        costs: Costs = {}
        if plan.regime == COMPUTE:
            timing = Training(trial=Timing(num_steps=plan.timed_steps, grid=plan.grid), setting=None)
            ((_, measured),) = run_counted([Job(training=timing, seed=0, whole=False)])
            costs = measured["models"][COSTS]
        with_arms = plan.with_costs(costs) if costs else plan.with_short_data()
        found = with_arms.run(run_counted, "test")
    results = results_of(plan, found, costs)
    report(results, told(results), folder, console)
    return results


def results_of(plan: ComputePlan, found: Found, costs: Costs) -> dict[str, Any]:
    """Everything that the study found, in types that JSON gives back as they are."""
    whole = family(len(SIZES))
    wanted = plan.wanted.items()
    changes = {
        str(count): _told({size: change(found, family(count), count, [size]) for size in sizes})
        for count, sizes in wanted
    }
    means = {
        "family_vs_alone_mean_percent": _told(
            {count: change(found, family(count), count, sizes) for count, sizes in wanted}
        ),
        "together_vs_alone_mean_percent": _told(
            {count: change(found, TOGETHER, count, sizes) for count, sizes in wanted}
        ),
    }
    volumes = {name: hypervolumes(found, name) for name in (whole, *WAYS, ALONE)}
    best = max(PEERS, key=lambda name: fmean(volumes[name]))
    # With some seed even the best peer may have nothing that is better than the Student alone: then there is no ratio.
    compared = (whole, TOGETHER) if min(volumes[best]) > 0 else ()
    ratios = {name: relative_change(volumes[name], volumes[best]) for name in compared}
    task = {"data": plan.task, "short": plan.regime, "examples": plan.grid.short_examples}
    results = {
        **task,
        "family_vs_alone_percent": changes,
        **means,
        "hypervolume_ratio": 1.0 + ratios[whole].mean / 100.0 if ratios else None,
        "hypervolume_change": _told(ratios),
        "best_peer": best,
        "hypervolume": {name: fmean(each) for name, each in volumes.items()},
        "worse_than_smaller": {name: worse_than_smaller(found, name) for name in (whole, TOGETHER)},
        "sizes": {size: found.measured[whole][0]["models"][size]["widths"] for size in SIZES},
        "parameters": parameters(found),
        "seconds": {arm: fmean(found.losses(arm, found.models(arm)[0], "seconds")) for arm in found.titles},
        "seconds_of_a_pass": dict(costs),
    }
    summary = found.summary({}, "validation")
    return plain({"losses": summary.pop("aucloss"), **summary, **results})


def parameters(found: Found) -> dict[str, int]:
    """The parameters of each size."""
    return {size: int(found.losses(family(len(SIZES)), size, "parameters")[0]) for size in SIZES}


def worse_than_smaller(found: Found, arm: str) -> list[str]:
    """Sizes of an arm that are worse than a smaller one of it beyond the interval of their difference."""
    counts = parameters(found)
    pairs = [(small, large) for small, large in product(SIZES, repeat=2) if counts[small] < counts[large]]
    changes = {pair: relative_change(found.losses(arm, pair[1]), found.losses(arm, pair[0])) for pair in pairs}
    return sorted({large for (_, large), each in changes.items() if each.low > 0})


def _told(changes: Mapping[Any, Change]) -> dict[str, Any]:
    return {str(name): change.to_json() for name, change in changes.items()}


def change(found: Found, arm: str, count: int, sizes: Sequence[str]) -> Change:
    """The mean loss of some sizes of an arm, against those sizes trained alone where `count` are wanted."""
    together = [found.losses(arm, size) for size in sizes]
    apart = [found.losses(alone(count, size), size) for size in sizes]
    return relative_change(
        [fmean(each) for each in zip(*together, strict=True)], [fmean(each) for each in zip(*apart, strict=True)]
    )


def hypervolumes(found: Found, name: str) -> list[float]:
    """By seed: how much of the plane of log size and loss is dominated by an arm's sizes, or by all those alone.

    The loss reaches up to that of the Student alone with that seed: what is worse is worth nothing. The size reaches
    one step beyond the TA's.
    """
    counts = parameters(found)
    sizes = sorted(SIZES, key=lambda size: counts[size])
    logs = [math.log(counts[size]) for size in sizes]
    arm_of = {size: alone(len(SIZES), size) if name == ALONE else name for size in SIZES}
    tops = found.losses(alone(len(SIZES), NARROWEST), NARROWEST)
    rows = zip(*(found.losses(arm_of[size], size) for size in sizes), strict=True)
    return [dominated(logs, losses, top) for losses, top in zip(rows, tops, strict=True)]


def dominated(sizes: Sequence[float], losses: Sequence[float], top: float) -> float:
    """The area between `top` and the least loss up to each size; the last size reaches as far as the one before it.

    Example:
        >>> dominated([0.0, 1.0, 3.0], [0.5, 0.6, 0.2], top=1.0)
        3.1
        >>> dominated([0.0, 1.0], [1.5, 0.5], top=1.0)
        0.5
    """
    widths = [after - before for before, after in pairwise(sizes)]
    best = [min(top, *losses[: index + 1]) for index in range(len(losses))]
    return sum(width * (top - loss) for width, loss in zip([*widths, widths[-1]], best, strict=True))


METRICS: Final[Mapping[str, tuple[str, float]]] = {
    "films": ("AucLoss x 1000", 1000.0),
    "flights": ("AucLoss x 1000", 1000.0),
    "text": ("bits per byte", 1.0),
}


def told(results: Mapping[str, Any]) -> list[Part]:
    """The tables as they stand in the documentation."""
    is_compute, counts = results["short"] == COMPUTE, [*map(int, results["family_vs_alone_percent"])]
    arms = [family(len(SIZES)), *WAYS, *(alone(count, "") for count in counts)]
    regime = (
        "Compute is short: every arm has the same processor time; sizes alone share it among as many as are wanted."
        if is_compute
        else f"Data are short: the first {results['examples']:,} examples, and every arm has the passes and the weight "
        f"decay that are best for it."
    )
    metric, _ = METRICS[results["data"]]
    examples = "" if is_compute else f" --examples {results['examples']}"
    command = f"matta study compute --data {results['data']} --short {results['short']}{examples}"
    short = "compute short" if is_compute else f"{results['examples']:,} examples"
    return [
        f"## The family against its sizes alone: {TITLES[results['data']]}, {short}",
        f"`{command} --seeds {results['num_seeds']}`; {told_machine(results['machine'])}. {regime}",
        Table(
            title=f"{metric} by size (less is better)",
            columns=("size", "parameters", *(_short(arm, _family_told(results)) for arm in arms)),
            rows=[_row(results, size, arms) for size in SIZES],
        ),
        Table(
            title="The family against each size alone",
            columns=("size", *(f"{count} wanted" for count in counts)),
            rows=[_change_row(results, size) for size in SIZES],
        ),
        Notes(notes(results)),
        Table(
            columns=("arm", "chosen on the validation part", "processor seconds"),
            rows=[
                (results["titles"][arm], each["told"], f"{results['seconds'][arm]:.1f}")
                for arm, each in results["chosen"].items()
            ],
        ),
    ]


def _family_told(results: Mapping[str, Any]) -> str:
    return "in turns" if results["short"] == COMPUTE else "downwards"


def _short(arm: str, of_family: str) -> str:
    if arm.startswith(ALONE):
        return f"alone, {arm.split()[1]} wanted"
    return WAYS.get(arm, f"MatTA {of_family}")


def _row(results: Mapping[str, Any], size: str, arms: Sequence[str]) -> tuple[str, ...]:
    scale = METRICS[results["data"]][1]
    losses = [results["losses"].get(f"{arm}{size}" if arm.startswith(ALONE) else arm, {}).get(size) for arm in arms]
    cells = ["–" if each is None else f"{scale * each['mean']:.{2 if scale > 1 else 4}f}" for each in losses]
    return (results["sizes"][size], f"{results['parameters'][size]:,}", *cells)


def _hypervolume_told(results: Mapping[str, Any]) -> str:
    peer, changes = WAYS.get(results["best_peer"], "each alone"), results["hypervolume_change"]
    if not changes:
        return f"Hypervolume: with some seed nothing of any peer's, of {peer} either, is better than the Student alone."
    told = [Change.told(changes[arm]) for arm in (family(len(SIZES)), TOGETHER)]
    return (
        f"Hypervolume of loss and log size against the best peer's ({peer}): {_family_told(results)} {told[0]}, all in "
        f"every step {told[1]} (more is better)."
    )


def _change_row(results: Mapping[str, Any], size: str) -> tuple[str, ...]:
    changes = [each.get(size) for each in results["family_vs_alone_percent"].values()]
    return (results["sizes"][size], *("–" if each is None else str(Change.told(each)) for each in changes))


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the tables say in words."""
    in_turns, together = (
        {count: Change.told(each) for count, each in results[f"{name}_vs_alone_mean_percent"].items()}
        for name in (FAMILY, TOGETHER)
    )
    shares = [each / results["seconds"][TOGETHER] for arm, each in results["seconds"].items() if ALONE not in arm]
    worse = [
        "; ".join(results["sizes"][size] for size in sizes) or "none"
        for sizes in results["worse_than_smaller"].values()
    ]
    lines = [
        *(
            f"{count} sizes wanted, their mean against each alone: {_family_told(results)} {each}, all in every step "
            f"{together[count]}."
            for count, each in in_turns.items()
        ),
        _hypervolume_told(results),
        f"Sizes that are worse than a smaller one beyond the interval: {_family_told(results)} {worse[0]}; all in "
        f"every step {worse[1]}.",
        f"Intervals: 95%, paired over {results['num_seeds']} fresh seeds.",
    ]
    if results["short"] == COMPUTE:
        lines.append(
            f"Processor seconds of the shared runs: {min(shares):.2f} to {max(shares):.2f} of those of MatTA with all "
            f"in every step."
        )
    return lines
