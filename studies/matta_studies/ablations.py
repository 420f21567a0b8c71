"""What does what in MatTA: the paper's ablations and what it leaves open, on both case studies, with intervals.

Every variant is tuned with the same small budget (three rates, two seeds, on validation data), then run with the
same fresh seeds as the baselines, with which it is compared seed by seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, Final, final

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from matta_studies import quality, relevance, relevance_plan
from matta_studies.ablation_variants import BASELINE, BOTH, MATTA, QUALITY, RELEVANCE, SHAMPOO, Study, Variant
from matta_studies.ablations_report import draw_forest, told
from matta_studies.event_streams import EventStream, load_flights, save_stream
from matta_studies.experiment import (
    Found,
    Job,
    Lesson,
    Measured,
    RunJobs,
    Training,
    conduct,
    machine,
    plain,
    run_seeds,
    tune,
)
from matta_studies.intervals import Change, beyond_the_sum, relative_change
from matta_studies.labelled_films import RelevanceData, TupleSettings
from matta_studies.presentation import report
from matta_studies.rankers import EventModel, Ranker, RankerSize
from matta_studies.study_settings import AblationsSettings
from matta_studies.trials import STUDENT, TA, logits_over
from matta_studies.tuning import Tuned
from matta_studies.worker_pool import counted

Losses = Mapping[str, Mapping[str, list[float]]]
"""By variant and model: AucLoss by seed."""


def plan_of(settings: AblationsSettings) -> tuple[Study, ...]:
    """The studies behind the settings of the command line, with as many seeds as asked for."""
    studies = [study for study in (RELEVANCE, QUALITY) if settings.study in (study.name, "both")]
    if settings.quick:
        studies = [replace(study, search=None) for study in studies]
    return tuple(replace(study, num_seeds=settings.num_seeds) for study in studies)


def run(settings: AblationsSettings) -> dict[str, Any]:
    """The ablations; their figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    studies = plan_of(settings)

    def prepare(folder: Path, console: Console) -> str:
        for study in studies:
            if study.name == "quality":
                save_stream(load_flights(study.setting.batch), folder / quality.STREAM_FILE)
            else:
                relevance.copy_data(TupleSettings(), folder, console)
        return "tuples and flights"

    study = partial(run_ablations, studies, quick=settings.quick)
    return conduct("ablations", settings.out, prepare=prepare, load=load_bench, run_job=run_job, study=study)[1]


def run_ablations(
    studies: tuple[Study, ...], run_jobs: RunJobs, folder: Path, console: Console, *, quick: bool = False
) -> dict[str, Any]:
    """Tune, run the fresh seeds, report; all files are written to `folder`."""
    with counted(run_jobs, sum(study.num_runs for study in studies), console) as run_counted:
        trainings, tuned = tune_variants(studies, run_counted)
        seeds = {_key(study, each.name): study.seeds for study in studies for each in study.variants()}
        measured = run_seeds(trainings, seeds, run_counted)
    results = results_of(studies, trainings, tuned, measured) | {"quick": quick, "machine": machine()}
    draw_forest(results, folder / "ablations.png")
    report(results, told(results), folder, console)
    return results


def _key(study: Study, variant: str) -> str:
    return f"{study.name}/{variant}"


def tune_variants(
    studies: tuple[Study, ...], run_jobs: RunJobs
) -> tuple[dict[str, Training], dict[str, Tuned[Training]]]:
    """How each variant is trained, and what was tried: first those that need no Teacher, whose rates Teachers take."""
    trainings: dict[str, Training] = {}
    tuned: dict[str, Tuned[Training]] = {}
    for study, with_teacher in product(studies, (False, True)):
        tried: dict[str, list[Training]] = {}
        for each in study.variants():
            if (each.teacher is not None) == with_teacher:
                lesson = _lesson(study, each, trainings)
                trials = each.trials() if study.search else (each.trial,)
                tried[_key(study, each.name)] = [
                    Training(trial=trial, setting=each.setting, lesson=lesson) for trial in trials
                ]
        found = tune(study.search, tried, run_jobs) if study.search else {}
        tuned |= found
        trainings |= {key: found[key].best if found else each[0] for key, each in tried.items()}
    return trainings, tuned


def _lesson(study: Study, variant: Variant, trainings: Mapping[str, Training]) -> Lesson | None:
    """The Teacher of a variant, trained as its own variant was found to be trained best."""
    if variant.teacher is None:
        return None
    training = trainings[_key(study, variant.teacher.of)]
    return Lesson(kind=variant.teacher.kind, trial=training.trial, setting=training.setting)


@final
@dataclass(frozen=True, kw_only=True)
class Bench:
    """The data of both studies (or of one), and the Teachers' predictions that were made before."""

    tuples: RelevanceData | None = None
    stream: EventStream | None = None
    taught: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)


def load_bench(folder: Path) -> Bench:
    """The data in a folder; a missing file is a study that is left out."""
    return Bench(
        tuples=relevance.read_data(folder) if (folder / relevance.DATA_FILE).exists() else None,
        stream=quality.read_stream(folder) if (folder / quality.STREAM_FILE).exists() else None,
    )


def run_job(job: Job, bench: Bench) -> Measured:
    """Train, distil from a Teacher if there is one, and measure: on tuples, or on a stream."""
    trial, lesson = job.training.trial, job.training.lesson
    if isinstance(job.training.setting, relevance_plan.Setting):
        data = bench.tuples
        assert data is not None
        if lesson is not None:
            label = blend(data.train.label, remembered(job, bench), trial.student_weight, trial.distill_weight)
            data = replace(data, train=replace(data.train, label=label))
        return relevance.run_job(job, data)
    assert bench.stream is not None
    events = learned_from = quality.events_of(job, bench.stream)
    if lesson is not None:
        weight = trial.distill_weight * _maturity(job, len(events), bench.stream.first_quarter)
        label = blend(events.label, remembered(job, bench), trial.student_weight, weight)
        learned_from = replace(events, label=label)
    predicted = quality.predict_and_learn(trial, learned_from, job.training.setting, job.seed)
    return quality.score(predicted, events, bench.stream)


def blend(
    label: Float[Tensor, " n"], taught: Float[Tensor, " n"], student: float, distill: float | Tensor
) -> Float[Tensor, " n"]:
    """Labels whose cross-entropy is ω₁·L_S + ω₃·L_D, over ω₁ + ω₃: both are linear in what they are taken against.

    Example:
        >>> blend(torch.tensor([1.0]), torch.tensor([0.5]), 1.0, 3.0)
        tensor([0.6250])
    """
    return (student * label + distill * taught) / (student + distill)


def _maturity(job: Job, num_events: int, quarter: int) -> Float[Tensor, " events"]:
    """How much of ω₃ counts at each event: an ensemble comes in by the ramp, a frozen TA after its quarter."""
    lesson, setting = job.training.lesson, job.training.setting
    event = torch.arange(num_events)
    if lesson is not None and lesson.kind == "first":
        return (event >= quarter).float()
    return (event // setting.batch / max(1, setting.ramp)).clamp(max=1.0)


def remembered(job: Job, bench: Bench) -> Float[Tensor, " n"]:
    """The Teacher's probabilities for what the Student learns from; made once by each worker."""
    key = (job.training.lesson, job.training.setting, job.seed, job.whole)
    if key not in bench.taught:
        bench.taught.clear()  # seeds come one after the other
        bench.taught[key] = torch.stack(_votes(job, bench)).mean(0)
    return bench.taught[key]


def _votes(job: Job, bench: Bench) -> list[Tensor]:
    """The probabilities of each Teacher; on a stream each event is predicted before it is learned from."""
    lesson = job.training.lesson
    assert lesson is not None
    trial, setting, is_first = lesson.trial, lesson.setting, lesson.kind == "first"
    seeds = [job.seed]
    if not is_first:
        sizes = (job.training.setting.size, job.training.setting.ta_size)
        seeds = [
            1000 * job.seed + index for index in range(ensemble_size(*(_model(size, job, bench) for size in sizes)))
        ]
    if isinstance(setting, relevance_plan.Setting):
        data = bench.tuples
        assert data is not None
        teachers = (relevance.train(trial, data, setting, seed) for seed in seeds)
        return [logits_over(each, data.train.ids).sigmoid() for each in teachers]
    assert bench.stream is not None
    events, learned = quality.events_of(job, bench.stream), bench.stream.first_quarter if is_first else None
    predicted = (quality.predict_and_learn(trial, events, setting, seed, learned) for seed in seeds)
    return [each.logits[STUDENT].sigmoid() for each in predicted]


def _model(size: RankerSize, job: Job, bench: Bench) -> nn.Module:
    """A fresh model of a size, for the data of a job."""
    if isinstance(job.training.setting, relevance_plan.Setting):
        assert bench.tuples is not None
        return Ranker(bench.tuples.num_rows, size)
    assert bench.stream is not None
    return EventModel(bench.stream, size, even_pace=False)


def ensemble_size(student: nn.Module, ta: nn.Module) -> int:
    """How many Students have the TA's multiplications (lookups of embeddings have none).

    Example:
        >>> ensemble_size(nn.Linear(4, 2), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)))
        3
    """
    student_cost, ta_cost = (
        sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear)) for module in (student, ta)
    )
    return max(1, round(ta_cost / student_cost))


@final
@dataclass(frozen=True)
class Claim:
    """What the paper's tables say, as a sign: a model of one variant has a lower (-1) or higher (1) loss than another.

    `paper` is its change in percent, on relevance and on quality, where it gives one. Without a `reference` the claim
    is about what MatTA and Shampoo together give beyond the sum of both.
    """

    told: str
    variant: str
    model: str
    reference: tuple[str, str] | None
    paper: tuple[float, float] | None = None
    sign: int = -1


_ALONE: Final = (BASELINE, STUDENT)
CLAIMS: Final = (
    Claim("MatTA without Shampoo: its Student beats the one trained alone", MATTA, STUDENT, _ALONE, (-4.63, -0.25)),
    Claim("MatTA without Shampoo: so does its TA", MATTA, TA, _ALONE, (-5.92, -0.32)),
    Claim("Shampoo alone beats the first-order optimizer", SHAMPOO, STUDENT, _ALONE, (-3.89, -0.28)),
    Claim("MatTA with Shampoo: its Student beats the one trained alone, first order",
          BOTH, STUDENT, _ALONE, (-8.05, -0.60)),
    Claim("MatTA with Shampoo: so does its TA", BOTH, TA, _ALONE, (-9.47, -0.81)),
    Claim("MatTA with Shampoo: its Student beats Shampoo alone", BOTH, STUDENT, (SHAMPOO, STUDENT), (-4.33, -0.32)),
    Claim("MatTA with Shampoo: the TA is better than its Student", BOTH, TA, (BOTH, STUDENT), (-1.54, -0.21)),
    Claim("Student: both together give more than the sum of both", BOTH, STUDENT, None, (0.47, -0.07)),
    Claim("TA: both together give more than the sum of both", BOTH, TA, None, (0.34, -0.21)),
    Claim("Table 4: a Student that shares the embeddings alone is a little better",
          "unshared", STUDENT, (BOTH, STUDENT), (-0.26, -0.14)),
    Claim("Table 4: so is its TA", "unshared", TA, (BOTH, TA), (-0.44, -0.25)),
    Claim("Distillation from the TA helps the Student: it is worse with ω₃ = 0",
          "distill_0", STUDENT, (BOTH, STUDENT), sign=1),
    Claim("3.1.1: the weight of the distillation has to rise slowly: the Student is worse without a ramp",
          "ramp_0", STUDENT, (BOTH, STUDENT), sign=1),
)  # fmt: skip


def results_of(
    studies: tuple[Study, ...],
    trainings: Mapping[str, Training],
    tuned: Mapping[str, Tuned[Training]],
    measured: Mapping[str, list[Measured]],
) -> dict[str, Any]:
    """Everything, in types that JSON gives back as they are."""
    results: dict[str, Any] = {"studies": {}}
    for study in studies:
        variants = {each.name: each for each in study.variants()}
        found = Found(
            titles={name: each.title for name, each in variants.items()},
            trainings={name: trainings[_key(study, name)] for name in variants},
            tuned={name: tuned[_key(study, name)] for name in variants if _key(study, name) in tuned},
            measured={name: measured[_key(study, name)] for name in variants},
            figure=study.figure,
        )
        losses = {name: _losses(each, found) for name, each in variants.items()}
        results["studies"][study.name] = {
            "title": study.title,
            "num_seeds": study.num_seeds,
            "first_seed": study.first_seed,
            "search": study.search and dataclasses.asdict(study.search),
            "setting": dataclasses.asdict(study.setting),
            "ta": dataclasses.asdict(study.setting.ta_size),
            "variants": {name: _variant(each, losses, found) for name, each in variants.items()},
            "claims": [_claim(claim, study.name, losses) for claim in CLAIMS],
        }
        for model in (STUDENT, TA):
            for key, value in together(losses, model).to_json().items():
                results[f"{study.name}_{model.lower()}_beyond_the_sum_{key}"] = value
    return plain(results)


def _losses(variant: Variant, found: Found) -> dict[str, list[float]]:
    """AucLoss of a variant's models, by seed; a TA that is trained alone was measured as a Student is."""
    measured = zip(variant.models, found.models(variant.name), strict=True)
    return {model: found.losses(variant.name, name) for model, name in measured}


def together(losses: Losses, model: str) -> Change:
    """How far MatTA with Shampoo goes beyond the sum of what each gives alone.

    Shampoo alone has no TA: its Student stands in for it.
    """
    alone = (losses[name][STUDENT] for name in (SHAMPOO, BASELINE))
    shampoo, baseline = alone
    return beyond_the_sum(losses[BOTH][model], shampoo, losses[MATTA][model], baseline)


def verdict(change: Change, sign: int) -> str:
    """Whether an interval shows a change of a sign.

    Example:
        >>> [verdict(Change(mean=p, low=p - 1, high=p + 1), -1) for p in (-2.0, 0.5, 2.0)]
        ['seen', 'cannot be told by these seeds', 'not seen: it is the other way round']
    """
    if not change.is_certain:
        return "cannot be told by these seeds"
    return "seen" if sign * change.mean > 0 else "not seen: it is the other way round"


def _claim(claim: Claim, study: str, losses: Losses) -> dict[str, Any]:
    if claim.reference is None:
        change = together(losses, claim.model)
    else:
        variant, model = claim.reference
        change = relative_change(losses[claim.variant][claim.model], losses[variant][model])
    paper = claim.paper and claim.paper[study == "quality"]
    return {"told": claim.told, "paper": paper, **change.to_json(), "verdict": verdict(change, claim.sign)}


def _variant(variant: Variant, losses: Losses, found: Found) -> dict[str, Any]:
    name, trial = variant.name, found.trainings[variant.name].trial
    tried = found.tried("tuning_aucloss").get(name, [])
    rates = sorted(each["lr"] for each in tried)
    own = losses[name]
    parameters = [each["parameters"] for each in found.measured[name][0]["models"].values()]
    return {
        "title": variant.title,
        "group": variant.group,
        "chosen": str(trial),
        "rate": trial.lr,
        "rate_at_edge": trial.lr in (rates[:1] + rates[-1:]),
        "tried": [{"rate": each["lr"], "tuning_aucloss": each["tuning_aucloss"]} for each in tried],
        "parameters": dict(zip(variant.models, parameters, strict=True)),
        "aucloss": {model: {"mean": fmean(each), "seeds": each} for model, each in own.items()},
        "alone": variant.alone,
        "reference": variant.reference,
        "vs_alone": _changes(own, dict.fromkeys(own, losses[variant.alone][STUDENT])),
        "vs_reference": _changes(own, losses[variant.reference]),
    }


def _changes(own: Mapping[str, list[float]], others: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """By model, against what there is of the same model; nothing against itself."""
    return {
        model: relative_change(values, others[model]).to_json()
        for model, values in own.items()
        if model in others and others[model] != values
    }
