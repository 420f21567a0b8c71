"""Several processes of this machine for one call, without a launcher: `matta train --processes 2`."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, start_processes

from matta.errors import MattaError, RunError, Terminated
from matta.training.interrupts import SIGNALS

_GRACE_S: Final = 60.0


def in_processes(function: Callable[[Any], Any], settings: Any, *, num_processes: int) -> Any:
    """What `function(settings)` gives in the first of several processes, which torch.distributed can join.

    Both must be picklable. Signals are passed on. With the first process that fails all end.

    Raises:
        BaseException: what a process ended with: an error of ours, KeyboardInterrupt, `Terminated`.
        RunError: a process died.
        ProcessRaisedException: a fault of the function, with its traceback, where no process ended as above.
    """
    with tempfile.TemporaryDirectory() as folder:
        return _in_processes(function, settings, num_processes, Path(folder))


def _in_processes(function: Callable[[Any], Any], settings: Any, num_processes: int, ends: Path) -> Any:
    shared = (function, settings, num_processes, _free_port(), sys.stdout is sys.stderr, ends)
    context = start_processes(_work, shared, nprocs=num_processes, join=False, daemon=False, start_method="spawn")
    died: ProcessExitedException | ProcessRaisedException | None = None
    with _passed_on([process.pid for process in context.processes]):
        try:
            while not context.join(grace_period=_GRACE_S):
                pass
        except (ProcessExitedException, ProcessRaisedException) as error:
            died = error
    found = {int(each.stem): pickle.loads(each.read_bytes()) for each in sorted(ends.glob("*.end"))}
    for each in found.values():
        if isinstance(each, BaseException):
            raise each
    if isinstance(died, ProcessRaisedException):
        raise died
    if died is not None:
        raise RunError(
            f"process {died.error_index} of {num_processes} died with exit code {died.exit_code}; see above for why, "
            f"and resume the run from its newest checkpoint"
        )
    return found[0]


def _work(
    rank: int, function: Callable[[Any], Any], settings: Any, count: int, port: int, to_stderr: bool, ends: Path
) -> None:
    """One of the processes; what it comes to is put into a file, which is whole or not there."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        with contextlib.redirect_stdout(sys.stderr) if to_stderr else contextlib.nullcontext():
            end = function(settings)
    except (MattaError, OSError, KeyboardInterrupt, Terminated) as error:
        end = error
    made = ends / f"{rank}.part"
    made.write_bytes(pickle.dumps(end))
    made.replace(made.with_suffix(".end"))
    if isinstance(end, BaseException):
        sys.exit(1)


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
