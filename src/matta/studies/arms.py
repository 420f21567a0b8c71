"""The arms of the relevance study and what is tried for each: as many trials for one as for another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Final, final

from matta.studies.training import Method, Optimizer, Trial

Rates = Mapping[Optimizer, tuple[float, ...]]

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


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """A row of the table: a way to train, and the trials among which its settings are chosen."""

    name: str
    title: str
    method: Method
    trials: tuple[Trial, ...]
    stored: Trial  # what the full study has chosen


def _baselines(rates: Rates) -> tuple[Trial, ...]:
    """Every optimizer with each of its rates."""
    return tuple(Trial(method="baseline", optimizer=name, lr=lr) for name, values in rates.items() for lr in values)


def _pairs(method: Method, rates: Rates) -> tuple[Trial, ...]:
    """Every optimizer with each of its rates and each mix of the losses."""
    return tuple(
        Trial(method=method, optimizer=name, lr=lr, student_weight=student, distill_weight=distill, ramp=ramp)
        for name, values in rates.items()
        for lr, (student, distill, ramp) in product(values, MIXES)
    )


ARMS: Final = (
    Arm(
        name="baseline",
        title="baseline alone",
        method="baseline",
        trials=_baselines(BASELINE_FIRST_ORDER),
        stored=Trial(method="baseline", optimizer="adam", lr=0.045),
    ),
    Arm(
        name="matta",
        title="MatTA",
        method="matta",
        trials=_pairs("matta", PAIR_FIRST_ORDER),
        stored=Trial(method="matta", optimizer="adam", lr=0.05, distill_weight=0.3, ramp=0.3),
    ),
    Arm(
        name="unshared",
        title="MatTA, embeddings alone shared",
        method="unshared",
        trials=_pairs("unshared", PAIR_FIRST_ORDER),
        stored=Trial(method="unshared", optimizer="adam", lr=0.065, distill_weight=0.5),
    ),
    Arm(
        name="shampoo_baseline",
        title="baseline with Shampoo",
        method="baseline",
        trials=_baselines(BASELINE_SHAMPOO),
        stored=Trial(method="baseline", optimizer="shampoo-adam", lr=0.04),
    ),
    Arm(
        name="shampoo_matta",
        title="MatTA with Shampoo",
        method="matta",
        trials=_pairs("matta", PAIR_SHAMPOO),
        stored=Trial(method="matta", optimizer="shampoo-adam", lr=0.03, distill_weight=0.5),
    ),
)
