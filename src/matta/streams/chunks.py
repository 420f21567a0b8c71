"""What a source hands to a stream: rows as columns, where they came from, and the file of those set aside."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from math import isfinite
from pathlib import Path
from types import NoneType
from typing import IO, Any, Final, Protocol, final
from uuid import UUID

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from matta.errors import RunError
from matta.streams.schema import Schema

Place = tuple[int, int, int]
"""Where reading continues in a file: an offset, the number of the row there, and the first row not yet trained on.

For formats without offsets the first is 0, and 1 when the file is done. A file that was set aside has `REFUSED`
or `RETRIED` as its offset, and its size then.
"""
REFUSED: Final = -1
RETRIED: Final = -2
_NUMBERS: Final = {int, float, np.int32, np.int64, np.float32, np.float64}
_SINGLE: Final = (
    NoneType,
    str,
    bytes,
    int,
    float,
    Decimal,
    date,
    time,
    timedelta,
    np.datetime64,
    np.timedelta64,
    Enum,
    UUID,
)


@final
@dataclass(frozen=True, kw_only=True)
class Bad:
    """A row, or a whole file (`row` is None), that was set aside, and why. Rows count from 0.

    Example:
        >>> Bad(file="2013-01-01.csv", row=7, reason="late: is missing")
        Bad(file='2013-01-01.csv', row=7, reason='late: is missing', raw=None)
    """

    file: str
    row: int | None
    reason: str
    raw: Any = None


@final
@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Rows of a file as columns, not yet checked.

    `rows` are their numbers in the file, and `bad` those that could not even be parsed; `start` and `end`
    are the places before and after the chunk. `raw` gives a row of the table as it was read.

    Example:
        >>> from matta.streams import Numeric, Rows, Schema
        >>> rows = Rows([{"x": 1, "late": 0}, {"x": 2, "late": 1}])
        >>> rows.begin(Schema(columns={"x": Numeric()}, label="late"), places={})
        >>> chunk = rows.next_chunk()
        >>> chunk.rows.tolist(), chunk.raw_row(1)
        ([0, 1], {'x': 2, 'late': 1})
    """

    file: str
    table: pa.Table
    rows: NDArray[np.int64]
    start: Place
    end: Place
    bad: list[Bad] = field(default_factory=list)
    raw: Callable[[int], Any] | None = None

    def raw_row(self, index: int) -> Any:
        """A row as it was read."""
        return self.table.slice(index, 1).to_pylist()[0] if self.raw is None else self.raw(index)


class Source(Protocol):
    """Where a stream has its events from."""

    def begin(self, schema: Schema, places: dict[str, Place]) -> None:
        """Get ready to read the columns of a schema, from the places given on."""

    def next_chunk(self) -> Chunk | None:
        """The next rows, waiting for them if need be; None: there will be no more."""


def refused(file: str, reason: str, *, size: int, retry: bool = False) -> Chunk:
    """A chunk without rows: the whole file is set aside; with `retry` only until its size changes."""
    place = (RETRIED if retry else REFUSED, size, 0)
    bad = [Bad(file=file, row=None, reason=reason)]
    return Chunk(file=file, table=pa.table({}), rows=np.zeros(0, np.int64), start=place, end=place, bad=bad)


def table_of(
    rows: list[dict[str, Any]], names: tuple[str, ...], texts: frozenset[str]
) -> tuple[pa.Table, dict[int, str]]:
    """Rows as columns, and what is wrong with some of them.

    Cells of mixed types become text, and those of the columns `texts`, categories, do so one by one: what a cell is
    must not depend on those beside it. NaN and what pandas has for a missing value are missing.
    """
    reasons: dict[int, str] = {}
    columns = {
        name: column_of_cells(name, [row.get(name) for row in rows], reasons, is_text=name in texts) for name in names
    }
    return pa.table(columns), reasons


def column_of_cells(name: str, cells: list[Any], reasons: dict[int, str], *, is_text: bool) -> pa.Array:
    """A column of a table; `reasons` learns which rows have a cell that is none."""
    kinds = {type(cell) for cell in cells} - {NoneType}
    if len(kinds) <= 1 or kinds <= _NUMBERS:  # of others Arrow makes one kind: of a date and 3 two dates
        try:
            found = pa.array(cells, from_pandas=True)
            if not (pa.types.is_nested(found.type) or (is_text and _may_be_told_otherwise(found.type))):
                return found
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            pass
    told: list[bytes | None] = []
    for index, cell in enumerate(cells):
        try:
            told.append(text_of(cell, is_category=is_text))
        except ValueError as error:
            told.append(None)
            reasons.setdefault(index, f"{name}: {error}")
    return pa.array(told, pa.binary())


def _may_be_told_otherwise(kind: pa.DataType) -> bool:
    return not (pa.types.is_string(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind))


def text_of(cell: Any, *, is_category: bool) -> bytes | None:
    """A cell as text, 7 and 7.0 alike; None if it is missing.

    Raises:
        ValueError: it is not one value, or no category: a fraction.
    """
    cell = _single(cell)
    if cell is None or isinstance(cell, bytes):
        return cell
    if isinstance(cell, str):
        return cell.encode("utf-8", "surrogatepass")
    if isinstance(cell, bool):
        return str(cell).lower().encode()
    if isinstance(cell, float | Decimal):
        if cell != cell:
            return None
        if isfinite(cell) and cell == int(cell):
            cell = int(cell)
        elif is_category:
            raise ValueError(f"received {cell}; expected text in UTF-8 or a whole number")
    return str(cell).encode("utf-8", "surrogatepass")


def _single(cell: Any) -> Any:
    """The value of a cell, out of NumPy's and torch's wrappings; None for what pandas has in the place of a value.

    Raises:
        ValueError: it is not one value.
    """
    given = type(cell).__name__
    if given in ("NAType", "NaTType"):
        return None
    if not isinstance(cell, np.datetime64 | np.timedelta64) and callable(getattr(cell, "item", None)):
        try:
            cell = cell.item()
        except (ValueError, RuntimeError, TypeError):
            raise ValueError(f"received a {given}; expected one value") from None
    if not isinstance(cell, _SINGLE):
        raise ValueError(f"received a {given}; expected one value")
    return cell


@final
class Quarantine:
    """The file of rows and files set aside, one JSON object a line, each once, also when a run is killed and resumed.

    A resumed run cuts off what was written after its checkpoint: the stream will come to it again. One
    that begins afresh moves an earlier file out of the way.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.num_rows, self.num_files, self._length = 0, 0, 0
        self._file: IO[bytes] | None = None
        self.first: Bad | None = None
        """What was set aside first, since this object was made."""

    def add(self, bad: Bad) -> None:
        """Set a row or file aside."""
        self.first = self.first or bad
        line = {"file": bad.file, "row": bad.row, "reason": bad.reason, "raw": _plain(bad.raw)}
        self._opened().write(json.dumps(line).encode() + b"\n")
        if bad.row is None:
            self.num_files += 1
        else:
            self.num_rows += 1

    def state_dict(self) -> dict[str, int]:
        """What is on disk, after it has been put there."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._length = self._file.tell()
        return {"length": self._length, "num_rows": self.num_rows, "num_files": self.num_files}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state.

        Raises:
            RunError: the file has lost lines since then.
        """
        self.close()
        self.num_rows, self.num_files, self._length = state["num_rows"], state["num_files"], state["length"]
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._length:
            raise RunError(
                f"{self.path} has {size} bytes, and {self._length} when the run was saved; expected the file that the "
                f"run wrote: put it back"
            )

    def close(self) -> None:
        """Put everything on disk."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def begin(self) -> None:
        """Bring the file to the state."""
        if not self._length:
            self._rotate()
        elif self.path.stat().st_size > self._length:
            os.truncate(self.path, self._length)

    def _rotate(self) -> None:
        if not self.path.exists() or not self.path.stat().st_size:
            return
        number = 1
        while (moved := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(moved)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        return self._file


def _plain(value: Any) -> Any:
    """A value in JSON types; what has none is text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    is_json = value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and isfinite(value))
    return value if is_json else str(value)
