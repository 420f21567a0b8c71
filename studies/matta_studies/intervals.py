"""Paired changes over seeds, relative and absolute, with Student's t for the interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any, final

from scipy.stats import t


@final
@dataclass(frozen=True, kw_only=True)
class Change:
    """A mean change, and its 95% confidence interval: in percent, or in the unit of what was compared."""

    mean: float
    low: float
    high: float
    is_relative: bool = True

    def __str__(self) -> str:
        if self.is_relative:
            return f"{self.mean:+.2f}% [{self.low:+.2f}, {self.high:+.2f}]"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @property
    def interval(self) -> list[float]:
        """The interval as JSON has it."""
        return [self.low, self.high]

    @property
    def is_certain(self) -> bool:
        """Whether the interval leaves zero out."""
        return not self.low <= 0 <= self.high

    def to_json(self) -> dict[str, Any]:
        """A relative change, as results tell it."""
        return {"percent": self.mean, "interval": self.interval}

    @staticmethod
    def told(figure: dict[str, Any]) -> Change:
        """The change of which `to_json` gave `figure`."""
        low, high = figure["interval"]
        return Change(mean=figure["percent"], low=low, high=high)


def relative_change(values: Sequence[float], references: Sequence[float]) -> Change:
    """How far `values` lie from `references` of the same seeds: the mean of the changes, in percent.

    Raises:
        ValueError: fewer than two pairs, or lists of different lengths.

    Example:
        >>> str(relative_change([0.9, 0.8], [1.0, 1.0]))
        '-15.00% [-78.53, +48.53]'
    """
    changes = [100.0 * (value / reference - 1.0) for value, reference in zip(values, references, strict=True)]
    mean, reach = mean_and_reach(changes)
    return Change(mean=mean, low=mean - reach, high=mean + reach)


def difference(values: Sequence[float], references: Sequence[float]) -> Change:
    """How far `values` lie from `references` of the same seeds: the mean of the differences.

    Raises:
        ValueError: fewer than two pairs, or lists of different lengths.

    Example:
        >>> str(difference([0.9, 0.8], [1.0, 1.0]))
        '-0.1500 [-0.7853, +0.4853]'
    """
    mean, reach = mean_and_reach([value - reference for value, reference in zip(values, references, strict=True)])
    return Change(mean=mean, low=mean - reach, high=mean + reach, is_relative=False)


def beyond_the_sum(
    both: Sequence[float], one: Sequence[float], other: Sequence[float], baseline: Sequence[float]
) -> Change:
    """How far two changes together go beyond the sum of what each gives alone, in percent of the baseline's loss.

    Below zero: more than the sum.

    Example:
        >>> round(beyond_the_sum([0.65, 1.3], [0.9, 1.8], [0.8, 1.6], [1.0, 2.0]).mean, 6)
        -5.0
    """
    rows = zip(both, one, other, baseline, strict=True)
    return relative_change([joint - first - second + 2 * base for joint, first, second, base in rows], baseline)


def figures(changes: Mapping[str, Change]) -> dict[str, Any]:
    """Changes under names of their own, as the results of a study have them."""
    return {f"{name}_{key}": value for name, change in changes.items() for key, value in change.to_json().items()}


def change_of(results: Mapping[str, Any], figure: str) -> Change:
    """What `figures` has written of a change."""
    return Change.told({key: results[f"{figure}_{key}"] for key in ("percent", "interval")})


def mean_and_reach(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and how far its 95% interval by Student's t reaches to either side.

    Raises:
        ValueError: fewer than two values.
    """
    if len(values) < 2:
        raise ValueError(f"received {len(values)} pair(s); expected at least 2, since an interval needs two")
    return fmean(values), float(t.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
