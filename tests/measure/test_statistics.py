import itertools
import math
import tracemalloc
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfopt.measure import statistics
from tfopt.measure.statistics import Interval

Z_95 = 1.6448536269514722  # one-sided 95 %

times_s = st.floats(1e-6, 10, allow_nan=False)
block_pairs = st.lists(
    st.tuples(st.lists(times_s, min_size=1, max_size=6), st.lists(times_s, min_size=1, max_size=6)),
    min_size=6,
    max_size=9,
)
zeros_and_ones = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)
# Few distinct scores, so that ties are common.
scored_examples = st.lists(
    st.tuples(st.booleans(), st.integers(-3, 3), st.integers(-3, 3)), min_size=4, max_size=40
).filter(lambda rows: 2 <= sum(row[0] for row in rows) <= len(rows) - 2)


def arrays(rows):
    return [np.array(column) for column in zip(*rows, strict=True)]


def assert_ordered(interval):
    assert interval.low <= interval.estimate <= interval.high


class TestPercentile:
    def test_median_and_percentiles(self):
        values = np.arange(1000.0)[::-1]
        assert statistics.percentile(values, 50) == pytest.approx(499.5)
        assert statistics.percentile(values, 90) == pytest.approx(899.1)
        assert statistics.percentile(values, 99) == pytest.approx(989.01)

    @pytest.mark.parametrize(("q", "min_count"), [(50, 1), (90, 64), (99, 662)])
    def test_none_from_too_few_values(self, q, min_count):
        assert statistics.percentile(np.ones(min_count - 1), q) is None
        assert statistics.percentile(np.ones(min_count), q) == 1

    @pytest.mark.parametrize(("q", "min_count"), [(90, 64), (99, 662)])
    def test_counts_are_those_of_the_binomial_rule(self, q, min_count):
        def chance_of_at_most_one_beyond(n):
            p = 1 - q / 100
            return (1 - p) ** n + n * p * (1 - p) ** (n - 1)

        assert chance_of_at_most_one_beyond(min_count) <= 0.01
        assert chance_of_at_most_one_beyond(min_count - 1) > 0.01

    def test_refuses_other_percentiles(self):
        with pytest.raises(ValueError, match=r"q=95; expected one of \[50, 90, 99\]"):
            statistics.percentile(np.ones(10_000), 95)

    @pytest.mark.parametrize("bad", [[1.0, math.nan], [math.inf], [[1.0, 2.0]]])
    def test_refuses_what_is_no_list_of_numbers(self, bad):
        with pytest.raises(ValueError, match="expected"):
            statistics.percentile(bad, 50)


def paired(log_differences):
    """Blocks whose medians differ by these logarithms; every block also has a far-off time."""
    baseline = [[math.exp(d), 1e-9, 1e9] for d in log_differences]
    return baseline, [[1.0, 1e-9, 1e9] for _ in log_differences]


class TestPairedRatio:
    # Two-sided 5 %: the largest sum of ranks that is rejected, from the tables of Wilcoxon 1945
    # and of any textbook.
    @pytest.mark.parametrize(
        ("count", "critical"), [(6, 0), (7, 2), (8, 3), (9, 5), (10, 8), (15, 25), (20, 52)]
    )
    def test_bound_is_that_of_the_tables(self, count, critical):
        assert statistics._signed_rank_bound(count, 0.95) == critical + 1

    @pytest.mark.parametrize("count", range(1, 13))
    @pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
    def test_bound_agrees_with_all_signs(self, count, confidence):
        sums = [
            sum(rank for rank, is_in in enumerate(signs, 1) if is_in)
            for signs in itertools.product((0, 1), repeat=count)
        ]
        below = [np.mean(np.array(sums) < k) for k in range(max(sums) + 2)]
        expected = max(k for k, chance in enumerate(below) if chance <= (1 - confidence) / 2)
        assert statistics._signed_rank_bound(count, confidence) == expected

    def test_estimate_is_that_of_hodges_and_lehmann(self):
        differences = [0.1, 0.5, -0.2, 0.4, 0.3, 0.9, 0.0]
        means = [(x + y) / 2 for x, y in itertools.combinations_with_replacement(differences, 2)]
        interval = statistics.paired_ratio(*paired(differences))
        assert interval.estimate == pytest.approx(math.exp(np.median(means)))
        # 7 pairs: critical value 2, so the third smallest and the third largest mean.
        assert interval.low == pytest.approx(math.exp(sorted(means)[2]))
        assert interval.high == pytest.approx(math.exp(sorted(means)[-3]))

    @pytest.mark.parametrize("shift", [-0.05, 0.0, 0.02, 0.2])
    def test_agrees_with_the_test_of_scipy(self, shift):
        stats = pytest.importorskip("scipy.stats")
        generator = np.random.default_rng(3)
        for _ in range(50):
            differences = generator.normal(shift, 0.1, 14)
            interval = statistics.paired_ratio(*paired(differences))
            rejected = stats.wilcoxon(differences, method="exact").pvalue <= 0.05
            assert (statistics.verdict(interval) != "no_difference") == rejected

    @pytest.mark.parametrize("speedup", [1.0, 1.05, 2.0])
    @pytest.mark.parametrize("drift", [0.0, 0.3])
    def test_coverage(self, drift, speedup):
        """A machine whose speed wanders, and blocks whose times hang together."""
        generator = np.random.default_rng(7)

        def blocks(level, factor):
            levels = level * factor * generator.lognormal(sigma=0.02, size=len(level))
            return [each * generator.lognormal(sigma=0.1, size=9) for each in levels]

        def holds_truth():
            level = np.exp(np.cumsum(generator.normal(0, drift, size=20)))
            interval = statistics.paired_ratio(blocks(level, 1), blocks(level, 1 / speedup))
            return interval.low <= speedup <= interval.high

        # 400 trials at 95 %: below 92 % comes once in two hundred.
        assert np.mean([holds_truth() for _ in range(400)]) >= 0.92

    def test_interval_is_not_too_wide(self):
        """As narrow as the t interval of the same differences, within a tenth."""
        generator = np.random.default_rng(8)
        widths, t_widths = [], []
        for _ in range(200):
            differences = generator.normal(0, 0.01, 30)
            interval = statistics.paired_ratio(*paired(differences))
            widths.append(interval.high - interval.low)
            t_widths.append(2 * 2.045 * differences.std(ddof=1) / math.sqrt(30))
        assert np.mean(widths) < 1.1 * np.mean(t_widths)

    def test_pairing_cancels_what_blocks_share(self):
        generator = np.random.default_rng(8)
        drifts = generator.lognormal(sigma=0.3, size=30)
        baseline = [np.full(10, drift) for drift in drifts]
        candidate = [np.full(10, drift / 2) for drift in drifts]
        interval = statistics.paired_ratio(baseline, candidate)
        assert (interval.low, interval.high) == pytest.approx((2, 2))
        shuffled = [candidate[i] for i in generator.permutation(30)]
        unpaired = statistics.paired_ratio(baseline, shuffled)
        assert unpaired.high - unpaired.low > 0.1

    def test_one_disturbed_block_in_eight_changes_little(self):
        differences = np.random.default_rng(4).normal(0.1, 0.01, 40)
        quiet = statistics.paired_ratio(*paired(differences))
        differences[::8] += 3
        disturbed = statistics.paired_ratio(*paired(differences))
        assert disturbed.estimate == pytest.approx(quiet.estimate, rel=0.01)
        assert disturbed.high < 1.2

    @given(block_pairs)
    def test_swapping_sides_gives_the_reciprocal(self, pairs):
        baseline, candidate = zip(*pairs, strict=True)
        there = statistics.paired_ratio(baseline, candidate)
        back = statistics.paired_ratio(candidate, baseline)
        assert_ordered(there)
        assert there.estimate == pytest.approx(1 / back.estimate)
        assert there.low == pytest.approx(1 / back.high)
        assert there.high == pytest.approx(1 / back.low)

    @given(block_pairs, st.sampled_from([0.25, 3.0, 1000.0]))
    def test_unit_of_time_does_not_matter(self, pairs, factor):
        baseline, candidate = (list(map(np.array, side)) for side in zip(*pairs, strict=True))
        seconds = statistics.paired_ratio(baseline, candidate)
        other = statistics.paired_ratio(
            [factor * block for block in baseline], [factor * block for block in candidate]
        )
        assert (other.low, other.estimate, other.high) == pytest.approx(
            (seconds.low, seconds.estimate, seconds.high)
        )

    @given(block_pairs)
    def test_a_side_against_itself_shows_no_difference(self, pairs):
        blocks = [block for block, _ in pairs]
        interval = statistics.paired_ratio(blocks, blocks)
        assert interval == Interval(1, 1, 1)
        assert statistics.verdict(interval) == "no_difference"

    @pytest.mark.parametrize(
        ("baseline", "candidate", "message"),
        [
            ([[1.0]] * 5, [[1.0]] * 5, "Got 5 blocks; expected at least 6 for a"),
            ([[1.0]] * 6, [[1.0]] * 7, "6 baseline blocks and 7 candidate blocks"),
            ([[1.0], [], *[[1.0]] * 4], [[1.0]] * 6, r"baseline_blocks\[1\] of shape \(0,\)"),
            ([[1.0]] * 6, [*[[1.0]] * 5, [0.0]], r"candidate_blocks\[5\] with a time of 0.0 s"),
            ([[1.0]] * 6, [[math.nan], *[[1.0]] * 5], r"candidate_blocks\[0\] .* NaN"),
        ],
    )
    def test_refuses(self, baseline, candidate, message):
        with pytest.raises(ValueError, match=message):
            statistics.paired_ratio(baseline, candidate)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.01, 1.2, "faster"),
        (0.8, 0.99, "slower"),
        (0.9, 1.1, "no_difference"),
        (1.0, 1.2, "no_difference"),
        (0.9, 1.0, "no_difference"),
    ],
)
def test_verdict(low, high, expected):
    assert statistics.verdict(Interval((low + high) / 2, low, high)) == expected


def correctness(num_both, num_lost, num_gained, num_neither):
    baseline = [1] * (num_both + num_lost) + [0] * (num_gained + num_neither)
    candidate = [1] * num_both + [0] * num_lost + [1] * num_gained + [0] * num_neither
    return np.array(baseline), np.array(candidate)


def score_statistic(num_lost, num_gained, num_examples, drop):
    """Tango's statistic with the constrained likelihood maximised by search, not by formula."""
    num_tied = num_examples - num_lost - num_gained

    def log_likelihood(gained):
        tied = 1 - 2 * gained - drop
        cells = [(num_lost, gained + drop), (num_gained, gained), (num_tied, tied)]
        return sum(count * math.log(max(share, 1e-300)) for count, share in cells if count)

    low, high = max(0.0, -drop), (1 - drop) / 2
    for _ in range(200):  # ternary search: the logarithm of the likelihood is concave
        third = (high - low) / 3
        if log_likelihood(low + third) < log_likelihood(high - third):
            low += third
        else:
            high -= third
    variance = num_examples * (2 * low + drop - drop * drop)
    return (num_lost - num_gained - num_examples * drop) / math.sqrt(variance)


class TestPairedProportionBound:
    def test_published_example(self):
        # Airway hyper-responsiveness before and after stem cell transplantation (Bentur et al.
        # 2009), counts (1, 1, 7, 12): Tango's 95 % interval is -0.517 to -0.026 in Fagerland,
        # Lydersen & Laake 2014, "Recommended tests and confidence intervals for paired binomial
        # proportions", Statistics in Medicine 33:2850-2875.
        interval = statistics.paired_proportion_bound(*correctness(1, 1, 7, 12), confidence=0.975)
        assert interval.estimate == pytest.approx(-6 / 21)
        assert interval.low == pytest.approx(-0.517, abs=5e-4)
        assert interval.high == pytest.approx(-0.026, abs=5e-4)

    @pytest.mark.parametrize("num_examples", [1, 20, 1000, 1_000_000])
    def test_closed_form_without_discordant_pairs(self, num_examples):
        same = np.ones(num_examples)
        interval = statistics.paired_proportion_bound(same, same)
        expected = Z_95**2 / (num_examples + Z_95**2)
        assert interval.estimate == 0
        assert interval.high == pytest.approx(expected)
        assert interval.low == pytest.approx(-expected)

    @pytest.mark.parametrize("num_lost", [1, 3, 30])
    def test_closed_form_when_nothing_is_gained(self, num_lost):
        # Nothing gained: for drops up to the bound the constrained estimate of the share gained
        # is 0, and the bound is Wilson's for num_lost of 100.
        n = 100
        p = num_lost / n
        centre = p + Z_95**2 / (2 * n)
        spread = Z_95 * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n * n))
        interval = statistics.paired_proportion_bound(*correctness(50, num_lost, 0, 50 - num_lost))
        assert interval.high == pytest.approx((centre + spread) / (1 + Z_95**2 / n))

    @pytest.mark.parametrize(
        ("num_lost", "num_gained", "num_examples"),
        [(1, 0, 10), (4, 2, 30), (2, 9, 40), (40, 20, 160), (0, 5, 50), (3, 3, 1000), (9, 1, 10)],
    )
    def test_bounds_solve_the_score_equation(self, num_lost, num_gained, num_examples):
        num_tied = num_examples - num_lost - num_gained
        interval = statistics.paired_proportion_bound(
            *correctness(0, num_lost, num_gained, num_tied)
        )
        at = {
            bound: score_statistic(num_lost, num_gained, num_examples, bound)
            for bound in (interval.low, interval.high)
        }
        assert at[interval.high] == pytest.approx(-Z_95, abs=1e-4)
        assert at[interval.low] == pytest.approx(Z_95, abs=1e-4)

    def test_all_lost(self):
        interval = statistics.paired_proportion_bound(np.ones(10), np.zeros(10))
        assert (interval.estimate, interval.high) == (1, 1)
        assert interval.low < 1

    @pytest.mark.parametrize(
        ("num_examples", "p_lost", "p_gained"),
        [(100, 0.02, 0.01), (300, 0.05, 0.05), (1000, 0.01, 0.0)],
    )
    def test_coverage_of_the_upper_bound(self, num_examples, p_lost, p_gained):
        generator = np.random.default_rng(11)
        counts = generator.multinomial(
            num_examples, [p_lost, p_gained, 1 - p_lost - p_gained], size=1000
        )
        covered = [
            statistics.paired_proportion_bound(*correctness(0, lost, gained, tied)).high
            >= p_lost - p_gained
            for lost, gained, tied in counts
        ]
        assert 0.92 <= np.mean(covered) <= 1

    @settings(deadline=None)
    @given(zeros_and_ones)
    def test_properties(self, rows):
        baseline, candidate = arrays(rows)
        interval = statistics.paired_proportion_bound(baseline, candidate)
        assert_ordered(interval)
        assert -1 <= interval.low < interval.high <= 1
        assert interval.estimate == pytest.approx(baseline.mean() - candidate.mean(), abs=1e-12)
        swapped = statistics.paired_proportion_bound(candidate, baseline)
        assert (swapped.low, swapped.high) == (-interval.high, -interval.low)
        reordered = statistics.paired_proportion_bound(baseline[::-1], candidate[::-1])
        assert reordered == interval
        surer = statistics.paired_proportion_bound(baseline, candidate, confidence=0.99)
        assert surer.low <= interval.low and interval.high <= surer.high

    @pytest.mark.parametrize(
        ("baseline", "candidate", "message"),
        [
            ([0, 1], [1], "2 baseline_correct and 1 candidate_correct"),
            ([0, 2], [1, 1], "baseline_correct .* only zeros and ones"),
            ([0.0, math.nan], [1, 1], "only zeros and ones"),
            ([], [], "at least one value"),
        ],
    )
    def test_refuses(self, baseline, candidate, message):
        with pytest.raises(ValueError, match=message):
            statistics.paired_proportion_bound(baseline, candidate)

    @pytest.mark.parametrize("confidence", [95, 1.0, 0.5, 0.05, math.nan])
    def test_refuses_confidence(self, confidence):
        with pytest.raises(ValueError, match=r"Write 95 % as 0\.95"):
            statistics.paired_proportion_bound([1], [1], confidence)


def discordant(num_lost, num_gained, num_same=5):
    """Answers of two sides of which so many differ."""
    baseline = [1] * num_lost + [0] * num_gained + [1] * num_same
    return np.array(baseline), np.array([0] * num_lost + [1] * num_gained + [1] * num_same)


class TestMcNemar:
    @given(st.integers(0, 60), st.integers(0, 60))
    def test_agrees_with_the_binomial_distribution(self, num_lost, num_gained):
        count, fewer = num_lost + num_gained, min(num_lost, num_gained)
        exact = [math.comb(count, k) / 2**count for k in range(fewer + 1)]
        expected = 1 if num_lost == num_gained else 2 * sum(exact) - exact[-1]
        assert statistics.mcnemar(*discordant(num_lost, num_gained)) == pytest.approx(expected)

    def test_published_example(self):
        # Fagerland, Lydersen & Laake 2013, table 1: 1 against 7 of 21, mid-p 0.039.
        assert statistics.mcnemar(*discordant(1, 7, 13)) == pytest.approx(0.039, abs=5e-4)

    def test_many_examples(self):
        # The normal approximation: z = 2000 / sqrt(2_000_000).
        z = 2000 / math.sqrt(2_000_000)
        expected = 2 * NormalDist().cdf(-z)
        found = statistics.mcnemar(*discordant(999_000, 1_001_000))
        assert found == pytest.approx(expected, rel=1e-3)

    def test_keeps_its_level(self):
        generator = np.random.default_rng(2)
        rejected = [
            statistics.mcnemar(*generator.integers(0, 2, (2, 40))) <= 0.05 for _ in range(1000)
        ]
        assert np.mean(rejected) <= 0.065

    def test_refuses(self):
        with pytest.raises(ValueError, match="only zeros and ones"):
            statistics.mcnemar(np.array([2]), np.array([1]))
        with pytest.raises(ValueError, match="expected as many of both"):
            statistics.mcnemar(np.array([1, 0]), np.array([1]))


class TestPairedMeanBound:
    def test_agrees_with_normal_theory(self):
        differences = np.random.default_rng(12).normal(0.3, 2, size=5000)
        interval = statistics.paired_mean_bound(differences, resamples=4000)
        margin = Z_95 * differences.std(ddof=1) / math.sqrt(5000)
        assert interval.estimate == pytest.approx(differences.mean())
        assert interval.high - interval.estimate == pytest.approx(margin, rel=0.1)
        assert interval.estimate - interval.low == pytest.approx(margin, rel=0.1)

    @pytest.mark.parametrize("num_examples", [10, 50])
    def test_coverage(self, num_examples):
        generator = np.random.default_rng(13)
        covered = [
            statistics.paired_mean_bound(generator.normal(size=num_examples), resamples=500).high
            >= 0
            for _ in range(600)
        ]
        assert 0.92 <= np.mean(covered) <= 0.98

    def test_memory_for_many_examples(self):
        differences = np.random.default_rng(14).normal(size=100_000)
        tracemalloc.start()
        try:
            statistics.paired_mean_bound(differences, resamples=100)
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 100e6

    @settings(deadline=None)
    @given(
        st.lists(st.floats(-5, 5), min_size=2, max_size=30),
        st.floats(-3, 3),
        st.sampled_from([0.5, 7.0]),
    )
    def test_properties(self, differences, shift, factor):
        differences = np.array(differences)
        interval = statistics.paired_mean_bound(differences, resamples=100)
        assert_ordered(interval)
        assert differences.min() - 1e-9 <= interval.low
        assert interval.high <= differences.max() + 1e-9
        moved = statistics.paired_mean_bound(factor * differences + shift, resamples=100)
        assert (moved.low, moved.high) == pytest.approx(
            (factor * interval.low + shift, factor * interval.high + shift), abs=1e-9
        )
        turned = statistics.paired_mean_bound(-differences, resamples=100)
        assert (turned.low, turned.high) == pytest.approx((-interval.high, -interval.low), abs=1e-9)

    @pytest.mark.parametrize("bad", [[1.0], [], [0.0, math.nan]])
    def test_refuses(self, bad):
        with pytest.raises(ValueError, match="Got differences"):
            statistics.paired_mean_bound(bad)


def auc_by_pairs(labels, scores):
    pairs = [
        1.0 if positive > negative else 0.5 if positive == negative else 0.0
        for positive in scores[labels]
        for negative in scores[~labels]
    ]
    return sum(pairs) / len(pairs)


class TestAuc:
    def test_known_values(self):
        labels = [0, 0, 1, 1]
        assert statistics.auc(labels, [0.1, 0.4, 0.35, 0.8]) == pytest.approx(0.75)
        assert statistics.auc(labels, [1, 2, 3, 4]) == 1
        assert statistics.auc(labels, [4, 3, 2, 1]) == 0
        assert statistics.auc(labels, [5, 5, 5, 5]) == 0.5

    @settings(deadline=None)
    @given(scored_examples)
    def test_agrees_with_all_pairs(self, rows):
        labels, scores, other_scores = arrays(rows)
        assert statistics.auc(labels, scores) == pytest.approx(auc_by_pairs(labels, scores))
        assert statistics.auc(~labels, scores) == pytest.approx(1 - statistics.auc(labels, scores))
        interval = statistics.paired_auc_bound(labels, scores, other_scores)
        assert_ordered(interval)
        drop = auc_by_pairs(labels, scores) - auc_by_pairs(labels, other_scores)
        assert interval.estimate == pytest.approx(drop, abs=1e-12)

    @settings(deadline=None)
    @given(scored_examples)
    def test_properties_of_the_bound(self, rows):
        labels, scores, other_scores = arrays(rows)
        interval = statistics.paired_auc_bound(labels, scores, other_scores)
        swapped = statistics.paired_auc_bound(labels, other_scores, scores)
        assert (swapped.low, swapped.high) == pytest.approx((-interval.high, -interval.low))
        stretched = statistics.paired_auc_bound(labels, np.exp(scores), other_scores * 3.0 + 1)
        assert (stretched.low, stretched.high) == pytest.approx((interval.low, interval.high))
        assert statistics.paired_auc_bound(labels, scores, scores * 2.0) == Interval(0, 0, 0)

    def test_variance_by_the_definition_of_delong(self):
        generator = np.random.default_rng(15)
        labels = generator.random(60) < 0.4
        both = [np.round(labels + generator.normal(size=60), 1) for _ in range(2)]

        def comparisons(scores):
            return np.array(
                [
                    [1.0 if p > n else 0.5 if p == n else 0.0 for n in scores[~labels]]
                    for p in scores[labels]
                ]
            )

        matrices = [comparisons(scores) for scores in both]
        by_positive = np.cov([matrix.mean(axis=1) for matrix in matrices])
        by_negative = np.cov([matrix.mean(axis=0) for matrix in matrices])
        covariance = by_positive / labels.sum() + by_negative / (~labels).sum()
        contrast = np.array([1, -1])
        margin = Z_95 * math.sqrt(contrast @ covariance @ contrast)
        interval = statistics.paired_auc_bound(labels, *both)
        assert interval.high - interval.estimate == pytest.approx(margin)
        assert interval.estimate - interval.low == pytest.approx(margin)

    def test_coverage(self):
        generator = np.random.default_rng(16)
        labels = np.arange(200) % 4 == 0
        # Score = label + noise of standard deviation s: AUC = Φ(1 / (s·sqrt(2))).
        noises = (0.8, 1.0)
        true_aucs = [NormalDist().cdf(1 / (noise * math.sqrt(2))) for noise in noises]

        def covered():
            shared = generator.normal(size=200)
            own = generator.normal(size=(2, 200))
            scores = [
                labels + noise * (0.8 * shared + 0.6 * mine)
                for noise, mine in zip(noises, own, strict=True)
            ]
            interval = statistics.paired_auc_bound(labels, *scores)
            return interval.high >= true_aucs[0] - true_aucs[1]

        assert 0.92 <= np.mean([covered() for _ in range(1000)]) <= 0.98

    @pytest.mark.parametrize("labels", [[1, 1, 1], [0, 0, 0]])
    def test_refuses_a_missing_class(self, labels):
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            statistics.auc(labels, [0.1, 0.2, 0.3])
        with pytest.raises(ValueError, match="expected at least 2 of each"):
            statistics.paired_auc_bound(labels, [0.1, 0.2, 0.3], [0.1, 0.2, 0.3])

    def test_refuses_a_single_positive_for_the_bound(self):
        with pytest.raises(ValueError, match="1 ones and 2 zeros; expected at least 2 of each"):
            statistics.paired_auc_bound([0, 0, 1], [0.1, 0.2, 0.3], [0.1, 0.2, 0.3])

    def test_refuses_other_sizes_and_labels(self):
        with pytest.raises(ValueError, match="2 labels and 3 scores"):
            statistics.auc([0, 1], [0.1, 0.2, 0.3])
        with pytest.raises(ValueError, match="only zeros and ones"):
            statistics.auc([1, 2], [0.1, 0.2])


class TestResample:
    def test_statistic_sees_indices_with_replacement(self):
        seen = []

        def statistic(indices):
            seen.append(indices)
            return len(seen)

        found = statistics.resample(statistic, 50, resamples=10)
        np.testing.assert_array_equal(found, np.arange(1, 11))
        for indices in seen:
            assert indices.shape == (50,)
            assert 0 <= indices.min() <= indices.max() < 50
            assert len(set(indices)) < 50

    def test_two_statistics_see_the_same_samples(self):
        values = np.random.default_rng(0).normal(size=20)
        first, second = (
            statistics.resample(lambda i, f=f: f * values[i].mean(), 20) for f in (1, 2)
        )
        np.testing.assert_allclose(second, 2 * first)

    def test_what_has_no_value_on_a_sample_is_nan(self):
        def of_some(indices):
            if 0 not in indices:
                raise ZeroDivisionError
            return math.inf if 1 in indices else 1.0

        found = statistics.resample(of_some, 3)
        assert set(found[~np.isnan(found)]) == {1.0}
        assert np.isnan(found).any()

    def test_refuses(self):
        with pytest.raises(ValueError, match="resamples=0"):
            statistics.resample(lambda indices: 0.0, 10, resamples=0)


def bound_of(statistic, count, **options):
    drops = statistics.resample(statistic, count, **options)
    return statistics.bootstrap_bound(statistic(np.arange(count)), drops, count)


class TestBootstrapBound:
    def test_mean_agrees_with_normal_theory(self):
        differences = np.random.default_rng(17).normal(0.1, 1, size=2000)
        interval = bound_of(lambda indices: differences[indices].mean(), 2000, resamples=2000)
        margin = Z_95 / math.sqrt(2000)
        assert interval.estimate == pytest.approx(differences.mean())
        assert interval.high - interval.estimate == pytest.approx(margin, rel=0.1)

    def test_coverage_for_a_ratio(self):
        generator = np.random.default_rng(18)

        def covered():
            lost, total = generator.normal(1, 1, size=100), generator.normal(4, 1, size=100)
            interval = bound_of(lambda i: lost[i].sum() / total[i].sum(), 100)
            return interval.high >= 0.25

        assert 0.90 <= np.mean([covered() for _ in range(200)]) <= 0.99

    @settings(max_examples=30, deadline=None)
    @given(st.lists(st.floats(-5, 5), min_size=2, max_size=20), st.integers(0, 5))
    def test_properties(self, values, seed):
        values = np.array(values)
        first, again = (
            bound_of(lambda i: np.median(values[i]), len(values), resamples=30, seed=seed)
            for _ in range(2)
        )
        assert first == again
        assert_ordered(first)

    @pytest.mark.parametrize(("num_missing", "is_bounded"), [(0, True), (2, True), (40, False)])
    def test_samples_without_a_value_lie_beyond_the_bounds(self, num_missing, is_bounded):
        drops = np.linspace(-1, 1, 200)
        drops[80 : 80 + num_missing] = math.nan
        found = statistics.bootstrap_bound(0.0, drops, 1000)
        assert math.isfinite(found.high) == math.isfinite(found.low) == is_bounded
        assert_ordered(found)
        if num_missing == 2:
            assert found.high >= statistics.bootstrap_bound(0.0, np.linspace(-1, 1, 200), 1000).high

    def test_refuses(self):
        with pytest.raises(ValueError, match="num_examples=1; expected at least 2"):
            statistics.bootstrap_bound(0.0, np.zeros(10), 1)


class TestNumExamplesNeeded:
    def test_four_times_as_many_halve_the_distance(self):
        drop = Interval(estimate=0.0, low=-0.02, high=0.02)
        assert statistics.num_examples_needed(drop, 500, max_drop=0.01) == 2000

    def test_inside_already(self):
        assert statistics.num_examples_needed(Interval(0, -0.01, 0.01), 500, 0.01) == 500

    @pytest.mark.parametrize("estimate", [0.01, 0.02])
    def test_none_when_the_estimate_is_not_below(self, estimate):
        drop = Interval(estimate, estimate - 0.005, estimate + 0.005)
        assert statistics.num_examples_needed(drop, 500, max_drop=0.01) is None

    def test_none_when_it_would_take_endlessly_many(self):
        drop = Interval(0, -1, 1)
        assert statistics.num_examples_needed(drop, 500, max_drop=1e-300) is None

    def test_enough_for_tango(self):
        # 1 % of the examples lost, 0.5 % gained: what it foretells for 1000 examples is enough.
        drop = statistics.paired_proportion_bound(*correctness(900, 10, 5, 85))
        needed = statistics.num_examples_needed(drop, 1000, max_drop=0.008)
        factor = math.ceil(needed / 1000)
        counts = [factor * count for count in (900, 10, 5, 85)]
        assert factor > 1
        assert statistics.paired_proportion_bound(*correctness(*counts)).high <= 0.008

    @settings(deadline=None)
    @given(
        st.floats(-0.1, 0.1), st.floats(0, 0.2), st.floats(-0.05, 0.2), st.integers(1, 1_000_000)
    )
    def test_properties(self, estimate, margin, max_drop, num_examples):
        drop = Interval(estimate, estimate - margin, estimate + margin)
        needed = statistics.num_examples_needed(drop, num_examples, max_drop)
        if needed is None:
            assert estimate >= max_drop or max_drop - estimate < 1e-100
        else:
            assert needed >= num_examples
            shrunk = margin * math.sqrt(num_examples / needed)
            assert estimate + shrunk <= max_drop + 1e-9

    def test_refuses(self):
        with pytest.raises(ValueError, match="num_examples=0"):
            statistics.num_examples_needed(Interval(0, -1, 1), 0, 0.5)
