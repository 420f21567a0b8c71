"""The study of the family at equal compute: equal shares of time, every way to train, and the whole on made tuples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from rich.console import Console

import matta
from made_films import made_data
from matta.errors import RunError
from matta_studies.compute import (
    ALONE,
    FAMILY,
    FAMILY_TRIALS,
    NARROWEST,
    PRUNED,
    SIZES,
    STAGES,
    TOGETHER,
    TRIALS,
    WANTED,
    WAYS,
    WIDEST,
    Attempt,
    ComputePlan,
    Timing,
    alone,
    cost_key,
    dominated,
    family,
    measure_costs,
    plan_of,
    pruned,
    run_job,
    run_study,
    shuffled,
    size_of,
    spec_of,
    timed,
)
from matta_studies.experiment import Job, Measured, Training
from matta_studies.labelled_films import RelevanceData
from matta_studies.rankers import Ranker, RankerSize, nest_rankers
from matta_studies.study_settings import ComputeSettings
from matta_studies.trials import count_parameters
from matta_studies.tuning import Search

TINY = RankerSize(embedding=2, hidden=(4, 3))


@pytest.fixture(scope="module")
def data() -> RelevanceData:
    return made_data()


def job_of(trial: Attempt, seed: int = 0) -> Job:
    return Job(training=Training(trial=trial, setting=TINY), seed=seed, whole=True)


def test_a_size_is_that_of_the_sub_model() -> None:
    nested = nest_rankers([Ranker((6, 6), TINY)], Ranker((6, 6), TINY.grown()))
    for size in SIZES:
        sub_model = matta.extract(nested, spec_of(nested, size))
        assert count_parameters(sub_model) == count_parameters(Ranker((6, 6), size_of(size, TINY)))


def test_every_arm_gets_the_same_time_and_as_many_trials() -> None:
    costs = {cost_key(*each): 1.0 + 0.037 * index for index, each in enumerate(timed())}
    plan = ComputePlan(num_seeds=2).with_costs(costs)
    budget = plan.budget_passes * costs[cost_key(TOGETHER, TRIALS[0][0])]
    assert len(plan.arms) == len(WANTED) + len(WAYS) + sum(WANTED)
    for arm in plan.arms:
        shares = int(arm.name.split()[1]) if arm.name.startswith(ALONE) else 1
        assert len(arm.trials) == len(TRIALS) == len(FAMILY_TRIALS)
        for each in arm.trials:
            assert shares * seconds_of(each, costs) == pytest.approx(budget, rel=0.06), "passes have two digits"


def seconds_of(trial: Attempt, costs: dict[str, float]) -> float:
    if trial.way == FAMILY:
        first = costs[cost_key(ALONE, trial.batch, (NARROWEST,))]
        later = costs[cost_key(FAMILY, trial.batch, trial.sizes)]
        return trial.passes * (trial.alone * first + (1 - trial.alone) * later)
    if trial.later_passes:
        each = zip(trial.sizes, trial.later_passes, strict=False)
        later = sum(passes * costs[cost_key(STAGES, trial.batch, (size,))] for size, passes in each)
        return trial.passes * costs[cost_key(ALONE, trial.batch, (WIDEST,))] + later
    return trial.passes * costs[cost_key(trial.way, trial.batch, trial.sizes)]


@pytest.mark.parametrize("way", [FAMILY, *WAYS])
def test_every_way_learns_and_repeats(way: str, data: RelevanceData) -> None:
    trial = Attempt(way=way, batch=64, lr=0.05, passes=12, alone=0.5, student_chance=0.5)
    if way in (PRUNED, STAGES):
        trial = replace(trial, later_passes=(8.0,) * 7)
    models = run_job(job_of(trial), data)["models"]
    assert [*models] == [*SIZES] and all(models[size].pop("seconds") > 0 for size in SIZES)
    assert all(models[size]["test"] < 0.4 for size in SIZES), "chance is 0.5"
    nested = nest_rankers([Ranker((6, 6, 6), TINY)], Ranker((6, 6, 6), TINY.grown()))
    for size in SIZES:
        assert models[size]["parameters"] == count_parameters(matta.extract(nested, spec_of(nested, size)))
    again, other = (run_job(job_of(trial, seed), data)["models"] for seed in (0, 1))
    assert all(again[size].items() > models[size].items() for size in SIZES)
    assert all(other[size]["test"] != models[size]["test"] for size in SIZES)


def test_a_family_gives_the_sizes_wanted(data: RelevanceData) -> None:
    trial = Attempt(way=FAMILY, batch=64, lr=0.05, passes=4, alone=0.5, student_chance=0.5, sizes=WANTED[2])
    assert [*run_job(job_of(trial), data)["models"]] == [*WANTED[2]]


def test_a_size_alone_is_trained_and_nothing_else(data: RelevanceData) -> None:
    measured = run_job(job_of(Attempt(way=ALONE, sizes=("nwn",), batch=64, lr=0.05, passes=12)), data)
    assert [*measured["models"]] == ["nwn"]
    assert measured["tuning"] == measured["models"]["nwn"]["validation"] < 0.4
    assert measured["models"]["nwn"]["parameters"] == count_parameters(Ranker((6, 6, 6), size_of("nwn", TINY)))


@torch.no_grad()
def test_pruning_keeps_what_matters(data: RelevanceData) -> None:
    """Units and embeddings that nothing reads go first; without them the model computes the same."""
    ta = Ranker(data.num_rows, TINY.grown())
    small = pruned(ta, ta.size, data.train.ids)
    assert torch.equal(small(data.test.ids), ta(data.test.ids)), "nothing is pruned at full size"
    unread = {"mlp.0.weight": [1, 2, 4, 6, 8, 11], "mlp.2.weight": range(12), "mlp.4.weight": range(2, 11)}
    for name, columns in unread.items():
        ta.get_parameter(name)[:, list(columns)] = 0.0
    small = pruned(ta, TINY, data.train.ids)
    assert (small.size, count_parameters(small)) == (TINY, count_parameters(Ranker(data.num_rows, TINY)))
    torch.testing.assert_close(small(data.test.ids), ta(data.test.ids))


def test_each_pass_has_every_tuple_once(data: RelevanceData) -> None:
    batches = shuffled(data, 64, torch.Generator().manual_seed(0))
    passes = [torch.cat([next(batches)[1] for _ in range(len(data.train) // 64)]) for _ in range(2)]
    for labels in passes:
        assert len(labels) == 256 and torch.isin(labels, data.train.label).all()
        assert len(labels.unique()) == len(labels)
    assert not torch.equal(*passes)


def test_all_ways_are_timed(data: RelevanceData) -> None:
    costs = measure_costs(data, TINY, num_steps=2)
    assert costs.keys() == {cost_key(*each) for each in timed()} and min(costs.values()) > 0


def test_a_larger_model_of_no_use_adds_nothing() -> None:
    assert dominated([0.0, 1.0, 2.0], [0.5, 0.5, 0.9], 1.0) == dominated([0.0, 1.0, 2.0], [0.5, 0.5, 0.5], 1.0)


def test_the_whole_study_on_made_tuples(
    data: RelevanceData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("matta_studies.compute.TRIALS", ((64, 0.05),))
    monkeypatch.setattr("matta_studies.compute.FAMILY_TRIALS", ((0.05, 0.5, 0.5),))
    monkeypatch.setattr("matta_studies.compute.FAMILY_BATCH", 64)
    ran: list[Job] = []

    def run_jobs(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        for job in jobs:
            ran.append(job)
            yield job, run_job(job, data)

    search = Search(seeds=(100,), num_finalists=1)
    plan = ComputePlan(num_seeds=2, setting=TINY, search=search, budget_passes=4.0, timing=Timing(num_steps=1))
    results = run_study(plan, run_jobs, tmp_path, Console())
    assert len(ran) == plan.num_runs and ran[0].training.trial == plan.timing
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    losses = results["aucloss"]
    for size, change in results["family_vs_alone_percent"]["8"].items():
        pairs = zip(losses[family(8)][size]["seeds"], losses[alone(8, size)][size]["seeds"], strict=True)
        assert change["percent"] == pytest.approx(fmean(100 * (ours / theirs - 1) for ours, theirs in pairs))
    assert results["best_peer"] in {*WAYS, ALONE} - {TOGETHER} and results["hypervolume"].keys() == {
        *WAYS,
        family(8),
        ALONE,
    }
    assert results["family_vs_alone_percent"]["2"].keys() == {NARROWEST, WIDEST}
    assert set(results["worse_than_smaller"]) <= {*SIZES}
    told = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert told.count("\n| 2, 4-3 |") == told.count("\n| 4, 16-12 |") == 2 and "8 sizes wanted" in told
    assert "at equal compute" in capsys.readouterr().out


def test_settings_become_a_plan() -> None:
    assert plan_of(ComputeSettings()).num_seeds == 8
    assert plan_of(ComputeSettings(quick=True)).num_runs < plan_of(ComputeSettings()).num_runs
    with pytest.raises(RunError, match="seeds=1: expected at least 2"):
        ComputeSettings(seeds=1)
