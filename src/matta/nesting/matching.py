"""Lay one traced model over another of its class: the layout of every axis that grows, part by part.

Where both models split a width into factors (heads and head_dim), the Student's is a leading block of the factors;
where both join several parts (embeddings, the halves of a gate), it is the leading stretch of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import starmap
from typing import final

from torch import nn

from matta.errors import LayoutError, TracingError
from matta.nesting.batches import Batch
from matta.nesting.channels import Moment, Rows
from matta.nesting.dimensions import Dimension, Part, Trace
from matta.nesting.layout import Axis, Layout, Segment, product_segments
from matta.nesting.lockstep import Spread, Spreads
from matta.nesting.tracing import trace


def trace_layouts(student: nn.Module, ta: nn.Module, example: Batch) -> dict[str, Layout]:
    """The layouts by which `matta.nest` lays a Student into a wider module of the same class.

    Both are traced on the example. The layout of a growing axis says what it consists of: one plain
    stretch (1), several parts (embeddings one after the other, halves of a gate, a flattened
    image), or a product (heads times head_dim). Left out are parameters that only one of the two has, that do not
    grow, or whose channels are lost from sight: `matta.nest` knows common ones by itself, and says
    which others to declare.

    Raises:
        TracingError: a module fails on the example, or an axis has other parts in the one than in
            the other.

    Example:
        >>> import torch
        >>> def model(width):
        ...     return nn.Sequential(nn.Conv1d(1, width, 1), nn.Flatten(), nn.Linear(2 * width, 1))
        >>> trace_layouts(model(2), model(3), (torch.zeros(1, 1, 2), None))["2.weight"].axes
        {1: (Segment(student=(2, 2), ta=(3, 2)),)}
    """
    return match_layouts(trace(student, example), trace(ta, example))


@final
@dataclass(frozen=True, kw_only=True)
class Shown:
    """What running both models has shown: the layouts of parameters and of buffers, and which axes are inputs.

    Legend: `norms` are those of what norms without weights return, by module; `lost` are the axes whose channels were
    lost from sight, with where; `reordered` are parameters with a growing axis that data order; `spread` says where
    the Student's channels are in the tensors of a step of the run.
    """

    parameters: Mapping[str, Layout] = field(default_factory=dict)
    buffers: Mapping[str, Layout] = field(default_factory=dict)
    norms: Mapping[str, Layout] = field(default_factory=dict)
    inputs: frozenset[tuple[str, int]] = frozenset()
    unread: frozenset[str] = frozenset()
    products: frozenset[str] = frozenset()
    spanning: frozenset[str] = frozenset()
    met: tuple[frozenset[tuple[str, int]], ...] = ()
    lost: Mapping[tuple[str, int], str] = field(default_factory=dict)
    reordered: frozenset[str] = frozenset()
    spread: Spreads = lambda moment: None

    def input_axes(self, name: str) -> list[int]:
        """The axes of a parameter that are inputs of a layer, also where only its like in other blocks was reached."""
        alike = (
            {name} if name not in self.unread else {other for other, _ in self.inputs if family(other) == family(name)}
        )
        return sorted({axis for other, axis in self.inputs if other in alike})


def shown_layouts(student: nn.Module, ta: nn.Module, example: Batch) -> Shown:
    """What a run of both shows; axes whose channels are lost are left out, all of them if a model does not run."""
    try:
        one, other = trace(student, example), trace(ta, example)
    except TracingError:  # the probe has the last word
        return Shown()
    overlay = _Overlay(one, other)
    return Shown(
        parameters=_of_their_kind(match_layouts(one, other, strict=False), student, ta, one.unread | other.unread),
        buffers=match_layouts(one, other, strict=False, buffers=True),
        norms=overlay.outputs(),
        inputs=one.summed | other.summed,
        unread=one.unread | other.unread,
        products=overlay.products(),
        spanning=overlay.spanning(),
        met=overlay.met(),
        lost={**one.lost(), **other.lost()},
        reordered=overlay.reordered(),
        spread=cache(overlay.spread),
    )


def _of_their_kind(
    layouts: dict[str, Layout], student: nn.Module, ta: nn.Module, unread: frozenset[str]
) -> dict[str, Layout]:
    """The layouts, and for parameters that a run did not come to those of the same sizes in other blocks.

    An expert that no token of the example goes to is cut as the others are.
    """
    shapes = {name: parameter.shape for name, parameter in ta.named_parameters()}
    kinds = {
        name: (family(name), parameter.shape, shapes[name])
        for name, parameter in student.named_parameters()
        if name in shapes and parameter.shape != shapes[name]
    }
    shown: dict[object, Layout] = {}
    for name, layout in layouts.items():
        shown.setdefault(kinds.get(name), layout)
    return {name: shown[kind] for name, kind in kinds.items() if name in unread and kind in shown} | layouts


def family(name: str) -> str:
    """The name of a parameter with a star for each number in it: the same in every block.

    Example:
        >>> family("blocks.3.up.weight")
        'blocks.*.up.weight'
    """
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def match_layouts(student: Trace, ta: Trace, *, strict: bool = True, buffers: bool = False) -> dict[str, Layout]:
    """The layouts of one traced module in another: see `trace_layouts`; those of `buffers` in place of parameters.

    Raises:
        TracingError: an axis has other parts in the one than in the other; such axes are left out, like those
            whose channels are lost, unless `strict`.
    """
    overlay = _Overlay(student, ta)
    layouts: dict[str, Layout] = {}
    for name, wider in _growing(student, ta, buffers).items():
        found = {axis: overlay.axis(name, axis, strict) for axis in wider}
        axes = {axis: segments for axis, segments in found.items() if segments is not None}
        if axes and (len(axes) == len(found) or not strict):
            layouts[name] = Layout({axis: 1 if _is_plain(segments) else segments for axis, segments in axes.items()})
    return layouts


def _growing(student: Trace, ta: Trace, buffers: bool) -> dict[str, list[int]]:
    """The axes that differ in length, of each parameter that both have."""
    found: dict[str, list[int]] = {}
    shared = {name for name, _ in student.axes if (name in student.buffers) == buffers}
    shared -= student.unread | ta.unread
    for (name, axis), parts in ta.axes.items():
        if name in shared and _length(parts) != (_length(student.axes.get((name, axis), ())) or 1):
            found.setdefault(name, []).append(axis)
    return found


def _length(parts: tuple[Part, ...]) -> int:
    return sum(part.size * part.repeat for part in parts)


def _is_plain(segments: tuple[Segment, ...]) -> bool:
    return len(segments) == 1 and len(segments[0].ta) == 1


@final
class _Overlay:
    """The parts of a Student's axes over those of the TA's."""

    def __init__(self, student: Trace, ta: Trace) -> None:
        self.student, self.ta = student, ta

    def axis(self, name: str, axis: int, strict: bool) -> tuple[Segment, ...] | None:
        """The segments of an axis; None where its channels were lost."""
        parts, others = self.student.axes.get((name, axis), ()), self.ta.axes[name, axis]
        try:
            return self._placed(parts, others)
        except _Misfit as error:
            if not strict:
                return None
            raise TracingError(
                f"axis {axis} of {name} consists of {_sizes(parts)} in the Student, but of {_sizes(others)} in the "
                f"TA; expected as many parts in both, each at least as large in the TA; declare its layout by hand in "
                f"`layouts`"
            ) from error

    def outputs(self) -> dict[str, Layout]:
        """The layouts of what modules return, where they can be followed."""
        found: dict[str, Layout] = {}
        for name, parts in self.student.outputs.items():
            with suppress(_Misfit):
                segments = self._placed(parts, self.ta.outputs.get(name, ()))
                found |= {} if segments is None else {name: Layout({0: segments})}
        return found

    def spread(self, moment: Moment) -> Spread | None:
        """Where the Student's channels are in what a step of the TA's run takes and makes."""
        one, other = self.student.noted.get(moment), self.ta.noted.get(moment)
        if one is None or other is None:
            return None
        taken, made = zip(one.taken, other.taken, strict=False), zip(one.made, other.made, strict=False)
        return Spread(tuple(starmap(self._grown, taken)), tuple(starmap(self._grown, made)))

    def _grown(self, rows: Rows, others: Rows) -> dict[int, Axis]:
        """The axes of a tensor of which the Student's channels are known, and are not all of them."""
        found = {}
        for axis in rows.keys() & others.keys():
            parts, wider = self.student.parts_of(rows[axis]), self.ta.parts_of(others[axis])
            with suppress(_Misfit, LayoutError):
                segments = self._placed(parts or (), wider or ())
                if segments is not None and len(rows[axis]) < len(others[axis]):
                    layout = Layout({0: segments})
                    found[axis] = layout.resolve(0, len(rows[axis]), len(others[axis]))
        return found

    def _placed(self, parts: tuple[Part, ...], others: tuple[Part, ...]) -> tuple[Segment, ...] | None:
        return None if not parts or self._is_lost(parts, others) else self._parts(parts, others)

    def products(self) -> frozenset[str]:
        """The parameters with a growing axis that the code splits, or makes frequencies for, by numbers of its own."""
        return self._with_growing(lambda dimension: bool(dimension.factors)) | self._of_ranges()

    def met(self) -> tuple[frozenset[tuple[str, int]], ...]:
        """The growing axes of parameters that have one width, for each width of several."""
        growing = _growing(self.student, self.ta, buffers=False)
        axes = {(name, axis) for name, each in growing.items() for axis in each}
        found = (axes.intersection(each.members) for each in self.student.dimensions)
        return tuple(frozenset(each) for each in found if len(each) > 1)

    def reordered(self) -> frozenset[str]:
        """The parameters with a growing axis whose channels data order."""
        return self._with_growing(lambda dimension: dimension.is_reordered)

    def _with_growing(self, has: Callable[[Dimension], bool]) -> frozenset[str]:
        return frozenset(
            name
            for name, axes in _growing(self.student, self.ta, buffers=False).items()
            if any(
                has(self.student.dimensions[part.dimension])
                for axis in axes
                for part in self.student.axes.get((name, axis), ())
            )
        )

    def spanning(self) -> frozenset[str]:
        """The parameters of blocks with a growing width that other blocks have too, or that code outside of them sets.

        Where such code cuts, or how many frequencies it makes, is a number of its own, which a mixture does not change.
        """
        homes: dict[int, set[tuple[str, str]]] = {}
        members: dict[int, set[str]] = {}
        set_outside, made = set[str](), self._of_ranges()
        for name, axes in _growing(self.student, self.ta, buffers=False).items():
            listed, _, rest = family(name).partition(".*.")
            block = ".".join(name.split(".")[: listed.count(".") + 2])
            for dimension in self._dimensions([self.student.axes.get((name, axis), ()) for axis in axes]):
                members.setdefault(dimension, set()).add(name)
                cut = self.student.shaped.get(dimension, ())
                if name in made or not all(f"{place}.".startswith(f"{block}.") for place in cut):
                    set_outside.add(name)
                if rest:
                    homes.setdefault(dimension, set()).add((listed, name.removeprefix(f"{listed}.").partition(".")[0]))
        several = [each for each, found in homes.items() if len({listed for listed, _ in found}) < len(found)]
        return frozenset(name for each in several for name in members[each]) | set_outside

    def _of_ranges(self) -> frozenset[str]:
        """The parameters with a part that grows and is a range of numbers; what the module is called with does not."""
        return frozenset(
            name
            for name, axes in _growing(self.student, self.ta, buffers=False).items()
            for axis in axes
            for part, other in zip(self.student.axes.get((name, axis), ()), self.ta.axes[name, axis], strict=False)
            if part.size < other.size and self.student.dimensions[part.dimension].is_input
        )

    def _dimensions(self, rows: Iterable[tuple[Part, ...]]) -> Iterator[int]:
        """The dimensions of axes, and those of their factors."""
        for part in (part for row in rows for part in row):
            yield part.dimension
            yield from self._dimensions(self.student.dimensions[part.dimension].factors)

    def _is_lost(self, parts: tuple[Part, ...], others: tuple[Part, ...]) -> bool:
        """Whether a part that grows, or a factor of it that does, cannot be placed."""
        if len(parts) == len(others):
            return any(map(self._is_hidden, parts, others))
        return any(self.student.dimensions[part.dimension].is_lost for part in parts)

    def _is_hidden(self, part: Part, other: Part) -> bool:
        one, two = self.student.dimensions[part.dimension], self.ta.dimensions[other.dimension]
        if one.size == two.size:
            return False
        if one.is_lost or two.is_lost:
            return True
        if len(one.factors) == len(two.factors) > 0:
            return any(map(self._is_lost, one.factors, two.factors))
        return (one.is_picked and not two.factors) or two.is_picked  # what the TA alone splits, its factors show

    def _parts(self, parts: tuple[Part, ...], others: tuple[Part, ...]) -> tuple[Segment, ...]:
        with_units = self._with_units(parts, others)
        if with_units is not None:
            return with_units
        if len(parts) != len(others):
            parts, others = _singly(parts), _singly(others)
        if len(parts) < len(others) == _length(parts):  # the TA's parts are of one channel each in the Student
            parts = tuple(replace(part, size=1, repeat=1) for part in parts for _ in range(part.size * part.repeat))
        if len(parts) != len(others):
            raise _Misfit
        return tuple(segment for pair in zip(parts, others, strict=True) for segment in self._part(*pair))

    def _with_units(self, parts: tuple[Part, ...], others: tuple[Part, ...]) -> tuple[Segment, ...] | None:
        """The segments where the TA has more factors than the Student, such as two heads over one; None elsewhere."""
        if not others:
            return () if not parts else None
        wider = self.ta.dimensions[others[0].dimension].factors if others[0].repeat == 1 else ()
        for end in range(1, len(parts) + 1) if wider else ():
            factors = self._factors(parts[:end], len(wider))
            rest = None if factors is None else self._with_units(parts[end:], others[1:])
            if factors is not None and rest is not None:
                pairs = zip(factors, wider, strict=True)
                made = [self._parts(*pair) if pair[0] else (Segment((1,), (_length(pair[1]),)),) for pair in pairs]
                return *product_segments(made), *rest
        return None

    def _factors(self, parts: tuple[Part, ...], count: int) -> list[tuple[Part, ...]] | None:
        """So many factors of parts, nothing for a factor of 1; None if they were not split so."""
        own = self.student.dimensions[parts[0].dimension].factors
        if len(parts) == 1 and parts[0].repeat == 1 and len(own) == count:
            return list(own)
        for sizes in sorted(self.student.units.get(parts, ()), key=lambda sizes: sizes[0] > 1):  # heads come first
            more = iter(own if sum(size > 1 for size in sizes) > 1 else (parts,))
            if len(sizes) == count:
                return [next(more, ()) if size > 1 else () for size in sizes]
        return None

    def _part(self, part: Part, other: Part) -> tuple[Segment, ...]:
        if self._is_repeated(part, other):
            return (Segment((1, part.size), (other.size, other.repeat)),)
        if part.size > other.size or part.repeat > other.repeat:
            raise _Misfit
        one, two = self.student.dimensions[part.dimension].factors, self.ta.dimensions[other.dimension].factors
        if part.size == other.size or not one + two:
            found: tuple[Segment, ...] = (Segment((part.size,), (other.size,)),)
        elif len(one) == len(two):
            found = product_segments([self._parts(*pair) for pair in zip(one, two, strict=True)])
        elif not one:  # what is split in the TA alone is the innermost factor: one head beside several
            outer = Segment((1,), (other.size // _length(two[-1]),))
            found = product_segments([(outer,), self._parts((replace(part, repeat=1),), two[-1])])
        else:
            raise _Misfit
        return (
            found
            if part.repeat == other.repeat == 1
            else product_segments([found, (Segment((part.repeat,), (other.repeat,)),)])
        )

    def _is_repeated(self, part: Part, other: Part) -> bool:
        """Whether the Student's part is one of those that repeat in the TA, as query heads of a single key head do.

        The Student has one of what repeats, and so no axis for it where the TA has one.
        """
        fits = part.repeat == 1 < other.repeat and part.size <= other.repeat
        if not fits:
            return False
        own, theirs = _homes(self.student, part.dimension), _homes(self.ta, other.dimension)
        axes = [{place[:2] for place in places} for places in (own, theirs)]
        return axes[0] < axes[1] or own < theirs  # one axis of a fused projection holds queries and keys


def _homes(trace: Trace, dimension: int) -> set[tuple[str, int, int]]:
    """The axes that a dimension is a part of, or a factor of a part, and which part of them."""

    def holds(part: Part) -> bool:
        factors = trace.dimensions[part.dimension].factors
        return part.dimension == dimension or any(holds(each) for factor in factors for each in factor)

    return {(*key, i) for key, parts in trace.axes.items() for i, part in enumerate(parts) if holds(part)}


def _singly(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """A single channel that is repeated, as rotary halves of one channel each are, as so many parts."""
    single = [[replace(part, repeat=1)] * part.repeat if part.size == 1 else [part] for part in parts]
    return tuple(part for row in single for part in row)


class _Misfit(Exception):
    """Parts that do not lie over each other."""


def _sizes(parts: tuple[Part, ...]) -> str:
    sizes = [f"{part.size} x {part.repeat}".removesuffix(" x 1") for part in parts]
    return " + ".join(sizes[:8]) + (f" + {len(sizes) - 8} more" if len(sizes) > 8 else "")
