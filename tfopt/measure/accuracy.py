"""What a model's outputs are worth: by a metric for each output, or against the model as saved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.examples import Arrays, Examples, ExampleWriter, labels_for
from tfopt.measure import choosing, scores, statistics
from tfopt.measure.comparing import (
    DETECTIONS,
    SAMPLE_EXAMPLES,
    Comparer,
    Reference,
    Sample,
)
from tfopt.measure.fidelity import Fidelity
from tfopt.measure.metric_names import find_metric
from tfopt.measure.metrics import AGREEMENT
from tfopt.measure.outputs import QUESTIONS, Kind, infer_kind
from tfopt.measure.scores import ALL_OUTPUTS, Collector, Scores
from tfopt.runtimes.base import Session
from tfopt.signature import Signature

REFERENCE_BYTES = 1 << 30  # outputs of the reference that are kept to compare tensors with
BATCH_SIZE = 64  # of what is read without running a model, or on a sample only


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The outcome of running a model over the evaluation examples.

    Attributes:
      scores: of each output with a metric, by name (or `ALL_OUTPUTS`); empty without labels.
      lost: of each output, what each example that was compared with the reference lost; see
        `tfopt.measure.outputs.lost`. Booleans where an example has a single answer. A detector's
        outputs are also compared together, as `DETECTIONS`. Empty for the reference itself.
      fidelity: of each output with numbers, by name; empty for the reference itself.
    """

    scores: dict[str, Scores] = dataclasses.field(default_factory=dict)
    lost: Arrays = dataclasses.field(default_factory=dict)
    fidelity: dict[str, Fidelity] = dataclasses.field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """The value of the metric of each output."""
        return {name: found.value for name, found in self.scores.items()}

    def save(self, path: Path) -> None:
        """Writes an .npz file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        values: dict[str, Any] = {f"lost:{name}": value for name, value in self.lost.items()}
        for name, found in self.fidelity.items():
            values[f"fidelity:{name}"] = np.array(json.dumps(dataclasses.asdict(found)))
        for name, of_output in self.scores.items():
            values |= {f"{key}:{name}": array for key, array in of_output.to_arrays().items()}
        np.savez_compressed(path, **values)

    @classmethod
    def open(cls, path: Path) -> Evaluation:
        """Reads what `save` wrote."""
        found: dict[str, dict[str, np.ndarray]] = {}
        with np.load(path) as file:
            for key in file.files:
                kind, _, name = key.partition(":")
                found.setdefault(kind, {})[name] = file[key]
        lost, fidelity = found.pop("lost", {}), found.pop("fidelity", {})
        return cls(
            {
                name: Scores.from_arrays({key: arrays[name] for key, arrays in found.items()})
                for name in found.get("about", {})
            },
            lost,
            {name: Fidelity(**json.loads(str(value))) for name, value in fidelity.items()},
        )


@dataclasses.dataclass(frozen=True)
class Drop:
    """How much worse a candidate is in one output.

    Attributes:
      output: its name; empty where the model has one only, or no labels.
      metric: its name, or `agreement`.
      interval: of the drop in the metric's units, with one-sided 95 % bounds.
      unit: what a drop of 1 means in a budget: 1 for scores, the scale of errors; see
        `Scores.unit`.
      is_error: whether the budget is a share of that scale.
      is_own_error: whether that scale is the error of the model as saved.
      num_examples: that it was measured on.
    """

    output: str
    metric: str
    interval: statistics.Interval
    unit: float = 1.0
    is_error: bool = False
    is_own_error: bool = False
    num_examples: int = 0

    @property
    def shares(self) -> statistics.Interval:
        """The interval in units of the budget."""
        if self.unit > 0:
            found = self.interval
            return statistics.Interval(
                found.estimate / self.unit, found.low / self.unit, found.high / self.unit
            )
        # An error of 0 that stays 0 lost nothing; any other lost everything.
        return statistics.Interval(
            *(0.0 if bound == 0 else math.copysign(math.inf, bound)
              for bound in dataclasses.astuple(self.interval))
        )  # fmt: skip


def accuracy_drops(baseline: Evaluation, candidate: Evaluation) -> list[Drop]:
    """How much worse a candidate is in each output, the worst first.

    Without labels the drop is what the answers lost against those of the model as saved, of the
    output that lost most; see `tfopt.measure.outputs.QUESTIONS`.
    """
    if not candidate.scores:
        lost = candidate.lost[most_lost(candidate)]
        return [Drop("", AGREEMENT, _lost(lost), num_examples=len(lost))]
    is_only = len(candidate.scores) == 1
    drops = [
        Drop(
            "" if is_only else name,
            found.metric,
            scores.drop(baseline.scores[name], found),
            baseline.scores[name].unit,
            baseline.scores[name].has_scale,
            not baseline.scores[name].constant_error > 0,
            found.num_examples,
        )
        for name, found in candidate.scores.items()
    ]
    return sorted(drops, key=lambda drop: drop.shares.high, reverse=True)


def choose_metrics(
    session: Session, examples: Examples, output_names: Sequence[str]
) -> dict[str, str]:
    """The metric of each output that fits its labels and what the model returns.

    Args:
      session: the model as saved.
      examples: all labels are looked at, and the model is run on some examples.
      output_names: which outputs.

    Raises:
      InputError: when the labels of one cannot be compared with it.
    """
    size = session.signature.batch_size or 1
    kept: dict[str, list[np.ndarray]] = {name: [] for name in output_names}
    for inputs, _, count in examples.batches(session.signature, size, limit=SAMPLE_EXAMPLES):
        outputs = session.run(inputs)
        for name, found in kept.items():
            value = outputs[name]
            rows = value[None] if not value.ndim or len(value) != size else value[:count]
            if not found or rows.shape[1:] == found[0].shape[1:]:
                found.append(rows)
    chosen = {}
    for name, parts in kept.items():
        sample = np.concatenate(parts)
        summary = choosing.summarize(_labels(examples, session.signature, name))
        try:
            chosen[name] = choosing.choose_metric(sample, infer_kind(sample), summary)
        except InputError as error:
            start = "" if len(output_names) == 1 else f"Output {name!r}: "
            raise InputError(f"{start}{error}") from error
    return chosen


def _labels(examples: Examples, signature: Signature, output: str) -> Iterator[np.ndarray]:
    """Labels of one output, batch by batch."""
    only_labels = dataclasses.replace(signature, inputs=())
    for _, labels, _ in examples.batches(only_labels, BATCH_SIZE):
        if (found := labels_for(labels, output)) is not None:
            yield found


def _collectors(
    metrics: Mapping[str, str], examples: Examples, signature: Signature, is_reference: bool
) -> dict[str, Collector]:
    collectors = {}
    for name, text in metrics.items():
        metric, mean = find_metric(text), None
        if metric.is_unbounded and is_reference and name != ALL_OUTPUTS:
            mean = scores.mean_label(_labels(examples, signature, name))
        collectors[name] = Collector(metric, name, mean, is_reference)
    return collectors


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
        return scores.boundless(float(lost.mean()))
    # By what was asked, not by what was seen: graded answers may all be lost by 0, too.
    if lost.dtype == bool:
        return statistics.paired_proportion_bound(np.ones(len(lost)), np.where(lost, 0.0, 1.0))
    return statistics.paired_mean_bound(lost)


def evaluate(
    session: Session,
    examples: Examples,
    *,
    metrics: Mapping[str, str],
    output_name: str | None = None,
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
      metrics: names as `find_metric` takes them, by output; empty without labels.
      output_name: the output that is asked about without labels; None is all of them.
      batch_size: examples in each run; the session's own where it insists on one.
      reference: the outputs of the model as saved; None for that model itself.
      write_reference: where its outputs go, as many as are kept.

    Raises:
      InputError: when the metric and the labels do not fit.
      ConversionError: when the metric of a variant is not a number.
    """
    whole = set() if reference is None else reference.whole
    while True:
        try:
            return _evaluate(
                session, examples, metrics, output_name, 1 if whole else batch_size,
                reference, write_reference, whole,
            )  # fmt: skip
        except _WholeOutputError as found:
            whole |= found.names
            if write_reference is not None:
                shutil.rmtree(write_reference, ignore_errors=True)


class _WholeOutputError(Exception):
    """Outputs turned out to have no batch dimension."""

    def __init__(self, names: set[str]):
        super().__init__(", ".join(sorted(names)))
        self.names = names


def _evaluate(
    session: Session,
    examples: Examples,
    metrics: Mapping[str, str],
    output_name: str | None,
    batch_size: int,
    reference: Reference | None,
    write_reference: Path | None,
    whole: set[str],
) -> Evaluation:
    compare = None if reference is None else Comparer(reference)
    collectors = _collectors(metrics, examples, session.signature, reference is None)
    size = session.signature.batch_size or batch_size
    sample, written = Sample(), 0
    with contextlib.ExitStack() as stack:
        writer = None
        if write_reference is not None:
            writer = stack.enter_context(ExampleWriter(write_reference))
        for inputs, labels, count in examples.batches(session.signature, size):
            outputs = _by_example(session.run(inputs), size, count, whole, reference is None)
            if compare is not None:
                compare.add(outputs)
            if writer is not None and written < REFERENCE_BYTES:
                sample.add(outputs)
                writer.append(outputs)
                written += sum(value.nbytes for value in outputs.values())
            for collector in collectors.values():
                collector.add(outputs, labels)
    if write_reference is not None:
        of_classes = [name for name, text in metrics.items() if choosing.is_of_classes(text)]
        sample.save(write_reference, whole, of_classes)
    return Evaluation(
        {name: collector.finish() for name, collector in collectors.items()},
        {} if compare is None else _asked(compare, output_name),
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
