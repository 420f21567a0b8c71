"""Channels: a number for every index of every axis of a module's parameters, and which of them are the same.

`matta.flow` has the idea; here is what it writes down.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

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
class Known:
    """The rows of tensors that are known so far, and `place`, the names of the modules that are running."""

    def __init__(self) -> None:
        self.channels = Channels()
        self.place: list[str] = []
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
