import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfopt.compare.comparison import Comparison
from tfopt.errors import InputError

BASE = {"model": "m", "batch_size": 1, "num_threads": 2, "status": "ok", "median_ms": 1.0}
DETAILS = {"environment": {"cpu": "A"}, "baseline": "float32@tensorflow"}


def results(details=DETAILS, **speedups):
    """Results in which each variant has a speed-up: estimate, low and high."""
    rows = [
        {**BASE, "variant": name, "speedup": e, "speedup_low": low, "speedup_high": high}
        for name, (e, low, high) in speedups.items()
    ]
    return Comparison(tuple(rows), details)


def verdict(before, after, **options):
    table = results(a=after).regressions(results(a=before), **options)
    return table.verdict[0]


class TestVerdict:
    @pytest.mark.parametrize(
        ("after", "expected"),
        [
            ((1.8, 1.79, 1.81), "regression"),
            ((1.8, 1.4, 2.4), "maybe"),
            ((1.91, 1.9, 1.92), "ok"),
            ((2.5, 2.4, 2.6), "ok"),
        ],
    )
    def test_by_size_and_certainty(self, after, expected):
        assert verdict((2.0, 1.99, 2.01), after) == expected

    def test_tolerance_is_the_users(self):
        assert verdict((2.0, 1.99, 2.01), (1.8, 1.79, 1.81), slower=0.2) == "ok"
        assert verdict((2.0, 1.99, 2.01), (1.97, 1.965, 1.975), slower=0.0) == "regression"

    def test_bounds_by_normal_theory(self):
        """Two independent estimates, normal on the logarithmic scale."""
        sigmas = 0.03, 0.04
        z_two, z_one = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.95)
        sides = [
            (s, s * math.exp(-z_two * sigma), s * math.exp(z_two * sigma))
            for s, sigma in zip((2.0, 1.5), sigmas, strict=True)
        ]
        row = results(a=sides[1]).regressions(results(a=sides[0])).iloc[0]
        assert row.ratio == pytest.approx(0.75)
        assert row.ratio_low == pytest.approx(0.75 * math.exp(-z_one * 0.05))
        assert row.ratio_high == pytest.approx(0.75 * math.exp(z_one * 0.05))

    def test_false_alarms_and_power(self):
        """Intervals of ±2 %: a tenth is caught, and nothing is blamed on nothing."""
        generator = np.random.default_rng(0)
        sigma = 0.02 / 1.96

        def measured(speed):
            found = speed * math.exp(generator.normal(0, sigma))
            return found, found / 1.02, found * 1.02

        alarms = [verdict(measured(3), measured(3)) == "regression" for _ in range(200)]
        caught = [verdict(measured(3), measured(2.7)) == "regression" for _ in range(200)]
        assert sum(alarms) == 0
        assert sum(caught) > 190

    @given(*[st.floats(0.1, 10) for _ in range(2)], *[st.floats(0, 0.5) for _ in range(2)])
    def test_swapping_gives_the_reciprocal(self, old, new, old_margin, new_margin):
        sides = [
            (value, value / (1 + margin), value * (1 + margin))
            for value, margin in ((old, old_margin), (new, new_margin))
        ]
        there = results(a=sides[1]).regressions(results(a=sides[0])).iloc[0]
        back = results(a=sides[0]).regressions(results(a=sides[1])).iloc[0]
        assert there.ratio == pytest.approx(1 / back.ratio)
        assert there.ratio_low == pytest.approx(1 / back.ratio_high)
        assert there.ratio_low <= there.ratio <= there.ratio_high


class TestRows:
    def test_variants_of_both(self):
        tight = (2.0, 1.99, 2.01)
        table = results(a=tight, b=tight, new=tight).regressions(
            results(a=tight, b=tight, old=tight)
        )
        assert table.variant.tolist() == ["a", "b"]
        assert table.columns.tolist() == [
            "model", "variant", "batch_size", "before", "after", "ratio", "ratio_low",
            "ratio_high", "verdict", "reason",
        ]  # fmt: skip

    def test_what_failed_now_is_a_regression(self):
        failed = {**BASE, "variant": "a", "status": "failed", "median_ms": None, "reason": "Boom."}
        table = Comparison((failed,), DETAILS).regressions(results(a=(2.0, 1.9, 2.1)))
        assert table.verdict.tolist() == ["regression"]
        assert table.reason.tolist() == ["It was measured before and is failed now: Boom."]

    def test_without_an_interval_nothing_is_claimed(self):
        row = {**BASE, "variant": "a", "speedup": 1.0}
        table = Comparison((row,), DETAILS).regressions(results(a=(2.0, 1.9, 2.1)))
        assert table.verdict.tolist() == ["not_comparable"]


class TestRefusals:
    def test_other_baseline(self):
        tight = (2.0, 1.99, 2.01)
        other = results({**DETAILS, "baseline": "float32(xla=True)@tensorflow"}, a=tight)
        with pytest.raises(InputError, match=r"different baselines.*`mixed=baselines`"):
            results(a=tight).regressions(other)
        assert len(results(a=tight).regressions(other, mixed=["baselines"])) == 1

    def test_nothing_in_common(self):
        tight = (2.0, 1.99, 2.01)
        with pytest.raises(InputError, match="No variant was measured in both"):
            results(a=tight).regressions(results(b=tight))

    def test_the_same_variant_twice(self):
        once = results(a=(2.0, 1.9, 2.1))
        twice = Comparison((*once.rows, *once.rows), DETAILS)
        with pytest.raises(InputError, match="a of m stands 2 times"):
            twice.regressions(once)

    @pytest.mark.parametrize("slower", [-0.1, 1, math.nan])
    def test_tolerance(self, slower):
        once = results(a=(2.0, 1.9, 2.1))
        with pytest.raises(InputError, match="expected 0 or more, below 1"):
            once.regressions(once, slower)
