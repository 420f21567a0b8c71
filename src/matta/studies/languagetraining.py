"""One run of the language study: train a small GPT-2 alone or in its TA, and count the bits that are left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Literal, final

import torch
from torch import Tensor, nn

from matta.cotraining import CoTraining
from matta.extraction import extract
from matta.nesting import Nested
from matta.objectives import CausalLM
from matta.schedule import Ramp, Weights
from matta.shampoo import Shampoo
from matta.studies.languagemodel import GptSize, Place, bits_per_byte, build, nest_gpts
from matta.studies.languagetext import Text, batches
from matta.submodels import SubModel, layer_names, wide_narrow_wide

Method = Literal["baseline", "matta"]
Optimizer = Literal["adamw", "shampoo"]

BETAS = (0.9, 0.99)


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
class Trial:
    """How a model is trained: the optimizer's highest rate, which falls to zero; for MatTA ω₁, ω₃ and the ramp.

    ω₂ is 1: only ratios matter to these optimizers. `ramp` is the share of the run over which the distillation
    comes in. With `sampled`, one of the sub-models K = 0 ... N-1 is trained along at each step. `longer` is how
    many times the setting's steps are made.
    """

    method: Method
    optimizer: Optimizer
    lr: float
    student_weight: float = 1.0
    distill_weight: float = 1.0
    ramp: float = 0.2
    place: Place = "even"
    sampled: bool = False
    longer: int = 1

    def __str__(self) -> str:
        told = f"{self.optimizer}, rate {self.lr:g}"
        if self.method == "baseline":
            return told
        return f"{told}, ω₁ {self.student_weight:g}, ω₃ {self.distill_weight:g}, ramp {self.ramp:g}"


@final
@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run. With `family` every sub-model K = 0 ... N is judged as well."""

    trial: Trial
    seed: int
    setting: Setting
    family: bool = False


@final
@dataclass(frozen=True, kw_only=True)
class Member:
    """A sub-model of a family."""

    k: int
    parameters: int
    bpb: float


@final
@dataclass(frozen=True, kw_only=True)
class Scores:
    """Bits per byte of the Student and of its TA on the parts held out; the family on the test part."""

    student: Mapping[str, float]
    ta: Mapping[str, float] | None
    num_parameters: Mapping[str, int]
    family: tuple[Member, ...] = ()


def run_job(job: Job, text: Text) -> Scores:
    """Train and score."""
    model = train(job.trial, text, job.setting, job.seed)
    student = extract(model) if isinstance(model, Nested) else model
    ta = model.ta if isinstance(model, Nested) else None
    named = {"Student": student} | ({} if ta is None else {"TA": ta})
    return Scores(
        student=_held_out(student, text, job.setting),
        ta=None if ta is None else _held_out(ta, text, job.setting),
        num_parameters={name: count_parameters(module) for name, module in named.items()},
        family=judge_family(model, text, job.setting) if job.family and isinstance(model, Nested) else (),
    )


def train(trial: Trial, text: Text, setting: Setting, seed: int) -> nn.Module:
    """A baseline, or a Student in its TA (`Nested`), after all steps. Equal seeds give equal batches to all."""
    torch.manual_seed(seed)
    model = make_model(trial, setting)
    steps = setting.steps * trial.longer
    loss_of = _loss_of(model, trial, steps)
    optimizer = make_optimizer(trial, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps, setting.warm_up))
    order = torch.Generator().manual_seed(seed)
    for ids in batches(text.train, steps=steps, batch=setting.batch, context=setting.context, generator=order):
        loss = loss_of(ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def make_model(trial: Trial, setting: Setting) -> nn.Module:
    """A fresh Student, or one nested in a fresh TA: of one seed both Students start at the same weights."""
    student = build(setting.student, setting.context, setting.init_std)
    if trial.method == "baseline":
        return student
    nested = nest_gpts(student, build(setting.ta, setting.context, setting.init_std), trial.place)
    start = dict(student.named_parameters(remove_duplicate=False))
    for name, source in nested.sources().items():
        source.write(start[name])
    return nested


def make_optimizer(trial: Trial, model: nn.Module) -> torch.optim.Optimizer:
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


def judge_family(nested: Nested, text: Text, setting: Setting) -> tuple[Member, ...]:
    """Every extracted sub-model from all narrow (K = 0) to the TA (K = N)."""
    found = []
    for k in range(len(layer_names(nested)) + 1):
        module = extract(nested, wide_narrow_wide(nested, k))
        bpb = bits_per_byte(module, text.test, setting.context)
        found.append(Member(k=k, parameters=count_parameters(module), bpb=bpb))
    return tuple(found)


def count_parameters(module: nn.Module) -> int:
    """Numbers that a module is made of, tied ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _loss_of(model: nn.Module, trial: Trial, steps: int) -> Callable[[Tensor], Tensor]:
    """What is minimised: the baseline's cross-entropy, or the three losses of a pair."""
    objective = CausalLM()
    if not isinstance(model, Nested):
        return lambda ids: objective.cross_entropy(model(input_ids=ids).logits, ids)
    cotrain = CoTraining(
        model,
        objective,
        weights=Weights(student=trial.student_weight, ta=1.0, distill=trial.distill_weight),
        ramp=Ramp(start=0, steps=int(trial.ramp * steps)),
        sample=sampler(model) if trial.sampled else None,
    )
    return lambda ids: cotrain({"input_ids": ids, "labels": ids}).loss


def _held_out(model: nn.Module, text: Text, setting: Setting) -> dict[str, float]:
    parts = {"validation": text.validation, "test": text.test}
    return {name: bits_per_byte(model, part, setting.context) for name, part in parts.items()}
