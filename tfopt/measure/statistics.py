"""Intervals and paired tests, derived from raw values after the measurement.

Everything here compares a baseline with a candidate on the same blocks of time or on the same
examples, pair by pair, because what the two share (a busy machine, a hard example) then cancels.

Intervals of a speed-up are two-sided. Intervals of a drop are made of two one-sided bounds, each
held with the stated confidence, because a budget only asks about the upper one.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

_MIN_VALUES_FOR_PERCENTILE = {50: 1, 90: 64, 99: 662}
_CHUNK_ELEMENTS = 4_000_000  # 4 million int32 indices and float64 values: 48 MB


@dataclasses.dataclass(frozen=True)
class Interval:
    """An estimate and the bounds around it."""

    estimate: float
    low: float
    high: float


def percentile(values: Sequence[float] | np.ndarray, q: int) -> float | None:
    """Returns the `q`-th percentile (50, 90 or 99), or None when too few values carry it.

    The counts follow the early stopping of MLPerf LoadGen (Reddi et al. 2020, "MLPerf Inference
    Benchmark", and the LoadGen documentation): the smallest sample that has a chance of at most
    1 % to hold one value or none beyond the true percentile. In figures, the smallest n with
    P(Binomial(n, 1 - q/100) <= 1) <= 0.01: 64 values for p90, 662 for p99. The median is
    reported from one value on. Assumes values that are independent of each other; between order
    statistics it interpolates linearly.

    Args:
        values: one-dimensional, in any unit.
        q: 50, 90 or 99.
    """
    if q not in _MIN_VALUES_FOR_PERCENTILE:
        raise ValueError(
            f"Got q={q!r}; expected one of {sorted(_MIN_VALUES_FOR_PERCENTILE)}. Choose one of "
            "these: for no other percentile is it settled how many values it takes."
        )
    values = _finite_vector(values, "values", min_size=0)
    if values.size < _MIN_VALUES_FOR_PERCENTILE[q]:
        return None
    return float(np.percentile(values, q))


def paired_ratio(
    baseline_blocks: Sequence[Sequence[float] | np.ndarray],
    candidate_blocks: Sequence[Sequence[float] | np.ndarray],
    confidence: float = 0.95,
) -> Interval:
    """Returns how many times as fast the candidate is, with its interval.

    Block i of both sides was taken next to each other in time, in random order, so both saw the
    same clock rate and the same neighbours. Each pair of blocks gives one difference of logarithms
    of medians. The estimate is that of Hodges & Lehmann 1963, "Estimates of location based on
    rank tests": the median of the means of all pairs of differences; the bounds are the means
    that Wilcoxon's signed-rank test (1945, "Individual comparisons by ranking methods") does not
    reject (Hollander & Wolfe 1999, "Nonparametric Statistical Methods", section 3.3).

    Why this one: when the two sides are equally fast, which of them came first in a round is a
    coin toss, so that each difference is as likely positive as negative however the machine
    drifts and however times inside a block hang together. The test needs nothing else: a verdict
    is wrong in at most 1 - `confidence` of the cases. For sides of unlike speed it also assumes
    that what disturbs the machine slows both by the same factor. It costs little where times are
    normal (95 % of the efficiency of a t test) and gains where some blocks are far off.

    The estimate is not the ratio of the two pooled medians, from which it differs when the
    machine changes its speed during the run. Swapping the sides gives exactly the reciprocal.

    Args:
        baseline_blocks: times in seconds, one array for each block.
        candidate_blocks: as many blocks, in the same order.
        confidence: of the two-sided interval; the discreteness of ranks makes it a little more.
    """
    if len(baseline_blocks) != len(candidate_blocks):
        raise ValueError(
            f"Got {len(baseline_blocks)} baseline blocks and {len(candidate_blocks)} candidate "
            "blocks; expected as many of both. Measure the two sides in turns, block by block."
        )
    logs = [
        _log_medians(blocks, name)
        for name, blocks in (
            ("baseline_blocks", baseline_blocks),
            ("candidate_blocks", candidate_blocks),
        )
    ]
    return _exp(_hodges_lehmann(logs[0] - logs[1], confidence))


def typical_time(
    blocks: Sequence[Sequence[float] | np.ndarray], confidence: float = 0.95
) -> Interval:
    """Returns the typical time of a run, with its interval: of one model, beside nothing.

    The estimate and the bounds are those of `paired_ratio`, from the logarithms of the medians of
    blocks. They take blocks to be independent, and they know nothing of how other runs differ:
    of two models, only a ratio measured side by side tells which is faster.

    Args:
        blocks: times in seconds, one array for each block.
        confidence: of the two-sided interval.
    """
    return _exp(_hodges_lehmann(_log_medians(blocks, "blocks"), confidence))


def verdict(interval: Interval) -> Literal["faster", "slower", "no_difference"]:
    """Says whether the interval of a speed-up leaves out 1, and on which side.

    `no_difference` means that none was shown at this confidence, not that there is none.
    """
    if interval.low > 1:
        return "faster"
    if interval.high < 1:
        return "slower"
    return "no_difference"


def paired_proportion_bound(
    baseline_correct: np.ndarray, candidate_correct: np.ndarray, confidence: float = 0.95
) -> Interval:
    """Returns the drop of a proportion, such as accuracy, measured on the same examples.

    The bounds are those of Tango 1998, "Equivalence test and confidence interval for the
    difference in proportions for the paired-sample design", Statistics in Medicine 17:891-908:
    the drops that a score test with the nuisance parameter estimated under the tested drop does
    not reject. It keeps its coverage where few examples or none tell the two sides apart, where
    the usual (Wald) interval has no width: without such examples among n, the upper bound is
    z²/(n + z²). Assumes examples that are independent of each other.

    Args:
        baseline_correct: 0 or 1 (or bool) for each example.
        candidate_correct: the same examples in the same order.
        confidence: of each of the two bounds taken alone.
    """
    _check_confidence(confidence)
    baseline = _zeros_and_ones(baseline_correct, "baseline_correct")
    candidate = _zeros_and_ones(candidate_correct, "candidate_correct")
    _check_same_size(baseline, candidate, "baseline_correct", "candidate_correct")
    num_lost = int(np.sum(baseline & ~candidate))
    num_gained = int(np.sum(~baseline & candidate))
    z = NormalDist().inv_cdf(confidence)
    return Interval(
        estimate=(num_lost - num_gained) / baseline.size,
        low=-_tango_upper_bound(num_gained, num_lost, baseline.size, z),
        high=_tango_upper_bound(num_lost, num_gained, baseline.size, z),
    )


def mcnemar(baseline_correct: np.ndarray, candidate_correct: np.ndarray) -> float:
    """Returns the two-sided p-value of McNemar's test: do the two answer equally well?

    It looks only at examples that one side gets right and the other wrong: were both equally good,
    each would be lost or gained by the toss of a coin. The mid-p version, which keeps its level in
    practice and is less timid than the exact one (McNemar 1947; Fagerland, Lydersen & Laake 2013,
    "The McNemar test for binary matched-pairs data", BMC Medical Research Methodology 13:91).
    Assumes independent examples. It says whether there is a difference; how large it may be is
    what `paired_proportion_bound` says.

    Args:
        baseline_correct: 0 or 1 (or bool) for each example.
        candidate_correct: the same examples in the same order.
    """
    baseline = _zeros_and_ones(baseline_correct, "baseline_correct")
    candidate = _zeros_and_ones(candidate_correct, "candidate_correct")
    _check_same_size(baseline, candidate, "baseline_correct", "candidate_correct")
    num_lost, num_gained = int(np.sum(baseline & ~candidate)), int(np.sum(~baseline & candidate))
    count, fewer = num_lost + num_gained, min(num_lost, num_gained)
    if num_lost == num_gained:
        return 1.0
    k = np.arange(1, fewer + 1)
    log_chances = np.cumsum(np.concatenate([[-count * math.log(2)], np.log((count - k + 1) / k)]))
    chances = np.exp(log_chances)  # of 0 to `fewer` heads among `count` tosses
    return float(min(1.0, 2 * chances.sum() - chances[-1]))


def paired_mean_bound(
    differences: np.ndarray, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Returns the mean drop of a metric that every example has its own value of.

    The bounds are those of a percentile bootstrap over examples (Efron & Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 13), with tails widened for few examples (Hesterberg
    2015). Assumes independent examples whose largest differences are in the sample: a rare large
    loss that was not drawn cannot be seen, and differences that are all equal give an interval
    without width. Use `paired_proportion_bound` for differences of 0/1 values.

    Args:
        differences: baseline minus candidate (larger is better) for each example.
        confidence: of each of the two bounds taken alone.
        resamples: how many samples of examples are drawn, a chunk at a time.
        seed: of the draws.
    """
    _check_confidence(confidence)
    _check_resamples(resamples)
    differences = _finite_vector(differences, "differences", min_size=2)
    generator = np.random.default_rng(seed)
    num_examples = differences.size
    chunk = max(1, _CHUNK_ELEMENTS // num_examples)
    means = np.empty(resamples)
    for start in range(0, resamples, chunk):
        stop = min(start + chunk, resamples)
        drawn = generator.integers(num_examples, size=(stop - start, num_examples), dtype=np.int32)
        means[start:stop] = differences[drawn].mean(axis=1)
    return _percentile_interval(float(differences.mean()), means, confidence, num_examples)


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Returns the area under the ROC curve: how often a positive outscores a negative.

    Computed from midranks, that is as the Mann-Whitney statistic (Hanley & McNeil 1982, "The
    meaning and use of the area under a ROC curve"): a tie counts one half. Assumes nothing about
    how scores are spread; only their order matters.

    Args:
        labels: 0 or 1 (or bool) for each example, both present.
        scores: larger for what looks more like a 1.
    """
    positives, negatives = _split_scores(labels, scores, "scores", min_of_each=1)
    of_positives, _ = _auc_components(positives, negatives)
    return float(of_positives.mean())


def paired_auc_bound(
    labels: np.ndarray,
    baseline_scores: np.ndarray,
    candidate_scores: np.ndarray,
    confidence: float = 0.95,
) -> Interval:
    """Returns the drop in ROC AUC between two sets of scores of the same examples.

    The variance is that of DeLong, DeLong & Clarke-Pearson 1988, "Comparing the areas under two
    or more correlated receiver operating characteristic curves", Biometrics 44:837-845, computed
    from midranks as in Sun & Xu 2014, "Fast implementation of DeLong's algorithm", IEEE Signal
    Processing Letters 21:1389-1393. Assumes independent examples, and enough of both classes for
    the normal approximation. Where both sides separate the classes perfectly, or order the
    examples alike, the estimated variance is 0 and the interval has no width.

    Args:
        labels: 0 or 1 (or bool) for each example, at least two of each.
        baseline_scores: larger for what looks more like a 1.
        candidate_scores: the same examples in the same order.
        confidence: of each of the two bounds taken alone.
    """
    _check_confidence(confidence)
    baseline = _split_scores(labels, baseline_scores, "baseline_scores", min_of_each=2)
    candidate = _split_scores(labels, candidate_scores, "candidate_scores", min_of_each=2)
    drops = [
        of_baseline - of_candidate
        for of_baseline, of_candidate in zip(
            _auc_components(*baseline), _auc_components(*candidate), strict=True
        )
    ]
    estimate = float(drops[0].mean())
    standard_error = math.sqrt(sum(float(drop.var(ddof=1)) / drop.size for drop in drops))
    margin = NormalDist().inv_cdf(confidence) * standard_error
    return Interval(estimate, max(-1.0, estimate - margin), min(1.0, estimate + margin))


def resample(
    statistic: Callable[[np.ndarray], float],
    num_examples: int,
    resamples: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """Returns a statistic on samples of the examples, drawn with replacement, (resamples,).

    The samples depend on the numbers and the seed only, so that the values of two models can be
    subtracted. NaN stands for a sample without a value, such as one that lacks a class.

    Args:
        statistic: given indices of examples, repeats included, returns its value on them.
        num_examples: how many examples there are.
        resamples: how many samples are drawn.
        seed: of the draws.
    """
    _check_resamples(resamples)
    generator = np.random.default_rng(seed)
    values = np.full(resamples, math.nan)
    for place in range(resamples):
        indices = generator.integers(num_examples, size=num_examples)
        try:
            values[place] = float(statistic(indices))
        except Exception:  # a user's metric may raise anything when a sample lacks a class
            continue
    return np.where(np.isfinite(values), values, math.nan)


def bootstrap_bound(
    estimate: float, drops: np.ndarray, num_examples: int, confidence: float = 0.95
) -> Interval:
    """Returns the drop of a metric that only a set of examples has, such as F1 or mAP.

    The bounds are those of a percentile bootstrap over examples (Efron & Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 13), with tails widened for few examples (Hesterberg
    2015). Assumes independent examples and a metric that changes smoothly with the sample. The
    bounds are themselves random: 200 samples put about ten beyond a 95 % bound. A sample without
    a value counts as beyond both bounds: they are infinite where more than 5 % have none.

    Args:
        estimate: the drop on all examples.
        drops: on samples, from `resample`.
        num_examples: how many examples there are.
        confidence: of each of the two bounds taken alone.
    """
    _check_confidence(confidence)
    if num_examples < 2:
        raise ValueError(
            f"Got num_examples={num_examples}; expected at least 2. Evaluate on more examples: "
            "one alone does not show how much examples differ."
        )
    is_missing = np.isnan(drops)
    if not is_missing.any():
        return _percentile_interval(estimate, drops, confidence, num_examples)
    level = _widened_level(confidence, num_examples)
    # Between a number and infinity nothing can be interpolated: the outer one is taken.
    low = np.quantile(np.where(is_missing, -math.inf, drops), 1 - level, method="lower")
    high = np.quantile(np.where(is_missing, math.inf, drops), level, method="higher")
    return _interval_around(estimate, float(low), float(high))


def num_examples_needed(drop: Interval, num_examples: int, max_drop: float) -> int | None:
    """Returns how many examples in all would bring the upper bound of a drop inside `max_drop`.

    An approximation: it takes the estimate to stay as it is and the distance from the estimate
    to its upper bound to shrink with 1/sqrt(n), as standard errors do. It is careful where the
    two sides give the same answer on every example, for there Tango's bound shrinks with 1/n.

    Args:
        drop: the estimate and bounds found so far.
        num_examples: how many examples they came from.
        max_drop: the budget, in the unit of the drop.

    Returns:
        `num_examples` when the bound is inside already; None when the estimate itself is not
        below `max_drop`, or so near below it that the number would not be finite.
    """
    if num_examples < 1:
        raise ValueError(
            f"Got num_examples={num_examples}; expected at least 1. Give the number of examples "
            "that the drop was measured on."
        )
    if drop.high <= max_drop:
        return num_examples
    room = max_drop - drop.estimate
    if not room > 0:
        return None
    shrinking = (drop.high - drop.estimate) / room
    needed = num_examples * shrinking * shrinking
    return max(num_examples, math.ceil(needed)) if math.isfinite(needed) else None


def _log_medians(blocks: Sequence[Sequence[float] | np.ndarray], name: str) -> np.ndarray:
    return np.log([np.median(_times(block, f"{name}[{i}]")) for i, block in enumerate(blocks)])


def _hodges_lehmann(values: np.ndarray, confidence: float) -> Interval:
    """Returns the centre of values that are symmetric around it; see `paired_ratio`."""
    _check_confidence(confidence)
    rank = _signed_rank_bound(values.size, confidence)
    if not rank:
        needed = 1 + math.ceil(-math.log2(1 - confidence))
        raise ValueError(
            f"Got {values.size} blocks; expected at least {needed} for a confidence of "
            f"{confidence}. Measure more blocks: fewer do not show how much blocks differ."
        )
    first, second = np.triu_indices(values.size)
    means = np.sort((values[first] + values[second]) / 2)
    return Interval(float(np.median(means)), float(means[rank - 1]), float(means[-rank]))


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(value) for value in dataclasses.astuple(interval)))


@functools.cache
def _signed_rank_bound(count: int, confidence: float) -> int:
    """Returns which of the ordered means of pairs is the lower bound, from 1; 0 when none is.

    That is the largest k with P(W < k) <= (1 - confidence) / 2, where W is Wilcoxon's sum of the
    ranks 1 to `count`, each in it or not by a fair coin. Its distribution is built up rank by rank.
    """
    chances = np.ones(1)
    for rank in range(1, count + 1):
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    return int(np.searchsorted(np.cumsum(chances), (1 - confidence) / 2, side="right"))


def _tango_upper_bound(num_lost: int, num_gained: int, num_examples: int, z: float) -> float:
    """Returns the drop at which Tango's score statistic is -z, by bisection: it only falls."""
    estimate = (num_lost - num_gained) / num_examples

    def statistic(drop: float) -> float:
        # The constrained maximum likelihood estimate of the proportion gained.
        a = 2 * num_examples
        b = -num_lost - num_gained + (2 * num_examples - num_lost + num_gained) * drop
        c = -num_gained * drop * (1 - drop)
        gained = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
        variance = num_examples * (2 * gained + drop * (1 - drop))
        if variance <= 0:
            return -math.inf
        return (num_lost - num_gained - num_examples * drop) / math.sqrt(variance)

    low, high = estimate, 1.0
    while low < (middle := (low + high) / 2) < high:
        if statistic(middle) > -z:
            low = middle
        else:
            high = middle
    return high


def _auc_components(positives: np.ndarray, negatives: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns, for each positive, the share of negatives below it; for each negative, above it."""
    ranks = _midranks(np.concatenate([positives, negatives]))
    of_positives = (ranks[: positives.size] - _midranks(positives)) / negatives.size
    of_negatives = 1 - (ranks[positives.size :] - _midranks(negatives)) / positives.size
    return of_positives, of_negatives


def _midranks(values: np.ndarray) -> np.ndarray:
    """Returns ranks from 1, with ties sharing the mean of the ranks they take up."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse.reshape(-1)]


def _widened_level(level: float, num_units: int) -> float:
    """Returns the quantile to read off a bootstrap so that few units do not make it too narrow.

    Hesterberg 2015, "What teachers should know about the bootstrap": the mean of a bootstrap
    sample varies by n - 1 over n of what it should, with normal where t tails belong; so read the
    quantile Φ(t(level, n - 1) · sqrt(n / (n - 1))). The t quantile is the expansion of Abramowitz
    & Stegun 26.7.5, right within 1 % for three units and better for more.
    """
    normal = NormalDist()
    z = normal.inv_cdf(level)
    df = num_units - 1
    t = (
        z
        + (z**3 + z) / 4 / df
        + (5 * z**5 + 16 * z**3 + 3 * z) / 96 / df**2
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384 / df**3
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160 / df**4
    )
    return normal.cdf(t * math.sqrt(num_units / df))


def _percentile_interval(
    estimate: float, resampled: np.ndarray, confidence: float, num_units: int
) -> Interval:
    level = _widened_level(confidence, num_units)
    low, high = np.quantile(resampled, [1 - level, level])
    return _interval_around(estimate, float(low), float(high))


def _interval_around(estimate: float, low: float, high: float) -> Interval:
    """Widens the bounds where needed to take in the estimate, which a bootstrap can leave out."""
    return Interval(estimate, min(low, estimate), max(high, estimate))


def _split_scores(
    labels: np.ndarray, scores: np.ndarray, name: str, min_of_each: int
) -> tuple[np.ndarray, np.ndarray]:
    labels = _zeros_and_ones(labels, "labels")
    scores = _finite_vector(scores, name, min_size=1)
    _check_same_size(labels, scores, "labels", name)
    positives, negatives = scores[labels], scores[~labels]
    if min(positives.size, negatives.size) < min_of_each:
        raise ValueError(
            f"Got labels with {positives.size} ones and {negatives.size} zeros; expected at least "
            f"{min_of_each} of each. Evaluate on examples of both classes."
        )
    return positives, negatives


def _finite_vector(values: Sequence[float] | np.ndarray, name: str, min_size: int) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or array.size < min_size:
        raise ValueError(
            f"Got {name} of shape {array.shape}; expected one dimension and at least {min_size} "
            "values. Flatten it, or measure more."
        )
    if not np.all(np.isfinite(array)):
        raise ValueError(
            f"Got {name} with {int(np.sum(~np.isfinite(array)))} values that are NaN or infinite; "
            "expected finite numbers. Find out where they come from: leaving them out would hide "
            "a failure."
        )
    return array


def _times(block: Sequence[float] | np.ndarray, name: str) -> np.ndarray:
    times = _finite_vector(block, name, min_size=1)
    if np.any(times <= 0):
        raise ValueError(
            f"Got {name} with a time of {times.min()} s; expected times above 0. Time more calls "
            "at once: the clock is too coarse for one."
        )
    return times


def _zeros_and_ones(values: np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != 1 or not array.size or not np.all((array == 0) | (array == 1)):
        raise ValueError(
            f"Got {name} of shape {array.shape} and dtype {array.dtype}; expected one dimension, "
            "at least one value, and only zeros and ones. Compare predictions with labels first."
        )
    return array.astype(bool)


def _check_same_size(first: np.ndarray, second: np.ndarray, *names: str) -> None:
    if first.size != second.size:
        raise ValueError(
            f"Got {first.size} {names[0]} and {second.size} {names[1]}; expected as many of both. "
            "Evaluate both sides on the same examples in the same order."
        )


def _check_confidence(confidence: float) -> None:
    if not 0.5 < confidence < 1:
        raise ValueError(
            f"Got confidence={confidence!r}; expected a number above 0.5 and below 1. Write 95 % "
            "as 0.95."
        )


def _check_resamples(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(
            f"Got resamples={resamples!r}; expected at least 1. Leave it out for the default."
        )
