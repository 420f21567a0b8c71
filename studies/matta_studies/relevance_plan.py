"""The study of relevance as it is laid down: its setting, its arms and their trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Any, Final, final

from matta_studies.experiment import Arm, Plan
from matta_studies.labelled_films import TupleSettings
from matta_studies.rankers import RankerSize
from matta_studies.study_settings import RelevanceSettings
from matta_studies.trials import BASELINE, Method, Trial
from matta_studies.tuning import Search

STUDENT_SIZE: Final = RankerSize(embedding=8, hidden=(32, 16))
FIRST_FRESH_SEED: Final = 8000
SEARCH: Final = Search(num_screening_seeds=2, num_finalists=4)
SHAMPOO_BASELINE, FAMILY_ARM = "shampoo_baseline", "shampoo_matta"


@final
@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is equal for all arms: fixed before the final seeds were run (docs/log.md has the search).

    For the ablations: another TA than `size.grown()`, the `place` of the Student's residual blocks in it (see
    `RankerSize`), and `others`, more Students in the same TA.
    """

    size: RankerSize = STUDENT_SIZE
    batch: int = 512
    passes: int = 1
    place: str = "first"
    ta: RankerSize | None = None
    others: tuple[RankerSize, ...] = ()

    @property
    def ta_size(self) -> RankerSize:
        """The TA's widths."""
        return self.ta or self.size.grown()

    def with_size(self, size: RankerSize) -> Setting:
        """The setting with another Student."""
        return replace(self, size=size)


@final
@dataclass(frozen=True, kw_only=True)
class RankerTrial(Trial):
    """The first rate falls to zero; `ramp` is the share of the run over which the distillation comes in.

    With `sampled`, a random mixture of wide and narrow layers is trained along at each step, so that every size
    between Student and TA is of use.
    """

    ramp: float = 0.1
    sampled: bool = False

    def told_ramp(self) -> str:
        return f", ramp {self.ramp:g}"


Rates = Mapping[str, tuple[float, ...]]
BASELINE_FIRST_ORDER: Final[Rates] = {
    "adam": (0.02, 0.03, 0.045, 0.06, 0.08, 0.1, 0.12, 0.14, 0.18),
    "rmsprop": (0.005, 0.01, 0.015, 0.02, 0.03, 0.04),
    "adagrad": (0.07, 0.1, 0.2, 0.3, 0.5, 0.7),
}
PAIR_FIRST_ORDER: Final[Rates] = {
    "adam": (0.03, 0.04, 0.05, 0.065),
    "rmsprop": (0.015, 0.03),
    "adagrad": (0.3,),
}
BASELINE_SHAMPOO: Final[Rates] = {
    "shampoo-adam": (0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05, 0.06, 0.07, 0.08, 0.1),
    "shampoo-adagrad": (0.03, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5),
}
PAIR_SHAMPOO: Final[Rates] = {
    "shampoo-adam": (0.015, 0.02, 0.03, 0.045, 0.06),
    "shampoo-adagrad": (0.1, 0.3),
}
MIXES: Final = ((1.0, 1.0, 0.1), (1.0, 0.5, 0.1), (1.0, 0.3, 0.3))  # (ω₁, ω₃, ramp), with each rate of a pair


def _arm(name: str, title: str, method: Method, rates: Rates, optimizer: str, lr: float, **stored: Any) -> Arm:
    """Every optimizer with each of its rates, and for a pair each mix of the losses; and the trial chosen before."""
    trial = partial(RankerTrial, method=method)
    mixes = MIXES if method != "baseline" else MIXES[:1]
    trials = tuple(
        trial(optimizer=each, lr=rate, student_weight=student, distill_weight=distill, ramp=ramp)
        for each, values in rates.items()
        for rate, (student, distill, ramp) in product(values, mixes)
    )
    return Arm(name=name, title=title, trials=trials, stored=trial(optimizer=optimizer, lr=lr, **stored))


ARMS: Final = (
    _arm(BASELINE, "baseline alone", "baseline", BASELINE_FIRST_ORDER, "adam", 0.045),
    _arm("matta", "MatTA", "matta", PAIR_FIRST_ORDER, "adam", 0.05, distill_weight=0.3, ramp=0.3),
    _arm("unshared", "MatTA, embeddings alone shared", "unshared", PAIR_FIRST_ORDER, "adam", 0.065, distill_weight=0.5),
    _arm(SHAMPOO_BASELINE, "baseline with Shampoo", "baseline", BASELINE_SHAMPOO, "shampoo-adam", 0.04),
    _arm(FAMILY_ARM, "MatTA with Shampoo", "matta", PAIR_SHAMPOO, "shampoo-adam", 0.03, distill_weight=0.5),
)


@final
@dataclass(frozen=True, kw_only=True)
class RelevancePlan(Plan):
    """What `RelevanceSettings` asks for, spelled out."""

    arms: tuple[Arm, ...] = ARMS
    setting: Setting = field(default_factory=Setting)
    first_seed: int = FIRST_FRESH_SEED
    search: Search | None = SEARCH
    tuples: TupleSettings = field(default_factory=TupleSettings)

    @property
    def num_runs(self) -> int:
        """Training runs in all."""
        return self.num_arm_runs + 1


def plan_of(settings: RelevanceSettings) -> RelevancePlan:
    """The plan behind the settings of the command line."""
    plan = RelevancePlan(num_seeds=settings.num_seeds)
    if settings.demo:
        return replace(plan, search=None)
    if settings.quick:
        few = Search(seeds=SEARCH.seeds[:1], num_trials=3)
        return replace(plan, search=few, tuples=TupleSettings(num_train=200_000, teacher_epochs=2))
    return plan
