"""Means of losses over examples and positions, with weights and without padding, as in Keras."""

from __future__ import annotations

from typing import Any


def mean(losses: Any, weights: Any = None, mask: Any = None) -> Any:
    """The weighted mean of losses over all that a mask leaves; 0 where it leaves nothing.

    As with the losses of Keras, weights multiply and do not count in the divisor, and what is
    masked counts in neither.

    Args:
      losses: tensor of shape (examples,) or (examples, positions…).
      weights: of examples or of positions; None weighs all by 1.
      mask: of examples or of positions, bool: which count; None for all.

    Returns:
      A scalar, float32.
    """
    import tensorflow as tf

    losses = tf.cast(losses, tf.float32)
    if weights is not None:
        losses = losses * _fitted(tf.cast(weights, tf.float32), losses, tf.reduce_mean)
    if mask is None:
        return tf.reduce_mean(losses)
    mask = tf.broadcast_to(_fitted(mask, losses, tf.reduce_any), tf.shape(losses))
    kept = tf.where(mask, losses, tf.zeros_like(losses))
    return tf.math.divide_no_nan(
        tf.reduce_sum(kept), tf.reduce_sum(tf.cast(mask, tf.float32))
    )  # fmt: skip


def without_padding(values: Any, mask: Any) -> Any:
    """Zeros at the positions that a mask leaves out, if these are the positions of the values.

    Losses that look at all positions of an example at once are not moved by padding then.

    Args:
      values: tensor of shape (examples, positions…, channels).
      mask: of shape (examples, positions…), bool; None for all.
    """
    import tensorflow as tf

    if mask is None or not _has_positions(mask, values.shape[:-1]):
        return values
    return tf.where(mask[..., None], values, tf.zeros_like(values))


def mask_of(output: Any) -> Any:
    """The mask that Keras left with a tensor, bool; None without one."""
    import tensorflow as tf

    mask = getattr(output, "_keras_mask", None)
    return None if mask is None else tf.cast(mask, tf.bool)


def both(one: Any, other: Any) -> Any:
    """Two masks of the same examples in one; each may be None, or have fewer axes."""
    import tensorflow as tf

    if one is None or other is None:
        return other if one is None else one
    rank = max(one.shape.rank, other.shape.rank)
    return tf.logical_and(along(one, rank), along(other, rank))


def along(values: Any, rank: int) -> Any:
    """Values with as many axes of size 1 behind as make that rank."""
    import tensorflow as tf

    missing = rank - values.shape.rank
    return tf.reshape(values, tf.concat([tf.shape(values), [1] * missing], 0))


def _fitted(values: Any, losses: Any, reduce: Any) -> Any:
    """Weights or a mask with the axes of losses; those that do not fit are reduced."""
    rank = losses.shape.rank
    if values.shape.rank > rank and _has_positions(values, losses.shape, rank):
        values = reduce(values, list(range(rank, values.shape.rank)))
    elif values.shape.rank > rank or not _has_positions(values, losses.shape):
        values = reduce(values, list(range(1, values.shape.rank)))
    return along(values, rank)


def _has_positions(values: Any, shape: Any, rank: int | None = None) -> bool:
    """Whether the axes of values are those of a shape, or 1, as far as they are known."""
    own = values.shape[1 : values.shape.rank if rank is None else rank]
    if len(own) > len(shape) - 1:
        return False
    return all(
        size in (1, None) or other in (size, None)
        for size, other in zip(own, shape[1:], strict=False)
    )
