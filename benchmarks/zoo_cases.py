"""One model of the zoo, and everything that is asked of it: nesting, remedy, extraction, meaning, a size between."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch
from torch import Tensor, nn

import matta
from matta.nesting.batches import Batch, call, outputs_of, split_labels
from matta.sizes.submodels import live, sizes_between

_TOLERANCE = 1e-5
_REMEDY = re.compile(r"\b(layouts|layers|private|share)=(\{.*?\}(?=[,;:. ]|$)|\[.*?\])")


@final
@dataclass(frozen=True, kw_only=True)
class Model:
    """A kind of model: how Student and TA are built, on what they run, and what grows.

    `make` builds one of the two from its sizes. `options` are what its user would tell `nest` in any case (which
    blocks). A kind that cannot be nested as it is has `mended`, which builds it as the refusal asks for, and `advice`,
    what that is in a few words.
    """

    name: str
    source: str
    grows: str
    make: Callable[..., nn.Module]
    student: Mapping[str, Any]
    ta: Mapping[str, Any]
    batch: Callable[[], Batch]
    options: Mapping[str, Any] = field(default_factory=dict)
    mended: Callable[..., nn.Module] | None = None
    advice: str = ""

    def build(self) -> tuple[nn.Module, nn.Module]:
        """Student and TA, with weights drawn at random about their initial ones."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pair = self.make(**self.student), self.make(**{**self.student, **self.ta})
            for module in pair:
                _shake(module)
        return pair


@final
@dataclass(kw_only=True)
class Outcome:
    """What became of one model: `how` it nested, or why not; seconds; and what was found wrong."""

    model: Model
    how: str = ""
    refusal: str = ""
    remedy: str = ""
    between: str = ""
    warm: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    nest_s: float = 0.0

    @property
    def nested(self) -> bool:
        """Whether it nested, by itself or with the remedy that the refusal names."""
        return self.how in ("at once", "with the remedy")

    @property
    def remedy_works(self) -> bool:
        """Whether what the refusal says to do leads to a nesting."""
        return bool(self.refusal) and (self.nested or self.how == "refused")


def examine(model: Model) -> Outcome:
    """Nest a model and check all that a user relies on."""
    found = Outcome(model=model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = _nest(model, found, model.options)
        if nested is not None:
            for check in (_check_student, _check_between, _check_warm_start):
                _guarded(found, check, model, nested)
    return found


def _guarded(found: Outcome, check: Callable[..., None], *args: Any) -> None:
    try:
        check(found, *args)
    except matta.MattaError as error:
        found.wrong.append(f"{check.__name__}: {error}")
    except Exception as error:
        found.foreign.append(f"{check.__name__}: {type(error).__name__}: {error}")


def _nest(model: Model, found: Outcome, options: Mapping[str, Any]) -> matta.Nested | None:
    """The nesting, if need be with the remedy that the refusal names."""
    student, ta = model.build()
    start = time.perf_counter()
    try:
        nested = matta.nest(student, ta, **{"example": model.batch(), **options})
    except matta.MattaError as error:
        found.refusal = str(error)
        return _follow(model, found, options) if options is model.options else None
    except Exception as error:
        found.foreign.append(f"nest: {type(error).__name__}: {error}")
        return None
    found.nest_s, found.options = time.perf_counter() - start, options
    found.how = "at once" if options is model.options else "with the remedy"
    return nested


def _follow(model: Model, found: Outcome, options: Mapping[str, Any]) -> matta.Nested | None:
    """Do what the refusal says; the first of its readings that nests."""
    first = found.refusal
    for remedy in remedies(first):
        found.remedy = ", ".join(f"{name}={value!r}" for name, value in remedy.items())
        merged = {**options, **{name: _merge(options.get(name), value) for name, value in remedy.items()}}
        nested = _nest(model, found, merged)
        if nested is not None:
            found.refusal = first
            return nested
    found.refusal, found.how = first, "refused without remedy"
    if model.mended is not None and _nest(replace(model, make=model.mended), found, {**options}) is not None:
        found.refusal, found.how = first, "refused"
    return None


def _merge(before: Any, value: Any) -> Any:
    return {**before, **value} if isinstance(before, Mapping) and isinstance(value, Mapping) else value


def remedies(message: str) -> list[dict[str, Any]]:
    """The arguments of `nest` that a message names as code, each a reading to try."""
    found: list[dict[str, Any]] = []
    for name, code in _REMEDY.findall(message):
        try:
            found.append({name: eval(code, {"matta": matta})})
        except (SyntaxError, NameError, TypeError):
            continue
    return [each for each in found if ... not in next(iter(each.values()))] + (
        [{"probe": False}] if "probe=False" in message else []
    )


def _check_student(found: Outcome, model: Model, nested: matta.Nested) -> None:
    """Two steps; the extracted Student equals the live one, and the plain class with those weights."""
    _step(nested, model.batch(), 2)
    batch = model.batch()
    extracted = matta.extract(nested)
    expected = _logits(nested.student, batch)
    if not torch.equal(_logits(extracted, batch), expected):
        found.wrong.append("the extracted Student is not the live one to the bit")
    plain = model.build()[0]
    plain.load_state_dict(extracted.state_dict())
    if _distance(expected, _logits(plain, batch)) > _TOLERANCE:
        found.wrong.append("the plain class with the extracted weights computes something else")


def _check_between(found: Outcome, model: Model, nested: matta.Nested) -> None:
    """A size between the two: live and extracted are equal to the bit."""
    try:
        specs = sizes_between(nested) or []
        specs = [spec for spec in specs if "wide" in spec.choices.values() and "narrow" in spec.choices.values()]
        for spec in specs[:1]:
            batch = model.batch()
            extracted, running = matta.extract(nested, spec), live(nested, spec)
            if not torch.equal(_logits(extracted, batch), _logits(running, batch)):
                found.wrong.append("a size between is not its live form to the bit")
    except matta.MattaError as error:
        found.between = f"refused: {error}"
        return
    found.between = "exact" if specs else "none: one width runs through it"


def _check_warm_start(found: Outcome, model: Model, nested: matta.Nested) -> None:
    """A warm start keeps the Student's function in both, or is refused."""
    student, ta = model.build()
    batch = model.batch()
    expected = _logits(student, batch)
    try:
        warm = matta.nest(student, ta, warm_start=True, **{"example": batch, **found.options})
    except matta.MattaError as error:
        found.warm = f"refused: {error}"
        return
    if _distance(expected, _logits(warm.student, batch)) > _TOLERANCE:
        found.wrong.append("the warm Student starts elsewhere")
    if _distance(expected, _logits(warm.ta, batch)) > 1e-4:
        found.wrong.append("the warm TA starts elsewhere")
    found.warm = "kept"


def _step(nested: matta.Nested, batch: Batch, times: int) -> None:
    """Steps of co-training towards zero, in training mode, as a forward and a backward leave state behind."""
    optimizer = torch.optim.SGD(nested.parameters(), lr=1e-3)
    nested.train()
    inputs = split_labels(batch)[0]
    for _ in range(times):
        losses = [outputs_of(call(each, inputs))[0].abs().pow(2).mean() for each in (nested.ta, nested.student)]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()


@torch.no_grad()
def _logits(module: nn.Module, batch: Batch) -> Tensor:
    torch.manual_seed(0)
    return outputs_of(call(module.eval(), split_labels(batch)[0]))[0].detach()


def _distance(expected: Tensor, found: Tensor) -> float:
    if expected.shape != found.shape:
        return float("inf")
    return float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-12))


@torch.no_grad()
def _shake(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
