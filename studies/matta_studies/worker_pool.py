"""Jobs on worker processes, each given with its result as it is done, and counted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

NUM_WORKERS = 2

Job = TypeVar("Job")
Data = TypeVar("Data")
Result = TypeVar("Result")


Run = Callable[[Iterable[Job]], Iterator[tuple[Job, Result]]]
"""Runs jobs, and gives each with its result as it is done."""


@contextmanager
def worker_processes(
    run_job: Callable[[Job, Data], Result], load: Callable[[Path], Data], path: Path
) -> Iterator[Run[Job, Result]]:
    """Runs jobs on two processes of one thread each, which have loaded the data from a file.

    Models this small gain nothing from more threads. Both functions are found by their names, so they belong to
    modules.
    """
    with ProcessPoolExecutor(NUM_WORKERS, get_context("spawn"), _start, (run_job, load, path)) as pool:
        yield lambda jobs: run_on(pool, _run, jobs)


@contextmanager
def counted(run_jobs: Run[Job, Result], total: int, console: Console) -> Iterator[Run[Job, Result]]:
    """`run_jobs` with a bar that shows how many of all the jobs of a study are done."""
    with progress_bar(console) as progress:
        task = progress.add_task("training runs", total=total)

        def run(jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
            for each in run_jobs(jobs):
                progress.advance(task)
                yield each

        yield run


def progress_bar(console: Console) -> Progress:
    """A bar with what is done, how much of it, and the time."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console)


_of_this_worker: list[tuple[Callable[[Any, Any], Any], Any]] = []


def _start(run_job: Callable[[Any, Any], Any], load: Callable[[Path], Any], path: Path) -> None:
    import torch

    torch.set_num_threads(1)
    _of_this_worker.append((run_job, load(path)))


def _run(job: Any) -> Any:
    run_job, data = _of_this_worker[0]
    return run_job(job, data)


def run_on(pool: Executor, function: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[tuple[Job, Result]]:
    """Every job with what `function` gives for it, in the order in which they end; what is left is cancelled.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> with ThreadPoolExecutor() as pool:
        ...     sorted(run_on(pool, abs, [-1, -2]))
        [(-2, 2), (-1, 1)]
    """
    futures = {pool.submit(function, job): job for job in jobs}
    try:
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        for future in futures:
            future.cancel()
