"""A lane of streamed text: windows of samples that are made ahead on a thread, and the place reached in them."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from matta.lm.documents import Counts

_AHEAD: Final = 1  # windows that are ready before they are asked for
_Ints = NDArray[np.int64]
Sample = tuple[NDArray[np.int32], int]
"""The tokens of a sample, of shape (context,), and its id."""


@final
@dataclass(frozen=True, kw_only=True)
class Place:
    """Where reading continues: the number of the pass, the file in its order, the item in the file.

    `has_ended` tells whether the document before has, and `carry` are tokens too few for a sample. `next_id` is the
    number of the lane's next sample, and `next_in_pass` its number in the pass.
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
    def from_state(state: dict[str, Any]) -> Place:
        """The place that `state_dict` gave."""
        return Place(**{**state, "carry": state["carry"].numpy(), "counts": Counts.from_state(state["counts"])})


_PLAIN: Final = ("number", "part", "item", "has_ended", "next_id", "next_in_pass", "tokens")


class Window(NamedTuple):
    """Samples that are shuffled among each other, their ids, and the place after them."""

    rows: NDArray[np.int32]
    ids: _Ints
    end: Place


@final
class Lane:
    """The samples of one of several lanes, made on a thread of their own while the ones before are trained on.

    A state is the place before the window in use, and how many of its samples are done: continuing reads the file up
    to there, and tokenises this one window again.
    """

    def __init__(self, windows: Callable[[Place], Iterator[Window]]) -> None:
        self._windows = windows  # from a place on
        self._place, self._used = Place(), 0
        self._window: Window | None = None
        self._ahead: _Ahead | None = None

    @property
    def has_begun(self) -> bool:
        """Whether anything has been read."""
        return self._ahead is not None

    @property
    def seen(self) -> Place:
        """How far the windows go that have been taken up."""
        return self._place if self._window is None else self._window.end

    def next(self) -> Sample | None:
        """The next sample; None: the last pass is over."""
        while (window := self._current()) is not None:
            if self._used < len(window.ids):
                index = self._used
                self._used += 1
                return window.rows[index], int(window.ids[index])
            self._used -= len(window.ids)
            self._place, self._window = window.end, None
        return None

    def skip(self) -> None:
        """Leave out the next sample."""
        self._used += 1

    def _current(self) -> Window | None:
        if self._window is None:
            self._ahead = self._ahead or _Ahead(self._windows(self._place))
            self._window = self._ahead.next()
        return self._window

    def state_dict(self) -> dict[str, Any]:
        """The place after the sample last given or left out."""
        return {"place": self._place.state_dict(), "used": self._used}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the sample at which the state was taken."""
        self._place, self._used = Place.from_state(state["place"]), state["used"]
        self._window, self._ahead = None, None


@final
class _Ahead:
    """What an iterator gives, made on a thread up to `_AHEAD` items before it is asked for.

    The tokenizer and PyTorch both leave Python's lock alone while they compute, so they run side by side.
    """

    def __init__(self, items: Iterator[Window]) -> None:
        self._queue: queue.Queue[Window | BaseException | None] = queue.Queue(_AHEAD)
        stop = threading.Event()
        thread = threading.Thread(target=_fill, args=(items, self._queue, stop), name="matta.lm.text", daemon=True)
        weakref.finalize(self, _end, stop, thread)
        thread.start()
        self._is_over = False

    def next(self) -> Window | None:
        """The next item; None: there is none, now and for ever.

        Raises:
            BaseException: whatever the iterator raised.
        """
        if self._is_over:
            return None
        found = self._queue.get()
        self._is_over = not isinstance(found, Window)
        if isinstance(found, BaseException):
            raise found
        return found


def _fill(items: Iterator[Window], into: queue.Queue[Any], stop: threading.Event) -> None:
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
