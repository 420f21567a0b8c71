"""The plan of a nesting: for every Student parameter, where it lives, and its text for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import final

from torch import Tensor, nn

from matta.nesting.declarations import LayerMap
from matta.nesting.layout import Axis
from matta.nesting.slicing import LiveSlice


@final
@dataclass(frozen=True)
class Placement:
    """Where one Student parameter lives: a TA parameter, and the indices of each of its axes.

    `note` says how that was found, if neither sizes nor a declaration say it.
    """

    student: str
    ta: str
    axes: tuple[Axis, ...]
    note: str = field(default="", compare=False)

    @property
    def num_elements(self) -> int:
        """Number of elements of the Student's parameter."""
        return prod(axis.student_size for axis in self.axes)

    @property
    def grows(self) -> bool:
        """Whether the TA's parameter is larger."""
        return any(axis.grows for axis in self.axes)

    def __str__(self) -> str:
        return f"{self.ta}[{', '.join(map(str, self.axes))}]" if self.axes else self.ta


@final
@dataclass(frozen=True)
class Plan:
    """The nesting of one Student: shared parameters by Student name, private ones, module lists.

    `products` are Student parameters of which the modules' code splits an axis that grows (into heads), by numbers
    that go with the other widths; `spanning` are those with a width that several blocks of a list share. `met` are the
    axes (parameter, axis) of each width that grows, as a run has shown them.
    """

    placements: Mapping[str, Placement]
    private: tuple[str, ...]
    layers: tuple[LayerMap, ...]
    products: frozenset[str] = frozenset()
    spanning: frozenset[str] = frozenset()
    met: tuple[frozenset[tuple[str, int]], ...] = ()

    @property
    def num_shared(self) -> int:
        """Number of the TA's elements that the Student shares; tied ones count once."""
        return sum({(each.ta, each.axes): each.num_elements for each in self.placements.values()}.values())


def slices(ta: nn.Module, placements: Mapping[str, Placement], frozen: Iterable[str] = ()) -> dict[str, LiveSlice]:
    """What each Student parameter reads; those in `frozen` pass no gradient on."""
    stopped = set(frozen)
    made = {}
    for name, placement in placements.items():
        path, _, leaf = placement.ta.rpartition(".")
        made[name] = LiveSlice(ta.get_submodule(path), leaf, placement.axes, detach=name in stopped)
    return made


def describe(ta: nn.Module, student: nn.Module, plan: Plan) -> str:
    """The plan as a table, a line for each Student parameter, and the counts below it."""
    private = dict(student.named_parameters())
    rows = [("Student parameter", "shape", "lives in the TA")]
    rows += list(_rows(plan, private))
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "", *_counts(ta, plan, private)])


def _rows(plan: Plan, private: Mapping[str, Tensor]) -> Iterator[tuple[str, str, str]]:
    home: dict[str, str] = {}
    for name, placement in plan.placements.items():
        shape = "x".join(str(axis.student_size) for axis in placement.axes) or "scalar"
        first = home.setdefault(str(placement), name)
        remarks = [placement.note] if placement.note else []
        remarks += [f"tied to {first}"] if first != name else []
        yield name, shape, str(placement) + (f"  ({'; '.join(remarks)})" if remarks else "")
    for name in plan.private:
        shape = "x".join(map(str, private[name].shape)) if name in private else "tied"
        yield name, shape, "private: the Student's own"


def _counts(ta: nn.Module, plan: Plan, private: Mapping[str, Tensor]) -> Iterator[str]:
    shared = plan.num_shared
    own = sum(private[name].numel() for name in plan.private if name in private)
    total = sum(parameter.numel() for parameter in ta.parameters())
    yield f"Student: {shared + own:,} parameters, {shared:,} shared with the TA, {own:,} private"
    ratio = total / max(shared + own, 1)
    yield f"TA: {total:,} parameters, {total - shared:,} beyond the Student's; {ratio:.2f}x the Student"
    yield from blocks(plan)


def blocks(plan: Plan) -> Iterator[str]:
    """A line for each module list that is deeper in the TA."""
    for each in plan.layers:
        if each.num_ta != len(each.indices):
            where = f"{len(each.indices)} blocks in the TA's {each.num_ta}: {list(each.indices)}"
            yield f"{each.student or 'the module'}: {where}"


def kinds(plan: Plan) -> list[tuple[str, str, str, int]]:
    """Student parameter, shape, place in the TA, and how many such there are but for the number of their block."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for name, placement in plan.placements.items():
        shape = "x".join(str(axis.student_size) for axis in placement.axes) or "scalar"
        counts[_starred(name), shape, _starred(str(placement))] += 1
    for name in plan.private:
        counts[_starred(name), "", "the Student's own"] += 1
    return [(*kind, count) for kind, count in counts.items()]


def _starred(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name)
