"""Case Study 2 on public data: does a TA make a small model on a stream of events better, and with Shampoo?

Flights, or ratings of films, come in the order of time; each is predicted before it is learned from. Every arm is
tuned on the first quarter with as many trials as any other; then all run over the whole stream with fresh seeds,
and are judged by the other three quarters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final, final

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor, nn

from matta.nesting.batches import Batch
from matta.objectives import Binary
from matta.optim.parameter_groups import shampoo_groups
from matta.optim.shampoo import Shampoo
from matta_studies.event_streams import EventStream, load_stream, save_stream
from matta_studies.experiment import Found, Job, Measured, RunJobs, conduct, plain
from matta_studies.intervals import Change, beyond_the_sum, change_of
from matta_studies.presentation import (
    COLORS,
    Line,
    Notes,
    Part,
    arm_table,
    chosen_table,
    draw_periods,
    report,
    told_machine,
)
from matta_studies.quality_plan import (
    AGAIN,
    BOTH,
    MATTA,
    REPLAY,
    SHAMPOO,
    STREAMS,
    QualityPlan,
    StreamSetting,
    StreamTrial,
    plan_of,
)
from matta_studies.rankers import EventModel, nest_rankers
from matta_studies.study_settings import QualitySettings
from matta_studies.trials import BASELINE, SHARES, STUDENT, TA, auc_loss, count_parameters, descend, models_of, step_of
from matta_studies.worker_pool import counted

STREAM_FILE: Final = "stream.safetensors"
SETTLED: Final = 1 / 3  # of the first quarter: what trials are judged by begins here


def run_job(job: Job, stream: EventStream) -> Measured:
    """Predict and learn all events of the stream, or of its first quarter; score."""
    events = events_of(job, stream)
    return score(predict_and_learn(job.training.trial, events, job.training.setting, job.seed), events, stream)


def events_of(job: Job, stream: EventStream) -> EventStream:
    """What a job runs over."""
    return stream if job.whole else stream.take(slice(stream.first_quarter))


@final
@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Every event's logit by each model, before it was learned from, and how many parameters they have."""

    logits: Mapping[str, Float[Tensor, " events"]]
    parameters: Mapping[str, int]


def predict_and_learn(
    trial: StreamTrial, stream: EventStream, setting: StreamSetting, seed: int, learned: int | None = None
) -> Predicted:
    """One pass over a stream, by a baseline or by a Student and its TA.

    Only the first `learned` events are learned from, if that is given; the others are predicted by what came of them.
    """
    torch.manual_seed(seed)
    model = make_model(trial, stream, setting)
    step = step_of(model, Binary(), trial, setting.ramp)
    coming = (((batch.ids, batch.numbers), batch.label) for batch in stream.batches(setting.batch))
    batches = _with_earlier(coming, trial, Random(seed))
    num_learned = None if learned is None else -(-learned // setting.batch) * trial.updates
    warm_up = max(1, setting.warm_up)
    steps = descend(
        step, make_optimizer(trial, model), lambda step: min(1.0, (step + 1) / warm_up), batches, num_learned
    )
    logits = zip(*(read() for read in islice(steps, 0, None, trial.updates)), strict=True)
    return Predicted(
        logits={name: torch.cat(each) for name, each in zip(trial.models, logits, strict=True)},
        parameters={name: count_parameters(each) for name, each in models_of(model).items()},
    )


def _with_earlier(coming: Iterable[Batch], trial: StreamTrial, random: Random) -> Iterator[Batch]:
    """Each batch that comes, followed by those that are learned from besides."""
    seen: list[Batch] = []
    for batch in coming:
        seen.append(batch)
        yield batch
        for _ in range(trial.updates - 1):
            yield random.choice(seen) if trial.replays else batch


def make_model(trial: StreamTrial, stream: EventStream, setting: StreamSetting) -> nn.Module:
    """The baseline, or a Student (or several) in its TA (`Nested`)."""
    student = EventModel(stream, setting.size, even_pace=trial.even_pace)
    if trial.method == "baseline":
        return student
    ta = EventModel(stream, setting.ta_size, even_pace=trial.even_pace)
    others = [EventModel(stream, size, even_pace=trial.even_pace) for size in setting.others]
    return nest_rankers([student, *others], ta, share=SHARES[trial.method], place=setting.place)


def make_optimizer(trial: StreamTrial, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a trial; embeddings have a rate of their own."""
    groups = shampoo_groups(model)
    for group in groups:
        group["lr"] = trial.lr * (1.0 if group["precondition"] else trial.embedding_factor)
    if trial.optimizer == "shampoo-adagrad":
        return Shampoo(groups, graft="adagrad", statistics_every=1, refresh_every=20)
    if trial.optimizer == "shampoo-adam":
        return Shampoo(groups, graft="adam", statistics_every=1, refresh_every=20)
    plain = [{"params": group["params"], "lr": group["lr"]} for group in groups]
    if trial.optimizer == "adagrad":
        return torch.optim.Adagrad(plain, fused=True)
    return torch.optim.Adam(plain, fused=True)


def score(predicted: Predicted, events: EventStream, stream: EventStream) -> Measured:
    """AucLoss of the parts of a stream, of which `events` is the whole or the first quarter.

    A model's `tuning` is that of the first quarter without its first third, `rest` that of the other three quarters.
    A pair is tuned by the mean of its models, as both are served.
    """
    quarter, period = stream.first_quarter, events.period
    settled = slice(int(SETTLED * quarter), quarter)
    models: dict[str, dict[str, Any]] = {}
    for name, logits in predicted.logits.items():
        by_period = [auc_loss(logits[period == one], events.label[period == one]) for one in period.unique()]
        models[name] = {
            "tuning": auc_loss(logits[settled], events.label[settled]),
            "rest": auc_loss(logits[quarter:], events.label[quarter:]) if len(events) > quarter else None,
            "by_period": by_period,
            "parameters": predicted.parameters[name],
        }
    return {"tuning": fmean(each["tuning"] for each in models.values()), "models": models}


def run(settings: QualitySettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    plan = plan_of(settings)
    sizes: list[int] = []

    def prepare(folder: Path, _: Console) -> str:
        stream = STREAMS[plan.stream].load(plan.setting.batch)
        sizes.append(len(stream))
        save_stream(stream, folder / STREAM_FILE)
        return plan.stream

    def study(run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
        return run_study(plan, sizes[0], run_jobs, folder, console)

    return conduct("quality", settings.out, prepare=prepare, load=read_stream, run_job=run_job, study=study)[1]


def read_stream(folder: Path) -> EventStream:
    """The stream of a study."""
    return load_stream(folder / STREAM_FILE)


def run_study(plan: QualityPlan, num_events: int, run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
    """Tune, run the fresh seeds, report; all files are written to `folder`."""
    with counted(run_jobs, plan.num_arm_runs, console) as run_counted:
        found = plan.run(run_counted, "rest")
    results = results_of(plan, found) | {"num_events": num_events}
    draw(results, folder / picture(results))
    report(results, told(results), folder, console)
    return results


# figure: (arm, model, arm that it is compared with)
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "student_vs_baseline": (BOTH, STUDENT, BASELINE),
    "ta_vs_baseline": (BOTH, TA, BASELINE),
    "student_vs_shampoo": (BOTH, STUDENT, SHAMPOO),
    "ta_vs_shampoo": (BOTH, TA, SHAMPOO),
    "shampoo_vs_baseline": (SHAMPOO, STUDENT, BASELINE),
    "matta_student_vs_baseline": (MATTA, STUDENT, BASELINE),
    "matta_ta_vs_baseline": (MATTA, TA, BASELINE),
}
LONGER_CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "again_vs_baseline": (AGAIN, STUDENT, BASELINE),
    "replay_vs_baseline": (REPLAY, STUDENT, BASELINE),
    "student_vs_again": (BOTH, STUDENT, AGAIN),
    "student_vs_replay": (BOTH, STUDENT, REPLAY),
}
# Change of AucLoss in percent, by the figure's name here (section 4; Table 3).
PAPER: Final[Mapping[str, float]] = {
    "matta_student_vs_baseline": -0.25,
    "matta_ta_vs_baseline": -0.32,
    "shampoo_vs_baseline": -0.28,
    "student_vs_baseline": -0.60,
    "ta_vs_baseline": -0.81,
}
WANTED: Final = {"student_vs_baseline": -1.0, "ta_vs_baseline": -1.7}


def results_of(plan: QualityPlan, found: Found) -> dict[str, Any]:
    """Everything that the study found, in types that JSON gives back as they are."""
    together = beyond_the_sum(*(found.losses(arm) for arm in (BOTH, SHAMPOO, MATTA, BASELINE)))
    compared = {**CHANGES, **(LONGER_CHANGES if AGAIN in found.titles else {})}
    results = found.summary(found.changes(compared) | {"beyond_the_sum": together}, "tuning_aucloss") | {
        "by_period": {arm: _periods(found, arm) for arm in found.titles},
        "stream": plan.stream,
        "setting": dataclasses.asdict(plan.setting),
        "search": dataclasses.asdict(plan.search) if plan.search else None,
        "fresh_seeds": [plan.seeds[0], plan.seeds[-1]],
    }
    return plain(results)


def _periods(found: Found, arm: str) -> dict[str, list[float]]:
    """AucLoss of each period, the mean over seeds."""
    by_seed = {
        model: [each["models"][model]["by_period"] for each in found.measured[arm]] for model in found.models(arm)
    }
    return {model: [fmean(period) for period in zip(*each, strict=True)] for model, each in by_seed.items()}


def told(results: Mapping[str, Any]) -> list[Part]:
    """The section of docs/results.md."""
    stream, warm_up = STREAMS[results["stream"]], results["setting"]["warm_up"]
    return [
        f"## {stream.title}{f', with a warm-up of {warm_up} steps' if warm_up else ''}",
        _what_was_run(results),
        arm_table(
            "Progressive AucLoss of the last three quarters", results, {**CHANGES, **LONGER_CHANGES}, PAPER, digits=4
        ),
        Notes([*notes(results), *edges(results), stream.seen]),
        chosen_table(results, "settings, chosen on the first quarter"),
        f"![AucLoss over the stream]({picture(results)})",
    ]


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the table says in words."""
    beyond = change_of(results, "beyond_the_sum")
    found = [
        f"MatTA with Shampoo against Shampoo alone: Student {change_of(results, 'student_vs_shampoo')}, "
        f"TA {change_of(results, 'ta_vs_shampoo')} (the paper: −0.32% and −0.53%).",
        f"For the Student, MatTA and Shampoo together give {beyond} beyond the sum of their changes: "
        f"{_verdict(beyond)} (the paper: −0.07%).",
        *missed(results),
        *longer_told(results),
    ]
    first_order = change_of(results, "matta_student_vs_baseline")
    if not first_order.high < 0:
        found.append(f"Without Shampoo the Student's change of {first_order} is no gain; the paper has −0.25%.")
    warm_up = results["setting"]["warm_up"]
    rates = f"after a warm-up of {warm_up} steps" if warm_up else "from the first step on"
    found.append(f"Rates are constant {rates}. Intervals: 95%, paired over {results['num_seeds']} fresh seeds.")
    return found


def longer_told(results: Mapping[str, Any]) -> list[str]:
    """How MatTA's Student compares with one that takes its time alone, if these arms were run."""
    if AGAIN not in results["titles"]:
        return []
    again, replay = (change_of(results, f"student_vs_{each}") for each in (AGAIN, REPLAY))
    return [
        f"The Student of MatTA with Shampoo against a Student alone with more steps a batch, on the same {again}, "
        f"on earlier ones {replay}."
    ]


def _verdict(beyond: Change) -> str:
    if not beyond.is_certain:
        return "these seeds cannot tell it from the sum"
    return "more than the sum" if beyond.high < 0 else "less than the sum"


def missed(results: Mapping[str, Any]) -> list[str]:
    """How far the figures of the flights are from what was asked for, where they fall short."""
    if results["stream"] != "flights":
        return []
    return [
        f"Wanted of {'the TA' if name.startswith('ta') else 'the Student'} against the baseline: at most {wanted}%; "
        f"missed by {percent - wanted:.2f} points."
        for name, wanted in WANTED.items()
        if (percent := results[f"{name}_percent"]) > wanted
    ]


def edges(results: Mapping[str, Any]) -> list[str]:
    """Which arms chose the lowest or the highest rate that was tried of their optimizer."""
    found = []
    for arm, chosen in results["chosen"].items():
        rates = sorted({each["lr"] for each in results["tried"][arm] if each["optimizer"] == chosen["optimizer"]})
        if len(rates) > 1 and chosen["lr"] in (rates[0], rates[-1]):
            found.append(f"{results['titles'][arm]} ({chosen['lr']:g} of {rates[0]:g} to {rates[-1]:g})")
    return [f"Chosen at the edge of the rates tried: {', '.join(found)}."] if found else []


def picture(results: Mapping[str, Any]) -> str:
    """Where the picture is, from the tables."""
    warm_up = results["setting"]["warm_up"]
    return f"images/quality-{results['stream']}{f'-warm-up-{warm_up}' if warm_up else ''}.png"


def draw(results: Mapping[str, Any], path: Path) -> None:
    """AucLoss over time."""
    by_period, stream = results["by_period"], STREAMS[results["stream"]]
    baseline = Line(label="baseline", color=COLORS["plain"], losses=by_period[BASELINE][STUDENT])
    shampoo = by_period[SHAMPOO][STUDENT]
    student, ta = (by_period[BOTH][model] for model in (STUDENT, TA))
    lines = [
        Line(label="Shampoo alone", color=COLORS["shampoo"], losses=shampoo, only_change=True),
        Line(label="Student, MatTA with Shampoo", color=COLORS[STUDENT], losses=student),
        Line(label="its TA", color=COLORS[TA], losses=ta),
    ]
    title = f"Each {stream.one} is predicted before it is learned from"
    draw_periods(path, title, stream.period, baseline, lines)


def command(results: Mapping[str, Any]) -> str:
    """What to type for these results."""
    stream, warm_up = results["stream"], results["setting"]["warm_up"]
    options = [f"--stream {stream}"] if stream != "flights" else []
    options += [f"--warm-up {warm_up}"] if warm_up else []
    options += ["--longer"] if AGAIN in results["titles"] else []
    return " ".join(["matta study quality", *options, f"--seeds {results['num_seeds']}"])


def _what_was_run(results: Mapping[str, Any]) -> str:
    """The command, what it ran, and on what."""
    stream, setting, search = STREAMS[results["stream"]], results["setting"], results["search"]
    hidden = "-".join(map(str, setting["hidden"]))
    first, last = results["fresh_seeds"]
    screening = search["num_screening_seeds"]
    return (
        f"`{command(results)}`: {stream.events}, {results['num_events']:,} in one pass in the order of time, batches "
        f"of {setting['batch']}, each {stream.one} predicted before it is learned from. Student: embeddings of "
        f"{setting['embedding']}, MLP {hidden}; TA: hidden layers {setting['ta_factor']}x. On the first quarter "
        f"{len(results['tried'][BASELINE])} trials for each arm with {screening} seed{'s' * (screening > 1)}, the "
        f"best {search['num_finalists']} with {len(search['seeds'])} (from {search['seeds'][0]} on); then AucLoss of "
        f"the other three quarters with seeds {first} to {last}. Shampoo has Adagrad's or Adam's graft, whichever was "
        f"better. {told_machine(results['machine'])}."
    )
