"""Intervals that hold at all looks together: the formula, what goes into it, and how often it misses."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from matta.ab_testing.confidence_sequences import (
    FIRST_UNITS,
    MIN_UNITS,
    arms_have_begun,
    confidence_sequence,
    half_width,
    pseudo_outcomes,
    tuned_rho_squared,
    units_needed,
)

ALPHA = 0.05


def mixture(total: float, t: float, rho: float) -> float:
    """The martingale behind the interval: ∫ exp(λS − λ²t/2) dN(λ; 0, ρ²), by numbers."""
    centre, spread = total / (t + rho**-2), (t + rho**-2) ** -0.5
    lam = np.linspace(centre - 12 * spread, centre + 12 * spread, 20_001)
    log_density = lam * total - lam**2 * t / 2 - (lam / rho) ** 2 / 2 - math.log(rho * math.sqrt(2 * math.pi))
    return float(np.trapezoid(np.exp(log_density), lam))


@pytest.mark.parametrize("t", [1, 30, 1000, 200_000])
@pytest.mark.parametrize("rho", [0.02, 0.3])
@pytest.mark.parametrize("alpha", [0.01, 0.2])
def test_the_interval_ends_where_the_mixture_reaches_one_over_alpha(t: int, rho: float, alpha: float) -> None:
    width = half_width(t, 1.0, rho**2, alpha)
    assert mixture(t * width, t, rho) == pytest.approx(1 / alpha, rel=1e-6)
    assert half_width(t, 3.0, rho**2, alpha) == pytest.approx(3 * width)


@pytest.mark.parametrize("alpha", [0.001, 0.05, 0.3])
@pytest.mark.parametrize("num_units", [50, 10_000])
def test_the_interval_is_narrowest_where_it_is_tuned(num_units: int, alpha: float) -> None:
    best = tuned_rho_squared(num_units, alpha)
    widths = [half_width(num_units, 1.0, best * factor, alpha) for factor in (0.9, 1, 1.1)]
    assert min(widths) == widths[1]


def test_what_another_number_of_units_costs_is_as_documented() -> None:
    best, early, late = (half_width(10_000, 1.0, tuned_rho_squared(n, ALPHA), ALPHA) for n in (10_000, 1000, 100_000))
    assert early / best == pytest.approx(1.07, abs=0.005) and late / best == pytest.approx(1.26, abs=0.005)


@given(st.floats(1e-3, 1), st.floats(0.1, 10))
def test_units_needed_is_the_first_number_that_suffices(width: float, deviation: float) -> None:
    rho_squared = tuned_rho_squared(10_000, ALPHA)
    found = units_needed(width, deviation, rho_squared, ALPHA)
    assert half_width(found, deviation, rho_squared, ALPHA) <= width
    assert found <= 2 or half_width(found - 1, deviation, rho_squared, ALPHA) > width


def test_walks_leave_the_interval_in_at_most_alpha_of_all_cases() -> None:
    walks = np.random.default_rng(0).normal(size=(2000, 3000)).cumsum(axis=1)
    t = np.arange(1, 3001)
    missed = (np.abs(walks / t) > half_width(t, 1.0, tuned_rho_squared(500, ALPHA), ALPHA)).any(axis=1).mean()
    assert 0.02 < missed <= ALPHA


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_pseudo_outcomes_have_the_difference_as_their_mean(share: float) -> None:
    draw = np.random.default_rng(1)
    in_b = draw.random(400_000) < share
    values = draw.normal(size=400_000) + np.where(in_b, 7.0, 5.0)
    units = pseudo_outcomes(values, in_b, share)
    assert units.mean() == pytest.approx(2, abs=0.03)
    assert pseudo_outcomes(values, in_b, share, sign=1).mean() == pytest.approx(12, abs=0.03)
    best = math.sqrt(1 / share + 1 / (1 - share))  # of a difference of means, per unit
    assert units.std() == pytest.approx(best, rel=0.02)


def test_pseudo_outcomes_use_only_what_came_before() -> None:
    draw = np.random.default_rng(2)
    values, in_b = draw.normal(size=200), draw.random(200) < 0.5
    whole = pseudo_outcomes(values, in_b, 0.5)
    first = 200 - len(whole)
    assert min(in_b[:first].sum(), (~in_b[:first]).sum()) == FIRST_UNITS
    np.testing.assert_allclose(pseudo_outcomes(values[:150], in_b[:150], 0.5), whole[: 150 - first])
    assert len(pseudo_outcomes(values, np.zeros(200, bool), 0.5)) == 0
    assert len(pseudo_outcomes(values[:0], in_b[:0], 0.5)) == 0


def test_the_sequence_has_means_and_deviations_of_all_prefixes() -> None:
    units = np.random.default_rng(3).exponential(size=500) + 1e4  # sums of powers must not lose this
    found = confidence_sequence(units, alpha=ALPHA, tuned_for=500)
    for t in (150, 321, 500):
        assert found.means[t - 1] == pytest.approx(units[:t].mean())
        assert found.deviations[t - 1] == pytest.approx(units[:t].std(), rel=1e-6)


def test_it_begins_when_there_are_enough_units() -> None:
    coins = np.tile([0.0, 1.0], 200)
    begun = np.isfinite(confidence_sequence(coins, alpha=ALPHA, tuned_for=500).half_widths)
    assert begun.argmax() + 1 == MIN_UNITS and begun[MIN_UNITS:].all()
    rare = (np.arange(10_000) % 100 == 0).astype(float)
    begun = np.isfinite(confidence_sequence(rare, alpha=ALPHA, tuned_for=500).half_widths)
    assert 35 <= rare[: begun.argmax() + 1].sum() <= 45
    assert np.isinf(confidence_sequence(np.ones(500), alpha=ALPHA, tuned_for=500).half_widths).all()
    assert len(confidence_sequence(np.ones(0), alpha=ALPHA, tuned_for=500).means) == 0


@pytest.mark.parametrize(("share", "rate"), [(0.5, 0.25), (0.5, 0.01), (0.1, 0.25)])
def test_looking_after_every_batch_raises_few_false_alarms(share: float, rate: float) -> None:
    """And a fixed-sample interval of 95%, looked at as often, raises many."""
    draw = np.random.default_rng(4)
    alarms, fixed_alarms = 0, 0
    for _ in range(200):
        values, in_b = (draw.random(10_000) < rate).astype(float), draw.random(10_000) < share
        found = confidence_sequence(pseudo_outcomes(values, in_b, share), alpha=ALPHA, tuned_for=5000)
        looks = slice(99, None, 100)
        begun = np.isfinite(found.half_widths)
        fixed = 1.96 * found.deviations / np.sqrt(np.arange(len(begun)) + 1)
        alarms += bool((np.abs(found.means) > found.half_widths)[looks].any())
        fixed_alarms += bool((begun & (np.abs(found.means) > fixed))[looks].any())
    assert alarms / 200 <= ALPHA
    assert fixed_alarms / 200 > 2 * ALPHA


@pytest.mark.parametrize(("share", "rate"), [(0.01, 0.02), (0.01, 0.3), (0.95, 0.02)])
def test_a_small_arm_raises_few_false_alarms(share: float, rate: float) -> None:
    """Until its units come, the deviations are those of the other arm alone."""
    draw, size = np.random.default_rng(5), 20_000
    alarms, early_alarms = 0, 0
    for _ in range(100):
        values, in_b = (draw.random(size) < rate).astype(float), draw.random(size) < share
        found = confidence_sequence(pseudo_outcomes(values, in_b, share), alpha=ALPHA, tuned_for=5000)
        is_alarm = np.abs(found.means) > found.half_widths
        alarms += bool((is_alarm & arms_have_begun(values, in_b)[size - len(is_alarm) :]).any())
        early_alarms += bool(is_alarm.any())
    assert alarms / 100 <= ALPHA < early_alarms / 100


def test_arms_begin_when_each_has_enough_units() -> None:
    coins, in_b = np.tile([0.0, 1.0, 1.0, 0.0], 500), np.arange(2000) % 20 == 0
    assert in_b[: arms_have_begun(coins, in_b).argmax() + 1].sum() == 20
    np.testing.assert_array_equal(arms_have_begun(coins, ~in_b), arms_have_begun(coins, in_b))
    assert not arms_have_begun(np.ones(500), in_b[:500]).any()
    dead = np.where(in_b, 0.0, coins)  # an arm in which nothing happens is found as well
    assert arms_have_begun(dead, in_b)[-1]
