"""Reports of whole experiments: verdicts, effort, and what is warned of."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from matta.ab_testing import AnswerLog, Split
from matta.ab_testing.comparison import AbReport, auc_interval, compare
from matta.ab_testing.unit_metrics import auc_loss
from matta.cli import main
from matta.errors import AbError

Predict = Callable[[str, float, random.Random], float]


def experiment(
    folder: Path,
    predict: Predict,
    *,
    count: int = 4000,
    shares: dict[str, float] | None = None,
    rows: int = 1,
    keep: Callable[[str, random.Random], bool] = lambda arm, draw: True,
    rate: Callable[[str], float] = lambda arm: 0.3,
) -> Path:
    """A log of `count` requests, one each second, with outcomes for those that `keep` keeps."""
    split, draw = Split(shares or {"A": 1, "B": 1}, salt="test"), random.Random(0)
    with AnswerLog(folder / "log.jsonl", split=split) as log:
        for k in range(count):
            arm = split.arm(str(k))
            outcomes = [float(draw.random() < rate(arm)) for _ in range(rows)]
            predictions = [predict(arm, each, draw) for each in outcomes]
            log.answer(str(k), arm=arm, model=arm, version=1, predictions=predictions, latency_ms=k % 3, time_s=k)
            if keep(arm, draw):
                log.outcome(str(k), outcomes=outcomes, time_s=k + 60)
    return folder / "log.jsonl"


def same(arm: str, outcome: float, draw: random.Random) -> float:
    return draw.gauss(outcome - 1.2, 1)


def sharper(arm: str, outcome: float, draw: random.Random) -> float:
    """Arm B knows more of the outcome."""
    return draw.gauss((3 if arm == "B" else 1) * (outcome - 0.5) - 0.7, 1)


@pytest.mark.parametrize("metric", ["log_loss", "auc_loss", "squared_error"])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_better_arm_is_found(tmp_path: Path, metric: str, rows: int) -> None:
    log = experiment(tmp_path, sharper, rows=rows, count=2000)
    (pair,) = compare(log, metric=metric).pairs
    assert (pair.arm, pair.control, pair.is_stop, pair.decision) == ("B", "A", True, "B is better: stop")
    assert pair.low is not None and pair.high is not None and pair.low < pair.difference < pair.high < 0
    (pair,) = compare([log], metric=metric, control="B").pairs
    assert pair.decision == "B is better: stop" and pair.low > 0


def test_each_arm_is_told(tmp_path: Path) -> None:
    report = compare([experiment(tmp_path, sharper, count=3000)], metric="log_loss")
    assert [arm.name for arm in report.arms] == ["A", "B"] and sum(arm.answers for arm in report.arms) == 3000
    assert all(arm.share == 0.5 and arm.joined == arm.answers and arm.latency_ms == 1 for arm in report.arms)
    worse, better = (arm.metric for arm in report.arms)
    assert report.pairs[0].difference == pytest.approx(better - worse, abs=0.02)
    assert report.warnings == () and report.notes == ()
    assert compare([tmp_path], metric="auc_loss").arms[1].metric < 0.3


def test_a_higher_rate_is_better(tmp_path: Path) -> None:
    log = experiment(tmp_path, same, rate=lambda arm: {"A": 0.3, "B": 0.5}[arm])
    assert compare([log], metric="rate").pairs[0].decision == "B is better: stop"


@pytest.mark.parametrize(
    ("biases", "decision"),
    [
        ({"A": 2.0, "B": 0.1}, "B is better: stop"),
        ({"A": -2.0, "B": 0.1}, "B is better: stop"),
        ({"A": 0.1, "B": -2.0}, "A is better: stop"),
        ({"A": 0.55, "B": -0.68}, "they differ, but which is nearer to zero is open: go on"),
    ],
)
def test_calibration_is_better_nearer_to_zero(tmp_path: Path, biases: dict[str, float], decision: str) -> None:
    log = experiment(tmp_path, lambda arm, outcome, draw: biases[arm] - 0.85)
    assert compare([log], metric="calibration").pairs[0].decision.startswith(decision)


def test_no_difference_beyond_the_margin(tmp_path: Path) -> None:
    log = experiment(tmp_path, same)
    (pair,) = compare([log], margin=0.2).pairs
    assert pair.is_stop and pair.decision == "no difference beyond ±0.2: stop" and pair.is_within_margin
    assert pair.more_requests is None
    (pair,) = compare([log], margin=0.001).pairs
    assert not pair.is_stop and pair.is_within_margin is False


def test_the_effort_told_is_the_effort_it_takes(tmp_path: Path) -> None:
    """An experiment of as many requests as are asked for shows what was to be shown."""
    log = experiment(tmp_path, same, count=2000, keep=lambda arm, draw: draw.random() < 0.5)
    (pair,) = compare([log], margin=0.05).pairs
    assert pair.more_requests is not None and f"{pair.more_requests:,} more requests" in pair.decision
    assert pair.more_hours == pytest.approx(pair.more_requests / 3600, rel=0.01)
    enough = int(1.2 * (2000 + pair.more_requests))
    log = experiment(tmp_path / "longer", same, count=enough, keep=lambda arm, draw: draw.random() < 0.5)
    assert compare([log], margin=0.05).pairs[0].is_stop


def test_too_few_outcomes_give_no_interval(tmp_path: Path) -> None:
    log = experiment(tmp_path, same, count=40)
    for metric in ("log_loss", "auc_loss"):
        (pair,) = compare([log], metric=metric).pairs
        assert (pair.low, pair.high, pair.is_stop, pair.decision) == (None, None, False, "go on: too few outcomes yet")
    nothing = experiment(tmp_path / "none", same, count=40, keep=lambda arm, draw: False)
    assert compare([nothing], metric="auc_loss").pairs[0].difference is None
    assert compare([nothing]).arms[0].metric is None


def test_an_arm_of_a_few_requests_gives_no_interval(tmp_path: Path) -> None:
    """That none of its first ones had an outcome of 5% says nothing, however many requests the other arm has."""
    log = experiment(
        tmp_path, same, shares={"A": 0.99, "B": 0.01}, count=1500, rate=lambda arm: {"A": 0.05, "B": 0.0}[arm]
    )
    report = compare([log], metric="rate")
    assert 5 < report.arms[1].joined < 20
    assert report.pairs[0].difference == pytest.approx(-(report.arms[0].metric or 0))
    assert report.pairs[0].decision == "go on: too few outcomes yet"


def test_auc_waits_for_both_labels_in_both_arms() -> None:
    draw = np.random.default_rng(1)
    outcomes, scores = (draw.random(1000) < 0.2).astype(float), draw.normal(size=1000)
    large = auc_loss(scores, outcomes, np.arange(1000), 1000)
    few = np.array([1.0] * 19 + [0.0] * 200)
    small = auc_loss(scores[:219], few, np.arange(219), 219)
    assert (large.num_rarer, small.num_rarer) == (int(outcomes.sum()), 19)
    assert math.isinf(auc_interval(large, small, alpha=0.05, tuned_for=1000).half_width)
    assert math.isfinite(auc_interval(large, large, alpha=0.05, tuned_for=1000).half_width)
    one = auc_loss(np.arange(200.0), (np.arange(200) == 0).astype(float), np.arange(200), 200)
    assert (one.loss, one.num_rarer) == (1.0, 1)  # the only positive is below all others, and says next to nothing
    assert math.isinf(auc_interval(large, one, alpha=0.05, tuned_for=1000).half_width)
    alike = auc_loss(scores[:219], few, np.zeros(219, np.int64), 1)  # all of one request
    assert alike.num_rarer == 1


def test_several_arms_share_alpha(tmp_path: Path) -> None:
    log = experiment(tmp_path, sharper, shares={"A": 2, "B": 1, "C": 1}, count=6000)
    report = compare([log], control="A", alpha=0.05)
    assert {pair.arm: pair.is_stop for pair in report.pairs} == {"B": True, "C": False}

    def width(report: AbReport) -> float:
        return report.pairs[0].high - report.pairs[0].low

    pair_alone = [each for each in map(json.loads, log.read_text().splitlines()) if each.get("arm") != "C"]
    alone = tmp_path / "alone.jsonl"
    alone.write_text("\n".join(json.dumps(each) for each in pair_alone if each["kind"] != "split"))
    assert width(report) > width(compare([alone], shares={"A": 2, "B": 1}))
    assert width(report) == pytest.approx(width(compare([alone], shares={"A": 2, "B": 1}, alpha=0.025)))


def test_a_split_that_is_not_as_declared_is_warned_of(tmp_path: Path) -> None:
    log = experiment(tmp_path, same, shares={"A": 0.45, "B": 0.55}, count=6000)
    assert compare([log]).warnings == ()
    (warning,) = compare([log], shares={"A": 1, "B": 1}).warnings
    assert "the split is not as declared" in warning and "0.5 (A), 0.5 (B)" in warning


@pytest.mark.parametrize("metric", ["log_loss", "calibration", "squared_error", "rate", "auc_loss"])
def test_probabilities_that_are_taken_for_logits_are_warned_of(tmp_path: Path, metric: str) -> None:
    log = experiment(tmp_path, lambda arm, outcome, draw: draw.random(), count=200)
    warnings = compare([log], metric=metric).warnings
    assert len(warnings) == (metric not in ("rate", "auc_loss"))
    assert all(
        "lie between 0 and 1, as probabilities do" in each and "--predictions probab" in each for each in warnings
    )
    assert compare([log], metric=metric, predictions="probability").warnings == ()
    one = experiment(
        tmp_path / "one", lambda arm, y, draw: draw.random() if arm == "B" else draw.gauss(0, 2), count=200
    )
    assert all("all predictions of B lie" in each for each in compare([one], metric=metric).warnings)
    assert len(compare([one], metric=metric).warnings) == len(warnings)
    assert compare([experiment(tmp_path / "logits", same, count=200)], metric=metric).warnings == ()


def test_outcomes_that_one_arm_lacks_are_warned_of(tmp_path: Path) -> None:
    log = experiment(tmp_path, same, keep=lambda arm, draw: draw.random() < {"A": 0.9, "B": 0.6}[arm])
    report = compare([log])
    (warning,) = report.warnings
    assert "outcomes are missing from one arm more" in warning and "% (A), " in warning
    assert report.notes == (f"{4000 - sum(arm.joined for arm in report.arms):,} answers without an outcome yet",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "loss"}, "metric='loss'; expected one of"),
        ({"predictions": "odds"}, "predictions='odds'"),
        ({"predictions": "value"}, "log_loss needs logits"),
        ({"alpha": 0}, "alpha=0; expected a number between 0 and 1"),
        ({"margin": math.nan}, "margin=nan"),
        ({"tuned_for": 0}, "tuned_for=0"),
        ({"control": "C"}, "control='C', and the logs have the arms A, B"),
        ({"shares": {"A": 1, "C": 1}}, "shares are declared for A, C"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AbError, match=message):
        compare([experiment(tmp_path, same, count=10)], **options)


def test_one_arm_is_not_compared(tmp_path: Path) -> None:
    with pytest.raises(AbError, match="expected two or more"):
        compare([experiment(tmp_path, same, count=10, shares={"A": 1})])


def test_auc_raises_few_false_alarms_and_covers_the_truth() -> None:
    draw, alarms, fixed_alarms = np.random.default_rng(0), 0, 0
    for _ in range(100):
        outcomes = (draw.random(4000) < 0.2).astype(float)
        scores, in_b = outcomes + draw.normal(size=4000), draw.random(4000) < 0.5
        looks = []
        for look in range(200, 4001, 200):
            arms = []
            for of_arm in (~in_b[:look], in_b[:look]):
                units = np.arange(of_arm.sum())
                arms.append(auc_loss(scores[:look][of_arm], outcomes[:look][of_arm], units, len(units)))
            found = auc_interval(*arms, alpha=0.05, tuned_for=2000)
            fixed = 1.96 * found.deviation / math.sqrt(look)
            looks.append((found.sign != 0, abs(found.centre) > fixed))
        alarm, fixed_alarm = np.array(looks).any(axis=0)
        alarms, fixed_alarms = alarms + alarm, fixed_alarms + fixed_alarm
    assert alarms <= 5 and fixed_alarms > 15


def test_the_command_prints_a_table_or_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    log = experiment(tmp_path, sharper, keep=lambda arm, draw: draw.random() < 0.9)
    with open(log, "a") as file:
        file.write('{"kind": "answer", "id": "unfin')  # the server writes just now
    assert main(["ab", str(log), "--metric", "auc_loss", "--control", "A"]) == 0
    shown = capsys.readouterr().out
    assert "B − A" in shown and "B is better: stop" in shown and "unfinished last lines" in shown
    assert main(["ab", str(log), "--shares", "A=0.5,B=0.5", "--margin", "0.1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["pairs"][0]["decision"] == "B is better: stop" and report["margin"] == 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shares", "A:0.5"], "expected an arm and a number each"),
        (["--metric", "loss"], "expected one of: log_loss"),
        (["--outcomes", "nowhere"], "there is no log in nowhere"),
    ],
)
def test_errors_of_the_command_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert main(["ab", str(experiment(tmp_path, same, count=10)), *options]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
