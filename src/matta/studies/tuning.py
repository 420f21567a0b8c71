"""Choose each arm's settings by its validation AucLoss, with as many trials for one arm as for another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import final

import torch

from matta.checkpoints import save
from matta.studies.arms import Arm
from matta.studies.pool import run_on
from matta.studies.ranker import Ranker
from matta.studies.training import Scores, Setting, Trial, score, train
from matta.studies.tuples import RelevanceData, load_data

NUM_WORKERS = 2
TUNING_SEEDS = (100, 101, 102, 103, 104)
NUM_FINALISTS = 3  # trials of an arm that are judged by all tuning seeds


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run; a pair is saved as `nested` in the folder `save_to`, if that is given, with its factors."""

    trial: Trial
    seed: int
    setting: Setting
    save_to: Path | None = None


RunJobs = Callable[[Iterable[Job]], Iterator[tuple[Job, Scores]]]
"""Runs jobs, and gives each with its scores as it is done."""


def run_job(job: Job, data: RelevanceData) -> Scores:
    """Train and score."""
    model = train(job.trial, data, job.setting, job.seed, factors=job.save_to)
    if job.save_to is not None and not isinstance(model, Ranker):
        save(model, job.save_to / "nested")
    return score(model, data)


@contextmanager
def worker_processes(data_path: Path) -> Iterator[RunJobs]:
    """Two processes of one thread each: on models this small, more threads cost more than they bring."""
    context = get_context("spawn")
    with ProcessPoolExecutor(NUM_WORKERS, context, _start_worker, (data_path,)) as pool:

        yield lambda jobs: run_on(pool, _run_in_worker, jobs)


_data_of_worker: list[RelevanceData] = []


def _start_worker(path: Path) -> None:
    torch.set_num_threads(1)
    _data_of_worker.append(load_data(path))


def _run_in_worker(job: Job) -> Scores:
    return run_job(job, _data_of_worker[0])


@final
@dataclass(frozen=True, kw_only=True)
class Search:
    """How an arm is tuned: all its trials with the first seed, then the best few with the others."""

    seeds: tuple[int, ...] = TUNING_SEEDS
    num_trials: int | None = None  # of each arm; None: all
    num_finalists: int = NUM_FINALISTS

    def trials(self, arm: Arm) -> tuple[Trial, ...]:
        """The trials of an arm; fewer are spread evenly over all."""
        if self.num_trials is None:
            return arm.trials
        return tuple(arm.trials[i * len(arm.trials) // self.num_trials] for i in range(self.num_trials))

    def num_runs(self, arms: Sequence[Arm]) -> int:
        """Training runs in all."""
        again = self.num_finalists * (len(self.seeds) - 1)
        return sum(len(self.trials(arm)) + again for arm in arms)


@final
@dataclass(frozen=True, kw_only=True)
class Tuned:
    """The trial chosen for an arm, and every trial's validation AucLoss by seed."""

    best: Trial
    tried: tuple[tuple[Trial, tuple[float, ...]], ...]


def tune(arms: Sequence[Arm], search: Search, setting: Setting, run: RunJobs) -> dict[str, Tuned]:
    """The best trial of each arm by the mean validation AucLoss of its Student."""
    losses: dict[Trial, list[float]] = {}

    def judge(trials: Iterable[Trial], seeds: Sequence[int]) -> None:
        jobs = [Job(trial=trial, seed=seed, setting=setting) for trial in trials for seed in seeds]
        for job, scores in run(jobs):
            losses.setdefault(job.trial, []).append(scores.student["validation"])

    judge([trial for arm in arms for trial in search.trials(arm)], search.seeds[:1])
    ranked = {arm.name: sorted(search.trials(arm), key=lambda trial: losses[trial][0]) for arm in arms}
    if len(search.seeds) > 1:
        judge([t for trials in ranked.values() for t in trials[: search.num_finalists]], search.seeds[1:])
    found = {}
    for name, trials in ranked.items():
        best = min(trials[: search.num_finalists], key=lambda trial: fmean(losses[trial]))
        found[name] = Tuned(best=best, tried=tuple((trial, tuple(losses[trial])) for trial in trials))
    return found
