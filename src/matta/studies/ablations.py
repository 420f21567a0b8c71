"""What does what in MatTA: the paper's ablations and what it leaves open, on both case studies, with intervals.

Every variant is tuned with the same small budget (three rates, two seeds, on validation data), then run with the
same fresh seeds as the baselines, with which it is compared seed by seed.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final, final

from rich.console import Console

from matta.studies.ablationoutcome import Found, Key, to_json
from matta.studies.ablationreport import draw_forest, markdown, print_report
from matta.studies.ablationruns import (
    STREAM_FILE,
    TUPLES_FILE,
    AblationJob,
    Lesson,
    Measured,
    Training,
    load_bench,
    run_job,
)
from matta.studies.ablationvariants import QUALITY, RELEVANCE, Study, Variant
from matta.studies.events import save_stream
from matta.studies.flights import load_flights
from matta.studies.journal import kept
from matta.studies.pool import Run, counted, worker_processes
from matta.studies.progressive import StreamSetting
from matta.studies.relevance import prepare_data
from matta.studies.runfolder import dated, machine, new_run_folder, require_new, write_results
from matta.studies.settings import AblationsSettings
from matta.studies.tuning import Search, Tuned
from matta.studies.tuples import TupleSettings

QUICK_SEEDS: Final = 2

RunAblations = Run[AblationJob, Measured]
"""Runs jobs, and gives each with what was measured as it is done."""


@final
@dataclass(frozen=True, kw_only=True)
class AblationsPlan:
    """How much is done."""

    studies: tuple[Study, ...]
    quick: bool = False

    @property
    def num_runs(self) -> int:
        """Training runs in all, at most: those that two variants have in common are run once."""
        return sum(_num_runs(study) for study in self.studies)


def _num_runs(study: Study) -> int:
    variants = study.variants()
    tuning = study.search.num_runs(each.trials() for each in variants) if study.search else 0
    return tuning + study.num_seeds * len(variants)


def plan_of(settings: AblationsSettings) -> AblationsPlan:
    """The plan behind the settings of the command line."""
    studies = [study for study in (RELEVANCE, QUALITY) if settings.study in (study.name, "both")]
    if settings.quick:
        studies = [replace(study, num_seeds=QUICK_SEEDS, search=None) for study in studies]
    if settings.seeds is not None:
        studies = [replace(study, num_seeds=settings.seeds) for study in studies]
    return AblationsPlan(studies=tuple(studies), quick=settings.quick)


def run(settings: AblationsSettings) -> dict[str, Any]:
    """The ablations; their figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    console = Console()
    out = settings.out or dated("ablations")
    require_new(out)
    plan = plan_of(settings)
    with (
        on_workers(plan, console) as run_jobs,
        kept(run_jobs, out, "tuples and flights", console) as run_kept,
        new_run_folder(out) as folder,
    ):
        results = run_ablations(plan, run_kept, folder, console)
    console.print(f"\nWritten to {out}: results.json, results.md and ablations.png.", highlight=False)
    return results


@contextmanager
def on_workers(plan: AblationsPlan, console: Console) -> Iterator[RunAblations]:
    """Worker processes that have the data of the studies."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for study in plan.studies:
            if isinstance(study.setting, StreamSetting):
                save_stream(load_flights(study.setting.batch), folder / STREAM_FILE)
            else:
                shutil.copy(prepare_data(TupleSettings(), console), folder / TUPLES_FILE)
        with worker_processes(run_job, load_bench, folder) as run_jobs:
            yield run_jobs


def run_ablations(plan: AblationsPlan, run_jobs: RunAblations, folder: Path, console: Console) -> dict[str, Any]:
    """Tune, run the fresh seeds, report; all files are written to `folder`."""
    with counted(run_jobs, plan.num_runs, console) as run_counted:
        trainings, tuned = tune(plan, run_counted)
        measured = run_fresh_seeds(plan, trainings, run_counted)
    found = Found(studies=plan.studies, trainings=trainings, tuned=tuned, measured=measured, quick=plan.quick)
    results = to_json(found) | {"machine": machine()}
    draw_forest(results, folder / "ablations.png")
    write_results(folder, results, markdown(results))
    print_report(results, console)
    return results


def tune(plan: AblationsPlan, run_jobs: RunAblations) -> tuple[dict[Key, Training], dict[Key, Tuned[Training]]]:
    """How each variant is trained, and what was tried: first those that need no Teacher, whose rates Teachers take."""
    trainings: dict[Key, Training] = {}
    tuned: dict[Key, Tuned[Training]] = {}
    for study, with_teacher in product(plan.studies, (False, True)):
        variants: dict[Key, Variant] = {
            (study.name, each.name): each for each in study.variants() if (each.teacher is not None) == with_teacher
        }
        lessons = {key: _lesson(key, each, trainings) for key, each in variants.items()}
        if study.search is None:
            for key, each in variants.items():
                trainings[key] = Training(trial=each.trial, setting=each.setting, lesson=lessons[key])
            continue
        tried = {
            key: [Training(trial=trial, setting=each.setting, lesson=lessons[key]) for trial in each.trials()]
            for key, each in variants.items()
        }
        found = _search(study.search, tried, run_jobs)
        tuned |= found
        trainings |= {key: each.best for key, each in found.items()}
    return trainings, tuned


def _lesson(key: Key, variant: Variant, trainings: Mapping[Key, Training]) -> Lesson | None:
    """The Teacher of a variant, trained as its own variant was found to be trained best."""
    if variant.teacher is None:
        return None
    study, _ = key
    training = trainings[study, variant.teacher.of]
    return Lesson(kind=variant.teacher.kind, trial=training.trial, setting=training.setting)


def _search(search: Search, tried: Mapping[Key, list[Training]], run_jobs: RunAblations) -> dict[Key, Tuned[Training]]:
    """The best of each variant's trainings."""

    def judge(runs: Iterable[tuple[Training, int]]) -> Iterator[tuple[tuple[Training, int], float]]:
        jobs = [AblationJob(training=training, seed=seed, whole=False) for training, seed in runs]
        for job, measured in run_jobs(jobs):
            yield (job.training, job.seed), measured.tuning

    names = {f"{study}/{name}": (study, name) for study, name in tried}
    found = search.tune({told: tried[key] for told, key in names.items()}, judge)
    return {key: found[told] for told, key in names.items()}


def run_fresh_seeds(
    plan: AblationsPlan, trainings: Mapping[Key, Training], run_jobs: RunAblations
) -> dict[Key, list[Measured]]:
    """What was measured of every variant, by seed; variants that are the same are run once."""
    seeds: dict[str, range] = {
        study.name: range(study.first_seed, study.first_seed + study.num_seeds) for study in plan.studies
    }
    wanted = {
        key: [AblationJob(training=training, seed=seed, whole=True) for seed in seeds[key[0]]]
        for key, training in trainings.items()
    }
    every = dict.fromkeys(job for jobs in wanted.values() for job in jobs)
    measured = dict(run_jobs(sorted(every, key=lambda job: (job.seed, job.training.lesson is None))))
    keys = [(study.name, each.name) for study in plan.studies for each in study.variants()]
    return {key: [measured[job] for job in wanted[key]] for key in keys}
