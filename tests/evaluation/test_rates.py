"""Rates and their confidence intervals."""

from __future__ import annotations

import math

import pytest

from paddlemix_qwenvl_plugin.evaluation.rates import Rate


@pytest.mark.parametrize(("hits", "n"), [(10, 10), (0, 7), (81, 100), (1, 3)])
def test_wilson_interval_is_that_of_the_rates_which_the_normal_test_accepts(hits: int, n: int) -> None:
    """The limits p of the interval satisfy |hits / n - p| = 1.96 sqrt(p (1 - p) / n); found by bisection."""

    def is_rejected(p: float) -> bool:
        return abs(hits / n - p) > 1.96 * math.sqrt(p * (1 - p) / n)

    limits = []
    for extreme in (0.0, 1.0):
        accepted = hits / n
        if not is_rejected(extreme) or extreme == accepted:
            limits.append(extreme)
            continue
        rejected = extreme
        for _ in range(60):
            middle = (accepted + rejected) / 2
            if is_rejected(middle):
                rejected = middle
            else:
                accepted = middle
        limits.append(accepted)
    assert Rate(hits, n).interval() == pytest.approx(tuple(limits), abs=1e-6)


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_agree_with_published_ones(hits: int, n: int, low: float, high: float) -> None:
    """Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3."""
    assert Rate(hits, n).interval() == pytest.approx((low, high), abs=5e-5)


def test_rate_without_trials() -> None:
    assert Rate(0, 0).interval() == (0.0, 1.0)
    assert math.isnan(Rate(0, 0).value)
    assert Rate(0, 0).as_dict()["value"] is None
