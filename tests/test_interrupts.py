"""Signals let the step end, leave a checkpoint, and end the process with a code of their own."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from matta import cli
from matta.errors import Terminated
from test_fitting import Setup, Stopped, assert_equal, fail, free_port, shuffled, stop_at


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_the_step_and_leaves_a_checkpoint(name: str, tmp_path: Path) -> None:
    number = getattr(signal, name)
    whole, stopped, resumed = Setup(), Setup(), Setup()
    whole.fit(shuffled(), steps=9)
    stop_at(5, lambda: os.kill(os.getpid(), number))(stopped)
    with pytest.raises(Terminated, match="stopped after step 5; continue with resume=True") as ended:
        stopped.fit(shuffled(), steps=9, run=tmp_path / "run")
    assert ended.value.code == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL
    assert (tmp_path / "run" / "checkpoint-00000005").is_dir()
    assert resumed.fit(shuffled(), steps=9, run=tmp_path / "run", resume=True, seed=1).steps == 9
    assert_equal(resumed.state(), whole.state())


def test_a_second_signal_does_not_wait(tmp_path: Path) -> None:
    stopped = Setup()
    stop_at(5, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)])(stopped)
    with pytest.raises(Terminated, match="stopped within a step"):
        stopped.fit(shuffled(), steps=9, run=tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_handlers_of_ones_own_are_left_alone(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        ours = Setup()
        stop_at(2, lambda: os.kill(os.getpid(), signal.SIGTERM))(ours)
        assert ours.fit(shuffled(), steps=3, run=tmp_path / "run").steps == 3
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]


def test_the_command_line_ends_with_the_code(capsys: pytest.CaptureFixture[str]) -> None:
    ended = Terminated(signal.SIGTERM, "stopped after step 3;\nresume")
    command = cli.Command(words=("try",), summary="", settings="dataclasses:dataclass", run="", extra="")

    def end(*_: object, **__: object) -> None:
        raise ended

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_run", end)
        patch.setattr(cli, "_parser", lambda _: Parsed(command))
        assert cli.main(["try"]) == 143
    assert capsys.readouterr().err == "matta try: stopped after step 3; resume\n"


class Parsed:
    def __init__(self, command: cli.Command) -> None:
        self.command, self.json = command, False

    def parse_args(self, _: object) -> Parsed:
        return self


def work(rank: int, port: int, folder: Path) -> None:
    """A process of two, as srun starts them, of which the second has the signal."""
    torch.set_num_threads(1)
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}
    os.environ |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "77", "MASTER_PORT": str(port)}
    whole, stopped, resumed = Setup(), Setup(), Setup()
    whole.fit(shuffled(), steps=9)
    stop_at(5, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank else None)(stopped)
    with pytest.raises(Terminated, match="stopped after step 5"):
        stopped.fit(shuffled(), steps=9, run=folder / "run")
    resumed.fit(shuffled(), steps=9, run=folder / "run", resume=True)
    assert_equal(resumed.state(), whole.state())
    torch.distributed.destroy_process_group()


def test_a_signal_to_one_process_ends_all_after_the_same_step(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (free_port(), tmp_path), nprocs=2)
    assert (tmp_path / "run" / "checkpoint-00000005").is_dir()


def test_what_stops_a_run_first_waits_for_its_checkpoint(tmp_path: Path) -> None:
    stopped = Setup()
    stop_at(4, fail)(stopped)
    with pytest.raises(Stopped):
        stopped.fit(shuffled(), steps=9, run=tmp_path / "run", checkpoint_every=3)
    assert [each.name for each in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-00000003"]
