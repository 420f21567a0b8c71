"""The table of a nesting's sizes with what each costs and how good it is, and the pick for a budget."""

from __future__ import annotations

import json
import math
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Final, final

from matta.choosing.measuring import Latency
from matta.choosing.report_page import HeatMap, Points, ReportPage
from matta.errors import DAMAGE, ChoiceError
from matta.nesting.plan import Plan
from matta.sizes.storage import write_json
from matta.sizes.submodels import NARROW, SKIP, WIDE, SubModel

FILE: Final = "family.json"
FORMAT, VERSION = "matta.family", 1
MEGABYTE: Final = 2**20
_WIDTHS: Final = (SKIP, NARROW, WIDE)
COSTS: Final = ("parameters", "flops", "memory_mb", "latency_ms")


@final
@dataclass(frozen=True, kw_only=True)
class Size:
    """One size: its layers, what it costs, and how good it is.

    `flops` and `activation_bytes` are of one example; `bytes` are those of weights and buffers, and of what a forward
    holds whatever the batch.
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
        """Weights, buffers and activations of a batch of the first batch size, in MiB; untimed, of one example."""
        batch = self.latencies[0].batch_size if self.latencies else 1
        return (self.bytes + batch * self.activation_bytes) / MEGABYTE

    def cells(self) -> tuple[str, ...]:
        """Its row of the table in words, in the order of `COLUMNS`."""
        latency = self.latencies[0] if self.latencies else None
        times = ("–", "–") if latency is None else (f"{latency.median_ms:.3f}", f"{latency.p95_ms:.3f}")
        costs = f"{self.parameters:,}", f"{self.memory_mb:.3g}", f"{self.flops:,.0f}"
        return (self.name, *costs, *times, f"{self.quality:.5g}")

    def __str__(self) -> str:
        name, parameters, memory, flops, median, _, quality = self.cells()
        time = f", {median} ms" if self.latencies else ""
        return f"{name}: {parameters} parameters, {memory} MB, {flops} FLOPs{time}, quality {quality}"

    def is_part_of(self, other: Size) -> bool:
        """Whether no layer is wider than in the other, and there are no more parameters: it cannot be slower."""
        names = self.layers.keys() | other.layers.keys()
        own, theirs = ([_WIDTHS.index(each.layers.get(name, NARROW)) for name in names] for each in (self, other))
        return self.parameters <= other.parameters and all(map(operator.le, own, theirs))

    def of_batch(self, batch_size: int) -> Size:
        """This size with the latency for a batch size first.

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
        >>> import matta, torch
        >>> from torch import nn
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

        A size is left out too if a part of it, with no layer wider, is as good: that the whole was faster is noise of
        the measurement.

        Args:
            by: "parameters", "flops", "memory_mb" or "latency_ms".

        Raises:
            ChoiceError: another cost, or one that was not measured.
        """
        _require_cost(by)
        self._require_measured(by)
        kept: list[Size] = []
        for size in sorted(self._unbeaten(self.sizes), key=lambda each: (_value(each, by), self._loss(each))):
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
            quality: What it must reach; cheapest is by latency if it was measured, else by parameters. A size of
                which a part that fits is as good is not taken.
            batch_size: The batch of the two first; None: the first that was measured.

        Raises:
            ChoiceError: nothing fits (the nearest is named), nothing is asked, what is asked was not measured, or a
                budget is no number over zero.
        """
        sizes = self.sizes if batch_size is None else tuple(each.of_batch(batch_size) for each in self.sizes)
        asked = {"latency_ms": latency_ms, "memory_mb": memory_mb, "parameters": parameters, "flops": flops}
        budget = {name: _number(name, value, least=0.0) for name, value in asked.items() if value is not None}
        quality = None if quality is None else _number("quality", quality, least=-math.inf)
        if not budget and quality is None:
            raise ChoiceError("received no budget; expected latency_ms, memory_mb, parameters, flops or quality")
        self._require_measured(*budget)
        fitting = [each for each in sizes if all(_value(each, name) <= most for name, most in budget.items())]
        good = [each for each in fitting if quality is None or self._loss(each) <= self._signed(quality)]
        if not good:
            raise ChoiceError(self._nothing_fits(sizes, budget, quality))
        good = self._unbeaten(good)
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
            values = dict(json.loads(source.read_text(encoding="utf-8")))
            if values.pop("format") != FORMAT or values.pop("version") != VERSION:
                raise ValueError("another format")
            sizes = tuple(_size_from_json(each) for each in values.pop("sizes"))
            if not sizes:
                raise ValueError("it has no size")
            for name, value in values.items():
                _require_type(value, *_KINDS[name])
            return Family(sizes=sizes, **values)
        except FileNotFoundError:
            raise ChoiceError(
                f"there is no family in {source}; make one: matta.family(nested, evaluate=..., example=...)"
                f".save({str(Path(path))!r})"
            ) from None
        except (OSError, *DAMAGE) as error:
            raise ChoiceError(f"{source} is no family of matta's, or is damaged: {error}") from None

    def report(
        self,
        path: str | os.PathLike[str],
        *,
        title: str = "Family of sizes",
        metric: str = "quality",
        plan: Plan | None = None,
        curves: Mapping[str, Mapping[str, Points]] | None = None,
        heat_maps: Sequence[HeatMap] = (),
        settings: Mapping[str, Any] | None = None,
        run: str = "",
    ) -> Path:
        """Write a page to choose a size on: one HTML file that any browser opens, without a network.

        It has the front with a slider for the budget, how to load the pick, all sizes, and what else is given.

        Args:
            path: The file.
            title: Its heading.
            metric: What the quality is, such as "held-out loss".
            plan: `nested.plan`, to show where the Student lives.
            curves: Pictures by title, each of lines by name: pairs of a step and a value.
            heat_maps: Of Shampoo's factors.
            settings: What the training was set to; may be nested.
            run: The folder of a run of `matta train`, to name the command that extracts the pick.

        Raises:
            ChoiceError: the folder does not exist, or there is no size, or one whose quality is not finite.
        """
        page = ReportPage(
            title=title,
            summary=self._summary(metric),
            metric=metric,
            higher_is_better=self.higher_is_better,
            sizes=[asdict(each) for each in self.sizes],
            plan=plan,
            curves=curves or {},
            heat_maps=heat_maps,
            settings=settings or {},
            run=run,
        )
        return page.write(Path(path))

    def rows(self) -> Iterator[tuple[str, ...]]:
        """The table in words, a row for each size, those of the front with a star; `COLUMNS` are the names."""
        on_front = {each.name for each in self.pareto()}
        for size in self.sizes:
            name, *cells = size.cells()
            yield (name + (" *" if name in on_front else ""), *cells)

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

    def _summary(self, metric: str) -> str:
        """The family in a few sentences."""
        counts = sorted(each.parameters for each in self.sizes) or [0]
        better = "higher" if self.higher_is_better else "lower"
        number = "1 size" if len(self.sizes) == 1 else f"{len(self.sizes)} sizes"
        reach = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
        searched = "" if self.is_complete else " Not every choice of layers was evaluated: the front was searched."
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        is_timed = any(each.latencies for each in self.sizes)
        timed = f" Latencies were measured on {self.device}{threads}." if is_timed else ""
        return f"{number} of {reach} parameters, judged by {metric} ({better} is better).{searched}{timed}"

    def _unbeaten(self, sizes: Sequence[Size]) -> list[Size]:
        """The sizes of which no part among the others is as good."""

        def is_beaten(size: Size) -> bool:
            own = self._loss(size)
            as_good = (each for each in sizes if self._loss(each) <= own and each.is_part_of(size))
            return any(self._loss(each) < own or not size.is_part_of(each) for each in as_good)

        return [each for each in sizes if not is_beaten(each)]

    def _require_measured(self, *costs: str) -> None:
        if "latency_ms" in costs and any(math.isnan(each.latency_ms) for each in self.sizes):
            raise ChoiceError("no latency was measured; expected a family made with calls over 0")

    def _signed(self, quality: float) -> float:
        return -quality if self.higher_is_better else quality

    def _loss(self, size: Size) -> float:
        return self._signed(size.quality)

    def _nothing_fits(self, sizes: Sequence[Size], budget: Mapping[str, float], quality: float | None) -> str:
        """Which size is nearest, and by how much it misses what."""

        def misses(size: Size) -> dict[str, float]:
            found = {name: _value(size, name) / most for name, most in budget.items()}
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


_KINDS: Final = {"higher_is_better": (bool,), "is_complete": (bool,), "threads": (int, NoneType), "device": (str,)}
COLUMNS: Final = ("size", "parameters", "memory MB", "FLOPs", "ms", "ms p95", "quality")


def _require_cost(name: str) -> None:
    if name not in COSTS:
        raise ChoiceError(f"by={name!r}; expected one of: {', '.join(COSTS)}")


def _number(name: str, value: Any, *, least: float) -> float:
    """A budget or a quality as a number; NaN is none."""
    is_number = hasattr(value, "__float__") and not isinstance(value, bool)
    if not (is_number and float(value) > least):
        expected = "a number over 0" if least == 0 else "a finite number"
        raise ChoiceError(f"received {name}={value!r}; expected {expected}")
    return float(value)


def _value(size: Size, name: str) -> float:
    return float(getattr(size, name))


def _shown(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() or not path.suffix else path


def _size_from_json(values: dict[str, Any]) -> Size:
    latencies = tuple(Latency(**each) for each in values.pop("latencies"))
    size = Size(latencies=latencies, **values)
    numbers = (size.parameters, size.quality, size.bytes, size.flops, size.activation_bytes)
    for value in (*numbers, *(value for each in latencies for value in asdict(each).values())):
        _require_type(value, int, float)
    _require_type(size.name, str)
    _require_type(size.layers, dict)
    SubModel(size.layers)  # refuses what is no choice
    return size


def _require_type(value: object, *kinds: type) -> None:
    if type(value) not in kinds:
        raise TypeError(f"{value!r:.80} is no {kinds[0].__name__}")
