"""The relevance study: its arithmetic, its data, and the whole of it on a few hundred made tuples."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import matta
from made_films import made_data
from matta.cli import main
from matta.errors import RunError
from matta_studies import relevance
from matta_studies.experiment import Job, Measured, Training, new_run_folder
from matta_studies.intervals import relative_change
from matta_studies.labelled_films import (
    Ratings,
    RelevanceData,
    Tuples,
    TupleSettings,
    load_data,
    make_data,
    num_ticks,
    save_data,
)
from matta_studies.rankers import Ranker, RankerSize, nest_rankers
from matta_studies.relevance import make_optimizer, read_data, run_job, score, train, tuples_loss
from matta_studies.relevance_plan import ARMS, RankerTrial, RelevancePlan, Setting, plan_of
from matta_studies.study_settings import RelevanceSettings
from matta_studies.tuning import Search
from matta_studies.worker_pool import worker_processes

TINY = Setting(size=RankerSize(embedding=2, hidden=(4, 3)), batch=64)
FAST = dataclasses.replace(TINY, passes=2)


@pytest.fixture(scope="module")
def data() -> RelevanceData:
    return made_data()


def made_ratings(count: int = 400) -> Ratings:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, low: int = 0) -> torch.Tensor:
        return torch.randint(low, high, (count,), generator=generator)

    return Ratings(
        user=torch.cat([torch.arange(7), draw(7)[7:]]),
        film=torch.cat([torch.arange(9), draw(9)[9:]]),
        second=draw(1_476_000_000, 820_500_000),
        liked=draw(2).float(),
        stars=draw(11, 1) / 2,
        is_held_out=torch.arange(count) < count // 10,
        genres=torch.eye(9)[:, :4],
        film_year=torch.arange(1990.0, 1999.0),
    )


# Two-sided 95% points of Student's t, from the tables of Abramowitz and Stegun (26.10).
@pytest.mark.parametrize(
    ("degrees", "expected"),
    [(1, 12.706), (2, 4.303), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_intervals_reach_as_far_as_the_tables_say(degrees: int, expected: float) -> None:
    values = [1.0 + 0.01 * (index % 7) + 0.001 * index for index in range(degrees + 1)]
    change = relative_change(values, [1.0] * len(values))
    spread = float(torch.tensor(values, dtype=torch.float64).std()) * 100 / math.sqrt(len(values))
    assert (change.high - change.low) / 2 / spread == pytest.approx(expected, abs=6e-4)


def test_interval_is_that_of_the_paired_t_test() -> None:
    values, references = [0.9, 0.8, 1.0, 0.7, 0.95], [1.0, 1.0, 1.1, 0.9, 1.0]
    change = relative_change(values, references)
    changes = torch.tensor([100 * (a / b - 1) for a, b in zip(values, references, strict=True)], dtype=torch.float64)
    reach = 2.7764451 * float(changes.std()) / math.sqrt(5)
    assert change.mean == pytest.approx(float(changes.mean()))
    assert change.interval == pytest.approx([float(changes.mean()) - reach, float(changes.mean()) + reach], rel=1e-6)


def test_equal_losses_change_by_nothing() -> None:
    assert str(relative_change([2.0, 3.0], [2.0, 3.0])) == "+0.00% [+0.00, +0.00]"


def test_one_pair_has_no_interval() -> None:
    with pytest.raises(ValueError, match="expected at least 2"):
        relative_change([1.0], [1.0])


def test_auc_loss_counts_pairs_in_the_wrong_order() -> None:
    scores = torch.tensor([[0.1], [0.9], [0.4], [0.8], [0.2]])
    labels = torch.tensor([0.2, 0.9, 0.7, 0.3, 0.1])
    module = torch.nn.Sequential(torch.nn.Embedding.from_pretrained(scores), torch.nn.Flatten(0))
    wrong = [float(scores[i]) < float(scores[j]) for i in (1, 2) for j in (0, 3, 4)]
    loss = tuples_loss(module, Tuples(ids=torch.arange(5)[:, None], label=labels))
    assert loss == pytest.approx(sum(wrong) / len(wrong))


def test_every_arm_has_as_many_trials() -> None:
    counts = {arm.name: len(arm.trials) for arm in ARMS}
    assert len(set(counts.values())) == 1
    assert all(len(set(arm.trials)) == len(arm.trials) for arm in ARMS)
    assert all(trial.method == arm.stored.method for arm in ARMS for trial in arm.trials)


@pytest.mark.parametrize("share", ["all", "embeddings"])
def test_first_layer_is_cut_by_embedding(share: str) -> None:
    size = RankerSize(embedding=2, hidden=(4, 3))
    student, ta = Ranker((5, 6, 7), size), Ranker((5, 6, 7), size.grown())
    nested = nest_rankers([student], ta, share)
    columns = torch.tensor([0, 1, 4, 5, 8, 9])
    expected = ta.mlp[0].weight[:4, columns] if share == "all" else student.mlp[0].weight
    torch.testing.assert_close(nested.student.mlp[0].weight, expected, rtol=0, atol=0)
    torch.testing.assert_close(nested.student.tables[1].weight, ta.tables[1].weight[:, :2], rtol=0, atol=0)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_every_arm_learns(arm, data: RelevanceData) -> None:
    before = score(train(dataclasses.replace(arm.stored, lr=0.0), data, FAST, 0), data)
    after = score(train(arm.stored, data, FAST, 0), data)
    assert after["models"]["Student"]["test"] < before["models"]["Student"]["test"]
    assert tuple(after["models"]) == arm.stored.models
    assert ("TA" not in after["models"]) == (arm.stored.method == "baseline")


@pytest.mark.parametrize("optimizer", ["adam", "adagrad", "rmsprop", "shampoo-adam", "shampoo-adagrad"])
def test_every_optimizer_has_the_rate_of_its_trial(optimizer) -> None:
    made = make_optimizer(RankerTrial(method="baseline", optimizer=optimizer, lr=0.5), torch.nn.Linear(2, 2))
    assert {group["lr"] for group in made.param_groups} == {0.5}


def test_runs_repeat(data: RelevanceData) -> None:
    job = Job(training=Training(trial=ARMS[1].stored, setting=TINY), seed=3, whole=True)
    assert run_job(job, data) == run_job(job, data)


def test_rankers_are_tuned_by_the_students_validation_loss() -> None:
    arm = ARMS[0]
    ranks = {trial: index for index, trial in enumerate(arm.trials)}

    def run(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        for job in jobs:
            yield job, {"tuning": float(ranks[job.training.trial]), "models": {}}

    plan = RelevancePlan(num_seeds=2, setting=TINY, arms=(arm,), search=Search())
    trainings, tuned = plan.tune(run)
    assert trainings[arm.name] == tuned[arm.name].best == Training(trial=arm.trials[0], setting=TINY)


@pytest.mark.parametrize("arm", [ARMS[0], ARMS[1]], ids=lambda arm: arm.name)
def test_a_run_is_judged_by_the_mean_validation_loss_of_its_models(arm, data: RelevanceData) -> None:
    measured = run_job(Job(training=Training(trial=arm.stored, setting=TINY), seed=0, whole=False), data)
    losses = [each["validation"] for each in measured["models"].values()]
    assert measured["tuning"] == pytest.approx(sum(losses) / len(losses))


def test_data_of_made_ratings_is_stored_whole(tmp_path: Path) -> None:
    settings, ratings, ticks = (
        TupleSettings(num_train=50, num_held_out=20, teacher_epochs=1),
        made_ratings(),
        [],
    )
    made = make_data(settings, ratings, lambda: ticks.append(1))
    save_data(made, tmp_path / "data.safetensors")
    loaded = load_data(tmp_path / "data.safetensors")
    assert len(ticks) == num_ticks(settings, len(ratings.user))
    assert [len(part) for part in (loaded.train, loaded.validation, loaded.test, loaded.real)] == [
        50,
        20,
        20,
        40,
    ]
    assert loaded.num_rows == made.num_rows == (7, 9, 21)
    for name in ("train", "validation", "test", "real"):
        torch.testing.assert_close(vars(getattr(loaded, name)), vars(getattr(made, name)), rtol=0, atol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["data.safetensors"]


def test_a_run_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with new_run_folder(tmp_path / "run") as folder:
            (folder / "half").touch()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_existing_run_folder_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", "relevance", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert f"{tmp_path} exists; expected a new folder" in captured.err


def test_plans_of_the_command_line() -> None:
    assert plan_of(RelevanceSettings(demo=True)).search is None
    assert plan_of(RelevanceSettings()).tuples == plan_of(RelevanceSettings(demo=True)).tuples
    assert plan_of(RelevanceSettings(quick=True)).num_runs < plan_of(RelevanceSettings()).num_runs


def test_whole_study_on_made_tuples(data: RelevanceData, tmp_path: Path) -> None:
    plan = RelevancePlan(num_seeds=2, search=Search(seeds=(100,), num_trials=1), setting=TINY)

    def run_jobs(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        return ((job, run_job(job, data)) for job in jobs)

    console = Console(record=True, width=200)
    results = relevance.run_study(plan, data, run_jobs, tmp_path, console)
    text = console.export_text()
    assert json.loads((tmp_path / "results.json").read_text()) == results
    for name in ("student_vs_baseline", "ta_vs_baseline", "shampoo_student_vs_shampoo"):
        low, high = results[f"{name}_interval"]
        assert low <= results[f"{name}_percent"] <= high
    assert "-4.63%" in text and "MatTA with Shampoo" in text
    files = {path.name for path in tmp_path.iterdir()}
    expected = {
        "results.json",
        "results.md",
        "family.png",
        "models",
        "nested",
        "preconditioner.safetensors",
        "CRC32SUMS",
    }
    assert files == expected
    assert len(results["family"]) == 8
    assert [results["family"][i]["name"] for i in (0, -1)] == ["Student", "TA"]
    student = Ranker(data.num_rows, TINY.size)
    student.load_state_dict(load_file(tmp_path / results["family"][0]["file"]))
    assert tuples_loss(student, data.test) == results["family"][0]["aucloss"]
    again = matta.load(tmp_path / "nested", Ranker(data.num_rows, TINY.size), Ranker(data.num_rows, TINY.size.grown()))
    assert tuples_loss(again.ta, data.test) == results["family"][-1]["aucloss"]


def test_worker_processes_give_what_this_process_gives(data: RelevanceData, tmp_path: Path) -> None:
    save_data(data, tmp_path / relevance.DATA_FILE)
    job = Job(training=Training(trial=ARMS[0].stored, setting=TINY), seed=1, whole=True)
    with worker_processes(run_job, read_data, tmp_path) as run_jobs:
        (found,) = run_jobs([job])
    assert found == (job, run_job(job, data))


def test_a_broken_setting_is_refused() -> None:
    with pytest.raises(RunError, match="choose one"):
        RelevanceSettings(quick=True, demo=True)
