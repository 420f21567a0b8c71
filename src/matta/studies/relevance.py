"""Case Study 1 on public data: does a TA make a small ranker better, and what does Shampoo add?

A large Teacher labels {user, film, moment} tuples. Every arm trains a Student of one size on them: alone, in
its TA, in a TA that shares the embeddings alone, and the first two with Shampoo. Each arm is tuned with as
many trials as any other, on a validation part; then all run with fresh seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final, final

from rich.console import Console

from matta.checkpoints import load
from matta.studies.arms import ARMS, Arm
from matta.studies.family import measure_family
from matta.studies.journal import kept
from matta.studies.outcome import BASELINE, STUDENT, Outcome
from matta.studies.pool import counted, progress_bar, worker_processes
from matta.studies.ranker import Ranker
from matta.studies.ratings import load_ratings
from matta.studies.report import COLUMNS, FAMILY_COLUMNS, draw_family, family_rows
from matta.studies.runfolder import dated, new_run_folder, require_new, write_results
from matta.studies.settings import RelevanceSettings
from matta.studies.training import Job, RunJobs, Scores, Setting, Trial, run_job
from matta.studies.tuning import Search, Tuned
from matta.studies.tuples import (
    RelevanceData,
    TupleSettings,
    cached_path,
    load_data,
    make_data,
    num_ticks,
    save_data,
)
from matta.texttables import rich_table

FIRST_FRESH_SEED: Final = 8000
SEARCH: Final = Search(num_screening_seeds=2, num_finalists=4)
FAMILY_ARM: Final = "shampoo_matta"


@final
@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """How much is done; what `RelevanceSettings` asks for, spelled out. No `search`: the stored settings."""

    num_seeds: int
    search: Search | None = SEARCH
    setting: Setting = field(default_factory=Setting)
    tuples: TupleSettings = field(default_factory=TupleSettings)
    arms: tuple[Arm, ...] = ARMS

    @property
    def num_runs(self) -> int:
        """Training runs in all."""
        tuning = self.search.num_runs(arm.trials for arm in self.arms) if self.search else 0
        return tuning + len(self.arms) * self.num_seeds + 1


def plan_of(settings: RelevanceSettings) -> StudyPlan:
    """The plan behind the settings of the command line."""
    if settings.demo:
        return StudyPlan(num_seeds=settings.num_seeds, search=None)
    if settings.quick:
        return StudyPlan(
            num_seeds=settings.num_seeds,
            search=Search(seeds=SEARCH.seeds[:1], num_trials=3),
            tuples=TupleSettings(num_train=200_000, teacher_epochs=2),
        )
    return StudyPlan(num_seeds=settings.num_seeds)


def run(settings: RelevanceSettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    console = Console()
    out = settings.out or dated("relevance")
    require_new(out)
    plan = plan_of(settings)
    data_path = prepare_data(plan.tuples, console)
    with (
        worker_processes(run_job, load_data, data_path) as run_jobs,
        kept(run_jobs, out, data_path.name, console) as run_kept,
        new_run_folder(out) as folder,
    ):
        results = run_study(plan, load_data(data_path), run_kept, folder, console)
    console.print(_what_next(out, results))
    return results


def prepare_data(settings: TupleSettings, console: Console) -> Path:
    """The file of labelled tuples, made once and kept in the user's cache folder."""
    path = cached_path(settings)
    if path.exists():
        return path
    ratings = load_ratings()
    with progress_bar(console) as progress:
        task = progress.add_task("Teacher", total=num_ticks(settings, len(ratings.user)))
        save_data(make_data(settings, ratings, lambda: progress.advance(task)), path)
    return path


def run_study(
    plan: StudyPlan, data: RelevanceData, run_jobs: RunJobs, folder: Path, console: Console
) -> dict[str, Any]:
    """Tune, run the fresh seeds, measure the family; all files of the run are written to `folder`."""
    with counted(run_jobs, plan.num_runs, console) as run_counted:
        tuned = tune(plan, plan.search, run_counted) if plan.search else {}
        best = {arm.name: tuned[arm.name].best if arm.name in tuned else arm.stored for arm in plan.arms}
        scores = _run_fresh_seeds(plan, best, run_counted)
        _train_family(plan, best[FAMILY_ARM], run_counted, folder)
    outcome = Outcome(
        arms=plan.arms,
        setting=plan.setting,
        tuples=plan.tuples,
        best=best,
        tuned=tuned,
        scores=scores,
        family=_family(plan, data, folder),
    )
    _write(outcome, folder)
    _show(outcome, console)
    return outcome.to_json()


def tune(plan: StudyPlan, search: Search, run_jobs: RunJobs) -> dict[str, Tuned[Trial]]:
    """The best trial of each arm by validation AucLoss; a pair by the mean of Student and TA, as both are served."""

    def judge(runs: Iterable[tuple[Trial, int]]) -> Iterator[tuple[tuple[Trial, int], float]]:
        jobs = [Job(trial=trial, seed=seed, setting=plan.setting) for trial, seed in runs]
        for job, scores in run_jobs(jobs):
            yield (job.trial, job.seed), fmean(each["validation"] for each in (scores.student, scores.ta) if each)

    return search.tune({arm.name: arm.trials for arm in plan.arms}, judge)


def _run_fresh_seeds(plan: StudyPlan, best: Mapping[str, Trial], run_jobs: RunJobs) -> dict[str, list[Scores]]:
    """Scores of every arm, by seed."""
    seeds = range(FIRST_FRESH_SEED, FIRST_FRESH_SEED + plan.num_seeds)
    arm_of = {
        Job(trial=best[arm.name], seed=seed, setting=plan.setting): arm.name for seed in seeds for arm in plan.arms
    }
    found: dict[tuple[str, int], Scores] = {}
    for job, scores in run_jobs(list(arm_of)):
        found[arm_of[job], job.seed] = scores
    return {arm.name: [found[arm.name, seed] for seed in seeds] for arm in plan.arms}


def _train_family(plan: StudyPlan, trial: Trial, run_jobs: RunJobs, folder: Path) -> None:
    """One more run of a pair, with random sub-models trained along; it is saved in `folder`."""
    sampled = replace(trial, sampled=True)
    list(run_jobs([Job(trial=sampled, seed=FIRST_FRESH_SEED, setting=plan.setting, save_to=folder)]))


def _family(plan: StudyPlan, data: RelevanceData, folder: Path) -> list[dict[str, Any]]:
    """The extracted sub-models of the pair that `_train_family` has left in `folder`."""
    size = plan.setting.size
    nested = load(folder / "nested", Ranker(data.num_rows, size), Ranker(data.num_rows, size.grown()))
    return measure_family(nested, data, folder / "models")


def _write(outcome: Outcome, folder: Path) -> None:
    """The figures for machines and for people, and the picture."""
    losses = outcome.losses(BASELINE, STUDENT)
    baseline = {"parameters": outcome.family[0]["parameters"], "aucloss": sum(losses) / len(losses)}
    draw_family(outcome.family, baseline, folder / "family.png")
    write_results(folder, outcome.to_json(), outcome.markdown())


def _show(outcome: Outcome, console: Console) -> None:
    console.print(rich_table("AucLoss of held-out tuples (less is better)", COLUMNS, outcome.rows()))
    for note in outcome.notes():
        console.print(note, highlight=False)
    title = "One run, every size: MatTA with Shampoo, random sub-models trained along"
    console.print(rich_table(title, FAMILY_COLUMNS, family_rows(outcome.family)))


def _what_next(out: Path, results: Mapping[str, Any]) -> str:
    """What the user can do with the run folder."""
    student = results["family"][0]["file"]
    return (
        f"\nWritten to {out}: results.json, results.md, family.png, models/, nested/ and preconditioner.safetensors.\n"
        f"Next: look at {out / 'family.png'}; serve a size with safetensors.torch.load_file('{out / student}');\n"
        f"go on training from matta.load('{out / 'nested'}', student, ta); for a model of your own: matta.nest."
    )
