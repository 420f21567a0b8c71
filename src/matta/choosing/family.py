"""The table of a nesting's sizes, with what each costs and how good it is; the pick for a budget."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from matta.choosing.measuring import Latency, cost_of, measure_latency, num_examples, resized
from matta.choosing.searching import Choice, search
from matta.errors import ChoiceError
from matta.nesting.batches import Batch, split_labels
from matta.nesting.nested import Nested
from matta.sizes.extraction import extract
from matta.sizes.storage import write_json
from matta.sizes.submodels import SubModel, layer_names
from matta.sizes.units import HIDDEN, find_units

FILE: Final = "family.json"
FORMAT, VERSION = "matta.family", 1
NARROW, WIDE, SKIP = "narrow", "wide", "skip"
MEGABYTE: Final = 2**20
TIMED_TOGETHER: Final = 8  # modules whose calls take turns; more would be in memory at once
STUDENT, TA = "Student", "TA"
COSTS: Final = ("parameters", "flops", "memory_mb", "latency_ms")


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """One size: its layers, what it costs, and how good it is.

    `flops` and `activation_bytes` are of one example; `bytes` are those of weights and buffers.
    """

    name: str
    layers: Mapping[str, str]
    parameters: int
    bytes: int
    flops: float
    activation_bytes: float
    latencies: tuple[Latency, ...]
    quality: float

    @property
    def spec(self) -> SubModel:
        """What `matta.extract(nested, size.spec)` takes out."""
        return SubModel(self.layers)

    @property
    def latency_ms(self) -> float:
        """The median for the first batch size; NaN if none was measured."""
        return self.latencies[0].median_ms if self.latencies else math.nan

    @property
    def memory_mb(self) -> float:
        """Weights, buffers and activations of a batch of the first batch size, in 2^20 bytes."""
        batch = self.latencies[0].batch_size if self.latencies else 1
        return (self.bytes + batch * self.activation_bytes) / MEGABYTE

    def of_batch(self, batch_size: int) -> Size:
        """The same with the latency for a batch size first.

        Raises:
            ChoiceError: it was not measured.
        """
        found = [each for each in self.latencies if each.batch_size == batch_size]
        if not found:
            measured = ", ".join(str(each.batch_size) for each in self.latencies) or "none"
            raise ChoiceError(f"batch_size={batch_size} was not measured; expected one of: {measured}")
        return replace(self, latencies=(found[0], *(each for each in self.latencies if each is not found[0])))


@final
@dataclass(frozen=True, kw_only=True)
class Family:
    """The sizes of a nesting, from the smallest; made by `matta.family`, kept as JSON by `save`.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> example = torch.zeros(16, 3), torch.zeros(16)
        >>> quality = {21: 0.2, 41: 0.1}  # a loss, by the number of parameters
        >>> family = matta.family(
        ...     nested, evaluate=lambda module: quality[sum(p.numel() for p in module.parameters())], example=example
        ... )
        >>> [(size.name, size.parameters, size.quality) for size in family.sizes]
        [('Student', 21, 0.2), ('TA', 41, 0.1)]
        >>> family.choose(parameters=30).name
        'Student'
    """

    sizes: tuple[Size, ...]
    higher_is_better: bool = False
    is_complete: bool = True
    """Whether all choices of layers were evaluated."""
    threads: int | None = None
    device: str = "cpu"

    def pareto(self, by: str = "parameters") -> tuple[Size, ...]:
        """The sizes that nothing at most as costly is as good as, from the cheapest.

        Args:
            by: "parameters", "flops", "memory_mb" or "latency_ms".

        Raises:
            ChoiceError: another cost.
        """
        _require_cost(by)
        kept: list[Size] = []
        for size in sorted(self.sizes, key=lambda each: (_value(each, by), self._loss(each))):
            if not kept or self._loss(size) < self._loss(kept[-1]):
                kept.append(size)
        return tuple(kept)

    def choose(
        self,
        *,
        latency_ms: float | None = None,
        memory_mb: float | None = None,
        parameters: int | None = None,
        flops: float | None = None,
        quality: float | None = None,
        batch_size: int | None = None,
    ) -> Size:
        """The best size within a budget; with `quality`, the cheapest one that is as good as that.

        Args:
            latency_ms: The most milliseconds of a batch (median).
            memory_mb: The most memory of weights and activations of a batch, in 2^20 bytes.
            parameters: The most parameters.
            flops: The most FLOPs of an example.
            quality: What it must reach; cheapest is by latency if it was measured, else by parameters.
            batch_size: The batch of the two first; None: the first that was measured.

        Raises:
            ChoiceError: nothing fits (the nearest is named), nothing is asked, or what is asked was not measured.
        """
        sizes = self.sizes if batch_size is None else tuple(each.of_batch(batch_size) for each in self.sizes)
        asked = {"latency_ms": latency_ms, "memory_mb": memory_mb, "parameters": parameters, "flops": flops}
        budget = {name: value for name, value in asked.items() if value is not None}
        if not budget and quality is None:
            raise ChoiceError("received no budget; expected latency_ms, memory_mb, parameters, flops or quality")
        if "latency_ms" in budget and math.isnan(sizes[0].latency_ms):
            raise ChoiceError("no latency was measured; expected a family made with calls over 0")
        fitting = [each for each in sizes if all(_value(each, name) <= most for name, most in budget.items())]
        good = [each for each in fitting if quality is None or self._loss(each) <= self._signed(quality)]
        if not good:
            raise ChoiceError(self._nothing_fits(sizes, budget, quality))
        cost = "parameters" if math.isnan(good[0].latency_ms) else "latency_ms"
        if quality is None:
            return min(good, key=lambda each: (self._loss(each), _value(each, cost)))
        return min(good, key=lambda each: (_value(each, cost), self._loss(each)))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table as JSON: to a file, or as `family.json` into the folder of a nesting.

        Raises:
            ChoiceError: the folder does not exist.
        """
        target = _file(Path(path))
        if not target.parent.is_dir():
            raise ChoiceError(f"there is no folder {target.parent}; expected that of a nesting: matta.save comes first")
        write_json(target, {"format": FORMAT, "version": VERSION, **asdict(self)})
        return target

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Family:
        """Read back what `save` wrote: nothing is evaluated again.

        Raises:
            ChoiceError: there is none, or it is damaged.
        """
        source = _file(Path(path))
        try:
            values = json.loads(source.read_text(encoding="utf-8"))
            if values.pop("format") != FORMAT or values.pop("version") != VERSION:
                raise ValueError("another format")
            sizes = tuple(_size_from_json(each) for each in values.pop("sizes"))
            return Family(sizes=sizes, **values)
        except FileNotFoundError:
            raise ChoiceError(
                f"there is no family in {source}; make one: matta.family(nested, evaluate=..., example=...)"
                f".save({str(Path(path))!r})"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ChoiceError(f"{source} is no family of matta's, or is damaged: {error}") from None

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The table in words, a row for each size, those of the front with a star; `COLUMNS` are the names."""
        on_front = {each.name for each in self.pareto()}
        for size in self.sizes:
            latency = size.latencies[0] if size.latencies else None
            yield (
                size.name + (" *" if size.name in on_front else ""),
                f"{size.parameters:,}",
                f"{size.memory_mb:.3g}",
                f"{size.flops:,.0f}",
                "–" if latency is None else f"{latency.median_ms:.3f}",
                "–" if latency is None else f"{latency.p95_ms:.3f}",
                f"{size.quality:.5g}",
            )

    def __str__(self) -> str:
        table = [COLUMNS, *self.rows()]
        widths = [max(len(row[index]) for row in table) for index in range(len(COLUMNS))]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if index else cell.ljust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        )

    def _signed(self, quality: float) -> float:
        return -quality if self.higher_is_better else quality

    def _loss(self, size: Size) -> float:
        return self._signed(size.quality)

    def _nothing_fits(self, sizes: Sequence[Size], budget: Mapping[str, float], quality: float | None) -> str:
        """Which size is nearest, and by how much it misses what."""

        def misses(size: Size) -> dict[str, float]:
            found = {name: _value(size, name) / most if most else math.inf for name, most in budget.items()}
            if quality is not None and self._loss(size) > self._signed(quality):
                apart = abs(size.quality - quality) / max(abs(quality), 1e-12)
                found["quality"] = 1.0 + apart
            return {name: each for name, each in found.items() if each > 1.0}

        nearest = min(sizes, key=lambda each: (max(misses(each).values()), sum(misses(each).values())))
        limits = {**budget, **({"quality": quality} if quality is not None else {})}
        told = "; ".join(
            f"{name} {_shown(_value(nearest, name))} in place of {_shown(limits[name])} ({100 * (ratio - 1):+.1f}%)"
            for name, ratio in misses(nearest).items()
        )
        wanted = ", ".join(f"{name}={_shown(value)}" for name, value in limits.items())
        return f"none of the {len(sizes)} sizes has {wanted}; the nearest is {nearest.name!r}: {told}"


COLUMNS: Final = ("size", "parameters", "memory MB", "FLOPs", "ms", "ms p95", "quality")


def family(
    nested: Nested,
    *,
    evaluate: Callable[[nn.Module], float],
    example: Batch,
    higher_is_better: bool = False,
    batch_sizes: Sequence[int] = (1,),
    threads: int | None = 1,
    device: str | torch.device | None = None,
    calls: int = 50,
    max_evaluations: int = 64,
    progress: bool = True,
) -> Family:
    """The table of a nesting's sizes: what each costs, its latency here, and its quality by your own function.

    All choices of wide and narrow layers are evaluated if they are at most `max_evaluations`. Of more the front of
    parameters and quality is searched: Student, TA, wide-narrow-wide (section 4.2.3), each layer wide for itself, then
    choices that a model of the effects of layers predicts to be best.

    Args:
        nested: The pair, after training.
        evaluate: The quality of a plain module in eval mode, such as a held-out loss.
        example: A batch, as in training; its inputs are what costs are measured on.
        higher_is_better: Whether quality is to be high (an accuracy) and not low (a loss).
        batch_sizes: Of the latencies; the first is what `choose` compares with.
        threads: Of the latencies on a CPU; None: torch's present number.
        device: Where modules are measured and evaluated; None: where the nesting is.
        calls: Timed calls of each size and batch size; 0: no latency.
        max_evaluations: The most calls of `evaluate`; at least two.
        progress: Whether to show a bar (needs `rich`).

    Raises:
        ChoiceError: too few evaluations, a quality that is not a finite number, or Student and TA share no layer.
        MattaError: the example has no batch axis.

    Example:
        >>> import matta
        >>> def tower(width): return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 1))
        >>> nested = matta.nest(tower(4), tower(8))
        >>> x, y = torch.randn(16, 3), torch.rand(16)
        >>> def loss(module): return matta.objectives.Binary().cross_entropy(module(x), y)
        >>> len(family(nested, evaluate=loss, example=(x, y), progress=False).sizes)
        2
    """
    if max_evaluations < 2 or calls < 0 or not batch_sizes or min(batch_sizes) < 1:
        raise ChoiceError(
            f"received max_evaluations={max_evaluations}, calls={calls}, batch_sizes={tuple(batch_sizes)}; expected at "
            f"least 2 evaluations, no negative number of calls, and batch sizes from 1 up"
        )
    place = torch.device(device) if device is not None else next(nested.ta.parameters()).device
    inputs = _moved(split_labels(example)[0], place)
    num_examples(inputs)
    judge = _Judge(nested, evaluate, inputs, place)
    layers = _layers(nested)
    with _bar(progress, min(max_evaluations, 2 ** len(layers))) as advance:

        def loss(choice: Choice) -> float:
            size = judge.size(_spec(layers, choice))
            advance()
            return -size.quality if higher_is_better else size.quality

        found = search(len(layers), _additive_cost(judge, layers), loss, max_evaluations=max_evaluations)
    student = _student_spec(nested)
    specs = [_spec(layers, choice) for choice in found]
    sizes = [judge.size(spec) for spec in (specs if student in specs else [student, *specs])]
    timed = _timed(judge, sizes, batch_sizes, calls=calls, threads=threads)
    return Family(
        sizes=tuple(sorted(timed, key=lambda each: (each.parameters, each.name))),
        higher_is_better=higher_is_better,
        is_complete=len(found) == 2 ** len(layers),
        threads=threads,
        device=str(place),
    )


class _Judge:
    """Takes sizes out one by one, and remembers what was found of each."""

    def __init__(
        self, nested: Nested, evaluate: Callable[[nn.Module], float], inputs: Any, device: torch.device
    ) -> None:
        self.nested, self.evaluate, self.inputs, self.device = nested, evaluate, inputs, device
        self.found: dict[SubModel, Size] = {}

    def module(self, spec: SubModel) -> nn.Module:
        """A plain module of a size, in eval mode."""
        return extract(self.nested, spec).to(self.device).eval()

    def size(self, spec: SubModel) -> Size:
        """A size without its latency."""
        if spec not in self.found:
            module = self.module(spec)
            with torch.no_grad():
                cost = cost_of(module, self.inputs)
                quality = float(self.evaluate(module))
            if not math.isfinite(quality):
                raise ChoiceError(
                    f"evaluate gave {quality} for {_name(self.nested, spec)!r}; expected a finite number: such as a "
                    f"loss on held-out data"
                )
            self.found[spec] = Size(
                name=_name(self.nested, spec), layers=dict(spec.choices), latencies=(), quality=quality, **asdict(cost)
            )
        return self.found[spec]


def _additive_cost(judge: _Judge, layers: Sequence[Sequence[str]]) -> Callable[[Choice], float]:
    """Parameters as the sum of what each wide layer adds: exact for blocks, near enough for widths to search by."""
    shares: list[float] = []
    base = 0.0

    def count(choice: Choice) -> float:
        return float(sum(each.numel() for each in extract(judge.nested, _spec(layers, choice)).parameters()))

    def cost(choice: Choice) -> float:
        nonlocal base
        if not shares:
            base = count((False,) * len(layers))
            singles = (tuple(i == layer for i in range(len(layers))) for layer in range(len(layers)))
            shares.extend(count(single) - base for single in singles)
        return base + sum(share for share, wide in zip(shares, choice, strict=True) if wide)

    return cost


def _timed(
    judge: _Judge, sizes: Sequence[Size], batch_sizes: Sequence[int], *, calls: int, threads: int | None
) -> list[Size]:
    """The sizes with their latencies; a few modules at a time, whose calls take turns."""
    if not calls:
        return list(sizes)
    found: list[Size] = []
    for start in range(0, len(sizes), TIMED_TOGETHER):
        group = sizes[start : start + TIMED_TOGETHER]
        modules = [judge.module(each.spec) for each in group]
        latencies: list[list[Latency]] = [[] for _ in group]
        for batch_size in batch_sizes:
            inputs = resized(judge.inputs, batch_size)
            measured = measure_latency(modules, inputs, calls=calls, threads=threads)
            for (middle, high), of_size in zip(measured, latencies, strict=True):
                of_size.append(Latency(batch_size=batch_size, median_ms=middle, p95_ms=high))
        found += [replace(each, latencies=tuple(of_size)) for each, of_size in zip(group, latencies, strict=True)]
    return found


def _layers(nested: Nested) -> list[tuple[str, ...]]:
    """What is chosen together: each layer for itself, or all where one hidden width runs through them.

    Raises:
        ChoiceError: Student and TA share no layer.
    """
    names = layer_names(nested)
    if not names:
        raise ChoiceError("the Student shares no layer with the TA, so there are no sizes between to choose from")
    return [names] if HIDDEN in names else [(name,) for name in names]


def _spec(layers: Sequence[Sequence[str]], choice: Choice) -> SubModel:
    pairs = zip(layers, choice, strict=True)
    return SubModel({name: WIDE if wide else NARROW for names, wide in pairs for name in names})


def _student_spec(nested: Nested) -> SubModel:
    """The Student: all narrow, and of a deeper TA the blocks alone that hold it."""
    choices = {}
    for unit in find_units(nested.student, nested.ta, nested.plan):
        is_skipped = unit.layers is not None and unit.index not in unit.layers.indices
        choices[unit.name] = SKIP if is_skipped else NARROW
    return SubModel(choices)


def _name(nested: Nested, spec: SubModel) -> str:
    """The layers that are wide; the ends have the names of the paper."""
    wide = [name for name, choice in spec.choices.items() if choice == WIDE]
    if len(wide) == len(spec.choices):
        return TA
    if not wide:
        return STUDENT if spec == _student_spec(nested) else "narrow"
    return "wide: " + ", ".join(wide)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(each, device) for each in value)
    return value


@contextmanager
def _bar(is_shown: bool, total: int) -> Iterator[Callable[[], None]]:
    """What is called after each evaluation."""
    if not is_shown:
        yield lambda: None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ModuleNotFoundError:
        raise ChoiceError("progress=True needs rich: pip install 'matta[fit]', or progress=False") from None
    columns = (TextColumn("sizes"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task("", total=total)
        yield lambda: shown.advance(task)


def _require_cost(name: str) -> None:
    if name not in COSTS:
        raise ChoiceError(f"by={name!r}; expected one of: {', '.join(COSTS)}")


def _value(size: Size, name: str) -> float:
    return float(getattr(size, name))


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() or not path.suffix else path


def _size_from_json(values: dict[str, Any]) -> Size:
    latencies = tuple(Latency(**each) for each in values.pop("latencies"))
    return Size(latencies=latencies, **values)
