"""The ranking study: its lists, NDCG, and the whole of it on a few made lists."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("rich")

from rich.console import Console

from matta_studies import ranking
from matta_studies.experiment import Job, Measured
from matta_studies.rankers import RankerSize
from matta_studies.ranking import DATA_FILE, PADDING, ListData, Lists, RankingPlan, Setting, ndcg
from matta_studies.study_settings import RankingSettings
from matta_studies.tuning import Search

SIZE = RankerSize(embedding=2, hidden=(4,))


def _lists(seed: int) -> Lists:
    generator = torch.Generator().manual_seed(seed)
    film = torch.randint(9, (6, 5), generator=generator)
    gain = torch.randint(1, 32, (6, 5), generator=generator).float()
    gain[1, 3:] = PADDING
    features = torch.stack([film, gain], dim=2).float()
    return Lists(user=torch.arange(6), film=film, features=features, gain=gain)


@pytest.fixture
def data() -> ListData:
    return ListData(num_rows=(6, 9), train=_lists(0), validation=_lists(1), test=_lists(2))


def test_lists_are_drawn_from_what_is_no_padding() -> None:
    lists = _lists(0)
    drawn = lists.drawn(torch.Generator().manual_seed(1), 3)
    assert sorted(drawn.user.tolist()) == list(range(6))
    assert torch.equal(drawn.features, torch.stack([drawn.film, drawn.gain], dim=2))
    for user, film, gain in zip(drawn.user, drawn.film, drawn.gain, strict=True):
        own = set(zip(lists.film[user].tolist(), lists.gain[user].tolist(), strict=True))
        assert set(zip(film.tolist(), gain.tolist(), strict=True)) <= own
        assert (gain != PADDING).all()


def test_the_best_order_has_an_ndcg_of_one_and_padding_no_say() -> None:
    lists = _lists(0)
    present = lists.gain != PADDING
    assert ndcg(lambda ids, features: lists.gain.where(present, 1e9), lists) == pytest.approx(1.0)
    assert ndcg(lambda ids, features: -lists.gain, lists) < 1.0


def test_the_whole_study_on_made_lists(data: ListData, tmp_path: Path) -> None:
    ranking.save_data(data, tmp_path / DATA_FILE)
    again = ranking.read_data(tmp_path)
    assert torch.equal(again.test.gain, data.test.gain)
    setting = Setting(size=SIZE, batch=4, items=3)
    plan = RankingPlan(num_seeds=2, search=Search(seeds=(100,), num_trials=1), setting=setting)

    def run_jobs(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        return ((job, ranking.run_job(job, again)) for job in jobs)

    console = Console(record=True, width=200)
    results = ranking.run_study(plan, again, run_jobs, tmp_path, console)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert "NDCG@10 of held-out ratings" in console.export_text()
    for arm, models in results["ndcg"].items():
        assert set(models) == ({"Student"} if arm == "baseline" else {"Student", "TA"})
        assert all(0 < each["mean"] <= 1 and each["interval"][0] <= each["mean"] for each in models.values())


def test_quick_is_a_part_of_the_study() -> None:
    assert ranking.plan_of(RankingSettings(quick=True)).num_arm_runs < ranking.plan_of(RankingSettings()).num_arm_runs
