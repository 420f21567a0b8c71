"""The large Teacher of the relevance study: an ensemble that sees more than the Student does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from matta.studies.ratings import FIRST_SECOND, NUM_YEARS, SECONDS_PER_YEAR, Ratings, year_of

NUM_MEMBERS = 3
EMBEDDING = 32
HIDDEN = (512, 256, 128)
BATCH = 512
LABELLING_BATCH = 8192
MOMENT_SCALE = 0.1  # how loudly the Teacher hears what the Student cannot know


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
