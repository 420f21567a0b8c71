"""Signals that wait for the end of a step, so that a checkpoint is written before the run leaves.

| signal | from | the run ends with | exit code |
|---|---|---|---|
| SIGINT | Ctrl-C | KeyboardInterrupt | 130 |
| SIGTERM | a scheduler that takes the machine back | `Terminated` | 143 |
| SIGUSR1 | SLURM's warning (`--signal=USR1@120`) | `Terminated` | 138 |
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, final

from torch.utils.data import DataLoader

from matta.errors import Terminated

SIGNALS: Final = tuple(
    found for name in ("SIGINT", "SIGTERM", "SIGUSR1") if (found := getattr(signal, name, None)) is not None
)
_DEFAULTS: Final = (signal.SIG_DFL, signal.default_int_handler)


@final
class Interrupt:
    """Takes note of signals that have no handler of their own, from `with` on.

    A second signal does not wait, where there is one process: launchers of several repeat theirs.
    """

    def __init__(self, *, enabled: bool, is_alone: bool = True) -> None:
        is_main = threading.current_thread() is threading.main_thread()
        free = [each for each in SIGNALS if signal.getsignal(each) in _DEFAULTS] if enabled and is_main else []
        self._before: dict[int, Any] = {each: signal.getsignal(each) for each in free}
        self._is_alone = is_alone
        self.came: int | None = None

    def __enter__(self) -> Interrupt:
        for each in self._before:
            signal.signal(each, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    @contextmanager
    def left_to_this_process(self, data: Any) -> Iterator[None]:
        """Workers of a DataLoader that begin inside pass the signals by, which launchers and terminals send to all.

        They would end at once, and with them the step.
        """
        loader = getattr(data, "base_dataloader", data)  # of one that Accelerate has wrapped
        if not (self._before and isinstance(loader, DataLoader) and loader.num_workers):
            yield
            return
        before = loader.worker_init_fn
        loader.worker_init_fn = _Unheard(tuple(self._before), before)
        try:
            yield
        finally:
            loader.worker_init_fn = before

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.came is not None and self._is_alone:
            raise ended_by(number, "stopped within a step; the run continues from its newest checkpoint")
        self.came = number


@final
class _Unheard:
    """How a worker begins that passes signals by; a class, since spawned workers have it pickled."""

    def __init__(self, signals: tuple[int, ...], then: Callable[[int], None] | None) -> None:
        self._signals, self._then = signals, then

    def __call__(self, worker: int) -> None:
        for each in self._signals:
            signal.signal(each, signal.SIG_IGN)
        if self._then is not None:
            self._then(worker)


def ended_by(number: int, message: str) -> BaseException:
    """What a run that a signal ends raises."""
    return KeyboardInterrupt(message) if number == signal.SIGINT else Terminated(number, message)


def restated(ended: BaseException, message: str) -> BaseException:
    """The exception that ends a run, with another message."""
    return ended_by(getattr(ended, "signal_number", signal.SIGINT), message)
