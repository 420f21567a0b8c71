"""Choose each arm's settings by a loss, with as many trials for one arm as for another."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, product
from statistics import fmean
from typing import Any, Generic, TypeVar, final

TrialT = TypeVar("TrialT", bound=Hashable)

Judge = Callable[[Iterable[tuple[TrialT, int]]], Iterator[tuple[tuple[TrialT, int], float]]]
"""Runs trials with seeds, and gives each with its loss as it is done."""


@final
@dataclass(frozen=True, kw_only=True)
class Search:
    """How an arm is tuned: all its trials with the first few seeds, then the best few with the others."""

    seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    num_screening_seeds: int = 1
    num_finalists: int = 3
    num_trials: int | None = None  # of each arm; None: all

    def chosen(self, trials: Sequence[TrialT]) -> tuple[TrialT, ...]:
        """The trials of an arm that are run; fewer than all are spread evenly over them."""
        if self.num_trials is None:
            return tuple(trials)
        return tuple(trials[i * len(trials) // self.num_trials] for i in range(self.num_trials))

    def num_runs(self, arms: Iterable[Sequence[Any]]) -> int:
        """Training runs in all, for arms that have no trial in common."""
        screening, final_ones = self._seeds
        return sum(len(self.chosen(each)) * len(screening) + self.num_finalists * len(final_ones) for each in arms)

    @property
    def _seeds(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return self.seeds[: self.num_screening_seeds], self.seeds[self.num_screening_seeds :]

    def tune(self, arms: Mapping[str, Sequence[TrialT]], judge: Judge[TrialT]) -> dict[str, Tuned[TrialT]]:
        """The trial of each arm with the least mean loss over all seeds."""
        screening, final_ones = self._seeds
        tried = {name: self.chosen(trials) for name, trials in arms.items()}
        losses = dict(judge(_runs(tried, screening)))
        ranked = {
            name: sorted(trials, key=lambda trial: fmean(losses[trial, seed] for seed in screening))
            for name, trials in tried.items()
        }
        finalists = {name: trials[: self.num_finalists] for name, trials in ranked.items()}
        losses |= dict(judge(_runs(finalists, final_ones)))
        found = {}
        for name, trials in ranked.items():
            best = min(finalists[name], key=lambda trial: fmean(losses[trial, seed] for seed in self.seeds))
            by_seed = [tuple(losses[trial, seed] for seed in self.seeds if (trial, seed) in losses) for trial in trials]
            found[name] = Tuned(best=best, tried=tuple(zip(trials, by_seed, strict=True)))
        return found


def _runs(trials: Mapping[str, Sequence[TrialT]], seeds: Sequence[int]) -> list[tuple[TrialT, int]]:
    """Each trial with each seed, once, also when several arms have it."""
    return list(dict.fromkeys(product(chain.from_iterable(trials.values()), seeds)))


@final
@dataclass(frozen=True, kw_only=True)
class Tuned(Generic[TrialT]):
    """The trial chosen for an arm, and every trial's losses by seed, the best of the screening first."""

    best: TrialT
    tried: tuple[tuple[TrialT, tuple[float, ...]], ...]
