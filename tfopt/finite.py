"""Examples with NaN or infinite inputs, which say nothing about ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from tfopt.examples import Arrays


def note(batches: Iterable[Arrays]) -> list[str]:
    """A sentence on each input that holds NaN or infinity, with the number of examples."""
    counts: Counter[str] = Counter()
    total = 0
    for batch in batches:
        finite = {name: _finite_rows(value) for name, value in batch.items()}
        total += max((len(rows) for rows in finite.values()), default=0)
        counts.update({name: int((~rows).sum()) for name, rows in finite.items()})
    return [
        f"Input {name!r} holds NaN or infinity in {count} of {total} calibration examples; ranges "
        "of int8 do not cover these values."
        for name, count in counts.items()
        if count
    ]


def usable(
    batches: Iterable[Arrays], run: Callable[[Arrays], Iterable[np.ndarray]] | None = None
) -> Iterator[Arrays]:
    """Batches in which finite examples stand in the place of the others.

    Batches keep their sizes, since a model may have a fixed one, and ranges do not depend on how
    often an example comes. A batch without a finite example is left out.

    Args:
      batches: inputs by name, examples along the first axis.
      run: runs the model; an example with finite outputs then counts as finite, since the model
        handles such inputs itself.
    """
    for batch in batches:
        is_finite = _all_finite(batch.values())
        if run is not None and not is_finite.all():
            is_finite |= _all_finite(run(batch))
        if is_finite.all():
            yield batch
        elif is_finite.any():
            rows = np.where(is_finite, np.arange(len(is_finite)), np.argmax(is_finite))
            yield {name: value[rows] if np.ndim(value) else value for name, value in batch.items()}


def _all_finite(arrays: Iterable[np.ndarray]) -> np.ndarray:
    """By example; an array of another length counts for all of them."""
    found = [_finite_rows(array) for array in arrays]
    length = max((len(rows) for rows in found), default=0)
    return np.logical_and.reduce(
        [rows if len(rows) == length else np.full(length, rows.all()) for rows in found]
    )


def _finite_rows(array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    rows = array.reshape(len(array), -1) if array.ndim else array.reshape(1, 1)
    if array.dtype.kind not in "fcV":  # V as of bfloat16
        return np.ones(len(rows), bool)
    return np.isfinite(rows.astype(np.float32) if array.dtype.kind == "V" else rows).all(axis=1)
