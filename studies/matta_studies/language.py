"""Language models on real text: does a TA make a small GPT-2 better, and every size between?

Every arm trains a Student of one size on the same windows of bytes: alone or in its TA, with AdamW or with
Shampoo. Each arm is tuned with as many trials as any other, on a validation part; then all run with fresh seeds. With
what MatTA with Shampoo has chosen, three more questions are asked: where the Student should sit in depth, what a
family is worth whose sub-models are trained along, and how much room a Student of this size has.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final, Literal, final

import torch
from jaxtyping import Int64
from rich.console import Console
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from matta.errors import RunError
from matta.nesting.batches import logits_of
from matta.nesting.nested import Nested, nest
from matta.objectives import CausalLM
from matta.optim.shampoo import Shampoo
from matta.sizes.extraction import extract
from matta.sizes.submodels import SubModel, layer_names, wide_narrow_wide
from matta_studies.experiment import (
    Arm,
    Found,
    Further,
    Job,
    Measured,
    Plan,
    RunJobs,
    Training,
    conduct,
    plain,
)
from matta_studies.intervals import difference, relative_change
from matta_studies.presentation import Notes, Part, Point, Table, draw_family, report
from matta_studies.study_settings import LanguageSettings
from matta_studies.trials import BASELINE, STUDENT, TA, Method, Trial, count_parameters, descend, models_of, step_of
from matta_studies.tuning import Search
from matta_studies.worker_pool import counted

Place = Literal["first", "last", "even", "ends"]
Blocks = Int64[Tensor, "_ _"]  # blocks, bytes

TEXT_FILE: Final = "text"
BLOCK: Final = 4096  # bytes that stay together
VALIDATION_BLOCK, TEST_BLOCK, OF_BLOCKS = 4, 9, 10  # of each ten blocks the fifth and the last are held out
VOCABULARY: Final = 256
EVALUATION_BATCH: Final = 128
BETAS: Final = (0.9, 0.99)
PLACES: Final[tuple[Place, ...]] = ("first", "last", "even", "ends")
FIRST_FRESH_SEED: Final = 9100
SEARCH: Final = Search(seeds=(100, 101), num_finalists=2)
QUICK_SEARCH: Final = Search(seeds=(100,), num_trials=2, num_finalists=1)
MATTA, SHAMPOO, BOTH, FAMILY = "matta", "shampoo_baseline", "shampoo_matta", "family"
LONGER: Final[Mapping[str, str]] = {BASELINE: "baseline_longer", SHAMPOO: "shampoo_baseline_longer"}
TIMES_LONGER: Final = 2


@final
@dataclass(frozen=True, kw_only=True)
class Text:
    """Whole blocks of bytes, the last incomplete one left out; `source` says what was read."""

    train: Blocks
    validation: Blocks
    test: Blocks
    source: str


def read_topics() -> bytes:
    """CPython's help topics, some 466 kB of English about the language, one after the other by name."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


def cut(data: bytes, block: int = BLOCK) -> Text:
    """The parts of a text: eight of each ten blocks are for training.

    Raises:
        RunError: fewer than ten blocks.

    Example:
        >>> text = cut(bytes(range(100)), block=5)
        >>> text.validation.tolist()
        [[20, 21, 22, 23, 24], [70, 71, 72, 73, 74]]
        >>> len(text.train), len(text.test)
        (16, 2)
    """
    count = len(data) // block
    if count < OF_BLOCKS:
        raise RunError(f"the text has {len(data):,} bytes; expected at least {OF_BLOCKS * block:,}, ten blocks")
    blocks = torch.frombuffer(bytearray(data[: count * block]), dtype=torch.uint8).long().view(count, block)
    place = torch.arange(count) % OF_BLOCKS
    digest = hashlib.sha256(data).hexdigest()[:16]
    held_out = (place == VALIDATION_BLOCK) | (place == TEST_BLOCK)
    return Text(
        train=blocks[~held_out],
        validation=blocks[place == VALIDATION_BLOCK],
        test=blocks[place == TEST_BLOCK],
        source=f"{len(data):,} bytes, SHA-256 {digest}, Python {platform.python_version()}",
    )


def load_text(folder: Path) -> Text:
    """The parts of the text of a study."""
    return cut((folder / TEXT_FILE).read_bytes())


def batches(
    part: Blocks, *, steps: int, batch: int, context: int, generator: torch.Generator
) -> Iterator[Int64[Tensor, "batch context"]]:
    """Windows at places drawn by chance, the same for all who have the same generator.

    Blocks follow each other as if nothing was taken out between them: a window in a thousand or so has a seam.
    """
    flat = part.reshape(-1)
    offsets = torch.arange(context)
    for _ in range(steps):
        starts = torch.randint(len(flat) - context + 1, (batch, 1), generator=generator)
        yield flat[starts + offsets]


@final
@dataclass(frozen=True, kw_only=True)
class GptSize:
    """Blocks, hidden width, width within the FFNs and heads."""

    layers: int
    width: int
    ffn: int
    heads: int

    def __str__(self) -> str:
        return f"{self.layers} layers, d_model {self.width}, FFN {self.ffn}, {self.heads} heads"


@final
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is equal for all arms: fixed before the fresh seeds were run (docs/log.md has the search)."""

    student: GptSize = field(default_factory=lambda: GptSize(layers=3, width=48, ffn=96, heads=3))
    ta: GptSize = field(default_factory=lambda: GptSize(layers=5, width=48, ffn=384, heads=3))
    context: int = 64
    batch: int = 8
    steps: int = 6400
    warm_up: int = 640
    init_std: float = 0.08

    @property
    def tokens(self) -> int:
        """Bytes of the windows that a run is trained on."""
        return self.steps * self.batch * self.context


@final
@dataclass(frozen=True, kw_only=True)
class GptTrial(Trial):
    """The highest rate falls to zero; `ramp` is the share of the run over which the distillation comes in.

    With `sampled`, one of the sub-models K = 0 ... N-1 is trained along at each step, and all are judged. `longer` is
    how many times the setting's steps are made.
    """

    ramp: float = 0.2
    place: Place = "even"
    sampled: bool = False
    longer: int = 1

    def told_ramp(self) -> str:
        return f", ramp {self.ramp:g}"


def _arm(name: str, title: str, method: Method, optimizer: str, rates: tuple[float, float, float]) -> Arm:
    """The rates lie around the best that the search found for a baseline, a step higher for a pair (docs/log.md)."""
    trials = tuple(GptTrial(method=method, optimizer=optimizer, lr=lr) for lr in rates)
    return Arm(name=name, title=title, trials=trials)


ARMS: Final = (
    _arm(BASELINE, "baseline alone, AdamW", "baseline", "adamw", (0.0035, 0.005, 0.0075)),
    _arm(MATTA, "MatTA, AdamW", "matta", "adamw", (0.005, 0.0075, 0.011)),
    _arm(SHAMPOO, "baseline alone, Shampoo", "baseline", "shampoo", (0.0075, 0.011, 0.016)),
    _arm(BOTH, "MatTA, Shampoo", "matta", "shampoo", (0.011, 0.016, 0.022)),
)


@final
@dataclass(frozen=True, kw_only=True)
class LanguagePlan(Plan):
    """What `LanguageSettings` asks for, spelled out.

    `num_family` is how many fresh seeds the family has, `num_further` the places in depth and the longer runs.
    """

    arms: tuple[Arm, ...] = ARMS
    setting: Setting = field(default_factory=Setting)
    first_seed: int = FIRST_FRESH_SEED
    search: Search | None = SEARCH
    num_family: int = 5
    num_further: int = 3

    @property
    def num_runs(self) -> int:
        """Training runs in all."""
        num_further = len(LONGER) + len(PLACES) - 1  # one place is the arm's own
        return (
            self.num_arm_runs + len(self.seeds[: self.num_family]) + num_further * len(self.seeds[: self.num_further])
        )

    def further(self, trainings: Mapping[str, Training]) -> Further:
        """The three further questions: other places in depth, a family trained along, and a longer run alone."""

        def changed(name: str, **changes: Any) -> Training:
            return replace(trainings[name], trial=replace(trainings[name].trial, **changes))

        places = {place: changed(BOTH, place=place) for place in PLACES if place != trainings[BOTH].trial.place}
        longer = {further: changed(name, longer=TIMES_LONGER) for name, further in LONGER.items()}
        asked = {name: (each, self.num_further) for name, each in (places | longer).items()}
        return asked | {FAMILY: (changed(BOTH, sampled=True), self.num_family)}


def plan_of(settings: LanguageSettings) -> LanguagePlan:
    """The plan behind the settings of the command line."""
    plan = LanguagePlan(num_seeds=settings.num_seeds)
    if not settings.quick:
        return plan
    small = Setting(steps=200, warm_up=20)
    return replace(plan, num_family=2, num_further=2, search=QUICK_SEARCH, setting=small)


def run_job(job: Job, text: Text) -> Measured:
    """Train and score: bits per byte of the parts held out, and those of the family on the test part.

    Trials are judged by the Student alone.
    """
    setting = job.training.setting
    model = train(job.training.trial, text, setting, job.seed)
    parts = {"validation": text.validation, "test": text.test}
    models: dict[str, dict[str, Any]] = {
        name: {part: bits_per_byte(module, each, setting.context) for part, each in parts.items()}
        | {"parameters": count_parameters(module)}
        for name, module in models_of(model).items()
    }
    if job.training.trial.sampled and isinstance(model, Nested):
        models[STUDENT][FAMILY] = judge_family(model, text, setting)
    return {"tuning": models[STUDENT]["validation"], "models": models}


def train(trial: GptTrial, text: Text, setting: Setting, seed: int) -> nn.Module:
    """A baseline, or a Student in its TA (`Nested`), after all steps. Equal seeds give equal batches to all."""
    torch.manual_seed(seed)
    model = make_model(trial, setting)
    steps = setting.steps * trial.longer
    sample = sampler(model) if trial.sampled and isinstance(model, Nested) else None
    step = step_of(model, CausalLM(), trial, int(trial.ramp * steps), sample)
    order = torch.Generator().manual_seed(seed)
    windows = batches(text.train, steps=steps, batch=setting.batch, context=setting.context, generator=order)
    data = ({"input_ids": ids, "labels": ids} for ids in windows)
    optimizer = make_optimizer(trial, model)
    for _ in descend(step, optimizer, lambda step: rate_at(step, steps, setting.warm_up), data):
        pass
    return model.eval()


def build(size: GptSize, context: int, init_std: float) -> GPT2LMHeadModel:
    """A fresh GPT-2. Its activation is GPT-2's own, computed by one kernel; nothing is dropped out."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=context,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        n_inner=size.ffn,
        activation_function="gelu_pytorch_tanh",
        initializer_range=init_std,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def nest_gpts(student: nn.Module, ta: nn.Module, place: Place) -> Nested:
    """A Student whose blocks are some of the TA's (3.2.2), with the leading units of their FFNs."""
    return nest(student, ta, layers={"transformer.h": place}, layouts={"*.c_attn.*": 3})


def make_model(trial: GptTrial, setting: Setting) -> nn.Module:
    """A fresh Student, or one nested in a fresh TA: of one seed both Students start at the same weights."""
    student = build(setting.student, setting.context, setting.init_std)
    if trial.method == "baseline":
        return student
    nested = nest_gpts(student, build(setting.ta, setting.context, setting.init_std), trial.place)
    start = dict(student.named_parameters(remove_duplicate=False))
    for name, source in nested.sources().items():
        source.write(start[name])
    return nested


def make_optimizer(trial: GptTrial, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a trial over a model's parameters."""
    if trial.optimizer == "shampoo":
        return Shampoo(model, lr=trial.lr)
    return torch.optim.AdamW(model.parameters(), lr=trial.lr, betas=BETAS, weight_decay=0.0, fused=True)


def rate_at(step: int, steps: int, warm_up: int) -> float:
    """The share of the highest rate: up linearly, and down to zero over the whole of the run.

    Example:
        >>> [rate_at(step, steps=100, warm_up=10) for step in (0, 9, 50, 100)]
        [0.1, 0.91, 0.5, 0.0]
    """
    return min((step + 1) / max(warm_up, 1), 1.0) * (1.0 - step / steps)


def sampler(nested: Nested) -> Callable[[Random], SubModel]:
    """A draw among the sub-models wide-narrow-wide that are smaller than the TA."""
    family = [wide_narrow_wide(nested, k) for k in range(len(layer_names(nested)))]
    return lambda random: random.choice(family)


def judge_family(nested: Nested, text: Text, setting: Setting) -> list[dict[str, Any]]:
    """Every extracted sub-model from all narrow (K = 0) to the TA (K = N)."""
    found = []
    for k in range(len(layer_names(nested)) + 1):
        module = extract(nested, wide_narrow_wide(nested, k))
        bpb = bits_per_byte(module, text.test, setting.context)
        found.append({"k": k, "parameters": count_parameters(module), "bpb": bpb})
    return found


@torch.no_grad()
def bits_per_byte(model: nn.Module, part: Blocks, context: int) -> float:
    """Mean bits of the bytes of a text that is cut into contexts; the first byte of each is given, not scored.

    Raises:
        ValueError: blocks are not whole contexts.

    Example:
        >>> class Uniform(nn.Module):
        ...     def forward(self, input_ids): return torch.zeros(*input_ids.shape, 256)
        >>> bits_per_byte(Uniform(), torch.zeros(2, 8, dtype=torch.int64), context=4)
        8.0
    """
    if part.shape[1] % context:
        raise ValueError(f"blocks of {part.shape[1]} bytes; expected a multiple of the context, {context}")
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64)
    windows = part.reshape(-1, context)
    for rows in windows.split(EVALUATION_BATCH):
        logits = logits_of(model(input_ids=rows))[:, :-1].reshape(-1, VOCABULARY).double()
        total += nn.functional.cross_entropy(logits, rows[:, 1:].reshape(-1), reduction="sum")
    model.train(was_training)
    return float(total) / windows[:, 1:].numel() / math.log(2.0)


def run(settings: LanguageSettings) -> dict[str, Any]:
    """The study; its figures, which also stand in `results.json` of the run folder.

    Raises:
        RunError: the run folder exists.
    """
    data = read_topics()
    source = cut(data).source

    def prepare(folder: Path, _: Console) -> str:
        (folder / TEXT_FILE).write_bytes(data)
        return source

    study = partial(run_study, plan_of(settings), source)
    return conduct("language", settings.out, prepare=prepare, load=load_text, run_job=run_job, study=study)[1]


def run_study(plan: LanguagePlan, source: str, run_jobs: RunJobs, folder: Path, console: Console) -> dict[str, Any]:
    """Tune, run the fresh seeds, report; all files are written to `folder`."""
    with counted(run_jobs, plan.num_runs, console) as run_counted:
        found = plan.run(run_counted, "test", plan.further)
    results = results_of(plan, source, found)
    draw(results, folder / "language.png")
    report(results, told(results), folder, console)
    return results


# figure: (arm, model), and the arm whose Student it is compared with, seed by seed
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "student_vs_baseline": (MATTA, STUDENT, BASELINE),
    "ta_vs_baseline": (MATTA, TA, BASELINE),
    "shampoo_student_vs_shampoo_baseline": (BOTH, STUDENT, SHAMPOO),
    "shampoo_ta_vs_shampoo_baseline": (BOTH, TA, SHAMPOO),
    "shampoo_baseline_vs_baseline": (SHAMPOO, STUDENT, BASELINE),
    "shampoo_student_vs_baseline": (BOTH, STUDENT, BASELINE),
}
SAME_OPTIMIZER: Final = tuple(CHANGES)[:4]


def against(found: Found, values: Sequence[float], reference: str) -> dict[str, Any]:
    """The mean, and the difference from an arm's Student with the same seeds, in bits per byte and in percent."""
    others = found.losses(reference)[: len(values)]
    bits, percent = difference(values, others), relative_change(values, others)
    return {
        "mean": fmean(values),
        "bpb": bits.mean,
        "interval": bits.interval,
        "percent": percent.mean,
        "percent_interval": percent.interval,
    }


def results_of(plan: LanguagePlan, source: str, found: Found) -> dict[str, Any]:
    """Everything that the study found, in types that JSON gives back as they are."""
    results: dict[str, Any] = {}
    for name, (arm, model, reference) in CHANGES.items():
        change = against(found, found.losses(arm, model), reference)
        results |= {f"{name}_{key}": value for key, value in change.items() if key != "mean"}
    results |= _family(found)
    results |= {
        "num_seeds": plan.num_seeds,
        "arms": {arm: _arm_figures(found, arm) for arm in found.titles},
        "places": _places(plan, found),
        "places_num_seeds": len(plan.seeds[: plan.num_further]),
        "room": {
            name: {"times_longer": TIMES_LONGER} | against(found, found.losses(longer), name)
            for name, longer in LONGER.items()
        },
        "tried": found.tried("validation_bpb"),
        "setting": dataclasses.asdict(plan.setting) | {"source": source, "tokens": plan.setting.tokens},
    }
    return plain(results)


def _arm_figures(found: Found, arm: str) -> dict[str, Any]:
    """An arm's trial, and of each model the bits per byte by seed."""
    models = {
        model: each | {"parameters": found.losses(arm, model, "parameters")[0]}
        for model, each in found.by_model(arm).items()
    }
    return {"title": found.titles[arm], "chosen": found.chosen(arm), "models": models}


def _places(plan: LanguagePlan, found: Found) -> dict[str, Any]:
    """Where the Student sits in depth: Student and TA against the baseline, all with Shampoo, the same seeds."""
    used, count = found.trainings[BOTH].trial.place, len(plan.seeds[: plan.num_further])
    names = {place: BOTH if place == used else place for place in PLACES}
    return {
        place: {model: against(found, found.losses(name, model)[:count], SHAMPOO) for model in (STUDENT, TA)}
        for place, name in names.items()
    }


def _family(found: Found) -> dict[str, Any]:
    """The sub-models, each against the baseline with Shampoo; and whether more of the TA is better."""
    runs = [each["models"][STUDENT][FAMILY] for each in found.measured[FAMILY]]
    rows = [
        {"k": column[0]["k"], "parameters": column[0]["parameters"]}
        | against(found, [each["bpb"] for each in column], SHAMPOO)
        for column in zip(*runs, strict=True)
    ]
    ks = [row["k"] for row in rows]
    by_seed = [float(spearmanr(ks, [-each["bpb"] for each in run]).statistic) for run in runs]
    return {
        "family": rows,
        "family_baseline": fmean(found.losses(SHAMPOO)[: len(runs)]),
        "family_student": against(found, found.losses(FAMILY), SHAMPOO),
        "family_rank_correlation": float(spearmanr(ks, [-row["mean"] for row in rows]).statistic),
        "family_rank_correlation_by_seed": by_seed,
        "family_ahead_of_baseline": all(row["interval"][1] < 0 for row in rows),
        "family_num_seeds": len(runs),
    }


def told_change(change: Mapping[str, Any]) -> str:
    """A difference in bits per byte with its interval."""
    low, high = change["interval"]
    return f"{change['bpb']:+.4f} [{low:+.4f}, {high:+.4f}]"


def change_of(results: Mapping[str, Any], figure: str) -> dict[str, Any]:
    """A comparison of the results."""
    return {key: results[f"{figure}_{key}"] for key in ("bpb", "interval", "percent", "percent_interval")}


def told(results: Mapping[str, Any]) -> list[Part]:
    """The tables as they stand in the documentation."""
    places = [
        (place, *(cell for model in (STUDENT, TA) for cell in (f"{each[model]['mean']:.4f}", told_change(each[model]))))
        for place, each in results["places"].items()
    ]
    return [
        "## Language models: bits per byte",
        _what_was_run(results),
        Table(
            title="Bits per byte of held-out text (less is better)",
            columns=("arm", "model", "parameters", "bits per byte", "change against the baseline, same optimizer", "%"),
            rows=_rows(results),
        ),
        Notes(notes(results)),
        Table(
            columns=("arm", "settings, chosen on the validation part"),
            rows=[(each["title"], each["chosen"]["told"]) for each in results["arms"].values()],
        ),
        "### Where the Student sits in depth",
        f"MatTA with Shampoo, against the baseline with Shampoo; {results['places_num_seeds']} fresh seeds.",
        Table(
            title="Where the Student sits in depth (Shampoo)",
            columns=("Student's blocks", "Student", "change", "TA", "change"),
            rows=places,
        ),
        "### The family (Fig. 5)",
        "MatTA with Shampoo once more, with one of the sub-models K = 0 … N−1 trained along at each step "
        "(`CoTraining(sample=...)`); the baseline is the one with Shampoo. K = 0 has all the TA's blocks, each of the "
        "Student's width.",
        Table(
            title="One run, every size (Shampoo)",
            columns=("sub-model", "parameters", "bits per byte", "change against the baseline", "%"),
            rows=_family_rows(results),
        ),
        Notes(family_notes(results)),
        "![Bits per byte against parameters of the Student and every sub-model, the baseline marked](language.png)",
    ]


def _rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of arms."""
    figure_of = {CHANGES[name][:2]: name for name in SAME_OPTIMIZER}
    found: list[tuple[str, ...]] = []
    for arm, each in results["arms"].items():
        for model, bits in each["models"].items():
            change = change_of(results, figure_of[arm, model]) if (arm, model) in figure_of else None
            cells = (told_change(change), f"{change['percent']:+.2f}%") if change else ("–", "–")
            found.append((each["title"], model, f"{bits['parameters']:,}", f"{bits['mean']:.4f}", *cells))
    return found


def _family_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The cells of the table of sub-models, after the baseline and the Student."""
    size = results["arms"][SHAMPOO]["models"][STUDENT]["parameters"]
    named = [(STUDENT, results["family_student"] | {"parameters": size})]
    last = len(results["family"]) - 1
    named += [(f"K = {each['k']}{' (TA)' * (each['k'] == last)}", each) for each in results["family"]]
    return [
        ("baseline alone", f"{size:,}", f"{results['family_baseline']:.4f}", "–", "–"),
        *(
            (name, f"{each['parameters']:,}", f"{each['mean']:.4f}", told_change(each), f"{each['percent']:+.2f}%")
            for name, each in named
        ),
    ]


def notes(results: Mapping[str, Any]) -> list[str]:
    """What the table says in words."""
    found = [
        f"Intervals: 95%, paired over {results['num_seeds']} fresh seeds (the same windows of bytes for all arms).",
        f"{_verdict(results, 'student_vs_baseline', 'AdamW')} "
        f"{_verdict(results, 'shampoo_student_vs_shampoo_baseline', 'Shampoo')}",
        f"Shampoo alone against AdamW alone: {told_change(change_of(results, 'shampoo_baseline_vs_baseline'))}; MatTA "
        f"with Shampoo against AdamW alone: {told_change(change_of(results, 'shampoo_student_vs_baseline'))}.",
    ]
    for name, label in ((BASELINE, "AdamW"), (SHAMPOO, "Shampoo")):
        room = results["room"][name]
        found.append(
            f"Room: the same Student alone, {room['times_longer']} times as many steps with {label}, has "
            f"{room['mean']:.4f}: {told_change(room)}."
        )
    return found


def _verdict(results: Mapping[str, Any], figure: str, label: str) -> str:
    low, high = change_of(results, figure)["interval"]
    if high < 0:
        return f"With {label} the Student's gain is beyond its interval."
    if low > 0:
        return f"With {label} the Student is worse than the baseline."
    return f"With {label} these seeds cannot tell the Student's change from nothing."


def family_notes(results: Mapping[str, Any]) -> list[str]:
    """Whether the family is in order."""
    rank, by_seed = results["family_rank_correlation"], results["family_rank_correlation_by_seed"]
    ahead = "Every" if results["family_ahead_of_baseline"] else "Not every"
    return [
        f"{ahead} sub-model is ahead of the baseline by more than its interval ({results['family_num_seeds']} seeds).",
        f"Rank correlation of K with fewer bits: {rank:.2f} (by seed: {', '.join(f'{each:.2f}' for each in by_seed)}).",
    ]


def _what_was_run(results: Mapping[str, Any]) -> str:
    """The command, and what it ran."""
    setting = results["setting"]
    student, ta = (GptSize(**setting[name]) for name in ("student", "ta"))
    num_seeds = [len(each["validation_bpb"]) for each in results["tried"][BASELINE]]
    best = f", the best {sum(each > 1 for each in num_seeds)} with {max(num_seeds)} seeds" if max(num_seeds) > 1 else ""
    return (
        f"`matta study language --seeds {results['num_seeds']}`: GPT-2 of Transformers on the bytes of CPython's "
        f"`pydoc_data.topics` ({setting['source']}). Student: {student}; TA: {ta}. {setting['steps']:,} steps of "
        f"{setting['batch']} × {setting['context']} bytes, rates falling to zero; {len(num_seeds)} trials for each arm"
        f"{best}, judged by the Student's bits per byte of a validation part; figures are of a test part."
    )


def draw(results: Mapping[str, Any], path: Path) -> None:
    """Quality against size (the paper's Fig. 5): the Student and every sub-model with their intervals."""
    size = results["arms"][SHAMPOO]["models"][STUDENT]["parameters"]
    points = [
        Point(
            name=name,
            parameters=each.get("parameters", size),
            loss=each["mean"],
            reach=(each["bpb"] - each["interval"][0], each["interval"][1] - each["bpb"]),
        )
        for name, each in [
            (STUDENT, results["family_student"]),
            *((f"K = {each['k']}", each) for each in results["family"]),
        ]
    ]
    baseline = Point(name="baseline alone", parameters=size, loss=results["family_baseline"])
    draw_family(path, "One co-training run: a family of GPT-2s", "bits per byte", points, baseline)
