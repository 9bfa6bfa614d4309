"""How near a variant's outputs come to those of the model as saved, output by output.

Everything is accumulated batch by batch. Noise is compared with how much the model's own output
varies from example to example, not with its size: a constant answer has a signal to noise ratio
of 0 dB at best, however near it is on average.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import numpy as np

from tfopt.measure import limits
from tfopt.measure.outputs import MAX_NAMED_CHANNELS, ROUNDING, Kind, Output

MAX_ELEMENTS = 1 << 22  # of an example; larger ones are centred by channel
MAX_CHANNELS = 4096
MAX_NAMED_NUMBERS = 64
MIN_OCCURRENCES = 10  # of a number, to judge how often it is found again
TRIMMED_SHARE = 0.01
NEARLY_ALL_TRIMMED_SHARE = 0.003
UNUSUAL_SHARE = 0.01
SKETCH_SIZE = 64
VARYING = 1e-6  # as a share of a value: less is the last digit of float32
MIN_EXAMPLES_TO_TRIM = 20
SCORE_FLOOR = 0.02  # deviation of a channel of probabilities below which int8 cannot show it


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How near one output comes to the reference's, over all examples that were compared.

    Attributes:
      kind: what the output answers; see `tfopt.measure.outputs.Kind`.
      num_examples: that were compared.
      num_other_shapes: examples whose shape differs from the reference's.
      shapes: the first of them, in words.
      dtypes: in words, where numbers became text or floats integers; else empty.
      num_not_finite: examples with NaN or infinity where the reference has numbers.
      num_other_limits: examples whose NaN, infinities and masked values lie elsewhere than the
        reference's; see `tfopt.measure.limits`.
      is_constant: whether all examples have the same answer and the reference's differ.
      max_abs_error: the largest difference of any value.
      mean_abs_error: the mean difference of all values.
      sqnr_db: signal to quantization noise ratio in decibels, 10·log10(Σ (reference - its mean)² /
        Σ difference²), the mean of each entry being over the examples; infinite when nothing
        differs. Each bit of precision is worth about 6 dB.
      relative_db: likewise of the reference's size instead of its variation, Σ reference² / Σ
        difference²; rounding shows here.
      trimmed_sqnr_db: `sqnr_db` without the worst hundredth of the examples, since a decision
        inside the model, such as which of two boxes comes first, may fall either way.
      nearly_all_sqnr_db: likewise without the worst three in a thousand; exact computation seldom
        has such close calls.
      usual_sqnr_db: of values, likewise without the hundredth of the examples farthest from the
        median: an outlier is a large signal, and hides what became of the others. Infinite where
        there are too few examples, or those vary no more than by rounding.
      channel: the worst channel that carries information; -1 without channels.
      channel_db: its signal to noise ratio.
      differing: share of numbers or texts that differ.
      lost_number: a number that often stands in the reference and is seldom found again, of
        `tfopt.measure.comparing.DETECTIONS` a class of boxes; else NaN.
      found_again: how often it is, in 0…1.
      agreement: share of equal decisions; NaN where the output makes none.
      is_probability: whether it holds probabilities, of classes or each of its own.
      is_detected: whether it is a detector's; its signal to noise ratios are then those of the
        boxes that were found again, relative to the size of each box, or of the scores. See
        `tfopt.measure.comparing.DETECTIONS`.
    """

    kind: str
    num_examples: int
    num_other_shapes: int = 0
    shapes: str = ""
    dtypes: str = ""
    num_not_finite: int = 0
    num_other_limits: int = 0
    is_constant: bool = False
    max_abs_error: float = math.nan
    mean_abs_error: float = math.nan
    sqnr_db: float = math.inf
    relative_db: float = math.inf
    trimmed_sqnr_db: float = math.inf
    nearly_all_sqnr_db: float = math.inf
    usual_sqnr_db: float = math.inf
    channel: int = -1
    channel_db: float = math.inf
    differing: float = 0.0
    lost_number: float = math.nan
    found_again: float = math.nan
    agreement: float = math.nan
    is_probability: bool = False
    is_detected: bool = False


class Compared:
    """What `Fidelity` of one output is computed from, batch by batch."""

    def __init__(self, output: Output):
        self._output = output
        self._count = self._num_other = self._num_not_finite = self._num_other_limits = 0
        self._shapes = self._dtypes = ""
        self._max = self._sum = 0.0
        self._size = 0
        self._noise: list[np.ndarray] = []  # one an example
        self._sketches: list[np.ndarray] = []  # (examples, SKETCH_SIZE)
        self._signs = np.zeros(0)
        self._varying: _Variance | None = None
        self._centred_by_element = True
        self._channel_noise: np.ndarray | float = 0.0
        self._channels: _Variance | None = None
        self._first: np.ndarray | None = None
        self._reference_first: np.ndarray | None = None
        self._is_constant, self._reference_varies = True, False
        self._energy = 0.0
        self._is_probability = True
        self._num_differing = 0.0
        self._numbers: Counter[float] = Counter()
        self._found_again: Counter[float] = Counter()

    def add_other_shapes(self, shape: tuple[int, ...], expected: list[tuple[int, ...]]) -> None:
        """Counts examples whose shape is not the reference's."""
        self._count += len(expected)
        self._num_other += len(expected)
        self._shapes = self._shapes or f"{shape} instead of {expected[0]}"

    def add_missing(self, count: int) -> None:
        """Counts examples without this output."""
        self._count += count
        self._num_other += count
        self._shapes = "missing"

    def add(self, value: np.ndarray, reference: np.ndarray) -> None:
        """Compares examples of the same shape, (examples, …)."""
        self._count += len(value)
        if _dtype_kind(value.dtype) != _dtype_kind(reference.dtype):
            self._dtypes = f"{value.dtype} instead of {reference.dtype}"
        if self._output.kind is Kind.TEXT or value.dtype.kind in "OSU":
            self._num_differing += float((value != reference).sum())
            self._size += reference.size
            self._watch_constant(value, reference)
            return
        value, reference = value.astype(np.float64), reference.astype(np.float64)
        is_limit = limits.is_limit(reference, self._output.mask)
        self._num_other_limits += int((~limits.keeps_limits(value, reference, is_limit)).sum())
        is_number = ~is_limit
        is_broken = ~np.isfinite(value) & is_number
        self._num_not_finite += int(is_broken.reshape(len(value), -1).any(1).sum())
        value = np.where(np.isfinite(value) & is_number, value, 0.0)
        reference = np.where(is_number & ~is_broken, reference, 0.0)
        difference = np.abs(value - reference)
        self._watch_constant(value, reference)
        self._max = max(self._max, float(difference.max(initial=0.0)))
        self._sum += float(difference.sum())
        self._size += difference.size
        self._energy += float(np.square(reference).sum())
        self._is_probability &= bool(
            reference.size and 0 <= reference.min() <= reference.max() <= 1
        )
        squared = np.square(difference)
        self._noise.append(squared.reshape(len(value), -1).sum(1))
        if self._output.kind in (Kind.VALUES, Kind.EMBEDDING):
            self._add_sketch(reference)
        self._add_variance(reference)
        self._add_channels(reference, squared)
        if self._output.kind is Kind.NUMBERS:
            self._add_numbers(value, reference)

    def _watch_constant(self, value: np.ndarray, reference: np.ndarray) -> None:
        if self._first is None or self._reference_first is None:
            self._first, self._reference_first = value[:1], reference[:1]
        for rows, first in ((value, self._first), (reference, self._reference_first)):
            has_shape = rows.shape[1:] == first.shape[1:]
            if rows is value:
                self._is_constant &= has_shape and bool((rows == first).all())
            elif self._output.kind in (Kind.TEXT, Kind.NUMBERS) or not has_shape:
                self._reference_varies |= not has_shape or bool((rows != first).any())
            else:
                self._reference_varies |= bool(
                    (np.abs(rows - first) > VARYING * np.abs(first)).any()
                )

    def _add_sketch(self, reference: np.ndarray) -> None:
        """Sums of entries with random signs, whose squared distances are those of the examples.

        On average, by Charikar, Chen & Farach-Colton's count sketch (2002); exactly, where examples
        have few entries.
        """
        rows = reference.reshape(len(reference), -1)
        size = rows.shape[1]
        if len(self._signs) != size:
            self._signs = np.random.default_rng(0).choice((-1.0, 1.0), size)
        padded = np.pad(rows * self._signs, ((0, 0), (0, -size % SKETCH_SIZE)))
        self._sketches.append(padded.reshape(len(rows), -1, SKETCH_SIZE).sum(1))

    def _add_variance(self, reference: np.ndarray) -> None:
        shape = reference.shape[1:]
        if self._varying is None:
            self._centred_by_element = int(np.prod(shape)) <= MAX_ELEMENTS
            self._varying = _Variance(reference[0] if self._centred_by_element else None)
        elif self._centred_by_element and shape != self._varying.shape:
            self._centred_by_element = False
            self._varying = self._varying.merged()
        rows = reference if self._centred_by_element else reference.reshape(-1)
        self._varying.add(rows)

    def _add_channels(self, reference: np.ndarray, squared: np.ndarray) -> None:
        axis = self._output.channel_axis
        if axis is None or reference.ndim < 2 or reference.shape[axis] > MAX_CHANNELS:
            return
        moved = np.moveaxis(reference, axis, -1)
        rows = moved.reshape(-1, moved.shape[-1])
        if self._channels is None:
            self._channels = _Variance(rows[0])
        if rows.shape[1:] != self._channels.shape:
            return
        self._channels.add(rows)
        noise = np.moveaxis(squared, axis, -1).reshape(-1, moved.shape[-1])
        self._channel_noise = self._channel_noise + noise.sum(0)

    def _add_numbers(self, value: np.ndarray, reference: np.ndarray) -> None:
        self._num_differing += float((value != reference).sum())
        if len(self._numbers) > MAX_NAMED_NUMBERS:
            return
        for number, count in zip(*np.unique(reference, return_counts=True), strict=True):
            self._numbers[float(number)] += int(count)
            found = (value == reference) & (reference == number)
            self._found_again[float(number)] += int(found.sum())

    def fidelity(self) -> Fidelity:
        """Of all that was added."""
        kind = self._output.kind.value
        common: dict[str, Any] = {
            "num_examples": self._count,
            "num_other_shapes": self._num_other,
            "shapes": self._shapes,
            "dtypes": self._dtypes,
            "num_not_finite": self._num_not_finite,
            "num_other_limits": self._num_other_limits,
            "is_constant": self._is_constant and self._reference_varies,
        }
        differing = self._num_differing / self._size if self._size else 0.0
        if not self._noise or self._varying is None:
            return Fidelity(kind, **common, differing=differing)
        noise = np.concatenate(self._noise)
        signal = self._varying.total()
        energy_floor = (ROUNDING**2) * self._energy
        # Of an output that does not vary, all of it is signal.
        if signal <= energy_floor:
            signal = self._energy
        if not self._energy and self._max <= ROUNDING:  # zeros, but for rounding
            noise = np.zeros_like(noise)
        channel, channel_db = self._worst_channel()
        number, found_again = self._worst_number()
        return Fidelity(
            kind,
            **common,
            max_abs_error=self._max,
            mean_abs_error=self._sum / self._size if self._size else math.nan,
            sqnr_db=decibels(signal, float(noise.sum())),
            relative_db=decibels(self._energy, float(noise.sum())),
            trimmed_sqnr_db=decibels(signal, trimmed(noise, TRIMMED_SHARE)),
            nearly_all_sqnr_db=decibels(signal, trimmed(noise, NEARLY_ALL_TRIMMED_SHARE)),
            usual_sqnr_db=self._usual_sqnr_db(noise),
            channel=channel,
            channel_db=channel_db,
            differing=differing,
            lost_number=number,
            found_again=found_again,
            is_probability=self._holds_probabilities,
        )

    def _usual_sqnr_db(self, noise: np.ndarray) -> float:
        if self._is_probability or not self._sketches or len(noise) < MIN_EXAMPLES_TO_TRIM:
            return math.inf
        sketches = np.concatenate(self._sketches)
        distances = np.square(sketches - np.median(sketches, 0)).sum(1)
        num_unusual = max(1, int(UNUSUAL_SHARE * len(noise)))
        usual = np.argsort(distances)[: len(noise) - num_unusual]
        signal = float(distances[usual].sum())
        if signal <= VARYING**2 * self._energy:
            return math.inf
        return decibels(signal, float(noise[usual].sum()))

    @property
    def _holds_probabilities(self) -> bool:
        kinds = (Kind.CLASS_SCORES, Kind.PROBABILITIES)
        return self._output.kind in kinds and self._is_probability

    def _worst_channel(self) -> tuple[int, float]:
        """The channel with the least signal to noise among those that carry information."""
        if self._channels is None:
            return -1, math.inf
        signal = self._channels.by_element()
        noise = np.broadcast_to(self._channel_noise, signal.shape)
        deviation = np.sqrt(signal / max(1, self._channels.count))
        size = np.abs(self._channels.mean())
        counts = deviation > np.maximum(1e-4 * size, 1e-30)
        if self._holds_probabilities:
            counts &= deviation >= SCORE_FLOOR
        elif len(deviation) > MAX_NAMED_CHANNELS:
            counts &= deviation >= 0.5 * np.median(deviation)
        if not counts.any():
            return -1, math.inf
        by_channel = np.array(
            [
                decibels(float(s), float(n)) if is_counted else math.inf
                for s, n, is_counted in zip(signal, noise, counts, strict=True)
            ]
        )
        worst = int(by_channel.argmin())
        return worst, float(by_channel[worst])

    def _worst_number(self) -> tuple[float, float]:
        if not 1 < len(self._numbers) <= MAX_NAMED_NUMBERS:
            return math.nan, math.nan
        return least_found(self._numbers, self._found_again)


def least_found(numbers: Counter[float], found_again: Counter[float]) -> tuple[float, float]:
    """The number that is found again least, and in which share of cases; NaN where all are rare."""
    shares = {
        number: found_again[number] / count
        for number, count in numbers.items()
        if count >= MIN_OCCURRENCES
    }
    if not shares:
        return math.nan, math.nan
    worst = min(shares, key=shares.__getitem__)
    return worst, shares[worst]


class _Variance:
    """Sums of squares around the mean of each entry, shifted by the first for precision."""

    def __init__(self, first: np.ndarray | None):
        self.shape: tuple[int, ...] = () if first is None else first.shape
        self._shift: np.ndarray | float = 0.0 if first is None else first.copy()
        self._sum: np.ndarray | float = 0.0
        self._squares: np.ndarray | float = 0.0
        self.count = 0

    def add(self, rows: np.ndarray) -> None:
        shifted = rows - self._shift
        self._sum = self._sum + shifted.sum(0)
        self._squares = self._squares + np.square(shifted).sum(0)
        self.count += len(rows)

    def mean(self) -> np.ndarray:
        return np.asarray(self._shift + self._sum / max(1, self.count))

    def by_element(self) -> np.ndarray:
        if not self.count:
            return np.zeros(self.shape)
        return np.maximum(np.asarray(self._squares - np.square(self._sum) / self.count), 0.0)

    def total(self) -> float:
        return float(self.by_element().sum())

    def merged(self) -> _Variance:
        """The same values centred by their common mean, for outputs whose shape varies."""
        merged = _Variance(None)
        size = int(np.prod(self.shape))
        totals = self._sum + self.count * np.asarray(self._shift)
        squares = (
            self._squares
            + 2 * np.asarray(self._shift) * self._sum
            + self.count * np.square(self._shift)
        )
        merged._sum = float(np.sum(totals))
        merged._squares = float(np.sum(squares))
        merged.count = self.count * size
        return merged


def _dtype_kind(dtype: np.dtype) -> str:
    """Floats (bfloat16 is V to NumPy), integers, flags or text."""
    return {"V": "f", "u": "i", "O": "text", "S": "text", "U": "text"}.get(dtype.kind, dtype.kind)


def trimmed(noise: np.ndarray, share: float) -> float:
    """The sum of all but the largest share, of one at least."""
    if len(noise) < MIN_EXAMPLES_TO_TRIM:
        return float(noise.sum())
    return float(np.sort(noise)[: len(noise) - max(1, int(share * len(noise)))].sum())


def decibels(signal: float, noise: float) -> float:
    """The ratio of two sums of squares; infinite without noise."""
    if not noise:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
