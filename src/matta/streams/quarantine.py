"""The file of what was set aside: one JSON object a line."""

from __future__ import annotations

import json
import os
from math import isfinite
from pathlib import Path
from typing import IO, Any, final

from matta.errors import RunError
from matta.streams.chunks import Bad


@final
class Quarantine:
    """Rows and files that were set aside, each once, also when a run is killed and goes on.

    A run that goes on cuts off what was written after its checkpoint: the stream will come to it again. One
    that begins afresh moves an earlier file out of the way.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.num_rows, self.num_files, self._length = 0, 0, 0
        self._file: IO[bytes] | None = None

    def add(self, bad: Bad) -> None:
        """Set a row or file aside."""
        line = {"file": bad.file, "row": bad.row, "reason": bad.reason, "raw": _plain(bad.raw)}
        self._opened().write(json.dumps(line).encode() + b"\n")
        if bad.row is None:
            self.num_files += 1
        else:
            self.num_rows += 1

    def state_dict(self) -> dict[str, int]:
        """What is on disk, after it has been put there."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._length = self._file.tell()
        return {"length": self._length, "num_rows": self.num_rows, "num_files": self.num_files}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a state.

        Raises:
            RunError: the file has lost lines since then.
        """
        self.close()
        self.num_rows, self.num_files, self._length = state["num_rows"], state["num_files"], state["length"]
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < self._length:
            raise RunError(
                f"{self.path} has {size} bytes, and {self._length} when the run was saved; expected the file that the "
                f"run wrote: put it back"
            )

    def close(self) -> None:
        """Put everything on disk."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def begin(self) -> None:
        """Bring the file to the state."""
        if not self._length:
            self._rotate()
        elif self.path.stat().st_size > self._length:
            os.truncate(self.path, self._length)

    def _rotate(self) -> None:
        if not self.path.exists() or not self.path.stat().st_size:
            return
        number = 1
        while (moved := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.path.rename(moved)

    def _opened(self) -> IO[bytes]:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        return self._file


def _plain(value: Any) -> Any:
    """In JSON types; what has none is text."""
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "backslashreplace")
    is_json = value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and isfinite(value))
    return value if is_json else str(value)
