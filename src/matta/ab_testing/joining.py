"""Logs of answers and outcomes as arrays, joined by the id of the request.

Files are read line by line, and only numbers are kept: about 300 bytes for a request of one row, the join included, so
that a million requests take 0.3 GB. Ids are kept as hashes of 64 bits.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

from matta.ab_testing.traffic import Split
from matta.errors import DAMAGE, AbError

ENDINGS: Final = (".jsonl", ".json", ".parquet")


@final
@dataclass(frozen=True, kw_only=True)
class Joined:
    """Requests with an answer and an outcome, in the order in which both were there; then what was left out.

    The order matters: a later look sees the same requests and then further ones, as the intervals assume.
    """

    arms: tuple[str, ...]
    arm: NDArray[np.int64]  # of each request, an index into `arms`
    request: NDArray[np.int64]  # of each row, an index into the requests
    predictions: NDArray[np.float64]  # of each row
    outcomes: NDArray[np.float64]  # of each row
    answers: tuple[int, ...]  # of each arm, with an outcome or without
    latency_ms: tuple[float, ...]  # of each arm, the median over its answers
    shares: Mapping[str, float] | None  # as logged
    seconds: float  # from the first answer to the last
    num_answered_twice: int
    num_outcomes_twice: int
    num_without_answer: int  # outcomes
    num_of_other_length: int  # outcomes of another number than the predictions: left out
    num_unfinished: int  # files whose last line is damaged


def read_logs(logs: Sequence[Path], outcomes: Path | None = None) -> Joined:
    """Read logs, and join answers and outcomes by id.

    An id that is answered twice counts once, as first answered; outcomes likewise.

    Args:
        logs: Files of JSON lines or Parquet, or folders of them, with answers, outcomes or both.
        outcomes: A file or folder of outcomes alone, whose lines need no `kind` and no `time_s`.

    Raises:
        AbError: a file is missing or damaged elsewhere than in its last line, or nothing was answered.
    """
    read = _Reading()
    for path in _files(logs):
        read.file(path, "answer")
    for path in _files([] if outcomes is None else [outcomes]):
        read.file(path, "outcome")
    if not len(read.answers.keys):
        raise AbError(f"{', '.join(map(str, logs))} hold no answers; expected lines of an AnswerLog")
    return read.joined()


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        found = sorted(each for each in path.iterdir() if each.suffix in ENDINGS) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise AbError(f"there is no log in {path}; expected a file, or a folder of {', '.join(ENDINGS)}")
        yield from found


@final
@dataclass
class _Columns:
    """Answers or outcomes as they come: numbers alone."""

    keys: array[int] = field(default_factory=lambda: array("q"))
    positions: array[int] = field(default_factory=lambda: array("q"))
    times: array[float] = field(default_factory=lambda: array("d"))
    arms: array[int] = field(default_factory=lambda: array("i"))
    latencies: array[float] = field(default_factory=lambda: array("d"))
    lengths: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def first(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The distinct ids, and the first row of each by time."""
        times = np.nan_to_num(np.array(self.times), nan=np.inf)
        order = np.argsort(times, kind="stable")
        keys, first = np.unique(np.array(self.keys, dtype=np.int64)[order], return_index=True)
        return keys, order[first]

    def rows(self, chosen: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The values of some answers or outcomes, one after the other, and whose each is."""
        lengths = np.array(self.lengths, dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        counts = lengths[chosen]
        owners = np.repeat(np.arange(len(chosen)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return owners, np.array(self.values)[starts[chosen][owners] + within]


@final
class _Reading:
    """All files, into columns."""

    def __init__(self) -> None:
        self.answers, self.outcomes = _Columns(), _Columns()
        self.arms: dict[str, int] = {}
        self.shares: dict[str, float] | None = None
        self.num_lines, self.num_unfinished = 0, 0

    def file(self, path: Path, kind: str) -> None:
        records = _parquet_rows(path) if path.suffix == ".parquet" else self._lines(path)
        for number, record in records:
            try:
                self._take(record, kind)
            except DAMAGE as error:
                if isinstance(error, AbError):
                    raise
                told = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise AbError(f"{path}, line {number}: {told}; expected a line of an AnswerLog") from None

    def _lines(self, path: Path) -> Iterator[tuple[int, Any]]:
        """Each line with its number; a damaged one may only be the last: its server was killed, or writes just now."""
        damaged = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if damaged:
                    raise AbError(f"{path}, line {damaged}: not JSON; expected a line of an AnswerLog")
                try:
                    record = json.loads(line)
                except DAMAGE:
                    damaged = number
                    continue
                yield number, record
        self.num_unfinished += damaged > 0

    def _take(self, record: dict[str, Any], kind: str) -> None:
        kind = record.get("kind") or kind
        if kind == "split":
            self._take_split(record["shares"])
            return
        if kind not in ("answer", "outcome"):
            raise ValueError(f"kind {kind!r}")
        columns, name = (self.answers, "predictions") if kind == "answer" else (self.outcomes, "outcomes")
        if isinstance(record[name], str):  # "10" is no 1 and 0
            raise ValueError(f"{name} {record[name]!r}")
        values = [float(value) for value in record[name]]
        if not values or not all(map(math.isfinite, values)):
            raise ValueError(f"{name} {values}")
        key, arm = hash(str(record["id"])), record["arm"] if kind == "answer" else ""
        if not isinstance(arm, str):
            raise ValueError(f"arm {arm!r}")
        time_s, latency = (_number(record.get(each)) for each in ("time_s", "latency_ms"))
        columns.keys.append(key)
        columns.positions.append(self.num_lines)
        columns.times.append(time_s)
        columns.lengths.append(len(values))
        columns.values.extend(values)
        if kind == "answer":
            columns.arms.append(self.arms.setdefault(arm, len(self.arms)))
            columns.latencies.append(latency)
        self.num_lines += 1

    def _take_split(self, shares: Mapping[str, float]) -> None:
        split = dict(Split(shares).shares)
        if self.shares is not None and split != self.shares:
            raise AbError(
                f"the logs have two splits, {self.shares} and {split}; expected one: compare the logs of each apart, "
                f"or give --shares if only one of them answered"
            )
        self.shares = split

    def joined(self) -> Joined:
        answers, outcomes = self.answers, self.outcomes
        answered, first_answers = answers.first()
        known, first_outcomes = outcomes.first()
        both, at_answer, at_outcome = np.intersect1d(answered, known, assume_unique=True, return_indices=True)
        of_answer, of_outcome = first_answers[at_answer], first_outcomes[at_outcome]
        fits = np.array(answers.lengths)[of_answer] == np.array(outcomes.lengths)[of_outcome]
        of_answer, of_outcome = of_answer[fits], of_outcome[fits]
        order = _order(answers, of_answer, outcomes, of_outcome)
        of_answer, of_outcome = of_answer[order], of_outcome[order]
        request, predictions = answers.rows(of_answer)
        arm_of, latencies = np.array(answers.arms, dtype=np.int64), np.array(answers.latencies)
        names = sorted({*self.arms, *(self.shares or {})})
        renamed = np.array([names.index(name) for name in self.arms], dtype=np.int64)
        all_arms = renamed[arm_of[first_answers]]
        times = np.array(answers.times)[first_answers]
        return Joined(
            arms=tuple(names),
            arm=renamed[arm_of[of_answer]],
            request=request,
            predictions=predictions,
            outcomes=outcomes.rows(of_outcome)[1],
            answers=tuple(int((all_arms == arm).sum()) for arm in range(len(names))),
            latency_ms=tuple(_median(latencies[first_answers][all_arms == arm]) for arm in range(len(names))),
            shares=self.shares,
            seconds=float(np.ptp(times)) if np.isfinite(times).all() else math.nan,
            num_answered_twice=len(answers.keys) - len(answered),
            num_outcomes_twice=len(outcomes.keys) - len(known),
            num_without_answer=len(known) - len(both),
            num_of_other_length=int((~fits).sum()),
            num_unfinished=self.num_unfinished,
        )


def _order(
    answers: _Columns, of_answer: NDArray[np.int64], outcomes: _Columns, of_outcome: NDArray[np.int64]
) -> NDArray[np.int64]:
    """By the time at which both were there, then by place in the files."""
    times = np.fmax(np.array(answers.times)[of_answer], np.array(outcomes.times)[of_outcome])
    places = np.maximum(np.array(answers.positions)[of_answer], np.array(outcomes.positions)[of_outcome])
    return np.lexsort((places, np.nan_to_num(times, nan=np.inf)))


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _median(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Each row with its number, some thousand at a time in memory."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError:
        raise AbError(f"{path} needs pyarrow, which is not installed; pip install 'matta[stream]'") from None
    try:
        number = 0
        for batch in ParquetFile(path).iter_batches(batch_size=4096):
            for record in batch.to_pylist():
                number += 1
                yield number, record
    except (ArrowException, UnicodeDecodeError) as error:
        raise AbError(
            f"{path} is no Parquet file: {str(error).splitlines()[0]}; expected one, or JSON lines in a .jsonl file"
        ) from None
