"""Pooling over volumes as two poolings over images, since LiteRT has no kernel for the former.

Maximum and average over a box are separable: first over height and width, then over depth. This
holds with padding, too, which TensorFlow leaves out of the maximum and of the count of an average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def two_poolings(operation: Any) -> Callable[..., Any] | None:
    """Pooling over volumes; None where their size is not known."""
    import tensorflow as tf

    shape = operation.inputs[0].shape
    is_known = shape.rank == 5 and shape[1:].is_fully_defined()
    if not is_known or operation.get_attr("data_format") != b"NDHWC":
        return None
    pool = {"AvgPool3D": tf.nn.avg_pool2d, "MaxPool3D": tf.nn.max_pool2d}[operation.type]
    _, size_d, size_h, size_w, _ = operation.get_attr("ksize")
    _, stride_d, stride_h, stride_w, _ = operation.get_attr("strides")
    padding = operation.get_attr("padding").decode()
    _, depth, height, width, channels = shape

    def compute(volumes: Any) -> Any:
        images = tf.reshape(volumes, [-1, height, width, channels])
        images = pool(images, (size_h, size_w), (stride_h, stride_w), padding)
        height_left, width_left = images.shape[1:3]
        slices = tf.reshape(images, [-1, depth, height_left * width_left, channels])
        slices = pool(slices, (size_d, 1), (stride_d, 1), padding)
        return tf.reshape(slices, [-1, slices.shape[1], height_left, width_left, channels])

    return compute
