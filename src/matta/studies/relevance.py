"""Case Study 1 on public data: does a TA make a small ranker better, and what does Shampoo add?

A large Teacher labels {user, film, moment} tuples. Every arm trains a Student of one size on them: alone, in
its TA, in a TA that shares the embeddings alone, and the first two with Shampoo. Each arm is tuned with as
many trials as any other, on a validation part; then all run with fresh seeds.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from matta.checkpoints import load
from matta.studies.arms import ARMS, Arm
from matta.studies.family import measure_family
from matta.studies.ranker import Ranker
from matta.studies.ratings import load_ratings
from matta.studies.report import (
    COLUMNS,
    FAMILY_COLUMNS,
    PAPER,
    draw_family,
    family_rows,
    markdown_table,
    rich_table,
    table_rows,
)
from matta.studies.runfolder import dated, new_run_folder, require_new
from matta.studies.settings import RelevanceSettings
from matta.studies.statistics import Change, relative_change
from matta.studies.training import Scores, Setting, Trial
from matta.studies.tuning import Job, RunJobs, Search, Tuned, tune, worker_processes
from matta.studies.tuples import (
    RelevanceData,
    TupleSettings,
    cached_path,
    load_data,
    make_data,
    num_ticks,
    save_data,
)

FIRST_FRESH_SEED = 1000
BASELINE = "baseline"
SHAMPOO_BASELINE = "shampoo_baseline"
FAMILY_ARM = "shampoo_matta"


@final
@dataclass(frozen=True, kw_only=True)
class StudyPlan:
    """How much is done; what `RelevanceSettings` asks for, spelled out. No `search`: the stored settings."""

    num_seeds: int
    search: Search | None = field(default_factory=Search)
    setting: Setting = field(default_factory=Setting)
    tuples: TupleSettings = field(default_factory=TupleSettings)
    arms: tuple[Arm, ...] = ARMS

    @property
    def num_runs(self) -> int:
        """Training runs in all."""
        tuning = self.search.num_runs(self.arms) if self.search else 0
        return tuning + len(self.arms) * self.num_seeds


def plan_of(settings: RelevanceSettings) -> StudyPlan:
    """The plan behind the settings of the command line."""
    if settings.demo:
        return StudyPlan(num_seeds=settings.num_seeds, search=None)
    if settings.quick:
        return StudyPlan(
            num_seeds=settings.num_seeds,
            search=Search(seeds=Search().seeds[:1], num_trials=3),
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
    with worker_processes(data_path) as run_jobs, new_run_folder(out) as folder:
        results = run_study(plan, load_data(data_path), run_jobs, folder, console)
    console.print(_what_next(out, results))
    return results


def prepare_data(settings: TupleSettings, console: Console) -> Path:
    """The file of labelled tuples, made once and kept in the user's cache folder."""
    path = cached_path(settings)
    if path.exists():
        return path
    ratings = load_ratings()
    with _progress(console) as progress:
        task = progress.add_task("Teacher", total=num_ticks(settings, len(ratings.user)))
        save_data(make_data(settings, ratings, lambda: progress.advance(task)), path)
    return path


def run_study(
    plan: StudyPlan, data: RelevanceData, run_jobs: RunJobs, folder: Path, console: Console
) -> dict[str, Any]:
    """Tune, run the fresh seeds, measure the family; all files of the run are written to `folder`."""
    with _progress(console) as progress:
        task = progress.add_task("training runs", total=plan.num_runs)

        def counted(jobs: Any) -> Any:
            for each in run_jobs(jobs):
                progress.advance(task)
                yield each

        tuned = tune(plan.arms, plan.search, plan.setting, counted) if plan.search else {}
        best = {arm.name: tuned[arm.name].best if arm.name in tuned else arm.stored for arm in plan.arms}
        scores = _fresh_seeds(plan, best, counted, folder / "nested")
    nested = load(folder / "nested", *_modules(data, plan.setting))
    family = measure_family(nested, data, folder / "models")
    results = _results(plan, best, tuned, scores, family)
    rows = _rows(plan, scores)
    baseline = {
        "parameters": family[0]["parameters"],
        "aucloss": results["aucloss"][BASELINE]["Student"]["mean"],
    }
    draw_family(family, baseline, folder / "family.png")
    (folder / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False), encoding="utf-8")
    (folder / "results.md").write_text(_markdown(plan, rows, family, results), encoding="utf-8")
    _show(console, plan, rows, family, results)
    return results


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


def _modules(data: RelevanceData, setting: Setting) -> tuple[Ranker, Ranker]:
    return Ranker(data.num_rows, setting.size), Ranker(data.num_rows, setting.size.grown())


def _fresh_seeds(
    plan: StudyPlan, best: Mapping[str, Any], run_jobs: RunJobs, save_to: Path
) -> dict[str, list[Scores]]:
    """Scores of every arm, by seed; the first seed's pair of one arm is saved for the family."""
    seeds = [FIRST_FRESH_SEED + i for i in range(plan.num_seeds)]
    jobs = []
    for seed in seeds:
        for arm in plan.arms:
            path = save_to if arm.name == FAMILY_ARM and seed == seeds[0] else None
            jobs.append((arm.name, Job(trial=best[arm.name], seed=seed, setting=plan.setting, save_to=path)))
    name_of = {job: name for name, job in jobs}
    found: dict[str, dict[int, Scores]] = {arm.name: {} for arm in plan.arms}
    for job, scores in run_jobs([job for _, job in jobs]):
        found[name_of[job]][job.seed] = scores
    return {name: [by_seed[seed] for seed in seeds] for name, by_seed in found.items()}


def _test_losses(
    scores: Mapping[str, Sequence[Scores]], arm: str, model: str, part: str = "test"
) -> list[float]:
    if model == "Student":
        return [each.student[part] for each in scores[arm]]
    return [each.ta[part] for each in scores[arm] if each.ta is not None]


def _change(
    scores: Mapping[str, Sequence[Scores]], arm: str, model: str, reference: str = BASELINE
) -> Change:
    return relative_change(_test_losses(scores, arm, model), _test_losses(scores, reference, "Student"))


def _rows(plan: StudyPlan, scores: Mapping[str, Sequence[Scores]]) -> list[dict[str, Any]]:
    rows = []
    for arm in plan.arms:
        for model in ("Student",) if arm.method == "baseline" else ("Student", "TA"):
            row = {
                "arm": arm.name,
                "title": arm.title,
                "model": model,
                "aucloss": fmean(_test_losses(scores, arm.name, model)),
                "real_aucloss": fmean(_test_losses(scores, arm.name, model, "real")),
                "change": None if arm.name == BASELINE else _change(scores, arm.name, model),
            }
            rows.append(row)
    return rows


def _results(
    plan: StudyPlan,
    best: Mapping[str, Any],
    tuned: Mapping[str, Tuned],
    scores: Mapping[str, Sequence[Scores]],
    family: list[dict[str, Any]],
) -> dict[str, Any]:
    """Everything that the study found, in plain types."""
    changes = {
        "student_vs_baseline": _change(scores, "matta", "Student"),
        "ta_vs_baseline": _change(scores, "matta", "TA"),
        "unshared_student_vs_baseline": _change(scores, "unshared", "Student"),
        "unshared_ta_vs_baseline": _change(scores, "unshared", "TA"),
        "shampoo_baseline_vs_baseline": _change(scores, SHAMPOO_BASELINE, "Student"),
        "shampoo_student_vs_baseline": _change(scores, "shampoo_matta", "Student"),
        "shampoo_ta_vs_baseline": _change(scores, "shampoo_matta", "TA"),
        "shampoo_student_vs_shampoo": _change(scores, "shampoo_matta", "Student", SHAMPOO_BASELINE),
        "shampoo_ta_vs_shampoo": _change(scores, "shampoo_matta", "TA", SHAMPOO_BASELINE),
    }
    results: dict[str, Any] = {f"{name}_percent": change.percent for name, change in changes.items()}
    results |= {f"{name}_interval": change.interval for name, change in changes.items()}
    alone = changes["shampoo_baseline_vs_baseline"].percent + changes["student_vs_baseline"].percent
    results["additive_percent"] = alone
    results["gains_are"] = (
        "super-additive" if changes["shampoo_student_vs_baseline"].percent < alone else "additive or less"
    )
    results["num_seeds"] = plan.num_seeds
    results["aucloss"] = _losses(plan, scores, "test")
    results["real_aucloss"] = _losses(plan, scores, "real")
    results["chosen"] = {name: dataclasses.asdict(trial) for name, trial in best.items()}
    results["tried"] = {
        name: [
            {**dataclasses.asdict(trial), "validation_aucloss": list(losses)} for trial, losses in each.tried
        ]
        for name, each in tuned.items()
    }
    results["setting"] = _plain(plan.setting) | _plain(plan.tuples)
    results["family"] = family
    return results


def _plain(settings: Setting | TupleSettings) -> dict[str, Any]:
    """Settings as JSON gives them back: with lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(settings)))


def _losses(plan: StudyPlan, scores: Mapping[str, Sequence[Scores]], part: str) -> dict[str, Any]:
    """AucLoss of every arm and model: each seed's and the mean."""
    found: dict[str, Any] = {}
    for arm in plan.arms:
        models = ("Student",) if arm.method == "baseline" else ("Student", "TA")
        values = {model: _test_losses(scores, arm.name, model, part) for model in models}
        found[arm.name] = {model: {"mean": fmean(each), "seeds": each} for model, each in values.items()}
    return found


def _notes(plan: StudyPlan, results: Mapping[str, Any]) -> list[str]:
    """What the table says in words: the distance to the paper, and whether gains add up."""
    notes = []
    low, high = results["student_vs_baseline_interval"]
    percent = results["student_vs_baseline_percent"]
    if not high < 0:
        notes.append(
            f"First order: the Student's change of {percent:+.2f}% [{low:+.2f}, {high:+.2f}] is no gain "
            f"over the tuned baseline; the paper has {PAPER['matta'][0]:+.2f}%."
        )
    with_shampoo = Change(
        percent=results["shampoo_student_vs_shampoo_percent"],
        low=results["shampoo_student_vs_shampoo_interval"][0],
        high=results["shampoo_student_vs_shampoo_interval"][1],
    )
    notes.append(f"MatTA's Student with Shampoo against Shampoo alone: {with_shampoo} (paper: about -4.3%).")
    notes.append(
        f"Shampoo alone and MatTA alone add up to {results['additive_percent']:+.2f}%; together they give "
        f"{results['shampoo_student_vs_baseline_percent']:+.2f}%: {results['gains_are']}."
    )
    if plan.search is None:
        notes.append("Settings: those that the full study chose (matta study relevance).")
    notes.append(f"Intervals: 95%, paired over {plan.num_seeds} fresh seeds.")
    return notes


def _markdown(
    plan: StudyPlan, rows: list[dict[str, Any]], family: list[dict[str, Any]], results: Mapping[str, Any]
) -> str:
    """The tables as they stand in docs/results.md."""
    chosen = [(arm.title, str(Trial(**results["chosen"][arm.name]))) for arm in plan.arms]
    parts = [
        markdown_table(COLUMNS, table_rows(rows)),
        "\n".join(f"- {note}" for note in _notes(plan, results)),
        markdown_table(("arm", "settings"), chosen),
        markdown_table(FAMILY_COLUMNS, family_rows(family)),
    ]
    return "\n\n".join(parts) + "\n"


def _show(
    console: Console,
    plan: StudyPlan,
    rows: list[dict[str, Any]],
    family: list[dict[str, Any]],
    results: Mapping[str, Any],
) -> None:
    console.print(rich_table("AucLoss of held-out tuples (less is better)", COLUMNS, table_rows(rows)))
    for note in _notes(plan, results):
        console.print(note, highlight=False)
    console.print(
        rich_table(
            "One run, every size: sub-models of MatTA with Shampoo", FAMILY_COLUMNS, family_rows(family)
        )
    )


def _what_next(out: Path, results: Mapping[str, Any]) -> str:
    """What the user can do with the run folder."""
    student = results["family"][0]["file"]
    return (
        f"\nWritten to {out}: results.json, results.md, family.png, models/ and nested/.\n"
        f"Next: look at {out / 'family.png'}; serve a size with safetensors.torch.load_file('{out / student}');\n"
        f"go on training from matta.load('{out / 'nested'}', student, ta); for a model of your own: matta.nest."
    )
