"""Labels that some examples lack: -1 for classes, NaN for values."""

from __future__ import annotations

from typing import Any

NONE = -1


def split(labels: Any, is_of_classes: bool) -> tuple[Any, Any]:
    """Labels to compute with, and which examples have one.

    Args:
      labels: tensor of shape (examples, …). An example has none if all its labels are NaN, or, of
        classes, below 0.
      is_of_classes: whether they are numbers or shares of classes.

    Returns:
      The labels, zeros where there is none; and a tensor of shape (examples,), bool.
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
    has_none = tf.reduce_all(is_missing, list(range(1, labels.shape.rank)))
    filled = tf.where(along(has_none, labels.shape.rank), tf.zeros_like(labels), labels)
    return filled, tf.logical_not(has_none)


def along(values: Any, rank: int) -> Any:
    """Values of shape (examples,) with as many axes of size 1 behind as make that rank."""
    import tensorflow as tf

    return tf.reshape(values, [-1, *[1] * (rank - 1)])


def classes(labels: Any, num_classes: int) -> Any | None:
    """The class of each example, int64, -1 where there is none; None for labels of another kind.

    Args:
      labels: whole numbers of shape (examples,) or (examples, 1), or shares of classes of shape
        (examples, classes).
      num_classes: of the outputs.
    """
    import tensorflow as tf

    filled, is_there = split(labels, is_of_classes=True)
    if labels.shape.rank == 2 and labels.shape[-1] == num_classes > 1:
        found = tf.argmax(filled, -1)
    elif labels.shape.rank == 1 or (labels.shape.rank == 2 and labels.shape[-1] == 1):
        found = tf.cast(tf.reshape(filled, [-1]), tf.int64)
    else:
        return None
    return tf.where(is_there, found, tf.constant(NONE, tf.int64))
