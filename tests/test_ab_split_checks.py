"""Whether requests came in the shares declared, at all looks together."""

import numpy as np
import pytest

from matta.ab_testing.split_checks import CONCENTRATION, split_p_value


def test_it_is_the_mixture_written_as_a_product_of_predictions() -> None:
    """Pólya's urn gives the same likelihood, one request after the other."""
    draw, shares = np.random.default_rng(0), np.array([0.2, 0.3, 0.5])
    urn, ratio, counts = CONCENTRATION * 3 * shares, 0.0, np.zeros(3, int)
    for arm in draw.choice(3, size=3000, p=[0.3, 0.3, 0.4]):
        ratio += np.log(urn[arm] / urn.sum() / shares[arm])
        urn[arm] += 1
        counts[arm] += 1
    assert ratio > 5
    assert np.log(split_p_value(counts.tolist(), shares.tolist())) == pytest.approx(-ratio)


def test_false_alarms_are_rare_however_often_one_looks() -> None:
    draw = np.random.default_rng(1)
    alarms = 0
    for _ in range(200):
        counts = np.cumsum(draw.random(20_000) < 0.9)[199::200]
        alarms += any(split_p_value([int(b), 200 * (k + 1) - int(b)], [0.9, 0.1]) < 0.05 for k, b in enumerate(counts))
    assert alarms / 200 <= 0.05


def test_a_split_that_is_off_is_found() -> None:
    assert split_p_value([5300, 4700], [0.5, 0.5]) < 0.001
    assert split_p_value([500_000, 500_000], [0.5, 0.5]) == 1.0
    assert split_p_value([0, 0], [0.5, 0.5]) == 1.0
    assert split_p_value([10**7, 0], [0.5, 0.5]) == 0.0
