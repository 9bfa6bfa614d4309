"""The metric of one output: gathered batch by batch, and compared with the model as saved.

Scores are stored example by example, so that a variant is compared with the baseline pair by pair
(`drop`), which detects far smaller differences than two separate means.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from tfopt.errors import ConversionError, InputError, first_line
from tfopt.examples import Arrays, labels_for
from tfopt.measure import statistics
from tfopt.measure.metric_names import find_metric, is_function
from tfopt.measure.metrics import Metric, has_class

ALL_OUTPUTS = "*"  # for functions that get a dict of a model's several outputs
NUM_RESAMPLES = 1000  # of counts, which are added quickly
MIN_RECALL_LOSS = 0.1
STANDARD_ERRORS = 3
MAX_NAMED_CLASSES = 3
RARE_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class Scores:
    """The outcome of a metric over the evaluation examples.

    Attributes:
      metric: its name.
      higher_is_better: which way the metric points.
      level: of the metric; see `Metric`.
      scores: one an example (of `sums` a row of counts, of `set` the one number).
      num_examples: that have a label.
      labels: kept for rankings only.
      resampled: of set-level metrics, its values on samples of the examples, the same for every
        model; NaN where it has none.
      is_unbounded: see `Metric`.
      constant_error: of an unbounded error, what always answering the mean label would have; NaN
        where that is no answer, and for variants.
      found: how often each class was found; empty where the metric has no classes.
      occurring: how often each class occurs in the labels.
    """

    metric: str
    higher_is_better: bool
    level: str
    scores: np.ndarray
    num_examples: int
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    resampled: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    is_unbounded: bool = False
    constant_error: float = math.nan
    found: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    occurring: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))

    @property
    def value(self) -> float:
        """The metric's value."""
        if self.level == "ranking":
            return statistics.auc(self.labels, self.scores)
        if self.level == "sums":
            return float(_value_of(find_metric(self.metric), self.scores.sum(0)))
        return float(self.scores.mean())

    @property
    def unit(self) -> float:
        """What a drop of 1 means in the budget: 1, or the scale of an unbounded error.

        The scale is the error of always answering the mean label (for `mse` the variance of the
        labels), or else the model's own error.
        """
        if not self.has_scale:
            return 1.0
        return self.constant_error if self.constant_error > 0 else abs(self.value)

    @property
    def has_scale(self) -> bool:
        """Whether it is an unbounded error, and no share of wrong answers."""
        # A function of the user's may return 1 for each wrong answer: the mean is a share then.
        is_share = (
            is_function(self.metric)
            and self.level == "example"
            and bool(np.isin(self.scores, (0, 1)).all() and self.scores.any())
        )
        return self.is_unbounded and not is_share

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays that need no pickle; `from_arrays` reads it."""
        small = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in _ARRAYS
        }
        return {"about": np.array(json.dumps(small)), **{n: getattr(self, n) for n in _ARRAYS}}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Scores:
        """Reads what `to_arrays` made."""
        about: dict[str, Any] = json.loads(str(arrays["about"]))
        return cls(**{**about, **{name: arrays[name] for name in _ARRAYS}})


_ARRAYS = ("scores", "labels", "resampled", "found", "occurring")


class Collector:
    """Gathers a metric's scores over all batches.

    Args:
      metric: what to compute.
      output_name: the output that it looks at, or `ALL_OUTPUTS`.
      mean_label: of one example; gives the constant answer that unbounded errors are measured by.
      is_reference: whether the model is the one as saved.
    """

    def __init__(
        self,
        metric: Metric,
        output_name: str,
        mean_label: np.ndarray | None = None,
        is_reference: bool = True,
    ):
        self.level = metric.level
        self._metric, self._name = metric, output_name
        self._mean_label, self._is_reference = mean_label, is_reference
        self._scores: list[np.ndarray] = []
        self._constant_scores: list[np.ndarray] = []
        self._labels: list[Any] = []
        self._outputs: list[Any] = []
        self._num_examples = 0
        self._found = self._occurring = np.zeros(0, np.int64)

    def add(self, outputs: Arrays, labels: Any) -> None:
        """Scores a batch.

        Args:
          outputs: all of the model's, (examples, …).
          labels: (examples, …), or a dict of such by output.

        Raises:
          InputError: when the metric and the labels do not fit.
        """
        metric = self._metric
        output: Any = outputs
        if self._name != ALL_OUTPUTS:
            output = outputs[self._name]
            labels = labels_for(labels, self._name)
            if len(output) != len(labels):
                raise InputError(
                    f"Output {self._name!r} has {len(output)} rows for {len(labels)} examples; "
                    f"metric {metric.name} needs one an example."
                )
            if metric.has_label is not None and not (keep := metric.has_label(labels)).all():
                output, labels = output[keep], labels[keep]
        count = len(next(iter(labels.values())) if isinstance(labels, dict) else labels)
        if not count:
            return
        self._num_examples += count
        if self.level != "set":
            self._score(output, labels, count)
        if self.level == "set":
            self._outputs.append(output)
        if self.level in ("set", "ranking"):
            self._labels.append(labels)
        if metric.recall is not None:
            found, occurring = metric.recall(output, labels)
            self._found = _add(self._found, found)
            self._occurring = _add(self._occurring, occurring)

    def _score(self, output: Any, labels: Any, count: int) -> None:
        metric = self._metric
        try:
            scores = np.asarray(metric.score(output, labels), np.float64)
        except Exception as error:
            if self.level != "custom":
                raise _as_input_error(metric, error, output, labels) from error
            # One of a set may have no value on a part of it; on all of it, `finish` asks again.
            scores = np.asarray(math.nan)
        if self.level == "custom":
            self.level = "set" if scores.ndim == 0 else "example"
        if self.level == "set":
            return
        if scores.shape[:1] != (count,) or scores.ndim != (2 if self.level == "sums" else 1):
            raise InputError(
                f"Metric {metric.name!r} returned shape {scores.shape} for {count} examples; it "
                "must return one number an example, or one in all."
            )
        self._scores.append(scores)
        if (constant := self._constant(output)) is not None:
            with contextlib.suppress(Exception):  # a constant is no answer to every metric
                self._constant_scores.append(np.asarray(metric.score(constant, labels)))

    def finish(self) -> Scores:
        """The scores of all batches.

        Raises:
          InputError: when no example has a label, or the metric is not a number.
          ConversionError: when only a variant's is not.
        """
        metric, labels, resampled = self._metric, np.zeros(0), np.zeros(0)
        if not self._num_examples:
            raise InputError(f"No example has a label that {metric.name} can be computed with.")
        if self.level == "set":
            scores, constant_error, resampled = self._of_set()
        else:
            scores, constant_error = np.concatenate(self._scores), math.nan
            if self._constant_scores:
                constant_error = float(np.concatenate(self._constant_scores).mean())
        if self.level == "ranking":
            scores, labels = _of_two_classes(scores, np.concatenate(self._labels))
        num_wrong = int((~np.isfinite(scores.reshape(len(scores), -1))).any(1).sum())
        if num_wrong:
            of = "" if self.level == "set" else f" on {num_wrong} of {len(scores)} examples"
            text = f"Metric {metric.name} is not a finite number{of}"
            if self._is_reference:
                raise InputError(f"{text}; look for NaN in the outputs and the labels.")
            raise ConversionError(f"{text}.")
        num_examples = len(scores) if self.level == "ranking" else self._num_examples
        return Scores(
            metric.name, metric.higher_is_better, self.level, scores, num_examples, labels,
            resampled, metric.is_unbounded, constant_error, self._found, self._occurring,
        )  # fmt: skip

    def _of_set(self) -> tuple[np.ndarray, float, np.ndarray]:
        """The metric of everything, of the constant answer, and of samples."""
        metric = self._metric
        outputs, labels = _concatenate(self._outputs), _concatenate(self._labels)
        try:
            value = float(metric.score(outputs, labels))
        except Exception as error:
            raise _as_input_error(metric, error, outputs, labels) from error
        constant_error = math.nan
        if (constant := self._constant(outputs)) is not None:
            with contextlib.suppress(Exception):
                constant_error = float(metric.score(constant, labels))

        def on(indices: np.ndarray) -> float:
            return float(metric.score(_take(outputs, indices), _take(labels, indices)))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of libraries, on samples that lack a class
            resampled = statistics.resample(on, self._num_examples)
        return np.array([value]), constant_error, resampled

    def _constant(self, output: Any) -> np.ndarray | None:
        """What always answering the mean label would return, or None where that is no answer."""
        mean = self._mean_label
        if mean is None or not self._metric.is_unbounded or not isinstance(output, np.ndarray):
            return None
        shape = output.shape[1:]
        if mean.size == math.prod(shape):
            mean = mean.reshape(shape)
        elif mean.size == math.prod(shape[:-1]):
            mean = mean.reshape(*shape[:-1], 1)  # several numbers for one label: quantiles
        else:
            return None
        return np.broadcast_to(mean, output.shape)


def mean_label(batches: Iterable[np.ndarray]) -> np.ndarray | None:
    """The mean of each number of an example's labels without NaN; None for text and ragged ones."""
    total: Any = 0.0
    count: Any = 0
    shape: tuple[int, ...] | None = None
    for labels in batches:
        if labels.dtype.kind not in "biufV" or shape not in (None, labels.shape[1:]):
            return None
        shape = labels.shape[1:]
        values = labels.astype(np.float64)
        is_known = ~np.isnan(values)
        total = total + np.where(is_known, values, 0).sum(0)
        count = count + is_known.sum(0)
    return None if shape is None else np.asarray(total / np.maximum(count, 1))


def drop(baseline: Scores, candidate: Scores) -> statistics.Interval:
    """How much worse the candidate is, in the metric's units, with one-sided 95 % bounds.

    0/1 scores get Tango's score interval, AUC DeLong's, everything else a paired bootstrap. The
    bounds are infinite where the examples do not show how much the metric varies.
    """
    sign = 1.0 if candidate.higher_is_better else -1.0
    lost = sign * (baseline.value - candidate.value)
    if candidate.num_examples < 2:
        return boundless(lost)
    if candidate.level == "ranking":
        num_positive = np.count_nonzero(candidate.labels)
        if min(num_positive, len(candidate.labels) - num_positive) < 2:
            return boundless(lost)
        return statistics.paired_auc_bound(candidate.labels, baseline.scores, candidate.scores)
    if candidate.level == "sums":
        metric = find_metric(candidate.metric)

        def lost_sums(indices: np.ndarray) -> float:
            weights = np.bincount(indices, minlength=candidate.num_examples)
            before, after = (_value_of(metric, weights @ s.scores) for s in (baseline, candidate))
            return sign * float(before - after)

        drops = statistics.resample(lost_sums, candidate.num_examples, NUM_RESAMPLES)
        return statistics.bootstrap_bound(lost, drops, candidate.num_examples)
    if candidate.level == "set":
        drops = sign * (baseline.resampled - candidate.resampled)
        return statistics.bootstrap_bound(lost, drops, candidate.num_examples)
    before, after = sign * baseline.scores, sign * candidate.scores
    if np.isin(baseline.scores, (0, 1)).all() and np.isin(candidate.scores, (0, 1)).all():
        # What is lost when 0 is better is what is gained when 1 is.
        before, after = (before, after) if candidate.higher_is_better else (1 + before, 1 + after)
        return statistics.paired_proportion_bound(before, after)
    return statistics.paired_mean_bound(before - after)


def boundless(lost: float) -> statistics.Interval:
    """One example shows nothing about others: whatever was seen, it could be anything."""
    return statistics.Interval(lost, -math.inf, math.inf)


def answers(scores: Scores) -> np.ndarray | None:
    """Right or wrong for each example, or None where the metric is another figure."""
    found = scores.scores
    if scores.level != "example" or not scores.higher_is_better or not len(found):
        return None
    return found.astype(bool) if np.isin(found, (0, 1)).all() else None


def doubt(scores: Scores) -> str | None:
    """Why the metric and the labels probably do not belong together, in one sentence, or None.

    Asked of the model as saved: a trained model does better than a constant answer.
    """
    value, metric = scores.value, scores.metric.partition("(")[0]
    trivial, what = _trivial(scores, metric)
    sign = 1.0 if scores.higher_is_better else -1.0
    if math.isnan(trivial) or sign * (value - trivial) > 0:
        return None
    return (
        f"The metric and the labels may not belong together: {scores.metric} of the model as saved "
        f"is {value:.4g}, and {what} gives {trivial:.4g}; check the labels, or choose another "
        "`metric`."
    )


def _trivial(scores: Scores, metric: str) -> tuple[float, str]:
    """The value of an answer that takes no model, and what it is."""
    if metric == "auc":
        return 0.5, "a random order"
    if scores.is_unbounded:
        return scores.constant_error, "always answering the mean label"
    if metric in ("macro_f1", "micro_f1"):
        return 0.0, "never finding a class"
    if metric in ("top1", "position_accuracy", "mean_iou") and scores.occurring.sum():
        most = int(scores.occurring.argmax())
        share = float(scores.occurring[most] / scores.occurring.sum())
        num_present = np.count_nonzero(scores.occurring) if metric == "mean_iou" else 1
        return share / num_present, f"always answering class {most}"
    return (0.0, "no right answer") if metric in ("top1", "top5") else (math.nan, "")


def recall(scores: Scores) -> dict[int, float]:
    """The share of each class's occurrences that were found, of classes that occur."""
    return {
        index: float(scores.found[index] / scores.occurring[index])
        for index in np.flatnonzero(scores.occurring).tolist()
    }


def recall_note(baseline: Scores, candidate: Scores) -> str | None:
    """The recall of classes that need attention, in one sentence, or None.

    Named are classes whose recall fell by 0.1 or more, by three standard errors at least, and by
    more than the metric did; and, where frequent classes dominate the metric, classes with less
    than a tenth of the labels that they would have if all classes were equal. A rare class can be
    lost altogether at no visible cost.
    """
    before, after = recall(baseline), recall(candidate)
    overall = max(0.0, baseline.value - candidate.value)
    total = int(baseline.occurring.sum())
    is_balanced = baseline.metric.startswith(("mean_iou", "macro_f1"))
    rare_count = 0.0 if is_balanced else RARE_SHARE * total / max(1, len(before))
    found = []
    for index, share in before.items():
        count = int(baseline.occurring[index])
        likely = (share * count + 1) / (count + 2)
        error = math.sqrt(likely * (1 - likely) / count)
        fell = share - after.get(index, 0.0)
        has_fallen = fell >= max(MIN_RECALL_LOSS, STANDARD_ERRORS * error) and fell > 2 * overall
        if has_fallen or count < rare_count:
            found.append((-fell if has_fallen else 0.0, count, index))
    if not found:
        return None
    named = [
        f"of class {index} is {after.get(index, 0.0):.2f} against {before[index]:.2f} "
        f"({count} of {total} labels)"
        for _, count, index in sorted(found)[:MAX_NAMED_CLASSES]
    ]
    rest = len(found) - len(named)
    more = f", and {rest} more classes are rare or fell" if rest else ""
    return f"The recall {', '.join(named)}{more}."


def _value_of(metric: Metric, sums: np.ndarray) -> np.ndarray:
    assert metric.value is not None
    return metric.value(sums)


def _of_two_classes(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels 0 and 1; of other two labels, the larger becomes 1."""
    labels = labels.reshape(len(labels), -1)
    if labels.shape[1] == 2:
        labels = labels.argmax(1)[:, None]  # one-hot
    flat = labels[:, 0]
    values = np.unique(flat)
    if len(values) > 2:  # beside two classes, -1, -100 and NaN are missing labels
        keep = has_class(labels)
        scores, flat = scores[keep], flat[keep]
        values = np.unique(flat)
    if len(values) != 2:
        raise InputError(
            f"AUC needs labels of two classes, both, and got {len(values)}; use `metric=top1` for "
            "classes."
        )
    return scores, (flat == values[1]).astype(np.int64)


def _as_input_error(metric: Metric, error: Exception, outputs: Any, labels: Any) -> InputError:
    """A sentence for what a metric raised on outputs and labels."""
    if isinstance(error, InputError):
        return error
    hint = ""
    if metric.name.startswith(("keras:", "sklearn:")):
        hint = "; choose other options, such as output=argmax, or another `metric`"
    return InputError(
        f"Metric {metric.name} fails on outputs of {_shape(outputs)} and labels of "
        f"{_shape(labels)}: {type(error).__name__}: {first_line(error).rstrip('.')}{hint}."
    )


def _shape(values: Any) -> str:
    if isinstance(values, dict):
        return ", ".join(f"{name}: {_shape(value)}" for name, value in values.items())
    return f"shape {values.shape} ({values.dtype})"


def _take(values: Any, indices: np.ndarray) -> Any:
    if isinstance(values, dict):
        return {name: value[indices] for name, value in values.items()}
    return values[indices]


def _concatenate(parts: list[Any]) -> Any:
    if isinstance(parts[0], dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return np.concatenate(parts)


def _add(total: np.ndarray, counts: np.ndarray) -> np.ndarray:
    size = max(len(total), len(counts))
    return sum(
        (np.pad(part, (0, size - len(part))).astype(np.int64) for part in (total, counts)),
        np.zeros(size, np.int64),
    )
