"""Groups of axes that must be permuted together, so that a module's channels can be put in another order.

A group is a dimension of the trace (`matta.nesting.tracing`): the channels that meet in residual adds, norms, tied and
fused projections. An axis that is a product (heads times head_dim) has the channels of its factors, each several times.
A dimension that an input, an output or an operator fixes is left alone, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from matta.nesting.batches import Batch
from matta.nesting.copying import attribute_tensors
from matta.nesting.dimensions import Dimension, Part, Trace
from matta.nesting.tracing import trace

AxisKey = tuple[str, int]
"""The name of a parameter or buffer, and one of its axes."""


@final
@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that change places together.

    Legend: `members` gives, for each axis that has them, the indices of each channel, as (size, times); `seen` where
    activations show them: a module that sums over them, which of the tensors it receives and the axis of it, with
    indices alike.
    """

    size: int
    members: Mapping[AxisKey, Tensor]
    seen: tuple[tuple[str, int, int, Tensor], ...] = ()

    def index(self, key: AxisKey, length: int, order: Tensor) -> Tensor:
        """What picks the channels of an axis in a new order: `order` gives the old channel of each place."""
        index, positions = torch.arange(length), self.members[key]
        index[positions.flatten()] = positions[order].flatten()
        return index

    @property
    def name(self) -> str:
        """The first axis that has the channels."""
        first, axis = next(iter(self.members))
        return f"{first} (axis {axis})"


@final
@dataclass(frozen=True, kw_only=True)
class Left:
    """Channels that keep their places, the axes that have them, and why."""

    size: int
    members: tuple[AxisKey, ...]
    reason: str

    @property
    def name(self) -> str:
        """The first axis that has the channels."""
        return f"{self.members[0][0]} (axis {self.members[0][1]})"


def find_groups(module: nn.Module, example: Batch) -> tuple[list[Group], list[Left]]:
    """The groups of a module by one run of a copy of it, and what is left where it is.

    Groups are what the run shows; that the function stays the same is for the caller to check.

    Raises:
        TracingError: the module fails on the example, or cannot be copied.

    Example:
        >>> mlp = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [group], left = find_groups(mlp, (torch.zeros(5, 3), None))
        >>> list(group.members), [each.reason for each in left]
        ([('0.weight', 0), ('0.bias', 0), ('2.weight', 1)], ['the module takes them in', 'they are in its output'])
    """
    found = trace(module, example)
    numbers = _Numbers(found.dimensions)
    members = _members(found, numbers)
    reasons = _reasons(found, numbers, module)
    seen = _seen(found, numbers)
    groups: list[Group] = []
    left: list[Left] = []
    for dimension, own in members.items():
        size = found.dimensions[dimension].size
        positions = {key: each for key, each in own.items() if each is not None}
        reason = reasons.get(dimension)
        if reason is None and len(positions) < len(own):
            reason = _TWICE
        if reason is None and len(own) < 2:
            reason = _APART
        if reason is None and size < 2:
            reason = _ALONE
        reason = reason or _unread(own, found, module)
        if reason is None:
            groups.append(Group(size=size, members=positions, seen=tuple(seen.get(dimension, ()))))
        else:
            left.append(Left(size=size, members=tuple(own), reason=reason))
    return groups, left


# --- axes that are products ------------------------------------------------------------------------


@final
class _Numbers:
    """A number for each channel of each dimension, from 1; a product has those of its factors in place of its own."""

    def __init__(self, dimensions: Sequence[Dimension]) -> None:
        self._dimensions = dimensions
        sizes = torch.tensor([1, *(dimension.size for dimension in dimensions)])
        self._firsts = sizes.cumsum(0)
        self._owners = torch.arange(-1, len(dimensions)).repeat_interleave(sizes)

    def levels(self, parts: Sequence[Part]) -> list[Tensor]:
        """A number for each index of an axis; as many such rows as the finest product on it has factors, 0 for none."""
        stretches = [self._of(part) for part in parts]
        most = max(map(len, stretches), default=0)
        for own in stretches:
            own += [torch.zeros_like(own[0])] * (most - len(own))
        return [torch.cat(rows) for rows in zip(*stretches, strict=True)]

    def _of(self, part: Part) -> list[Tensor]:
        factors = [self.levels(factor) for factor in self._dimensions[part.dimension].factors]
        shape = [len(levels[0]) for levels in factors]
        rows = [_along(row, axis, shape) for axis, levels in enumerate(factors) for row in levels]
        rows = rows or [self._firsts[part.dimension] + torch.arange(part.size)]
        return [row.repeat_interleave(part.repeat) for row in rows]

    def positions(self, parts: Sequence[Part]) -> Iterator[tuple[int, Tensor]]:
        """The dimensions on an axis, with the indices of each of their channels as (size, times)."""
        for row in self.levels(parts):
            owners = self._owners[row]
            for dimension in owners[row != 0].unique().tolist():
                indices = (owners == dimension).nonzero().flatten()
                size = self._dimensions[dimension].size
                yield dimension, indices[row[indices].argsort(stable=True)].view(size, -1)

    def dimensions(self, parts: Sequence[Part]) -> set[int]:
        """The dimensions on an axis."""
        return {dimension for dimension, _ in self.positions(parts)}


def _along(row: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """A row along one axis of a shape, flattened."""
    return row.view([-1 if i == axis else 1 for i in range(len(shape))]).expand(*shape).flatten()


# --- groups ----------------------------------------------------------------------------------------


def _members(found: Trace, numbers: _Numbers) -> dict[int, dict[AxisKey, Tensor | None]]:
    """By dimension its indices on every axis that has it; None where an axis has it in two ways."""
    members: dict[int, dict[AxisKey, Tensor | None]] = {}
    for key, parts in found.axes.items():
        for dimension, positions in numbers.positions(parts):
            own = members.setdefault(dimension, {})
            own[key] = None if key in own else positions
    return members


def _seen(found: Trace, numbers: _Numbers) -> dict[int, list[tuple[str, int, int, Tensor]]]:
    """By dimension the modules that receive it and sum over it with a parameter of their own."""
    summed: dict[str, set[int]] = {}
    for name, axis in found.summed:
        summed.setdefault(name.rpartition(".")[0], set()).update(numbers.dimensions(found.axes[name, axis]))
    seen: dict[int, list[tuple[str, int, int, Tensor]]] = {}
    for (module, argument, axis), parts in found.inputs.items():
        for dimension, positions in numbers.positions(parts) if module in summed else ():
            if dimension in summed[module]:
                seen.setdefault(dimension, []).append((module, argument, axis, positions))
    return seen


_INSIDE: Final = "they are the channels inside of heads, whose order an encoding of positions may fix"
_APART: Final = "no other axis of a parameter has them"
_ALONE: Final = "it is a single channel"
_TWICE: Final = "one axis is a product of them with themselves"
_MANY: Final = "they are a product in more ways than one"


def _reasons(found: Trace, numbers: _Numbers, module: nn.Module) -> dict[int, str]:
    """Dimensions that stay in place, and why; the first reason counts, and that of a product is its factors' too."""
    each = list(enumerate(found.dimensions))
    fixed = _fixed_buffers(module)
    told = [(i, "the module takes them in") for i, dimension in each if dimension.is_input]
    told += [(i, "they are in its output") for i, dimension in each if dimension.is_output]
    told += [(i, dimension.problem or _MANY) for i, dimension in each if dimension.is_lost or dimension.is_picked]
    told += [
        (i, f"the buffer {name} has them") for i, dimension in each for name, _ in dimension.members if name in fixed
    ]
    told += [(part.dimension, _INSIDE) for _, dimension in each for part in (dimension.factors or ((),))[-1]]
    reasons: dict[int, str] = {}
    for whole, reason in told:
        for dimension in numbers.dimensions([Part(dimension=whole, size=found.dimensions[whole].size)]):
            reasons.setdefault(dimension, reason)
    return reasons


def _fixed_buffers(module: nn.Module) -> set[str]:
    """Buffers, and tensors among the attributes, that are no statistics of a norm."""
    statistics = {
        f"{path}.{name}" if path else name
        for path, part in module.named_modules()
        if isinstance(part, _NormBase)
        for name, _ in part.named_buffers(recurse=False)
    }
    return {name for name, _ in chain(module.named_buffers(), attribute_tensors(module))} - statistics


def _unread(members: Mapping[AxisKey, Tensor | None], found: Trace, module: nn.Module) -> str | None:
    """Why channels must stay for the sake of a parameter that the run did not come to."""
    lengths = {sum(part.size * part.repeat for part in found.axes[key]) for key in members}
    for name, parameter in module.named_parameters():
        if name in found.unread and lengths & {size for size in parameter.shape if size > 1}:
            return f"{name} may have them too, but took no part in the run; pass an example that reaches it"
    return None
