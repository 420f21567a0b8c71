"""Which growing axes shapes alone cannot place, so that the user has to say what they are.

An axis that grows from a to b is understood when what feeds it, or what it feeds, grows from a to b
as well. An output without such an input is fused (query, key and value in one matrix) or cut up; an
input without such an output is several vectors one after the other. Taking the leading part of
either would run, and pick the wrong rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from torch import nn

from matta.errors import NestingError
from matta.nesting.known_modules import ATTENTION_NAMES, axis_role
from matta.nesting.layout import Axis
from matta.nesting.plan import Placement

Growth = tuple[tuple[int, int], ...]
"""The factors of a segment that grow, as pairs (Student's size, TA's size)."""

_FEEDS = {"out": ("in", "unknown"), "in": ("out", "embedding", "unknown")}


def growths(axis: Axis) -> list[Growth]:
    """How the segments of an axis grow; segments that do not are left out."""
    found = []
    for segment in axis.segments:
        pairs = zip(segment.student, segment.ta, strict=True)
        found.append(tuple(pair for pair in pairs if pair[0] != pair[1]))
    return [growth for growth in found if growth]


def refuse_ambiguous_axes(
    student: nn.Module,
    ta: nn.Module,
    placements: Iterable[Placement],
    declared: set[str],
    private: Iterable[Placement] = (),
) -> None:
    """Refuse the growing plain axes for which nothing in the model says that they are plain.

    `private` are parameters that are not shared: nothing is asked of them, but they show what feeds what.

    Raises:
        NestingError: with the parameter, its axis, and what to declare.
    """
    placements = list(placements)
    matrices = [each for each in placements if len(each.axes) > 1]
    roles: dict[Growth, set[str]] = {}
    siblings: Counter[tuple[str, Growth]] = Counter()
    for each in [*matrices, *(other for other in private if len(other.axes) > 1)]:
        for _, growth, role in _growing(student, each):
            roles.setdefault(growth, set()).add(role)
            siblings[_parent(each.student), growth] += role == "out"
    for each in matrices:
        if each.student not in declared:
            _refuse_wider_groups(student, ta, each)
        for axis, growth, role in _growing(student, each):
            if each.student in declared or not each.axes[axis].is_plain:
                continue
            if role in _FEEDS and not roles[growth] & set(_FEEDS[role]):
                raise NestingError(_message(each, axis, role))
            if _may_be_heads(student, each, siblings[_parent(each.student), growth]):
                _refuse_heads(student, ta, each, axis)
    _refuse_unmatched_norms(student, placements, roles, declared)


def _parent(name: str) -> str:
    """The module that holds the module of a parameter."""
    return name.rpartition(".")[0].rpartition(".")[0]


def _may_be_heads(student: nn.Module, placement: Placement, num_outputs: int) -> bool:
    """Whether a module looks like attention: by its name, or by three outputs that grow alike."""
    path = _parent(placement.student)
    name = f"{path.rpartition('.')[2]} {type(student.get_submodule(path)).__name__}".lower()
    return "att" in name or num_outputs >= 3


def _refuse_unmatched_norms(
    student: nn.Module, placements: Iterable[Placement], roles: Mapping[Growth, set[str]], declared: set[str]
) -> None:
    """Refuse a vector by itself, as a norm has, that grows as no matrix does: it spans several vectors."""
    for each in placements:
        owner = student.get_submodule(each.student.rpartition(".")[0])
        own = [parameter for parameter in owner._parameters.values() if parameter is not None]
        if len(each.axes) != 1 or each.student in declared or any(parameter.ndim > 1 for parameter in own):
            continue
        if roles and any(growth not in roles for growth in growths(each.axes[0])):
            raise NestingError(_message(each, 0, "in"))


def _growing(student: nn.Module, placement: Placement) -> Iterable[tuple[int, Growth, str]]:
    path, _, leaf = placement.student.rpartition(".")
    owner = student.get_submodule(path)
    for axis, found in enumerate(placement.axes):
        for growth in growths(found):
            yield axis, growth, axis_role(owner, leaf, axis)


def _message(placement: Placement, axis: int, role: str) -> str:
    sizes = f"{placement.axes[axis].student_size} to {placement.axes[axis].ta_size}"
    pattern = placement.student
    if role == "out":
        return (
            f"{pattern} grows from {sizes} on its output axis {axis}, but no input of the Student grows so: its output "
            f"is cut up or fused (as query, key and value are); declare the number of segments, "
            f"layouts={{{pattern!r}: 3}}, or 1 if it is one plain vector, or pass example=batch to have it probed"
        )
    return (
        f"{pattern} grows from {sizes} on its input axis {axis}, but no output of the Student grows so: its input is "
        f"several vectors one after the other, or flattened; declare them in order, layouts={{{pattern!r}: "
        f"matta.Layout.concat([(student, ta), ...], axis={axis})}}, or 1 if the Student's part is the leading one, "
        f"or pass example=batch to have it probed"
    )


def _refuse_heads(student: nn.Module, ta: nn.Module, placement: Placement, axis: int) -> None:
    """Refuse an axis that is split into as many heads as before, each of them wider."""
    heads = tuple(
        _num_heads(module.get_submodule(_parent(name)))
        for module, name in ((student, placement.student), (ta, placement.ta))
    )
    sizes = placement.axes[axis].student_size, placement.axes[axis].ta_size
    if None in heads or any(size % count for size, count in zip(sizes, heads, strict=True)):  # type: ignore[operator]
        return
    dims = [size // count for size, count in zip(sizes, heads, strict=True)]  # type: ignore[operator]
    if dims[0] != dims[1]:
        raise NestingError(
            f"{placement.student} grows from {sizes[0]} to {sizes[1]} on axis {axis}, in a module with {heads[0]} "
            f"heads in the Student and {heads[1]} in the TA: if the axis is split into heads, declare layouts="
            f"{{{placement.student!r}: matta.Layout.factors([({heads[0]}, {heads[1]}), ({dims[0]}, {dims[1]})], "
            f"axis={axis})}}; if it is one plain vector, declare 1; or pass example=batch to have it probed"
        )


def _refuse_wider_groups(student: nn.Module, ta: nn.Module, placement: Placement) -> None:
    """Refuse a convolution whose groups become wider: the Student's channels then lie in each group, not first."""
    owners = [
        module.get_submodule(name.rpartition(".")[0])
        for module, name in ((student, placement.student), (ta, placement.ta))
    ]
    groups = [getattr(each, "groups", 1) for each in owners]
    if not all(isinstance(each, nn.modules.conv._ConvNd) for each in owners) or groups[0] == 1:
        return
    sizes = [
        (each.in_channels // count, each.out_channels // count)  # type: ignore[operator]
        for each, count in zip(owners, groups, strict=True)
    ]
    if sizes[0] != sizes[1]:
        raise NestingError(
            f"{placement.student} is of a convolution of {groups[0]} groups, from {sizes[0][0]} channels to "
            f"{sizes[0][1]} each, and in the TA of {groups[1]}, from {sizes[1][0]} to {sizes[1][1]}: the Student's "
            f"channels lie in each group; declare that for it and for the layers about it, layouts="
            f"{{{placement.student!r}: {groups[0]}, ...}}, or pass example=batch to have it probed; it is simplest to "
            f"let the number of groups grow and their widths be"
        )


def _num_heads(module: nn.Module) -> int | None:
    values = [getattr(module, name, None) for name in ATTENTION_NAMES["heads"]]
    return next((value for value in values if isinstance(value, int) and value > 0), None)
