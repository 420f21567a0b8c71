"""{user, film, moment} tuples labelled by the Teacher: what the relevance study trains and tests on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from matta.studies.ratings import NUM_YEARS, Ratings, load_ratings, year_of
from matta.studies.teacher import BATCH, LABELLING_BATCH, NUM_MEMBERS, ensemble_probability, train_member

FORMAT = 1  # raise it whenever other tuples would come out of the same settings


@final
@dataclass(frozen=True, kw_only=True)
class TupleSettings:
    """How many tuples, and how long each member of the Teacher was trained."""

    num_train: int = 850_000
    num_held_out: int = 50_000
    teacher_epochs: int = 6


@final
@dataclass(frozen=True, kw_only=True)
class Tuples:
    """Indices of user, film and year (all that the Student sees), and what it is to say about them."""

    ids: Int[Tensor, "n tables"]
    label: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.label)

    def take(self, rows: slice) -> Tuples:
        """Some of the tuples."""
        return Tuples(ids=self.ids[rows], label=self.label[rows])


@final
@dataclass(frozen=True, kw_only=True)
class RelevanceData:
    """Three parts labelled by the Teacher, and the real ratings that it has never seen.

    Labels are probabilities in `train`, `validation` and `test`, and likes (0 or 1) in `real`.
    """

    train: Tuples
    validation: Tuples
    test: Tuples
    real: Tuples
    num_rows: tuple[int, ...]


def load_data(path: Path) -> RelevanceData:
    """The data in a file that `save_data` wrote."""
    tensors = load_file(path)
    parts = {
        name: Tuples(ids=tensors[f"{name}.ids"].long(), label=tensors[f"{name}.label"])
        for name in ("train", "validation", "test", "real")
    }
    return RelevanceData(num_rows=tuple(tensors["num_rows"].tolist()), **parts)


def save_data(data: RelevanceData, path: Path) -> None:
    """Write a file, all of it or nothing."""
    tensors = {"num_rows": torch.tensor(data.num_rows)}
    for name in ("train", "validation", "test", "real"):
        part = getattr(data, name)
        tensors |= {f"{name}.ids": part.ids.int(), f"{name}.label": part.label.contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        made = Path(file.name)
    try:
        save_file(tensors, made)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def cached_path(settings: TupleSettings) -> Path:
    """Where the data of these settings is kept: under XDG_CACHE_HOME, else ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.blake2b(repr((FORMAT, asdict(settings))).encode(), digest_size=6).hexdigest()
    return Path(root) / "matta" / f"relevance-{key}.safetensors"


def num_ticks(settings: TupleSettings, num_ratings: int) -> int:
    """How often `make_data` calls `tick`."""
    seen = num_ratings - num_ratings // 10
    labelled = settings.num_train + 2 * settings.num_held_out
    return NUM_MEMBERS * settings.teacher_epochs * -(-seen // BATCH) + -(-labelled // LABELLING_BATCH)


def make_data(
    settings: TupleSettings, ratings: Ratings | None = None, tick: Callable[[], None] = lambda: None
) -> RelevanceData:
    """Train the Teacher on the ratings and let it label random tuples.

    A tuple is any user, any film, and the moment of any rating. The Teacher sees the moment to the hour;
    the Student sees the year of it.
    """
    ratings = ratings or load_ratings()
    members = [train_member(ratings, seed, epochs=settings.teacher_epochs, tick=tick) for seed in range(NUM_MEMBERS)]
    user, film, second = _draw(ratings, settings.num_train + 2 * settings.num_held_out)
    probability = ensemble_probability(members, user, film, second, tick)
    labelled = Tuples(ids=_ids(user, film, second), label=probability)
    held = ratings.is_held_out
    first, second_end = settings.num_train, settings.num_train + settings.num_held_out
    return RelevanceData(
        train=labelled.take(slice(first)),
        validation=labelled.take(slice(first, second_end)),
        test=labelled.take(slice(second_end, None)),
        real=Tuples(ids=_ids(ratings.user[held], ratings.film[held], ratings.second[held]), label=ratings.liked[held]),
        num_rows=(ratings.num_users, ratings.num_films, NUM_YEARS),
    )


def _draw(ratings: Ratings, count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    user = torch.randint(ratings.num_users, (count,), generator=generator)
    film = torch.randint(ratings.num_films, (count,), generator=generator)
    moment = torch.randint(len(ratings.second), (count,), generator=generator)
    return user, film, ratings.second[moment]


def _ids(user: Tensor, film: Tensor, second: Tensor) -> Tensor:
    return torch.stack([user, film, year_of(second)], dim=1)
