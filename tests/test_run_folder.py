"""Run folders: one writer, checkpoints written beside training, faults of the disk told in one line."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch

from matta.errors import RunError
from matta.training import run_folder
from matta.training.plain_state import read_state
from matta.training.run_folder import RunFolder
from test_fitting import Setup, assert_equal, batches, stop_at


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    def try_another() -> None:
        with pytest.raises(RunError, match="run is in use: another process trains there"):
            Setup().fit(batches(), steps=5, run=tmp_path / "run", resume=True)

    ours = Setup()
    stop_at(3, try_another)(ours)
    assert ours.fit(batches(), steps=4, run=tmp_path / "run").steps == 4
    assert Setup().fit(batches(), steps=5, run=tmp_path / "run", resume=True).steps == 5


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    may_write, write = threading.Event(), run_folder.save_file

    def slowly(*arguments: Any) -> None:
        assert may_write.wait(30)
        write(*arguments)

    monkeypatch.setattr(run_folder, "save_file", slowly)
    whole, ours, resumed = Setup(), Setup(), Setup()
    whole.fit(batches(), steps=5)
    stop_at(5, may_write.set)(ours)  # the checkpoint of step 3 is not written before step 5
    ours.fit(batches(), steps=5, run=tmp_path / "run", checkpoint_every=3)
    assert_equal(ours.state(), whole.state())
    monkeypatch.undo()
    for left in (tmp_path / "run").glob("checkpoint-00000005/*"):
        left.unlink()
    (tmp_path / "run" / "checkpoint-00000005").rmdir()
    resumed.fit(batches(), steps=5, run=tmp_path / "run", resume=True, seed=1)
    assert_equal(resumed.state(), whole.state())


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_full_disk_is_told_and_costs_no_earlier_checkpoint(
    at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, write = [], run_folder.save_file

    def until_full(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(run_folder, "save_file", until_full)
    remedy = "begin afresh" if at == 1 else f"resume from checkpoint-0000000{2 * at - 2}"
    with pytest.raises(
        RunError, match=f"could not be written to .*run: .*No space left on device; mend that, and {remedy}"
    ):
        Setup().fit(batches(), steps=6, run=tmp_path / "run", checkpoint_every=2)
    assert not list((tmp_path / "run").glob(".checkpoint*"))
    whole, resumed = Setup(), Setup()
    whole.fit(batches(), steps=6)
    resumed.fit(batches(), steps=6, run=tmp_path / "run", resume=True)
    assert_equal(resumed.state(), whole.state())


def test_batches_whose_loss_is_not_finite_are_put_aside(tmp_path: Path) -> None:
    x, y = batches()[0]
    bad = (torch.full_like(x, torch.inf), y)
    with pytest.raises(RunError, match="not finite in 2 steps in a row, 2 to 3 .*: the batches are in .*nonfinite"):
        Setup().fit([(x, y), bad, bad], steps=3, run=tmp_path / "run", max_nonfinite=2)
    folder = tmp_path / "run" / "nonfinite"
    assert sorted(each.stem for each in folder.glob("*.json")) == ["step-00000002-process-0", "step-00000003-process-0"]
    found = read_state(folder, "step-00000002-process-0")["batches"][0]
    assert torch.equal(found[0], bad[0]) and torch.equal(found[1], y)


def test_a_run_of_another_version_is_told(tmp_path: Path) -> None:
    (tmp_path / "fit.json").write_text('{"format": "matta.fit", "version": 7}')
    with pytest.raises(
        RunError, match=r'says {"format": "matta.fit", "version": 7}, .* resume the run with the version'
    ):
        RunFolder(tmp_path, resume=True)


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Setup().fit(batches(), steps=1, run=tmp_path / "file" / "run")


def test_a_moved_run_is_resumed(tmp_path: Path) -> None:
    whole, resumed = Setup(), Setup()
    whole.fit(batches(), steps=5)
    Setup().fit(batches(), steps=3, run=tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    resumed.fit(batches(), steps=5, run=tmp_path / "moved", resume=True)
    assert_equal(resumed.state(), whole.state())


def test_copies_of_checkpoints_are_the_user_s_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Setup().fit(batches(), steps=4, run=run, checkpoint_every=1)
    for name in ("checkpoint-00000004-keep", "checkpoint-00000002.bak"):
        shutil.copytree(run / "checkpoint-00000004", run / name)
    (run / "checkpoint-00000099").write_text("no folder")
    assert Setup().fit(batches(), steps=9, run=run, checkpoint_every=1, resume=True).steps == 9
    kept = [f"checkpoint-{name}" for name in ("00000002.bak", "00000004-keep", "00000007", "00000008", "00000009")]
    assert sorted(each.name for each in run.glob("checkpoint-*")) == [*kept, "checkpoint-00000099"]


def test_the_newest_checkpoint_is_that_of_the_last_step(tmp_path: Path) -> None:
    folder, ours = RunFolder(tmp_path / "run", resume=False), Setup()
    folder.begin()
    steps = [99_999_998, 99_999_999, 100_000_000, 100_000_001]  # names of eight digits and of nine
    for step in steps:
        folder.save(step, ours.cotrain, {"step": step})
    folder.close()
    assert [each.name for each in folder.checkpoints()] == [f"checkpoint-{step:08d}" for step in steps[1:]]


def test_the_best_is_a_number(tmp_path: Path) -> None:
    def judged(*values: float) -> Callable[[object], dict[str, float]]:
        given = iter(values)
        return lambda nested: {"auroc": next(given)}

    ours = Setup()
    settings = {"run": tmp_path / "run", "evaluate_every": 1, "best": ("auroc", "max")}
    result = ours.fit(batches(), steps=4, evaluate=judged(nan, 0.5, 0.75, nan), **settings)
    assert (result.best.step, result.best.values) == (3, {"auroc": 0.75})
    settings |= {"best": ("loss", "min"), "resume": "prolong"}
    result = Setup().fit(batches(), steps=5, evaluate=lambda nested: {"loss": 1.0}, **settings)
    assert (result.best.step, result.best.values) == (5, {"loss": 1.0})
