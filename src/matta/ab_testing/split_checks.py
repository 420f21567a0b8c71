"""Whether requests came in the shares that were declared: a test that may be made at every look."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, lgamma, log
from typing import Final

CONCENTRATION: Final = 100.0


def split_p_value(counts: Sequence[int], shares: Sequence[float]) -> float:
    """A p-value for "each request drew its arm by these shares" that holds at all looks together.

    Lindon and Malek, "Anytime-valid inference for multinomial count data" (NeurIPS 2022): the likelihood of the
    shares against that of a Dirichlet mixture around them. A chi-squared test, looked at daily, would cry wolf.

    Args:
        counts: Requests of each arm.
        shares: Declared for each arm, with the sum 1.

    Example:
        >>> split_p_value([5030, 4970], [0.5, 0.5])
        1.0
        >>> split_p_value([5300, 4700], [0.5, 0.5]) < 0.001
        True
    """
    weights = [CONCENTRATION * len(shares) * share for share in shares]
    mixture = lgamma(sum(weights)) - lgamma(sum(weights) + sum(counts))
    for count, share, weight in zip(counts, shares, weights, strict=True):
        mixture += lgamma(weight + count) - lgamma(weight) - count * log(share)
    return min(1.0, exp(-mixture)) if mixture > 0 else 1.0
