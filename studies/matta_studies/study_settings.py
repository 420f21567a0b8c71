"""Settings of the studies, apart from the studies so that `matta --help` need not load torch.

Each field is an option of the command line; `metadata["help"]` is its line of help.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, final

from matta.errors import RunError


def _seeds(default: str) -> dict[str, str]:
    return {"help": f"fresh seeds for the final table (default: {default})"}


def _quick(told: str = "a small version, under two minutes") -> dict[str, str]:
    return {"help": told}


@dataclass(frozen=True, kw_only=True)
class StudySettings:
    """What the settings of all studies have in common; each study tells its own defaults."""

    QUICK_SEEDS: ClassVar[int] = 2
    SEEDS: ClassVar[int]

    quick: bool = field(default=False, metadata=_quick())
    seeds: int | None = None
    out: Path | None = field(
        default=None,
        metadata={
            "help": "new folder for results (default: runs/<study>-<date>); that of a stopped study: resume it",
            "metavar": "DIR",
        },
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        if self.seeds is not None and self.seeds < 2:
            raise RunError(f"seeds={self.seeds}: expected at least 2, since a confidence interval needs two")

    @property
    def num_seeds(self) -> int:
        """Seeds of the final table, the default resolved."""
        return self.seeds or (self.QUICK_SEEDS if self.quick else self.SEEDS)


@final
@dataclass(frozen=True, kw_only=True)
class RelevanceSettings(StudySettings):
    """Settings of `matta study relevance`.

    Example:
        >>> RelevanceSettings(demo=True).num_seeds
        8

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two), or both `quick` and `demo`.
    """

    SEEDS = 20
    DEMO_SEEDS: ClassVar[int] = 8

    seeds: int | None = field(default=None, metadata=_seeds("20; --demo: 8; --quick: 2"))
    demo: bool = field(default=False, metadata={"help": "stored tuned settings instead of the search"})

    def __post_init__(self) -> None:
        """Refuse settings that cannot work together."""
        super().__post_init__()
        if self.quick and self.demo:
            raise RunError("quick and demo were both asked for; choose one of them")

    @property
    def num_seeds(self) -> int:
        """Seeds of the final table, the default resolved."""
        return self.seeds or (self.DEMO_SEEDS if self.demo else super().num_seeds)


@final
@dataclass(frozen=True, kw_only=True)
class QualitySettings(StudySettings):
    """Settings of `matta study quality`.

    Example:
        >>> QualitySettings(quick=True).num_seeds
        3

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two), a negative warm-up, or an unknown stream.
    """

    SEEDS = 16
    QUICK_SEEDS = 3

    seeds: int | None = field(default=None, metadata=_seeds("16; --quick: 3"))
    stream: str = field(default="flights", metadata={"help": "flights or ratings (default: flights)"})
    warm_up: int = field(default=0, metadata={"help": "steps until the constant rates are reached (default: 0)"})
    longer: bool = field(default=False, metadata={"help": "also a Student alone that takes more steps for each batch"})

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        if self.warm_up < 0:
            raise RunError(f"warm_up={self.warm_up}: expected a number of steps, 0 or more")
        if self.stream not in ("flights", "ratings"):
            raise RunError(f"stream={self.stream!r}: expected flights or ratings")


@final
@dataclass(frozen=True, kw_only=True)
class AblationsSettings(StudySettings):
    """Settings of `matta study ablations`.

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two), or an unknown study.
    """

    SEEDS = 6

    quick: bool = field(default=False, metadata=_quick("two seeds and no tuning: under ten minutes"))
    seeds: int | None = field(default=None, metadata=_seeds("6 of each variant; --quick: 2"))
    study: str = field(default="both", metadata={"help": "relevance, quality or both (default)"})

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        if self.study not in ("both", "relevance", "quality"):
            raise RunError(f"study={self.study!r}: expected both, relevance or quality")


@final
@dataclass(frozen=True, kw_only=True)
class LanguageSettings(StudySettings):
    """Settings of `matta study language`.

    Example:
        >>> LanguageSettings(quick=True).num_seeds
        2

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two).
    """

    SEEDS = 8

    seeds: int | None = field(default=None, metadata=_seeds("8; --quick: 2"))


@final
@dataclass(frozen=True, kw_only=True)
class RankingSettings(StudySettings):
    """Settings of `matta study ranking`.

    Example:
        >>> RankingSettings().num_seeds
        16

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two).
    """

    SEEDS = 16

    seeds: int | None = field(default=None, metadata=_seeds("16; --quick: 2"))


@final
@dataclass(frozen=True, kw_only=True)
class ComputeSettings(StudySettings):
    """Settings of `matta study compute`.

    Raises:
        RunError: Fewer than two seeds (a confidence interval needs two), unknown data or regime, or no examples.
    """

    SEEDS = 8

    quick: bool = field(default=False, metadata=_quick("a small version, under four minutes"))
    seeds: int | None = field(default=None, metadata=_seeds("8; --quick: 2"))
    data: str = field(default="films", metadata={"help": "films, flights or text (default: films)"})
    short: str = field(default="compute", metadata={"help": "what is short: compute (default) or data"})
    examples: int | None = field(
        default=None, metadata={"help": "training examples where data are short (default: the task's own)"}
    )

    def __post_init__(self) -> None:
        """Refuse settings that cannot work."""
        super().__post_init__()
        if self.data not in ("films", "flights", "text"):
            raise RunError(f"data={self.data!r}: expected films, flights or text")
        if self.short not in ("compute", "data"):
            raise RunError(f"short={self.short!r}: expected compute or data")
        if self.examples is not None and self.examples < 1:
            raise RunError(f"examples={self.examples}: expected 1 or more")


@final
@dataclass(frozen=True, kw_only=True)
class PreconditionerSettings:
    """Settings of `matta figure preconditioner`.

    Raises:
        RunError: a side that is neither of the two.
    """

    run: Path = field(metadata={"help": "folder of a run with Shampoo", "positional": True})
    layer: str = field(metadata={"help": "a matrix of the TA, such as mlp.2.weight", "metavar": "NAME"})
    side: str = field(default="output", metadata={"help": "which channels: output or input"})
    out: Path | None = field(default=None, metadata={"help": "the picture (default: in the run)", "metavar": "FILE"})

    def __post_init__(self) -> None:
        """Refuse an unknown side."""
        if self.side not in ("output", "input"):
            raise RunError(f"side={self.side!r}: expected output or input")
