"""Which size answers a batch, so that a latency target holds: the best that the present load allows.

A size's time for a batch is a + b * rows, measured at the start, and fitted to its batches as they come; while a size
is not used, what was learnt of it is forgotten, so that it is tried again. Two things decide: the time to work off all
that waits, and the share of time that the rows coming in would take. Falling to a smaller size is at once; a larger one
has to look possible, with a margin, for a while.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, final

from matta.errors import ServeError

BUSY: Final = 0.85  # of the time; queues grow without bound as this nears 1
MARGIN: Final = 0.75  # of the target, for what waits: the rest is for what comes in meanwhile, and for the network
UP_MARGIN: Final = 0.7  # of both limits, before a larger size is taken
HOLD_S: Final = 1.0  # for so long, before a larger size is taken
RATE_S: Final = 0.5  # over which the rate of rows is averaged
FORGET_S: Final = 10.0  # over which batches are forgotten
PRIOR: Final = 1.0  # batches that the times of the start weigh


@final
@dataclass(frozen=True)
class BatchTime:
    """Seconds of a batch: `fixed_s` and `row_s` for each row."""

    fixed_s: float
    row_s: float

    def seconds(self, rows: int) -> float:
        """The seconds of a batch of so many rows."""
        return self.fixed_s + self.row_s * rows


@final
class FittedTime:
    """A `BatchTime` that follows what batches take: least squares of relative errors, older batches count less."""

    def __init__(self, start: BatchTime, max_rows: int) -> None:
        points = ((rows, start.seconds(rows)) for rows in (1, max(2, max_rows)))
        self._prior = [PRIOR * sum(each) for each in zip(*(_moments(*point) for point in points), strict=True)]
        self._learnt, self._learnt_at = [0.0] * len(self._prior), -math.inf

    def learn(self, rows: int, seconds: float, now: float) -> None:
        """Take in what a batch took."""
        keep = self._kept(now)
        self._learnt = [keep * old + new for old, new in zip(self._learnt, _moments(rows, seconds), strict=True)]
        self._learnt_at = now

    def at(self, now: float) -> BatchTime:
        """The time as it is known now."""
        keep = self._kept(now)
        one, x, xx, y, xy = (old + keep * new for old, new in zip(self._prior, self._learnt, strict=True))
        row_s = max((one * xy - x * y) / max(one * xx - x * x, 1e-300), 0.0)
        return BatchTime(max((y - row_s * x) / one, 0.0), row_s)

    def _kept(self, now: float) -> float:
        return math.exp(-max(now - self._learnt_at, 0.0) / FORGET_S)


def _moments(rows: int, seconds: float) -> tuple[float, ...]:
    """The moments of a point, for a straight line through points of equal relative error."""
    weight = 1.0 / max(seconds, 1e-9) ** 2
    return weight, weight * rows, weight * rows * rows, weight * seconds, weight * rows * seconds


@final
class SizePolicy:
    """Picks a size for each batch, and how many rows it may have.

    Args:
        times: Of each size, from the cheapest and worst to the best.
        target_s: Within which a request is to be answered.
        max_rows: The most rows of a batch.

    Raises:
        ServeError: no size, a target or a number of rows that is not over zero.

    Example:
        >>> policy = SizePolicy({"Student": BatchTime(0.001, 1e-5), "TA": BatchTime(0.01, 1e-3)}, 0.1, max_rows=32)
        >>> policy.pick(rows=10, oldest_s=0.0, now=0.0), policy.pick(rows=500, oldest_s=0.02, now=0.1)
        ('TA', 'Student')
    """

    def __init__(self, times: Mapping[str, BatchTime], target_s: float, *, max_rows: int) -> None:
        if not times or not target_s > 0 or max_rows < 1:
            raise ServeError(f"received sizes {[*times]}, target_s={target_s} and max_rows={max_rows}; expected over 0")
        self.times = {name: FittedTime(time, max_rows) for name, time in times.items()}
        self.target_s, self.max_rows = target_s, max_rows
        self._names: Sequence[str] = [*times]
        self._now = len(times) - 1  # the size of the last batch
        self._rate, self._rate_at, self._new = 0.0, -math.inf, 0
        self._possible_since = [math.inf] * len(times)
        self._picked_at = -math.inf

    def arrived(self, rows: int, now: float) -> None:
        """Count rows that came in."""
        self._new += rows
        if now - self._rate_at >= RATE_S / 10:
            self._follow_rate(now)

    def ran(self, size: str, rows: int, seconds: float, now: float) -> None:
        """Learn from a batch how fast a size is."""
        self.times[size].learn(rows, seconds, now)

    def rows_of(self, size: str, now: float) -> int:
        """The most rows of a batch that a size finishes within half of the target."""
        time = self.times[size].at(now)
        return max(1, min(self.max_rows, int((0.5 * self.target_s - time.fixed_s) / max(time.row_s, 1e-12))))

    def pick(self, rows: int, oldest_s: float, now: float) -> str:
        """The size for the next batch.

        Args:
            rows: Waiting, all together.
            oldest_s: For how long the oldest of them has waited.
            now: Seconds of a clock.
        """
        self._follow_rate(now)
        idle_s, self._picked_at = now - self._picked_at, now
        since = now - HOLD_S if idle_s >= HOLD_S else now
        allowed = 0
        for index, name in enumerate(self._names):
            if not self._is_possible(name, rows, oldest_s, now, UP_MARGIN if index > self._now else 1.0):
                self._possible_since[index] = math.inf
                continue
            self._possible_since[index] = min(self._possible_since[index], since)
            if index <= self._now or now - self._possible_since[index] >= HOLD_S:
                allowed = index
        self._now = allowed
        return self._names[allowed]

    def _is_possible(self, name: str, rows: int, oldest_s: float, now: float, margin: float) -> bool:
        time, most = self.times[name].at(now), self.rows_of(name, now)
        busy = self._rate * time.seconds(most) / most
        drain_s = math.ceil(rows / most) * time.fixed_s + rows * time.row_s
        return busy <= margin * BUSY and oldest_s + drain_s <= margin * MARGIN * self.target_s

    def _follow_rate(self, now: float) -> None:
        if self._rate_at == -math.inf:
            self._rate_at = now
        passed = now - self._rate_at
        if passed > 0:
            share = 1.0 - math.exp(-passed / RATE_S)
            self._rate += share * (self._new / passed - self._rate)
            self._rate_at, self._new = now, 0
