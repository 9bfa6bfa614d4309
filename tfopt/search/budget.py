"""What the user will not give up."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tfopt.errors import InputError
from tfopt.measure import statistics

if TYPE_CHECKING:
    from tfopt.measure.accuracy import Drop

_LIMITS = {
    "max_latency_ms": ("median_ms", "median latency", "ms"),
    "max_size_bytes": ("size_bytes", "size", "bytes"),
    "max_memory_bytes": ("peak_memory_bytes", "peak memory", "bytes"),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits that the chosen variant must keep; None is no limit.

    Attributes:
      max_accuracy_drop: of each output that has labels; the one-sided 95 % upper bound of the
        drop, paired example by example, must lie inside. Of scores it means points (0.01 is one
        point of top-1). Errors such as `mse` have no upper limit: there it is a share of what
        always answering the mean label would have (0.01 of the labels' variance for `mse`, so that
        R² falls by 0.01 at most), or of the model's own error where that is no answer.
      max_latency_ms: median time of one inference at the batch size of the search.
      max_size_bytes: of the model files.
      max_memory_bytes: most memory of a process that loads and runs the model.
      min_sqnr_db: least signal to noise ratio of every output against the model as saved, in
        decibels; a variant below it is `wrong`. None takes the limit of each precision; see
        `tfopt.measure.gate.LIMITS_DB`.
    """

    max_accuracy_drop: float | None = 0.01
    max_latency_ms: float | None = None
    max_size_bytes: int | None = None
    max_memory_bytes: int | None = None
    min_sqnr_db: float | None = None

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value is None:
                continue
            is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value < 0:
                raise InputError(f"{name} is {value!r}; expected a number of at least 0.")
            if hasattr(value, "item"):  # NumPy's
                object.__setattr__(self, name, value.item())

    def violation(self, row: Mapping[str, Any], drops: Sequence[Drop] | None) -> str | None:
        """Why a measured variant is over budget, in one sentence, or None.

        Args:
          row: its columns.
          drops: of accuracy, of each output; None for the unchanged model.
        """
        if (reason := self.lost(drops)) is not None:
            return reason
        for name, (column, what, unit) in _LIMITS.items():
            limit, value = getattr(self, name), row.get(column)
            if limit is not None and value is not None and value > limit:
                return f"The {what} of {value:.6g} {unit} exceeds {limit:g}."
        return None

    def lost(self, drops: Sequence[Drop] | None) -> str | None:
        """Why a variant is not accurate enough, in one sentence, or None."""
        limit = self.max_accuracy_drop
        if drops is None or limit is None:
            return None
        for drop in drops:
            shares = drop.shares
            if shares.estimate <= limit and shares.high <= limit:
                continue
            found = (
                self._not_proven(drop, limit)
                if shares.estimate <= limit
                else _exceeding(drop, limit)
            )
            return (
                f"Output {drop.output!r}: {found[0].lower()}{found[1:]}" if drop.output else found
            )
        return None

    def excess(self, row: Mapping[str, Any]) -> float:
        """How far a row is from the limits: the largest ratio of a figure to its limit."""
        ratios = [
            row[column] / getattr(self, name) if getattr(self, name) else math.inf
            for name, (column, _, _) in _LIMITS.items()
            if getattr(self, name) is not None and row.get(column) is not None
        ]
        return max(ratios, default=0.0)

    def _not_proven(self, drop: Drop, limit: float) -> str:
        shares, count = drop.shares, drop.num_examples
        if not math.isfinite(shares.high):
            what = f"the rise of {drop.metric}" if drop.is_error else "the accuracy drop"
            return f"{count} examples are too few to show {what}; give more."
        if drop.is_error:
            start = (
                f"{drop.metric} rises by {shares.estimate:.2%} of {_scale(drop)} but could rise by "
                f"{shares.high:.2%} (95 % bound on {count} examples)"
            )
            allowed = f"{limit:.2%}"
        else:
            start = (
                f"The accuracy drop is {shares.estimate:.4g} but could be {shares.high:.4g} "
                f"(95 % bound on {count} examples)"
            )
            allowed = f"{limit:g}"
        needed = statistics.num_examples_needed(shares, count, limit)
        if needed is None:
            return f"{start}, which is not inside {allowed}."
        more = max(1, needed - count)
        return f"{start}; about {more} more examples would show whether it is inside {allowed}."


def _exceeding(drop: Drop, limit: float) -> str:
    if not drop.is_error:
        return f"The accuracy drop of {drop.interval.estimate:.4g} exceeds {limit:g}."
    if not drop.unit > 0:
        return f"{drop.metric} rises by {drop.interval.estimate:.4g} from 0."
    return (
        f"{drop.metric} rises by {drop.interval.estimate:.4g}, which is "
        f"{drop.shares.estimate:.2%} of {_scale(drop)}; {limit:.2%} is allowed."
    )


def _scale(drop: Drop) -> str:
    what = "the model's own" if drop.is_own_error else "that of always answering the mean label"
    return f"{what} ({drop.unit:.4g})"
