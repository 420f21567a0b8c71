"""Dynamic batching: requests that wait together are computed together, in one thread beside the server's.

Requests fit together if they ask for the same size and version and their tensors agree in all but the rows. The group
whose oldest request has waited longest is next; it waits for more only while it is short of rows and its oldest
request is younger than the bound.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from matta.serving.served_models import ServedModels
from matta.serving.size_policy import SizePolicy


@final
class QueueFull(Exception):
    """A request is turned away, since too much waits; it may come again after `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"the queue is full; try again in {retry_after_s:.1f} s")
        self.retry_after_s = retry_after_s


@final
@dataclass(frozen=True, kw_only=True)
class Answer:
    """The rows of one request, and which size and version gave them."""

    outputs: Mapping[str, Tensor]
    size: str
    version: str


@final
@dataclass(frozen=True, kw_only=True)
class Ran:
    """A batch that was computed: for metrics."""

    size: str
    rows: int
    seconds: float


@final
@dataclass(eq=False, kw_only=True)
class _Waiting:
    inputs: Mapping[str, Tensor]
    rows: int
    size: str | None
    version: str | None
    done: asyncio.Future[Answer]
    arrived: float = field(default_factory=time.monotonic)

    @property
    def group(self) -> tuple[Any, ...]:
        """Equal for requests that can be computed together."""
        return self.size, self.version, *((name, each.shape[1:]) for name, each in self.inputs.items())


@final
class Batcher:
    """Computes requests in batches; made and used on the thread of an event loop.

    Args:
        models: What computes.
        size: For requests that name none, if there is no policy.
        policy: Picks a size for requests that name none.
        max_rows: Of a batch.
        max_wait_s: For more requests, of the oldest of a batch.
        max_waiting_rows: More are turned away.
        ran: Told of each batch.
    """

    def __init__(
        self,
        models: ServedModels,
        *,
        size: str,
        policy: SizePolicy | None,
        max_rows: int,
        max_wait_s: float,
        max_waiting_rows: int,
        ran: Callable[[Ran], None],
    ) -> None:
        self.models, self._size, self._policy = models, size, policy
        self._max_rows, self._max_wait_s, self._max_waiting_rows = max_rows, max_wait_s, max_waiting_rows
        self._ran, self._loop = ran, asyncio.get_running_loop()
        self._groups: dict[tuple[Any, ...], deque[_Waiting]] = {}
        self._group_rows: dict[tuple[Any, ...], int] = {}
        self.rows = 0
        """Waiting, all together."""
        self._is_closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="matta batches", daemon=True)
        self._thread.start()

    async def answer(self, inputs: Mapping[str, Tensor], rows: int, size: str | None, version: str | None) -> Answer:
        """The answer to a request of at most `max_rows` rows.

        Raises:
            QueueFull: too much waits.
            Exception: what the model raised on this request.
        """
        if self._policy is None and size is None:
            size = self._size
        waiting = _Waiting(inputs=inputs, rows=rows, size=size, version=version, done=self._loop.create_future())
        group = waiting.group
        with self._changed:
            if self.rows + rows > self._max_waiting_rows:
                raise QueueFull(self._drain_s())
            self._groups.setdefault(group, deque()).append(waiting)
            self._group_rows[group] = self._group_rows.get(group, 0) + rows
            self.rows += rows
            if self._policy is not None and size is None:
                self._policy.arrived(rows, waiting.arrived)
            if len(self._groups[group]) == 1 or self._group_rows[group] >= self._max_rows:
                self._changed.notify()
        return await waiting.done

    def close(self) -> None:
        """Work off what waits, and end the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    def _drain_s(self) -> float:
        times = self.models.times[self._size]
        return times.fixed_s * self.rows / self._max_rows + times.row_s * self.rows

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            batch, size = taken
            start = time.monotonic()
            answers = self._compute(batch, size)
            ran = Ran(size=size, rows=sum(each.rows for each in batch), seconds=time.monotonic() - start)
            with self._changed:
                if self._policy is not None:
                    self._policy.ran(size, ran.rows, ran.seconds, start + ran.seconds)
            self._loop.call_soon_threadsafe(self._deliver, batch, answers, ran)

    def _take(self) -> tuple[list[_Waiting], str] | None:
        """The next batch and its size; None: the end."""
        with self._changed:
            while True:
                if not self._groups:
                    if self._is_closing:
                        return None
                    self._changed.wait()
                    continue
                group = min(self._groups, key=lambda each: self._groups[each][0].arrived)
                now = time.monotonic()
                oldest_s = now - self._groups[group][0].arrived
                is_short = self._group_rows[group] < self._max_rows
                if is_short and oldest_s < self._max_wait_s and not self._is_closing:
                    self._changed.wait(self._max_wait_s - oldest_s)
                    continue
                size, most = self._size_of(group, oldest_s, now)
                return self._pop(group, most), size

    def _size_of(self, group: tuple[Any, ...], oldest_s: float, now: float) -> tuple[str, int]:
        """The size of a batch of a group, and its most rows."""
        size: str | None = group[0]
        if size is not None:
            return size, self._max_rows
        assert self._policy is not None
        size = self._policy.pick(self.rows, oldest_s, now)
        return size, self._policy.rows_of(size, now)

    def _pop(self, group: tuple[Any, ...], most: int) -> list[_Waiting]:
        """Requests of a group of so many rows, the oldest first; at least one. Clients that have left get none."""
        queue, rows = self._groups[group], 0
        batch: list[_Waiting] = []
        while queue and (not batch or rows + queue[0].rows <= most):
            waiting = queue.popleft()
            self.rows -= waiting.rows
            self._group_rows[group] -= waiting.rows
            if not waiting.done.done():
                batch.append(waiting)
                rows += waiting.rows
        if not queue:
            del self._groups[group], self._group_rows[group]
        return batch

    def _compute(self, batch: list[_Waiting], size: str) -> list[Answer | Exception]:
        """An answer for each request; if they fail together, each is tried alone: one may have spoilt it for all."""
        if not batch:
            return []
        try:
            inputs = batch[0].inputs
            if len(batch) > 1:
                inputs = {name: torch.cat([each.inputs[name] for each in batch]) for name in inputs}
            outputs, version = self.models.run(size, inputs, batch[0].version)
            rows = [each.rows for each in batch]
            parts = list(zip(*(each.split(rows) for each in outputs.values()), strict=True))
        except Exception as error:  # of the user's model: any kind
            if len(batch) == 1:
                return [error]
            return [answer for each in batch for answer in self._compute([each], size)]
        return [Answer(outputs=dict(zip(outputs, part, strict=True)), size=size, version=version) for part in parts]

    def _deliver(self, batch: list[_Waiting], answers: list[Answer | Exception], ran: Ran) -> None:
        if batch:
            self._ran(ran)
        for waiting, answer in zip(batch, answers, strict=True):
            if waiting.done.done():
                continue
            if isinstance(answer, Exception):
                waiting.done.set_exception(answer)
            else:
                waiting.done.set_result(answer)
