"""Events from a Python iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, final

import numpy as np
import pyarrow as pa

from matta.errors import RunError
from matta.streams.chunks import Bad, Chunk, Place, column_of_cells, table_of
from matta.streams.schema import Schema

NAME = "rows"


@final
class Rows:
    """Events that Python code makes: mappings, each an event, or whole columns at once.

    Args:
        events: An iterable of mappings, or of column batches (mappings of sequences, or Arrow tables and record
            batches). A resumed run skips what was read before, so it must begin where it once began. Or a
            function that gives such an iterable from the row whose number it is called with, as a log with
            offsets can.
        columns: Whether mappings are of columns.
        num_rows: How many rows are made into columns at a time.

    Example:
        >>> events = Rows([{"x": 1, "late": 0}, {"x": 2, "late": 1}])
    """

    def __init__(
        self,
        events: Iterable[Any] | Callable[[int], Iterable[Any]],
        *,
        columns: bool = False,
        num_rows: int = 256,
    ) -> None:
        self._events, self._columns, self._num_rows = events, columns, num_rows
        self._names: tuple[str, ...] = ()
        self._texts: frozenset[str] = frozenset()
        self._next, self._skip = 0, 0
        self._iterator: Iterator[Any] = iter(())

    def begin(self, schema: Schema, places: dict[str, Place]) -> None:
        """Get ready to read the columns of a schema, from the places given on."""
        self._names, self._texts = schema.names, frozenset(schema.categorical)
        start = places.get(NAME, (0, 0, 0))[2]
        if callable(self._events):
            self._iterator, self._next, self._skip = iter(self._events(start)), start, 0
        else:
            self._iterator, self._next, self._skip = iter(self._events), 0, start

    def next_chunk(self) -> Chunk | None:
        """The next rows; None: the iterator has ended."""
        while (chunk := self._column_batch() if self._columns else self._row_batch()) is not None:
            if chunk.end[1] > self._skip:
                return chunk
        return None

    def _row_batch(self) -> Chunk | None:
        if (left := self._skip - self._next) > 0:
            self._next += sum(1 for _ in islice(self._iterator, left))
            self._skip = self._next
        rows = list(islice(self._iterator, self._num_rows))
        if not rows:
            return None
        start, self._next = self._next, self._next + len(rows)
        bad = [
            Bad(file=NAME, row=start + index, reason=f"received a {type(row).__name__}; expected a mapping", raw=row)
            for index, row in enumerate(rows)
            if not isinstance(row, Mapping)
        ]
        good = [(start + index, dict(row)) for index, row in enumerate(rows) if isinstance(row, Mapping)]
        return self._chunk(good, start, bad)

    def _chunk(self, rows: list[tuple[int, dict[str, Any]]], start: int, bad: list[Bad]) -> Chunk:
        table, wrong = table_of([row for _, row in rows], self._names, self._texts)
        bad += [Bad(file=NAME, row=rows[i][0], reason=reason, raw=rows[i][1]) for i, reason in wrong.items()]
        keep = np.array([index for index in range(len(rows)) if index not in wrong], np.int64)
        return Chunk(
            file=NAME,
            table=table.take(pa.array(keep)),
            rows=np.array([number for number, _ in rows], np.int64)[keep],
            start=(0, start, start),
            end=(0, self._next, self._next),
            bad=sorted(bad, key=lambda each: each.row or 0),
            raw=lambda index: rows[keep[index]][1],
        )

    def _column_batch(self) -> Chunk | None:
        given = next(self._iterator, None)
        if given is None:
            return None
        table, wrong = self._table(given)
        start, self._next = self._next, self._next + table.num_rows
        numbers = np.arange(start, self._next)
        seen = int(np.searchsorted(numbers, self._skip))
        keep = np.array([index for index in range(seen, len(numbers)) if index not in wrong], np.int64)
        return Chunk(
            file=NAME,
            table=table.take(pa.array(keep)) if wrong else table.slice(seen),
            rows=numbers[keep] if wrong else numbers[seen:],
            start=(0, start, start + seen),
            end=(0, self._next, self._next),
            bad=[
                Bad(
                    file=NAME, row=start + index, reason=reason, raw={name: each[index] for name, each in given.items()}
                )
                for index, reason in sorted(wrong.items())
                if index >= seen
            ],
        )

    def _table(self, given: Any) -> tuple[pa.Table, dict[int, str]]:
        """The columns that are read, and what is wrong with some rows."""
        wrong: dict[int, str] = {}
        if isinstance(given, pa.RecordBatch):
            given = pa.table(given)
        elif isinstance(given, Mapping):
            given, wrong = self._table_of_columns({name: given[name] for name in self._names if name in given})
        if not isinstance(given, pa.Table):
            raise RunError(f"received {type(given).__name__}; expected a mapping of columns or an Arrow table")
        return given.select([name for name in self._names if name in given.column_names]), wrong

    def _table_of_columns(self, columns: dict[str, Any]) -> tuple[pa.Table, dict[int, str]]:
        lengths = sorted({len(each) for each in columns.values()})
        if len(lengths) != 1:
            raise RunError(f"received columns of lengths {lengths}; expected columns of one length")
        wrong: dict[int, str] = {}
        table = {}
        for name, each in columns.items():
            typed = _typed(each)
            if typed is None:
                typed = column_of_cells(name, list(each), wrong, is_text=name in self._texts)
            table[name] = typed
        return pa.table(table), wrong


def _typed(column: Any) -> pa.Array | None:
    """A column whose cells are of one type, as NumPy, pandas and Arrow have them; None: who knows."""
    if isinstance(column, list | tuple) or getattr(column, "dtype", None) == np.dtype(object):
        return None
    try:
        return pa.array(column, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return None
