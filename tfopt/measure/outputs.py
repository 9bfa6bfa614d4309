"""What an output is, inferred from what the model returns on real examples.

Two models are compared by the question that their outputs answer: a classifier by its decisions,
a regression by the size of its errors, an embedding by its direction. Names and shapes do not
show which it is, so that values are looked at. Where they leave a doubt the stricter question is
asked.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from tfopt.measure import limits

Arrays = dict[str, np.ndarray]

MIN_CLASSES_OF_LOGITS = 10
MIN_WIDTH_OF_EMBEDDING = 16
MAX_NAMED_CHANNELS = 16
"""Up to so many channels each is a quantity of its own; beyond, they are entries of one vector."""
ROUNDING = 1e-5  # float32 rounding of a deep network, as a share of the output's size
IOU = 0.5  # of boxes that count as the same, as in PASCAL VOC
MIN_SCORE = 0.05  # of boxes that count at all


class Kind(enum.StrEnum):
    """The question that an output answers, and so how two models are compared by it.

    Attributes:
      CLASS_SCORES: one of C classes, softmax or logits along the last axis: the highest score.
      PROBABILITIES: yes or no for each entry, as from a sigmoid: which entries are above 0.5.
      NUMBERS: class numbers, counts or flags: equal or not.
      TEXT: strings: equal or not.
      VALUES: quantities: the error as a share of their spread.
      EMBEDDING: vectors: the cosine distance.
    """

    CLASS_SCORES = "class_scores"
    PROBABILITIES = "probabilities"
    NUMBERS = "numbers"
    TEXT = "text"
    VALUES = "values"
    EMBEDDING = "embedding"


QUESTIONS = {
    Kind.CLASS_SCORES: "the share of highest scores that differ",
    Kind.PROBABILITIES: "1 - F1 of the entries above 0.5",
    Kind.NUMBERS: "the share of numbers that differ",
    Kind.TEXT: "the share of texts that differ",
    Kind.VALUES: "the error as a share of the output's standard deviation",
    Kind.EMBEDDING: "the cosine distance",
}


@dataclasses.dataclass(frozen=True)
class Output:
    """One output of the model as saved.

    Attributes:
      name: in the signature.
      kind: what it answers.
      spread: standard deviation of its values over the examples; one for each channel where
        channels are quantities of their own.
      channel_axis: of an example with its batch dimension; None without channels.
      is_whole: whether it has no batch dimension, so that all of it belongs to one example.
      mask: magnitude from which values are masked ones; see `tfopt.measure.limits`.
    """

    name: str
    kind: Kind
    spread: tuple[float, ...] = (0.0,)
    channel_axis: int | None = None
    is_whole: bool = False
    mask: float = math.inf

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Output:
        """Reads what `to_json` wrote."""
        return cls(**{**value, "kind": Kind(value["kind"]), "spread": tuple(value["spread"])})


def infer(name: str, values: np.ndarray, is_whole: bool = False) -> Output:
    """Infers what an output is.

    Args:
      name: of the output.
      values: of some tens of real examples, (examples, …).
      is_whole: see `Output`.
    """
    kind = infer_kind(values)
    if kind in (Kind.TEXT, Kind.NUMBERS):
        return Output(name, kind, is_whole=is_whole)
    axis = channel_axis(values.shape)
    found = np.asarray(values, np.float64)
    mask = limits.mask_of(found)
    found = np.where(limits.is_limit(found, mask), np.nan, found)
    spread: tuple[float, ...] = (_deviation(found),)
    if kind is Kind.VALUES and axis is not None and found.shape[axis] <= MAX_NAMED_CHANNELS:
        spread = tuple(_deviation(channel) for channel in np.moveaxis(found, axis, 0))
    return Output(name, kind, spread, axis, is_whole, mask)


def _deviation(values: np.ndarray) -> float:
    """Standard deviation of values that are not NaN; 0 without any."""
    known = values[~np.isnan(values)]
    return float(known.std()) if known.size else 0.0


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """The axis of channels: the last, or the second of detectors' (examples, channels, places)."""
    if len(shape) < 2:
        return None
    return 1 if len(shape) == 3 and shape[1] <= 512 < shape[2] else -1


def infer_kind(values: np.ndarray) -> Kind:
    """What an output is, by its values on real examples, (examples, …)."""
    if values.dtype.kind in "OSU":
        return Kind.TEXT
    if values.dtype == np.uint8 and values.ndim == 4 and values.shape[-1] in (3, 4):
        return Kind.VALUES  # colours of an image
    if values.dtype.kind in "iub":
        return Kind.NUMBERS
    found = np.asarray(values, np.float64)
    width = found.shape[-1] if found.ndim >= 2 else 1
    if width >= 2 and found.size and _are_class_probabilities(found):
        return Kind.CLASS_SCORES
    if not found.size or limits.is_limit(found, limits.mask_of(found)).any():
        return Kind.VALUES
    if found.min() >= 0 and found.max() <= 1:
        return Kind.PROBABILITIES if _are_decided(found) else Kind.VALUES
    if found.ndim == 2 and width >= 2:
        norms = np.linalg.norm(found, axis=1)
        if np.allclose(norms, 1, atol=1e-2):
            return Kind.EMBEDDING
    if width >= MIN_CLASSES_OF_LOGITS and _look_like_logits(found):
        return Kind.CLASS_SCORES
    if found.ndim == 2 and width >= MIN_WIDTH_OF_EMBEDDING:
        return Kind.EMBEDDING
    return Kind.VALUES


def _are_class_probabilities(found: np.ndarray) -> bool:
    """Whether the last axis holds softmax, or its logarithm (-inf for 0)."""
    if np.isnan(found).any():
        return False
    if found.min() >= 0:
        return bool(np.allclose(found.sum(-1), 1, atol=1e-2))
    return bool(found.max() <= 0 and np.allclose(np.exp(found).sum(-1), 1, atol=1e-2))


def _are_decided(found: np.ndarray) -> bool:
    """Whether values in 0…1 are answers, most near 0 or 1, rather than brightness or the like."""
    undecided = np.mean((found > 0.2) & (found < 0.8))
    return bool(undecided < 0.5 and found.max() > 0.5 and found.min() < 0.5)


def _look_like_logits(found: np.ndarray) -> bool:
    """Whether vectors are scores of a trained classifier rather than an embedding.

    Scores are of both signs, one class stands out, and which one depends on the example.
    """
    rows = found.reshape(-1, found.shape[-1])
    if rows.min() >= 0 or np.abs(rows).max() > 100:
        return False
    shifted = np.exp(rows - rows.max(1, keepdims=True))
    confidence = (shifted.max(1) / shifted.sum(1)).mean()
    counts = np.bincount(rows.argmax(1), minlength=rows.shape[1])
    return bool(confidence >= 0.5 and counts.max() <= max(1, 0.95 * len(rows)))


@dataclasses.dataclass(frozen=True)
class Match:
    """What became of the boxes of one image.

    Attributes:
      lost: 1 - F1 of the boxes.
      boxes: of those that were found again, the squared error of the corners as a share of the
        box's own size, (boxes,).
      scores: of the same boxes, the squared error of the score as a share of the mean squared
        score of the image, (boxes,).
      classes: of all boxes of the reference, (boxes,).
      is_found: which of those were found again.
    """

    lost: float
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    is_found: np.ndarray


@dataclasses.dataclass(frozen=True)
class Detections:
    """The outputs of a detector that ends in suppression: boxes with scores, image by image.

    Attributes:
      boxes: name of the output with (boxes, 4) corners for each image.
      scores: likewise, (boxes,).
      classes: likewise, (boxes,); None where there is one class.
    """

    boxes: str
    scores: str
    classes: str | None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        return tuple(name for name in (self.boxes, self.scores, self.classes) if name)

    def match(self, value: Arrays, reference: Arrays) -> Match:
        """Matches the boxes of one image by class and overlap, best scores first."""
        found, expected = self._of(value), self._of(reference)
        if not len(found[0]) and not len(expected[0]):
            none = np.zeros(0)
            return Match(0.0, none, none, none, none.astype(bool))
        free = np.ones(len(expected[0]), bool)
        pairs: list[tuple[int, int]] = []
        overlap = _iou(found[0], expected[0])
        for index in np.argsort(-found[1], kind="stable"):
            fits = np.where(free & (expected[2] == found[2][index]), overlap[index], 0.0)
            if len(fits) and fits.max() >= IOU:
                free[fits.argmax()] = False
                pairs.append((int(index), int(fits.argmax())))
        ours, theirs = np.array(pairs, int).reshape(-1, 2).T
        before = expected[0][theirs]
        size = np.tile(np.maximum(before[:, 2:] - before[:, :2], 1e-12), 2)
        mean_square = np.square(expected[1]).mean() if len(pairs) else 1.0
        return Match(
            1 - 2 * len(pairs) / (len(found[0]) + len(expected[0])),
            np.square((found[0][ours] - before) / size).mean(1),
            np.square(found[1][ours] - expected[1][theirs]) / mean_square,
            expected[2],
            ~free,
        )

    def _of(self, outputs: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        scores = np.asarray(outputs[self.scores], np.float64).reshape(-1)
        boxes = np.asarray(outputs[self.boxes], np.float64).reshape(-1, 4)
        classes = np.zeros(len(scores))
        if self.classes is not None:
            classes = np.asarray(outputs[self.classes], np.float64).reshape(-1)
        count = min(len(scores), len(boxes), len(classes))
        counts = np.arange(len(scores)) < count
        is_box = counts & (np.nan_to_num(scores, nan=0.0) >= MIN_SCORE)
        return boxes[is_box[: len(boxes)]], scores[is_box], classes[is_box[: len(classes)]]


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of corners (y1, x1, y2, x2 or x1, y1, x2, y2), pair by pair."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    inside = np.prod(np.clip(high - low, 0, None), axis=-1)

    def area(of: np.ndarray) -> np.ndarray:
        return np.prod(np.clip(of[:, 2:] - of[:, :2], 0, None), axis=-1)

    return inside / np.maximum(area(boxes)[:, None] + area(others)[None] - inside, 1e-12)


def find_detections(examples: Mapping[str, list[np.ndarray]]) -> Detections | None:
    """The outputs of a detector among a model's outputs, or None when it is no detector.

    Args:
      examples: of each output, what belongs to each of some real examples.
    """

    def shapes(name: str) -> list[tuple[int, ...]]:
        return [array.shape for array in examples[name]]

    for boxes, found in examples.items():
        if not all(a.ndim == 2 and a.shape[1] == 4 and a.dtype.kind == "f" for a in found):
            continue
        alike = [name for name in examples if name != boxes
                 and shapes(name) == [array.shape[:1] for array in found]]  # fmt: skip
        scores = [name for name in alike if _are_scores(examples[name])]
        classes = [name for name in alike if _are_class_numbers(examples[name])]
        if scores and _are_corners(found):
            others = [name for name in classes if name != scores[0]]
            return Detections(boxes, scores[0], others[0] if others else None)
    return None


def _are_corners(found: list[np.ndarray]) -> bool:
    boxes = np.concatenate(found) if found else np.zeros((0, 4))
    return bool(len(boxes) and np.mean((boxes[:, 2:] >= boxes[:, :2]).all(1)) > 0.9)


def _are_scores(found: list[np.ndarray]) -> bool:
    flat = np.concatenate([array.reshape(-1) for array in found])
    if flat.dtype.kind != "f" or not flat.size:
        return False
    return bool(flat.min() >= 0 and flat.max() <= 1 and np.mod(flat, 1).any())


def _are_class_numbers(found: list[np.ndarray]) -> bool:
    flat = np.concatenate([array.reshape(-1) for array in found])
    return flat.dtype.kind in "iuf" and bool(flat.size and not np.mod(flat, 1).any())


def is_one_answer(output: Output, reference: np.ndarray) -> bool:
    """Whether an example has a single answer, right or wrong, so that `lost` is 0 or 1.

    Args:
      output: what it is.
      reference: of the model as saved, (examples, …).
    """
    if output.kind in (Kind.VALUES, Kind.EMBEDDING):
        return False
    answers = reference.shape[1:-1] if output.kind is Kind.CLASS_SCORES else reference.shape[1:]
    return math.prod(answers) == 1


def lost(output: Output, value: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """How much of each example's answer is lost, 0 for nothing; see `QUESTIONS`.

    Args:
      output: what it is.
      value: of the variant, (examples, …).
      reference: of the model as saved, the same shape.
    """
    count = len(reference)
    if output.kind in (Kind.TEXT, Kind.NUMBERS):
        return (value != reference).reshape(count, -1).mean(1)
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if output.kind is Kind.CLASS_SCORES:
        differs = value.argmax(-1) != reference.argmax(-1)
        return differs.reshape(count, -1).mean(1)
    if output.kind is Kind.PROBABILITIES:
        ours, theirs = (found.reshape(count, -1) > 0.5 for found in (value, reference))
        both, total = (ours & theirs).sum(1), ours.sum(1) + theirs.sum(1)
        return np.where(total > 0, 1 - 2 * both / np.maximum(total, 1), 0.0)
    is_limit = limits.is_limit(reference, output.mask)
    if output.kind is Kind.EMBEDDING:
        value, reference = value.reshape(count, -1), reference.reshape(count, -1)
        product = np.linalg.norm(value, axis=1) * np.linalg.norm(reference, axis=1)
        is_same = (value == reference).all(1)
        cosine = (value * reference).sum(1) / np.maximum(product, 1e-300)
        return np.where(is_same, 0.0, 1 - np.where(product > 0, cosine, 0.0))
    spread = np.asarray(output.spread)
    if len(spread) > 1 and output.channel_axis is not None:
        shape = [1] * reference.ndim
        shape[output.channel_axis] = -1
        spread = spread.reshape(shape)
    # A channel that does not vary beyond rounding has no spread of its own: its size stands in.
    size = np.where(is_limit, 0.0, np.abs(reference))
    scale = np.where(spread > ROUNDING * size, spread, np.where(size > 0, size, 1.0))
    with np.errstate(invalid="ignore"):
        error = np.where(is_limit, 0.0, (value - reference) / scale)
    found = np.sqrt(np.square(error).reshape(count, -1).mean(1)) if error.size else np.zeros(count)
    is_kept = limits.keeps_limits(value, reference, is_limit)
    return np.where(is_kept, found, np.maximum(found, 1.0))
