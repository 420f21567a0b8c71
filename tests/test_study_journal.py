"""The journal of a study: what was done before is not done again, and nothing else is believed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from rich.console import Console

from matta.errors import RunError
from matta_studies.journal import journal_of, kept
from matta_studies.worker_pool import Run


@dataclass(frozen=True)
class Square:
    of: int


class Stopped(Exception):
    """What ends a study in these tests."""


def squares(ran: list[int], stop_at: int | None = None) -> Run[Square, int]:
    def run_jobs(jobs: Iterable[Square]) -> Iterator[tuple[Square, int]]:
        for job in jobs:
            if job.of == stop_at:
                raise Stopped
            ran.append(job.of)
            yield job, job.of**2

    return run_jobs


def study(out: Path, ran: list[int], *, stop_at: int | None = None, data: str = "numbers") -> dict[Square, int]:
    """A study of two stages."""
    with kept(squares(ran, stop_at), out, data, Console(quiet=True)) as run_jobs:
        found = dict(run_jobs([Square(1), Square(2)]))
        return found | dict(run_jobs([Square(3), Square(4)]))


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    """The run folder of a study that was stopped after three of four jobs."""
    out = tmp_path / "runs" / "squares"
    with pytest.raises(Stopped):
        study(out, [], stop_at=4)
    return out


def test_a_study_that_is_done_leaves_no_journal(tmp_path: Path) -> None:
    ran: list[int] = []
    assert study(tmp_path / "out", ran) == {Square(n): n * n for n in (1, 2, 3, 4)}
    assert ran == [1, 2, 3, 4] and not list(tmp_path.iterdir())


def test_a_stopped_study_goes_on_where_it_was(stopped: Path) -> None:
    ran: list[int] = []
    assert study(stopped, ran) == {Square(n): n * n for n in (1, 2, 3, 4)}
    assert ran == [4] and not journal_of(stopped).exists()


def test_it_may_be_stopped_again(stopped: Path) -> None:
    with pytest.raises(Stopped):
        study(stopped, [], stop_at=4)
    ran: list[int] = []
    study(stopped, ran)
    assert ran == [4]


@pytest.mark.parametrize("cut", [1, 5])
def test_a_result_that_was_not_written_whole_is_made_again(stopped: Path, cut: int) -> None:
    journal = journal_of(stopped)
    journal.write_bytes(journal.read_bytes()[:-cut])
    with pytest.raises(Stopped):
        study(stopped, [], stop_at=4)
    ran: list[int] = []
    assert study(stopped, ran)[Square(3)] == 9
    assert ran == [4]


def test_results_of_other_data_are_refused(stopped: Path) -> None:
    with pytest.raises(RunError, match="squares.journal is of .*numbers.*; expected .*primes.*: remove it, or name"):
        study(stopped, [], data="primes")
    ran: list[int] = []
    study(stopped, ran)
    assert ran == [4]


def test_what_is_no_journal_is_left_alone(tmp_path: Path) -> None:
    journal = journal_of(tmp_path / "out")
    journal.write_text("my diary")
    with pytest.raises(RunError, match=r"out.journal is no journal of a study, or is damaged; remove it"):
        study(tmp_path / "out", [])
    assert journal.read_text() == "my diary"


def test_a_study_stopped_before_anything_was_done_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        study(tmp_path / "out", [], stop_at=1)
    assert not list(tmp_path.iterdir())


def test_what_is_kept_is_said(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    out = tmp_path / "out"
    with pytest.raises(Stopped), kept(squares([], 2), out, "numbers", console) as run_jobs:
        list(run_jobs([Square(1), Square(2)]))
    with kept(squares([]), out, "numbers", console) as run_jobs:
        list(run_jobs([Square(1), Square(2)]))
    told = console.export_text()
    assert f"Kept: 1 training runs. The same command with --out {out} resumes." in told
    assert f"Done before, in {out}.journal: 1 training runs" in told


@pytest.mark.parametrize("left", [b'["Square(of=3)", ', b"\x00\xff\n"])
def test_a_last_line_that_a_crash_left_is_dropped_and_that_is_said(stopped: Path, left: bytes) -> None:
    console, journal = Console(record=True, width=200), journal_of(stopped)
    whole = journal.read_bytes()
    journal.write_bytes(whole + left)
    with pytest.raises(Stopped), kept(squares([], 4), stopped, "numbers", console) as run_jobs:
        list(run_jobs([Square(4)]))
    assert f"Dropped the last line of {journal}" in console.export_text()
    assert journal.read_bytes() == whole


def test_a_journal_that_is_damaged_in_the_middle_is_refused(stopped: Path) -> None:
    lines = journal_of(stopped).read_bytes().splitlines(keepends=True)
    damaged = b"".join([*lines[:2], b"{\n", *lines[3:]])
    journal_of(stopped).write_bytes(damaged)
    with pytest.raises(RunError, match="is damaged; remove it"):
        study(stopped, [])
    assert journal_of(stopped).read_bytes() == damaged


def test_a_journal_is_lines_of_json(stopped: Path) -> None:
    about, *records = [json.loads(line) for line in journal_of(stopped).read_text().splitlines()]
    assert about["data"] == "numbers" and records == [[f"Square(of={n})", n * n] for n in (1, 2, 3)]
