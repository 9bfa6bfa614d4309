"""The metric of one output: gathered batch by batch, and compared with the model as saved.

Scores are stored example by example, so that a variant is compared with the baseline pair by pair
(`drop`), which tells far smaller differences than two separate means.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from tfopt.errors import ConversionError, InputError
from tfopt.examples import Arrays
from tfopt.measure import statistics
from tfopt.measure.metric_names import find_metric
from tfopt.measure.metrics import Metric, has_class

NUM_RESAMPLES = 1000  # of counts, which are added quickly
MIN_RECALL_LOSS = 0.1
STANDARD_ERRORS = 3
MAX_NAMED_CLASSES = 3


@dataclasses.dataclass(frozen=True)
class Scores:
    """The outcome of a metric over the evaluation examples.

    Attributes:
      metric: its name.
      higher_is_better: which way the metric points.
      level: of the metric; see `Metric`.
      scores: one an example (of `sums` a row of counts, of `set` the one number).
      labels: kept for rankings and set-level metrics only.
      outputs: everything that a set-level metric looks at; empty otherwise.
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
    labels: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    outputs: Arrays = dataclasses.field(default_factory=dict)
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
    def num_examples(self) -> int:
        """That have labels."""
        return len(self.labels if self.level == "set" else self.scores)

    @property
    def unit(self) -> float:
        """What a drop of 1 means in the budget: 1, or the scale of an unbounded error.

        The scale is the error of always answering the mean label (for `mse` the variance of the
        labels), or else the model's own error.
        """
        if not self.is_unbounded:
            return 1.0
        if self.level == "example" and np.isin(self.scores, (0, 1)).all():
            return 1.0  # wrong answers are counted: a share
        return self.constant_error if self.constant_error > 0 else abs(self.value)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as arrays that need no pickle; `from_arrays` reads it."""
        small = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if not isinstance(getattr(self, field.name), (np.ndarray, dict))
        }
        arrays = {
            "about": np.array(json.dumps(small)),
            **{name: getattr(self, name) for name in _ARRAYS},
            **{f"output:{name}": value for name, value in self.outputs.items()},
        }
        # Text is kept as bytes: objects would be pickled.
        return {k: v.astype(bytes) if v.dtype.kind == "O" else v for k, v in arrays.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Scores:
        """Reads what `to_arrays` made."""
        arrays = {k: v.astype(object) if v.dtype.kind == "S" else v for k, v in arrays.items()}
        outputs = {
            name.removeprefix("output:"): value
            for name, value in arrays.items()
            if name.startswith("output:")
        }
        about = json.loads(str(arrays["about"]))
        return cls(**about, **{name: arrays[name] for name in _ARRAYS}, outputs=outputs)


_ARRAYS = ("scores", "labels", "found", "occurring")


class Collector:
    """Gathers a metric's scores over all batches.

    Args:
      metric: what to compute.
      output_name: the output that it looks at.
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
        self._metric, self._output_name = metric, output_name
        self._mean_label, self._is_reference = mean_label, is_reference
        self._scores: list[np.ndarray] = []
        self._constant_scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._outputs: list[Arrays] = []
        self._found = self._occurring = np.zeros(0, np.int64)

    def add(self, outputs: Arrays, labels: Any) -> None:
        """Scores a batch.

        Args:
          outputs: all of the model's, (examples, …).
          labels: of the output, likewise; of a metric that takes all outputs it may be a dict.

        Raises:
          InputError: when the metric and the labels do not fit.
        """
        metric, output = self._metric, outputs[self._output_name]
        count = len(next(iter(labels.values())) if isinstance(labels, dict) else labels)
        if len(output) != count:
            raise InputError(
                f"Output {self._output_name!r} has {len(output)} rows for {count} examples; the "
                f"metric {metric.name} needs one an example."
            )
        if metric.has_label is not None:
            keep = metric.has_label(labels)
            if not keep.all():
                if not keep.any():
                    return
                labels, outputs = labels[keep], {k: v[keep] for k, v in outputs.items()}
                output, count = outputs[self._output_name], int(keep.sum())
        given = _given(outputs) if metric.takes_all_outputs else output
        scores: Any = None
        if self.level != "set":
            try:
                scores = np.asarray(metric.score(given, labels), np.float64)
            except Exception as error:
                if self.level != "custom":
                    raise _as_input_error(metric, error) from error
                # One of a set may have no value on a part of it; on all of it, `finish` asks again.
                scores = np.asarray(math.nan)
            if self.level == "custom":
                self.level = "set" if scores.ndim == 0 else "example"
        if self.level == "set":
            self._outputs.append(
                outputs if metric.takes_all_outputs else {self._output_name: output}
            )
        elif scores.shape[:1] != (count,) or scores.ndim != (2 if self.level == "sums" else 1):
            raise InputError(
                f"Metric {metric.name!r} returned shape {scores.shape} for {count} examples; it "
                "must return one number an example, or one in all."
            )
        else:
            self._scores.append(scores)
            if (constant := self._constant(output, labels)) is not None:
                self._constant_scores.append(np.asarray(metric.score(constant, labels)))
        if self.level in ("set", "ranking"):
            self._labels.append(labels)
        if metric.recall is not None:
            found, occurring = metric.recall(output, labels)
            self._found = _add(self._found, found)
            self._occurring = _add(self._occurring, occurring)

    def finish(self) -> Scores:
        """The scores of all batches.

        Raises:
          InputError: when no example has a label, or the metric is not a number.
          ConversionError: when only a variant's is not.
        """
        metric, labels, outputs, constant_error = self._metric, np.zeros(0), {}, math.nan
        if self.level == "custom" or not (self._scores or self._outputs):
            raise InputError(f"No example has a label that {metric.name} can be computed with.")
        if self._labels:
            labels = _concatenate(self._labels)
        if self.level == "set":
            outputs = {
                name: np.concatenate([outputs[name] for outputs in self._outputs])
                for name in self._outputs[0]
            }
            try:
                value = metric.score(_given(outputs), labels)
            except Exception as error:
                raise _as_input_error(metric, error) from error
            scores = np.atleast_1d(np.asarray(value, np.float64))
            constant = self._constant(_given(outputs), labels)
            if constant is not None:
                try:
                    constant_error = float(metric.score(constant, labels))
                except Exception:  # a constant is no answer to every metric
                    constant_error = math.nan
        else:
            scores = np.concatenate(self._scores)
            if self._constant_scores:
                constant_error = float(np.concatenate(self._constant_scores).mean())
        if self.level == "ranking":
            scores, labels = _of_two_classes(scores, labels)
        num_wrong = int((~np.isfinite(scores)).any(-1).sum() if scores.ndim > 1
                        else (~np.isfinite(scores)).sum())  # fmt: skip
        if num_wrong:
            text = f"Metric {metric.name} is not a finite number on {num_wrong} of {len(scores)}"
            if self._is_reference:
                raise InputError(f"{text} examples; look for NaN in the outputs and the labels.")
            raise ConversionError(f"{text} examples.")
        return Scores(
            metric.name, metric.higher_is_better, self.level, scores, labels, outputs,
            metric.is_unbounded, constant_error, self._found, self._occurring,
        )  # fmt: skip

    def _constant(self, output: Any, labels: np.ndarray) -> np.ndarray | None:
        """What always answering the mean label would return, or None where that is no answer."""
        mean = self._mean_label
        if mean is None or not self._metric.is_unbounded or not isinstance(output, np.ndarray):
            return None
        shape = output.shape[1:]
        if mean.size != math.prod(shape):
            if mean.size != math.prod(shape[:-1]):
                return None
            mean = mean.reshape(*shape[:-1], 1)  # several numbers for one label: quantiles
        else:
            mean = mean.reshape(shape)
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
    if candidate.level in ("sums", "set"):
        try:
            return _bootstrap(baseline, candidate, sign)
        except (ValueError, ArithmeticError):
            return boundless(lost)  # some samples lack a class
    before, after = sign * baseline.scores, sign * candidate.scores
    if np.isin(baseline.scores, (0, 1)).all() and np.isin(candidate.scores, (0, 1)).all():
        # What is lost when 0 is better is what is gained when 1 is.
        before, after = (before, after) if candidate.higher_is_better else (1 + before, 1 + after)
        return statistics.paired_proportion_bound(before, after)
    return statistics.paired_mean_bound(before - after)


def boundless(lost: float) -> statistics.Interval:
    """One example tells nothing about others: whatever was seen, it could be anything."""
    return statistics.Interval(lost, -math.inf, math.inf)


def answers(scores: Scores) -> np.ndarray | None:
    """Right or wrong for each example, or None when the metric says something else."""
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
        "--metric."
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


def lost_classes(baseline: Scores, candidate: Scores) -> str | None:
    """Classes that a variant finds much less often, in one sentence, or None.

    Named are classes whose recall fell by 0.1 or more, by three standard errors at least, and by
    more than the metric did: a rare class can be lost altogether at no visible cost.
    """
    before, after = recall(baseline), recall(candidate)
    overall = max(0.0, baseline.value - candidate.value)
    found = []
    for index, share in before.items():
        count = int(baseline.occurring[index])
        likely = (share * count + 1) / (count + 2)
        error = math.sqrt(likely * (1 - likely) / count)
        fell = share - after.get(index, 0.0)
        if fell >= max(MIN_RECALL_LOSS, STANDARD_ERRORS * error) and fell > 2 * overall:
            found.append((fell, index, count))
    if not found:
        return None
    found.sort(reverse=True)
    named = [
        f"{index} from {before[index]:.2f} to {after.get(index, 0.0):.2f} (of {count})"
        for _, index, count in found[:MAX_NAMED_CLASSES]
    ]
    rest = len(found) - len(named)
    more = f" and {rest} more" if rest else ""
    return f"Recall fell of class {', '.join(named)}{more}."


def _bootstrap(baseline: Scores, candidate: Scores, sign: float) -> statistics.Interval:
    metric, count = find_metric(candidate.metric), candidate.num_examples
    if candidate.level == "sums":

        def lost_sums(indices: np.ndarray) -> float:
            weights = np.bincount(indices, minlength=count)
            before, after = (_value_of(metric, weights @ s.scores) for s in (baseline, candidate))
            return sign * float(before - after)

        return statistics.bootstrap_bound(lost_sums, count, resamples=NUM_RESAMPLES)

    def lost(indices: np.ndarray) -> float:
        before, after = (
            float(metric.score(_given(_take(s.outputs, indices)), s.labels[indices]))
            for s in (baseline, candidate)
        )
        return sign * (before - after)

    return statistics.bootstrap_bound(lost, count)


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
            f"AUC needs labels of two classes, both, and got {len(values)}; use --metric=top1 for "
            "classes."
        )
    return scores, (flat == values[1]).astype(np.int64)


def _as_input_error(metric: Metric, error: Exception) -> Exception:
    """A sentence for what a metric of a library raised; errors of the user's own code stay."""
    is_library = metric.name.startswith(("keras:", "sklearn:"))
    if isinstance(error, InputError) or not is_library:
        return error
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = lines[0].rstrip(".") if lines else type(error).__name__
    return InputError(
        f"Metric {metric.name} cannot be computed from these outputs and labels: {reason}; choose "
        "other options, such as output=argmax, or another --metric."
    )


def _given(outputs: Arrays) -> Any:
    """What a custom metric gets: the array, or the dict where the model has several outputs."""
    return outputs if len(outputs) > 1 else next(iter(outputs.values()))


def _take(outputs: Arrays, indices: np.ndarray) -> Arrays:
    return {name: value[indices] for name, value in outputs.items()}


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
