"""Settings of `matta serve` and `matta.serve`."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from matta.ab_testing.ab_settings import read_shares
from matta.errors import ServeError


def setting(default: Any, help: str, metavar: str | None = None) -> Any:
    """A field with what the command line says of it."""
    return field(default=default, metadata={"help": help, **({"metavar": metavar} if metavar else {})})


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """How sizes are served; each is an option of `matta serve`.

    Raises:
        ServeError: a number out of range, or a split without a log.
        AbError: a split that cannot be read.

    Example:
        >>> import matta
        >>> matta.ServeSettings(split="Student=0.9,TA=0.1", log="answers.jsonl").shares
        {'Student': 0.9, 'TA': 0.1}
    """

    host: str = setting("127.0.0.1", "address to listen on (default: 127.0.0.1, this machine alone)")
    port: int = setting(8000, "port; 0: any that is free (default: 8000)")
    name: str = setting("model", "the model's name in addresses (default: model)")
    size: str | None = setting(None, "the size for requests that name none (default: the best)")
    target_ms: float | None = setting(
        None, "answer within so many milliseconds, by smaller sizes under load; off by default"
    )
    max_batch: int = setting(64, "most rows of a batch, and of a request (default: 64)")
    max_wait_ms: float = setting(1.0, "most milliseconds that a request waits for others (default: 1)")
    max_queue: int = setting(4096, "rows that wait; more are turned away with status 503 (default: 4096)")
    timeout_s: float = setting(30.0, "seconds until a request is given up with status 504 (default: 30)")
    max_request_mb: float = setting(16.0, "largest request, in 2^20 bytes (default: 16)")
    drain_s: float = setting(1.0, "seconds between not being ready and the end, after SIGTERM (default: 1)")
    threads: int = setting(1, "threads of an operation on a CPU (default: 1)")
    device: str = setting("cpu", "where the models compute (default: cpu)")
    runtime: str = setting("torch", "torch (default): views of one copy of the weights; onnx: a session for each size")
    snapshots: Path | None = field(
        default=None,
        metadata={"help": "folder of matta.Snapshots: newer versions are swapped in", "metavar": "DIR"},
    )
    poll_s: float = setting(2.0, "seconds between two looks into the folder of snapshots (default: 2)")
    split: str | None = setting(
        None, "A/B test by request id: SIZE=SHARE,... or SIZE@VERSION=SHARE,... of the snapshots", "SHARES"
    )
    salt: str = setting("", "of the split: another one is another assignment")
    log: Path | None = field(
        default=None, metadata={"help": "JSON lines of answers and outcomes, for matta ab", "metavar": "FILE"}
    )

    def __post_init__(self) -> None:
        over = ("max_batch", "max_queue", "timeout_s", "max_request_mb", "poll_s", "threads")
        for name in (*over, *(["target_ms"] if self.target_ms is not None else [])):
            if not 0 < getattr(self, name) < math.inf:
                raise ServeError(f"received {name}={getattr(self, name)}; expected a number over 0")
        for name in ("max_wait_ms", "drain_s", "port"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ServeError(f"received {name}={getattr(self, name)}; expected zero or more")
        if self.port > 65535:
            raise ServeError(f"received port={self.port}; expected at most 65535")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ServeError(f"received name={self.name!r}; expected letters, digits, '-', '_' and '.'")
        if self.max_queue < self.max_batch:
            raise ServeError(f"received max_queue={self.max_queue}; expected at least max_batch={self.max_batch}")
        if self.runtime not in ("torch", "onnx"):
            raise ServeError(f"received runtime={self.runtime!r}; expected torch or onnx")
        if self.runtime == "onnx" and self.device != "cpu":
            raise ServeError(f"received runtime='onnx' and device={self.device!r}; expected the device cpu")
        if self.split is not None and self.target_ms is not None:
            raise ServeError("received split and target_ms; expected one of them: a test needs sizes that stay")
        if self.shares and self.log is None:
            raise ServeError("received a split without a log; expected a file for the answers: --log FILE")

    @property
    def shares(self) -> dict[str, float]:
        """The shares of the split by arm: a size, or SIZE@VERSION.

        Raises:
            AbError: it cannot be read.
        """
        return {} if self.split is None else read_shares(self.split)


@final
@dataclass(frozen=True, kw_only=True)
class ServeCommandSettings(ServeSettings):
    """Settings of `matta serve`: those of the server, and what it serves."""

    source: str = field(
        metadata={
            "help": "a run of matta train, or module:name of a matta.Serving or a function that gives one",
            "positional": True,
        }
    )
    family: Path | None = field(
        default=None,
        metadata={
            "help": "table of sizes (family.json): those on its fronts are served (default: that of the source)",
            "metavar": "FILE",
        },
    )
    last: bool = field(
        default=False,
        metadata={
            "help": "of a run of matta train: the logits of the last position alone, which is all that generation reads"
        },
    )
