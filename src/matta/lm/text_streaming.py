"""Samples of text that is tokenised while a run trains on it: too large for a disk, or only on the hub.

Their order comes from random numbers that are computed by their place, so that a resumed run needs no history.
"""

from __future__ import annotations

import hashlib
import queue
import threading
import weakref
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from matta.errors import RunError
from matta.lm.documents import Counts, Document, Documents, describe_empty
from matta.lm.tokens import BLOCK_CHARS, Encode, token_blocks

_ROUNDS: Final = 8
_Words = NDArray[np.uint64]


@final
class Shuffled:
    """A permutation of 0 to `length` − 1 that depends on the seeds alone.

    A Feistel network over the least even power of two that holds `length`; what falls outside is permuted again
    until it falls inside (Black and Rogaway, 2002), four times at worst in the mean. The same on every machine and
    with every version of NumPy, so that a resumed run keeps its order even after an upgrade.

    Example:
        >>> order = Shuffled(5, 0, 1)
        >>> sorted(order.at(0, 5).tolist()), order.at(1, 3).tolist() == order.at(0, 5)[1:3].tolist()
        ([0, 1, 2, 3, 4], True)
    """

    def __init__(self, length: int, *seeds: int) -> None:
        self.length = length
        self._half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence(seeds).generate_state(_ROUNDS, np.uint64)

    def at(self, start: int, stop: int) -> NDArray[np.int64]:
        """What stands at the places from `start` up to `stop`."""
        assert 0 <= start <= stop <= self.length
        values = self._permute(np.arange(start, stop, dtype=np.uint64))
        while (outside := values >= np.uint64(self.length)).any():
            values[outside] = self._permute(values[outside])
        return values.astype(np.int64)

    def _permute(self, values: _Words) -> _Words:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mixed(right + key) & self._mask)
        return left << self._half | right


def draws(start: int, stop: int, below: int, *seeds: int) -> list[int]:
    """Numbers from 0 to `below` − 1 that depend on the seeds and on their places, `start` up to `stop`, alone.

    Example:
        >>> draws(0, 4, 10, 7)[2:] == draws(2, 4, 10, 7), max(draws(0, 100, 10, 7))
        (True, 9)
    """
    key = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    golden = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's step
    words = _mixed(np.arange(start, stop, dtype=np.uint64) * golden + key)
    return (words % np.uint64(below)).tolist()


def _mixed(words: _Words) -> Any:
    """Each bit of the result depends on all bits of the word (the end of SplitMix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


_AHEAD: Final = 2  # blocks that are ready before they are asked for
_Ints = NDArray[np.int64]
_Sample = tuple[NDArray[np.int32], int]


@final
@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where reading continues: the number of the pass, the file in its order, the item in the file.

    `has_ended` tells whether the document before has, and `carry` are tokens too few for a sample. `next_id` is the
    number of this process's next sample, and `next_in_pass` its number in the pass.
    """

    number: int = 0
    part: int = 0
    item: int = 0
    has_ended: bool = True
    carry: _Ints = field(default_factory=lambda: np.zeros(0, np.int64))
    next_id: int = 0
    next_in_pass: int = 0
    tokens: int = 0
    counts: Counts = field(default_factory=Counts)

    def state_dict(self) -> dict[str, Any]:
        """The place as a tensor and plain types."""
        plain = {name: getattr(self, name) for name in _PLAIN}
        return {**plain, "carry": torch.from_numpy(self.carry), "counts": self.counts.state_dict()}

    @staticmethod
    def from_state(state: dict[str, Any]) -> _Place:
        """The place that `state_dict` gave."""
        return _Place(**{**state, "carry": state["carry"].numpy(), "counts": Counts.from_state(state["counts"])})


_PLAIN: Final = ("number", "part", "item", "has_ended", "next_id", "next_in_pass", "tokens")


class _Samples(NamedTuple):
    """Samples of a block of documents, with the places before and after it; and whether a pass ends with it."""

    start: _Place
    rows: _Ints
    ids: _Ints
    end: _Place
    is_last: bool


@final
class _Producer:
    """Makes samples of documents, in the order of the data; it knows nothing of who takes them."""

    def __init__(self, documents: Documents, encode: Encode, end: int, context: int, seed: int | None) -> None:
        self.documents, self.encode, self.end, self.context, self.seed = documents, encode, end, context, seed
        self.rank, self.num_ranks, self.block_chars = 0, 1, BLOCK_CHARS

    def samples(self, place: _Place, passes: int | None) -> Iterator[_Samples]:
        """Samples from a place on.

        Raises:
            RunError: a pass has none.
        """
        while passes is None or place.number < passes:
            self.documents.counts = deepcopy(place.counts)
            for made in self._of_pass(place):
                place = made.end
                yield made

    def _of_pass(self, place: _Place) -> Iterator[_Samples]:
        parts = self._parts(place.number)
        reader = _Reader(self, parts, place)
        for block in token_blocks(reader, self.encode, self.end, has_ended=place.has_ended, chars=self.block_chars):
            start = place
            tokens = np.concatenate([start.carry, block.tokens])
            count = len(tokens) // self.context
            place = _Place(
                number=start.number,
                part=reader.part,
                item=reader.item,
                has_ended=block.has_ended,
                carry=tokens[count * self.context :].copy(),
                next_id=start.next_id + count,
                next_in_pass=start.next_in_pass + count,
                tokens=start.tokens + len(block.tokens),
                counts=deepcopy(self.documents.counts),
            )
            yield _Samples(start, *self._cut(tokens, start.next_id, count), place, False)
        if not place.next_in_pass:
            counts = self.documents.counts
            few = f"gave {len(place.carry)} tokens; expected at least context={self.context} of them"
            raise RunError(f"a pass over {self._share()} {few if counts.bytes else describe_empty(counts)}")
        next_id = 0 if self.seed is None else place.next_id  # in the order of the data each pass is the same
        counts = deepcopy(self.documents.counts)
        end = _Place(number=place.number + 1, next_id=next_id, tokens=place.tokens, counts=counts)
        yield _Samples(place, *self._cut(place.carry, 0, 0), end, True)

    def _cut(self, tokens: _Ints, next_id: int, count: int) -> tuple[_Ints, _Ints]:
        ids = (next_id + np.arange(count, dtype=np.int64)) * self.num_ranks + self.rank
        return tokens[: count * self.context].reshape(count, self.context), ids

    def _parts(self, number: int) -> list[int]:
        """The files of a pass, in its order; where there is one for every process, those of this process."""
        count = len(self.documents.shards.names)
        order = list(range(count)) if self.seed is None else Shuffled(count, self.seed, number).at(0, count).tolist()
        return order[self.rank :: self.num_ranks] if count >= self.num_ranks else order

    def _share(self) -> str:
        """What this process reads, in words."""
        if self.num_ranks == 1:
            return "the data"
        num_files = len(self.documents.shards.names)
        what = "files" if num_files >= self.num_ranks else "documents of each file"
        return f"the share of rank {self.rank} of {self.num_ranks}, one in {self.num_ranks} of the {what},"

    def takes(self, row: int) -> bool:
        """Whether a document is this process's: with fewer files than processes, each takes every n-th document."""
        return len(self.documents.shards.names) >= self.num_ranks or row % self.num_ranks == self.rank


@final
class _Reader:
    """The documents of a pass from a place on, and how far they have been read."""

    def __init__(self, producer: _Producer, parts: list[int], place: _Place) -> None:
        self._producer, self._parts = producer, parts
        self.part, self.item = place.part, place.item

    def __iter__(self) -> Iterator[Document]:
        documents = self._producer.documents
        while self.part < len(self._parts):
            index, skip = self._parts[self.part], self.item
            for number, item in enumerate(documents.shards.items(index)):
                if number < skip:
                    continue
                self.item = number + 1
                if self._producer.takes(item.row) and (document := documents.checked(item, index)) is not None:
                    yield document
            self.part, self.item = self.part + 1, 0


@final
class StreamedSamples:
    """Samples through a shuffle buffer, made on a thread of their own while the ones before are trained on.

    Each process reads files of its own (with fewer files than processes, documents of its own) and is in a pass of
    its own. A state has the samples in the buffer, and the place before the block of documents in use: going on
    reads the file up to there, and tokenises this one block again.
    """

    num_samples: int | None = None

    def __init__(
        self,
        documents: Documents,
        about: str,
        encode: Encode,
        *,
        end: int,
        context: int,
        seed: int | None,
        passes: int | None,
        buffer: int,
    ) -> None:
        self._producer = _Producer(documents, encode, end, context, seed)
        self._about, self._context, self._seed, self._passes = about, context, seed, passes
        self._capacity = 0 if seed is None else buffer
        self._buffer: list[_Sample] = []
        self._given, self._is_draining = 0, False
        self._place, self._used = _Place(), 0
        self._block: _Samples | None = None
        self._ahead: _Ahead | None = None

    @property
    def order(self) -> str:
        """What the order depends on."""
        return f"seed {self._seed}, buffer {self._capacity}, {self._producer.num_ranks} processes"

    @property
    def fingerprint(self) -> str:
        """A name for the samples: which documents share one depends on the order of the files."""
        parts = [self._about, str(self._producer.num_ranks), str(self._seed)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]

    def shard(self, rank: int, num_ranks: int) -> None:
        if self._ahead is not None:
            raise RunError("received shard() of text that has been read from; expected it before the first batch")
        if self._passes is not None and num_ranks > 1:
            raise RunError(
                f"received passes={self._passes} over streamed text in {num_ranks} processes, which would come to its "
                f"end at different batches; expected passes=None, and a number of steps"
            )
        self._producer.rank, self._producer.num_ranks = rank, num_ranks

    def take(self, most: int) -> tuple[_Ints, _Ints] | None:
        found: list[_Sample] = []
        while len(found) < most and (sample := self._next()) is not None:
            found.append(sample)
        if not found:
            return None
        return np.stack([row for row, _ in found]).astype(np.int64), np.array([each for _, each in found], np.int64)

    def _next(self) -> _Sample | None:
        """The next sample: whichever a new one takes the place of in the buffer, which is emptied after each pass."""
        while True:
            if self._is_draining and self._buffer:
                last = self._buffer.pop()
                return self._swapped(last) if self._buffer else last
            self._is_draining = False
            block = self._block = self._block or self._fetched()
            if block is None:
                return None
            if self._used == len(block.ids):
                self._place, self._used, self._block = block.end, 0, None
                self._is_draining = block.is_last
                continue
            sample = (
                block.rows[self._used].astype(np.int32),
                int(block.ids[self._used]),
            )  # a copy, so that no block stays
            self._used += 1
            if not self._capacity:
                return sample
            if len(self._buffer) == self._capacity:
                return self._swapped(sample)
            self._buffer.append(sample)

    def _swapped(self, sample: _Sample) -> _Sample:
        """Put a sample in the place of one of those in the buffer, drawn at random, and give that one."""
        assert self._seed is not None, "without a seed there is no buffer"
        place = draws(self._given, self._given + 1, len(self._buffer), self._seed)[0]
        self._given += 1
        found, self._buffer[place] = self._buffer[place], sample
        return found

    def _fetched(self) -> _Samples | None:
        if self._ahead is None:
            self._ahead = _Ahead(self._producer.samples(self._place, self._passes))
        return self._ahead.next()

    def num_batches(self, batch: int) -> int | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        rows = [torch.from_numpy(row) for row, _ in self._buffer]
        return {
            "place": self._place.state_dict(),
            "used": self._used,
            "given": self._given,
            "is_draining": self._is_draining,
            "rows": torch.stack(rows) if rows else torch.zeros(0, self._context, dtype=torch.int32),
            "ids": torch.tensor([each for _, each in self._buffer], dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self._place, self._used = _Place.from_state(state["place"]), state["used"]
        self._given, self._is_draining = state["given"], state["is_draining"]
        self._buffer = list(zip(state["rows"].numpy().copy(), state["ids"].tolist(), strict=True))
        self._block, self._ahead = None, None

    def report(self) -> dict[str, Any]:
        place = self._place if self._block is None else self._block.end
        return {**place.counts.state_dict(), "tokens": place.tokens, "samples": None, "left_over": None}


@final
class _Ahead:
    """What an iterator gives, made on a thread up to `_AHEAD` items before it is asked for.

    The tokenizer and PyTorch both leave Python's lock alone while they compute, so they run side by side.
    """

    def __init__(self, items: Iterator[_Samples]) -> None:
        self._queue: queue.Queue[_Samples | BaseException | None] = queue.Queue(_AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=_fill, args=(items, self._queue, stop), name="matta.lm.text", daemon=True)
        weakref.finalize(self, _end, stop, thread)
        thread.start()
        self._is_over = False

    def next(self) -> _Samples | None:
        """The next item; None: there is none, now and for ever.

        Raises:
            BaseException: whatever the iterator raised.
        """
        if self._is_over:
            return None
        found = self._queue.get()
        self._is_over = not isinstance(found, _Samples)
        if isinstance(found, BaseException):
            raise found
        return found


def _fill(items: Iterator[_Samples], into: queue.Queue[Any], stop: threading.Event) -> None:
    """Put items into the queue until it is no longer wanted."""

    def put(item: object) -> None:
        while not stop.is_set():
            try:
                return into.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        for item in items:
            put(item)
            if stop.is_set():
                return
        put(None)
    except BaseException as error:  # it is raised where the samples are taken
        put(error)


def _end(stop: threading.Event, thread: threading.Thread) -> None:
    """Let the thread end, and wait for it: at the exit of the interpreter it must not be at work."""
    stop.set()
    if thread is not threading.current_thread():
        thread.join(timeout=5)
