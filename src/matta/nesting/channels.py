"""Channels: a number for every index of every axis of a module's parameters, equal where the channels are.

`matta.nesting.operators` follows them from call to call. Here is what it writes down, and a call of an ATen operator
with its arguments by name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


@final
class Call:
    """One call of an operator, its arguments by name."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, shape: torch.Size) -> None:
        self.func, self.args, self.kwargs, self.out, self.shape = func, args, kwargs, out, shape
        self.name = name_of(func)
        schema = func._schema.arguments
        self.bound = {argument.name: argument.default_value for argument in schema}
        self.bound |= {argument.name: value for argument, value in zip(schema, args, strict=False)}
        self.bound |= kwargs

    def __getitem__(self, name: str) -> Any:
        return self.bound[name]

    @property
    def first(self) -> Tensor:
        """The first argument that is a tensor."""
        return next(leaf for leaf in tree_leaves(self.args) if isinstance(leaf, Tensor))

    @property
    def result(self) -> Tensor:
        """The first result."""
        return next(leaf for leaf in tree_leaves(self.out) if isinstance(leaf, Tensor))

    @property
    def tensors(self) -> list[Tensor]:
        """All arguments that are tensors."""
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]


def name_of(func: Any) -> str:
    """The name of an operator, without its library, its overload and what marks it as in place."""
    return str(func._schema.name.split("::")[1]).removesuffix("_")


Row = Tensor
"""Channels along one axis, one number for each index; 0 where none is known."""

Rows = dict[int, Row]
"""The rows of a tensor's axes, by axis; an axis of length 1, or an unknown one, has none."""

Place = tuple[str, int]
"""A module that is running, by name, and which of its calls it is."""

Moment = tuple[Place, str, int]
"""A step of a run: the module that runs, the operator, and how many times the call has come to it."""


@final
class Steps:
    """Counts each operator of a run by module and call, so that two runs of one class can be told the same step.

    Each is counted for itself: how many copies and views there are depends on types and sizes.
    """

    def __init__(self) -> None:
        self.place: list[Place] = [("", 0)]
        self._calls, self._steps = Counter[str](), Counter[tuple[Place, str]]()

    def enter(self, name: str) -> None:
        """A module begins to run."""
        self.place.append((name, self._calls[name]))
        self._calls[name] += 1

    def leave(self) -> Place:
        """It has run."""
        return self.place.pop()

    def next(self, operator: str) -> Moment:
        """The step that an operator is."""
        self._steps[self.place[-1], operator] += 1
        return self.place[-1], operator, self._steps[self.place[-1], operator]


@final
class Channels:
    """A union-find over channels, worked on a row at a time.

    Example:
        >>> channels = Channels()
        >>> a, b = channels.new(2), channels.new(2)
        >>> _ = channels.tie(a, b.flip(0))
        >>> (channels.classes(b) == a.flip(0)).all().item()
        True
    """

    def __init__(self) -> None:
        self._parent = torch.zeros(1, dtype=torch.long)
        self._is_input = torch.zeros(1, dtype=torch.bool)
        self._num_joined = 0
        self.problems: list[tuple[Row, str, str]] = []
        self.cuts: list[Row] = []
        self.units: list[tuple[Row, tuple[int, ...]]] = []  # rows with what they are split into, factors of 1 included
        self.products: list[tuple[Row, tuple[Row, ...]]] = []
        self._splits: dict[tuple[bytes, tuple[int, ...]], tuple[Row, ...]] = {}
        self._merges: dict[tuple[bytes, ...], Row] = {}
        self._factors: dict[bytes, list[tuple[Row, ...]]] = {}

    def __len__(self) -> int:
        """Number of channels, that of the unknown one included."""
        return len(self._parent)

    def new(self, size: int, *, is_input: bool = False) -> Row:
        """A row of `size` channels that were not there before."""
        row = torch.arange(len(self._parent), len(self._parent) + size)
        self._parent = torch.cat([self._parent, row])
        self._is_input = torch.cat([self._is_input, torch.full((size,), is_input)])
        return row

    def classes(self, row: Row) -> Row:
        """One number for each channel, the same for channels that are tied."""
        while True:
            above = self._parent[row]
            if torch.equal(above, row):
                return row
            self._parent[row] = self._parent[above]
            row = above

    def tie(self, first: Row, second: Row) -> Row:
        """Make the channels of two rows the same, index by index; the row of both.

        What repeats itself along all but one factor of a product is that factor. Where one row repeats each channel and
        the other repeats itself, both are factors: a gate for each field, over embeddings one after the other.
        """
        for whole, other in ((first, second), (second, first)):
            for factors in self._factors.get(_key(whole), ()):
                place = _only_varying(other.view([len(factor) for factor in factors]))
                if place is not None:
                    self.tie(factors[place[0]], place[1])
                    return whole
        for slow, fast in ((first, second), (second, first)):
            if (crossed := _crossed(slow, fast)) is not None:
                return self.merge(crossed)
        both = (first != 0) & (second != 0)
        one, other = first[both], second[both]
        while True:
            one, other = self.classes(one), self.classes(other)
            apart = one != other
            if not apart.any():
                return torch.where(first != 0, first, second)
            low, high = torch.minimum(one, other)[apart], torch.maximum(one, other)[apart]
            self._parent.scatter_reduce_(0, high, low, "amin")
            self._num_joined += 1

    def is_input(self, row: Row) -> bool:
        """Whether the row is an axis of a tensor that the module was called with."""
        return bool(self._is_input[row].any())

    def inputs(self) -> Row:
        """All channels of the axes of such tensors."""
        return self._is_input.nonzero().flatten()

    def blame(self, row: Row, problem: str, kind: str) -> None:
        """Leave a problem of a kind ("split", "picked", "reordered" or "lost") at the channels of a row."""
        self.problems.append((row[row != 0], problem, kind))

    def split(self, row: Row, sizes: tuple[int, ...]) -> tuple[Row, ...]:
        """The factors of a row that is a product of axes of these sizes."""
        key = _key(row), sizes
        if key not in self._splits:
            self._multiply(row, tuple(self.new(size) for size in sizes))
        return self._splits[key]

    def merge(self, factors: tuple[Row, ...]) -> Row:
        """The row that is the product of several, from the slowest to the fastest."""
        key = tuple(map(_key, factors))
        if key not in self._merges:
            self._multiply(self.new(prod(map(len, factors))), factors)
        return self._merges[key]

    def _multiply(self, whole: Row, factors: tuple[Row, ...]) -> None:
        self.products.append((whole, factors))
        self._factors.setdefault(_key(whole), []).append(factors)
        self._splits[_key(whole), tuple(map(len, factors))] = factors
        self._merges.setdefault(tuple(map(_key, factors)), whole)

    def product_rows(self) -> list[Row]:
        """All rows that are a product, and their factors."""
        return [row for whole, factors in self.products for row in (whole, *factors)]

    def close_products(self) -> None:
        """Tie the factors of products that are the same, however they are split."""
        changed = True
        while changed:
            changed = False
            alike: dict[bytes, list[tuple[Row, ...]]] = {}
            for whole, factors in list(self.products):
                alike.setdefault(_key(self.classes(whole)), []).append(factors)
            for first, *others in alike.values():
                for factors in others:
                    changed |= self._agree(first, factors)

    def _agree(self, one: tuple[Row, ...], other: tuple[Row, ...]) -> bool:
        """Tie the factors of one product, in the finest shape of which both are products; whether anything was new."""
        sizes = common_factors([len(row) for row in one], [len(row) for row in other])
        before = len(self.products), self._num_joined
        atoms = [self._atoms(factors, sizes or ()) for factors in (one, other)]
        for first, second in zip(*atoms, strict=True):
            self.tie(first, second)  # of what repeats itself along a product, one factor alone
        return before != (len(self.products), self._num_joined)

    def _atoms(self, factors: tuple[Row, ...], sizes: tuple[int, ...]) -> list[Row]:
        """The factors, split where they are products of several of the sizes."""
        found, rest = list[Row](), list(sizes)
        for factor in factors if sizes else ():
            own = [rest.pop(0)]
            while prod(own) < len(factor):
                own.append(rest.pop(0))
            found += self.split(factor, tuple(own)) if len(own) > 1 else (factor,)
        return found


def _crossed(slow: Row, fast: Row) -> tuple[Row, Row] | None:
    """The two factors, if one row repeats each of its channels and the other, as a whole, repeats itself as often."""
    changes = (slow != slow[:1]).nonzero()
    run = int(changes[0]) if len(changes) else 1
    if run == 1 or len(slow) % run or not bool(((slow != 0) & (fast != 0)).all()):
        return None
    outer, inner = slow[::run], fast[:run]
    is_so = torch.equal(outer.repeat_interleave(run), slow) and torch.equal(inner.repeat(len(outer)), fast)
    are_distinct = is_so and len(outer.unique()) == len(outer) and len(inner.unique()) == len(inner)
    return (outer, inner) if are_distinct else None


def common_factors(before: Sequence[int], after: Sequence[int]) -> tuple[int, ...] | None:
    """The coarsest shape of which both are products of neighbours; None if there is none.

    Example:
        >>> common_factors((2, 6), (4, 3)), common_factors((2, 3), (3, 2))
        ((2, 2, 3), None)
    """
    ends = sorted({prod(shape[:i]) for shape in (before, after) for i in range(len(shape) + 1)})
    if not ends[0] or any(high % low for low, high in pairwise(ends)):
        return None
    return tuple(high // low for low, high in pairwise(ends))


def _key(row: Row) -> bytes:
    return row.numpy().tobytes()


def _only_varying(grid: Tensor) -> tuple[int, Row] | None:
    """The one axis along which different known channels lie, and the row along it; None if there is no single one."""
    if not bool((grid != 0).all()):
        return None
    for axis in range(grid.ndim):
        line = grid.movedim(axis, -1).reshape(-1, grid.shape[axis])
        if grid.shape[axis] < grid.numel() and torch.equal(line, line[:1].expand_as(line)):
            return axis, line[0]
    return None


@final
@dataclass(frozen=True)
class Noted:
    """One step of a run: the rows of each tensor that it took and that it made."""

    taken: tuple[Rows, ...]
    made: tuple[Rows, ...]


@final
class Known:
    """The rows of tensors that are known so far; `steps`, where the run is; `read`, what operators got.

    `summed` are rows of weights that a product with data has summed over: the inputs of a layer. `noted` are the rows
    of what some steps took and made, `shaped` those that code of a module has cut or split, by the module's name.
    """

    def __init__(self) -> None:
        self.channels = Channels()
        self.steps = Steps()
        self.noted: dict[Moment, Noted] = {}
        self.shaped: list[tuple[str, Row]] = []
        self.read: set[int] = set()
        self.summed: list[Row] = []
        self._rows: Any = WeakTensorKeyDictionary()
        self._weights: Any = WeakTensorKeyDictionary()

    def rows(self, tensor: object) -> Rows:
        """The rows known of a tensor."""
        return self._rows.get(tensor, {}) if isinstance(tensor, Tensor) else {}

    def put(self, tensor: Tensor, rows: Rows) -> None:
        """Take note of the rows of a tensor."""
        kept = {axis: row for axis, row in rows.items() if bool((row != 0).any())}
        assert all(tensor.shape[axis] == len(row) for axis, row in kept.items())
        self._rows[tensor] = kept

    def label(self, tensor: Tensor, *, is_input: bool = False, start: int = 0) -> Rows:
        """Give the axes of `tensor` from `start` on channels of their own, perhaps marked as those of an input."""
        axes = [axis for axis in range(start, tensor.ndim) if tensor.shape[axis] > 1]
        rows = {axis: self.channels.new(tensor.shape[axis], is_input=is_input) for axis in axes}
        self.put(tensor, rows)
        return self.rows(tensor)

    def mark_weights(self, tensors: Iterable[Tensor]) -> None:
        """Note that tensors are weights, or made of weights alone."""
        for tensor in tensors:
            self._weights[tensor] = True

    def is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is made of weights alone, so that a product with it sums over inputs of a layer."""
        return tensor in self._weights

    def sum_over(self, *operands: tuple[Tensor, int]) -> None:
        """Note the axis that a product of data with a weight sums over; of two weights, that of the first."""
        tensor, axis = next((each for each in operands if self.is_weight(each[0])), (None, 0))
        if axis in self.rows(tensor):
            self.summed.append(self.rows(tensor)[axis])

    def broadcast(self, tensors: Iterable[Tensor], out: Tensor) -> Rows:
        """The rows of an element-by-element result; axes align at the right, those of length 1 stretch."""
        found = []
        for tensor in tensors:
            offset = out.ndim - tensor.ndim
            rows = self.rows(tensor).items()
            found += [(axis + offset, row) for axis, row in rows if len(row) == out.shape[axis + offset]]
        return self.tie_all(found)

    def tie_all(self, found: Iterable[tuple[int, Row]]) -> Rows:
        """The rows of one tensor from those of several; what falls on the same axis is tied."""
        rows: Rows = {}
        for axis, row in found:
            rows[axis] = self.channels.tie(rows[axis], row) if axis in rows else row
        return rows

    def blame(self, rows: Iterable[Row], problem: str, kind: str = "lost") -> None:
        """Leave a problem, with the place where it arose, at rows of channels; those of inputs do not grow."""
        name = self.steps.place[-1][0]
        place = f" in {name!r}" if name else ""
        for row in rows:
            if not self.channels.is_input(row):
                self.channels.blame(row, f"{problem}{place}", kind)

    def lose(self, size: int, problem: str) -> Row:
        """A row in place of one that cannot be followed: what it meets has the problem as well."""
        row = self.channels.new(size)
        self.blame([row], problem)
        return row

    def lose_all(self, tensors: Iterable[Tensor], out: Any, problem: str) -> None:
        """Lose sight of all channels in an operator: of what it took and made; of inputs and ranges alone nothing."""
        rows = [row for tensor in tensors for row in self.rows(tensor).values()]
        if all(map(self.channels.is_input, rows)):
            return
        self.blame(rows, problem)
        for made in (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)):
            self.put(made, {axis: self.lose(size, problem) for axis, size in enumerate(made.shape)})
