"""The metric of each unit (a request, with one row or several), and AUROC with each unit's influence on it.

Rows of one request are not independent, so a request is one unit: the mean over its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from matta.errors import AbError

Floats = NDArray[np.float64]
SMALLEST: Final = 1e-15  # a probability, so that its logarithm is finite
MANY: Final = 50  # predictions


def unit_values(metric: str, kind: str, predictions: Floats, outcomes: Floats, units: NDArray[np.int64]) -> Floats:
    """The metric of each unit, the mean over its rows.

    Args:
        metric: "log_loss" (nats), "calibration" (prediction less outcome), "rate" (the outcome), "squared_error".
        kind: What the predictions are: "logit", "probability" or "value".
        predictions: Of all rows.
        outcomes: Of all rows.
        units: The unit of each row, numbered from 0, each with at least one row.

    Raises:
        AbError: outcomes or predictions out of range.
    """
    rows = _row_values(metric, kind, predictions, outcomes)
    return np.bincount(units, weights=rows) / np.bincount(units)


def _row_values(metric: str, kind: str, predictions: Floats, outcomes: Floats) -> Floats:
    if metric == "rate":
        return outcomes
    if kind == "probability":
        _require_range("probabilities", predictions, "expected", "logits are --predictions logit, others value")
    if metric == "log_loss":
        _require_range("outcomes", outcomes, "log_loss expects", "squared_error takes any")
        if kind == "logit":
            return np.logaddexp(0.0, predictions) - outcomes * predictions
        likely = np.clip(predictions, SMALLEST, 1 - SMALLEST)
        return -(outcomes * np.log(likely) + (1 - outcomes) * np.log1p(-likely))
    predicted = 0.5 * (1 + np.tanh(predictions / 2)) if kind == "logit" else predictions
    return (predicted - outcomes) ** 2 if metric == "squared_error" else predicted - outcomes


def _require_range(name: str, values: Floats, reason: str, remedy: str) -> None:
    if not _are_within(values):
        raise AbError(f"the {name} lie between {values.min():g} and {values.max():g}; {reason} 0 to 1 ({remedy})")


def _are_within(values: Floats) -> bool:
    return not len(values) or bool(values.min() >= 0 and values.max() <= 1)


def look_like_probabilities(metric: str, kind: str, predictions: Floats) -> bool:
    """Whether what is taken for logits lies between 0 and 1, all of many: probabilities from 0.5 to 0.73."""
    is_read = kind == "logit" and metric not in ("rate", "auc_loss")
    return is_read and len(predictions) >= MANY and _are_within(predictions)


@final
@dataclass(frozen=True)
class Auc:
    """AucLoss (1 − AUROC) of an arm, and how far each unit moves it: `influences` have the sum zero.

    `num_rarer` is the number of units with a row of the rarer label.
    """

    loss: float
    influences: Floats
    num_rarer: int

    @property
    def variance(self) -> float:
        """The variance of the loss: DeLong's (1988), over units instead of rows as in Obuchowski (1997)."""
        return float(np.square(self.influences).sum())


def auc_loss(scores: Floats, outcomes: Floats, units: NDArray[np.int64], num_units: int) -> Auc:
    """AucLoss over all pairs of a positive and a negative row, ties half; NaN without both.

    The influence of a row is its share of pairs that are in the wrong order less the mean over all, by the number of
    rows of its label (DeLong's placement values).

    Raises:
        AbError: outcomes that are not 0 or 1.
    """
    positive = outcomes == 1
    if not (positive | (outcomes == 0)).all():
        raise AbError("auc_loss expects outcomes of 0 or 1; for others try squared_error")
    if positive.all() or not positive.any():
        return Auc(np.nan, np.zeros(num_units), 0)
    order = np.argsort(scores)
    lower = _lower(scores[order], positive[order])  # rows of the other label below each row, ties half
    num_positive = int(positive.sum())
    num_negative = len(scores) - num_positive
    rows = np.empty(len(scores))
    rows[order] = np.where(positive[order], 1 - lower / num_negative, lower / num_positive)
    loss = float(rows[positive].mean())
    weights = np.where(positive, 1 / num_positive, 1 / num_negative)
    influences = np.bincount(units, weights=(rows - loss) * weights, minlength=num_units)
    num_rarer = min(len(np.unique(units[of_label])) for of_label in (positive, ~positive))
    return Auc(loss, np.asarray(influences, dtype=np.float64), num_rarer)


def _lower(scores: Floats, positive: NDArray[np.bool_]) -> Floats:
    """How many rows of the other label are below each row, ties half; rows are sorted by score."""
    ends = np.flatnonzero(np.append(scores[1:] != scores[:-1], True)) + 1  # of groups of ties
    starts = np.concatenate([[0], ends[:-1]])
    group = np.repeat(np.arange(len(ends)), ends - starts)
    positives = np.concatenate([[0], np.cumsum(positive)])
    negatives = np.arange(len(scores) + 1) - positives
    other = [np.where(positive, negatives[edge][group], positives[edge][group]) for edge in (starts, ends)]
    return (other[0] + other[1]) / 2
