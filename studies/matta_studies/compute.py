"""The family at equal compute: why not train each size for itself? A film ranker, soft labels, more data than time.

Every arm gets the same processor time, which its own measured cost turns into passes. The family begins with the
Student, trained alone; then it is nested, and each step trains the TA and one other model (`matta.Turns`). "Together"
is the family with everything in every step. The peers are one random sub-model a step on the labels alone (MatFormer),
the sandwich rule with in-place distillation (slimmable networks), a TA that is trained first and then pruned to each
size by importance and distilled (Minitron), or distilled into new models (two stages), and each size alone, which
shares the time with the other sizes wanted. Every arm is tuned with as many trials, on a validation part, and runs with
fresh seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise, product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final, final

import torch
from rich.console import Console
from torch import Tensor, nn

from matta.family.extraction import extract
from matta.family.submodels import SubModel, layer_names, live, random_sub_model
from matta.nesting.batches import Batch, call, split_labels
from matta.nesting.layout import Layout
from matta.nesting.nested import Nested, nest
from matta.objectives.losses import LossWeights
from matta.objectives.objective import Binary
from matta.optim.shampoo import Shampoo
from matta.training.cotraining import CoTraining
from matta_studies.experiment import Arm, Found, Job, Measured, Plan, RunJobs, Training, conduct, plain
from matta_studies.intervals import Change, relative_change
from matta_studies.labelled_films import RelevanceData, TupleSettings
from matta_studies.presentation import Notes, Part, Table, report, told_machine
from matta_studies.rankers import Ranker, RankerSize
from matta_studies.relevance import STUDENT_SIZE, copy_data, read_data, tuples_loss
from matta_studies.study_settings import ComputeSettings
from matta_studies.trials import Step, Trial, count_parameters, descend, step_of, step_of_pair
from matta_studies.tuning import Search
from matta_studies.worker_pool import counted

SIZES: Final = tuple("".join(each) for each in product("nw", repeat=3))  # embeddings and two hidden layers
NARROWEST, WIDEST = SIZES[0], SIZES[-1]
WANTED: Final[Mapping[int, tuple[str, ...]]] = {
    8: SIZES,
    4: (NARROWEST, "nww", "wnn", WIDEST),
    2: (NARROWEST, WIDEST),
}
FAMILY, TOGETHER, RANDOM, SANDWICH = "family", "together", "random", "sandwich"
PRUNED, STAGES, ALONE = "pruned", "stages", "alone"
WAYS: Final[Mapping[str, str]] = {
    TOGETHER: "MatTA, all in every step",
    RANDOM: "one random sub-model a step, labels alone",
    SANDWICH: "sandwich rule, in-place distillation",
    PRUNED: "TA first, then pruned and distilled",
    STAGES: "TA first, then distilled into new models",
}
PEERS: Final = (RANDOM, SANDWICH, PRUNED, STAGES, ALONE)
TRIALS: Final = ((2048, 0.03), (2048, 0.045), (4096, 0.045), (4096, 0.06))  # batch, rate
FAMILY_TRIALS: Final = (  # rate, share of the passes that train the Student alone, chance of the Student in the others
    (0.03, 0.6, 0.5),
    (0.045, 0.6, 0.5),
    (0.06, 0.6, 0.5),
    (0.045, 0.5, 0.3),
)
FAMILY_BATCH: Final = 4096
BUDGET_PASSES: Final = 5.0  # of MatTA with everything in every step, at the first batch: the time that every arm gets
TA_SHARE: Final = 0.5  # of that time, where the TA is trained first
FIRST_FRESH_SEED: Final = 12_000
SEARCH: Final = Search(seeds=(100,), num_finalists=1)
DISTILL_WEIGHT, RAMP = 0.5, 0.1  # ω₃, its ramp as a share of the steps
COSTS: Final = "costs"  # what the timing measures, in place of models
TIMED_STEPS: Final = 40
PRUNING_TUPLES: Final = 8192  # whose activations say what matters


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
    alone: float = 0.0
    student_chance: float = 1.0
    sizes: tuple[str, ...] = SIZES
    passes: float = 0.0
    later_passes: tuple[float, ...] = ()

    def __str__(self) -> str:
        told = f"batch {self.batch:,}, rate {self.lr:g}, {self.passes:g} passes"
        if self.way == FAMILY:
            return (
                f"{told}, {self.alone:g} of them the Student alone, in {self.student_chance:g} of the later steps too"
            )
        if self.later_passes:
            return f"{told}, then {min(self.later_passes):g} to {max(self.later_passes):g}"
        return told


@final
@dataclass(frozen=True, kw_only=True)
class Timing:
    """The job that measures what a pass costs, in place of an attempt."""

    num_steps: int


Costs = Mapping[str, float]
"""Processor seconds of a pass, by `cost_key`."""


def cost_key(way: str, batch: int, sizes: Sequence[str] = SIZES) -> str:
    """The name of what is timed; rates cost nothing. Of a family it is what follows the Student alone."""
    return f"{way} {'+'.join(sizes)} {batch}"


def timed() -> Iterator[tuple[str, int, tuple[str, ...]]]:
    """What is timed: the ways that train sizes together, and sizes alone, from the labels or also from a TA."""
    yield from ((FAMILY, FAMILY_BATCH, sizes) for sizes in WANTED.values())
    for batch in dict.fromkeys((*(batch for batch, *_ in TRIALS), FAMILY_BATCH)):
        yield from ((way, batch, SIZES) for way in (TOGETHER, RANDOM, SANDWICH))
        yield from ((way, batch, (size,)) for way in (ALONE, STAGES) for size in SIZES)


@final
@dataclass(frozen=True, kw_only=True)
class Budget:
    """Processor seconds for an arm, and what passes cost: how many of them a way to train can afford."""

    seconds: float
    costs: Costs

    def attempts(self, way: str, sizes: tuple[str, ...]) -> tuple[Attempt, ...]:
        """The trials of an arm."""
        if way == FAMILY:
            return tuple(self._family(sizes, *trial) for trial in FAMILY_TRIALS)
        return tuple(self._attempt(way, sizes, *trial) for trial in TRIALS)

    def _attempt(self, way: str, sizes: tuple[str, ...], batch: int, lr: float) -> Attempt:
        attempt = Attempt(way=way, batch=batch, lr=lr, sizes=sizes)
        if way not in (PRUNED, STAGES):
            return replace(attempt, passes=self._passes(1.0, way, batch, sizes))
        others = [size for size in sizes if size != WIDEST]
        share = (1.0 - TA_SHARE) / len(others)
        later = tuple(self._passes(share, STAGES, batch, (size,)) for size in others)
        return replace(attempt, passes=self._passes(TA_SHARE, ALONE, batch, (WIDEST,)), later_passes=later)

    def _family(self, sizes: tuple[str, ...], lr: float, alone: float, chance: float) -> Attempt:
        first = self.costs[cost_key(ALONE, FAMILY_BATCH, (NARROWEST,))]
        second = self.costs[cost_key(FAMILY, FAMILY_BATCH, sizes)]
        passes = _two_digits(self.seconds / (alone * first + (1.0 - alone) * second))
        of_family = Attempt(way=FAMILY, batch=FAMILY_BATCH, lr=lr, alone=alone, sizes=sizes, passes=passes)
        return replace(of_family, student_chance=chance)

    def _passes(self, share: float, way: str, batch: int, sizes: Sequence[str]) -> float:
        return _two_digits(share * self.seconds / self.costs[cost_key(way, batch, sizes)])


def _two_digits(value: float) -> float:
    return float(f"{value:.2g}")


@final
@dataclass(frozen=True, kw_only=True)
class ComputePlan(Plan):
    """What `ComputeSettings` asks for, spelled out; the arms follow from the costs."""

    arms: tuple[Arm, ...] = ()
    setting: Any = STUDENT_SIZE
    first_seed: int = FIRST_FRESH_SEED
    search: Search | None = SEARCH
    budget_passes: float = BUDGET_PASSES
    tuples: TupleSettings = field(default_factory=TupleSettings)
    timing: Timing = field(default_factory=lambda: Timing(num_steps=TIMED_STEPS))

    def with_costs(self, costs: Costs) -> ComputePlan:
        """The plan with its arms, whose passes all take the same time."""
        seconds = self.budget_passes * costs[cost_key(TOGETHER, TRIALS[0][0])]
        whole = Budget(seconds=seconds, costs=costs)
        arms = [
            Arm(name=family(count), title=f"MatTA in turns, {count} wanted", trials=whole.attempts(FAMILY, sizes))
            for count, sizes in WANTED.items()
        ]
        arms += [Arm(name=way, title=title, trials=whole.attempts(way, SIZES)) for way, title in WAYS.items()]
        for count, sizes in WANTED.items():
            share = replace(whole, seconds=seconds / count)
            for size in sizes:
                title = f"alone, {count} wanted: {size}"
                arms.append(Arm(name=alone(count, size), title=title, trials=share.attempts(ALONE, (size,))))
        return replace(self, arms=tuple(arms))

    @property
    def num_runs(self) -> int:
        """Training runs in all, and the timing."""
        return self.with_costs({cost_key(*each): 1.0 for each in timed()}).num_arm_runs + 1


def family(count: int) -> str:
    """The arm of a family of which so many sizes are wanted."""
    return f"{FAMILY} {count}"


def alone(count: int, size: str) -> str:
    """The arm of a size that is trained alone, for its share where so many are wanted."""
    return f"{ALONE} {count} {size}"


def plan_of(settings: ComputeSettings) -> ComputePlan:
    """The plan behind the settings of the command line."""
    plan = ComputePlan(num_seeds=settings.num_seeds)
    if settings.quick:
        return replace(
            plan,
            search=Search(seeds=(100,), num_trials=1, num_finalists=1),
            budget_passes=0.25,
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
    """Train and score every size wanted; or time all ways, in turn."""
    trial = job.training.trial
    student = job.training.setting
    if isinstance(trial, Timing):
        return {"tuning": 0.0, "models": {COSTS: measure_costs(data, student, trial.num_steps)}}
    start = time.process_time()
    modules = (train_stages if trial.later_passes else train)(trial, data, student, job.seed)
    seconds = time.process_time() - start
    models: dict[str, dict[str, Any]] = {
        size: {part: tuples_loss(module.eval(), getattr(data, part)) for part in ("validation", "test")}
        | {"parameters": count_parameters(module), "seconds": seconds}
        for size, module in modules.items()
    }
    return {"tuning": fmean(each["validation"] for each in models.values()), "models": models}


def train(trial: Attempt, data: RelevanceData, student: RankerSize, seed: int) -> dict[str, nn.Module]:
    """The sizes wanted, out of one co-training run; or one alone."""
    start = None
    if trial.way == FAMILY:
        first = replace(trial, way=ALONE, sizes=(NARROWEST,))
        start = trained(first, data, student, seed, num_steps(trial.alone * trial.passes, trial, data), falls=False)
    steps = num_steps((1.0 - trial.alone) * trial.passes, trial, data)
    model = trained(trial, data, student, seed, steps, start=start)
    if not isinstance(model, Nested):
        return {trial.sizes[0]: model}
    return {size: extract(model, spec_of(model, size)) for size in trial.sizes}


def trained(
    trial: Attempt,
    data: RelevanceData,
    student: RankerSize,
    seed: int,
    steps: int,
    *,
    start: nn.Module | None = None,
    falls: bool = True,
) -> nn.Module:
    """A model after so many steps; its Student starts as it is given."""
    model, descent = descent_of(trial, data, student, seed, steps, start=start, falls=falls)
    for _ in descent:
        pass
    return model


def num_steps(passes: float, trial: Attempt, data: RelevanceData) -> int:
    """Steps in so many passes."""
    return max(1, round(passes * len(data.train) / trial.batch))


def train_stages(trial: Attempt, data: RelevanceData, student: RankerSize, seed: int) -> dict[str, nn.Module]:
    """The TA alone, then each smaller size for itself on the labels and the TA; pruned ones start as parts of it."""
    first = replace(trial, way=ALONE, sizes=(WIDEST,), later_passes=())
    ta = train(first, data, student, seed)[WIDEST].eval()
    assert isinstance(ta, Ranker)
    models: dict[str, nn.Module] = {}
    others = [size for size in trial.sizes if size != WIDEST]
    for size, passes in zip(others, trial.later_passes, strict=True):
        steps = num_steps(passes, trial, data)
        start = pruned(ta, size_of(size, student), data.train.ids[:PRUNING_TUPLES]) if trial.way == PRUNED else None
        model, descent = later_descent(replace(trial, sizes=(size,)), data, student, seed, steps, ta=ta, start=start)
        for _ in descent:
            pass
        models[size] = model
    return models | {WIDEST: ta}


def descent_of(
    trial: Attempt,
    data: RelevanceData,
    student: RankerSize,
    seed: int,
    steps: int,
    *,
    start: nn.Module | None = None,
    falls: bool = True,
) -> tuple[nn.Module, Iterator[Any]]:
    """A fresh model, or one whose Student starts as it is given, and the steps that train it."""
    torch.manual_seed(seed)
    if trial.way == ALONE:
        model: nn.Module = Ranker(data.num_rows, size_of(trial.sizes[0], student))
    else:
        pair = start or Ranker(data.num_rows, student), Ranker(data.num_rows, student.grown())
        layout = Layout.equal(len(data.num_rows), axis=1)
        model = nest(*pair, layouts={"mlp.0.weight": layout}, warm_start=start is not None)
    return model, _descent(trial, data, model, loss_of(trial, model, seed, steps), seed, steps, falls=falls)


def later_descent(
    trial: Attempt,
    data: RelevanceData,
    student: RankerSize,
    seed: int,
    steps: int,
    *,
    ta: Ranker,
    start: Ranker | None,
) -> tuple[nn.Module, Iterator[Any]]:
    """A model of one size, fresh or as it is given, and the steps that train it on the labels and the TA."""
    torch.manual_seed(seed)
    model = start or Ranker(data.num_rows, size_of(trial.sizes[0], student))
    objective = Binary()

    def step(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        inputs, labels = split_labels(batch)
        with torch.no_grad():
            taught = call(ta, inputs).sigmoid()
        logits = call(model, inputs)
        loss = objective.cross_entropy(logits, labels) + DISTILL_WEIGHT * objective.cross_entropy(logits, taught)
        return loss, lambda: [logits.detach()]

    return model, _descent(trial, data, model.train(), step, seed, steps)


def _descent(
    trial: Attempt, data: RelevanceData, model: nn.Module, step: Step, seed: int, steps: int, *, falls: bool = True
) -> Iterator[Callable[[], list[Tensor]]]:
    batches = islice(shuffled(data, trial.batch, torch.Generator().manual_seed(seed)), steps)
    return descend(step, Shampoo(model, lr=trial.lr), lambda done: 1.0 - done / steps if falls else 1.0, batches)


@torch.no_grad()
def pruned(ta: Ranker, size: RankerSize, ids: Tensor) -> Ranker:
    """The part of a trained ranker that matters most: units by their mean activation, embeddings by their products.

    The importance of Minitron (Muralidharan et al., 2024): of a unit the mean of its absolute activations over some
    tuples, here times the length of the weights that read it.
    """
    (first, second, last), tables = _linear(ta), _tables(ta)
    rows = torch.cat([table(column) for table, column in zip(tables, ids.unbind(1), strict=True)], dim=1)
    hidden = first(rows).relu()

    def kept(values: Tensor, reading: Tensor, count: int) -> Tensor:
        return (values.abs().mean(0) * reading.norm(dim=0)).topk(count).indices.sort().values

    width = ta.size.embedding
    columns = [
        kept(rows[:, begin : begin + width], first.weight[:, begin : begin + width], size.embedding)
        for begin in range(0, rows.shape[1], width)
    ]
    inputs = torch.cat([begin * width + each for begin, each in enumerate(columns)])
    units = kept(hidden, second.weight, size.hidden[0]), kept(second(hidden).relu(), last.weight, size.hidden[1])
    made = Ranker(tuple(table.num_embeddings for table in tables), size)
    for table, own_table, each in zip(tables, _tables(made), columns, strict=True):
        own_table.weight.copy_(table.weight[:, each])
    taken = ((units[0], inputs), (units[1], units[0]), (torch.arange(1), units[1]))
    for layer, own, (outputs, read) in zip((first, second, last), _linear(made), taken, strict=True):
        own.weight.copy_(layer.weight[outputs][:, read])
        own.bias.copy_(layer.bias[outputs])
    return made


def _tables(ranker: Ranker) -> list[nn.Embedding]:
    return [each for each in ranker.modules() if isinstance(each, nn.Embedding)]


def _linear(ranker: Ranker) -> list[nn.Linear]:
    return [each for each in ranker.modules() if isinstance(each, nn.Linear)]


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
    modules = {size: live(model, spec_of(model, size)).train() for size in SIZES}

    def one_random(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        inputs, labels = split_labels(batch)
        logits = call(modules[random.choice(SIZES)], inputs)
        return objective.cross_entropy(logits, labels), lambda: [logits.detach()]

    def sandwich(batch: Batch) -> tuple[Tensor, Callable[[], list[Tensor]]]:
        """The TA on the labels; the Student and one size between on the TA."""
        inputs, labels = split_labels(batch)
        ta, *logits = (call(modules[size], inputs) for size in (WIDEST, NARROWEST, random.choice(SIZES[1:-1])))
        weights = LossWeights(student=0.0, ta=1.0, distill=torch.tensor(1.0))
        return objective.joint(logits, ta, labels, weights).loss, lambda: [logits[0].detach(), ta.detach()]

    return one_random if trial.way == RANDOM else sandwich


def measure_costs(data: RelevanceData, student: RankerSize, num_steps: int) -> dict[str, float]:
    """Processor seconds of a pass by `cost_key`, all ways in turn: a step each, after as many that are not counted.

    The longest steps, such as those in which Shampoo computes its roots, are left out, the same for all.
    """
    ta = Ranker(data.num_rows, student.grown()).eval()
    descents = {}
    for way, batch, sizes in timed():
        trial = Attempt(way=way, batch=batch, lr=0.01, sizes=sizes, student_chance=FAMILY_TRIALS[0][2])
        if way == STAGES:
            made = later_descent(trial, data, student, 0, 2**30, ta=ta, start=None)
        else:
            made = descent_of(trial, data, student, 0, 2**30)
        descents[cost_key(way, batch, sizes)] = made[1]
    seconds: dict[str, list[float]] = {key: [] for key in descents}
    for _ in range(2 * num_steps):
        for key, descent in descents.items():
            start = time.process_time()
            next(descent)
            seconds[key].append(time.process_time() - start)
    batches = {cost_key(*each): each[1] for each in timed()}
    return {key: fmean(_middle(each[num_steps:])) * len(data.train) / batches[key] for key, each in seconds.items()}


def _middle(seconds: Sequence[float]) -> Sequence[float]:
    """All but the longest eighth: steps differ by the model that they train, and some are disturbed."""
    return sorted(seconds)[: max(1, len(seconds) - len(seconds) // 8)]


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
    changes = {str(count): _told({size: change(found, count, [size]) for size in WANTED[count]}) for count in WANTED}
    means = _told({count: change(found, count, sizes) for count, sizes in WANTED.items()})
    volumes = {name: hypervolumes(found, name) for name in (family(len(SIZES)), *WAYS, ALONE)}
    best = max(PEERS, key=lambda name: fmean(volumes[name]))
    ratios = {name: relative_change(volumes[name], volumes[best]) for name in (family(len(SIZES)), TOGETHER)}
    whole = found.models(family(len(SIZES)))
    results = {
        "family_vs_alone_percent": changes,
        "family_vs_alone_mean_percent": means,
        "hypervolume_ratio": 1.0 + ratios[family(len(SIZES))].mean / 100.0,
        "hypervolume_change": _told(ratios),
        "best_peer": best,
        "hypervolume": {name: fmean(each) for name, each in volumes.items()},
        "worse_than_smaller": worse_than_smaller(found, family(len(SIZES))),
        "sizes": {size: _widths(size_of(size, plan.setting)) for size in whole},
        "parameters": parameters(found),
        "seconds": {arm: fmean(found.losses(arm, found.models(arm)[0], "seconds")) for arm in found.titles},
        "seconds_of_a_pass": dict(costs),
    }
    return plain(found.summary({}, "validation") | results)


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


def change(found: Found, count: int, sizes: Sequence[str]) -> Change:
    """The mean loss of some sizes of a family, against those sizes trained alone where `count` are wanted."""
    together = [found.losses(family(count), size) for size in sizes]
    apart = [found.losses(alone(count, size), size) for size in sizes]
    return relative_change(
        [fmean(each) for each in zip(*together, strict=True)], [fmean(each) for each in zip(*apart, strict=True)]
    )


def hypervolumes(found: Found, name: str) -> list[float]:
    """By seed: how much of the plane of log size and loss is dominated by an arm's sizes, or by all those alone.

    The loss reaches up to the largest of all arms with that seed, and the size one step beyond the TA's.
    """
    counts = parameters(found)
    sizes = sorted(SIZES, key=lambda size: counts[size])
    logs = [math.log(counts[size]) for size in sizes]
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
    arms = [family(len(SIZES)), *WAYS, *(alone(count, "") for count in WANTED)]
    return [
        "## The family at equal compute (film ranker)",
        f"`matta study compute --seeds {results['num_seeds']}`; {told_machine(results['machine'])}. Every arm has the "
        f"same processor time; sizes alone share it among as many as are wanted. A size is its embedding and its "
        f"hidden layers.",
        Table(
            title="AucLoss x 1000 by size at equal compute (less is better)",
            columns=("size", "parameters", *(_short(arm) for arm in arms)),
            rows=[_row(results, size, arms) for size in SIZES],
        ),
        Table(
            title="The family against each size alone",
            columns=("size", *(f"{count} wanted" for count in WANTED)),
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


def _short(arm: str) -> str:
    if arm.startswith(ALONE):
        return f"alone, {arm.split()[1]} wanted"
    return WAYS.get(arm, "MatTA in turns")


def _widths(size: RankerSize) -> str:
    return f"{size.embedding}, {'-'.join(map(str, size.hidden))}"


def _row(results: Mapping[str, Any], size: str, arms: Sequence[str]) -> tuple[str, ...]:
    losses = [results["aucloss"].get(f"{arm}{size}" if arm.startswith(ALONE) else arm, {}).get(size) for arm in arms]
    cells = ["–" if each is None else f"{1000 * each['mean']:.2f}" for each in losses]
    return (results["sizes"][size], f"{results['parameters'][size]:,}", *cells)


def _change_row(results: Mapping[str, Any], size: str) -> tuple[str, ...]:
    changes = [each.get(size) for each in results["family_vs_alone_percent"].values()]
    return (results["sizes"][size], *("–" if each is None else str(Change.told(each)) for each in changes))


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the tables say in words."""
    means = {count: Change.told(results["family_vs_alone_mean_percent"][str(count)]) for count in WANTED}
    in_turns, together = (Change.told(results["hypervolume_change"][arm]) for arm in (family(len(SIZES)), TOGETHER))
    shares = [each / results["seconds"][TOGETHER] for arm, each in results["seconds"].items() if ALONE not in arm]
    worse = ", ".join(results["sizes"][size] for size in results["worse_than_smaller"]) or "none"
    return [
        *(
            f"{count} sizes wanted: {each}, the mean of these sizes against each alone."
            for count, each in means.items()
        ),
        f"Hypervolume of loss and log size against the best peer's ({WAYS.get(results['best_peer'], 'each alone')}): "
        f"in turns {in_turns}, all in every step {together} (more is better).",
        f"Sizes of the family that are worse than a smaller one beyond the interval: {worse}.",
        f"Processor seconds of the shared runs: {min(shares):.2f} to {max(shares):.2f} of those of MatTA with all in "
        f"every step.",
        f"Intervals: 95%, paired over {results['num_seeds']} fresh seeds.",
    ]
