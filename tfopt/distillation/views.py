"""Random views of a batch that student and teacher both see.

A view is a function of inputs, labels and a seed. The same seed gives the same view of the same
batch, so that what teachers say about it can be kept on disk. Source of teaching by views:
Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent" (arXiv
2106.05237), which gains from long training with strong views and loses when the teacher sees
another one than the student.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from tfopt.distillation import labels as labels_of
from tfopt.distillation.reduction import along
from tfopt.errors import InputError


class View(abc.ABC):
    """A random view of a batch, the same for the same seed."""

    @abc.abstractmethod
    def __call__(self, inputs: Any, labels: Any, seed: Any) -> tuple[Any, Any]:
        """Makes the view.

        Args:
          inputs: what the student takes, of shape (examples, …).
          labels: of shape (examples, …), or None.
          seed: int32 of shape (2,).

        Returns:
          Inputs and labels, as many as before.
        """


class CropAndFlip(View):
    """Each image cut out at random of one with a margin of zeros, half of them mirrored.

    Args:
      padding: width of the margin, in pixels.
      flip: whether images are mirrored, left for right.

    Raises:
      InputError: for a negative margin; at the first batch, when inputs are not of shape (examples,
        height, width, channels).
    """

    def __init__(self, padding: int = 4, flip: bool = True):
        if padding < 0:
            raise InputError(f"The padding is {padding}; expected 0 or more pixels.")
        self.padding, self.flip = padding, flip

    def __call__(self, inputs: Any, labels: Any, seed: Any) -> tuple[Any, Any]:  # noqa: D102
        import tensorflow as tf

        if not tf.is_tensor(inputs) or inputs.shape.rank != 4:
            raise InputError(
                "CropAndFlip takes one tensor of images of shape (examples, height, width, "
                f"channels); got {_described(inputs)}."
            )
        num = tf.shape(inputs)[0]
        by_axis = tf.random.split(seed, 3)
        margin = self.padding
        wide = tf.pad(inputs, [[0, 0], [margin, margin], [margin, margin], [0, 0]])
        height, width = tf.shape(inputs)[1], tf.shape(inputs)[2]

        def places(size: Any, seed: Any) -> Any:
            """Of the pixels of each image along one axis, of shape (examples, size)."""
            begins = tf.random.stateless_uniform([num, 1], seed, 0, 2 * margin + 1, tf.int32)
            return begins + tf.range(size)[None]

        rows, columns = places(height, by_axis[0]), places(width, by_axis[1])
        if self.flip:
            is_mirrored = tf.random.stateless_uniform([num, 1], by_axis[2]) < 0.5
            columns = tf.where(is_mirrored, columns[:, ::-1], columns)
        cut = tf.gather(wide, rows, axis=1, batch_dims=1)
        cut = tf.gather(cut, columns, axis=2, batch_dims=1)
        return tf.ensure_shape(cut, inputs.shape), labels


class Mixup(View):
    """Each example mixed with another of its batch, in shares that are uniform from 0 to 1.

    Shares of classes and values are mixed as inputs are; an example whose label is the number of a
    class has none after it (-1), so that the teachers alone teach it. Sources: Zhang et al. 2018,
    "mixup" (arXiv 1710.09412); for distillation, with uniform shares, Beyer et al. 2022 (arXiv
    2106.05237), section 3.
    """

    def __call__(self, inputs: Any, labels: Any, seed: Any) -> tuple[Any, Any]:  # noqa: D102
        import tensorflow as tf

        num = tf.shape(tf.nest.flatten(inputs)[0])[0]
        shares = tf.random.stateless_uniform([num], seed)

        def mixed(values: Any) -> Any:
            dtype = values.dtype if values.dtype.is_floating else tf.float32
            values = tf.cast(values, dtype)
            own = along(tf.cast(shares, dtype), values.shape.rank)
            return own * values + (1 - own) * values[::-1]

        def mixed_label(values: Any) -> Any:
            is_number = values.shape.rank == 1 or values.shape[-1] == 1
            if is_number and not values.dtype.is_floating:
                dtype = tf.int32 if values.dtype.is_unsigned else values.dtype
                return tf.fill(tf.shape(values), tf.constant(labels_of.NONE, dtype))
            return mixed(values)

        inputs = tf.nest.map_structure(mixed, inputs)
        return inputs, None if labels is None else tf.nest.map_structure(mixed_label, labels)


class Chain(View):
    """Several views, one after the other."""

    def __init__(self, views: Sequence[View]):
        self.views = tuple(views)

    def __call__(self, inputs: Any, labels: Any, seed: Any) -> tuple[Any, Any]:  # noqa: D102
        import tensorflow as tf

        for index, view in enumerate(self.views):
            own = tf.random.fold_in(seed, index)
            inputs, labels = view(inputs, labels, own)
        return inputs, labels


def _described(inputs: Any) -> str:
    shape = getattr(inputs, "shape", None)
    return type(inputs).__name__ if shape is None else f"shape {tuple(shape)}"
