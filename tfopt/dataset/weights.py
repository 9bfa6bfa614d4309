"""What a run should know of sample weights, which count in training only."""

from __future__ import annotations

import numpy as np

from tfopt.dataset.casting import Chunk
from tfopt.errors import InputError
from tfopt.examples import is_weight_column


class WeightNotes:
    """Looks at sample weights while data is read, and forgets them."""

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf
        self._num_zeros = self._count = 0
        self._is_mask = True  # 0 or 1 for each position of an example

    def without_weights(self, chunk: Chunk) -> Chunk:
        """The other columns.

        Raises:
          InputError: when weights are no finite numbers.
        """
        for name in filter(is_weight_column, chunk):
            self._add(chunk[name])
        return {name: array for name, array in chunk.items() if not is_weight_column(name)}

    def notes(self) -> list[str]:
        """What it means that they are not used, where that matters."""
        if self._low >= self._high:  # none, or all equal
            return []
        share = f"{self._num_zeros} of {self._count}"
        if self._is_mask:
            return [
                f"Sample weights are not used: the {share} positions that they mark as padding "
                "with 0 count in the metric, too."
            ]
        zeros = f", also the {share} whose weight is 0" if self._num_zeros else ""
        return [f"Sample weights are not used: every example counts the same{zeros}."]

    def _add(self, weights: np.ndarray) -> None:
        if weights.dtype.kind not in "biuf" or not np.isfinite(weights).all():
            raise InputError("Sample weights are not finite numbers; expected one an example.")
        if not weights.size:
            return
        self._low = min(self._low, float(weights.min()))
        self._high = max(self._high, float(weights.max()))
        self._num_zeros += int((weights == 0).sum())
        self._count += weights.size
        is_of_position = weights.ndim > 1 and weights.size > len(weights)
        self._is_mask &= is_of_position and bool(np.isin(weights, (0, 1)).all())
