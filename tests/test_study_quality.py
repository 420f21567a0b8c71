"""The quality study: its data, a run over a stream, and the whole of it on a few hundred made events."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from rich.console import Console

from made_events import made_stream
from matta.cli import main
from matta.errors import RunError
from matta_studies import event_streams, quality
from matta_studies.event_streams import (
    flight_stream,
    join,
    load_stream,
    normalise_by_the_past,
    rating_numbers,
    rating_stream,
    save_stream,
)
from matta_studies.experiment import Arm, Job, Measured, Training
from matta_studies.intervals import beyond_the_sum, relative_change
from matta_studies.quality import (
    PAPER,
    Predicted,
    make_model,
    make_optimizer,
    predict_and_learn,
    run_job,
    run_study,
    score,
)
from matta_studies.quality_plan import ARMS, LONGER, STREAMS, QualityPlan, StreamSetting, StreamTrial, plan_of
from matta_studies.study_settings import QualitySettings
from matta_studies.tuning import Search

TINY = StreamSetting(embedding=2, hidden=(4, 3), ta_factor=2, batch=32, ramp=5)
BASELINE = StreamTrial(method="baseline", optimizer="adagrad", lr=0.1)
PAIR = StreamTrial(method="matta", optimizer="shampoo-adagrad", lr=0.1, embedding_factor=2.0, even_pace=True)


def made_tables() -> tuple[pandas.DataFrame, pandas.DataFrame, pandas.DataFrame]:
    """Five flights: late, in time, never arrived, without a tail number, a plane and weather unknown."""
    rows = [
        # hour, schedule, carrier, flight, tail, arr_delay
        ("2013-01-02T10:00:00Z", 500, "AA", 1, "N1", 15.0),
        ("2013-01-01T11:00:00Z", 630, "AA", 2, None, float("nan")),
        ("2013-01-01T10:00:00Z", 559, "AA", 3, "N2", 14.0),
        ("2013-01-01T10:00:00Z", 515, "BB", 4, "N9", float("nan")),
        ("2013-01-01T10:00:00Z", 515, "AA", 5, "N1", -3.0),
    ]
    table = pandas.DataFrame(rows, columns=["time_hour", "sched_dep_time", "carrier", "flight", "tailnum", "arr_delay"])
    table = table.assign(origin="JFK", dest="LAX", sched_arr_time=1200, hour=5, distance=2475, year=2013, month=1)
    table["day"] = [2, 1, 1, 1, 1]
    for name in ("dep_time", "dep_delay", "arr_time", "air_time"):
        table[name] = 7.0
    weather = pandas.DataFrame({"origin": ["JFK"], "time_hour": ["2013-01-01T10:00:00Z"], "wind_dir": [90.0]})
    weather = weather.assign(**dict.fromkeys(event_streams.WEATHER, 1.0))
    planes = pandas.DataFrame({"tailnum": ["N1", "N2"], "year": [1999, 2004], "seats": [100, 200], "engines": [2, 2]})
    return table, weather, planes


def test_flights_come_in_the_order_of_the_schedule_with_what_was_known() -> None:
    table = join(*made_tables())
    assert table["flight"].tolist() == [5, 4, 3, 2, 1]
    assert table["late"].tolist() == [False, True, False, True, True]
    assert not {"dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"} & set(table.columns)
    assert table["built"].fillna(0).tolist() == [1999, 0, 2004, 2004, 1999]


def test_a_missing_tail_number_does_not_tell_the_label() -> None:
    table = join(*made_tables())
    assert table["tailnum"].tolist() == ["N1", "N9", "N2", "N2", "N1"]


def test_tables_become_tensors_with_missing_numbers_marked() -> None:
    stream = flight_stream(join(*made_tables()), batch=2)
    assert stream.period.tolist() == [0, 0, 0, 0, 0]
    assert [len(set(column)) for column in stream.ids.T.tolist()] == [2, 1, 1, 3, 5, 1, 2]
    offsets = stream.ids.min(dim=0).values
    assert (offsets.diff() > 0).all() and int(stream.ids.max()) == stream.num_rows - 1
    marks = stream.numbers[:, -len(event_streams.MARKED) :]
    assert marks[:, event_streams.MARKED.index("built")].tolist() == [0, 1, 0, 0, 0]
    assert marks[:, event_streams.MARKED.index("temp")].tolist() == [0, 0, 0, 1, 1]
    assert stream.numbers.isfinite().all()


def test_numbers_are_normalised_by_earlier_batches_alone() -> None:
    values = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    later = values.clone()
    later[8:] = 100.0
    expected = (values[8:] - values[:8].mean(0)) / values[:8].std(0, correction=0)
    torch.testing.assert_close(normalise_by_the_past(values, 4)[8:], expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(normalise_by_the_past(later, 4)[:8], normalise_by_the_past(values, 4)[:8])


def test_a_stream_survives_its_file(tmp_path: Path) -> None:
    stream = made_stream(50)
    save_stream(stream, tmp_path / "stream.safetensors")
    loaded = load_stream(tmp_path / "stream.safetensors")
    assert loaded.num_rows == stream.num_rows
    for name in ("ids", "numbers", "label", "period"):
        assert torch.equal(getattr(loaded, name), getattr(stream, name))


AGAIN = dataclasses.replace(BASELINE, updates=3)


@pytest.mark.parametrize("trial", [BASELINE, PAIR, AGAIN, dataclasses.replace(AGAIN, replays=True)], ids=str)
def test_events_are_predicted_before_they_are_learned(trial: StreamTrial) -> None:
    stream = made_stream()
    turned = dataclasses.replace(stream, label=torch.cat([stream.label[:320], 1 - stream.label[320:]]))
    seen = predict_and_learn(trial, stream, TINY, seed=0)
    other = predict_and_learn(trial, turned, TINY, seed=0)
    assert len(seen.logits) == len(seen.parameters) == (1 if trial.method == "baseline" else 2)
    for logits, others in zip(seen.logits.values(), other.logits.values(), strict=True):
        assert torch.equal(logits[:352], others[:352])  # up to the batch whose labels are the first to differ
        assert not torch.equal(logits[352:], others[352:])


@pytest.mark.parametrize("optimizer", ["adagrad", "adam", "shampoo-adagrad", "shampoo-adam"])
def test_embeddings_have_a_rate_of_their_own(optimizer) -> None:
    trial = dataclasses.replace(PAIR, optimizer=optimizer, lr=0.5, embedding_factor=4.0)
    model = make_model(trial, made_stream(), TINY)
    rates = {id(p): group["lr"] for group in make_optimizer(trial, model).param_groups for p in group["params"]}
    assert {name: rates[id(p)] for name, p in model.named_parameters()} == {
        name: 2.0 if "table" in name else 0.5 for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("arm", ARMS + LONGER, ids=lambda arm: arm.name)
def test_every_arm_learns(arm) -> None:
    stream = made_stream()
    for trial in (arm.trials[0], arm.trials[-1]):
        rate = 0.03 if trial.optimizer in ("adam", "shampoo-adam") else trial.lr
        taught, untaught = (
            run_job(
                Job(training=Training(trial=dataclasses.replace(trial, lr=lr), setting=TINY), seed=0, whole=True),
                stream,
            )["models"]
            for lr in (rate, 0.0)
        )
        assert taught.keys() == untaught.keys() == set(trial.models)
        for model, scores in taught.items():
            assert scores["by_period"][-1] < untaught[model]["by_period"][-1]


def test_even_pace_leaves_a_wide_layer_as_it_is() -> None:
    setting = dataclasses.replace(TINY, hidden=(8, 8), ta_factor=4)
    nested = make_model(PAIR, made_stream(), setting)
    assert [nested.student.mlp[1].factor, nested.ta.mlp[1].factor] == [4.0, 1.0]
    assert make_model(dataclasses.replace(PAIR, even_pace=False), made_stream(), setting).student.mlp[1].factor == 1.0


def test_scores_are_of_the_right_events() -> None:
    stream = made_stream()
    logits = torch.randn(640, generator=torch.Generator().manual_seed(1))
    logits[60:160] = stream.label[60:160]  # most of the first quarter is known

    def scores_of(logits: torch.Tensor) -> dict[str, Any]:
        predicted = Predicted(logits={"Student": logits}, parameters={"Student": 7})
        return score(predicted, stream.take(slice(len(logits))), stream)["models"]["Student"]

    scores = scores_of(logits)
    assert 0.0 <= scores["tuning"] < 0.1 < scores["rest"]
    assert len(scores["by_period"]) == 3 and scores["parameters"] == 7
    assert scores_of(logits[:160])["rest"] is None


def test_every_arm_has_as_many_trials() -> None:
    every = ARMS + LONGER
    assert {len(arm.trials) for arm in every} == {len(set(arm.trials)) for arm in every} == {24}
    for settings in (QualitySettings(), QualitySettings(quick=True), QualitySettings(longer=True)):
        plan = plan_of(settings)
        assert len({len(set(plan.search.chosen(arm.trials))) for arm in plan.arms}) == 1


def test_a_pair_is_tuned_by_the_mean_of_student_and_ta() -> None:
    trials = tuple(dataclasses.replace(PAIR, lr=0.1 * k) for k in (1, 2, 3))
    losses = {trials[0]: 0.25, trials[1]: 0.2, trials[2]: 0.225}

    def run(jobs: Iterable[Job]) -> Iterator[tuple[Job, Measured]]:
        for job in jobs:
            assert not job.whole
            yield job, {"tuning": losses[job.training.trial], "models": {}}

    plan = QualityPlan(num_seeds=2, arms=(Arm(name="matta", title="MatTA", trials=trials),))
    assert plan.tune(run)[0]["matta"].trial == trials[1]
    stream = made_stream(320)
    quarter = run_job(Job(training=Training(trial=PAIR, setting=TINY), seed=0, whole=False), stream)
    each = [scores["tuning"] for scores in quarter["models"].values()]
    assert len(each) == 2 and quarter["tuning"] == pytest.approx(sum(each) / 2)


def test_the_whole_study(tmp_path: Path) -> None:
    stream = made_stream(320)
    plan = QualityPlan(num_seeds=2, search=Search(seeds=(100,), num_trials=2), setting=TINY)
    console = Console(quiet=True)
    results = run_study(plan, 320, lambda jobs: ((job, run_job(job, stream)) for job in jobs), tmp_path, console)
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written == json.loads(json.dumps(results))
    losses = {
        arm: {model: each["seeds"] for model, each in models.items()} for arm, models in results["aucloss"].items()
    }
    expected = relative_change(losses["matta_shampoo"]["TA"], losses["baseline"]["Student"])
    assert results["ta_vs_baseline_percent"] == pytest.approx(expected.mean)
    against = relative_change(losses["matta_shampoo"]["Student"], losses["shampoo"]["Student"])
    assert results["student_vs_shampoo_interval"] == pytest.approx(against.interval)
    figures = {figure.removesuffix("_percent") for figure in results if figure.endswith("_percent")}
    assert figures == {*quality.CHANGES, "beyond_the_sum"} and set(PAPER) < figures
    assert {len(weeks) for models in results["by_period"].values() for weeks in models.values()} == {3}
    assert (tmp_path / "images/quality-flights.png").stat().st_size > 1000
    section = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| MatTA with Shampoo | TA |" in section and "`matta study quality --seeds 2`" in section
    assert "seeds 2000 to 2001" in section and f"torch {torch.__version__.split('+')[0]}" in section
    assert "(images/quality-flights.png)" in section


def test_what_goes_beyond_the_sum() -> None:
    losses = {
        "baseline": {"Student": [1.0, 2.0]},
        "shampoo": {"Student": [0.9, 1.8]},
        "matta": {"Student": [0.8, 1.6], "TA": [0.7, 1.4]},
        "matta_shampoo": {"Student": [0.65, 1.3], "TA": [0.5, 1.0]},
    }
    student, base = losses["matta_shampoo"]["Student"], losses["baseline"]["Student"]
    assert relative_change(student, base).mean == pytest.approx(-35.0)
    together = beyond_the_sum(student, losses["shampoo"]["Student"], losses["matta"]["Student"], base)
    assert together.mean == pytest.approx(-5.0)


def test_the_command_line_runs_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    received = []
    monkeypatch.setattr(
        quality, "run", lambda settings: received.append(settings) or {"student_vs_baseline_percent": -1.5}
    )
    out = tmp_path / "new"
    options = ["--stream", "ratings", "--quick", "--seeds", "4", "--warm-up", "7", "--out", str(out), "--json"]
    assert main(["study", "quality", *options]) == 0
    assert received == [QualitySettings(stream="ratings", quick=True, seeds=4, warm_up=7, out=out)]
    assert json.loads(capsys.readouterr().out) == {"student_vs_baseline_percent": -1.5}
    plan = plan_of(received[0])
    assert plan.num_seeds == 4 and plan.setting == dataclasses.replace(STREAMS["ratings"].setting, warm_up=7)


def made_ratings() -> pandas.DataFrame:
    """Six ratings by two users of three films, not in order."""
    rows = [
        # user, film, stars, second, year
        (1, 20, 4.0, 1000, 1969.0),
        (1, 10, 3.5, 900, 1960.0),
        (2, 10, 5.0, 2000, 1960.0),
        (1, 30, 2.0, 1000, float("nan")),
        (2, 20, 1.0, 2100, 1969.0),
        (2, 30, 4.5, 2100, float("nan")),
    ]
    table = pandas.DataFrame(rows, columns=["userId", "movieId", "rating", "timestamp", "year"])
    return table.assign(genres=table["movieId"].map({10: "Comedy", 20: "Comedy|War", 30: "(no genres listed)"}))


def test_ratings_come_in_the_order_of_time() -> None:
    stream = rating_stream(made_ratings(), batch=2)
    assert stream.label.tolist() == [0, 1, 0, 1, 0, 1]
    user, film, genres, *_ = (column - column.min() for column in stream.ids.T)
    assert user.tolist() == [0, 0, 0, 1, 1, 1] and film.tolist() == genres.tolist() == [0, 1, 2, 0, 1, 2]
    assert int(stream.ids.max()) == stream.num_rows - 1 and stream.numbers.isfinite().all()
    assert stream.numbers[:, -2:].tolist() == [[1, 0], [1, 1], [0, 0]] * 2  # Comedy, War


def test_of_user_and_film_only_earlier_batches_are_known() -> None:
    numbers = rating_numbers(made_ratings().sort_values(["timestamp", "userId", "movieId"]), batch=2)
    assert numbers["user_mean"].fillna(-1).tolist() == [-1, -1, 3.75, -1, 5, 5]
    assert numbers["film_mean"].fillna(-1).tolist() == [-1, -1, -1, 3.5, 4.0, 2.0]
    assert numbers["film_count"].tolist() == pytest.approx([0, 0, 0, *[math.log(2)] * 3])
    assert numbers["age"].fillna(-1).round(3).tolist() == [10.0, 1.0, -1, 10.0, 1.0, -1]
    assert numbers["since_last"].fillna(-1).tolist() == pytest.approx([-1, math.log(101), 0, -1, math.log(101), 0])


def test_later_ratings_do_not_change_what_is_known_before() -> None:
    table = made_ratings()
    changed = table.assign(rating=table["rating"].where(table["timestamp"] < 2000, 0.5))
    one, other = (rating_stream(each, batch=2) for each in (table, changed))
    assert not torch.equal(one.label, other.label)
    torch.testing.assert_close(one.numbers[:4], other.numbers[:4], rtol=0, atol=0)


def test_what_is_missed_is_said() -> None:
    results = {"stream": "flights", "student_vs_baseline_percent": -0.9, "ta_vs_baseline_percent": -1.8}
    assert quality.missed(results) == [
        "Wanted of the Student against the baseline: at most -1.0%; missed by 0.10 points."
    ]


def test_rates_at_the_edge_of_what_was_tried_are_said() -> None:
    tried = {
        "a": [{"optimizer": "adam", "lr": 1.0}, *({"optimizer": "adagrad", "lr": lr} for lr in (0.1, 0.2, 0.3))],
        "b": [{"optimizer": "adagrad", "lr": lr} for lr in (0.2, 0.05)],
    }
    chosen = {"a": {"optimizer": "adagrad", "lr": 0.2}, "b": {"optimizer": "adagrad", "lr": 0.05}}
    results = {"tried": tried, "chosen": chosen, "titles": {"a": "A", "b": "B"}}
    assert quality.edges(results) == ["Chosen at the edge of the rates tried: B (0.05 of 0.05 to 0.2)."]


def test_the_command_is_written_as_it_was_typed() -> None:
    results = {"stream": "ratings", "setting": {"warm_up": 7}, "num_seeds": 4, "titles": {}}
    assert quality.command(results) == "matta study quality --stream ratings --warm-up 7 --seeds 4"
    assert quality.picture(results) == "images/quality-ratings-warm-up-7.png"
    assert quality.command(results | {"titles": {"again": ""}}).endswith("--warm-up 7 --longer --seeds 4")


def test_an_existing_folder_is_refused_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["study", "quality", "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 1}, "seeds=1: expected at least 2"),
        ({"warm_up": -1}, "warm_up=-1: expected a number of steps"),
        ({"stream": "trains"}, "stream='trains': expected flights or ratings"),
    ],
    ids=["seeds", "warm-up", "stream"],
)
def test_settings_refuse_what_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        QualitySettings(**settings)
