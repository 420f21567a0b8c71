"""Several processes of this machine for one call, without a launcher: `matta train --processes 2`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from matta.errors import MattaError, RunError, Terminated
from matta.training.interrupts import SIGNALS

_GRACE_S: Final = 60.0
_POLL_S: Final = 0.2


def in_processes(function: Callable[[Any], Any], settings: Any, *, num_processes: int) -> Any:
    """What `function(settings)` gives in the first of several processes, which torch.distributed can join.

    Both must be picklable. Signals are passed on. With the first process that fails all end.

    Raises:
        BaseException: what a process ended with: an error of ours, KeyboardInterrupt, `Terminated`.
        RunError: a process died.
    """
    queue = multiprocessing.get_context("spawn").Queue()
    shared = (function, settings, num_processes, _free_port(), sys.stdout is sys.stderr, queue)
    context = start_processes(_work, shared, nprocs=num_processes, join=False, daemon=False, start_method="spawn")
    found: dict[int, Any] = {}
    with _passed_on([process.pid for process in context.processes]):
        try:
            while not context.join(timeout=_POLL_S, grace_period=_GRACE_S):
                _drain(queue, found)
        except ProcessExitedException as error:
            ended = f"process {error.error_index} of {num_processes} died with exit code {error.exit_code}"
        else:
            ended = ""
    _drain(queue, found)
    failed = [each for each in found.values() if isinstance(each, BaseException)]
    if failed:
        raise failed[0]
    if ended:
        raise RunError(f"{ended}; see above for why, and resume the run from its newest checkpoint")
    return found.get(0)


def _work(
    rank: int, function: Callable[[Any], Any], settings: Any, count: int, port: int, to_stderr: bool, queue: Any
) -> None:
    """One of the processes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr) if to_stderr else contextlib.nullcontext():
            result = function(settings)
    except (MattaError, OSError, KeyboardInterrupt, Terminated) as error:
        queue.put((rank, error))
        sys.exit(1)
    queue.put((rank, result))


def _drain(queue: Any, found: dict[int, Any]) -> None:
    while not queue.empty():
        rank, value = queue.get()
        found[rank] = value


@contextlib.contextmanager
def _passed_on(processes: list[int]) -> Iterator[None]:
    """Signals to this process go to those; what a terminal sends to all they have twice, which they do not mind."""

    def send(number: int, _: object) -> None:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    before = {each: signal.signal(each, send) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
