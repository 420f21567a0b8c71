"""The study of the family at equal compute: equal shares of time, every way to train, and the whole on made tuples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

import matta
from made_events import made_stream
from made_films import made_data
from matta.errors import RunError
from matta.nesting.batches import call, logits_of, split_labels
from matta_studies.compute import dominated, measure_costs, run_job, run_study
from matta_studies.compute_plan import (
    COSTS,
    DATA,
    FLOPS,
    GRIDS,
    PEERS,
    WANTED,
    WAYS,
    ComputePlan,
    Grid,
    Timing,
    alone,
    cost_key,
    family,
    plan_of,
    spent,
    timed,
)
from matta_studies.compute_report import notes
from matta_studies.compute_tasks import (
    NARROWEST,
    SIZES,
    WIDEST,
    Films,
    Flights,
    Task,
    shuffled_rows,
    spec_of,
)
from matta_studies.compute_text import GptWidths, Topics
from matta_studies.compute_training import ALONE, DOWNWARDS, FAMILY, PRUNED, STAGES, TOGETHER, Attempt
from matta_studies.experiment import Job, Measured, Training
from matta_studies.language import cut
from matta_studies.language_plan import GptSize
from matta_studies.rankers import RankerSize
from matta_studies.study_settings import ComputeSettings
from matta_studies.trials import count_parameters
from matta_studies.tuning import Search

TINY = RankerSize(embedding=2, hidden=(4, 3))
GPT = GptWidths(narrow=GptSize(layers=3, width=4, ffn=6, heads=1), wide=GptSize(layers=3, width=4, ffn=12, heads=1))
GRID = Grid(
    trials=((64, 0.05),),
    family_trials=((0.05, 0.5, 0.5),),
    family_batch=64,
    budget_passes=1.0,
    short_examples=128,
    short_batch=32,
    short_rate=0.05,
    short_trials=((3.0, 0.1),),
)
TASKS = ("films", "flights", "text")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    text = cut(bytes(range(97, 123)) * 400, block=128)
    return {"films": Films(made_data(), TINY), "flights": Flights(made_stream(), TINY), "text": Topics(text, GPT)}


@pytest.fixture
def films(tasks: dict[str, Task]) -> Task:
    return tasks["films"]


def job_of(trial: Attempt, seed: int = 0, examples: int | None = None) -> Job:
    return Job(training=Training(trial=trial, setting=examples), seed=seed, whole=True)


@pytest.mark.parametrize("name", TASKS)
def test_a_size_is_that_of_the_sub_model(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    nested = task.nested(task.build(NARROWEST), warm_start=False)
    counts = {size: count_parameters(matta.extract(nested, spec_of(nested, size))) for size in SIZES}
    assert counts == {size: count_parameters(task.build(size)) for size in SIZES}
    assert counts[NARROWEST] == min(counts.values()) < max(counts.values()) == counts[WIDEST]
    assert len({task.widths(size) for size in SIZES}) == 8


@pytest.mark.parametrize("name", TASKS)
def test_tasks_have_batches_and_losses(name: str, tasks: dict[str, Task]) -> None:
    task = tasks[name]
    batch = next(task.batches(8, torch.Generator().manual_seed(0)))
    inputs, labels = split_labels(batch)
    for size in SIZES:
        model = task.build(size)
        assert task.objective.cross_entropy(logits_of(call(model, inputs)), labels).isfinite()
        assert task.losses(model).keys() == {"validation", "test"}
    few = task.limited(32)
    assert 0 < few.num_examples < task.num_examples and few.losses(model) == task.losses(model)


@torch.no_grad()
@pytest.mark.parametrize("name", TASKS)
def test_pruning_keeps_what_matters(name: str, tasks: dict[str, Task]) -> None:
    """Units and embeddings that nothing reads go first; without them the model computes the same."""
    task = tasks[name]
    ta = task.build(WIDEST).eval()
    inputs, _ = split_labels(next(task.batches(16, torch.Generator().manual_seed(0))))
    expected = logits_of(call(ta, inputs))
    whole = task.pruned(ta, WIDEST).eval()
    torch.testing.assert_close(logits_of(call(whole, inputs)), expected)
    silence(ta, name)
    small = task.pruned(ta, NARROWEST).eval()
    assert count_parameters(small) == count_parameters(task.build(NARROWEST))
    torch.testing.assert_close(logits_of(call(small, inputs)), logits_of(call(ta, inputs)))
    assert not torch.allclose(logits_of(call(task.build(NARROWEST).eval(), inputs)), logits_of(call(ta, inputs)))


def silence(ta: nn.Module, name: str) -> None:
    """Leave as many units and embeddings as a Student has, here and there."""
    if name == "text":
        for block in ta.get_submodule("transformer.h"):
            block.get_parameter("mlp.c_proj.weight")[[0, 2, 3, 7, 9, 10]] = 0.0
        return
    first, kept = ta.get_parameter("mlp.0.weight"), torch.tensor([1, 3])
    columns = range(0, {"films": 12, "flights": 8}[name], 4)  # four for each index
    for column in columns:
        first[:, [column + each for each in range(4) if each not in kept]] = 0.0
    ta.get_parameter("mlp.2.weight")[:, 4:] = 0.0
    ta.get_parameter("mlp.4.weight")[:, [0, 1, 2, 3, 5, 6, 7, 8, 10]] = 0.0


def test_every_arm_gets_the_same_time_and_as_many_trials() -> None:
    grid = GRIDS["films"]
    costs = {cost_key(*each): 1.0 + 0.037 * index for index, each in enumerate(timed(grid))}
    plan = ComputePlan(num_seeds=2).with_costs(costs)
    budget = grid.budget_passes * costs[cost_key(TOGETHER, grid.trials[0][0])]
    assert len(plan.arms) == len(WANTED) + len(WAYS) + sum(WANTED)
    for arm in plan.arms:
        shares = int(arm.name.split()[1]) if arm.name.startswith(ALONE) else 1
        assert len(arm.trials) == len(grid.trials) == len(grid.family_trials)
        for each in arm.trials:
            assert shares * spent(each, costs) == pytest.approx(budget, rel=0.06), "passes have two digits"


@pytest.mark.parametrize("name", TASKS)
def test_grids_have_as_many_trials_for_all(name: str) -> None:
    grid = GRIDS[name]
    assert len(grid.trials) == len(grid.family_trials) == len(grid.short_trials) == 4
    assert grid.family_batch in {batch for batch, _ in grid.trials}


@pytest.mark.parametrize("way", [FAMILY, DOWNWARDS, *WAYS])
def test_every_way_learns_and_repeats(way: str, films: Task) -> None:
    trial = Attempt(way=way, batch=64, lr=0.05, passes=12, alone=0.5, student_chance=0.5)
    if way in (PRUNED, STAGES):
        trial = replace(trial, later_passes=(3.0,) * 7)
    models = run_job(job_of(trial), films)["models"]
    assert [*models] == [*SIZES] and all(models[size].pop("seconds") > 0 for size in SIZES)
    for size in SIZES:
        assert models[size]["test"] < 0.4, "chance is 0.5"
        assert models[size]["parameters"] == count_parameters(films.build(size))
    again, other = (run_job(job_of(trial, seed), films)["models"] for seed in (0, 1))
    assert all(again[size].items() > models[size].items() for size in SIZES)
    assert [other[size]["test"] for size in SIZES] != [models[size]["test"] for size in SIZES]


@pytest.mark.parametrize("name", ["flights", "text"])
@pytest.mark.parametrize("way", [FAMILY, DOWNWARDS, *WAYS])
def test_every_way_runs_on_every_task(way: str, name: str, tasks: dict[str, Task]) -> None:
    later = (0.1,) * 7 if way in (PRUNED, STAGES) else ()
    trial = Attempt(way=way, batch=16, lr=0.01, passes=0.2, alone=0.5, student_chance=0.5, later_passes=later)
    assert [*run_job(job_of(trial), tasks[name])["models"]] == [*SIZES]


def test_a_family_gives_the_sizes_wanted(films: Task) -> None:
    trial = Attempt(way=FAMILY, batch=64, lr=0.05, passes=4, alone=0.5, student_chance=0.5, sizes=WANTED[2])
    assert [*run_job(job_of(trial), films)["models"]] == [*WANTED[2]]


def test_a_size_alone_is_trained_and_nothing_else(films: Task) -> None:
    measured = run_job(job_of(Attempt(way=ALONE, sizes=("nwn",), batch=64, lr=0.05, passes=12)), films)
    assert [*measured["models"]] == ["nwn"]
    assert measured["tuning"] == measured["models"]["nwn"]["validation"] < 0.4
    assert measured["models"]["nwn"]["parameters"] == count_parameters(films.build("nwn"))


def test_examples_and_weight_decay_count(films: Task) -> None:
    trial = Attempt(way=ALONE, sizes=("nnn",), batch=32, lr=0.05, passes=6)
    runs = [(trial, None), (trial, 64), (replace(trial, weight_decay=0.3), None)]
    losses = {run_job(job_of(each, examples=count), films)["models"]["nnn"]["test"] for each, count in runs}
    assert len(losses) == 3


def test_each_pass_has_every_row_once() -> None:
    rows = shuffled_rows(300, 64, torch.Generator().manual_seed(0))
    passes = [torch.cat([next(rows) for _ in range(300 // 64)]) for _ in range(2)]
    for each in passes:
        assert len(each) == len(each.unique()) == 256 and each.max() < 300
    assert not torch.equal(*passes)


def test_all_ways_are_timed(films: Task) -> None:
    measured = measure_costs(films, GRID, num_steps=2)
    for costs in (measured[COSTS], measured[FLOPS]):
        assert costs.keys() == {cost_key(*each) for each in timed(GRID)} and min(costs.values()) > 0
    alone_of = {size: measured[FLOPS][cost_key(ALONE, 64, (size,))] for size in SIZES}
    assert min(alone_of, key=alone_of.__getitem__) == NARROWEST and max(alone_of, key=alone_of.__getitem__) == WIDEST
    assert alone_of[WIDEST] < measured[FLOPS][cost_key(TOGETHER, 64)]


def test_a_larger_model_of_no_use_adds_nothing() -> None:
    assert dominated([0.0, 1.0, 2.0], [0.5, 0.5, 0.9], 1.0) == dominated([0.0, 1.0, 2.0], [0.5, 0.5, 0.5], 1.0)


@pytest.mark.parametrize("short", ["compute", "data"])
def test_the_whole_study_on_made_tuples(
    short: str, films: Task, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[Job] = []

    def run_jobs(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        for job in jobs:
            ran.append(job)
            yield job, run_job(job, films)

    search = Search(seeds=(100,), num_finalists=1)
    plan = ComputePlan(num_seeds=2, regime=short, search=search, grid=GRID, timed_steps=1)
    results = run_study(plan, run_jobs, tmp_path, Console())
    assert len(ran) == plan.num_runs
    if short == DATA:
        assert {job.training.setting for job in ran} == {GRID.short_examples}
        assert {job.training.trial.weight_decay for job in ran} == {0.1}
    else:
        assert ran[0].training.trial == Timing(num_steps=1, grid=GRID)
        assert results["family_vs_alone_percent"]["2"].keys() == {NARROWEST, WIDEST}
    assert results == json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    losses = results["losses"]
    for size, change in results["family_vs_alone_percent"]["8"].items():
        pairs = zip(losses[family(8)][size]["seeds"], losses[alone(8, size)][size]["seeds"], strict=True)
        assert change["percent"] == pytest.approx(fmean(100 * (ours / theirs - 1) for ours, theirs in pairs))
    assert results["best_peer"] in PEERS
    assert results["hypervolume"].keys() == {*WAYS, family(8), ALONE}
    assert all(set(sizes) <= {*SIZES} for sizes in results["worse_than_smaller"].values())
    for name, arm in (("family", family(8)), ("together", TOGETHER)):
        ours, theirs = (
            [fmean(losses[each or alone(8, size)][size]["seeds"][seed] for size in SIZES) for seed in range(2)]
            for each in (arm, "")
        )
        expected = fmean(100 * (one / other - 1) for one, other in zip(ours, theirs, strict=True))
        assert results[f"{name}_vs_alone_mean_percent"]["8"]["percent"] == pytest.approx(expected)
    told = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert told.count("\n| 2, 4-3 |") == told.count("\n| 4, 16-12 |") == 2 and "8 sizes wanted" in told
    assert ("Processor seconds of the shared runs" in told) == ("TFLOPs" in told) == (short == "compute")
    assert (
        "compute short" if short == "compute" else "128 examples"
    ) in told and "less is better" in capsys.readouterr().out


def test_settings_become_a_plan() -> None:
    assert plan_of(ComputeSettings()).num_seeds == 8
    assert plan_of(ComputeSettings(quick=True)).num_runs < plan_of(ComputeSettings()).num_runs
    few = plan_of(ComputeSettings(data="text", short="data", examples=500))
    assert (few.task, few.regime, few.with_short_data().setting) == ("text", "data", 500)
    tenth = plan_of(ComputeSettings(short="data", examples=10_000))
    whole = plan_of(ComputeSettings(short="data"))
    decays = [[decay for _, decay in plan.grid.short_trials] for plan in (tenth, whole)]
    assert decays[0] == [pytest.approx(10 * decay) for decay in decays[1]]
    assert [passes for passes, _ in tenth.grid.short_trials] == [63.0, 95.0, 95.0, 140.0]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"seeds": 1}, "seeds=1: expected at least 2"),
        ({"data": "news"}, "data='news': expected films, flights or text"),
        ({"short": "time"}, "short='time': expected compute or data"),
        ({"examples": 0}, "examples=0: expected 1 or more"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        ComputeSettings(**wrong)


def test_a_peer_without_hypervolume_gives_no_ratio() -> None:
    """With short data all sizes of the best peer can be worse than the Student alone."""
    told = notes(
        {
            "best_peer": ALONE,
            "hypervolume_change": {},
            "seconds": {TOGETHER: 1.0},
            "sizes": {},
            "worse_than_smaller": {"a": [], "b": []},
            "family_vs_alone_mean_percent": {},
            "together_vs_alone_mean_percent": {},
            "num_seeds": 2,
            "short": DATA,
        }
    )
    assert told[0].startswith("Hypervolume: with some seed nothing")
