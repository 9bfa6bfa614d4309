"""Values that stand for none: NaN, infinities, and the large constants that masks add.

Their size means nothing and would hide every other value beside them, so that they are compared by
their place alone.
"""

from __future__ import annotations

import math

import numpy as np

MIN_MASK = 1e8  # masks add -1e9, -1e10 or the least float32 to scores
MAX_SCORE = 1e4
MASK_SPREAD = 1e-4  # of the masked values among each other: scores are lost in rounding


def mask_of(values: np.ndarray) -> float:
    """The magnitude from which values of an output are masked ones; infinity where none are.

    Args:
      values: of some real examples. Masked are values beyond 1e8 that are all but equal, beside
        values of another size.
    """
    found = values[np.isfinite(values)]
    masked = found[np.abs(found) >= MIN_MASK]
    others = found[np.abs(found) < MIN_MASK]
    if len(masked) < 2 or not len(others) or np.abs(others).max() > MAX_SCORE:
        return math.inf
    is_one = masked.max() - masked.min() <= MASK_SPREAD * np.abs(masked).max()
    return float(np.abs(masked).min()) / 2 if is_one else math.inf


def is_limit(reference: np.ndarray, mask: float) -> np.ndarray:
    """Where the reference is NaN, infinite or masked."""
    return ~np.isfinite(reference) | (np.abs(reference) >= mask)


def keeps_limits(value: np.ndarray, reference: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """Of each example, whether its limits are where the reference has them, as (n,) bools.

    NaN stays NaN. Infinities and masked values lie beyond all other values of their example, as
    far as the precision of the variant reaches.

    Args:
      value: of the variant, (examples, …).
      reference: of the model as saved, the same shape.
      limits: see `is_limit`.
    """
    if not limits.any():
        return np.ones(len(value), bool)
    value, reference = (array.reshape(len(array), -1) for array in (value, reference))
    limits = limits.reshape(value.shape)
    low = np.where(limits, math.inf, value).min(1, keepdims=True, initial=math.inf)
    high = np.where(limits, -math.inf, value).max(1, keepdims=True, initial=-math.inf)
    is_alone = limits.all(1, keepdims=True)
    is_kept = np.where(
        np.isnan(reference),
        np.isnan(value),
        np.where(
            reference < 0,
            (value <= low) & (~is_alone | (value < 0)),
            (value >= high) & (~is_alone | (value > 0)),
        ),
    )
    return (is_kept | ~limits).all(1)
