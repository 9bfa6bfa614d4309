"""Labels that some examples or positions lack: -1 for classes, NaN for values."""

from __future__ import annotations

from typing import Any

from tfopt.distillation.reduction import along

NONE = -1


def split(labels: Any, is_of_classes: bool, num_axes: int = 1) -> tuple[Any, Any]:
    """Labels to compute with, and which examples or positions have one.

    Args:
      labels: tensor of shape (examples, …). A position has none if all its labels are NaN, or, of
        classes, below 0.
      is_of_classes: whether they are numbers or shares of classes.
      num_axes: of examples and positions: 1 if outputs have none.

    Returns:
      The labels, zeros where there is none; and a tensor, bool, with as many axes or with those of
      the labels if these are fewer.
    """
    import tensorflow as tf

    if labels.dtype.is_floating:
        is_missing = tf.math.is_nan(labels)
        if is_of_classes:
            is_missing |= labels < 0
    elif is_of_classes and not labels.dtype.is_unsigned and labels.dtype.is_integer:
        is_missing = labels < 0
    else:
        is_missing = tf.zeros_like(labels, tf.bool)
    has_none = tf.reduce_all(is_missing, list(range(num_axes, labels.shape.rank)))
    filled = tf.where(along(has_none, labels.shape.rank), tf.zeros_like(labels), labels)
    return filled, tf.logical_not(has_none)


def is_class(labels: Any, number: int, num_axes: int) -> Any:
    """Where labels are the number of a class; a tensor, bool, as `split` returns it."""
    import tensorflow as tf

    found = tf.equal(labels, tf.cast(number, labels.dtype))
    return tf.reduce_all(found, list(range(num_axes, labels.shape.rank)))


def classes(labels: Any, shape: Any) -> Any | None:
    """The class of each position, int64, -1 where there is none; None for labels of another kind.

    Args:
      labels: whole numbers of shape (examples, positions…) or (examples, positions…, 1), or shares
        of classes of shape (examples, positions…, classes).
      shape: of the outputs, (examples, positions…, classes).
    """
    import tensorflow as tf

    num_axes, rank = len(shape) - 1, labels.shape.rank
    filled, is_there = split(labels, is_of_classes=True, num_axes=num_axes)
    if rank == num_axes + 1 and labels.shape[-1] == shape[-1] > 1:
        found = tf.argmax(filled, -1)
    elif rank == num_axes:
        found = tf.cast(filled, tf.int64)
    elif rank == num_axes + 1 and labels.shape[-1] == 1:
        found = tf.cast(tf.squeeze(filled, -1), tf.int64)
    else:
        return None
    return tf.where(is_there, found, tf.constant(NONE, tf.int64))
