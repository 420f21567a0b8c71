"""The study of language models as it is laid down: sizes, setting, arms and their trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, final

from matta_studies.experiment import Arm, Further, Plan, Training
from matta_studies.study_settings import LanguageSettings
from matta_studies.trials import BASELINE, Method, Trial
from matta_studies.tuning import Search

Place = Literal["first", "last", "even", "ends"]
PLACES: Final[tuple[Place, ...]] = ("first", "last", "even", "ends")
FIRST_FRESH_SEED: Final = 9100
SEARCH: Final = Search(seeds=(100, 101), num_finalists=2)
QUICK_SEARCH: Final = Search(seeds=(100,), num_trials=2, num_finalists=1)
MATTA, SHAMPOO, BOTH, FAMILY = "matta", "shampoo_baseline", "shampoo_matta", "family"
LONGER: Final[Mapping[str, str]] = {BASELINE: "baseline_longer", SHAMPOO: "shampoo_baseline_longer"}
TIMES_LONGER: Final = 2


@final
@dataclass(frozen=True, kw_only=True)
class GptSize:
    """Blocks, hidden width, width within the FFNs and heads."""

    layers: int
    width: int
    ffn: int
    heads: int

    def __str__(self) -> str:
        return f"{self.layers} layers, d_model {self.width}, FFN {self.ffn}, {self.heads} heads"


@final
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is equal for all arms: fixed before the fresh seeds were run (docs/log.md has the search)."""

    student: GptSize = field(default_factory=lambda: GptSize(layers=3, width=48, ffn=96, heads=3))
    ta: GptSize = field(default_factory=lambda: GptSize(layers=5, width=48, ffn=384, heads=3))
    context: int = 64
    batch: int = 8
    steps: int = 6400
    warm_up: int = 640
    init_std: float = 0.08

    @property
    def tokens(self) -> int:
        """Bytes of the windows that a run is trained on."""
        return self.steps * self.batch * self.context


@final
@dataclass(frozen=True, kw_only=True)
class GptTrial(Trial):
    """The highest rate falls to zero; `ramp` is the share of the run over which the distillation comes in.

    With `sampled`, one of the sub-models K = 0 ... N-1 is trained along at each step, and all are judged. `longer` is
    how many times the setting's steps are made.
    """

    ramp: float = 0.2
    place: Place = "even"
    sampled: bool = False
    longer: int = 1

    def told_ramp(self) -> str:
        return f", ramp {self.ramp:g}"


def _arm(name: str, title: str, method: Method, optimizer: str, rates: tuple[float, float, float]) -> Arm:
    """The rates lie around the best that the search found for a baseline, a step higher for a pair (docs/log.md)."""
    trials = tuple(GptTrial(method=method, optimizer=optimizer, lr=lr) for lr in rates)
    return Arm(name=name, title=title, trials=trials)


ARMS: Final = (
    _arm(BASELINE, "baseline alone, AdamW", "baseline", "adamw", (0.0035, 0.005, 0.0075)),
    _arm(MATTA, "MatTA, AdamW", "matta", "adamw", (0.005, 0.0075, 0.011)),
    _arm(SHAMPOO, "baseline alone, Shampoo", "baseline", "shampoo", (0.0075, 0.011, 0.016)),
    _arm(BOTH, "MatTA, Shampoo", "matta", "shampoo", (0.011, 0.016, 0.022)),
)


@final
@dataclass(frozen=True, kw_only=True)
class LanguagePlan(Plan):
    """What `LanguageSettings` asks for, spelled out.

    `num_family` is how many fresh seeds the family has, `num_further` the places in depth and the longer runs.
    """

    arms: tuple[Arm, ...] = ARMS
    setting: Setting = field(default_factory=Setting)
    first_seed: int = FIRST_FRESH_SEED
    search: Search | None = SEARCH
    num_family: int = 5
    num_further: int = 3

    @property
    def num_runs(self) -> int:
        """Training runs in all."""
        num_further = len(LONGER) + len(PLACES) - 1  # one place is the arm's own
        return (
            self.num_arm_runs + len(self.seeds[: self.num_family]) + num_further * len(self.seeds[: self.num_further])
        )

    def further(self, trainings: Mapping[str, Training]) -> Further:
        """The three further questions: other places in depth, a family trained along, and a longer run alone."""

        def changed(name: str, **changes: Any) -> Training:
            return replace(trainings[name], trial=replace(trainings[name].trial, **changes))

        places = {place: changed(BOTH, place=place) for place in PLACES if place != trainings[BOTH].trial.place}
        longer = {further: changed(name, longer=TIMES_LONGER) for name, further in LONGER.items()}
        asked = {name: (each, self.num_further) for name, each in (places | longer).items()}
        return asked | {FAMILY: (changed(BOTH, sampled=True), self.num_family)}


def plan_of(settings: LanguageSettings) -> LanguagePlan:
    """The plan behind the settings of the command line."""
    plan = LanguagePlan(num_seeds=settings.num_seeds)
    if not settings.quick:
        return plan
    small = Setting(steps=200, warm_up=20)
    return replace(plan, num_family=2, num_further=2, search=QUICK_SEARCH, setting=small)
