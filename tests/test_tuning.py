"""The tuner of the studies: who is judged by which seeds, and who wins."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from matta_studies.tuning import Search

Run = tuple[int, int]


class Judge:
    """A trial's loss is its number, but for what `luck` says of a trial and seed."""

    def __init__(self, luck: dict[Run, float] | None = None) -> None:
        self.luck, self.runs = luck or {}, list[Run]()

    def __call__(self, runs: Iterable[Run]) -> Iterator[tuple[Run, float]]:
        for run in reversed(list(runs)):  # in whatever order they end
            self.runs.append(run)
            yield run, self.luck.get(run, float(run[0]))


@pytest.mark.parametrize(("num_screening_seeds", "best"), [(1, 8), (2, 3)])
def test_luck_with_one_seed_chooses_the_finalists(num_screening_seeds: int, best: int) -> None:
    """Trials 8 and 9 are lucky with the first seed."""
    judge = Judge({(8, 0): 0.0, (9, 0): 1.0})
    search = Search(seeds=(0, 1, 2, 3), num_screening_seeds=num_screening_seeds, num_finalists=2)
    tuned = search.tune({"arm": range(3, 10)}, judge)["arm"]
    assert tuned.best == best
    assert len(judge.runs) == search.num_runs([range(3, 10)])
    assert [len(losses) for _, losses in tuned.tried] == [4] * 2 + [num_screening_seeds] * 5


def test_finalists_are_judged_by_all_seeds() -> None:
    luck = {(3, 1): 5.0, (3, 2): 6.0}
    tuned = Search(seeds=(0, 1, 2), num_finalists=2).tune({"arm": (5, 4, 3)}, Judge(luck))["arm"]
    assert tuned.best == 4
    assert tuned.tried == ((3, (3.0, 5.0, 6.0)), (4, (4.0, 4.0, 4.0)), (5, (5.0,)))


def test_fewer_trials_are_spread_over_all() -> None:
    judge = Judge()
    tuned = Search(seeds=(0,), num_trials=3).tune({"arm": range(9)}, judge)["arm"]
    assert sorted(judge.runs) == [(0, 0), (3, 0), (6, 0)] and tuned.best == 0


def test_a_trial_of_two_arms_runs_once() -> None:
    judge = Judge()
    tuned = Search(seeds=(0, 1), num_finalists=1).tune({"a": (1, 2), "b": (2, 1)}, judge)
    assert sorted(judge.runs) == [(1, 0), (1, 1), (2, 0)]
    assert tuned["a"] == tuned["b"]
