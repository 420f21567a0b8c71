"""The layers of a nesting that can be wide or narrow each for itself.

What users call a layer (`layer_names`) is a `Unit` here, since `layers` are the module lists that they declare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import final

from torch import nn

from matta.nesting.ambiguity import Growth
from matta.nesting.declarations import LayerMap, translate
from matta.nesting.known_modules import axis_role, is_patchable
from matta.nesting.plan import Placement, Plan

Spot = tuple[str, int, int]
"""A place where a width occurs: a Student parameter, an axis of it, and a segment of the axis."""


@final
@dataclass(frozen=True)
class Unit:
    """One layer: a block of a module list (`layers` and the TA's `index`), or the spots of a width.

    A unit that is neither, the hidden width through all blocks, has both empty.
    """

    name: str
    layers: LayerMap | None = None
    index: int = 0
    spots: frozenset[Spot] = frozenset()

    @property
    def is_block(self) -> bool:
        """Whether it is an entry of a module list."""
        return self.layers is not None

    @property
    def runs_through(self) -> bool:
        """Whether it is the hidden width that runs through all blocks, which are then as wide as it is."""
        return self.layers is None and not self.spots


HIDDEN = "hidden"  # the name of the width that runs through all blocks; a user's module may have it too


def find_units(student: nn.Module, ta: nn.Module, plan: Plan) -> tuple[Unit, ...]:
    """The layers in the order in which the TA defines them."""
    lists = block_lists(student, plan)
    inside = {name for each in lists for name in plan.placements if name.startswith(_prefix(each.student))}
    outside = {growth: spots for growth, spots in _widths(plan).items() if any(spot[0] not in inside for spot in spots)}
    is_one_width = _is_one_width(student, plan, outside, inside) or _has_wide_buffers(student, ta, plan, lists)
    if is_one_width:
        units = [Unit(HIDDEN)]
    else:
        units = [Unit(_name(student, spots), spots=frozenset(spots)) for spots in _split(student, plan, outside)]
    if not is_one_width or any(each.num_ta != len(each.indices) for each in lists):
        units += [Unit(f"{_prefix(each.ta)}{i}", each, i) for each in lists for i in range(each.num_ta)]
    return tuple(sorted(units, key=_position(ta)))


def _is_one_width(student: nn.Module, plan: Plan, widths: dict[Growth, list[Spot]], inside: set[str]) -> bool:
    """Whether layers cannot be chosen each for itself, since one width runs through all of them.

    So it is where a width outside of the blocks also occurs `inside` of them, where code splits one (into heads) or
    cuts it up, where a module that has one cannot be cut, and where several blocks share one.
    """
    return any(name in inside for name in plan.spanning) or any(
        spot[0] in inside
        or spot[0] in plan.products
        or not is_patchable(student.get_submodule(spot[0].rpartition(".")[0]))
        or _is_cut(student, plan.placements[spot[0]], spot[1])
        for spots in widths.values()
        for spot in spots
    )


def block_lists(student: nn.Module, plan: Plan) -> list[LayerMap]:
    """The outermost module lists whose entries are blocks: whatever grows in one stays in it, or runs through all."""
    found: list[LayerMap] = []
    for each in plan.layers:
        nested_in_another = any(each.student.startswith(_prefix(other.student)) for other in found)
        if not nested_in_another and _holds_blocks(student, plan, each):
            found.append(each)
    return found


def _holds_blocks(student: nn.Module, plan: Plan, layers: LayerMap) -> bool:
    """Whether the entries are modules of modules, or a list of bare layers of which the TA has more."""
    entries = list(student.get_submodule(layers.student).children())
    own = [name for name in plan.placements if name.startswith(_prefix(layers.student))]
    if not own:
        return False
    if any(True for entry in entries for _ in entry.children()):
        return all(any(True for _ in entry.parameters()) for entry in entries)
    return layers.num_ta != len(layers.indices)


def _has_wide_buffers(student: nn.Module, ta: nn.Module, plan: Plan, lists: list[LayerMap]) -> bool:
    """Whether a module that cannot be cut, outside of the blocks, keeps a buffer that grows: a mask, a rotary table."""
    blocks = tuple(_prefix(each.student) for each in lists)
    sizes = {name: buffer.shape for name, buffer in ta.named_buffers()}
    return any(
        sizes.get(translate(name, plan.layers), buffer.shape) != buffer.shape
        and not is_patchable(student.get_submodule(name.rpartition(".")[0]))
        for name, buffer in student.named_buffers()
        if not name.startswith(blocks)
    )


def _is_cut(student: nn.Module, placement: Placement, axis: int) -> bool:
    """Whether code outside of a module cuts its output up, or the module keeps numbers for several widths at once.

    Where it cuts is a number in the code or in an attribute, which a mixture of widths does not change.
    """
    path, _, leaf = placement.student.rpartition(".")
    owner = student.get_submodule(path)
    is_output = axis_role(owner, leaf, axis) in ("out", "embedding")
    return len(placement.axes[axis].segments) > 1 and (
        is_output or next(owner.buffers(recurse=False), None) is not None
    )


def _prefix(path: str) -> str:
    return f"{path}." if path else ""


def _widths(plan: Plan) -> dict[Growth, list[Spot]]:
    """The spots of each growth; what grows from a to b anywhere grows together unless it is told apart."""
    widths: dict[Growth, list[Spot]] = {}
    for name, placement in plan.placements.items():
        for spot, growth in _spots(name, placement):
            widths.setdefault(growth, []).append(spot)
    return widths


def _spots(name: str, placement: Placement) -> Iterator[tuple[Spot, Growth]]:
    for axis, found in enumerate(placement.axes):
        for index, segment in enumerate(found.segments):
            pairs = zip(segment.student, segment.ta, strict=True)
            growth = tuple(pair for pair in pairs if pair[0] != pair[1])
            if growth:
                yield (name, axis, index), growth


def _split(student: nn.Module, plan: Plan, widths: dict[Growth, list[Spot]]) -> Iterator[list[Spot]]:
    """Widths that are equal but follow one another in a stack of layers are told apart, unless a run has shown one."""
    for spots in widths.values():
        stack = _stack(student, spots)
        groups = [spots] if stack is None else list(_told_apart(student, stack))
        homes = {(spot[0], spot[1]): i for i, group in enumerate(groups) for spot in group}
        is_parted = any(len({homes[axis] for axis in each if axis in homes}) > 1 for each in plan.met)
        yield from [spots] if is_parted else groups


def _told_apart(student: nn.Module, stack: list[Spot]) -> Iterator[list[Spot]]:
    group: list[Spot] = []
    for spot in stack:
        if group and _role(student, spot) in ("out", "embedding") and any(_role(student, s) == "in" for s in group):
            yield group
            group = []
        group.append(spot)
    if group:
        yield group


def _stack(student: nn.Module, spots: list[Spot]) -> list[Spot] | None:
    """The spots in the order of the data, if all lie in one Sequential, the rest before or behind it.

    None where they do not, or where one module stands in two places, which have one width then.
    """
    parents = {spot[0].rpartition(".")[0].rpartition(".")[0] for spot in spots}
    sequential = [path for path in parents if isinstance(student.get_submodule(path), nn.Sequential)]
    paths = {spot[0].rpartition(".")[0] for spot in spots}
    if len(sequential) != 1 or len({id(student.get_submodule(path)) for path in paths}) < len(paths):
        return None
    inside = [spot for spot in spots if spot[0].rpartition(".")[0].rpartition(".")[0] == sequential[0]]
    outside = [spot for spot in spots if spot not in inside]
    if any(_role(student, spot) not in ("in", "out", "embedding", "along") for spot in spots):
        return None
    before = [spot for spot in outside if _role(student, spot) in ("out", "embedding", "along")]
    behind = [spot for spot in outside if _role(student, spot) == "in"]
    if before and behind:
        return None
    entries = list(student.get_submodule(sequential[0])._modules)  # by number or by name
    inside.sort(key=lambda spot: (entries.index(_entry(spot)), _role(student, spot) != "in"))
    return [*before, *inside, *behind]


def _entry(spot: Spot) -> str:
    return spot[0].rpartition(".")[0].rpartition(".")[2]


def _role(student: nn.Module, spot: Spot) -> str:
    """Which way a spot faces; biases and norms go along with the outputs they are added to."""
    path, _, leaf = spot[0].rpartition(".")
    owner = student.get_submodule(path)
    return "along" if getattr(owner, leaf).ndim == 1 else axis_role(owner, leaf, spot[1])


def _name(student: nn.Module, spots: list[Spot]) -> str:
    """The module that puts a width out."""
    outputs = [spot[0] for spot in spots if _role(student, spot) in ("out", "embedding")]
    return (outputs or [spots[0][0]])[0].rpartition(".")[0]


def _position(ta: nn.Module) -> Callable[[Unit], int]:
    order = {name: i for i, (name, _) in enumerate(ta.named_modules(remove_duplicate=False))}
    return lambda unit: order.get(unit.name, -1)
