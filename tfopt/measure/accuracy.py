"""Accuracy, agreement with the reference, and tensor error; every example is kept apart.

Scores are stored example by example, so that a variant is compared with the baseline pair by pair
(`accuracy_drop`), which tells far smaller differences than two separate means.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import ConversionError, InputError
from tfopt.examples import Arrays, Examples, ExampleWriter
from tfopt.measure import statistics
from tfopt.measure.metrics import AGREEMENT, Metric, find_metric
from tfopt.runtimes.base import Session

REFERENCE_BYTES = 1 << 30  # outputs of the reference that are kept to compare tensors with


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How near one output comes to the reference's, over all examples that were compared.

    Attributes:
      agreement: share of equal decisions; NaN where the output makes none.
      max_abs_error: the largest difference of any value.
      mean_abs_error: the mean difference of all values.
      sqnr_db: signal to quantization noise ratio in decibels, 10·log10(Σ reference² / Σ
        difference²); infinite when nothing differs. Each bit of precision is worth about 6 dB.
    """

    agreement: float
    max_abs_error: float
    mean_abs_error: float
    sqnr_db: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of running a model over the evaluation examples.

    Attributes:
      metric: its name.
      higher_is_better: which way the metric points.
      level: of the metric; see `Metric`.
      scores: one an example (for set-level metrics the one number).
      labels: kept for rankings and set-level metrics only.
      agreement: one an example that was compared with the reference, in 0…1.
      relative_error: likewise, the norm of the difference over the norm of the reference.
      max_abs_error: the largest difference of any output value from the reference.
      outputs: everything that a set-level metric looks at; empty otherwise.
      fidelity: of each output with numbers, by name; empty for the reference itself.
    """

    metric: str
    higher_is_better: bool
    level: str
    scores: np.ndarray
    labels: np.ndarray
    agreement: np.ndarray
    relative_error: np.ndarray
    max_abs_error: float
    outputs: Arrays = dataclasses.field(default_factory=dict)
    fidelity: dict[str, Fidelity] = dataclasses.field(default_factory=dict)

    @property
    def accuracy(self) -> float | None:
        """The metric's value; None without labels."""
        if self.metric == AGREEMENT:
            return None
        if self.level == "ranking":
            return statistics.auc(self.labels, self.scores)
        return float(self.scores.mean())

    def save(self, path: Path) -> None:
        """Writes an .npz file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        nested = ("outputs", "fidelity")
        values: dict[str, Any] = {
            k: np.asarray(v) for k, v in vars(self).items() if k not in nested
        }
        values.update({f"output:{name}": value for name, value in self.outputs.items()})
        for name, found in self.fidelity.items():
            values[f"fidelity:{name}"] = np.array(dataclasses.astuple(found))
        # Text is kept as bytes: objects would be pickled.
        values = {k: v.astype(bytes) if v.dtype.kind == "O" else v for k, v in values.items()}
        np.savez_compressed(path, **values)

    @classmethod
    def open(cls, path: Path) -> Evaluation:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            values = {name: file[name] for name in file.files}
        values = {k: v.astype(object) if v.dtype.kind == "S" else v for k, v in values.items()}

        def nested(prefix: str) -> dict[str, np.ndarray]:
            names = [name for name in values if name.startswith(prefix)]
            return {name.removeprefix(prefix): values.pop(name) for name in names}

        outputs = nested("output:")
        fidelity = {k: Fidelity(*v.tolist()) for k, v in nested("fidelity:").items()}
        for name in ("metric", "level", "higher_is_better", "max_abs_error"):
            values[name] = values[name].item()
        return cls(**values, outputs=outputs, fidelity=fidelity)


def accuracy_drop(baseline: Evaluation, candidate: Evaluation) -> statistics.Interval:
    """How much worse the candidate is, in absolute points, with one-sided 95 % bounds.

    0/1 scores get Tango's score interval, AUC DeLong's, everything else a paired bootstrap.
    Without labels the drop is the share of examples on which the two disagree (for outputs that
    are no classes: the relative error), which is the most that a metric of decisions can lose.
    """
    if candidate.metric == AGREEMENT:
        is_decision = not np.isnan(candidate.agreement).any()
        lost = 1 - candidate.agreement if is_decision else candidate.relative_error
        if len(lost) < 2:
            return _boundless(float(lost.mean()))
        if is_decision and np.isin(lost, (0, 1)).all():
            return statistics.paired_proportion_bound(np.ones_like(lost), 1 - lost)
        return statistics.paired_mean_bound(lost)
    if candidate.level == "ranking":
        num_positive = np.count_nonzero(candidate.labels)
        if min(num_positive, len(candidate.labels) - num_positive) < 2:
            return _boundless(
                statistics.auc(candidate.labels, baseline.scores)
                - statistics.auc(candidate.labels, candidate.scores)
            )
        return statistics.paired_auc_bound(candidate.labels, baseline.scores, candidate.scores)
    sign = 1.0 if candidate.higher_is_better else -1.0
    before, after = sign * baseline.scores, sign * candidate.scores
    if len(candidate.labels if candidate.level == "set" else candidate.scores) < 2:
        return _boundless(float(before.mean() - after.mean()))
    if candidate.level == "set":
        score = find_metric(candidate.metric).score

        def drop(indices: np.ndarray) -> float:
            before, after = (
                float(score(_given(_take(e.outputs, indices)), e.labels[indices]))
                for e in (baseline, candidate)
            )
            return sign * (before - after)

        try:
            return statistics.bootstrap_bound(drop, len(candidate.labels))
        except ValueError as error:
            raise InputError(f"Metric {candidate.metric!r} has no interval: {error}") from error
    if np.isin(baseline.scores, (0, 1)).all() and np.isin(candidate.scores, (0, 1)).all():
        # What is lost when 0 is better is what is gained when 1 is.
        before, after = (before, after) if candidate.higher_is_better else (1 + before, 1 + after)
        return statistics.paired_proportion_bound(before, after)
    return statistics.paired_mean_bound(before - after)


def answers(evaluation: Evaluation) -> np.ndarray | None:
    """Right or wrong for each example, or None when the metric says something else."""
    scores = evaluation.scores
    if evaluation.level != "example" or not evaluation.higher_is_better or not len(scores):
        return None
    return scores.astype(bool) if np.isin(scores, (0, 1)).all() else None


def _boundless(lost: float) -> statistics.Interval:
    """One example tells nothing about others: whatever was seen, it could be anything."""
    return statistics.Interval(lost, -math.inf, math.inf)


def evaluate(
    session: Session,
    examples: Examples,
    *,
    metric_name: str,
    output_name: str,
    batch_size: int,
    reference: Examples | None,
    write_reference: Path | None = None,
) -> Evaluation:
    """Runs a model over all examples.

    Args:
      session: the model.
      examples: inputs and labels.
      metric_name: as `find_metric` takes it, or `agreement`.
      output_name: the output that metric and agreement look at.
      batch_size: examples in each run; the session's own where it insists on one.
      reference: the baseline's outputs; None for the baseline itself.
      write_reference: where the baseline's outputs go.

    Raises:
      ConversionError: when an output is not finite although the reference's is, or has another
        shape.
      InputError: when the metric and the labels do not fit.
    """
    found = Metric(AGREEMENT, lambda o, y: None) if metric_name == AGREEMENT else None
    found = found or find_metric(metric_name)
    compare = _Compare(reference, output_name)
    collect = _Collect(found)
    size = session.signature.batch_size or batch_size
    writer = None if write_reference is None else ExampleWriter(write_reference)
    written = 0
    for inputs, labels, count in examples.batches(session.signature, size):
        outputs = {name: _rows(value, count) for name, value in session.run(inputs).items()}
        compare.add(outputs)
        if writer is not None and written < REFERENCE_BYTES:
            writer.append(outputs)
            written += sum(value.nbytes for value in outputs.values())
        collect.add(outputs[output_name], outputs, labels)
    if writer is not None:
        writer.__exit__()
    scores, kept_labels, kept_outputs = collect.finish()
    return Evaluation(
        found.name,
        found.higher_is_better,
        collect.level,
        scores,
        kept_labels,
        np.concatenate(compare.agreement) if compare.agreement else np.zeros(0),
        np.concatenate(compare.relative_error) if compare.relative_error else np.zeros(0),
        compare.max_abs_error,
        kept_outputs,
        compare.fidelity(),
    )


def _given(outputs: Arrays) -> Any:
    """What a custom metric gets: the array, or the dict where the model has several outputs."""
    return outputs if len(outputs) > 1 else next(iter(outputs.values()))


def _take(outputs: Arrays, indices: np.ndarray) -> Arrays:
    return {name: value[indices] for name, value in outputs.items()}


def _rows(value: np.ndarray, count: int) -> np.ndarray:
    """The first rows of an output; a model without a batch dimension has one row."""
    return value[:count] if value.ndim else value[None]


class _Collect:
    """Gathers the scores of all batches."""

    def __init__(self, found: Metric):
        self.level = found.level
        self._is_custom = found.level == "custom"
        self._metric = found
        self._scores: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._outputs: list[Any] = []

    def add(self, output: np.ndarray, outputs: Arrays, labels: np.ndarray | None) -> None:
        if self._metric.name == AGREEMENT:
            return
        if labels is None:
            raise InputError(
                f"Metric {self._metric.name!r} needs labels and the data has none; add an array "
                "'y', or leave --metric out to compare with the baseline's own outputs."
            )
        scores: Any = None
        if self.level != "set":
            given = _given(outputs) if self._is_custom else output
            try:
                scores = np.asarray(self._metric.score(given, labels), np.float64)
            except Exception:
                if self.level != "custom":
                    raise
                # One of a set may have no value on a part of it; on all of it, `finish` asks again.
                scores = np.asarray(math.nan)
            if self.level == "custom":
                self.level = "set" if scores.ndim == 0 else "example"
        if self.level == "set":
            self._outputs.append(outputs)
        elif scores.shape != (len(labels),):
            raise InputError(
                f"Metric {self._metric.name!r} returned shape {scores.shape} for "
                f"{len(labels)} examples; it must return one number an example, or one in all."
            )
        else:
            self._scores.append(scores)
        if self.level in ("set", "ranking"):
            self._labels.append(labels)

    def finish(self) -> tuple[np.ndarray, np.ndarray, Arrays]:
        labels = np.concatenate(self._labels) if self._labels else np.zeros(0)
        if self.level == "set":
            outputs = {
                name: np.concatenate([outputs[name] for outputs in self._outputs])
                for name in self._outputs[0]
            }
            return np.atleast_1d(self._metric.score(_given(outputs), labels)), labels, outputs
        if self.level == "ranking":
            labels = labels.reshape(-1)
            if set(np.unique(labels)) != {0, 1}:
                raise InputError("AUC needs labels 0 and 1, both; use --metric=top1 for classes.")
        return np.concatenate(self._scores) if self._scores else np.zeros(0), labels, {}


class _Compare:
    """Compares outputs with the reference's, as long as that was kept."""

    def __init__(self, reference: Examples | None, output_name: str):
        self._reference = reference
        self._output_name = output_name
        self._start = 0
        self.agreement: list[np.ndarray] = []
        self.relative_error: list[np.ndarray] = []
        self.max_abs_error = math.nan if reference is None else 0.0
        self._sums: dict[str, _Sums] = {}

    def fidelity(self) -> dict[str, Fidelity]:
        return {name: sums.fidelity() for name, sums in self._sums.items()}

    def add(self, outputs: Arrays) -> None:
        if self._reference is None:
            return
        count = len(next(iter(outputs.values())))
        stop = min(self._start + count, self._reference.num_examples)
        if stop <= self._start:
            return
        for name, value in outputs.items():
            rows = self._reference.read(name, self._start, stop)
            value = value[: stop - self._start]
            if value.shape[1:] != rows[0].shape:
                raise ConversionError(
                    f"Output {name!r} has shape {value.shape[1:]} and the baseline's has "
                    f"{rows[0].shape}."
                )
            self._add_output(name, value, np.stack(rows))
        self._start = stop

    def _add_output(self, name: str, value: np.ndarray, reference: np.ndarray) -> None:
        if value.dtype.kind in "OSU":
            same = (value == reference).reshape(len(value), -1).mean(1)
            if name == self._output_name:
                self.agreement.append(same)
                self.relative_error.append(1 - same)
            return
        value = value.astype(np.float64).reshape(len(value), -1)
        flat = reference.astype(np.float64).reshape(len(reference), -1)
        if not np.isfinite(value[np.isfinite(flat)]).all():
            raise ConversionError(
                f"Output {name!r} holds NaN or infinity, the baseline's does not."
            )
        with np.errstate(invalid="ignore"):
            difference = np.nan_to_num(np.abs(value - flat), nan=0.0, posinf=0.0)
        self.max_abs_error = max(self.max_abs_error, float(difference.max(initial=0.0)))
        finite = np.where(np.isfinite(flat), flat, 0.0)
        agreement = _agreement(value.reshape(reference.shape), reference)
        self._sums.setdefault(name, _Sums()).add(difference, finite, agreement)
        if name == self._output_name:
            norm = np.maximum(np.linalg.norm(finite, axis=1), 1e-12)
            self.relative_error.append(np.linalg.norm(difference, axis=1) / norm)
            self.agreement.append(agreement)


class _Sums:
    """What `Fidelity` is computed from, batch by batch."""

    def __init__(self) -> None:
        self._agreement: list[np.ndarray] = []
        self._max = self._sum = self._noise = self._signal = 0.0
        self._count = 0

    def add(self, difference: np.ndarray, reference: np.ndarray, agreement: np.ndarray) -> None:
        self._agreement.append(agreement)
        self._max = max(self._max, float(difference.max(initial=0.0)))
        self._sum += float(difference.sum())
        self._noise += float(np.square(difference).sum())
        self._signal += float(np.square(reference).sum())
        self._count += difference.size

    def fidelity(self) -> Fidelity:
        sqnr = math.inf
        if self._noise:
            sqnr = 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf
        mean = self._sum / self._count if self._count else math.nan
        return Fidelity(float(np.concatenate(self._agreement).mean()), self._max, mean, sqnr)


def _agreement(value: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """The share of decisions that are equal, for each example; NaN where there are none."""
    is_float = reference.dtype.kind in "fV"  # bfloat16 is V to NumPy
    if reference.ndim >= 2 and reference.shape[-1] > 1 and is_float:
        same = value.argmax(-1) == reference.argmax(-1)
    elif reference.dtype.kind in "iub":
        same = value == reference
    else:
        return np.full(len(reference), np.nan)
    return same.reshape(len(same), -1).mean(1)
