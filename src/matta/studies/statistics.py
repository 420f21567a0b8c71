"""Paired relative changes over seeds, with Student's t for the interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import final


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """A relative change in percent, and its 95% confidence interval."""

    percent: float
    low: float
    high: float

    @property
    def interval(self) -> list[float]:
        """The interval as JSON has it."""
        return [self.low, self.high]

    def __str__(self) -> str:
        return f"{self.percent:+.2f}% [{self.low:+.2f}, {self.high:+.2f}]"


def relative_change(values: Sequence[float], references: Sequence[float]) -> Change:
    """How far `values` lie from `references` of the same seeds: the mean of the changes, in percent.

    Raises:
        ValueError: fewer than two pairs, or lists of different lengths.

    Example:
        >>> str(relative_change([0.9, 0.8], [1.0, 1.0]))
        '-15.00% [-78.53, +48.53]'
    """
    if len(values) < 2:
        raise ValueError(f"received {len(values)} pair(s); expected at least 2, since an interval needs two")
    changes = [100.0 * (value / reference - 1.0) for value, reference in zip(values, references, strict=True)]
    mean = fmean(changes)
    reach = t_quantile(0.975, len(changes) - 1) * stdev(changes) / math.sqrt(len(changes))
    return Change(percent=mean, low=mean - reach, high=mean + reach)


def t_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t-distribution, for a probability above one half, by bisection.

    Example:
        >>> round(t_quantile(0.975, 4), 4)
        2.7764
    """
    low, high = 0.0, 1e3
    while high - low > 1e-12 * max(1.0, high):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if _t_cumulative(middle, degrees) < probability else (low, middle)
    return 0.5 * (low + high)


def _t_cumulative(t: float, degrees: int) -> float:
    """P(T <= t) for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine = math.cos(angle)
    if degrees % 2:
        total, term = (angle, math.sin(angle) * cosine) if degrees > 1 else (angle, 0.0)
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= cosine**2 * 2 * k / (2 * k + 1)
        return 0.5 + total / math.pi
    total, term = 0.0, math.sin(angle)
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= cosine**2 * (2 * k - 1) / (2 * k)
    return 0.5 + 0.5 * total
