"""The results of a study's training runs, kept until all are there: a study that was stopped resumes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

from rich.console import Console

from matta.errors import DAMAGE, RunError
from matta_studies.worker_pool import Run

Job = TypeVar("Job")
Result = TypeVar("Result")

FORMAT: Final = "matta.journal 2"


def journal_of(out: Path) -> Path:
    """The journal of the study whose run folder will be `out`."""
    return out.with_name(f"{out.name}.journal")


@contextmanager
def kept(run_jobs: Run[Job, Result], out: Path, data: str, console: Console) -> Iterator[Run[Job, Result]]:
    """Runs jobs as `run_jobs` does, but for those that an earlier, stopped run of the same study has done.

    Results, which are plain JSON values, are written to the journal beside `out` as they come: a line each, by the
    `repr` of their jobs, which must say all that they depend on but the data. The journal is removed when the study is
    done.

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
        known = _read(file, path, about, console)
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
                _append(file, [repr(job), result])
                yield job, result

        try:
            yield run
        except BaseException:
            if known:
                told = f"Kept: {len(known)} training runs. The same command with --out {out} resumes."
                console.print(told, highlight=False)
            else:
                path.unlink()
            raise
    path.unlink()


def _read(file: BinaryIO, path: Path, about: dict[str, str], console: Console) -> dict[str, Any]:
    """The results in a journal, whose first line is `about`; a last line that was not written whole is cut off."""
    file.seek(0)
    lines = file.read().splitlines(keepends=True)
    records = [record for line in lines if (record := _record(line)) is not None]
    damaged = len(lines) - len(records)
    if damaged > 1 or (damaged and (not records or _record(lines[-1]) is not None)):
        raise RunError(f"{path} is no journal of a study, or is damaged; remove it, or name another --out")
    if damaged:
        console.print(f"Dropped the last line of {path}, which is not whole", highlight=False)
        file.truncate(sum(len(line) for line in lines[:-1]))
    if not records:
        _append(file, about)
        return {}
    if records[0] != about:
        raise RunError(f"{path} is of {records[0]}; expected {about}: remove it, or name another --out")
    try:
        return dict(records[1:])
    except DAMAGE as error:
        raise RunError(f"{path} is damaged: {error}; remove it, or name another --out") from None


def _record(line: bytes) -> Any:
    """What a line says, or None if it was not written whole."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except DAMAGE:
        return None


def _append(file: BinaryIO, record: object) -> None:
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()
