"""Run folders: one writer, checkpoints written beside training, faults of the disk told in one line."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import matta
from matta.errors import CheckpointError, RunError
from matta.sizes import saving
from matta.training import plain_state, run_folder
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


def test_a_run_that_changes_its_working_directory_stays_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    ours = Setup()
    stop_at(3, lambda: os.chdir("elsewhere"))(ours)
    ours.fit(batches(), steps=5, run="run", checkpoint_every=2)
    assert {each.name for each in (tmp_path / "run").glob("*0*")} == {f"checkpoint-0000000{step}" for step in (2, 4, 5)}
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_without(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert Setup().fit(batches(), steps=3, run=tmp_path / "run").steps == 3
    assert not run_folder.is_in_use(tmp_path / "run")
    assert Setup().fit(batches(), steps=4, run=tmp_path / "run", resume=True).steps == 4


@pytest.mark.parametrize("moved", [True, False])
def test_a_folder_that_is_moved_or_removed_is_made_again(moved: bool, tmp_path: Path) -> None:
    def take_away() -> None:
        while not (tmp_path / "run" / "checkpoint-00000003").is_dir():  # a thread writes it
            time.sleep(0.01)
        (tmp_path / "run").rename(tmp_path / "moved")
        if not moved:
            shutil.rmtree(tmp_path / "moved")

    whole, ours = Setup(), Setup()
    whole.fit(batches(), steps=9)
    stop_at(5, take_away)(ours)
    with pytest.warns(UserWarning, match="run has been moved or removed while the run trains; it is made again"):
        ours.fit(batches(), steps=6, run=tmp_path / "run", checkpoint_every=3)
    for name in ("run", "moved") if moved else ("run",):
        resumed = Setup()
        resumed.fit(batches(), steps=9, run=tmp_path / name, resume=True, seed=1)
        assert_equal(resumed.state(), whole.state())


def test_a_folder_that_has_become_a_file_is_one_error(tmp_path: Path) -> None:
    def become_a_file() -> None:
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").write_text("")

    ours = Setup()
    stop_at(2, become_a_file)(ours)
    with (
        pytest.warns(UserWarning, match="made again"),
        pytest.raises(RunError, match="run cannot be made again: .*File"),
    ):
        ours.fit(batches(), steps=6, run=tmp_path / "run")


def test_a_link_to_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(RunError, match="link is a link to .*gone, which is not there; make that folder first"):
        Setup().fit(batches(), steps=1, run=tmp_path / "link")
    (tmp_path / "gone").mkdir()
    assert Setup().fit(batches(), steps=1, run=tmp_path / "link").steps == 1


def test_what_a_killed_run_has_half_written_is_cleared_away_and_what_it_had_is_put_back(tmp_path: Path) -> None:
    run = tmp_path / "run"
    judged = {"evaluate": lambda nested: {"loss": 1.0}, "best": ("loss", "min")}
    Setup().fit(batches(), steps=2, run=run, **judged)
    for name in (".best-a1", ".nested-b2", ".checkpoint-00000004-c3", ".best-old-d4"):
        (run / name).mkdir()
    (run / "best").rename(run / ".best-old-d4" / "old")  # killed before the new one took its place
    Setup().fit(batches(), steps=3, run=run, resume=True, **judged)
    assert not list(run.glob(".*"))
    matta.load(run / "best", Setup().nested)


FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize("what", ["best", "nested"])
def test_a_disk_that_is_full_for_a_nesting_is_told_in_words(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError(FULL)

    name = "save_file" if what == "best" else "write_weights"
    settings = {"run": tmp_path / "run", "evaluate": lambda nested: {"loss": 1.0}, "evaluate_every": 2}
    with monkeypatch.context() as patch:
        patch.setattr(saving, name, full)
        with pytest.raises(
            CheckpointError, match=f"{what} could not be written: .*No space left.*; mend that, and write"
        ):
            Setup().fit(batches(), steps=4, best=("loss", "min"), **settings)
    assert Setup().fit(batches(), steps=4, best=("loss", "min"), resume=True, **settings).steps == 4


def test_batches_that_cannot_be_put_aside_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, file: Path, **_: object) -> None:
        file.write_bytes(b"half")
        raise SafetensorError(FULL)

    def check(*_: object) -> None:
        monkeypatch.setattr(plain_state, "save_file", write)

    x, y = batches()[0]
    write = plain_state.save_file
    monkeypatch.setattr(plain_state, "save_file", full)
    ours = Setup()
    stop_at(3, check)(ours)  # checkpoints can be written again
    assert ours.fit([(x * nan, y), *batches()], steps=4, run=tmp_path / "run").num_skipped == 1
    assert not list((tmp_path / "run" / "nonfinite").iterdir())
