"""The metric of each request, against formulas written out, and AUROC against all pairs."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matta.ab_testing.unit_metrics import auc_loss, unit_values
from matta.errors import AbError

UNITS = np.array([0, 0, 1])
LOGITS, OUTCOMES = np.array([-1.0, 0.0, 2.0]), np.array([0.0, 1.0, 1.0])
PROBABILITIES = 1 / (1 + np.exp(-LOGITS))


def values(metric: str, kind: str = "logit", predictions: np.ndarray = LOGITS) -> list[float]:
    return unit_values(metric, kind, predictions, OUTCOMES, UNITS).tolist()


def test_metrics_are_the_formulas_and_means_over_rows() -> None:
    p, q, r = PROBABILITIES
    assert values("log_loss") == pytest.approx([(-math.log(1 - p) - math.log(q)) / 2, -math.log(r)])
    assert values("calibration") == pytest.approx([(p + q - 1) / 2, r - 1])
    assert values("squared_error") == pytest.approx([(p**2 + (q - 1) ** 2) / 2, (r - 1) ** 2])
    assert values("rate") == [0.5, 1.0]
    assert values("squared_error", "value") == [0.0 + (1 + 1) / 2, 1.0]


@pytest.mark.parametrize("metric", ["log_loss", "calibration", "squared_error", "rate"])
def test_probabilities_give_what_their_logits_give(metric: str) -> None:
    assert values(metric, "probability", PROBABILITIES) == pytest.approx(values(metric))


def test_sure_predictions_have_a_finite_loss() -> None:
    assert values("log_loss", "logit", np.array([1e4, -1e4, 0.0]))[0] == 1e4
    assert math.isfinite(values("log_loss", "probability", np.array([1.0, 0.0, 1.0]))[0])


def test_what_is_out_of_range_is_refused() -> None:
    for metric in ("log_loss", "calibration", "squared_error"):
        with pytest.raises(AbError, match="the probabilities lie between -1 and 2; expected 0 to 1 .logits are --pred"):
            values(metric, "probability")
    assert values("rate", "probability") == [0.5, 1.0]
    with pytest.raises(AbError, match="the outcomes lie between"):
        unit_values("log_loss", "logit", LOGITS, OUTCOMES + 1, UNITS)
    with pytest.raises(AbError, match="0 or 1"):
        auc_loss(LOGITS, np.array([0.0, 0.5, 1.0]), UNITS, 2)


def all_pairs(scores: np.ndarray, outcomes: np.ndarray, units: np.ndarray) -> tuple[float, list[float]]:
    """AucLoss and DeLong's placement values, pair by pair."""
    above, below = np.flatnonzero(outcomes == 1), np.flatnonzero(outcomes == 0)
    wrong = np.array([[(scores[j] > scores[i]) + 0.5 * (scores[j] == scores[i]) for j in below] for i in above])
    loss = wrong.mean()
    influences = np.zeros(units.max() + 1)
    for rows, parts in ((above, wrong.mean(axis=1)), (below, wrong.mean(axis=0))):
        for row, part in zip(rows, parts, strict=True):
            influences[units[row]] += (part - loss) / len(rows)
    return float(loss), influences.tolist()


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
def test_auc_equals_all_pairs_with_ties_and_rows(rows: list[tuple[int, bool, int]]) -> None:
    scores, outcomes, units = (np.array(each) for each in zip(*rows, strict=True))
    found = auc_loss(scores.astype(float), outcomes.astype(float), units, int(units.max()) + 1)
    if outcomes.all() or not outcomes.any():
        assert math.isnan(found.loss)
        return
    loss, influences = all_pairs(scores, outcomes, units)
    assert found.loss == pytest.approx(loss)
    assert found.influences.tolist() == pytest.approx(influences)
    assert found.influences.sum() == pytest.approx(0)


def test_the_variance_is_that_over_samples_of_requests() -> None:
    """Requests of three rows with a common part: rows alone would give too small a variance."""
    draw = np.random.default_rng(0)
    losses, variances, by_rows = [], [], []
    for _ in range(300):
        units = np.repeat(np.arange(200), 3)
        common = draw.normal(size=200)[units]
        outcomes = (draw.random(600) < 1 / (1 + np.exp(-2 * common))).astype(float)
        scores = common + draw.normal(size=600)
        found = auc_loss(scores, outcomes, units, 200)
        losses.append(found.loss)
        variances.append(found.variance)
        by_rows.append(auc_loss(scores, outcomes, np.arange(600), 600).variance)
    assert np.mean(variances) == pytest.approx(np.var(losses), rel=0.15)
    assert np.mean(by_rows) < 0.8 * np.var(losses)
