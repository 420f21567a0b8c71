"""Settings of the studies, apart from the studies so that `matta --help` need not load torch.

Each field is an option of the command line; `metadata["help"]` is its line of help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from matta.errors import RunError


def _seeds(default: str) -> dict[str, str]:
    return {"help": f"fresh seeds for the final table (default: {default})"}


def _out(study: str) -> dict[str, str]:
    told = f"new folder for results (default: runs/{study}-<date>); that of a study that was stopped: it goes on"
    return {"help": told, "metavar": "DIR"}


def _require_two(seeds: int | None) -> None:
    """Refuse a number of seeds that gives no interval.

    Raises:
        RunError: fewer than two.
    """
    if seeds is not None and seeds < 2:
        raise RunError(f"seeds={seeds}: expected at least 2, since a confidence interval needs two")


@final
@dataclass(frozen=True, kw_only=True)
class RelevanceSettings:
    """Settings of `matta study relevance`.

    Example:
        >>> RelevanceSettings(demo=True).num_seeds
        8

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two), or both `quick` and `demo`.
    """

    quick: bool = field(default=False, metadata={"help": "a small version, under two minutes"})
    demo: bool = field(default=False, metadata={"help": "stored tuned settings instead of the search"})
    seeds: int | None = field(default=None, metadata=_seeds("20; --demo: 8; --quick: 2"))
    out: Path | None = field(default=None, metadata=_out("relevance"))

    def __post_init__(self) -> None:
        """Refuse settings that cannot work together."""
        if self.quick and self.demo:
            raise RunError("quick and demo were both asked for; choose one of them")
        _require_two(self.seeds)

    @property
    def num_seeds(self) -> int:
        """Seeds of the final table, the default resolved."""
        if self.seeds is not None:
            return self.seeds
        return 2 if self.quick else 8 if self.demo else 20


@final
@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """Settings of `matta study quality`.

    Example:
        >>> QualitySettings(quick=True).num_seeds
        3

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two), a negative warm-up, or an unknown stream.
    """

    stream: str = field(default="flights", metadata={"help": "flights or ratings (default: flights)"})
    quick: bool = field(default=False, metadata={"help": "a small version, under two minutes"})
    seeds: int | None = field(default=None, metadata=_seeds("16; --quick: 3"))
    warm_up: int = field(default=0, metadata={"help": "steps until the constant rates are reached (default: 0)"})
    out: Path | None = field(default=None, metadata=_out("quality"))

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        _require_two(self.seeds)
        if self.warm_up < 0:
            raise RunError(f"warm_up={self.warm_up}: expected a number of steps, 0 or more")
        if self.stream not in ("flights", "ratings"):
            raise RunError(f"stream={self.stream!r}: expected flights or ratings")

    @property
    def num_seeds(self) -> int:
        """Seeds of the final table, the default resolved."""
        if self.seeds is not None:
            return self.seeds
        return 3 if self.quick else 16


@final
@dataclass(frozen=True, kw_only=True)
class AblationsSettings:
    """Settings of `matta study ablations`.

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two), or an unknown study.
    """

    quick: bool = field(default=False, metadata={"help": "two seeds and no tuning: under ten minutes"})
    seeds: int | None = field(default=None, metadata=_seeds("6 of each variant; --quick: 2"))
    study: str = field(default="both", metadata={"help": "relevance, quality or both (default)"})
    out: Path | None = field(default=None, metadata=_out("ablations"))

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        _require_two(self.seeds)
        if self.study not in ("both", "relevance", "quality"):
            raise RunError(f"study={self.study!r}: expected both, relevance or quality")


@final
@dataclass(frozen=True, kw_only=True)
class LanguageSettings:
    """Settings of `matta study language`.

    Example:
        >>> LanguageSettings(quick=True).num_seeds
        2

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two).
    """

    quick: bool = field(default=False, metadata={"help": "a small version, under two minutes"})
    seeds: int | None = field(default=None, metadata=_seeds("8; --quick: 2"))
    out: Path | None = field(default=None, metadata=_out("language"))

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        _require_two(self.seeds)

    @property
    def num_seeds(self) -> int:
        """Seeds of the final table, the default resolved."""
        if self.seeds is not None:
            return self.seeds
        return 2 if self.quick else 8
