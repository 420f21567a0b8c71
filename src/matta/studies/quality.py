"""Case Study 2 on public data: does a TA make a small model on a stream of events better, and with Shampoo?

Flights, or ratings of films, come in the order of time; each is predicted before it is learned from. Every arm is
tuned on the first quarter with as many trials as any other; then all run over the whole stream with fresh seeds,
and are judged by the other three quarters.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Final, final

from rich.console import Console

from matta.studies.events import EventStream, load_stream, save_stream
from matta.studies.flights import load_flights
from matta.studies.journal import kept
from matta.studies.pool import Run, counted, worker_processes
from matta.studies.progressive import (
    Method,
    Optimizer,
    StreamScores,
    StreamSetting,
    StreamTrial,
    predict_and_learn,
    score,
)
from matta.studies.qualityreport import draw_periods, markdown, picture, print_report
from matta.studies.ratedfilms import load_rated_films
from matta.studies.runfolder import dated, machine, new_run_folder, require_new, write_results
from matta.studies.settings import QualitySettings
from matta.studies.statistics import Change, relative_change
from matta.studies.tuning import Search, Tuned

FIRST_FRESH_SEED = 2000  # 1000 to 1015 were seen by an earlier protocol
SEARCH: Final = Search(seeds=tuple(range(100, 106)), num_screening_seeds=2, num_finalists=8)
QUICK_SEARCH: Final = Search(seeds=(100,), num_trials=8)
BASELINE, SHAMPOO = "baseline", "shampoo"
SETTINGS: Final[Mapping[str, StreamSetting]] = {
    "flights": StreamSetting(),
    "ratings": StreamSetting(batch=128, ramp=180),  # a stream of a third as many events: the ramp is as long a part
}
LOADS: Final[Mapping[str, Callable[[int], EventStream]]] = {"flights": load_flights, "ratings": load_rated_films}


@final
@dataclass(frozen=True, kw_only=True)
class StreamArm:
    """A row of the table: a way to train, and the trials among which its settings are chosen."""

    name: str
    title: str
    trials: tuple[StreamTrial, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """What the arm trains."""
        return ("Student",) if self.trials[0].method == "baseline" else ("Student", "TA")


def _trials(
    method: Method,
    optimizer: Optimizer,
    rates: Sequence[float],
    factors: Sequence[float] = (1.0,),
    mixes: Sequence[tuple[float, float]] = ((1.0, 1.0),),
) -> tuple[StreamTrial, ...]:
    """All combinations of rates, factors of the embeddings' rate and (ω₁, ω₃), each at its own and at an even pace."""
    return tuple(
        StreamTrial(
            method=method,
            optimizer=optimizer,
            lr=lr,
            embedding_factor=factor,
            even_pace=even,
            student_weight=student,
            distill_weight=distill,
        )
        for lr, factor, (student, distill), even in product(rates, factors, mixes, (False, True))
    )


def _baseline(summed: Optimizer, decayed: Optimizer) -> tuple[StreamTrial, ...]:
    """Trials of a Student alone: with summed statistics (Adagrad's), and with decayed ones (Adam's)."""
    wide = _trials("baseline", summed, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    return wide + _trials("baseline", decayed, (0.001, 0.003, 0.01))


def _pair(summed: Optimizer, decayed: Optimizer) -> tuple[StreamTrial, ...]:
    """As many trials of a Student in its TA, whose best rates are lower."""
    mixes = ((1.0, 1.0), (0.3, 0.3))
    return (
        *_trials("matta", summed, (0.07, 0.1), (2.0, 4.0), mixes),
        *_trials("matta", summed, (0.2,), (1.0, 2.0)),
        *_trials("matta", decayed, (0.001, 0.003)),
    )


ARMS: Final = (
    StreamArm(name=BASELINE, title="baseline", trials=_baseline("adagrad", "adam")),
    StreamArm(name="matta", title="MatTA", trials=_pair("adagrad", "adam")),
    StreamArm(name=SHAMPOO, title="Shampoo alone", trials=_baseline("shampoo-adagrad", "shampoo-adam")),
    StreamArm(name="matta_shampoo", title="MatTA with Shampoo", trials=_pair("shampoo-adagrad", "shampoo-adam")),
)


@final
@dataclass(frozen=True, kw_only=True)
class QualityPlan:
    """How much is done; what `QualitySettings` asks for, spelled out."""

    num_seeds: int
    stream: str = "flights"
    search: Search = SEARCH
    setting: StreamSetting = field(default_factory=StreamSetting)
    arms: tuple[StreamArm, ...] = ARMS

    @property
    def num_runs(self) -> int:
        """Training runs in all."""
        return self.search.num_runs(arm.trials for arm in self.arms) + self.num_seeds * len(self.arms)


def plan_of(settings: QualitySettings) -> QualityPlan:
    """The plan behind the settings of the command line."""
    return QualityPlan(
        num_seeds=settings.num_seeds,
        stream=settings.stream,
        search=QUICK_SEARCH if settings.quick else SEARCH,
        setting=replace(SETTINGS[settings.stream], warm_up=settings.warm_up),
    )


@final
@dataclass(frozen=True, kw_only=True)
class StreamJob:
    """One run, over the whole stream or over its first quarter."""

    trial: StreamTrial
    seed: int
    setting: StreamSetting
    whole: bool


RunStreamJobs = Run[StreamJob, list[StreamScores]]
"""Runs jobs; gives each with the scores of the Student (and of the TA) as it is done."""


def run_job(job: StreamJob, stream: EventStream) -> list[StreamScores]:
    """Predict and learn all events of a job; score."""
    quarter = len(stream) // 4
    events = stream if job.whole else stream.take(slice(quarter))
    return [score(logits, events, quarter) for logits in predict_and_learn(job.trial, events, job.setting, job.seed)]


@contextmanager
def on_workers(stream: EventStream) -> Iterator[RunStreamJobs]:
    """Worker processes that have the stream."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stream.safetensors"
        save_stream(stream, path)
        with worker_processes(run_job, load_stream, path) as run_jobs:
            yield run_jobs


def run(settings: QualitySettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    console = Console()
    out = settings.out or dated("quality")
    require_new(out)
    plan = plan_of(settings)
    stream = LOADS[plan.stream](plan.setting.batch)
    with (
        on_workers(stream) as run_jobs,
        kept(run_jobs, out, plan.stream, console) as run_kept,
        new_run_folder(out) as folder,
    ):
        results = run_study(plan, len(stream), run_kept, folder, console)
    console.print(f"\nWritten to {out}: results.json, results.md and {picture(results)}.", highlight=False)
    return results


def run_study(
    plan: QualityPlan, num_events: int, run_jobs: RunStreamJobs, folder: Path, console: Console
) -> dict[str, Any]:
    """Tune, run the fresh seeds, report; all files are written to `folder`."""
    with counted(run_jobs, plan.num_runs, console) as run_counted:
        tried = tune(plan, run_counted)
        best = {name: tuned.best for name, tuned in tried.items()}
        scores = _fresh_seeds(plan, best, run_counted)
    results = _results(plan, best, tried, scores) | {"num_events": num_events}
    (folder / picture(results)).parent.mkdir()
    draw_periods(results, folder / picture(results))
    write_results(folder, results, markdown(results))
    print_report(results, console)
    return results


Tried = Mapping[str, Tuned[StreamTrial]]
"""By arm: the trial chosen, and every trial's AucLoss on the settled part of the first quarter."""


def tune(plan: QualityPlan, run_jobs: RunStreamJobs) -> Tried:
    """The best trial of each arm. A pair is judged by the mean of Student and TA, as both are served."""

    def judge(runs: Iterable[tuple[StreamTrial, int]]) -> Iterator[tuple[tuple[StreamTrial, int], float]]:
        jobs = [StreamJob(trial=trial, seed=seed, setting=plan.setting, whole=False) for trial, seed in runs]
        for job, scores in run_jobs(jobs):
            yield (job.trial, job.seed), fmean(each.tuning for each in scores)

    return plan.search.tune({arm.name: arm.trials for arm in plan.arms}, judge)


Scores = Mapping[str, Sequence[Sequence[StreamScores]]]
"""By arm: for each fresh seed the scores of the Student (and of the TA)."""


def _fresh_seeds(plan: QualityPlan, best: Mapping[str, StreamTrial], run_jobs: RunStreamJobs) -> Scores:
    seeds = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + plan.num_seeds)
    jobs = {
        StreamJob(trial=trial, seed=seed, setting=plan.setting, whole=True): name
        for seed in seeds
        for name, trial in best.items()
    }
    found: dict[str, dict[int, list[StreamScores]]] = {name: {} for name in best}
    for job, scores in run_jobs(jobs):
        found[jobs[job]][job.seed] = scores
    return {name: [by_seed[seed] for seed in seeds] for name, by_seed in found.items()}


Losses = Mapping[str, Mapping[str, Sequence[float]]]
"""By arm and model: AucLoss of the last three quarters by seed."""


def _losses(plan: QualityPlan, scores: Scores) -> Losses:
    return {
        arm.name: {
            model: [rest for each in scores[arm.name] if (rest := each[index].rest) is not None]
            for index, model in enumerate(arm.models)
        }
        for arm in plan.arms
    }


# figure: (arm, model, arm that it is compared with)
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "student_vs_baseline": ("matta_shampoo", "Student", BASELINE),
    "ta_vs_baseline": ("matta_shampoo", "TA", BASELINE),
    "student_vs_shampoo": ("matta_shampoo", "Student", SHAMPOO),
    "ta_vs_shampoo": ("matta_shampoo", "TA", SHAMPOO),
    "shampoo_vs_baseline": (SHAMPOO, "Student", BASELINE),
    "matta_student_vs_baseline": ("matta", "Student", BASELINE),
    "matta_ta_vs_baseline": ("matta", "TA", BASELINE),
}


def changes_of(losses: Losses) -> dict[str, Change]:
    """All comparisons, and how far MatTA with Shampoo goes beyond the sum of the two."""
    changes = {
        name: relative_change(losses[arm][model], losses[reference]["Student"])
        for name, (arm, model, reference) in CHANGES.items()
    }
    together, shampoo, matta, baseline = (
        losses[name]["Student"] for name in ("matta_shampoo", SHAMPOO, "matta", BASELINE)
    )
    rows = zip(together, shampoo, matta, baseline, strict=True)
    beyond = [joint - one - other + 2 * base for joint, one, other, base in rows]
    return changes | {"beyond_the_sum": relative_change(beyond, baseline)}


def _results(plan: QualityPlan, best: Mapping[str, StreamTrial], tried: Tried, scores: Scores) -> dict[str, Any]:
    """Everything that the study found, in plain types."""
    losses = _losses(plan, scores)
    changes = changes_of(losses)
    results: dict[str, Any] = {f"{name}_percent": change.percent for name, change in changes.items()}
    results |= {f"{name}_interval": change.interval for name, change in changes.items()}
    results["num_seeds"] = plan.num_seeds
    results["aucloss"] = {
        arm: {model: {"mean": fmean(each), "seeds": each} for model, each in models.items()}
        for arm, models in losses.items()
    }
    results["by_period"] = {arm.name: _periods(scores[arm.name], arm.models) for arm in plan.arms}
    results["titles"] = {arm.name: arm.title for arm in plan.arms}
    results["chosen"] = {name: dataclasses.asdict(trial) | {"told": str(trial)} for name, trial in best.items()}
    results["tried"] = {
        name: [dataclasses.asdict(trial) | {"tuning_aucloss": list(losses)} for trial, losses in tuned.tried]
        for name, tuned in tried.items()
    }
    results["stream"], results["setting"] = plan.stream, dataclasses.asdict(plan.setting)
    results["search"] = dataclasses.asdict(plan.search)
    results["fresh_seeds"] = [FIRST_FRESH_SEED, FIRST_FRESH_SEED + plan.num_seeds - 1]
    results["machine"] = machine()
    return results


def _periods(scores: Sequence[Sequence[StreamScores]], models: Sequence[str]) -> dict[str, list[float]]:
    """AucLoss of each period, the mean over seeds."""
    return {
        model: [fmean(period) for period in zip(*(each[index].by_period for each in scores), strict=True)]
        for index, model in enumerate(models)
    }
