"""Language models on real text: does a TA make a small GPT-2 better, and every size between?

Every arm trains a Student of one size on the same windows of bytes: alone or in its TA, with AdamW or with
Shampoo. Each arm is tuned with as many trials as any other, on a validation part; then all run with fresh seeds. With
what MatTA with Shampoo has chosen, three more questions are asked: where the Student should sit in depth, what a
family is worth whose sub-models are trained along, and how much room a Student of this size has.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, final

from rich.console import Console

from matta.studies.journal import kept
from matta.studies.languagemodel import PLACES
from matta.studies.languageoutcome import FAMILY, LONGER, MATTA, SHAMPOO, SHAMPOO_MATTA, TIMES_LONGER, Outcome
from matta.studies.languagereport import draw_family, markdown, print_report
from matta.studies.languagetext import cut, load_text, read_topics
from matta.studies.languagetraining import Job, Method, Optimizer, Scores, Setting, Trial, run_job
from matta.studies.pool import Run, counted, worker_processes
from matta.studies.runfolder import dated, new_run_folder, require_new, write_results
from matta.studies.settings import LanguageSettings
from matta.studies.tuning import Search, Tuned

FIRST_FRESH_SEED: Final = 9100
SEARCH: Final = Search(seeds=(100, 101), num_finalists=2)
QUICK_SEARCH: Final = Search(seeds=(100,), num_trials=2, num_finalists=1)

RunJobs = Run[Job, Scores]
"""Runs jobs, and gives each with its scores as it is done."""


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the table: a way to train, and the trials among which its settings are chosen."""

    name: str
    title: str
    trials: tuple[Trial, ...]


RATES: Final[Mapping[tuple[Method, Optimizer], tuple[float, float, float]]] = {
    ("baseline", "adamw"): (0.0035, 0.005, 0.0075),
    ("matta", "adamw"): (0.005, 0.0075, 0.011),
    ("baseline", "shampoo"): (0.0075, 0.011, 0.016),
    ("matta", "shampoo"): (0.011, 0.016, 0.022),
}
"""Around the best that the search found for a baseline, and a step higher for a pair (docs/log.md)."""


def _trials(method: Method, optimizer: Optimizer) -> tuple[Trial, ...]:
    """The three rates; all else is the same in every trial."""
    return tuple(Trial(method=method, optimizer=optimizer, lr=lr) for lr in RATES[method, optimizer])


ARMS: Final = (
    Arm(name="baseline", title="baseline alone, AdamW", trials=_trials("baseline", "adamw")),
    Arm(name=MATTA, title="MatTA, AdamW", trials=_trials("matta", "adamw")),
    Arm(name=SHAMPOO, title="baseline alone, Shampoo", trials=_trials("baseline", "shampoo")),
    Arm(name=SHAMPOO_MATTA, title="MatTA, Shampoo", trials=_trials("matta", "shampoo")),
)


@final
@dataclass(frozen=True, kw_only=True)
class LanguagePlan:
    """How much is done: fresh seeds of the arms, and how many of them the further questions get.

    `num_family` is for the family, `num_further` for the places in depth and the longer runs.
    """

    num_seeds: int
    num_family: int
    num_further: int
    search: Search = SEARCH
    setting: Setting = field(default_factory=Setting)
    arms: tuple[Arm, ...] = ARMS

    @property
    def num_runs(self) -> int:
        """Training runs in all."""
        names = [*(arm.name for arm in self.arms), FAMILY, *LONGER.values(), *PLACES[1:]]  # one place is the arm's own
        return self.search.num_runs(arm.trials for arm in self.arms) + sum(self.seeds_of(name) for name in names)

    def seeds_of(self, name: str) -> int:
        """How many fresh seeds an arm or a further question gets."""
        if any(name == arm.name for arm in self.arms):
            return self.num_seeds
        return min(self.num_family if name == FAMILY else self.num_further, self.num_seeds)


def plan_of(settings: LanguageSettings) -> LanguagePlan:
    """The plan behind the settings of the command line."""
    if settings.quick:
        return LanguagePlan(
            num_seeds=settings.num_seeds,
            num_family=2,
            num_further=2,
            search=QUICK_SEARCH,
            setting=Setting(steps=200, warm_up=20),
        )
    return LanguagePlan(num_seeds=settings.num_seeds, num_family=5, num_further=3)


def run(settings: LanguageSettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    console = Console()
    out = settings.out or dated("language")
    require_new(out)
    data = read_topics()
    source = cut(data).source
    with (
        on_workers(data) as run_jobs,
        kept(run_jobs, out, source, console) as run_kept,
        new_run_folder(out) as folder,
    ):
        results = run_study(plan_of(settings), source, run_kept, folder, console)
    console.print(f"\nWritten to {out}: results.json, results.md and language.png.", highlight=False)
    return results


@contextmanager
def on_workers(data: bytes) -> Iterator[RunJobs]:
    """Worker processes that have the text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text"
        path.write_bytes(data)
        with worker_processes(run_job, load_text, path) as run_jobs:
            yield run_jobs


def run_study(plan: LanguagePlan, source: str, run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
    """Tune, run the fresh seeds, report; all files are written to `folder`."""
    with counted(run_jobs, plan.num_runs, console) as run_counted:
        tuned = tune(plan, run_counted)
        best = {name: each.best for name, each in tuned.items()}
        scores = run_fresh_seeds(plan, best, run_counted)
    outcome = Outcome(
        titles={arm.name: arm.title for arm in plan.arms},
        setting=plan.setting,
        source=source,
        tuned=tuned,
        scores=scores,
    )
    results = outcome.to_json()
    draw_family(results, folder / "language.png")
    write_results(folder, results, markdown(results))
    print_report(results, console)
    return results


def tune(plan: LanguagePlan, run_jobs: RunJobs) -> dict[str, Tuned[Trial]]:
    """The best trial of each arm by its Student's bits per byte of the validation part."""

    def judge(runs: Iterable[tuple[Trial, int]]) -> Iterator[tuple[tuple[Trial, int], float]]:
        for job, scores in run_jobs([Job(trial=trial, seed=seed, setting=plan.setting) for trial, seed in runs]):
            yield (job.trial, job.seed), scores.student["validation"]

    return plan.search.tune({arm.name: arm.trials for arm in plan.arms}, judge)


def run_fresh_seeds(plan: LanguagePlan, best: Mapping[str, Trial], run_jobs: RunJobs) -> dict[str, list[Scores]]:
    """The scores of all that is asked, by name and seed."""
    names: dict[Job, str] = {}
    for name, trial in (dict(best) | further_trials(best)).items():
        for seed in range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + plan.seeds_of(name)):
            names[Job(trial=trial, seed=seed, setting=plan.setting, family=name == FAMILY)] = name
    found: dict[str, dict[int, Scores]] = {}
    for job, scores in run_jobs(list(names)):
        found.setdefault(names[job], {})[job.seed] = scores
    return {name: [by_seed[seed] for seed in sorted(by_seed)] for name, by_seed in found.items()}


def further_trials(best: Mapping[str, Trial]) -> dict[str, Trial]:
    """The three further questions: other places in depth, a family trained along, and a longer run alone."""
    pair = best[SHAMPOO_MATTA]
    places: dict[str, Trial] = {place: replace(pair, place=place) for place in PLACES if place != pair.place}
    longer = {LONGER[name]: replace(best[name], longer=TIMES_LONGER) for name in LONGER}
    return {**places, FAMILY: replace(pair, sampled=True), **longer}
