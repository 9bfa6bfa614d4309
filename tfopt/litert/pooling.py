"""Pooling over volumes as two poolings over images, since LiteRT has no kernel for the former.

Maximum and average over a box are separable: first over height and width, then over depth. This
holds with padding, too, which TensorFlow leaves out of the maximum and of the count of an average.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tfopt.graph import FrozenGraph, copy_graph_def

OPS = ("AvgPool3D", "MaxPool3D")


def split(graph: FrozenGraph) -> FrozenGraph:
    """The graph with each pooling over volumes as two over images.

    Poolings of volumes whose size is not known stay as they are.
    """
    import tensorflow as tf

    graph_def = copy_graph_def(graph.graph_def)
    with tf.Graph().as_default() as known:
        tf.import_graph_def(graph_def, name="")
    nodes = [node for node in graph_def.node if node.op in OPS]
    for node in nodes:
        shape = known.get_operation_by_name(node.name).inputs[0].shape
        is_known = shape.rank == 5 and shape[1:].is_fully_defined()
        if is_known and node.attr["data_format"].s == b"NDHWC":
            made = _two_poolings(node, shape)
            graph_def.node.remove(node)
            graph_def.node.extend(made)
    return dataclasses.replace(graph, graph_def=graph_def)


def _two_poolings(node: Any, shape: Any) -> list[Any]:
    """The nodes that replace a pooling; the last one has its name."""
    import tensorflow as tf

    pool = {"AvgPool3D": tf.nn.avg_pool2d, "MaxPool3D": tf.nn.max_pool2d}[node.op]
    _, size_d, size_h, size_w, _ = node.attr["ksize"].list.i
    _, stride_d, stride_h, stride_w, _ = node.attr["strides"].list.i
    padding = node.attr["padding"].s.decode()
    _, depth, height, width, channels = shape
    source, result = f"{node.name}/volumes", f"{node.name}/pooled"
    with tf.Graph().as_default() as made, tf.name_scope(f"{node.name}/"):
        volumes = tf.compat.v1.placeholder(node.attr["T"].type, shape, "volumes")
        images = tf.reshape(volumes, [-1, height, width, channels])
        images = pool(images, (size_h, size_w), (stride_h, stride_w), padding)
        height, width = images.shape[1:3]
        slices = tf.reshape(images, [-1, depth, height * width, channels])
        slices = pool(slices, (size_d, 1), (stride_d, 1), padding)
        tf.reshape(slices, [-1, slices.shape[1], height, width, channels], "pooled")
    nodes = [item for item in made.as_graph_def().node if item.name != source]
    for item in nodes:
        item.name = node.name if item.name == result else item.name
        item.input[:] = [node.input[0] if name == source else name for name in item.input]
    return nodes
