"""Processes for one call: results, errors and signals come back as from one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from torch.multiprocessing.spawn import ProcessRaisedException

from matta.errors import RunError, Terminated
from matta.training.launching import in_processes


def work(what: str) -> dict[str, str]:
    """What each process does."""
    rank = os.environ["RANK"]
    if what == "refuse":
        raise RunError("there is no such recipe")
    if what == "fault":
        raise ZeroDivisionError("a fault of the function")
    if what == "die" and rank == "1":
        os._exit(7)
    if what.startswith("wait"):
        Path(what.removeprefix("wait "), rank).write_text("here")

        def end(number: int, _: object) -> None:
            raise Terminated(number, f"stopped in {rank}")

        signal.signal(signal.SIGTERM, end)
        time.sleep(60)
    return {"rank": rank, "of": os.environ["WORLD_SIZE"], "large": "x" * 300_000}


def test_the_result_is_that_of_the_first_process() -> None:
    found = in_processes(work, "result", num_processes=2)
    assert (found["rank"], found["of"], len(found["large"])) == ("0", "2", 300_000)


def test_an_error_is_raised_once_and_a_death_is_told() -> None:
    with pytest.raises(RunError, match="^there is no such recipe$"):
        in_processes(work, "refuse", num_processes=2)
    with pytest.raises(ProcessRaisedException, match="(?s)Traceback.*a fault of the function"):
        in_processes(work, "fault", num_processes=1)
    with pytest.raises(RunError, match="process 1 of 2 died with exit code 7; .* resume"):
        in_processes(work, "die", num_processes=2)


def test_signals_are_passed_on(tmp_path: Path) -> None:
    def send() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=send, daemon=True).start()
    with pytest.raises(Terminated) as ended:
        in_processes(work, f"wait {tmp_path}", num_processes=2)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
