"""Operations that LiteRT has no kernel for, as others that compute exactly the same.

Each rewrite is a function: given an operation of TensorFlow, it returns a function of the
operation's inputs that computes the output, or None where the operation stays as it is. Operations
inside loops and branches are not rewritten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from tfopt.graph import FrozenGraph, copy_graph_def
from tfopt.litert import pooling, slices

Rewrite = Callable[[Any], Callable[..., Any] | None]


def _abs(operation: Any) -> Callable[..., Any] | None:
    """Abs of int64; the most negative number stays itself, as in TensorFlow."""
    import tensorflow as tf

    is_rewritten = operation.inputs[0].dtype == tf.int64
    return (lambda x: tf.maximum(x, tf.negative(x))) if is_rewritten else None


def _sign(operation: Any) -> Callable[..., Any] | None:
    """Sign of int32 and int64."""
    import tensorflow as tf

    dtype = operation.inputs[0].dtype
    is_rewritten = dtype in (tf.int32, tf.int64)
    one = dtype.as_numpy_dtype(1)
    return (lambda x: tf.maximum(tf.minimum(x, one), -one)) if is_rewritten else None


REWRITES: dict[str, Rewrite] = {
    "Abs": _abs,
    "AvgPool3D": pooling.two_poolings,
    "MaxPool3D": pooling.two_poolings,
    "Sign": _sign,
    "StridedSlice": slices.without_new_axes,
}


def rewrite(graph: FrozenGraph) -> FrozenGraph:
    """The graph without what LiteRT lacks; the same object when there is nothing to rewrite."""
    import tensorflow as tf

    graph_def = copy_graph_def(graph.graph_def)
    with tf.Graph().as_default() as known:
        tf.import_graph_def(graph_def, name="")
    is_changed = False
    for node in [node for node in graph_def.node if node.op in REWRITES]:
        operation = known.get_operation_by_name(node.name)
        if (compute := REWRITES[node.op](operation)) is not None:
            made = _traced(node, operation, compute)
            graph_def.node.remove(node)
            graph_def.node.extend(made)
            is_changed = True
    return dataclasses.replace(graph, graph_def=graph_def) if is_changed else graph


def _traced(node: Any, operation: Any, compute: Callable[..., Any]) -> list[Any]:
    """The nodes that replace one; the last one has its name."""
    import tensorflow as tf

    with tf.Graph().as_default() as made, tf.name_scope(f"{node.name}/"):
        inputs = [
            tf.compat.v1.placeholder(tensor.dtype, tensor.shape, "input")
            for tensor in operation.inputs
        ]
        result = tf.identity(compute(*inputs), "result").op.name
    given = dict(zip((tensor.op.name for tensor in inputs), node.input, strict=False))
    control = [name for name in node.input if name.startswith("^")]
    nodes = [item for item in made.as_graph_def().node if item.name not in given]
    for item in nodes:
        item.input[:] = [given.get(name, name) for name in item.input]
        if item.name == result:
            item.name = node.name
            item.input.extend(control)
    return nodes
