"""Settings of `matta ab`, apart from its module so that `matta --help` need not load numpy."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, final

from matta.errors import AbError

METRICS: Final = ("log_loss", "auc_loss", "calibration", "rate", "squared_error")
PREDICTIONS: Final = ("logit", "probability", "value")
TUNED_FOR: Final = 10_000
_SHARE: Final = re.compile(r"\s*(.+?)\s*=([^,=]*)(?:,|$)")


@final
@dataclass(frozen=True, kw_only=True)
class AbSettings:
    """Settings of `matta ab`.

    Raises:
        AbError: an unknown metric or kind of predictions, or a number out of range.
    """

    logs: tuple[Path, ...] = field(
        metadata={"help": "logs: JSON lines, Parquet, or folders of them", "positional": True, "metavar": "LOG"}
    )
    outcomes: Path | None = field(
        default=None, metadata={"help": "a file or folder of outcomes (default: they are in the logs)"}
    )
    metric: str = field(default="log_loss", metadata={"help": f"{', '.join(METRICS)} (default: log_loss)"})
    control: str | None = field(
        default=None, metadata={"help": "the arm that the others are compared with (default: the first by name)"}
    )
    shares: str | None = field(
        default=None,
        metadata={"help": "shares of the arms, as in A=0.9,B=0.1 (default: as logged, or equal)", "metavar": "SHARES"},
    )
    alpha: float = field(default=0.05, metadata={"help": "chance of a false alarm over all looks (default: 0.05)"})
    margin: float | None = field(
        default=None, metadata={"help": "a difference too small to matter: stop when none is larger"}
    )
    predictions: str = field(default="logit", metadata={"help": "logit (default), probability or value"})
    tuned_for: int = field(
        default=TUNED_FOR,
        metadata={"help": f"requests at which the interval is narrowest; fix it beforehand (default: {TUNED_FOR:,})"},
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be compared."""
        check_choices(self.metric, self.predictions, self.alpha, self.margin, self.tuned_for)

    def told_shares(self) -> dict[str, float] | None:
        """The shares by arm.

        Raises:
            AbError: they are not written as A=0.9,B=0.1.
        """
        return None if self.shares is None else read_shares(self.shares)


def check_choices(metric: str, predictions: str, alpha: float, margin: float | None, tuned_for: int) -> None:
    """Refuse what cannot be compared.

    Raises:
        AbError: an unknown metric or kind of predictions, or a number out of range.
    """
    for name, value, known in (("metric", metric, METRICS), ("predictions", predictions, PREDICTIONS)):
        if value not in known:
            raise AbError(f"{name}={value!r}; expected one of: {', '.join(known)}")
    if metric == "log_loss" and predictions == "value":
        raise AbError("log_loss needs logits or probabilities, and the predictions are values; try squared_error")
    ranges: tuple[tuple[str, float | None, Callable[[float], bool], str], ...] = (
        ("alpha", alpha, lambda value: 0 < value < 1, "between 0 and 1"),
        ("margin", margin, lambda value: 0 < value < float("inf"), "over zero"),
        ("tuned_for", tuned_for, lambda value: value >= 1, "of 1 or more"),
    )
    for name, number, is_right, told in ranges:
        if number is not None and not is_right(number):
            raise AbError(f"{name}={number}; expected a number {told}")


def read_shares(written: str) -> dict[str, float]:
    """The shares by arm, of "A=0.9,B=0.1"; names may hold commas.

    Raises:
        AbError: they are written otherwise.

    Example:
        >>> read_shares("wide: 0, 2=0.5, TA=0.5")
        {'wide: 0, 2': 0.5, 'TA': 0.5}
    """
    found: dict[str, float] = {}
    at = 0
    while at < len(written):
        match = _SHARE.match(written, at)
        share = _number(match[2]) if match else None
        if match is None or share is None:
            raise AbError(
                f"received the shares {written!r}; expected an arm and a number each, as in Student=0.9,TA=0.1"
            )
        found[match[1]] = share
        at = match.end()
    return found


def _number(written: str) -> float | None:
    try:
        return float(written)
    except ValueError:
        return None
