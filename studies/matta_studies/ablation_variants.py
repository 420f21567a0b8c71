"""What the ablations compare: ways to train, each one change away from a reference of the two case studies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Final, Literal, final

from matta_studies.quality_plan import StreamSetting, StreamTrial
from matta_studies.rankers import RankerSize
from matta_studies.relevance_plan import RankerTrial, Setting
from matta_studies.tuning import Search

BASELINE, MATTA, SHAMPOO, BOTH = "baseline", "matta", "shampoo", "matta_shampoo"
TA_ALONE, DEPTH_ALONE, DEPTH_WIDER = "ta_alone", "depth_alone", "depth_wider"
WEIGHTS: Final = (0.0, 0.3, 1.0, 3.0)
RAMPS: Final = (0.0, 0.1, 0.3, 0.6)  # shares of the run
TA_FACTORS: Final = (1.5, 2.0, 8.0)  # of hidden widths; the reference has 4
PLACES: Final = ("first", "last", "even", "ends")
EXTRA_BLOCKS: Final = 2
STREAM_STEPS: Final = 1316  # of a run: 336,776 flights in batches of 256
RATE_FACTORS: Final = (2 / 3, 1.0, 3 / 2)


@final
@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The kind of a `Lesson`; `of` names the variant whose way to train the Teacher has."""

    kind: Literal["first", "ensemble"]
    of: str


@final
@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way to train, with the settings about which it is tuned.

    `alone` names the variant that trains a Student of this kind alone, with the same optimizer; `reference` the one
    that differs in nothing but what is in question.
    """

    name: str
    group: str
    title: str
    trial: RankerTrial | StreamTrial
    setting: Setting | StreamSetting
    teacher: Teacher | None = None
    alone: str = SHAMPOO
    reference: str = BOTH
    is_ta: bool = False  # trains a model of the TA's size alone

    @property
    def models(self) -> tuple[str, ...]:
        """What it trains."""
        return ("TA",) if self.is_ta else self.trial.models

    def trials(self) -> tuple[RankerTrial | StreamTrial, ...]:
        """The variant's trial at rates around its own."""
        return tuple(replace(self.trial, lr=round(self.trial.lr * factor, 4)) for factor in RATE_FACTORS)


@final
@dataclass(frozen=True, kw_only=True)
class Study:
    """One of the two case studies, with settings that it has chosen.

    Args:
        figure: what is reported of a model.
        trials: of `BASELINE`, `MATTA`, `SHAMPOO` and `BOTH`.
        embedding: how much wider the TA's embeddings are; hidden layers are 4 times as wide.
        second: one more Student.
        deep: a Student of residual blocks.
        search: how each variant's rate is chosen; None: it is that of `trials`.
    """

    name: Literal["relevance", "quality"]
    title: str
    figure: str
    setting: Any
    trials: Mapping[str, Any]
    embedding: float
    second: RankerSize
    deep: RankerSize
    first_seed: int
    num_seeds: int
    search: Search | None
    offline: str = ""  # what is to be said of a TA that is trained before

    @property
    def seeds(self) -> range:
        """The fresh seeds."""
        return range(self.first_seed, self.first_seed + self.num_seeds)

    @property
    def num_runs(self) -> int:
        """Training runs in all, at most: those that two variants have in common are run once."""
        variants = self.variants()
        tuning = self.search.num_runs(each.trials() for each in variants) if self.search else 0
        return tuning + self.num_seeds * len(variants)

    def variants(self) -> tuple[Variant, ...]:
        """All that is compared."""
        groups = (self._optimizers(), self._losses(), self._sizes(), self._depth(), self._students(), self._teachers())
        return tuple(chain.from_iterable(groups))

    def _variant(self, name: str, group: str, title: str, setting: Any = None, **changes: Any) -> Variant:
        """The reference with another setting, or a trial with changes."""
        trial = replace(self.trials[BOTH], **changes)
        return Variant(name=name, group=group, title=title, trial=trial, setting=setting or self.setting)

    def _grown(self, hidden: float, embedding: float | None = None) -> Any:
        """The setting with a TA of other widths."""
        ta = self.setting.size.grown(hidden=hidden, embedding=embedding or self.embedding)
        return replace(self.setting, ta=ta)

    def _optimizers(self) -> Iterator[Variant]:
        titles = {
            BASELINE: "Student alone, first order",
            MATTA: "MatTA, first order",
            SHAMPOO: "Student alone, Shampoo",
            BOTH: "MatTA with Shampoo (the reference)",
        }
        for name, title in titles.items():
            variant = self._variant(name, "optimizer and MatTA (Tables 1 and 3)", title)
            yield replace(variant, trial=self.trials[name], alone=BASELINE, reference=BASELINE)

    def _losses(self) -> Iterator[Variant]:
        """What is shared, the weights, and the ramp."""
        best, shared = self.trials[BOTH], "what is shared (Table 4)"
        yield self._variant("unshared", shared, "embeddings alone", method="unshared")
        yield self._variant("separate", shared, "nothing: distillation only", method="separate")
        for weight in WEIGHTS:
            if weight != best.distill_weight:
                name, title = f"distill_{weight:g}", f"ω₃ {weight:g}"
                yield self._variant(name, "ω₃, the distillation", title, distill_weight=weight)
        for weight in WEIGHTS[1:]:
            if weight != best.student_weight:
                name, title = f"student_{weight:g}", f"ω₁ {weight:g}"
                yield self._variant(name, "ω₁, the Student's labels", title, student_weight=weight)
        for share in RAMPS:
            title = f"ramp over {share:g} of the run" if share else "no ramp"
            variant = self._variant(f"ramp_{share:g}", "ramp of ω₃ (3.1.1)", title)
            if isinstance(best, RankerTrial):
                variant = replace(variant, trial=replace(best, ramp=share))
            else:
                variant = replace(variant, setting=replace(self.setting, ramp=int(share * STREAM_STEPS)))
            if (variant.trial, variant.setting) != (best, self.setting):
                yield variant

    def _sizes(self) -> Iterator[Variant]:
        """How much larger the TA is, and which of its layers."""
        for factor in TA_FACTORS:
            title = f"hidden layers {factor:g}x"
            yield self._variant(f"ta_{factor:g}", "size of the TA", title, self._grown(factor))
        grown = {
            "embeddings alone are wider, 2x": (1.0, 2.0),
            "hidden layers alone are wider, 4x": (4.0, 1.0),
            "both": (4.0, 2.0),
        }
        for title, (hidden, embedding) in grown.items():
            if (hidden, embedding) != (4.0, self.embedding):
                setting = self._grown(hidden, embedding)
                yield self._variant(f"nested_{title.split()[0]}", "which layers are nested", title, setting)

    def _depth(self) -> Iterator[Variant]:
        group, deep = "depth: residual blocks (3.2.2)", self.deep
        setting = self.setting.with_size(deep)
        alone = self._variant(DEPTH_ALONE, group, f"Student alone, {deep.blocks} blocks", setting)
        yield replace(alone, trial=self.trials[SHAMPOO], alone=DEPTH_ALONE, reference=DEPTH_ALONE)
        title = f"TA as deep as the Student ({deep.blocks} blocks), inner width 4x"
        wider = replace(setting, ta=deep.grown(embedding=self.embedding))
        pair = replace(self._variant(DEPTH_WIDER, group, title, wider), alone=DEPTH_ALONE, reference=DEPTH_WIDER)
        yield pair
        ta = deep.grown(embedding=self.embedding, blocks=EXTRA_BLOCKS)
        for place in PLACES:
            title = f"{deep.blocks} of {ta.blocks} blocks: {place}"
            yield replace(pair, name=f"depth_{place}", title=title, setting=replace(setting, ta=ta, place=place))

    def _students(self) -> Iterator[Variant]:
        setting = replace(self.setting, others=(self.second,))
        yield self._variant("two_students", "Students in one TA", f"two: {self.second} beside", setting)

    def _teachers(self) -> Iterator[Variant]:
        group, pair = "what is distilled, at the same cost", self.trials[BOTH]
        setting = self.setting.with_size(self.setting.ta_size)
        yield replace(self._variant(TA_ALONE, group, "TA alone", setting, method="baseline"), is_ta=True)
        taught = replace(self.trials[SHAMPOO], student_weight=pair.student_weight, distill_weight=pair.distill_weight)
        of_ta = self._variant("offline", group, f"Student from a TA trained before{self.offline}")
        yield replace(of_ta, trial=taught, teacher=Teacher(kind="first", of=TA_ALONE))
        title = "Student from an ensemble of baselines, together as costly as the TA"
        of_many = self._variant("ensemble", group, title)
        yield replace(of_many, trial=taught, teacher=Teacher(kind="ensemble", of=SHAMPOO))


RELEVANCE: Final = Study(
    name="relevance",
    title="Relevance",
    figure="test",
    setting=Setting(),
    trials={
        BASELINE: RankerTrial(method="baseline", optimizer="adam", lr=0.1),
        MATTA: RankerTrial(method="matta", optimizer="adam", lr=0.05),
        SHAMPOO: RankerTrial(method="baseline", optimizer="shampoo-adam", lr=0.04),
        BOTH: RankerTrial(method="matta", optimizer="shampoo-adam", lr=0.03, student_weight=0.6, ramp=0.3),
    },
    embedding=2.0,
    second=RankerSize(embedding=12, hidden=(64, 32)),
    deep=RankerSize(embedding=8, hidden=(16, 32), blocks=3),
    first_seed=6000,
    num_seeds=6,
    search=Search(seeds=(600,), num_finalists=1),  # a run takes three times as long as one of the other study
)
_FIRST_ORDER_PAIR: Final = StreamTrial(
    method="matta",
    optimizer="adagrad",
    lr=0.1,
    embedding_factor=2.0,
    even_pace=True,
    student_weight=0.3,
    distill_weight=0.3,
)
QUALITY: Final = Study(
    name="quality",
    title="Quality",
    figure="rest",
    setting=StreamSetting(),
    trials={
        BASELINE: StreamTrial(method="baseline", optimizer="adagrad", lr=0.1, embedding_factor=4.0),
        MATTA: _FIRST_ORDER_PAIR,
        SHAMPOO: StreamTrial(method="baseline", optimizer="shampoo-adagrad", lr=0.1, embedding_factor=4.0),
        BOTH: StreamTrial(method="matta", optimizer="shampoo-adagrad", lr=0.1, embedding_factor=4.0),
    },
    embedding=1.0,
    second=RankerSize(embedding=8, hidden=(16, 16)),
    deep=RankerSize(embedding=8, hidden=(8, 8), blocks=3),
    first_seed=3000,
    num_seeds=6,
    search=Search(seeds=(600, 601), num_finalists=2),
    offline=", on the first quarter, and frozen",
)
