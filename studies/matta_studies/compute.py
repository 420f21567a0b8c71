"""The family at equal compute: why not train each size for itself? A film ranker, soft labels, more data than time.

Every arm gets the same processor time, which its own measured cost turns into passes. The family is one co-training
run; "turns" is a cheaper form of it that trains the TA and one other model in each step. Its peers are one random
sub-model a step on the labels alone (MatFormer), the sandwich rule with in-place distillation (slimmable networks),
and each size alone, which shares the time with the other sizes wanted. Every arm is tuned with as many trials, on a
validation part, and runs with fresh seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice, pairwise, product
from pathlib import Path
from random import Random
from statistics import fmean, median
from typing import Any, Final, final

import torch
from rich.console import Console
from torch import Tensor, nn

from matta.family.extraction import extract
from matta.family.submodels import SubModel, layer_names, live, random_sub_model
from matta.nesting.batches import Batch, call, split_labels
from matta.nesting.nested import Nested
from matta.objectives.losses import LossWeights
from matta.objectives.objective import Binary
from matta.optim.shampoo import Shampoo
from matta.training.cotraining import Ramp
from matta_studies.experiment import Arm, Found, Job, Measured, Plan, RunJobs, Training, conduct, plain
from matta_studies.intervals import Change, relative_change
from matta_studies.labelled_films import RelevanceData, TupleSettings
from matta_studies.presentation import Notes, Part, Table, report, told_machine
from matta_studies.rankers import Ranker, RankerSize, nest_rankers
from matta_studies.relevance import STUDENT_SIZE, copy_data, read_data, tuples_loss
from matta_studies.study_settings import ComputeSettings
from matta_studies.trials import Step, Trial, count_parameters, descend, step_of
from matta_studies.tuning import Search
from matta_studies.worker_pool import counted

SIZES: Final = tuple("".join(each) for each in product("nw", repeat=3))  # embeddings and two hidden layers
WANTED: Final[Mapping[int, tuple[str, ...]]] = {8: SIZES, 4: ("nnn", "nww", "wnn", "www"), 2: ("nnn", "www")}
FAMILY, TURNS, RANDOM, SANDWICH, ALONE = "family", "turns", "random", "sandwich", "alone"
OURS, PEERS = (FAMILY, TURNS), (RANDOM, SANDWICH, ALONE)
WAYS: Final[Mapping[str, str]] = {
    FAMILY: "MatTA, a random sub-model along",
    TURNS: "MatTA in turns: the TA, and the Student or a random sub-model",
    RANDOM: "one random sub-model a step, labels alone",
    SANDWICH: "sandwich rule, in-place distillation",
}
RATES: Final = ((2048, 0.045), (2048, 0.06), (4096, 0.06), (4096, 0.09))  # (batch, rate): the trials of every arm
FAMILY_PASSES: Final = 9.0  # of the family at the first batch: the compute that every arm gets
FIRST_FRESH_SEED: Final = 12_000
SEARCH: Final = Search(seeds=(100,), num_finalists=1)
DISTILL_WEIGHT, RAMP, STUDENT_CHANCE = 0.5, 0.1, 0.3  # ω₃, its ramp as a share of the steps; of the Student in turns
COSTS: Final = "costs"  # what the timing measures, in place of models
TIMED_STEPS: Final = 40


@final
@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One way to train, for so many passes; `size` is what is trained alone."""

    way: str
    batch: int
    lr: float
    size: str = ""
    passes: float = 0.0

    def __str__(self) -> str:
        return f"batch {self.batch:,}, rate {self.lr:g}, {self.passes:g} passes"


@final
@dataclass(frozen=True, kw_only=True)
class Timing:
    """The job that measures what a pass costs, in place of an attempt."""

    num_steps: int


Costs = Mapping[str, float]
"""Processor seconds of a pass, by `cost_key`."""


def cost_key(way: str, batch: int, size: str = "") -> str:
    """The name of what is timed; rates cost nothing."""
    return f"{way} {size} {batch}"


@final
@dataclass(frozen=True, kw_only=True)
class ComputePlan(Plan):
    """What `ComputeSettings` asks for, spelled out; the arms follow from the costs."""

    arms: tuple[Arm, ...] = ()
    setting: Any = STUDENT_SIZE
    first_seed: int = FIRST_FRESH_SEED
    search: Search | None = SEARCH
    family_passes: float = FAMILY_PASSES
    tuples: TupleSettings = field(default_factory=TupleSettings)
    timing: Timing = field(default_factory=lambda: Timing(num_steps=TIMED_STEPS))

    def with_costs(self, costs: Costs) -> ComputePlan:
        """The plan with its arms, whose passes all take the same time."""
        budget = self.family_passes * costs[cost_key(FAMILY, RATES[0][0])]

        def attempts(way: str, size: str = "", shares: int = 1) -> tuple[Attempt, ...]:
            found = []
            for batch, rate in RATES:
                passes = float(f"{budget / shares / costs[cost_key(way, batch, size)]:.2g}")
                found.append(Attempt(way=way, size=size, batch=batch, lr=rate, passes=passes))
            return tuple(found)

        arms = [Arm(name=way, title=title, trials=attempts(way)) for way, title in WAYS.items()]
        arms += [
            Arm(name=alone(count, size), title=f"alone, {count} wanted: {size}", trials=attempts(ALONE, size, count))
            for count, sizes in WANTED.items()
            for size in sizes
        ]
        return replace(self, arms=tuple(arms))

    @property
    def num_runs(self) -> int:
        """Training runs in all, and the timing."""
        costs = {cost_key(way, batch, size): 1.0 for way, batch, size in timed()}
        return self.with_costs(costs).num_arm_runs + 1


def alone(count: int, size: str) -> str:
    """The arm of a size that is trained alone, for its share where so many are wanted."""
    return f"{ALONE} {count} {size}"


def timed() -> Iterator[tuple[str, int, str]]:
    """Every way with every batch, and sizes alone."""
    for batch in dict.fromkeys(batch for batch, _ in RATES):
        yield from ((way, batch, "") for way in WAYS)
        yield from ((ALONE, batch, size) for size in SIZES)


def plan_of(settings: ComputeSettings) -> ComputePlan:
    """The plan behind the settings of the command line."""
    plan = ComputePlan(num_seeds=settings.num_seeds)
    if settings.quick:
        return replace(
            plan,
            search=Search(seeds=(100,), num_trials=1, num_finalists=1),
            family_passes=0.5,
            timing=Timing(num_steps=5),
        )
    return plan


def size_of(letters: str, student: RankerSize = STUDENT_SIZE) -> RankerSize:
    """The widths of a size: each of its layers narrow or wide.

    Example:
        >>> str(size_of("nnw")), str(size_of("www"))
        ('32-64, embeddings 8', '128-64, embeddings 16')
    """
    ta = student.grown()
    first, *others = (
        (wide if letter == "w" else narrow)
        for letter, narrow, wide in zip(
            letters, (student.embedding, *student.hidden), (ta.embedding, *ta.hidden), strict=True
        )
    )
    return RankerSize(embedding=first, hidden=tuple(others))


def spec_of(nested: Nested, letters: str) -> SubModel:
    """The sub-model of a size."""
    choices = ("wide" if letter == "w" else "narrow" for letter in letters)
    return SubModel(dict(zip(layer_names(nested), choices, strict=True)))


def run_job(job: Job, data: RelevanceData) -> Measured:
    """Train and score every size that comes of it; or time all ways, in turn."""
    trial = job.training.trial
    student = job.training.setting
    if isinstance(trial, Timing):
        return {"tuning": 0.0, "models": {COSTS: measure_costs(data, student, trial.num_steps)}}
    start = time.process_time()
    model = train(trial, data, student, job.seed)
    seconds = time.process_time() - start
    if isinstance(model, Nested):
        modules = {size: extract(model, spec_of(model, size)) for size in SIZES}
    else:
        modules = {trial.size: model}
    models: dict[str, dict[str, Any]] = {
        size: {part: tuples_loss(module.eval(), getattr(data, part)) for part in ("validation", "test")}
        | {"parameters": count_parameters(module), "seconds": seconds}
        for size, module in modules.items()
    }
    return {"tuning": fmean(each["validation"] for each in models.values()), "models": models}


def train(trial: Attempt, data: RelevanceData, student: RankerSize, seed: int) -> nn.Module:
    """The pair, or the size alone, after all passes; rates fall to zero."""
    steps = max(1, round(trial.passes * len(data.train) / trial.batch))
    model, descent = descent_of(trial, data, student, seed, steps)
    for _ in descent:
        pass
    return model


def descent_of(
    trial: Attempt, data: RelevanceData, student: RankerSize, seed: int, steps: int
) -> tuple[nn.Module, Iterator[Any]]:
    """A fresh model, and the steps that train it."""
    torch.manual_seed(seed)
    if trial.way == ALONE:
        model: nn.Module = Ranker(data.num_rows, size_of(trial.size, student))
    else:
        model = nest_rankers([Ranker(data.num_rows, student)], Ranker(data.num_rows, student.grown()))
    batches = islice(shuffled(data, trial.batch, torch.Generator().manual_seed(seed)), steps)
    optimizer = Shampoo(model, lr=trial.lr)
    return model, descend(loss_of(trial, model, seed, steps), optimizer, lambda step: 1.0 - step / steps, batches)


def shuffled(data: RelevanceData, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: every tuple once in each pass, the rest of a pass that fills no batch left out."""
    batch = min(batch, len(data.train))
    while True:
        order = torch.randperm(len(data.train), generator=generator)
        for rows in order[: len(order) // batch * batch].split(batch):
            yield data.train.ids[rows], data.train.label[rows]


def loss_of(trial: Attempt, model: nn.Module, seed: int, steps: int) -> Step:
    """What a way to train minimises."""
    objective, random = Binary(), Random(seed)
    if not isinstance(model, Nested) or trial.way == FAMILY:
        pair = Trial(method="matta", optimizer="shampoo", lr=trial.lr, distill_weight=DISTILL_WEIGHT)
        sample = random_sub_model(model) if isinstance(model, Nested) else None
        return step_of(model, objective, pair, int(RAMP * steps), sample)
    modules = {size: live(model, spec_of(model, size)).train() for size in SIZES}
    narrowest, *between, widest = SIZES

    def one_random(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        inputs, labels = split_labels(batch)
        logits = call(modules[random.choice(SIZES)], inputs)
        return objective.cross_entropy(logits, labels), lambda: [logits.detach()]

    if trial.way == RANDOM:
        return one_random
    ramp, steps_made = Ramp(start=0, steps=int(RAMP * steps)), count()

    def with_ta(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        """The three losses of the TA and others: in turns of one, on labels and TA; by the sandwich rule, on the TA."""
        if trial.way == TURNS:
            others = [narrowest if random.random() < STUDENT_CHANCE else random.choice(SIZES[:-1])]
            weights = (1.0, DISTILL_WEIGHT * ramp.at(next(steps_made)))
        else:
            others, weights = [narrowest, random.choice(between)], (0.0, 1.0)
        inputs, labels = split_labels(batch)
        ta, *logits = (call(modules[size], inputs) for size in (widest, *others))
        of_step = LossWeights(student=weights[0], ta=1.0, distill=torch.tensor(weights[1]))
        return objective.joint(logits, ta, labels, of_step).loss, lambda: [logits[0].detach(), ta.detach()]

    return with_ta


def measure_costs(data: RelevanceData, student: RankerSize, num_steps: int) -> dict[str, float]:
    """Processor seconds of a pass by `cost_key`, all ways in turn: a step each, after as many that are not counted.

    The medians of steps leave out those in which Shampoo computes its roots, the same for all.
    """
    descents = {
        cost_key(way, batch, size): descent_of(
            Attempt(way=way, batch=batch, lr=0.01, size=size), data, student, 0, 2**30
        )[1]
        for way, batch, size in timed()
    }
    seconds: dict[str, list[float]] = {key: [] for key in descents}
    for _ in range(2 * num_steps):
        for key, descent in descents.items():
            start = time.process_time()
            next(descent)
            seconds[key].append(time.process_time() - start)
    batches = {cost_key(way, batch, size): batch for way, batch, size in timed()}
    return {key: median(each[num_steps:]) * len(data.train) / batches[key] for key, each in seconds.items()}


def run(settings: ComputeSettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    plan = plan_of(settings)
    prepare, study = partial(copy_data, plan.tuples), partial(run_study, plan)
    return conduct("compute", settings.out, prepare=prepare, load=read_data, run_job=run_job, study=study)[1]


def run_study(plan: ComputePlan, run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
    """Time all ways, tune, run the fresh seeds, report; all files are written to `folder`."""
    with counted(run_jobs, plan.num_runs, console) as run_counted:
        timing = Job(training=Training(trial=plan.timing, setting=plan.setting), seed=0, whole=False)
        ((_, measured),) = run_counted([timing])
        costs: Costs = measured["models"][COSTS]
        found = plan.with_costs(costs).run(run_counted, "test")
    results = results_of(plan, found, costs)
    report(results, told(results), folder, console)
    return results


def results_of(plan: ComputePlan, found: Found, costs: Costs) -> dict[str, Any]:
    """Everything that the study found, in types that JSON gives back as they are."""
    changes = {
        str(count): _told({size: found_change(found, FAMILY, count, [size]) for size in sizes})
        for count, sizes in WANTED.items()
    }
    means = {
        f"{way}_vs_alone_mean_percent": _told(
            {count: found_change(found, way, count, sizes) for count, sizes in WANTED.items()}
        )
        for way in OURS
    }
    volumes = {name: hypervolumes(found, name) for name in (*WAYS, ALONE)}
    best = max(PEERS, key=lambda name: fmean(volumes[name]))
    ratios = {name: relative_change(volumes[name], volumes[best]) for name in OURS}
    results = {
        "family_vs_alone_percent": changes,
        **means,
        "hypervolume_ratio": 1.0 + ratios[FAMILY].mean / 100.0,
        "hypervolume_change": _told(ratios),
        "best_peer": best,
        "hypervolume": {name: fmean(each) for name, each in volumes.items()},
        "sizes": {size: _widths(size_of(size, plan.setting)) for size in SIZES},
        "parameters": {size: found.losses(FAMILY, size, "parameters")[0] for size in SIZES},
        "seconds": {arm: fmean(found.losses(arm, found.models(arm)[0], "seconds")) for arm in found.titles},
        "seconds_of_a_pass": dict(costs),
    }
    return plain(found.summary({}, "validation") | results)


def _told(changes: Mapping[Any, Change]) -> dict[str, Any]:
    return {str(name): change.to_json() for name, change in changes.items()}


def _widths(size: RankerSize) -> str:
    return f"{size.embedding}, {'-'.join(map(str, size.hidden))}"


def found_change(found: Found, way: str, count: int, sizes: Sequence[str]) -> Change:
    """The mean loss of some sizes out of one run, against those sizes trained alone where `count` are wanted."""
    together = [found.losses(way, size) for size in sizes]
    apart = [found.losses(alone(count, size), size) for size in sizes]
    return relative_change(
        [fmean(each) for each in zip(*together, strict=True)], [fmean(each) for each in zip(*apart, strict=True)]
    )


def hypervolumes(found: Found, name: str) -> list[float]:
    """By seed: how much of the plane of log size and loss is dominated by an arm's sizes, or by all those alone.

    The loss reaches up to the largest of all arms with that seed, and the size one step beyond the TA's.
    """
    sizes = sorted(SIZES, key=lambda size: found.losses(FAMILY, size, "parameters")[0])
    logs = [math.log(found.losses(FAMILY, size, "parameters")[0]) for size in sizes]
    arm_of = {size: alone(8, size) if name == ALONE else name for size in SIZES}
    every = [found.losses(arm, size) for arm in found.titles for size in found.models(arm)]
    tops = [max(each) for each in zip(*every, strict=True)]
    rows = zip(*(found.losses(arm_of[size], size) for size in sizes), strict=True)
    return [dominated(logs, losses, top) for losses, top in zip(rows, tops, strict=True)]


def dominated(sizes: Sequence[float], losses: Sequence[float], top: float) -> float:
    """The area between `top` and the least loss up to each size; the last size reaches as far as the one before it.

    Example:
        >>> dominated([0.0, 1.0, 3.0], [0.5, 0.6, 0.2], top=1.0)
        3.1
    """
    widths = [after - before for before, after in pairwise(sizes)]
    best = [min(losses[: index + 1]) for index in range(len(losses))]
    return sum(width * (top - loss) for width, loss in zip([*widths, widths[-1]], best, strict=True))


def told(results: Mapping[str, Any]) -> list[Part]:
    """The tables as they stand in the documentation."""
    return [
        "## The family at equal compute (film ranker)",
        f"`matta study compute --seeds {results['num_seeds']}`; {told_machine(results['machine'])}. Every arm has the "
        f"processor time of one family run; sizes alone share it among as many as are wanted. A size is its embedding "
        f"and its hidden layers.",
        Table(
            title="AucLoss x 1000 by size at equal compute (less is better)",
            columns=("size", "parameters", *WAYS, *(f"{ALONE}, {count} wanted" for count in WANTED)),
            rows=[_row(results, size) for size in SIZES],
        ),
        Table(
            columns=("size", *(f"family against alone, {count} wanted" for count in WANTED)),
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


def _row(results: Mapping[str, Any], size: str) -> tuple[str, ...]:
    arms = [*WAYS, *(alone(count, size) for count in WANTED)]
    losses = [results["aucloss"].get(arm, {}).get(size) for arm in arms]
    cells = ["–" if each is None else f"{1000 * each['mean']:.2f}" for each in losses]
    return (results["sizes"][size], f"{results['parameters'][size]:,}", *cells)


def _change_row(results: Mapping[str, Any], size: str) -> tuple[str, ...]:
    changes = [each.get(size) for each in results["family_vs_alone_percent"].values()]
    return (results["sizes"][size], *("–" if each is None else str(Change.told(each)) for each in changes))


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the tables say in words."""
    found = []
    for wanted in map(str, WANTED):
        family, turns = (Change.told(results[f"{way}_vs_alone_mean_percent"][wanted]) for way in OURS)
        found.append(f"{wanted} sizes wanted, mean against each alone: family {family}, turns {turns}.")
    family, turns = (Change.told(results["hypervolume_change"][way]) for way in OURS)
    shares = [results["seconds"][way] / results["seconds"][FAMILY] for way in WAYS]
    return [
        *found,
        f"Hypervolume of loss and log size against the best peer's ({results['best_peer']}): family {family}, turns "
        f"{turns} (more is better).",
        f"Processor seconds of the shared runs: {min(shares):.2f} to {max(shares):.2f} of the family's.",
        f"Intervals: 95%, paired over {results['num_seeds']} fresh seeds.",
    ]
