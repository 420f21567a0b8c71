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
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from matta_studies.compute_plan import (
    COMPUTE,
    COSTS,
    FLOPS,
    PEERS,
    WAYS,
    ComputePlan,
    Costs,
    Grid,
    Timing,
    alone,
    cost_key,
    family,
    plan_of,
    spent,
    timed,
)
from matta_studies.compute_report import told
from matta_studies.compute_tasks import NARROWEST, SIZES, WIDEST, Task, load_task, prepare
from matta_studies.compute_training import (
    ALONE,
    NEVER,
    STAGES,
    TOGETHER,
    Attempt,
    descent_of,
    later_descent,
    train,
)
from matta_studies.experiment import Found, Job, Measured, RunJobs, Training, conduct, plain
from matta_studies.intervals import Change, relative_change
from matta_studies.presentation import report
from matta_studies.study_settings import ComputeSettings
from matta_studies.trials import count_parameters
from matta_studies.worker_pool import counted


def run_job(job: Job, task: Task) -> Measured:
    """Train and score every size wanted; or time all ways, in turn."""
    trial, num_examples = job.training.trial, job.training.setting
    if isinstance(trial, Timing):
        return {"tuning": 0.0, "models": measure_costs(task, trial.grid, trial.num_steps)}
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


def measure_costs(task: Task, grid: Grid, num_steps: int) -> dict[str, dict[str, float]]:
    """Processor seconds and FLOPs of a pass by `cost_key`, all ways in turn.

    FLOPs are those of matrix products, the optimizer's as well, over the first steps; then as many steps are timed. The
    longest, such as those in which Shampoo computes its roots, are left out, the same for all.
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
    flops = {key: _flops(descent, num_steps) for key, descent in descents.items()}
    seconds: dict[str, list[float]] = {key: [] for key in descents}
    for _ in range(num_steps):
        for key, descent in descents.items():
            start = time.process_time()
            next(descent)
            seconds[key].append(time.process_time() - start)
    steps = {cost_key(*each): task.num_examples / each[1] for each in timed(grid)}
    return {
        COSTS: {key: fmean(_middle(each)) * steps[key] for key, each in seconds.items()},
        FLOPS: {key: each * steps[key] for key, each in flops.items()},
    }


def _flops(descent: Iterator[Any], num_steps: int) -> float:
    """FLOPs of a step, the mean of so many."""
    with FlopCounterMode(display=False) as counter:
        for _ in range(num_steps):
            next(descent)
    return counter.get_total_flops() / num_steps


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
        costs: Mapping[str, Costs] = {}
        if plan.regime == COMPUTE:
            timing = Training(trial=Timing(num_steps=plan.timed_steps, grid=plan.grid), setting=None)
            ((_, measured),) = run_counted([Job(training=timing, seed=0, whole=False)])
            costs = measured["models"]
        with_arms = plan.with_costs(costs[COSTS]) if costs else plan.with_short_data()
        found = with_arms.run(run_counted, "test")
    results = results_of(plan, found, costs)
    report(results, told(results), folder, console)
    return results


def results_of(plan: ComputePlan, found: Found, costs: Mapping[str, Costs]) -> dict[str, Any]:
    """Everything that the study found, in types that JSON gives back as they are; `costs` where they were measured."""
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
        "seconds_of_a_pass": costs.get(COSTS, {}),
        "flops": {arm: spent(each.trial, costs[FLOPS]) for arm, each in found.trainings.items()} if costs else {},
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
