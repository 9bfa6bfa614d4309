"""Accuracy by a metric, and what is lost against the model as saved; every example is kept apart.

Scores are stored example by example, so that a variant is compared with the baseline pair by pair
(`accuracy_drop`), which tells far smaller differences than two separate means.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.examples import Arrays, Examples, ExampleWriter, labels_for
from tfopt.measure import statistics
from tfopt.measure.fidelity import DETECTIONS, Comparer, Fidelity, Reference, Sample
from tfopt.measure.metrics import AGREEMENT, Metric, find_metric
from tfopt.measure.outputs import QUESTIONS, Kind
from tfopt.runtimes.base import Session

REFERENCE_BYTES = 1 << 30  # outputs of the reference that are kept to compare tensors with


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of running a model over the evaluation examples.

    Attributes:
      metric: its name.
      higher_is_better: which way the metric points.
      level: of the metric; see `Metric`.
      scores: one an example (for set-level metrics the one number).
      labels: kept for rankings and set-level metrics only.
      lost: of each output, what each example that was compared with the reference lost; see
        `tfopt.measure.outputs.lost`. A detector's outputs are also compared together, as
        `DETECTIONS`. Empty for the reference itself.
      outputs: everything that a set-level metric looks at; empty otherwise.
      fidelity: of each output with numbers, by name; empty for the reference itself.
    """

    metric: str
    higher_is_better: bool
    level: str
    scores: np.ndarray
    labels: np.ndarray
    lost: Arrays = dataclasses.field(default_factory=dict)
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
        nested = ("lost", "outputs", "fidelity")
        values: dict[str, Any] = {
            k: np.asarray(v) for k, v in vars(self).items() if k not in nested
        }
        values.update({f"output:{name}": value for name, value in self.outputs.items()})
        values.update({f"lost:{name}": value for name, value in self.lost.items()})
        for name, found in self.fidelity.items():
            values[f"fidelity:{name}"] = np.array(json.dumps(dataclasses.asdict(found)))
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
        lost = nested("lost:")
        fidelity = {k: Fidelity(**json.loads(str(v))) for k, v in nested("fidelity:").items()}
        for name in ("metric", "level", "higher_is_better"):
            values[name] = values[name].item()
        return cls(**values, lost=lost, outputs=outputs, fidelity=fidelity)


def accuracy_drop(baseline: Evaluation, candidate: Evaluation) -> statistics.Interval:
    """How much worse the candidate is, in absolute points, with one-sided 95 % bounds.

    0/1 scores get Tango's score interval, AUC DeLong's, everything else a paired bootstrap.
    Without labels the drop is what the answers lost against those of the model as saved, of the
    output that lost most; see `tfopt.measure.outputs.QUESTIONS`.
    """
    if candidate.metric == AGREEMENT:
        return _lost(candidate.lost[most_lost(candidate)])
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


def most_lost(evaluation: Evaluation) -> str:
    """The output whose answers lost most; of a detector's outputs all together."""
    return max(evaluation.lost, key=lambda name: float(evaluation.lost[name].mean()))


def question(evaluation: Evaluation) -> str:
    """What `accuracy_drop` is without labels, in words."""
    name = most_lost(evaluation)
    if name == DETECTIONS:
        return "1 - F1 of the boxes"
    return f"{QUESTIONS[Kind(evaluation.fidelity[name].kind)]} in output {name!r}"


def _lost(lost: np.ndarray) -> statistics.Interval:
    if len(lost) < 2:
        return _boundless(float(lost.mean()))
    if np.isin(lost, (0, 1)).all():
        return statistics.paired_proportion_bound(np.ones_like(lost), 1 - lost)
    return statistics.paired_mean_bound(lost)


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
    output_name: str | None,
    batch_size: int,
    reference: Reference | None,
    write_reference: Path | None = None,
) -> Evaluation:
    """Runs a model over all examples.

    An output without a batch dimension, such as a detector's boxes, belongs to a single example:
    when the model as saved has one, every model is run example by example.

    Args:
      session: the model.
      examples: inputs and labels.
      metric_name: as `find_metric` takes it, or `agreement`.
      output_name: the output that the metric looks at; for `agreement` None is all of them.
      batch_size: examples in each run; the session's own where it insists on one.
      reference: the outputs of the model as saved; None for that model itself.
      write_reference: where its outputs go.

    Raises:
      InputError: when the metric and the labels do not fit.
    """
    whole = set() if reference is None else reference.whole
    while True:
        try:
            return _evaluate(
                session, examples, metric_name, output_name,
                1 if whole else batch_size, reference, write_reference, whole,
            )  # fmt: skip
        except _WholeOutputError as found:
            whole |= found.names
            if write_reference is not None:
                shutil.rmtree(write_reference)


class _WholeOutputError(Exception):
    """Outputs turned out to have no batch dimension."""

    def __init__(self, names: set[str]):
        super().__init__(", ".join(sorted(names)))
        self.names = names


def _evaluate(
    session: Session,
    examples: Examples,
    metric_name: str,
    output_name: str | None,
    batch_size: int,
    reference: Reference | None,
    write_reference: Path | None,
    whole: set[str],
) -> Evaluation:
    found = Metric(AGREEMENT, lambda o, y: None) if metric_name == AGREEMENT else None
    found = found or find_metric(metric_name)
    compare = None if reference is None else Comparer(reference)
    collect = _Collect(found)
    size = session.signature.batch_size or batch_size
    writer = None if write_reference is None else ExampleWriter(write_reference)
    sample, written = Sample(), 0
    for inputs, labels, count in examples.batches(session.signature, size):
        outputs = _by_example(session.run(inputs), size, count, whole, reference is None)
        if compare is not None:
            compare.add(outputs)
        if writer is not None and written < REFERENCE_BYTES:
            sample.add(outputs)
            writer.append(outputs)
            written += sum(value.nbytes for value in outputs.values())
        if output_name is not None:
            collect.add(outputs[output_name], outputs, labels_for(labels, output_name))
    if writer is not None and write_reference is not None:
        writer.__exit__()
        is_class = metric_name in ("top1", "top5")
        sample.save(write_reference, whole, output_name if is_class else None)
    scores, kept_labels, kept_outputs = collect.finish()
    return Evaluation(
        found.name,
        found.higher_is_better,
        collect.level,
        scores,
        kept_labels,
        {} if compare is None else _asked(compare, output_name),
        kept_outputs,
        {} if compare is None else compare.fidelity(),
    )


def _asked(compare: Comparer, output_name: str | None) -> Arrays:
    """What was lost of the outputs that are asked about."""
    if output_name is not None:
        return {output_name: compare.lost[output_name]}
    together = compare.detected if DETECTIONS in compare.lost else ()
    return {name: lost for name, lost in compare.lost.items() if name not in together}


def _by_example(
    outputs: Arrays, size: int, count: int, whole: set[str], is_reference: bool
) -> Arrays:
    """Outputs with one row for each example; the last examples of a batch may be filling.

    Raises:
      _WholeOutputError: when outputs of the model as saved have another number of rows.
    """
    new = {
        name
        for name, value in outputs.items()
        if name not in whole and (not value.ndim or len(value) != size)
    }
    if new and is_reference:
        raise _WholeOutputError(new)
    return {
        # A model that insists on larger batches returns it for all of a batch together.
        name: np.repeat(value[None], count, axis=0)
        if name in whole or not value.ndim
        else value[:count]
        for name, value in outputs.items()
    }


def _given(outputs: Arrays) -> Any:
    """What a custom metric gets: the array, or the dict where the model has several outputs."""
    return outputs if len(outputs) > 1 else next(iter(outputs.values()))


def _take(outputs: Arrays, indices: np.ndarray) -> Arrays:
    return {name: value[indices] for name, value in outputs.items()}


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
