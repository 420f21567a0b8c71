"""Intervals for a mean that hold at all looks together, however often one looks and whenever one stops.

The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central limit
theory and asymptotic confidence sequences" (arXiv 2103.06476), Theorem 2.2. A fixed-sample interval holds at one look
that was fixed beforehand; looked at after every batch it raises false alarms in far more than 5% of experiments.

Written here, and not taken from the package `confseq`: that has no asymptotic sequence in Python, needs a C++ compiler
and Boost to install, and its exact sequences are for bounded numbers, which a log loss is not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, final

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

TOLERANCE: Final = 1e-9
MIN_UNITS: Final = 100
MIN_EFFECTIVE: Final = 40.0
FIRST_UNITS: Final = 5  # of each arm


def tuned_rho_squared(num_units: float, alpha: float) -> float:
    """The ρ² with which the interval is narrowest after `num_units`, to be fixed before the experiment.

    With u = tρ², the half-width is least where u = log((u + 1) / α²): its derivative set to zero, which is the
    paper's expression by Lambert's W (Appendix B.2).

    Example:
        >>> 10_000 * tuned_rho_squared(10_000, alpha=0.05)  # doctest: +ELLIPSIS
        8.21...
    """
    u, before = 1.0, 0.0
    while abs(u - before) > TOLERANCE * u:  # a contraction: the slope is 1 / (u + 1)
        u, before = math.log((u + 1) / alpha**2), u
    return u / num_units


def half_width(t: Any, deviation: Any, rho_squared: float, alpha: float) -> Any:
    """Half the width of the interval of a mean after `t` units, which deviate by `deviation` (Theorem 2.2).

    σ · sqrt(2 (tρ² + 1) / (t²ρ²) · log(sqrt(tρ² + 1) / α))

    Example:
        >>> rho_squared = tuned_rho_squared(10_000, alpha=0.05)
        >>> float(half_width(10_000, 1.0, rho_squared, alpha=0.05))  # a fixed-sample interval: 0.0196
        0.0303...
    """
    t = np.asarray(t, dtype=np.float64)
    u = t * rho_squared
    return deviation * np.sqrt(2 * (u + 1) / (t * u) * np.log(np.sqrt(u + 1) / alpha))


def units_needed(width: float, deviation: float, rho_squared: float, alpha: float) -> int:
    """After how many units half the width is `width` at most."""
    low, high = 1, 2
    while half_width(high, deviation, rho_squared, alpha) > width:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if half_width(middle, deviation, rho_squared, alpha) > width:
            low = middle
        else:
            high = middle
    return high


def pseudo_outcomes(values: Floats, in_b: NDArray[np.bool_], share_b: float, *, sign: int = -1) -> Floats:
    """A number for each unit whose expectation is the mean of arm B less that of arm A (with `sign=1`: their sum).

    Inverse-propensity weights of what a value exceeds the mean of its arm *before* this unit by, plus those means: the
    expectation is right whatever the means are, because they are known before the arm is drawn, and the variance is
    small because they are near. The first units, until both arms have five, give their means alone.

    Args:
        values: Of the units of both arms, in the order of time.
        in_b: Which are of arm B.
        share_b: The chance of arm B among the two.
        sign: Of arm A's part.

    Returns:
        The numbers of the units after the first ones.
    """
    total = np.zeros(len(values))
    start = 0
    for is_arm, share, factor in ((in_b, share_b, 1.0), (~in_b, 1 - share_b, float(sign))):
        counts: NDArray[np.int64] = np.cumsum(is_arm) - is_arm
        own = np.where(is_arm, values, 0.0)
        before = (np.cumsum(own) - own) / np.maximum(counts, 1)
        total += factor * (before + np.where(is_arm, (values - before) / share, 0.0))
        start = max(start, int(np.searchsorted(counts, FIRST_UNITS)))
    return total[start:]


@final
@dataclass(frozen=True)
class Sequence:
    """The mean after each unit, the deviation of a unit, and half the width of the interval.

    The width is infinite before the sequence begins. What is asymptotic about it is the normal law of sums, so it
    begins after 100 units and an effective number of 40: (Σd²)² / Σd⁴ of the deviations d, which is the number of
    units for coin flips, a third of it for normal numbers, and about that of the rarer outcome for rare ones.
    Whether each arm has enough of them is for `arms_have_begun` to say.
    """

    means: Floats
    deviations: Floats
    half_widths: Floats


def confidence_sequence(
    units: Floats, *, alpha: float, tuned_for: float, min_units: int = MIN_UNITS, min_effective: float = MIN_EFFECTIVE
) -> Sequence:
    """The sequence over all prefixes of `units`, in the order of time."""
    t = np.arange(1, len(units) + 1)
    variances, fourths = _central_moments(units)
    deviations = np.sqrt(variances)
    widths = half_width(t, deviations, tuned_rho_squared(tuned_for, alpha), alpha)
    begun = has_begun(t, t * variances, t * fourths, min_units, min_effective)
    return Sequence(units.cumsum() / t, deviations, np.where(begun, widths, np.inf))


def _central_moments(values: Floats) -> tuple[Floats, Floats]:
    """The second and the fourth central moment of all prefixes."""
    t = np.arange(1, len(values) + 1)
    centred = values - (values[:1] if len(values) else 0.0)  # a shift near the mean, for exact sums of powers
    squared = np.square(centred)
    powers = centred, squared, centred * squared, np.square(squared)
    first, second, third, fourth = (np.cumsum(each) / t for each in powers)
    return np.maximum(second - first**2, 0.0), fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4


def arms_have_begun(values: Floats, in_b: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether, after each unit, each arm has half of the effective number that both need together.

    Units of a small arm are few and weigh much: before they come, the deviations are those of the other arm alone. With
    a share of 1% and outcomes of 2%, an interval that does not wait for them raises false alarms in 60% of experiments.
    What a unit counts is told by all values, so that an arm in which nothing ever happens is found too.

    Example:
        >>> draw = np.random.default_rng(0)
        >>> bool(arms_have_begun(draw.normal(size=2000), np.arange(2000) % 100 == 0)[-1])
        False
    """
    variances, fourths = _central_moments(values)
    fewer = np.minimum(np.cumsum(in_b), np.cumsum(~in_b))
    return (2 * fewer * variances**2 >= MIN_EFFECTIVE * fourths) & (variances > 0)


def has_begun(
    num_units: Any,
    squares: Any,
    fourths: Any,
    min_units: int = MIN_UNITS,
    min_effective: float = MIN_EFFECTIVE,
) -> Any:
    """Whether there are enough units for the normal law, by sums of powers of their deviations; see `Sequence`."""
    return (num_units >= min_units) & (squares**2 >= min_effective * fourths) & (squares > 0)
