"""Events from a Python iterator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, final

import numpy as np
import pyarrow as pa

from matta.errors import RunError
from matta.streams.chunks import Bad, Chunk, Place, table_of
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
        self._next, self._skip = 0, 0
        self._iterator: Iterator[Any] = iter(())

    def begin(self, schema: Schema, places: dict[str, Place]) -> None:
        """Get ready to read the columns of a schema, from the places given on."""
        self._names = schema.names
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
        table, wrong = table_of([row for _, row in rows], self._names)
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
        table = self._table(given)
        start, self._next = self._next, self._next + table.num_rows
        numbers = np.arange(start, self._next)
        seen = int(np.searchsorted(numbers, self._skip))
        return Chunk(
            file=NAME,
            table=table.slice(seen),
            rows=numbers[seen:],
            start=(0, start, start + seen),
            end=(0, self._next, self._next),
        )

    def _table(self, given: Any) -> pa.Table:
        if isinstance(given, pa.RecordBatch):
            given = pa.table(given)
        elif isinstance(given, Mapping):
            given = self._table_of_columns({name: given[name] for name in self._names if name in given})
        if not isinstance(given, pa.Table):
            raise RunError(f"received {type(given).__name__}; expected a mapping of columns or an Arrow table")
        return given.select([name for name in self._names if name in given.column_names])

    def _table_of_columns(self, columns: dict[str, Any]) -> pa.Table:
        lengths = sorted({len(each) for each in columns.values()})
        if len(lengths) != 1:
            raise RunError(f"received columns of lengths {lengths}; expected columns of one length")
        try:
            return pa.table({name: pa.array(each) for name, each in columns.items()})
        except (pa.ArrowException, TypeError, OverflowError):
            rows = [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]
            return table_of(rows, tuple(columns))[0]
