"""Dimensions: the widths of a module, put together from the channels that met while it ran.

An axis of a parameter is a row of *parts*, each of them one dimension: the width of a hidden layer, of a residual
stream, of one half of a gate. A dimension that is split over several axes (an attention's width into heads and
head_dim) is a product, and has *factors*, each of them again a row of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from matta.nesting.channels import Channels, Moment, Noted, Row, Rows


@final
@dataclass(frozen=True, kw_only=True)
class Part:
    """A stretch of an axis: each index of `dimension`, `repeat` times in a row."""

    dimension: int
    size: int
    repeat: int = 1


@final
@dataclass(frozen=True, kw_only=True)
class Dimension:
    """Axes of parameters that have one width and must grow together.

    Legend: `size` is the width; `members` are (parameter or buffer, axis); `is_input` and `is_output`
    say that it is an axis of a tensor that the module receives or returns; `problem`, if any, says why it is
    ambiguous how the dimension alone would grow: it is a product or a factor of one, one of its channels is picked
    by its index (`is_picked`), data order its channels (`is_reordered`), or they were lost from sight (`is_lost`).
    `factors` are the parts of each factor of a product, from the slowest index to the fastest.
    """

    size: int
    members: tuple[tuple[str, int], ...]
    is_input: bool
    is_output: bool
    problem: str | None
    is_lost: bool = False
    is_picked: bool = False
    is_reordered: bool = False
    factors: tuple[tuple[Part, ...], ...] = ()


@final
@dataclass(frozen=True, kw_only=True)
class Trace:
    """What `trace` found.

    Legend: `axes` gives the parts of each axis longer than 1, by (parameter or buffer, axis), of which
    `buffers` are no parameters;
    `outputs` the parts of what each module computes; `inputs` those of what each receives, by (module, which of its
    tensors, axis), where all of the axis is known; `output_shapes` the shapes that the whole
    module returned; `unread` the parameters that the run did not come to, and
    `summed` the axes of parameters that products with data sum over: the inputs of layers. `noted` are the rows of
    what steps took and made, and `parts_of` gives the parts of such a row, None if not all of it is known. `shaped`
    names the modules whose code has cut a dimension, or split it into factors; `units` gives the sizes into which
    parts were split with factors of 1 among them, such as a single head.
    """

    dimensions: tuple[Dimension, ...]
    axes: Mapping[tuple[str, int], tuple[Part, ...]]
    buffers: frozenset[str]
    outputs: Mapping[str, tuple[Part, ...]]
    inputs: Mapping[tuple[str, int, int], tuple[Part, ...]]
    output_shapes: tuple[torch.Size, ...]
    unread: frozenset[str] = frozenset()
    summed: frozenset[tuple[str, int]] = frozenset()
    noted: Mapping[Moment, Noted] = field(default_factory=dict)
    parts_of: Callable[[Row], tuple[Part, ...] | None] = lambda row: None
    shaped: Mapping[int, frozenset[str]] = field(default_factory=dict)
    units: Mapping[tuple[Part, ...], tuple[tuple[int, ...], ...]] = field(default_factory=dict)

    def describe(self, dimension: int) -> str:
        """The axes of a dimension, for a message."""
        return named_axes(self.dimensions[dimension].members)

    def lost(self) -> dict[tuple[str, int], str]:
        """The axes with channels that were lost from sight, and where they were."""
        return {
            key: self.dimensions[part.dimension].problem or "its channels meet in more ways than one"
            for key, parts in self.axes.items()
            for part in parts
            if self.dimensions[part.dimension].is_lost
        }


def named_axes(members: Sequence[tuple[str, int]], most: int = 6) -> str:
    """Axes of parameters in words; of many the first few."""
    names = [f"{name} (axis {axis})" for name, axis in members]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


@final
class Atlas:
    """Dimensions, as chains of channel classes that follow one another on every axis that has them."""

    def __init__(self, channels: Channels, rows: dict[tuple[str, int], Row], outputs: list[Row]) -> None:
        self._channels, self._rows, self._outputs = channels, rows, outputs
        channels.close_products()
        self._count = len(channels)
        self._start, self._place = self._chains()
        everything = [self._classes(row) for row in [*rows.values(), *channels.product_rows()]]
        known = self._start[torch.cat(everything).unique()] if everything else self._start[:0]
        starts, sizes = known.unique(return_counts=True)
        self._sizes = sizes.tolist()
        self._index = torch.full((self._count,), -1)
        self._index[starts] = torch.arange(len(starts))

    def _classes(self, row: Row) -> Row:
        return self._channels.classes(row)

    def _chains(self) -> tuple[Row, Row]:
        """The first class of the chain of each class, and the place of each in its chain."""
        steps, heads, tails = self._steps()
        before = torch.arange(self._count)
        source, target = steps[:, 0], steps[:, 1]
        follows = torch.bincount(source, minlength=self._count)
        leads = torch.bincount(target, minlength=self._count)
        one_way = (follows[source] == 1) & (leads[target] == 1) & ~tails[source] & ~heads[target]
        before[target[one_way]] = source[one_way]
        place = (before != torch.arange(self._count)).long()
        while not torch.equal(before, before[before]):
            place = place + place[before]
            before = before[before]
        return before, place

    def _steps(self) -> tuple[Tensor, Row, Row]:
        """Pairs of classes that follow each other on some axis, and those where an axis is cut."""
        heads = torch.zeros(self._count, dtype=torch.bool)
        tails, pairs = heads.clone(), []
        for row in [*self._rows.values(), *self._channels.product_rows(), *self._channels.cuts]:
            values, counts = torch.unique_consecutive(self._classes(row), return_counts=True)
            heads[values[0]], tails[values[-1]] = True, True
            even = (counts[:-1] == counts[1:]) & (values[1:] != 0) & (values[:-1] != 0)
            heads[values[1:][~even]], tails[values[:-1][~even]] = True, True
            pairs.append(torch.stack([values[:-1], values[1:]], dim=1)[even])
        joined = torch.cat(pairs) if pairs else torch.zeros(0, 2, dtype=torch.long)
        return joined.unique(dim=0), heads, tails

    def parts(self, row: Row) -> tuple[Part, ...]:
        """An axis as parts; channels that are not known are left out."""
        values, counts = torch.unique_consecutive(self._classes(row[row != 0]), return_counts=True)
        firsts = (self._place[values] == 0).nonzero().flatten().tolist()
        found = []
        for first in firsts:
            dimension = int(self._index[self._start[values[first]]])
            size, repeat = self._sizes[dimension], int(counts[first])
            found.append(Part(dimension=dimension, size=size, repeat=repeat))
        return tuple(found)

    def dimensions(self) -> tuple[Dimension, ...]:
        members: list[list[tuple[str, int]]] = [[] for _ in self._sizes]
        for key, row in self._rows.items():
            for dimension in self._of(row):
                members[dimension].append(key)
        outputs = {dimension for row in self._outputs for dimension in self._of(row)}
        problems: dict[int, str] = {}
        kinds: dict[int, set[str]] = {}
        for row, problem, kind in self._channels.problems:
            for dimension in self._of(row):
                problems.setdefault(dimension, problem)
                kinds.setdefault(dimension, set()).add(kind)
        inputs, (factors, broken) = set(self._of(self._channels.inputs())), self._factors()
        for whole, rows in factors.items():
            for part in rows[-1]:  # what the innermost factor cannot do, the product cannot
                if part.dimension in problems:
                    problems.setdefault(whole, problems[part.dimension])
        return tuple(
            Dimension(
                size=size,
                members=tuple(members[i]),
                is_input=i in inputs,
                is_output=i in outputs,
                problem=problems.get(i),
                is_lost="lost" in kinds.get(i, ()) or i in broken,
                is_picked="picked" in kinds.get(i, ()),
                is_reordered="reordered" in kinds.get(i, ()),
                factors=factors.get(i, ()),
            )
            for i, size in enumerate(self._sizes)
        )

    def _factors(self) -> tuple[dict[int, tuple[tuple[Part, ...], ...]], set[int]]:
        """The factors of each dimension that is a product, and dimensions that are one in no single way."""
        found: dict[int, tuple[tuple[Part, ...], ...]] = {}
        broken: set[int] = set()
        for whole, factors in self._channels.products:
            parts = self.parts(whole)
            if len(parts) != 1 or parts[0].repeat != 1 or parts[0].size != len(whole):
                # the slowest factor may be laid out as so many parts: rotary halves, or query, key and value
                if {(part.size, part.repeat) for part in parts} != {(len(whole) // len(factors[0]), 1)}:
                    broken.update(part.dimension for part in parts)
                elif len(factors) > 2:
                    for part in parts:
                        found.setdefault(part.dimension, tuple(self.parts(factor) for factor in factors[1:]))
                continue
            made = tuple(self.parts(factor) for factor in factors)
            before = found.setdefault(parts[0].dimension, made)
            if len(made) > len(before):
                found[parts[0].dimension] = made
        return found, broken

    def _of(self, row: Row) -> list[int]:
        """The dimensions on an axis, each once."""
        found: list[int] = self._index[self._start[self._classes(row[row != 0])]].unique().tolist()
        return [dimension for dimension in found if dimension >= 0]  # an input's own axes are none

    def whole_axes(self, taken: dict[tuple[str, int], Rows]) -> Iterator[tuple[tuple[str, int, int], tuple[Part, ...]]]:
        """The axes of tensors that modules receive of which every channel is of a dimension."""
        for place, rows in taken.items():
            for axis, row in rows.items():
                parts = self.parts_of(row)
                if parts is not None:
                    yield (*place, axis), parts

    def parts_of(self, row: Row) -> tuple[Part, ...] | None:
        """An axis as parts, if each of its channels is of a dimension."""
        is_whole = bool((row != 0).all()) and bool((self._index[self._start[self._classes(row)]] >= 0).all())
        return self.parts(row) if is_whole else None

    def units(self) -> dict[tuple[Part, ...], tuple[tuple[int, ...], ...]]:
        """The sizes into which rows were split with factors of 1 among them, by what the rows consist of."""
        found: dict[tuple[Part, ...], tuple[tuple[int, ...], ...]] = {}
        for row, sizes in self._channels.units:
            parts = self.parts_of(row)
            if parts is not None and sizes not in found.get(parts, ()):
                found[parts] = (*found.get(parts, ()), sizes)
        return found

    def places(self, shaped: Sequence[tuple[str, Row]]) -> dict[int, frozenset[str]]:
        """The modules that have cut each dimension."""
        found: dict[int, set[str]] = {}
        for name, row in shaped:
            for dimension in self._of(row):
                found.setdefault(dimension, set()).add(name)
        return {dimension: frozenset(names) for dimension, names in found.items()}

    def own_axes(self, seen: dict[str, Rows], own: dict[str, list[Row]]) -> Iterator[tuple[str, Row]]:
        """The one axis of each module's output that its own parameters span, if there is just one."""
        for name, rows in seen.items():
            mine = {dimension for row in own[name] for dimension in self._of(row)}
            axes = [row for row in rows.values() if mine & set(self._of(row))]
            if len(axes) == 1:
                yield name, axes[0]
