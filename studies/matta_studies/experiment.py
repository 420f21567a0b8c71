"""What all studies do: tune each arm, run all arms with the same fresh seeds, compare them seed by seed."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypedDict, final

from rich.console import Console

from matta.errors import RunError
from matta_studies.intervals import Change, figures, relative_change
from matta_studies.journal import kept
from matta_studies.trials import STUDENT
from matta_studies.tuning import Search, Tuned
from matta_studies.worker_pool import Run, worker_processes


@final
@dataclass(frozen=True, kw_only=True)
class Training:
    """All that a run depends on but its seed: what is tuned, what is not, and a Teacher of the Student's, if any.

    Trials and settings are of each study's own types.
    """

    trial: Any
    setting: Any
    lesson: Lesson | None = None


@final
@dataclass(frozen=True, kw_only=True)
class Lesson:
    """The Teacher of a Student that is trained alone on its predictions and the labels, and how it is trained.

    "first": a TA that was trained alone before. "ensemble": models of the Student's size, as many as cost what the TA
    costs.
    """

    kind: Literal["first", "ensemble"]
    trial: Any
    setting: Any


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """One run: to choose settings, or (`whole`) to be reported; some leave files in the folder `save_to`."""

    training: Training
    seed: int
    whole: bool
    save_to: Path | None = None


class Measured(TypedDict):
    """What a run is judged by when settings are chosen (less is better), and figures of each model by name."""

    tuning: float
    models: dict[str, dict[str, Any]]


RunJobs = Run[Job, Measured]
"""Runs jobs, and gives each with what was measured as it is done."""


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the table: a way to train, and the trials among which its settings are chosen."""

    name: str
    title: str
    trials: tuple[Any, ...]
    stored: Any = None  # what a full study has chosen, to be used without tuning


Further = Mapping[str, tuple[Training, int]]
"""By name: what is asked beside the arms, and how many of the fresh seeds it has."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is done. No `search`: the stored trials."""

    arms: tuple[Arm, ...]
    setting: Any
    num_seeds: int
    first_seed: int
    search: Search | None

    @property
    def seeds(self) -> range:
        """The fresh seeds."""
        return range(self.first_seed, self.first_seed + self.num_seeds)

    @property
    def num_arm_runs(self) -> int:
        """Training runs for the arms in all."""
        tuning = self.search.num_runs(arm.trials for arm in self.arms) if self.search else 0
        return tuning + len(self.arms) * self.num_seeds

    def tune(self, run_jobs: RunJobs) -> tuple[dict[str, Training], dict[str, Tuned[Training]]]:
        """How each arm is trained, and what was tried for that."""
        if self.search is None:
            return {arm.name: Training(trial=arm.stored, setting=self.setting) for arm in self.arms}, {}
        tried = {arm.name: [Training(trial=each, setting=self.setting) for each in arm.trials] for arm in self.arms}
        tuned = tune(self.search, tried, run_jobs)
        return {name: each.best for name, each in tuned.items()}, tuned

    def run(
        self, run_jobs: RunJobs, figure: str, further: Callable[[Mapping[str, Training]], Further] | None = None
    ) -> Found:
        """Tune the arms, and run them with the fresh seeds; and what is further asked, which may hang on the tuning."""
        trainings, tuned = self.tune(run_jobs)
        asked = further(trainings) if further else {}
        seeds = dict.fromkeys(trainings, self.seeds) | {name: self.seeds[:count] for name, (_, count) in asked.items()}
        measured = run_seeds(trainings | {name: each for name, (each, _) in asked.items()}, seeds, run_jobs)
        titles = {arm.name: arm.title for arm in self.arms}
        return Found(titles=titles, trainings=trainings, tuned=tuned, measured=measured, figure=figure)


def tune(search: Search, tried: Mapping[str, Sequence[Training]], run_jobs: RunJobs) -> dict[str, Tuned[Training]]:
    """The best of each arm's trainings."""

    def judge(runs: Iterable[tuple[Training, int]]) -> Iterator[tuple[tuple[Training, int], float]]:
        for job, measured in run_jobs([Job(training=each, seed=seed, whole=False) for each, seed in runs]):
            yield (job.training, job.seed), measured["tuning"]

    return search.tune(tried, judge)


def run_seeds(
    trainings: Mapping[str, Training], seeds: Mapping[str, Iterable[int]], run_jobs: RunJobs
) -> dict[str, list[Measured]]:
    """What was measured of each training, by seed; those that are the same are run once."""
    jobs = {
        name: [Job(training=each, seed=seed, whole=True) for seed in seeds[name]] for name, each in trainings.items()
    }
    every = dict.fromkeys(job for each in jobs.values() for job in each)
    # What a Teacher has said is kept until the next seed; and the runs that it makes long come first.
    measured = dict(run_jobs(sorted(every, key=lambda job: (job.seed, job.training.lesson is None))))
    return {name: [measured[job] for job in each] for name, each in jobs.items()}


@final
@dataclass(frozen=True, kw_only=True)
class Found:
    """How every arm was trained, what was tried for that, and what was measured by seed.

    `figure` is the one that is reported of each model.
    """

    titles: Mapping[str, str]
    trainings: Mapping[str, Training]
    tuned: Mapping[str, Tuned[Training]]
    measured: Mapping[str, Sequence[Measured]]
    figure: str

    def models(self, arm: str) -> tuple[str, ...]:
        """What an arm trains."""
        return tuple(self.measured[arm][0]["models"])

    def losses(self, arm: str, model: str = STUDENT, figure: str | None = None) -> list[float]:
        """A figure of a model, by seed."""
        return [each["models"][model][figure or self.figure] for each in self.measured[arm]]

    def change(self, arm: str, model: str, reference: str) -> Change:
        """The relative change against another arm's Student."""
        return relative_change(self.losses(arm, model), self.losses(reference))

    def changes(self, compared: Mapping[str, tuple[str, str, str]]) -> dict[str, Change]:
        """By a figure's name: of (arm, model) against an arm's Student."""
        return {name: self.change(*each) for name, each in compared.items()}

    def by_model(self, arm: str, figure: str | None = None) -> dict[str, dict[str, Any]]:
        """Mean and values by seed, of each of an arm's models."""
        losses = {model: self.losses(arm, model, figure) for model in self.models(arm)}
        return {model: {"mean": fmean(each), "seeds": each} for model, each in losses.items()}

    def by_arm(self, figure: str | None = None) -> dict[str, Any]:
        """`by_model` of all arms."""
        return {arm: self.by_model(arm, figure) for arm in self.titles}

    def chosen(self, arm: str) -> dict[str, Any]:
        """An arm's trial, field by field and in words."""
        trial = self.trainings[arm].trial
        return dataclasses.asdict(trial) | {"told": str(trial)}

    def tried(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """By arm: the trials, and under `name` the losses of each by tuning seed."""
        return {
            arm: [dataclasses.asdict(each.trial) | {name: list(losses)} for each, losses in tuned.tried]
            for arm, tuned in self.tuned.items()
        }

    def summary(self, changes: Mapping[str, Change], tried: str) -> dict[str, Any]:
        """What the results of a study begin with; `tried` is the name of the loss by which trials were judged."""
        return figures(changes) | {
            "num_seeds": len(next(iter(self.measured.values()))),
            "titles": self.titles,
            "aucloss": self.by_arm(),
            "chosen": {arm: self.chosen(arm) for arm in self.titles},
            "tried": self.tried(tried),
            "machine": machine(),
        }


def plain(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results in types that JSON gives back as they are."""
    return json.loads(json.dumps(results, allow_nan=False))


def conduct(
    name: str,
    out: Path | None,
    *,
    prepare: Callable[[Path, Console], str],
    load: Callable[[Path], Any],
    run_job: Callable[[Job, Any], Measured],
    study: Callable[[RunJobs, Path, Console], dict[str, Any]],
) -> tuple[Path, dict[str, Any]]:
    """The run folder of a study, and its results. If it is stopped, what was done is kept.

    Args:
        name: The study's.
        out: The run folder to be, if it is chosen.
        prepare: Writes the data to a folder, and says which it is.
        load: Reads the data from that folder, in each worker process.
        run_job: One run with the data.
        study: Has the runs made, writes all files to a folder, and gives the results.

    Raises:
        RunError: the run folder exists.
    """
    console = Console()
    out = out or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    require_new(out)
    with tempfile.TemporaryDirectory() as made:
        data = prepare(Path(made), console)
        with (
            worker_processes(run_job, load, Path(made)) as run_jobs,
            kept(run_jobs, out, data, console) as run_kept,
            new_run_folder(out) as folder,
        ):
            results = study(run_kept, folder, console)
    console.print(f"\nWritten to {out}: {', '.join(sorted(each.name for each in out.iterdir()))}.", highlight=False)
    return out, results


def require_new(path: Path) -> None:
    """Refuse a folder that exists, before anything is computed.

    Raises:
        RunError: it exists.
    """
    if path.exists():
        raise RunError(f"--out {path} exists; expected a new folder: name another, or remove it")


@contextmanager
def new_run_folder(path: Path) -> Iterator[Path]:
    """A folder to write to; it moves to `path` when all went well, and is removed when not.

    Raises:
        RunError: `path` exists.
    """
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield made
        require_new(path)
        made.chmod(0o755)
        made.rename(path)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def machine() -> dict[str, str | int]:
    """What figures may hang on besides the seeds; names of machines are left out.

    Example:
        >>> sorted(machine())
        ['cores', 'processor', 'python', 'torch']
    """
    return {
        "cores": os.cpu_count() or 1,
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
