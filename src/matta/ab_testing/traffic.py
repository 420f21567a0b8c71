"""Which request goes to which arm, and the log of what was answered and what came of it."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Self, final

from matta.errors import AbError, require_kind

try:
    import fcntl
except ImportError:  # Windows: one process to a log is then up to the user
    fcntl = None  # type: ignore[assignment]

_HASHES: Final = 2**64
_BLOCK: Final = 2**16
_BEGINNING: Final = b'{"kind": "'  # of each line


@final
@dataclass(frozen=True)
class Split:
    """Arms and their shares of the traffic; the arm of a request follows from its id alone.

    The id and the salt are hashed (BLAKE2b), so every server gives a request the same arm, now and after a restart.
    The order of the arms does not matter. Another salt draws anew, independently: take one for each experiment.

    Args:
        shares: A positive weight for each arm; they are divided by their sum.
        salt: The name of the experiment.

    Raises:
        AbError: no arm, or a share that is not over zero.
        MattaError: shares that are no mapping.

    Example:
        >>> from matta.ab_testing import Split
        >>> split = Split(shares={"Student": 1, "TA": 3}, salt="experiment 1")
        >>> split.shares
        {'Student': 0.25, 'TA': 0.75}
        >>> [split.arm(f"request {k}") for k in range(4)]
        ['TA', 'TA', 'Student', 'Student']
    """

    shares: Mapping[str, float]
    salt: str = ""

    def __post_init__(self) -> None:
        require_kind("shares", self.shares, Mapping, "a share for each arm, such as {'Student': 0.5, 'TA': 0.5}")
        if not self.shares:
            raise AbError("received no shares; expected at least one arm, such as {'Student': 0.5, 'TA': 0.5}")
        bad = {arm: share for arm, share in self.shares.items() if not (math.isfinite(share) and share > 0)}
        if bad:
            raise AbError(f"received shares {bad}; expected finite numbers over zero, or no such arm")
        total = math.fsum(self.shares.values())
        object.__setattr__(self, "shares", {arm: float(share / total) for arm, share in sorted(self.shares.items())})

    def arm(self, request_id: str) -> str:
        """The arm of a request.

        Raises:
            MattaError: the id is no text.
        """
        require_kind("the id", request_id, str, "text, such as str(id): it is hashed, here and on other servers")
        salt = self.salt.encode()
        digest = blake2b(b"%d:%b" % (len(salt), salt) + request_id.encode(), digest_size=8).digest()
        place = int.from_bytes(digest, "big") / _HASHES
        end = 0.0
        for arm, share in self.shares.items():
            end += share
            if place < end:
                return arm
        return arm  # the sum of the shares may be a rounding below 1


@final
class AnswerLog:
    """A file of JSON lines: what was answered to each request, by which arm, and what came of it.

    Each line is written at once and as a whole, also with several threads. If a process was killed while it wrote, the
    next one cuts off the unfinished line. One process writes to a file: give each server its own, in one folder.

    Args:
        path: The file; lines are appended. Its folder is made.
        split: Written as a line too, so that `matta ab` knows the shares. Without one it expects equal shares.

    Raises:
        AbError: another AnswerLog has the file open, or it holds something else.

    Example:
        >>> import tempfile
        >>> from matta.ab_testing import AnswerLog
        >>> path = f"{tempfile.mkdtemp()}/answers.jsonl"
        >>> with AnswerLog(path) as log:
        ...     log.answer("r1", arm="TA", model="ta", version=3, predictions=[0.5], latency_ms=2.0, time_s=10.0)
        ...     log.outcome("r1", outcomes=[1.0], time_s=60.0)
        >>> print(open(path).read().splitlines()[1])
        {"kind": "outcome", "id": "r1", "outcomes": [1.0], "time_s": 60.0}
    """

    def __init__(self, path: str | os.PathLike[str], *, split: Split | None = None) -> None:
        self._path, self._split = Path(path), split
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._file = open(self._path, "a+b", buffering=0)  # noqa: SIM115 - open as long as the log
        try:
            self._require_alone()
            _mend_end(self._file, self._path)
            if split is not None:
                self._write({"kind": "split", "shares": dict(split.shares), "salt": split.salt, "time_s": time.time()})
        except BaseException:
            self._file.close()
            raise

    def answer(
        self,
        request_id: str,
        *,
        arm: str,
        model: str,
        version: int | str,
        predictions: Sequence[float],
        latency_ms: float,
        time_s: float | None = None,
    ) -> None:
        """Log what was answered: one prediction to each row of the request.

        Args:
            request_id: What `Split.arm` was asked with; an id that is answered twice counts once.
            arm: Of the split.
            model: Which model answered.
            version: Which version of it.
            predictions: Logits of a binary model, unless `matta ab --predictions` tells otherwise.
            latency_ms: How long it took.
            time_s: Seconds since 1970 (default: now).

        Raises:
            AbError: no predictions, one that is not finite, an arm that the split lacks, or the log is closed.
            MattaError: an id that is no text.
        """
        if self._split is not None and arm not in self._split.shares:
            raise AbError(f"received the arm {arm!r}; expected one of the split: {', '.join(self._split.shares)}")
        values = self._numbers("predictions", request_id, predictions)
        line = {"kind": "answer", "id": request_id, "arm": arm, "model": model, "version": version}
        self._write(line | {"predictions": values, "latency_ms": float(latency_ms), "time_s": _or_now(time_s)})

    def outcome(self, request_id: str, *, outcomes: Sequence[float], time_s: float | None = None) -> None:
        """Log what came of a request, once, before or after its answer: one outcome to each prediction.

        Raises:
            AbError: no outcomes, one that is not finite, or the log is closed.
            MattaError: an id that is no text.
        """
        values = self._numbers("outcomes", request_id, outcomes)
        self._write({"kind": "outcome", "id": request_id, "outcomes": values, "time_s": _or_now(time_s)})

    def close(self) -> None:
        """Close the file; what was logged is there already."""
        with self._lock:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _numbers(self, name: str, request_id: str, values: Sequence[float]) -> list[float]:
        require_kind("the id", request_id, str, "text, as Split.arm was asked with")
        try:
            if isinstance(values, str):
                raise TypeError
            numbers = [float(each) for each in values]
        except (TypeError, ValueError, OverflowError):
            raise AbError(f"received {name}={values!r:.100}; expected a number for each row, in a list") from None
        if not numbers or not all(map(math.isfinite, numbers)):
            raise AbError(f"received {name}={numbers} for {request_id!r}; expected one finite number or more")
        return numbers

    def _write(self, line: dict[str, Any]) -> None:
        encoded = memoryview(json.dumps(line).encode() + b"\n")
        with self._lock:
            if self._file.closed:
                raise AbError(f"{self._path} is closed; expected an open AnswerLog")
            while encoded:  # the system may take a part only
                encoded = encoded[self._file.write(encoded) :]

    def _require_alone(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AbError(
                f"{self._path} is being written by another AnswerLog; expected a file of its own for each process, "
                f"such as answers-0.jsonl and answers-1.jsonl in one folder"
            ) from None


def _or_now(time_s: float | None) -> float:
    return time.time() if time_s is None else float(time_s)


def _mend_end(file: Any, path: Path) -> None:
    """Cut off a line that was begun and not finished."""
    end = file.seek(0, os.SEEK_END)
    kept, tail = end, b""
    while kept and b"\n" not in tail:
        start = max(0, kept - _BLOCK)
        file.seek(start)
        tail = file.read(kept - start)
        kept = start + tail.rfind(b"\n") + 1 if b"\n" in tail else start
    file.seek(kept)
    if kept == end:
        return
    if not _BEGINNING.startswith(begun := file.read(len(_BEGINNING))):
        raise AbError(f"{path} ends in {begun!r}..., which is no line of an AnswerLog; expected another file")
    file.truncate(kept)
