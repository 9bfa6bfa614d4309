"""Task metrics: how good a model's outputs are against their labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tfopt.errors import InputError

AGREEMENT = "agreement"  # with the reference: the metric where there are no labels
MISSING = (-1, -100)  # class numbers of examples and positions without a label

Score = Callable[..., np.ndarray]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How good outputs are.

    Attributes:
      name: as `--metric` spells it.
      score: takes outputs and labels of a batch. What it returns depends on the level.
      higher_is_better: False for errors.
      level: `example` (one number an example, averaged), `ranking` (AUC: one score an example),
        `sums` (a row of counts an example, which `value` turns into the metric after they are
        added), `set` (one number for all examples), or `custom` (`example` or `set`, by the
        shape that it returns).
      value: for `sums`: from added rows of counts, (…, k), to the metric's value, (…).
      is_unbounded: an error without an upper limit; its budget is a share of its scale.
      has_label: which examples of a batch have a label, as (n,) bools; None for all of them.
      recall: outputs and labels of a batch to how often each class was found and how often it
        occurs, two (classes,) arrays of counts; None where there are no classes.
    """

    name: str
    score: Callable[..., Any]
    higher_is_better: bool = True
    level: str = "example"
    value: Callable[[np.ndarray], np.ndarray] | None = None
    is_unbounded: bool = False
    has_label: Callable[[np.ndarray], np.ndarray] | None = None
    recall: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None


METRICS: dict[str, Metric] = {}


def metric(name: str, **fields: Any) -> Callable[[Score], Score]:
    """Declares a function as a metric that `--metric` knows.

    Its arguments besides outputs and labels become options: `name(option=value)`.
    """

    def decorate(function: Score) -> Score:
        METRICS[name] = Metric(name, function, **fields)
        return function

    return decorate


# Which examples have labels.


def has_class(labels: np.ndarray) -> np.ndarray:
    """Examples whose label is a class: not -1, -100 or NaN, nor an empty one-hot row."""
    flat = labels.reshape(len(labels), -1)
    if flat.shape[1] == 1:
        return ~is_missing(flat[:, 0])
    return ~is_missing(flat).any(1) & (flat != 0).any(1)


def is_missing(labels: np.ndarray) -> np.ndarray:
    """Positions whose class number is -1, -100 or NaN."""
    if labels.dtype.kind in "bu":
        return np.zeros(labels.shape, bool)
    missing = np.isin(labels, MISSING)
    if labels.dtype.kind in "fV":
        missing |= np.isnan(labels.astype(np.float64))
    return missing


# Classes of whole examples.


def _recall_of_examples(
    outputs: np.ndarray, labels: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    if labels.ndim == 2 and labels.shape[1] == outputs.shape[-1] > 1:
        labels = labels.argmax(1)  # soft labels are no class numbers
    predicted, truth, num_classes = _classes(outputs, labels, "top1", **options)
    return _count_found(predicted, truth, num_classes)


@metric("top1", has_label=has_class, recall=_recall_of_examples)
def top1(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the highest score is the label's: (n, classes) and (n,) or one-hot to (n,).

    Outputs of one whole number an example are class numbers.
    """
    if _are_class_numbers(outputs, labels):
        return (outputs.reshape(-1) == labels.reshape(-1)).astype(np.float64)
    return _top_k(outputs, labels, 1)


@metric("top5", has_label=has_class)
def top5(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the label is among the five highest scores."""
    return _top_k(outputs, labels, 5)


@metric("auc", level="ranking")
def auc(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The score of the positive class of each example; the metric is the area under the ROC curve.

    Labels have two values; the larger one is the positive class.
    """
    if outputs.ndim == 2 and outputs.shape[1] == 2:
        # The difference ranks as the probability does, for logits and for probabilities.
        return outputs[:, 1].astype(np.float64) - outputs[:, 0]
    if outputs.size != len(outputs):
        raise InputError(
            f"Metric auc needs one score an example, or two; the output is {outputs.shape}; choose "
            "another `metric`."
        )
    return outputs.reshape(-1).astype(np.float64)


# Classes of positions: pixels, tokens, tags.


def _ratio(sums: np.ndarray) -> np.ndarray:
    return _divide(sums[..., 0], sums[..., 1])


def _recall_of_positions(
    outputs: np.ndarray, labels: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    predicted, truth, num_classes = _classes(outputs, labels, "position_accuracy", **options)
    return _count_found(predicted, truth, num_classes)


@metric("position_accuracy", level="sums", value=_ratio, recall=_recall_of_positions)
def position_accuracy(
    outputs: np.ndarray,
    labels: np.ndarray,
    ignore: int | None = None,
    num_classes: int | None = None,
    threshold: float | None = None,
) -> np.ndarray:
    """Right and labelled positions of each example, (n, 2): pixel accuracy, token accuracy.

    Args:
      outputs: scores (n, …, classes), class numbers (n, …), or one score a position.
      labels: class numbers (n, …) or (n, …, 1), or one-hot; -1, -100 and NaN are ignored.
      ignore: another class number that is ignored.
      num_classes: where outputs are class numbers.
      threshold: of one score a position (0.5 by default; 0 for logits).
    """
    predicted, truth, _ = _classes(
        outputs, labels, "position_accuracy", ignore, num_classes, threshold
    )
    return np.stack([((predicted == truth) & (truth >= 0)).sum(1), (truth >= 0).sum(1)], 1)


def _mean_iou(sums: np.ndarray) -> np.ndarray:
    right, wrong, missed = np.split(sums, 3, -1)
    return _mean_of_present(right, right + wrong + missed)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    right, wrong, missed = np.split(sums, 3, -1)
    return _mean_of_present(2 * right, 2 * right + wrong + missed)


def _micro_f1(sums: np.ndarray) -> np.ndarray:
    right, wrong, missed = (part.sum(-1) for part in np.split(sums, 3, -1))
    return _divide(2 * right, 2 * right + wrong + missed)


def _recall_of_iou(
    outputs: np.ndarray, labels: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    return _found(mean_iou(outputs, labels, **options))


def _recall_of_f1(
    outputs: np.ndarray, labels: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    return _found(macro_f1(outputs, labels, **options))


@metric("mean_iou", level="sums", value=_mean_iou, recall=_recall_of_iou)
def mean_iou(
    outputs: np.ndarray,
    labels: np.ndarray,
    ignore: int | None = None,
    num_classes: int | None = None,
    threshold: float | None = None,
) -> np.ndarray:
    """True positives, false positives and false negatives by class, (n, 3 · classes).

    The metric is the mean intersection over union of the classes that occur in labels or
    predictions, over all positions of all examples, as `keras.metrics.MeanIoU`. Arguments as of
    `position_accuracy`.
    """
    predicted, truth, num_classes = _classes(
        outputs, labels, "mean_iou", ignore, num_classes, threshold
    )
    return _confusions(predicted, truth, num_classes)


@metric("macro_f1", level="sums", value=_macro_f1, recall=_recall_of_f1)
def macro_f1(outputs: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """Counts as of `mean_iou`; the metric is the mean F1 of the classes or tags that occur.

    As scikit-learn's `f1_score(average="macro", zero_division=nan)`.

    Args:
      outputs: scores (n, …, classes).
      labels: 0 or 1 for each score (several tags an example; others are ignored), or one class
        number for all scores of a position.
      threshold: of tags (0.5 by default; 0 for logits).
    """
    if outputs.shape != labels.shape and outputs.size != labels.size:
        return _confusions(*_classes(outputs, labels, "macro_f1"))
    if outputs.ndim < 2:
        outputs, labels = outputs[:, None], labels[:, None]
    num_tags = outputs.shape[-1]
    truth = labels.reshape(len(outputs), -1, num_tags)
    is_positive = outputs.reshape(truth.shape) > (0.5 if threshold is None else threshold)
    counts = (
        is_positive & (truth == 1), is_positive & (truth == 0), ~is_positive & (truth == 1)
    )  # fmt: skip
    return np.concatenate([count.sum(1) for count in counts], 1)


@metric("micro_f1", level="sums", value=_micro_f1, recall=_recall_of_f1)
def micro_f1(outputs: np.ndarray, labels: np.ndarray, threshold: float | None = None) -> np.ndarray:
    """As `macro_f1`, of all tags together, so that frequent ones count most."""
    return macro_f1(outputs, labels, threshold)


# Errors.


@metric("mse", higher_is_better=False, is_unbounded=True)
def mse(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean squared error of each example."""
    return _mean_each(np.square(_difference(outputs, labels)))


@metric("mae", higher_is_better=False, is_unbounded=True)
def mae(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean absolute error of each example."""
    return _mean_each(np.abs(_difference(outputs, labels)))


@metric("pinball", higher_is_better=False, is_unbounded=True)
def pinball(
    outputs: np.ndarray, labels: np.ndarray, quantiles: tuple[float, ...] | list[float]
) -> np.ndarray:
    """Mean pinball loss of each example (Koenker & Bassett 1978): (n, …, quantiles) and (n, …)."""
    if outputs.shape[-1] != len(quantiles) or outputs.size != labels.size * len(quantiles):
        raise InputError(
            f"Metric pinball got {len(quantiles)} quantiles, outputs of shape {outputs.shape} and "
            f"labels of shape {labels.shape}; expected outputs with one value a quantile."
        )
    truth = labels.astype(np.float64).reshape(*outputs.shape[:-1], 1)
    above = truth - outputs.astype(np.float64)
    losses = np.maximum(np.asarray(quantiles) * above, (np.asarray(quantiles) - 1) * above)
    return _mean_each(losses)


# What they share.


def _top_k(outputs: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    if outputs.ndim > 2 and outputs.size == len(outputs) * outputs.shape[-1]:
        outputs = outputs.reshape(len(outputs), -1)
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise InputError(
            f"Metric top{k} needs one score a class, (n, classes); the output is {outputs.shape}; "
            "choose another `metric`."
        )
    if labels.ndim == 2 and labels.shape[1] == outputs.shape[1]:
        labels = labels.argmax(1)
    labels = labels.reshape(-1)
    if len(labels) != len(outputs):
        raise InputError(
            f"Metric top{k} needs one label an example; got labels of shape {labels.shape} for "
            f"{len(outputs)} examples."
        )
    _check_range(labels, outputs.shape[1], f"top{k}")
    # A tie counts as the lower class number, as argmax does.
    # As floats: -128 has no opposite in int8.
    best = np.argsort(-outputs.astype(np.float64), axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(1).astype(np.float64)


def _are_class_numbers(outputs: np.ndarray, labels: np.ndarray) -> bool:
    return outputs.dtype.kind in "iub" and outputs.size == labels.size == len(outputs)


def _classes(
    outputs: np.ndarray,
    labels: np.ndarray,
    name: str,
    ignore: int | None = None,
    num_classes: int | None = None,
    threshold: float | None = None,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Predicted and true classes, (n, positions), and how many classes there are.

    A true class of -1 is ignored; a predicted one of -1 is none of the classes.
    """
    count = len(outputs)
    width = outputs.shape[-1] if outputs.ndim > 1 else 1
    is_same_size = outputs.size == labels.size
    predicted: Any
    if is_same_size and threshold is None and width > 1 and outputs.dtype.kind in "fV":
        one_hot = labels.reshape(outputs.shape)
        is_known = ~is_missing(one_hot).any(-1) & (one_hot.sum(-1) == 1)
        if not np.isin(one_hot[is_known], (0, 1)).all():
            raise InputError(
                f"Metric {name} got labels of the outputs' shape {outputs.shape} that are not "
                "one-hot; give class numbers, or threshold=0.5 for one score a position."
            )
        labels, is_same_size = np.where(is_known, one_hot.argmax(-1), -1), False
    if is_same_size:
        if outputs.dtype.kind in "iub" and threshold is None:
            if num_classes is None and name == "mean_iou":
                raise InputError(
                    "The outputs are class numbers; write mean_iou(num_classes=…) with how many "
                    "classes there are."
                )
            if num_classes is None:
                num_classes = 1 + max(int(outputs.max(initial=1)), int(labels.max(initial=1)))
            predicted = np.where((outputs >= 0) & (outputs < num_classes), outputs, -1)
        else:
            num_classes = 2
            predicted = outputs.astype(np.float64) > (0.5 if threshold is None else threshold)
    elif outputs.ndim > 1 and outputs.size == labels.size * width:
        num_classes, predicted = width, outputs.astype(np.float32).argmax(-1)
    else:
        raise InputError(
            f"Metric {name} cannot compare labels of shape {labels.shape} with outputs of shape "
            f"{outputs.shape}; expected one class number for all scores of a position."
        )
    predicted = predicted.reshape(count, -1).astype(np.int64)
    truth = labels.reshape(count, -1)
    is_ignored = is_missing(truth)
    if ignore is not None:
        is_ignored |= truth == ignore
    _check_range(truth[~is_ignored], num_classes, name)
    known = np.full(truth.shape, -1)  # unsigned labels have no -1
    known[~is_ignored] = truth[~is_ignored]
    return predicted, known, num_classes


def _check_range(classes: np.ndarray, num_classes: int, name: str) -> None:
    is_outside = (classes < 0) | (classes >= num_classes) | (np.mod(classes, 1) != 0)
    if is_outside.any():
        raise InputError(
            f"Metric {name} needs class numbers from 0 to {num_classes - 1}; {is_outside.sum()} of "
            f"{is_outside.size} labels are others, such as {classes[is_outside][0]}; correct them, "
            "or choose another `metric`."
        )


def _confusions(predicted: np.ndarray, truth: np.ndarray, num_classes: int) -> np.ndarray:
    count, places = len(truth), np.arange(len(truth))[:, None]
    is_known = truth >= 0

    def by_class(classes: np.ndarray, where: np.ndarray) -> np.ndarray:
        cells = (places * num_classes + classes)[where]
        return np.bincount(cells, minlength=count * num_classes).reshape(count, num_classes)

    return np.concatenate(
        [
            by_class(truth, is_known & (predicted == truth)),
            by_class(predicted, is_known & (predicted != truth) & (predicted >= 0)),
            by_class(truth, is_known & (predicted != truth)),
        ],
        1,
    )


def _count_found(
    predicted: np.ndarray, truth: np.ndarray, num_classes: int
) -> tuple[np.ndarray, np.ndarray]:
    is_known = truth >= 0
    return (
        np.bincount(truth[is_known & (predicted == truth)], minlength=num_classes),
        np.bincount(truth[is_known], minlength=num_classes),
    )


def _found(confusions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    right, _, missed = np.split(confusions.sum(0), 3)
    return right, right + missed


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean_of_present(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    ratios = np.nan_to_num(_divide(part, whole))
    return _divide(ratios.sum(-1), (whole > 0).sum(-1))


def _difference(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if outputs.size != labels.size:
        raise InputError(
            f"Labels of shape {labels.shape} cannot be compared with outputs of shape "
            f"{outputs.shape}; choose another `metric`."
        )
    return outputs.astype(np.float64) - labels.reshape(outputs.shape).astype(np.float64)


def _mean_each(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).mean(1)
