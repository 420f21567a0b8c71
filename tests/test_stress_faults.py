"""Runs that are killed over and over, disks that fill up, bits that flip: what is left equals an undisturbed run.

All of it takes minutes: `make stress`.
"""

from __future__ import annotations

import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import distributed

from matta.errors import CheckpointError, RunError
from matta.training.processes import make_accelerator
from test_checkpoint_shares import fit
from test_fitting import Setup, assert_equal, batches, flip, free_port, noisy

pytestmark = pytest.mark.stress
STEPS, SLOW_S = 400, 0.01


class Slow:
    """An observer that takes its time, and notes that the run has begun."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def before_step(self, *_: object) -> None:
        made = self.mark.with_suffix(".part")
        made.write_text(str(os.getpid()))
        made.replace(self.mark)

    def after_step(self, cotrain: object) -> None:
        time.sleep(SLOW_S)

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        pass


def train(folder: str) -> None:
    """What the processes below do: a run, begun or resumed; one of several takes its share."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    setup = Setup()
    mark = Path(folder, f"began-{rank}")
    run = Path(folder, "run")
    setup.fit(batches() * 2, steps=STEPS, accumulate=2 // world, run=run, checkpoint_every=3, resume=True,
              observers=[Slow(mark)])  # fmt: skip
    torch.save(setup.state(), Path(folder, f"{rank}.pt"))


def train_sharded(folder: str) -> None:
    """What two processes do that have a pair divided among them."""
    make_accelerator()
    rank = distributed.get_rank()
    slow = Slow(Path(folder, f"began-{rank}"))
    torch.save(fit(Path(folder, "run"), STEPS, checkpoint_every=3, observers=[slow]), Path(folder, f"{rank}.pt"))


def started(folder: Path, *launcher: str, function: str = "train") -> subprocess.Popen[bytes]:
    script = folder / "script.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                      f"import test_stress_faults\ntest_stress_faults.{function}({str(folder)!r})\n")  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen([sys.executable, *launcher, str(script)], env=environment, stderr=subprocess.DEVNULL)


def undisturbed(folder: Path) -> dict[str, torch.Tensor]:
    whole = Setup()
    whole.fit(batches() * 2, steps=STEPS, accumulate=2, observers=[Slow(folder / "undisturbed")])
    return whole.state()


def killed_over_and_over(folder: Path, number: int, times: int, seed: int) -> list[int]:
    """Kill a run `times` times, at random moments after it has begun; the exit codes."""
    moments, codes = random.Random(seed), []
    for _ in range(times):
        (folder / "began-0").unlink(missing_ok=True)
        process = started(folder)
        while not (folder / "began-0").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        process.send_signal(number)
        codes.append(process.wait(timeout=60))
    process = started(folder)
    codes.append(process.wait(timeout=120))
    return codes


@pytest.mark.parametrize("seed", range(5))
def test_ten_sigkills_at_random_moments(seed: int, tmp_path: Path) -> None:
    codes = killed_over_and_over(tmp_path, signal.SIGKILL, 10, seed)
    assert codes == [-signal.SIGKILL] * 10 + [0]
    assert_equal(torch.load(tmp_path / "0.pt", weights_only=True), undisturbed(tmp_path))


@pytest.mark.parametrize("seed", range(2))
def test_ten_sigterms_at_random_moments(seed: int, tmp_path: Path) -> None:
    codes = killed_over_and_over(tmp_path, signal.SIGTERM, 10, seed)
    assert codes == [143] * 10 + [0]
    assert_equal(torch.load(tmp_path / "0.pt", weights_only=True), undisturbed(tmp_path))


def two_workers(folder: Path, function: str) -> subprocess.Popen[bytes]:
    return started(folder, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=10",
                   "--monitor-interval=0.1", f"--master-port={free_port()}", function=function)  # fmt: skip


@pytest.mark.parametrize("function", ["train", "train_sharded"])
def test_ten_kills_of_one_of_two_workers(function: str, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "killed")]
    for folder in folders:
        folder.mkdir()
    assert two_workers(folders[0], function).wait(timeout=300) == 0
    process, moments, killed = two_workers(folders[1], function), random.Random(7), set[str]()
    marks = [folders[1] / f"began-{rank}" for rank in range(2)]
    for _ in range(10):
        while not all(mark.exists() and mark.read_text() not in killed for mark in marks):
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        present = [mark.read_text() for mark in marks]
        os.kill(int(moments.choice(present)), signal.SIGKILL)
        killed |= set(present)
    assert process.wait(timeout=300) == 0
    for rank in range(2):
        assert_equal(*(torch.load(folder / f"{rank}.pt", weights_only=True) for folder in folders))


def test_a_disk_that_is_full_at_any_point_of_a_save(tmp_path: Path) -> None:
    Setup().fit(noisy(), steps=2, run=tmp_path / "measured", checkpoint_every=1)
    files = (tmp_path / "measured" / "checkpoint-00000002").iterdir()
    largest = max(each.stat().st_size for each in files)
    whole = Setup()
    whole.fit(noisy(), steps=6)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for point in range(20):
        run = tmp_path / f"full-{point}"
        Setup().fit(noisy(), steps=2, run=run, checkpoint_every=1)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest * point // 20, hard))
            with pytest.raises((RunError, OSError)):
                Setup().fit(noisy(), steps=6, run=run, checkpoint_every=1, resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        resumed = Setup()
        resumed.fit(noisy(), steps=6, run=run, checkpoint_every=1, resume=True, seed=1)
        assert_equal(resumed.state(), whole.state())


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_found(tmp_path: Path) -> None:
    Setup().fit(noisy(), steps=4, run=tmp_path / "run", checkpoint_every=2)
    whole = Setup()
    whole.fit(noisy(), steps=6)
    names = [each.name for each in (tmp_path / "run" / "checkpoint-00000004").iterdir()]
    assert len(names) == 4
    for name, both in itertools.product(names, [False, True]):
        run = tmp_path / f"{name}-{both}"
        shutil.copytree(tmp_path / "run", run)
        shutil.rmtree(run / "nested")
        flip(run / "checkpoint-00000004" / name)
        resumed = Setup()
        if both:
            flip(run / "checkpoint-00000002" / name)
            with pytest.raises(CheckpointError, match="no checkpoint in .* is whole"):
                resumed.fit(noisy(), steps=6, run=run, resume=True, seed=1)
            continue
        with pytest.warns(UserWarning, match="checkpoint-00000002, which is whole"):
            resumed.fit(noisy(), steps=6, run=run, resume=True, seed=1)
        assert_equal(resumed.state(), whole.state())
