"""Task metrics: how good a model's outputs are, beside their labels."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

from tfopt.errors import InputError

AGREEMENT = "agreement"  # with the reference: the metric where there are no labels

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Metric:
    """How good outputs are.

    Attributes:
      name: as `--metric` spells it.
      score: outputs and labels of a batch to one number an example; for `auc` the number is the
        example's score; a set-level metric gets everything at once and returns one number.
      higher_is_better: False for errors.
      level: `example`, `ranking` (AUC) or `set`.
    """

    name: str
    score: Callable[..., Any]
    higher_is_better: bool = True
    level: str = "example"


METRICS: dict[str, Metric] = {}


def metric(
    name: str, higher_is_better: bool = True, level: str = "example"
) -> Callable[[Score], Score]:
    """Declares a function as a metric that `--metric` knows."""

    def decorate(function: Score) -> Score:
        METRICS[name] = Metric(name, function, higher_is_better, level)
        return function

    return decorate


@metric("top1")
def top1(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the highest score is the label's: (n, classes) and (n,) or one-hot to (n,)."""
    return _top_k(outputs, labels, 1)


@metric("top5")
def top5(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """1 where the label is among the five highest scores."""
    return _top_k(outputs, labels, 5)


@metric("mse", higher_is_better=False)
def mse(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean squared error of each example."""
    return _mean_each(np.square(_difference(outputs, labels)))


@metric("mae", higher_is_better=False)
def mae(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean absolute error of each example."""
    return _mean_each(np.abs(_difference(outputs, labels)))


@metric("auc", level="ranking")
def auc(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The score of class 1 of each example; the metric is the area under the ROC curve."""
    if outputs.ndim == 2 and outputs.shape[1] == 2:
        # The difference ranks as the probability does, for logits and for probabilities.
        return outputs[:, 1].astype(np.float64) - outputs[:, 0]
    return outputs.reshape(len(outputs), -1)[:, 0].astype(np.float64)


def find_metric(name: str) -> Metric:
    """A metric by name, or a function by `package.module:function`.

    A function gets the outputs (an array, or a dict when the model has several) and the labels; it
    returns one number an example, or one number for the whole set. Its attribute
    `higher_is_better` (default True) says which way is better.

    Raises:
      InputError: when there is none; lists the valid names.
    """
    if name in METRICS:
        return METRICS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise InputError(
            f"Unknown metric {name!r}; the metrics are {', '.join(METRICS)}, or "
            "package.module:function."
        )
    try:
        score = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--metric={name} cannot be found ({error}); it must be importable from here."
        ) from error
    return Metric(name, score, getattr(score, "higher_is_better", True), "custom")


def choose_metric(output_shape: tuple[int | None, ...] | None, labels: np.ndarray | None) -> str:
    """The metric that fits labels and output when none is named.

    Args:
      output_shape: of the output that is scored.
      labels: one batch of them, or None.

    Returns:
      `top1` for class numbers or one-hot labels, `auc` for labels 0 and 1 with one score,
      `mse` for the rest, and `agreement` without labels.

    Raises:
      InputError: when labels cannot be compared with the output.
    """
    if labels is None:
        return AGREEMENT
    if labels.dtype.kind not in "biuf":
        raise InputError(
            "The labels are text, which no metric of tfopt compares; save class numbers, or give "
            "--metric=package.module:function."
        )
    width = output_shape[-1] if output_shape and len(output_shape) > 1 else 1
    if width is None or width > 1:
        is_class = labels.ndim == 1 or (labels.ndim == 2 and labels.shape[1] == 1)
        is_one_hot = labels.ndim == 2 and labels.shape[1] == width and _is_one_hot(labels)
        if (is_class and np.all(np.mod(labels, 1) == 0)) or is_one_hot:
            return "top1"
    elif labels.size == len(labels) and set(np.unique(labels)) <= {0, 1}:
        return "auc"
    return "mse"


def _top_k(outputs: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    if outputs.ndim != 2 or outputs.shape[1] < 2:
        raise InputError(
            f"Metric top{k} needs one score a class, (n, classes); the output is {outputs.shape}; "
            "choose another --metric."
        )
    if labels.ndim == 2 and labels.shape[1] == outputs.shape[1]:
        labels = labels.argmax(1)
    labels = labels.reshape(-1)
    if len(labels) != len(outputs):
        raise InputError(
            f"Metric top{k} needs one label an example; got labels of shape {labels.shape} for "
            f"{len(outputs)} examples."
        )
    # A tie counts as the lower class number, as argmax does.
    # As floats: -128 has no opposite in int8.
    best = np.argsort(-outputs.astype(np.float64), axis=1, kind="stable")[:, :k]
    return (best == labels[:, None]).any(1).astype(np.float64)


def _difference(outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    if outputs.size != labels.size:
        raise InputError(
            f"Labels of shape {labels.shape} cannot be compared with outputs of shape "
            f"{outputs.shape}; choose another --metric."
        )
    return outputs.astype(np.float64) - labels.reshape(outputs.shape)


def _mean_each(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).mean(1)


def _is_one_hot(labels: np.ndarray) -> bool:
    return bool(np.isin(labels, (0, 1)).all() and (labels.sum(1) == 1).all())
