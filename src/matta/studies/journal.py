"""A study that was stopped goes on: the results of its training runs are kept until all are there."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from rich.console import Console

from matta.errors import RunError
from matta.studies.pool import Run

Job = TypeVar("Job")
Result = TypeVar("Result")

FORMAT: Final = "matta.journal 1"


def journal_of(out: Path) -> Path:
    """The journal of the study whose run folder will be `out`."""
    return out.with_name(f"{out.name}.journal")


@contextmanager
def kept(run_jobs: Run[Job, Result], out: Path, data: str, console: Console) -> Iterator[Run[Job, Result]]:
    """Runs jobs as `run_jobs` does, but for those that an earlier, stopped run of the same study has done.

    Results are written to the journal beside `out` as they come, by the `repr` of their jobs, which must say all that
    they depend on but the data. The journal is removed when the study is done. It is a pickle: keep none that others
    gave you.

    Args:
        run_jobs: Runs the jobs that are left.
        out: The run folder to be.
        data: Says which data is used.
        console: Told what is found, and what is left when the study is stopped.

    Raises:
        RunError: there is a journal of other data, another study or other versions.
    """
    path = journal_of(out)
    about = {"format": FORMAT, "data": data} | {name: version(name) for name in ("matta", "torch")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        known = _read(file, path, about)
        if known:
            console.print(f"Done before, in {path}: {len(known)} training runs", highlight=False)

        def run(jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
            left = []
            for job in jobs:
                if repr(job) in known:
                    yield job, known[repr(job)]
                else:
                    left.append(job)
            for job, result in run_jobs(left):
                known[repr(job)] = result
                _append(file, (repr(job), result))
                yield job, result

        try:
            yield run
        except BaseException:
            if known:
                console.print(
                    f"Kept: {len(known)} training runs. The same command with --out {out} goes on.", highlight=False
                )
            else:
                path.unlink()
            raise
    path.unlink()


def _read(file: BinaryIO, path: Path, about: dict[str, str]) -> dict[str, Any]:
    """The results in a journal, which begins with `about`; a last one that was not written whole is cut off."""
    file.seek(0)
    records, end = [], 0
    while True:
        try:
            records.append(pickle.load(file))
        except Exception:  # a pickle that was cut, or is none, raises what it likes
            break
        end = file.tell()
    if not records and file.seek(0, os.SEEK_END):
        raise RunError(f"{path} is no journal of a study, or is damaged; remove it, or name another --out")
    file.truncate(end)
    if not records:
        _append(file, about)
        return {}
    if records[0] != about:
        raise RunError(f"{path} is of {records[0]}; expected {about}: remove it, or name another --out")
    return dict(records[1:])


def _append(file: BinaryIO, record: object) -> None:
    pickle.dump(record, file)
    file.flush()
