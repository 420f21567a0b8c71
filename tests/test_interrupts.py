"""Signals let the step end, leave a checkpoint, and end the process with a code of their own."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset

from matta import cli
from matta.errors import Terminated
from matta.training.interrupts import SIGNALS
from test_fitting import Pair, Setup, Stopped, assert_equal, batches, fail, free_port, shuffled, stop_at, worked


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


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_workers_leave_signals_to_the_process_that_trains(name: str, tmp_path: Path) -> None:
    """Launchers and terminals send theirs to all processes of a group."""
    whole, stopped, resumed = Setup(), Setup(), Setup()
    whole.fit(worked(), steps=9)
    number = getattr(signal, name)

    def send_to_all() -> None:
        for process in [*(each.pid for each in multiprocessing.active_children()), os.getpid()]:
            os.kill(process, number)

    data = worked()
    stop_at(3, send_to_all)(stopped)
    with pytest.raises((KeyboardInterrupt, Terminated), match="stopped after step 3; continue with resume=True"):
        stopped.fit(data, steps=9, run=tmp_path / "run")
    assert data.worker_init_fn is None
    resumed.fit(worked(), steps=9, run=tmp_path / "run", resume=True, seed=1)
    assert_equal(resumed.state(), whole.state())


class Handlers(Dataset[Pair]):
    """Examples that are 1 where whoever loads them passes all signals by, and 0 elsewhere."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Pair:
        is_deaf = all(signal.getsignal(each) is signal.SIG_IGN for each in SIGNALS)
        return torch.full((6,), float(is_deaf)), torch.tensor(float(torch.initial_seed() == 7))


@pytest.mark.parametrize("is_wrapped", [False, True])
def test_workers_of_any_loader_pass_signals_by(is_wrapped: bool, tmp_path: Path) -> None:
    seen: list[Pair] = []
    loader = DataLoader(Handlers(), batch_size=4, num_workers=1, worker_init_fn=lambda worker: torch.manual_seed(7))
    data = Accelerator(cpu=True).prepare_data_loader(loader) if is_wrapped else loader
    for settings in ({}, {"run": tmp_path / "run"}):
        ours = Setup()
        ours.cotrain.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        ours.fit(data, **settings)
    assert [float(x.sum()) for x, _ in seen] == [0, 0, 24, 24]  # without a folder nothing waits for a checkpoint
    assert all(bool(y.all()) for _, y in seen), "the worker_init_fn of one's own is called too"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_signal_that_ends_what_reads_the_data_leaves_a_checkpoint(accumulate: int, tmp_path: Path) -> None:
    def ended_while_reading() -> Iterator[Pair]:
        yield from batches()[:3]
        os.kill(os.getpid(), signal.SIGTERM)
        raise ConnectionError("the process that reads has had the signal too")

    stopped, whole, resumed = Setup(), Setup(), Setup()
    where = "after step 3" if accumulate == 1 else "within a step"
    with pytest.raises(Terminated, match=f"stopped {where}; continue with resume=True") as ended:
        stopped.fit(ended_while_reading(), steps=5, run=tmp_path / "run", accumulate=accumulate)
    assert ended.value.code == 143
    if accumulate == 1:
        whole.fit(batches(), steps=5)
        resumed.fit(batches(), steps=5, run=tmp_path / "run", resume=True, seed=1)
        assert_equal(resumed.state(), whole.state())


def test_a_signal_in_the_last_evaluation_finds_a_checkpoint(tmp_path: Path) -> None:
    """All steps are made before it, and it may take long."""

    def judge(nested: object) -> dict[str, float]:
        raise KeyboardInterrupt

    ours, whole = Setup(), Setup()
    with pytest.raises(KeyboardInterrupt):
        ours.fit(batches(), steps=4, run=tmp_path / "run", evaluate=judge)
    whole.fit(batches(), steps=4)
    resumed = Setup()
    result = resumed.fit(batches(), steps=4, run=tmp_path / "run", resume=True, evaluate=lambda nested: {"loss": 1.0})
    assert [each.step for each in result.evaluations] == [4]
    assert_equal(resumed.state(), whole.state())
    again = Setup().fit(batches(), steps=4, run=tmp_path / "run", resume=True, evaluate=lambda nested: {"loss": 2.0})
    assert again.evaluations == result.evaluations
