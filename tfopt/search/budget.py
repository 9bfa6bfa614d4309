"""What the user will not give up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from tfopt.errors import InputError
from tfopt.measure import statistics

_LIMITS = {
    "max_latency_ms": ("median_ms", "median latency", "ms"),
    "max_size_bytes": ("size_bytes", "size", "bytes"),
    "max_memory_bytes": ("peak_memory_bytes", "peak memory", "bytes"),
}


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits that the chosen variant must keep; None is no limit.

    Attributes:
      max_accuracy_drop: absolute points of the metric (0.01 is one point of top-1); the one-sided
        95 % upper bound of the drop, paired example by example, must lie inside.
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
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                raise InputError(f"{name} is {value!r}; expected a number of at least 0.")

    def violation(
        self, row: Mapping[str, Any], drop: statistics.Interval | None, num_examples: int
    ) -> str | None:
        """Why a measured variant is over budget, in one sentence, or None.

        Args:
          row: its columns.
          drop: of accuracy; None for the unchanged model.
          num_examples: that the drop was measured on.
        """
        if drop is not None and self.max_accuracy_drop is not None:
            if drop.estimate > self.max_accuracy_drop:
                return (
                    f"The accuracy drop of {drop.estimate:.4g} exceeds {self.max_accuracy_drop:g}."
                )
            if drop.high > self.max_accuracy_drop:
                return self._not_proven(drop, num_examples)
        for name, (column, what, unit) in _LIMITS.items():
            limit, value = getattr(self, name), row.get(column)
            if limit is not None and value is not None and value > limit:
                return f"The {what} of {value:.6g} {unit} exceeds {limit:g}."
        return None

    def excess(self, row: Mapping[str, Any]) -> float:
        """How far a row is from the limits: the largest ratio of a figure to its limit."""
        ratios = [
            row[column] / getattr(self, name) if getattr(self, name) else math.inf
            for name, (column, _, _) in _LIMITS.items()
            if getattr(self, name) is not None and row.get(column) is not None
        ]
        return max(ratios, default=0.0)

    def _not_proven(self, drop: statistics.Interval, num_examples: int) -> str:
        limit = self.max_accuracy_drop
        assert limit is not None
        if not math.isfinite(drop.high):
            return f"{num_examples} examples cannot tell the accuracy drop; give more."
        start = (
            f"The accuracy drop is {drop.estimate:.4g} but could be {drop.high:.4g} "
            f"(95 % bound on {num_examples} examples)"
        )
        needed = statistics.num_examples_needed(drop, num_examples, limit)
        if needed is None:
            return f"{start}, which is not inside {limit:g}."
        more = max(1, needed - num_examples)
        return f"{start}; about {more} more examples would tell whether it is inside {limit:g}."
