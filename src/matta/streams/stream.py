"""Checked batches of events, and the place at which a run resumes."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from matta.errors import RunError
from matta.streams.chunks import Bad, Chunk, Place, Quarantine, Source
from matta.streams.encoding import Encoder, EventBatch
from matta.streams.row_checks import are_written_dates, check
from matta.streams.schema import Schema

MANY: Final = 1000  # events, after which a column that none of them has is told


@final
@dataclass(frozen=True, kw_only=True)
class Counts:
    """Events given out in batches, and the rows and files set aside.

    Example:
        >>> Counts(events=400, bad_rows=1, bad_files=0).events
        400
    """

    events: int
    bad_rows: int
    bad_files: int


@final
class Stream:
    """An iterator of batches over events without end: data for `matta.fit`.

    Batches are full but for the last one, whatever the files' boundaries. Numbers are normalised by the statistics
    of the events before the batch. What does not fit the schema goes to the quarantine file, once the stream
    has passed it. Place, vocabularies and statistics are the stream's state, which is part of `fit`'s
    checkpoints: a run that is killed and resumed (`resume=True`, with a new Stream made alike) trains on every
    event once.

    Args:
        source: A `Folder` or `Rows`.
        schema: What an event consists of.
        batch_size: Events to a batch.
        quarantine: The file for what is set aside. One that is there when a stream begins afresh is renamed.
        max_events: The stream ends after this many.

    Raises:
        RunError: `batch_size` or `max_events` is less than 1.

    Example:
        >>> import tempfile
        >>> from matta.streams import Numeric, Rows, Schema
        >>> schema = Schema(columns={"x": Numeric()}, label="late")
        >>> rows = Rows([{"x": 1.5, "late": 0}, {"x": "much", "late": 1}, {"x": None, "late": 1}])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stream = Stream(rows, schema, batch_size=2, quarantine=f"{folder}/bad.jsonl")
        ...     batch = next(stream)
        >>> batch["labels"], stream.counts
        (tensor([0., 1.]), Counts(events=2, bad_rows=1, bad_files=0))
    """

    def __init__(
        self,
        source: Source,
        schema: Schema,
        *,
        batch_size: int,
        quarantine: str | os.PathLike[str],
        max_events: int | None = None,
    ) -> None:
        if batch_size < 1 or (max_events is not None and max_events < 1):
            raise RunError(f"received batch_size={batch_size} and max_events={max_events}; expected 1 or more")
        self.encoder = Encoder(schema)
        self._source, self._schema, self._batch_size, self._max_events = source, schema, batch_size, max_events
        self._quarantine = Quarantine(quarantine)
        self._places: dict[str, Place] = {}
        self._events = 0
        self._block: _Block | None = None
        self._has_begun = False
        self._unseen, self._told_at, self._has_told_dates = set(schema.columns), MANY, False

    @property
    def counts(self) -> Counts:
        """What came of the events so far."""
        rows, files = self._quarantine.num_rows, self._quarantine.num_files
        return Counts(events=self._events, bad_rows=rows, bad_files=files)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> EventBatch:
        """The next batch, waiting for its events."""
        if not self._has_begun:
            self._begin()
        wanted = self._batch_size
        if self._max_events is not None:
            wanted = min(wanted, self._max_events - self._events)
        batch = self._full_batch() if wanted == self._batch_size else None
        if batch is None:
            batch = self._last_of_files(wanted)
        self._events += len(batch["labels"])
        if self._unseen and self._events >= self._told_at:
            self._tell_unseen()
        return batch

    def _tell_nothing(self, first: Bad) -> None:
        counts, where = self.counts, first.file if first.row is None else f"row {first.row} of {first.file}"
        warnings.warn(
            f"no event fits the schema: {counts.bad_rows:,} rows and {counts.bad_files:,} files were set aside in "
            f"{self._quarantine.path}; {where}: {first.reason}",
            stacklevel=3,
        )

    def _tell_dates(self, times: NDArray[np.float64] | None) -> None:
        if not self._has_told_dates and are_written_dates(times):
            assert times is not None
            warnings.warn(
                f"{self._schema.time}: received {times[0]:.0f}, which is {times[0]:,.0f} seconds, in 1970; expected "
                f"seconds since 1970, or a date as in 2013-01-31",
                stacklevel=5,
            )
            self._has_told_dates = True

    def _tell_unseen(self) -> None:
        """Warn of columns that no event has: of JSON lines and rows, a misspelt name is one that all of them lack."""
        names = ", ".join(sorted(self._unseen))
        warnings.warn(
            f"{names}: missing from all of {MANY:,} events and more; expected a column that some have: look for a "
            f"misspelt name in the schema, or leave it out",
            stacklevel=3,
        )
        self._unseen.clear()

    def _full_batch(self) -> EventBatch | None:
        """A batch that lies within the block at hand: all of these are encoded at once."""
        block, size = self._block, self._batch_size
        if block is None or block.num_left < size:
            return None
        if block.batches is None:
            block.batches = self.encoder.batches(*block.rest(), size=size)
        batch = next(block.batches)
        self._pass(block, size)
        return batch

    def _last_of_files(self, wanted: int) -> EventBatch:
        """A batch of what is left of one block and of the next ones; the last one may be smaller.

        Raises:
            StopIteration: no event is left.
        """
        pieces = self._take(wanted)
        if not pieces:
            self._quarantine.state_dict()
            if not self._events and self._quarantine.first is not None:
                self._tell_nothing(self._quarantine.first)
            raise StopIteration
        ids, numbers, labels, times = (_joined(each) for each in zip(*pieces, strict=True))
        assert ids is not None and numbers is not None and labels is not None
        return self.encoder.batch(ids, numbers, labels, times, learn=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, after the batch last given out."""
        return {
            "places": {name: list(place) for name, place in self._places.items()},
            "heads": {name: list(head) for name, head in getattr(self._source, "heads", {}).items()},
            "encoder": self.encoder.state_dict(),
            "events": self._events,
            "quarantine": self._quarantine.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after the batch at which the state was taken.

        Raises:
            RunError: the schema is another, or the quarantine file has lost lines.
        """
        self.encoder.load_state_dict(state["encoder"])
        self._quarantine.load_state_dict(state["quarantine"])
        self._places = {name: (place[0], place[1], place[2]) for name, place in state["places"].items()}
        if hasattr(self._source, "heads"):
            self._source.heads = {name: list(head) for name, head in state.get("heads", {}).items()}
        self._events = state["events"]
        self._told_at = self._events + MANY
        self._block = None
        self._has_begun = False

    def _begin(self) -> None:
        self._has_begun = True
        self._quarantine.begin()
        self._source.begin(self._schema, self._places)

    def _take(self, wanted: int) -> list[_Piece]:
        """Up to so many events from the blocks read, and from new ones."""
        pieces = []
        while wanted > 0:
            if self._block is None:
                chunk = self._source.next_chunk()
                if chunk is None:
                    break
                self._block = _Block(chunk, self.encoder)
                self._unseen -= self._block.seen
                self._tell_dates(self._block.rest()[3])
            block = self._block
            piece = block.rest(wanted)
            if len(piece[2]):
                pieces.append(piece)
            wanted -= len(piece[2])
            self._pass(block, len(piece[2]))
        return pieces

    def _pass(self, block: _Block, count: int) -> None:
        """Leave so many rows of the block behind."""
        block.num_taken += count
        self._places[block.chunk.file] = block.place()
        for bad in block.passed():
            self._quarantine.add(bad)
        if not block.num_left:
            self._block = None


_Piece = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64] | None]


@final
class _Block:
    """A chunk, checked and encoded: its good rows as arrays, the others with their reasons."""

    def __init__(self, chunk: Chunk, encoder: Encoder) -> None:
        self.chunk = chunk
        self.num_taken = 0
        self.batches: Iterator[EventBatch] | None = None  # those of full size, once they are asked for
        self._bad = deque(chunk.bad)
        self._rows = chunk.rows
        self.seen: set[str] = set()  # columns that a row has
        if not len(chunk.rows):
            self._arrays: _Piece | None = None
            return
        checked = check(encoder.schema, chunk.table)
        categories, numbers, labels, times = checked.categories, checked.numbers, checked.labels, checked.times
        self.seen = {name for name, each in categories.items() if each.null_count < len(each)}
        self.seen |= {
            name for name, is_there in zip(encoder.schema.numeric, (numbers == numbers).any(0), strict=True) if is_there
        }
        if checked.reasons:
            good = np.ones(len(chunk.rows), bool)
            good[list(checked.reasons)] = False
            mask = pa.array(good)
            categories = {name: each.filter(mask) for name, each in categories.items()}
            numbers, labels = numbers[good], labels[good]
            times = None if times is None else times[good]
            self._rows = chunk.rows[good]
            self._bad = _sorted(chunk, checked.reasons)
        ids = encoder.ids(categories, grow=True) if categories else np.zeros((len(labels), 0), np.int64)
        self._arrays = ids, numbers, labels, times

    @property
    def num_left(self) -> int:
        """Good rows that have not been taken."""
        return len(self._rows) - self.num_taken

    def rest(self, most: int | None = None) -> _Piece:
        """These rows, or the first of them."""
        if self._arrays is None:
            empty = np.zeros(0)
            return np.zeros((0, 0), np.int64), empty, empty, None
        ids, numbers, labels, times = self._arrays
        rows = slice(self.num_taken, None if most is None else self.num_taken + most)
        return ids[rows], numbers[rows], labels[rows], None if times is None else times[rows]

    def place(self) -> Place:
        """Where reading would continue."""
        if not self.num_left:
            return self.chunk.end
        return (*self.chunk.start[:2], int(self._rows[self.num_taken - 1]) + 1)

    def passed(self) -> list[Bad]:
        """What was wrong before that place, each once."""
        found = []
        after = self.place()[2]
        while self._bad and (not self.num_left or (self._bad[0].row or 0) < after):
            found.append(self._bad.popleft())
        return found


def _sorted(chunk: Chunk, reasons: Mapping[int, list[str]]) -> deque[Bad]:
    bad = [
        Bad(file=chunk.file, row=int(chunk.rows[index]), reason="; ".join(found), raw=chunk.raw_row(index))
        for index, found in reasons.items()
    ]
    return deque(sorted([*chunk.bad, *bad], key=lambda each: each.row or 0))


def _joined(parts: tuple[NDArray[Any] | None, ...]) -> NDArray[Any] | None:
    if parts[0] is None:
        return None
    return parts[0] if len(parts) == 1 else np.concatenate([each for each in parts if each is not None])
