"""Channels: a number for every index of every axis of a module's parameters, equal where the channels are.

`matta.nesting.operators` follows them from call to call. Here is what it writes down, a call of an ATen operator with
its arguments by name, and how rows of channels go through an operator that only moves data.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
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
        self.problems: list[tuple[Row, str]] = []
        self.cuts: list[Row] = []

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
        """Make the channels of two rows the same, index by index; the row of both."""
        both = (first != 0) & (second != 0)
        one, other = first[both], second[both]
        while True:
            one, other = self.classes(one), self.classes(other)
            apart = one != other
            if not apart.any():
                return torch.where(first != 0, first, second)
            low, high = torch.minimum(one, other)[apart], torch.maximum(one, other)[apart]
            self._parent.scatter_reduce_(0, high, low, "amin")

    def is_input(self, row: Row) -> bool:
        """Whether the row is an axis of a tensor that the module was called with."""
        return bool(self._is_input[row].any())

    def inputs(self) -> Row:
        """All channels of the axes of such tensors."""
        return self._is_input.nonzero().flatten()

    def blame(self, row: Row, problem: str) -> None:
        """Leave a problem at the channels of a row."""
        self.problems.append((row[row != 0], problem))


@final
@dataclass(frozen=True)
class Product:
    """An axis that is a product, such as heads times head_dim.

    Legend: `whole` are its channels; `factors` those of each factor at the same indices, from the slowest on.
    """

    whole: Row
    factors: tuple[Row, ...]


@final
class Known:
    """The rows of tensors that are known so far, and `place`, the names of the modules that are running.

    With `keep_products`, an axis that is split into several, or merged from several, is noted in `products`; without
    it a problem is left there.
    """

    def __init__(self, *, keep_products: bool = False) -> None:
        self.channels = Channels()
        self.place: list[str] = []
        self.keep_products = keep_products
        self.products: list[Product] = []
        self._rows: Any = WeakTensorKeyDictionary()

    def rows(self, tensor: object) -> Rows:
        """The rows known of a tensor."""
        return self._rows.get(tensor, {}) if isinstance(tensor, Tensor) else {}

    def put(self, tensor: Tensor, rows: Rows) -> None:
        """Take note of the rows of a tensor."""
        kept = {axis: row for axis, row in rows.items() if len(row) > 1 and bool((row != 0).any())}
        assert all(tensor.shape[axis] == len(row) for axis, row in kept.items())
        self._rows[tensor] = kept

    def label(self, tensor: Tensor, *, is_input: bool = False) -> Rows:
        """Give the axes of `tensor` channels of their own; of an input, all but the batch axis."""
        axes = range(1 if is_input else 0, tensor.ndim)
        rows = {axis: self.channels.new(tensor.shape[axis], is_input=is_input) for axis in axes}
        self.put(tensor, rows)
        return self.rows(tensor)

    def tie_all(self, found: Iterable[tuple[int, Row]]) -> Rows:
        """The rows of one tensor from those of several; what falls on the same axis is tied."""
        rows: Rows = {}
        for axis, row in found:
            rows[axis] = self.channels.tie(rows[axis], row) if axis in rows else row
        return rows

    def blame(self, rows: Iterable[Row], problem: str) -> None:
        """Leave a problem, with the place where it arose, at rows of channels."""
        place = f" in {self.place[-1]!r}" if self.place and self.place[-1] else ""
        for row in rows:
            self.channels.blame(row, f"{problem}{place}")

    def lose(self, size: int, problem: str) -> Row:
        """A row in place of one that cannot be followed: what it meets has the problem as well."""
        row = self.channels.new(size)
        self.blame([row], problem)
        return row

    def split(self, row: Row, shown: Tensor, axes: Sequence[int], problem: str) -> Rows:
        """The rows of the axes that one row was split into; `shown` has its channels where they are now."""
        if not self.keep_products:
            self.blame([row], problem)
            return {axis: self.lose(shown.shape[axis], problem) for axis in axes}
        is_input = self.channels.is_input(row)
        rows = {axis: self.channels.new(shown.shape[axis], is_input=is_input) for axis in axes}
        along = {axis: [-1 if i == axis else 1 for i in range(shown.ndim)] for axis in axes}
        factors = [part.view(along[axis]).expand(shown.shape).flatten() for axis, part in rows.items()]
        self.products.append(Product(shown.flatten(), tuple(factors)))
        return rows

    def merge(self, rows: list[Row], problem: str) -> Row:
        """The row of an axis that several were merged into, given as they lie on it."""
        if not self.keep_products or len(rows) == 1:
            self.blame(rows[:-1], problem)
            return rows[-1]
        merged = self.channels.new(len(rows[0]))
        self.products.append(Product(merged, tuple(rows)))
        return merged


def move(known: Known, call: Call) -> None:
    """Views, slices, transposes and lookups: each row is moved by the operator itself."""
    source = call.first
    results = [leaf for leaf in tree_leaves(call.out) if isinstance(leaf, Tensor)]
    landed: list[dict[int, list[tuple[int, Row]]]] = [{} for _ in results]
    for axis, row in known.rows(source).items():
        shape = [1] * len(call.shape)
        shape[axis] = len(row)
        shadow = row.view(shape).expand(call.shape)
        for slot, moved in zip(landed, tree_leaves(_again(call, shadow)), strict=True):
            _land(known, call, slot, axis, row, moved)
    for out, slot in zip(results, landed, strict=True):
        known.put(out, {axis: _innermost(known, call, rows) for axis, rows in slot.items()})


def _again(call: Call, shadow: Tensor) -> Any:
    """The operator once more, on channels in place of data."""
    if call.name in ("view", "_unsafe_view", "reshape"):
        return shadow.reshape(call["size"])
    if call.name == "constant_pad_nd":
        return call.func(shadow, call["pad"], 0)
    rest, named = tree_map(_to_cpu, (call.args[1:], call.kwargs))
    return call.func(shadow, *rest, **named)


def _to_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, Tensor) else value


def _land(known: Known, call: Call, slot: dict[int, list[tuple[int, Row]]], axis: int, row: Row, moved: Tensor) -> None:
    """Find the axis that a row has come to lie on."""
    for i, stride in enumerate(moved.stride()):
        moved = moved.narrow(i, 0, 1) if stride == 0 and moved.shape[i] > 1 else moved
    if not moved.numel():
        return  # nothing was there to be followed
    varying = [i for i in range(moved.ndim) if moved.shape[i] > 1 and _varies(moved, i)]
    if len(varying) == 1:
        others = [i for i in range(moved.ndim) if i != varying[0]]
        found = moved.amax(others) if others else moved
        if not torch.equal(found, row):
            known.channels.cuts.append(found)
        slot.setdefault(varying[0], []).append((axis, found))
    elif len(varying) > 1:
        sizes = " x ".join(str(moved.shape[i]) for i in varying)
        problem = f"{call.name!r} splits {len(row)} of them into {sizes}"
        for i, part in known.split(row, moved, varying, problem).items():
            slot.setdefault(i, []).append((axis, part))
    elif bool((moved != 0).any()):
        known.blame([row], f"{call.name!r} picks one of {len(row)} of them by its index")


def _varies(moved: Tensor, axis: int) -> bool:
    """Whether different channels lie along an axis; padding (0) is none."""
    return bool(((moved != moved.amax(axis, keepdim=True)) & (moved != 0)).any())


def _innermost(known: Known, call: Call, rows: list[tuple[int, Row]]) -> Row:
    """Where axes merge into one, its row is that of the innermost; the others cannot grow."""
    own = [row for _, row in sorted(rows) if not known.channels.is_input(row[row != 0])]
    if not own:
        return rows[-1][1]
    return known.merge(own, f"{call.name!r} merges their axis with another")
