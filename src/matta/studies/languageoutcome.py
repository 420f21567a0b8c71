"""What the language study found: every comparison with its interval, in plain types."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final, final

from scipy.stats import spearmanr

from matta.studies.languagemodel import PLACES
from matta.studies.languagetraining import Scores, Setting, Trial
from matta.studies.statistics import difference, relative_change
from matta.studies.tuning import Tuned

BASELINE, MATTA, SHAMPOO, SHAMPOO_MATTA = "baseline", "matta", "shampoo_baseline", "shampoo_matta"
FAMILY: Final = "family"
LONGER: Final[Mapping[str, str]] = {BASELINE: "baseline_longer", SHAMPOO: "shampoo_baseline_longer"}
TIMES_LONGER: Final = 2
STUDENT, TA = "Student", "TA"

# figure: (arm, model), and the arm whose Student it is compared with, seed by seed
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "student_vs_baseline": (MATTA, STUDENT, BASELINE),
    "ta_vs_baseline": (MATTA, TA, BASELINE),
    "shampoo_student_vs_shampoo_baseline": (SHAMPOO_MATTA, STUDENT, SHAMPOO),
    "shampoo_ta_vs_shampoo_baseline": (SHAMPOO_MATTA, TA, SHAMPOO),
    "shampoo_baseline_vs_baseline": (SHAMPOO, STUDENT, BASELINE),
    "shampoo_student_vs_baseline": (SHAMPOO_MATTA, STUDENT, BASELINE),
}


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Scores by name and seed: of the arms, the places, the family and the longer runs; and how arms were tuned."""

    titles: Mapping[str, str]
    setting: Setting
    source: str
    tuned: Mapping[str, Tuned[Trial]]
    scores: Mapping[str, Sequence[Scores]]

    def bits(self, name: str, model: str = STUDENT) -> list[float]:
        """Bits per byte of the test part by seed."""
        if model == STUDENT:
            return [each.student["test"] for each in self.scores[name]]
        return [each.ta["test"] for each in self.scores[name] if each.ta is not None]

    def against(self, values: Sequence[float], reference: str) -> dict[str, Any]:
        """The difference from an arm's Student with the same seeds, in bits per byte and in percent."""
        others = self.bits(reference)[: len(values)]
        bits, percent = difference(values, others), relative_change(values, others)
        return {
            "bpb": bits.mean,
            "interval": bits.interval,
            "percent": percent.percent,
            "percent_interval": percent.interval,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON gives back as they are."""
        found: dict[str, Any] = {}
        for name, (arm, model, reference) in CHANGES.items():
            change = self.against(self.bits(arm, model), reference)
            found |= {f"{name}_{key}": value for key, value in change.items()}
        found |= self._family()
        found |= {
            "num_seeds": len(self.scores[BASELINE]),
            "arms": {name: self._arm(name) for name in self.titles},
            "places": self._places(),
            "places_num_seeds": self._num_place_seeds,
            "room": {name: self._room(name) for name in LONGER},
            "tried": {name: _tried(each) for name, each in self.tuned.items()},
            "setting": dataclasses.asdict(self.setting) | {"source": self.source, "tokens": self.setting.tokens},
        }
        return json.loads(json.dumps(found, allow_nan=False))

    def _arm(self, name: str) -> dict[str, Any]:
        """An arm's figures: of each model the bits per byte by seed."""
        first = self.scores[name][0]
        models = (STUDENT,) if first.ta is None else (STUDENT, TA)
        best = self.tuned[name].best
        return {
            "title": self.titles[name],
            "chosen": dataclasses.asdict(best) | {"told": str(best)},
            "models": {
                model: {
                    "mean": fmean(self.bits(name, model)),
                    "seeds": self.bits(name, model),
                    "parameters": first.num_parameters[model],
                }
                for model in models
            },
        }

    @property
    def _num_place_seeds(self) -> int:
        return min(len(self.scores[place]) for place in PLACES if place in self.scores)

    def _places(self) -> dict[str, Any]:
        """Where the Student sits in depth: Student and TA against the baseline, all with Shampoo, the same seeds."""
        used = self.tuned[SHAMPOO_MATTA].best.place
        names = {place: SHAMPOO_MATTA if place == used else place for place in PLACES}
        count = self._num_place_seeds
        bits = {
            (place, model): self.bits(name, model)[:count] for place, name in names.items() for model in (STUDENT, TA)
        }
        return {
            place: {
                model: {"mean": fmean(bits[place, model])} | self.against(bits[place, model], SHAMPOO)
                for model in (STUDENT, TA)
            }
            for place in names
        }

    def _family(self) -> dict[str, Any]:
        """The sub-models, each against the baseline with Shampoo; and whether more of the TA is better."""
        runs = [each.family for each in self.scores[FAMILY]]
        columns = list(zip(*runs, strict=True))
        rows = [
            {"k": column[0].k, "parameters": column[0].parameters, "mean": fmean(each.bpb for each in column)}
            | self.against([each.bpb for each in column], SHAMPOO)
            for column in columns
        ]
        ks = [row["k"] for row in rows]
        by_seed = [float(spearmanr(ks, [-each.bpb for each in run]).statistic) for run in runs]
        student = self.bits(FAMILY)
        return {
            "family": rows,
            "family_baseline": fmean(self.bits(SHAMPOO)[: len(runs)]),
            "family_student": {"mean": fmean(student)} | self.against(student, SHAMPOO),
            "family_rank_correlation": float(spearmanr(ks, [-row["mean"] for row in rows]).statistic),
            "family_rank_correlation_by_seed": by_seed,
            "family_ahead_of_baseline": all(row["interval"][1] < 0 for row in rows),
            "family_num_seeds": len(runs),
        }

    def _room(self, name: str) -> dict[str, Any]:
        """How much better the same Student alone becomes in a longer run."""
        longer = LONGER[name]
        bits = self.bits(longer)
        return {"times_longer": TIMES_LONGER, "mean": fmean(bits)} | self.against(bits, name)


def _tried(tuned: Tuned[Trial]) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(trial), "validation_bpb": list(losses)} for trial, losses in tuned.tried]
