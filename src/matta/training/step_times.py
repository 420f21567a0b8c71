"""Where the time of a run goes: seconds of the host in each part of a step."""

from __future__ import annotations

import time
from typing import Final, final

PARTS: Final = ("data", "forward", "backward", "optimizer", "observers", "evaluation", "checkpoint")


@final
class StepTimes:
    """A clock that is read after each part; the time since it was last read is that part's.

    On an accelerator the host runs ahead of the device: the device's time shows in the part that waits for it.

    Example:
        >>> times = StepTimes()
        >>> times.add("data")
        >>> times.add("optimizer")
        >>> shown = times.read()
        >>> sorted(shown)[0], "steps_per_second" in shown
        ('seconds_per_step/backward', True)
    """

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self._last = time.perf_counter()
        self._num_steps = 0

    def add(self, part: str) -> None:
        """The part is over; with that of the optimizer a step was made."""
        now = time.perf_counter()
        self._num_steps += part == "optimizer"
        self._seconds[part] += now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds of each part and the rate, as means over the steps since the last call."""
        total, num_steps = sum(self._seconds.values()), max(self._num_steps, 1)
        shown = {f"seconds_per_step/{part}": value / num_steps for part, value in self._seconds.items()}
        self._seconds, self._num_steps = dict.fromkeys(PARTS, 0.0), 0
        return {**shown, "steps_per_second": num_steps / total if total else 0.0}
