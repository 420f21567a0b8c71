"""Which part of an axis of a Teaching Assistant's parameter belongs to the Student.

A plain axis nests by its leading part. A fused axis (query, key and value in one matrix, the two
halves of a GLU, the gates of an LSTM, several embeddings one after the other) nests by the leading
part of each of its pieces: it is a row of *segments*, and each segment may be a product of
*factors*, such as (heads, head_dim), of which the Student holds the leading block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import final

from torch import Tensor, cat

from matta.errors import LayoutError


@final
@dataclass(frozen=True)
class Segment:
    """A stretch of an axis, as factors from the slowest index to the fastest.

    The Student holds the block of the leading `student[i]` of the `ta[i]` indices of each factor.

    Raises:
        LayoutError: the two have different numbers of factors, or the Student's is the larger.

    Example:
        >>> Segment((2, 1), (2, 3)).positions()  # two heads, the first of three channels of each
        [0, 3]
    """

    student: tuple[int, ...]
    ta: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.student) != len(self.ta) or not self.ta:
            raise LayoutError(
                f"a segment has one factor list for each model, of the same length; "
                f"received student={self.student}, ta={self.ta}"
            )
        if any(not 0 <= s <= t for s, t in zip(self.student, self.ta, strict=True)):
            raise LayoutError(
                f"the Student's factors {self.student} do not fit into the TA's {self.ta}: "
                f"each must be at most as large; swap them if the models are swapped"
            )

    @property
    def student_size(self) -> int:
        """Number of the Student's indices."""
        return prod(self.student)

    @property
    def ta_size(self) -> int:
        """Number of the Teaching Assistant's indices."""
        return prod(self.ta)

    @property
    def grows(self) -> bool:
        """Whether the Teaching Assistant has more indices here than the Student."""
        return self.student != self.ta

    def widened(self) -> Segment:
        """This segment with all of the Teaching Assistant's indices."""
        return Segment(self.ta, self.ta)

    def positions(self) -> list[int]:
        """The Student's indices in the stretch, in the Student's order."""
        strides = [prod(self.ta[i + 1 :]) for i in range(len(self.ta))]
        blocks = product(*(range(s) for s in self.student))
        return [sum(i * stride for i, stride in zip(block, strides, strict=True)) for block in blocks]

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """The Student's part of `tensor`, whose axis `dim` is this stretch; a view where it can be."""
        if not self.grows:
            return tensor
        if len(self.ta) == 1:
            return tensor.narrow(dim, 0, self.student[0])
        tensor = tensor.unflatten(dim, self.ta)
        for factor, size in enumerate(self.student):
            tensor = tensor.narrow(dim + factor, 0, size)
        return tensor.flatten(dim, dim + len(self.ta) - 1)


@final
@dataclass(frozen=True)
class Axis:
    """One axis of a parameter: the segments it consists of, one after the other.

    Example:
        >>> Axis.plain(2, 4).positions(), Axis((Segment((1,), (2,)),) * 2).positions()
        ([0, 1], [0, 2])
    """

    segments: tuple[Segment, ...]

    @staticmethod
    def plain(student: int, ta: int) -> Axis:
        """An axis of which the Student holds the leading part."""
        return Axis((Segment((student,), (ta,)),))

    @property
    def student_size(self) -> int:
        """Length of the axis in the Student."""
        return sum(segment.student_size for segment in self.segments)

    @property
    def ta_size(self) -> int:
        """Length of the axis in the Teaching Assistant."""
        return sum(segment.ta_size for segment in self.segments)

    @property
    def grows(self) -> bool:
        """Whether the axis is longer in the Teaching Assistant."""
        return any(segment.grows for segment in self.segments)

    @property
    def is_plain(self) -> bool:
        """Whether the axis is one stretch, of which the Student holds the leading part."""
        return len(self.segments) == 1 and len(self.segments[0].ta) == 1

    @property
    def is_leading(self) -> bool:
        """Whether the Student's indices are simply the first ones."""
        return self.positions() == list(range(self.student_size))

    def positions(self) -> list[int]:
        """The Student's indices on the Teaching Assistant's axis, in the Student's order."""
        found: list[int] = []
        offset = 0
        for segment in self.segments:
            found += [offset + position for position in segment.positions()]
            offset += segment.ta_size
        return found

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """The Student's part of `tensor` along `dim`; a view where it can be."""
        if not self.grows:
            return tensor
        pieces, offset = [], 0
        for segment in self.segments:
            pieces.append(segment.take(tensor.narrow(dim, offset, segment.ta_size), dim))
            offset += segment.ta_size
        return pieces[0] if len(pieces) == 1 else cat(pieces, dim)

    def __str__(self) -> str:
        if not self.grows:
            return ":"
        if self.is_leading:
            return f":{self.student_size}"
        return "+".join(f"({_factors(segment)})" for segment in self.segments)


def _factors(segment: Segment) -> str:
    pairs = zip(segment.student, segment.ta, strict=True)
    return "x".join(f"{t}" if s == t else f":{s} of {t}" for s, t in pairs)


AxisLayout = int | tuple[Segment, ...]


@final
@dataclass(frozen=True)
class Layout:
    """What the axes of a parameter consist of, where that is more than one plain stretch.

    `axes` maps an axis to the number of equal segments it is cut into, or to the segments
    themselves. Axes that are not named are plain. The constructors below write the common ones;
    join several with `|`.

    Raises:
        LayoutError: a number of segments below 1, or an axis laid out twice.

    Example:
        >>> Layout.equal(3)  # query, key and value in one matrix, each of it a third of the rows
        Layout(axes={0: 3})
        >>> Layout.concat([(8, 16), (5, 5)], axis=1).axes[1][0]  # an embedding, then 5 dense features
        Segment(student=(8,), ta=(16,))
    """

    axes: Mapping[int, AxisLayout]

    def __post_init__(self) -> None:
        for axis, parts in self.axes.items():
            if isinstance(parts, int) and parts < 1:
                raise LayoutError(f"axis {axis} is to be cut into {parts} segments; expected 1 or more")

    @staticmethod
    def equal(segments: int, axis: int = 0) -> Layout:
        """An axis of `segments` equal parts, of each of which the Student holds the leading part."""
        return Layout({axis: segments})

    @staticmethod
    def concat(sizes: Sequence[tuple[int, int]], axis: int = 0) -> Layout:
        """An axis of parts one after the other, each a pair (Student's size, TA's size)."""
        return Layout({axis: tuple(Segment((student,), (ta,)) for student, ta in sizes)})

    @staticmethod
    def factors(sizes: Sequence[tuple[int, int]], axis: int = 0) -> Layout:
        """An axis that is a product, such as heads times head_dim: pairs from the slowest index on."""
        return Layout({axis: (Segment(tuple(s for s, _ in sizes), tuple(t for _, t in sizes)),)})

    def __or__(self, other: Layout) -> Layout:
        both = self.axes.keys() & other.axes.keys()
        if both:
            raise LayoutError(f"axis {min(both)} is laid out twice: {self} and {other}; keep one of them")
        return Layout({**self.axes, **other.axes})

    def resolve(self, axis: int, student: int, ta: int) -> Axis:
        """The axis of the given sizes.

        Raises:
            LayoutError: the sizes are not the ones that the layout describes.
        """
        parts = self.axes.get(axis, 1)
        if not isinstance(parts, int):
            found = Axis(parts)
        elif parts == 1:
            found = Axis.plain(student, ta)
        elif student % parts or ta % parts:
            raise LayoutError(
                f"axis {axis} is {student} long in the Student and {ta} in the TA: "
                f"not {parts} equal segments in both; declare Layout.concat([(student, ta), ...], axis={axis})"
            )
        else:
            found = Axis((Segment((parts, student // parts), (parts, ta // parts)),))
        if (found.student_size, found.ta_size) != (student, ta):
            raise LayoutError(
                f"axis {axis} is laid out as {found.student_size} of {found.ta_size}, "
                f"but is {student} long in the Student and {ta} in the TA; expected parts that sum to both: "
                f"correct their sizes"
            )
        return found


def product_segments(factors: list[tuple[Segment, ...]]) -> tuple[Segment, ...]:
    """The segments of a product, of which each factor may consist of several segments."""
    first, *rest = [_joined(each) for each in factors]
    if not rest:
        return first
    inner = product_segments(list(rest))
    if len(inner) == 1:
        return tuple(Segment(each.student + inner[0].student, each.ta + inner[0].ta) for each in first)
    absent = tuple(Segment((0,), (each.ta_size,)) for each in inner)
    held = set(Axis(first).positions())
    return tuple(each for i in range(sum(one.ta_size for one in first)) for each in (inner if i in held else absent))


def _joined(segments: tuple[Segment, ...]) -> tuple[Segment, ...]:
    """Equal segments as one of two factors."""
    if len(segments) > 1 and len(set(segments)) == 1:
        number, each = len(segments), segments[0]
        return (Segment((number, *each.student), (number, *each.ta)),)
    return segments
