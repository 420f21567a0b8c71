"""Samples of text that is tokenised while a run trains on it: too large for a disk, or only on the hub."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from matta.errors import RunError
from matta.lm.documents import Counts, Document, Documents, describe_empty
from matta.lm.lanes import Lane, Place, Sample, Window
from matta.lm.permutations import Shuffled
from matta.lm.tokens import BLOCK_CHARS, Encode, Marks, token_blocks

_Ints = NDArray[np.int64]


@final
@dataclass(frozen=True, kw_only=True)
class StreamSettings:
    """What the samples of all lanes depend on; `window` is a number of samples."""

    encode: Encode
    marks: Marks
    context: int
    seed: int | None
    window: int


@final
class StreamedSamples:
    """Samples of lanes, dealt out in turn, whatever the number of processes that share them.

    Sample n of a run is the next one of lane n modulo the number of lanes. It belongs to process n modulo the number of
    processes, which reads the lanes with samples of its own: a share of them if one number divides the other. The
    place is the number of samples that all processes have taken. Each lane has its files (with fewer files than lanes,
    its documents), and is in a pass of its own.
    """

    num_samples: int | None = None

    def __init__(
        self, documents: Documents, about: str, settings: StreamSettings, *, passes: int | None, num_lanes: int | None
    ) -> None:
        self._documents, self._settings, self._passes = documents, settings, passes
        self.data = hashlib.sha256(about.encode()).hexdigest()[:16]
        self._given = self._num_lanes = num_lanes
        self._rank, self._num_ranks = 0, 1
        self._place = 0
        self._lanes: dict[int, Lane] = {}

    @property
    def num_lanes(self) -> int:
        """The number given, or that of the run that is resumed, or one lane for each process."""
        return self._num_lanes or self._num_ranks

    @property
    def order(self) -> str:
        """What the order depends on, but for the lanes."""
        window = "" if self._settings.seed is None else f", in windows of {self._settings.window}"
        return f"seed {self._settings.seed}{window}"

    @property
    def fingerprint(self) -> str:
        """A name for the samples: which documents share one depends on the order of the files, and on the lanes."""
        parts = [self.data, str(self.num_lanes), str(self._settings.seed)]
        return hashlib.sha256("/".join(parts).encode()).hexdigest()[:16]

    def shard(self, rank: int, num_ranks: int) -> None:
        if any(lane.has_begun for lane in self._lanes.values()):
            raise RunError("received shard() of text that has been read from; expected it before the first batch")
        if self._passes is not None and num_ranks > 1:
            raise RunError(
                f"received passes={self._passes} over streamed text in {num_ranks} processes, which would come to its "
                f"end at different batches; expected passes=None, and a number of steps"
            )
        self._rank, self._num_ranks, self._lanes = rank, num_ranks, {}

    def take(self, most: int) -> tuple[_Ints, _Ints] | None:
        lanes, found, num_ended = self._opened(), list[Sample](), 0
        end = self._place + most * self._num_ranks
        while self._place < end and num_ended < len(lanes):
            number, self._place = self._place, self._place + 1
            lane = lanes.get(number % self.num_lanes)
            if number % self._num_ranks != self._rank:
                if lane is not None:
                    lane.skip()
            elif lane is not None and (sample := lane.next()) is not None:
                found.append(sample)
                num_ended = 0
            else:  # with `passes`, in one process: the other lanes continue
                num_ended, end = num_ended + 1, end + 1
        if not found:
            return None
        return np.stack([row for row, _ in found]).astype(np.int64), np.array([each for _, each in found], np.int64)

    def _opened(self) -> dict[int, Lane]:
        """The lanes that this process reads."""
        if not self._lanes:
            count = self.num_lanes
            apart = math.gcd(count, self._num_ranks)
            for index in range(self._rank % apart, count, apart):
                windows = _Windows(self._documents, self._settings, self._passes, index, count)
                self._lanes[index] = Lane(windows.after)
        return self._lanes

    def num_batches(self, batch: int) -> int | None:
        return None

    def state_dict(self) -> dict[str, Any]:
        lanes = [{"lane": index, **lane.state_dict()} for index, lane in self._opened().items()]
        return {"place": self._place, "num_lanes": self.num_lanes, "lanes": lanes}

    def load_state_dicts(self, states: Sequence[dict[str, Any]], /) -> None:
        begun = states[0]["num_lanes"]
        if self._given not in (None, begun):
            raise RunError(
                f"the run was begun with lanes={begun}, and now it is {self._given}; expected the same, or None"
            )
        self._num_lanes, self._place, self._lanes = begun, states[0]["place"], {}
        found = {each["lane"]: each for state in states for each in state["lanes"]}
        if missing := self._opened().keys() - found.keys():
            raise RunError(
                f"received the state of {len(states)} process(es), without lane(s) {sorted(missing)}; expected those "
                f"of all processes of the run: load_state_dicts([...])"
            )
        for index, lane in self._lanes.items():
            lane.load_state_dict(found[index])

    def report(self) -> dict[str, Any]:
        places = [lane.seen for lane in self._opened().values()]
        counts = Counts.summed([place.counts for place in places])
        tokens = sum(place.tokens for place in places)
        return {**counts.state_dict(), "tokens": tokens, "samples": None, "left_over": None}


@final
class _Windows:
    """Makes the windows of a lane, in the order of the data; it knows nothing of who takes them."""

    def __init__(
        self, documents: Documents, settings: StreamSettings, passes: int | None, index: int, num_lanes: int
    ) -> None:
        self.documents, self.settings, self.passes = copy(documents), settings, passes
        self.index, self.num_lanes = index, num_lanes
        self.has_files = len(documents.shards.names) >= num_lanes  # of its own
        self.block_chars = BLOCK_CHARS

    def after(self, place: Place) -> Iterator[Window]:
        """Windows from a place on.

        Raises:
            RunError: a pass has no sample.
        """
        while self.passes is None or place.number < self.passes:
            self.documents.counts = deepcopy(place.counts)
            for window in self._of_pass(place):
                place = window.end
                yield window

    def _of_pass(self, start: Place) -> Iterator[Window]:
        settings, place = self.settings, start
        rows: list[NDArray[np.int32]] = []
        reader = _Reader(self, place)
        blocks = token_blocks(
            reader, settings.encode, settings.marks, has_ended=place.has_ended, chars=self.block_chars
        )
        for block in blocks:
            tokens = np.concatenate([place.carry, block.tokens])
            count = len(tokens) // settings.context
            rows.append(tokens[: count * settings.context].astype(np.int32).reshape(count, settings.context))
            place = Place(
                number=start.number,
                part=reader.part,
                item=reader.item,
                has_ended=block.has_ended,
                carry=tokens[count * settings.context :].copy(),
                next_id=place.next_id + count,
                next_in_pass=place.next_in_pass + count,
                tokens=place.tokens + len(block.tokens),
                counts=deepcopy(self.documents.counts),
            )
            if place.next_in_pass >= start.next_in_pass + (1 if settings.seed is None else settings.window):
                yield self._window(rows, start, place)
                rows, start = [], place
        if not place.next_in_pass:
            raise RunError(self._describe_dry(place))
        next_id = 0 if settings.seed is None else place.next_id  # in the order of the data each pass is the same
        counts = deepcopy(self.documents.counts)
        yield self._window(
            rows, start, Place(number=place.number + 1, next_id=next_id, tokens=place.tokens, counts=counts)
        )

    def _window(self, rows: list[NDArray[np.int32]], start: Place, end: Place) -> Window:
        found = np.concatenate(rows) if rows else np.zeros((0, self.settings.context), np.int32)
        order = np.arange(len(found))
        if self.settings.seed is not None:
            order = Shuffled(len(found), self.settings.seed, self.index, start.next_id).at(0, len(found))
        return Window(found[order], (start.next_id + order) * self.num_lanes + self.index, end)

    def parts(self, number: int) -> list[int]:
        """The files of a pass, in its order; where there is one for every lane, those of this lane."""
        count, seed = len(self.documents.shards.names), self.settings.seed
        order = list(range(count)) if seed is None else Shuffled(count, seed, number).at(0, count).tolist()
        return order[self.index :: self.num_lanes] if self.has_files else order

    def takes(self, row: int) -> bool:
        """Whether a document is this lane's: with fewer files than lanes, each takes every n-th document."""
        return self.has_files or row % self.num_lanes == self.index

    def _describe_dry(self, place: Place) -> str:
        counts, of = self.documents.counts, "the data"
        if self.num_lanes > 1:
            what = "files" if self.has_files else "documents of each file"
            of = f"lane {self.index} of {self.num_lanes}, one in {self.num_lanes} of the {what},"
        few = f"gave {len(place.carry)} tokens; expected at least context={self.settings.context} of them"
        return f"a pass over {of} {few if counts.bytes else describe_empty(counts)}"


@final
class _Reader:
    """The documents of a pass from a place on, and how far they have been read."""

    def __init__(self, lane: _Windows, place: Place) -> None:
        self._lane, self._parts = lane, lane.parts(place.number)
        self.part, self.item = place.part, place.item

    def __iter__(self) -> Iterator[Document]:
        documents = self._lane.documents
        while self.part < len(self._parts):
            index, skip = self._parts[self.part], self.item
            for number, item in enumerate(documents.shards.items(index)):
                if number < skip:
                    continue
                self.item = number + 1
                if self._lane.takes(item.row) and (document := documents.checked(item, index)) is not None:
                    yield document
            self.part, self.item = self.part + 1, 0
