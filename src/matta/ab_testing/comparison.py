"""The report of an experiment: each arm's metric, each difference from the control, and whether to stop."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, final

import numpy as np
from numpy.typing import NDArray

from matta.ab_testing.ab_settings import TUNED_FOR, check_choices
from matta.ab_testing.confidence_sequences import (
    MIN_EFFECTIVE,
    arms_have_begun,
    confidence_sequence,
    half_width,
    has_begun,
    pseudo_outcomes,
    tuned_rho_squared,
    units_needed,
)
from matta.ab_testing.joining import Joined, read_logs
from matta.ab_testing.split_checks import split_p_value
from matta.ab_testing.traffic import Split
from matta.ab_testing.unit_metrics import Auc, auc_loss, look_like_probabilities, unit_values
from matta.errors import AbError

MISMATCH: Final = 0.001  # a p-value below it is told
SECONDS_PER_HOUR: Final = 3600


@final
@dataclass(frozen=True, kw_only=True)
class Arm:
    """One arm: answers, those with an outcome, the metric over these, and the median latency of its answers."""

    name: str
    share: float
    answers: int
    joined: int
    metric: float | None
    latency_ms: float | None


@final
@dataclass(frozen=True, kw_only=True)
class Pair:
    """An arm against the control: the difference (arm less control), its interval, and what follows from it.

    Without an interval there are too few outcomes yet. `is_stop` says that waiting longer changes nothing, and
    `is_within_margin` that the arm is at most `margin` worse (non-inferiority); None without a margin.
    """

    arm: str
    control: str
    difference: float | None
    low: float | None
    high: float | None
    decision: str
    is_stop: bool
    is_within_margin: bool | None
    more_requests: int | None
    more_hours: float | None


@final
@dataclass(frozen=True, kw_only=True)
class AbReport:
    r"""What `matta ab` tells, made by `compare`.

    The intervals hold at all looks and for all pairs together, at the level 1 − alpha. `warnings` cast doubt on all
    figures; `notes` tell what was left out.

    Example:
        >>> import json, tempfile
        >>> from matta.ab_testing.comparison import compare
        >>> path = f"{tempfile.mkdtemp()}/log.jsonl"
        >>> answers = [{"kind": "answer", "id": arm, "arm": arm, "predictions": [0.0]} for arm in "AB"]
        >>> with open(path, "w") as file:
        ...     for line in (*answers, {"kind": "outcome", "id": "A", "outcomes": [1.0]}):
        ...         _ = file.write(f"{json.dumps(line)}\n")
        >>> report = compare([path])
        >>> report.arms[0].metric, report.pairs[0].decision, report.notes
        (0.6931471805599453, 'go on: too few outcomes yet', ('1 answers without an outcome yet',))
    """

    metric: str
    alpha: float
    margin: float | None
    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def compare(
    logs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    outcomes: str | os.PathLike[str] | None = None,
    metric: str = "log_loss",
    control: str | None = None,
    shares: Mapping[str, float] | None = None,
    alpha: float = 0.05,
    margin: float | None = None,
    predictions: str = "logit",
    tuned_for: int = TUNED_FOR,
) -> AbReport:
    """Compare the arms of an experiment, at its end or while it runs.

    Look as often as you like: over all looks, the chance that an interval ever misses the truth is about `alpha`.
    With several arms against the control, alpha is divided by their number (Bonferroni).

    Args:
        logs: Files of JSON lines or Parquet, or folders of them; one or several.
        outcomes: A file or folder of outcomes, if they are not in the logs.
        metric: "log_loss" (nats), "auc_loss" (1 − AUROC), "calibration" (mean prediction less mean outcome; nearer to
            zero is better), "rate" (mean outcome; higher is better) or "squared_error".
        control: The arm that the others are compared with (default: the first by name).
        shares: Declared shares of the arms (default: as logged, or equal).
        alpha: Chance of a false alarm over all looks.
        margin: A difference too small to matter.
        predictions: "logit", "probability" or "value".
        tuned_for: Requests with an outcome at which the interval is narrowest. Fix it before the experiment. After a
            tenth of them the interval is 26% wider than it could be, after ten times as many 7%.

    Raises:
        AbError: a log that cannot be read, fewer than two arms, or an option out of range.

    Example:
        >>> import random, tempfile
        >>> from matta.ab_testing import AnswerLog, Split
        >>> from matta.ab_testing.comparison import compare
        >>> split, draw = Split({"old": 1, "new": 1}, salt="example"), random.Random(0)
        >>> path = f"{tempfile.mkdtemp()}/log.jsonl"
        >>> with AnswerLog(path, split=split) as log:
        ...     for k in range(2000):
        ...         arm, late = split.arm(str(k)), float(draw.random() < 0.3)
        ...         logit = draw.gauss({"old": 0, "new": 2 * late - 1}[arm])
        ...         log.answer(str(k), arm=arm, model=arm, version=1, predictions=[logit], latency_ms=1.0, time_s=k)
        ...         log.outcome(str(k), outcomes=[late], time_s=k)
        >>> compare([path], control="old").pairs[0].decision
        'new is better: stop'
    """
    check_choices(metric, predictions, alpha, margin, tuned_for)
    paths = [logs] if isinstance(logs, str | os.PathLike) else logs
    joined = read_logs([Path(each) for each in paths], None if outcomes is None else Path(outcomes))
    declared = _declared(joined, shares)
    control = control or joined.arms[0]
    if control not in joined.arms or len(joined.arms) < 2:
        raise AbError(f"control={control!r}, and the logs have the arms {', '.join(joined.arms)}; expected two or more")
    experiment = _Experiment(
        joined=joined,
        shares=declared,
        metric=metric,
        values=None
        if metric == "auc_loss"
        else unit_values(metric, predictions, joined.predictions, joined.outcomes, joined.request),
        alpha=alpha / (len(joined.arms) - 1),
        margin=margin,
        tuned_for=tuned_for,
    )
    return AbReport(
        metric=metric,
        alpha=alpha,
        margin=margin,
        arms=tuple(experiment.arm(index) for index in range(len(joined.arms))),
        pairs=tuple(experiment.pair(name, control) for name in joined.arms if name != control),
        warnings=(*_warnings(joined, declared), *_warnings_of_kind(joined, metric, predictions)),
        notes=tuple(_notes(joined)),
    )


def _declared(joined: Joined, given: Mapping[str, float] | None) -> Mapping[str, float]:
    shares = Split(given or joined.shares or dict.fromkeys(joined.arms, 1.0)).shares
    if set(shares) != set(joined.arms):
        raise AbError(
            f"shares are declared for {', '.join(shares)}, and the logs have {', '.join(joined.arms)}; expected the "
            f"same arms"
        )
    return shares


@final
@dataclass(frozen=True)
class _Interval:
    """The interval of a difference between two arms; its half-width is infinite while there are too few units."""

    centre: float = math.nan
    half_width: float = math.inf
    deviation: float = math.nan

    @property
    def low(self) -> float:
        return self.centre - self.half_width

    @property
    def high(self) -> float:
        return self.centre + self.half_width

    @property
    def sign(self) -> int:
        """The sign of all numbers in the interval; 0 where it holds both signs."""
        return int(self.low > 0) - int(self.high < 0)


@final
@dataclass(frozen=True, kw_only=True)
class _Experiment:
    """The joined requests, and how they are judged; `values` are the metric's of each request, but for AucLoss."""

    joined: Joined
    shares: Mapping[str, float]
    metric: str
    values: NDArray[np.float64] | None
    alpha: float
    margin: float | None
    tuned_for: int

    def arm(self, index: int) -> Arm:
        joined, of_arm = self.joined, self.joined.arm == index
        metric = math.nan
        if of_arm.any():
            metric = self._auc(of_arm).loss if self.values is None else float(self.values[of_arm].mean())
        return Arm(
            name=joined.arms[index],
            share=self.shares[joined.arms[index]],
            answers=joined.answers[index],
            joined=int(of_arm.sum()),
            metric=_finite(metric),
            latency_ms=_finite(joined.latency_ms[index]),
        )

    def pair(self, name: str, control: str) -> Pair:
        """The verdict on an arm against the control."""
        in_b, in_a = (self.joined.arm == self.joined.arms.index(each) for each in (name, control))
        share = self.shares[name] / (self.shares[name] + self.shares[control])
        found = self._difference_of_auc(in_a, in_b) if self.values is None else self._of_means(in_a, in_b, share, -1)
        better = -found.sign
        if self.metric == "rate":
            better = found.sign
        elif self.metric == "calibration":  # |b| < |a| where a + b and b - a have opposite signs
            better = -found.sign * self._of_means(in_a, in_b, share, 1).sign
        more = self._more_requests(found, int((in_a | in_b).sum()))
        decision, is_stop = self._decision(found, better, name, control)
        hours = None if more is None else _finite(self._hours(more))
        return Pair(
            arm=name,
            control=control,
            difference=_finite(found.centre),
            low=_finite(found.low),
            high=_finite(found.high),
            decision=decision if is_stop else decision + self._told_effort(found, more, hours),
            is_stop=is_stop,
            is_within_margin=None if self.margin is None else self._is_within(found),
            more_requests=None if is_stop else more,
            more_hours=None if is_stop else hours,
        )

    def _of_means(self, in_a: NDArray[np.bool_], in_b: NDArray[np.bool_], share: float, sign: int) -> _Interval:
        assert self.values is not None
        either = in_a | in_b
        values, of_b = self.values[either], in_b[either]
        units = pseudo_outcomes(values, of_b, share, sign=sign)
        if not len(units):
            return _Interval()
        found = confidence_sequence(units, alpha=self.alpha, tuned_for=self.tuned_for)
        if not (arms_have_begun(values, of_b)[-1] and math.isfinite(found.half_widths[-1])):
            return _Interval(
                float(values[of_b].mean() + sign * values[~of_b].mean())
            )  # a few weights would say anything
        return _Interval(float(found.means[-1]), float(found.half_widths[-1]), float(found.deviations[-1]))

    def _difference_of_auc(self, in_a: NDArray[np.bool_], in_b: NDArray[np.bool_]) -> _Interval:
        if not (in_a.any() and in_b.any()):
            return _Interval()
        return auc_interval(self._auc(in_a), self._auc(in_b), alpha=self.alpha, tuned_for=self.tuned_for)

    def _auc(self, of_arm: NDArray[np.bool_]) -> Auc:
        joined, rows = self.joined, of_arm[self.joined.request]
        units = (np.cumsum(of_arm) - 1)[joined.request[rows]]
        return auc_loss(joined.predictions[rows], joined.outcomes[rows], units, int(of_arm.sum()))

    def _decision(self, found: _Interval, better: int, name: str, control: str) -> tuple[str, bool]:
        if better:
            return f"{name if better > 0 else control} is better: stop", True
        if self.margin is not None and max(-found.low, found.high) <= self.margin:
            return f"no difference beyond ±{self.margin:g}: stop", True
        if found.sign:
            return "they differ, but which is nearer to zero is open: go on", False
        return "go on", False

    def _is_within(self, found: _Interval) -> bool:
        """Whether the arm is at most the margin worse."""
        worst = {"rate": -found.low, "calibration": max(-found.low, found.high)}.get(self.metric, found.high)
        return bool(worst <= (self.margin or 0.0))

    def _goal(self, found: _Interval) -> float:
        """The half-width that decides: between the difference and zero, or between it and the margin."""
        seen = abs(found.centre)
        return seen if self.margin is None else max(seen, self.margin - seen)

    def _more_requests(self, found: _Interval, num_units: int) -> int | None:
        """Requests until the half-width is as small as it must be, all arms and those without outcomes counted."""
        if not math.isfinite(found.half_width) or not (goal := self._goal(found)):
            return None
        rho_squared = tuned_rho_squared(self.tuned_for, self.alpha)
        units = units_needed(goal, found.deviation, rho_squared, self.alpha) - num_units
        return max(0, math.ceil(units * sum(self.joined.answers) / num_units))

    def _hours(self, requests: int) -> float:
        return requests * self.joined.seconds / sum(self.joined.answers) / SECONDS_PER_HOUR

    def _told_effort(self, found: _Interval, more: int | None, hours: float | None) -> str:
        if more is None:
            return ": too few outcomes yet" if math.isinf(found.half_width) else ""
        time = f" ({hours:.1f} h)" if hours else ""
        goal = self._goal(found)
        aim = f"detect {goal:.2g}" if goal == abs(found.centre) else f"show that none is beyond ±{self.margin:g}"
        return f": about {more:,} more requests at this rate{time} to {aim}"


def auc_interval(a: Auc, b: Auc, *, alpha: float, tuned_for: float) -> _Interval:
    """The interval of the difference in AucLoss, of all pairs of rows so far.

    A U-statistic is the mean of its influences but for a rest that vanishes faster, almost surely, than the interval
    narrows; so the sequence for means holds for it too. Windows of requests, each with an AUROC, were tried in its
    place (docs/log.md): valid as well, but wider, and they begin later.
    """
    num_units = len(a.influences) + len(b.influences)
    squares = a.variance + b.variance
    fourths = sum(float(np.square(np.square(each.influences)).sum()) for each in (a, b))
    is_small = 2 * min(a.num_rarer, b.num_rarer) < MIN_EFFECTIVE  # one positive has no deviation, and says little
    if is_small or not math.isfinite(a.loss + b.loss) or not has_begun(num_units, squares, fourths):
        return _Interval(b.loss - a.loss)
    deviation = math.sqrt(squares * num_units)
    width = half_width(num_units, deviation, tuned_rho_squared(tuned_for, alpha), alpha)
    return _Interval(b.loss - a.loss, float(width), deviation)


def _warnings(joined: Joined, shares: Mapping[str, float]) -> Iterator[str]:
    """What casts doubt on all figures."""
    declared = [shares[arm] for arm in joined.arms]
    with_outcome = np.bincount(joined.arm, minlength=len(joined.arms)).tolist()
    if (p_value := split_p_value(joined.answers, declared)) < MISMATCH:
        yield (
            f"the split is not as declared (p = {p_value:.1g}): {_told(joined, joined.answers)} answers for shares of "
            f"{_told(joined, [f'{share:g}' for share in declared])}; find out why before you trust a difference"
        )
    elif (p_value := split_p_value(with_outcome, declared)) < MISMATCH:
        counts = zip(with_outcome, joined.answers, strict=True)
        parts = [f"{1 - known / max(1, answers):.1%}" for known, answers in counts]
        yield (
            f"outcomes are missing from one arm more than from another (p = {p_value:.1g}): {_told(joined, parts)} of "
            f"the answers have none; the difference may be of who is missing"
        )


def _warnings_of_kind(joined: Joined, metric: str, kind: str) -> Iterator[str]:
    """Arms whose predictions look like another kind: one of two models may give what the other does not."""
    arm = joined.arm[joined.request]
    found = [look_like_probabilities(metric, kind, joined.predictions[arm == k]) for k in range(len(joined.arms))]
    if any(found):
        names = ", ".join(name for name, is_one in zip(joined.arms, found, strict=True) if is_one)
        yield (
            f"all predictions of {names} lie between 0 and 1, as probabilities do, and {metric} takes them for logits; "
            f"if they are probabilities, compare with --predictions probability, or log logits in all arms"
        )


def _told(joined: Joined, values: Sequence[object]) -> str:
    return ", ".join(f"{value} ({arm})" for arm, value in zip(joined.arms, values, strict=True))


def _notes(joined: Joined) -> Iterator[str]:
    """What was left out."""
    without = sum(joined.answers) - len(joined.arm) - joined.num_of_other_length
    told = {
        "answers without an outcome yet": without,
        "answers to an id that was answered before (the first counts)": joined.num_answered_twice,
        "outcomes of an id that had one before (the first counts)": joined.num_outcomes_twice,
        "outcomes without an answer": joined.num_without_answer,
        "requests with outcomes of another number than predictions (left out)": joined.num_of_other_length,
        "unfinished last lines of a file (skipped)": joined.num_unfinished,
    }
    yield from (f"{count:,} {name}" for name, count in told.items() if count)


def _finite(value: float) -> float | None:
    """None in place of what JSON cannot write."""
    return float(value) if math.isfinite(value) else None
