import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfopt.errors import InputError
from tfopt.measure import statistics
from tfopt.measure.accuracy import Drop
from tfopt.measure.statistics import Interval
from tfopt.search.budget import Budget

LIMITS = {
    "max_latency_ms": "median_ms",
    "max_size_bytes": "size_bytes",
    "max_memory_bytes": "peak_memory_bytes",
}


def of(interval, num_examples, **about):
    return Drop("", "top1", interval, num_examples=num_examples, **about)


NO_LIMIT = Budget(max_accuracy_drop=None)

amounts = st.floats(0, 1e12)
limits = st.none() | amounts
budgets = st.builds(Budget, st.none() | st.floats(0, 1), limits, limits, limits)
rows = st.fixed_dictionaries({}, optional=dict.fromkeys(LIMITS.values(), st.none() | amounts))
drops = st.tuples(*[st.floats(-1, 1)] * 3).map(
    lambda t: Interval(*(sorted(t)[i] for i in (1, 0, 2)))
)


class TestLimits:
    def test_numbers_of_numpy(self):
        budget = Budget(max_accuracy_drop=np.float32(0.5), max_size_bytes=np.int64(3))
        assert budget == Budget(max_accuracy_drop=0.5, max_size_bytes=3)
        assert json.dumps(dataclasses.asdict(budget))

    @pytest.mark.parametrize("name", ["max_accuracy_drop", *LIMITS])
    @pytest.mark.parametrize("value", [-1, -1e-9, math.nan, math.inf, "1", "", [1], True])
    def test_must_be_numbers_of_at_least_0(self, name, value):
        with pytest.raises(InputError, match=rf"{name} is .*; expected a number of at least 0"):
            Budget(**{name: value})

    @given(budgets)
    def test_of_0_and_more_are_taken(self, budget):
        assert Budget(**vars(budget)) == budget

    def test_default_is_one_point_of_accuracy(self):
        assert vars(Budget()) == {
            "max_accuracy_drop": 0.01,
            "max_latency_ms": None,
            "max_size_bytes": None,
            "max_memory_bytes": None,
            "min_sqnr_db": None,
        }


class TestViolation:
    @given(budgets, rows, st.none() | drops, st.integers(1, 10_000))
    def test_is_told_exactly_when_a_limit_is_passed(self, budget, row, drop, num_examples):
        limit = budget.max_accuracy_drop
        is_over = limit is not None and drop is not None and drop.high > limit
        for name, column in LIMITS.items():
            limit, value = getattr(budget, name), row.get(column)
            is_over |= limit is not None and value is not None and value > limit
        reason = budget.violation(row, None if drop is None else [of(drop, num_examples)])
        assert (reason is not None) == is_over
        assert reason is None or reason.endswith(".")

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("max_latency_ms", 2.5, "median latency of 2.5 ms exceeds 2"),
            ("max_size_bytes", 3_000_000, "size of 3e+06 bytes exceeds 2"),
            ("max_memory_bytes", 3000, "peak memory of 3000 bytes exceeds 2"),
        ],
    )
    def test_names_figure_and_limit(self, name, value, words):
        budget = Budget(**{"max_accuracy_drop": None, name: 2})
        row = {LIMITS[name]: value}
        assert words in budget.violation(row, None)
        assert NO_LIMIT.violation(row, [of(Interval(0.5, 0.4, 0.6), 10)]) is None

    def test_of_an_estimate_that_is_outside(self):
        reason = Budget(0.01).violation({}, [of(Interval(0.034, 0.02, 0.05), 500)])
        assert reason == "The accuracy drop of 0.034 exceeds 0.01."

    @pytest.mark.parametrize("num_examples", [50, 400, 5000])
    def test_of_a_bound_that_is_outside_says_how_many_more_it_takes(self, num_examples):
        drop = Interval(0.004, -0.001, 0.016)
        reason = Budget(0.01).violation({}, [of(drop, num_examples)])
        # The distance of 0.012 has to shrink to 0.006, and shrinks with the square root.
        more = 4 * num_examples - num_examples
        assert "drop is 0.004 but could be 0.016" in reason
        assert f"(95 % bound on {num_examples} examples)" in reason
        assert f"about {more} more examples would show" in reason
        needed = statistics.num_examples_needed(drop, num_examples, 0.01)
        assert needed - num_examples == more

    def test_of_examples_that_tell_nothing(self):
        reason = Budget(0.01).violation({}, [of(Interval(0.0, -math.inf, math.inf), 1)])
        assert "too few to show" in reason
        assert "inf" not in reason

    def test_of_an_estimate_at_the_limit_promises_nothing(self):
        reason = Budget(0.01).violation({}, [of(Interval(0.01, 0.0, 0.02), 100)])
        assert "is not inside 0.01" in reason
        assert "more examples" not in reason

    def test_errors_are_shares_of_their_scale(self):
        """mse in grams² and in kilograms² is the same to a budget."""
        for unit in (1e-6, 1.0, 1e6):
            drop = Drop(
                "", "mse", Interval(0.005 * unit, 0.0, 0.008 * unit), unit=unit, is_error=True
            )
            assert Budget(0.01).violation({}, [drop]) is None
            reason = Budget(0.004).violation({}, [drop])
            assert "0.50% of that of always answering the mean label" in reason
            assert f"({unit:.4g}); 0.40% is allowed" in reason

    def test_an_error_of_nothing_may_not_grow(self):
        for high, is_inside in ((0.0, True), (1e-9, False)):
            drop = Drop("", "mae", Interval(high, 0.0, high), unit=0.0, is_error=True)
            assert (Budget(0.01).violation({}, [drop]) is None) == is_inside

    def test_the_output_is_named_where_there_are_several(self):
        drops = [
            Drop("box", "mae", Interval(0.3, 0.2, 0.4), unit=2.0, is_error=True, is_own_error=True),
            Drop("class", "top1", Interval(0.02, 0.01, 0.03)),
        ]
        found = Budget(0.01).violation({}, drops)
        assert found.startswith(
            "Output 'box': mae rises by 0.3, which is 15.00% of the model's own"
        )
        assert "Output 'class': the accuracy drop of 0.02" in Budget(0.01).violation({}, drops[1:])

    def test_unchanged_model_has_no_drop(self):
        assert Budget(0.0).violation({}, None) is None

    def test_figures_that_were_not_measured_do_not_count(self):
        budget = Budget(max_latency_ms=0, max_size_bytes=0, max_memory_bytes=0)
        assert budget.violation(dict.fromkeys(LIMITS.values()), None) is None
        assert budget.violation({}, None) is None


class TestExcess:
    @given(budgets, rows)
    def test_is_the_largest_ratio(self, budget, row):
        ratios = [0.0]
        for name, column in LIMITS.items():
            limit, value = getattr(budget, name), row.get(column)
            if limit is not None and value is not None:
                ratios.append(value / limit if limit else math.inf)
        assert budget.excess(row) == max(ratios)

    @given(st.builds(Budget, st.none(), *[st.none() | st.floats(1, 1e12)] * 3), rows)
    def test_is_above_1_exactly_when_a_limit_is_passed(self, budget, row):
        assert (budget.excess(row) > 1) == (budget.violation(row, None) is not None)
