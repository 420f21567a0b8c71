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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any, Final, final

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
from matta_studies.experiment import Found, Job, Measured, RunJobs, conduct, plain
from matta_studies.intervals import difference, relative_change
from matta_studies.language_plan import (
    BOTH,
    FAMILY,
    LONGER,
    PLACES,
    SHAMPOO,
    TIMES_LONGER,
    GptSize,
    GptTrial,
    LanguagePlan,
    Place,
    Setting,
    plan_of,
)
from matta_studies.language_report import CHANGES, draw, told
from matta_studies.presentation import report
from matta_studies.study_settings import LanguageSettings
from matta_studies.trials import STUDENT, TA, count_parameters, descend, models_of, step_of
from matta_studies.worker_pool import counted

Blocks = Int64[Tensor, "_ _"]  # blocks, bytes

TEXT_FILE: Final = "text"
BLOCK: Final = 4096  # bytes that stay together
VALIDATION_BLOCK, TEST_BLOCK, OF_BLOCKS = 4, 9, 10  # of each ten blocks the fifth and the last are held out
VOCABULARY: Final = 256
EVALUATION_BATCH: Final = 128
BETAS: Final = (0.9, 0.99)


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
