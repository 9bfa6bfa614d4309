"""A frozen graph in half precision, by TensorFlow's own rewrite (grappler auto_mixed_precision).

TensorFlow sorts operations into four lists (auto_mixed_precision_lists.h): those that gain most,
such as convolutions and matrix products, run in half precision; others follow their neighbours;
some, such as exponentials, never do. Inputs and outputs keep their dtype.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tfopt.graph import FrozenGraph

SENSITIVE_OPS = (
    "Cumsum", "Exp", "Expm1", "L2Loss", "Log", "Log1p", "LogSoftmax", "Mean", "Pow", "Prod",
    "Rsqrt", "Softmax", "Sqrt", "Square", "SquaredDifference", "Sum",
)  # fmt: skip
"""Softmax, reductions and the statistics of normalisation: 8 bits of mantissa lose small terms of
sums, and squares leave the range of float16 above 255. TensorFlow's lists allow most of them."""

# Loops are not rewritten, and so what goes through lists into and out of them must stay float32.
_LIST_OPS = (
    "TensorListFromTensor", "TensorListGetItem", "TensorListPopBack", "TensorListPushBack",
    "TensorListSetItem", "TensorListStack",
)  # fmt: skip

FLOAT16_LIMIT = 65504 / 4
"""What examples may reach: with other inputs values can be larger, up to float16's largest."""

# In this order; constants are folded on both sides of the rewrite so that weights are stored in
# half precision and casts between neighbours disappear.
BEFORE = ("pruning", "function", "constfold", "arithmetic")
_REWRITE = {
    "bfloat16": "auto_mixed_precision_onednn_bfloat16",
    "float16": "auto_mixed_precision",
}
_AFTER = ("constfold", "pruning", "dependency")
_VARIABLE = "TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_"


def to_half(
    graph: FrozenGraph,
    dtype: str,
    sensitive_ops: Iterable[str] = SENSITIVE_OPS,
    float32_nodes: Iterable[str] = (),
) -> FrozenGraph:
    """Rewrites what gains from it to half precision.

    The rewrite to float16 is TensorFlow's for GPUs with Tensor Cores and the one to bfloat16 is
    that for CPUs; neither needs the device, and the graphs run on both. What loops and branches
    hold stays as it is.

    Args:
      graph: in float32.
      dtype: `bfloat16` or `float16`.
      sensitive_ops: operations that stay in float32, besides those that TensorFlow keeps.
      float32_nodes: names of nodes that stay, too.
    """
    devices = {"bfloat16": [_cpu()], "float16": [_cpu(), _gpu()]}[dtype]
    with _denied((*sensitive_ops, *_LIST_OPS)):
        return graph.rewrite(
            (*BEFORE, _REWRITE[dtype], *_AFTER), devices=devices, preserved=tuple(float32_nodes)
        )


def num_half(graph: FrozenGraph, dtype: str) -> int:
    """How many operations compute in a dtype."""
    import tensorflow as tf

    wanted = tf.dtypes.as_dtype(dtype).as_datatype_enum
    return sum("T" in node.attr and node.attr["T"].type == wanted for node in graph.graph_def.node)


def beyond_float16(graph: FrozenGraph, batches: Iterable[Mapping[str, np.ndarray]]) -> list[str]:
    """The nodes that read or make values too large for float16 (`FLOAT16_LIMIT`).

    Args:
      graph: in float32, after `BEFORE`; what its loops and branches hold is not looked into.
      batches: examples, by input name.
    """
    import tensorflow as tf

    large: set[str] = set()
    with tf.Graph().as_default() as built:
        tf.graph_util.import_graph_def(graph.graph_def, name="")
        operations = built.get_operations()
        tensors = [t for op in operations for t in op.outputs if t.dtype == tf.float32]
        largest = {tensor.name: tf.reduce_max(tf.abs(tensor)) for tensor in tensors}
    with tf.compat.v1.Session(graph=built, config=_unoptimized()) as session:
        for batch in batches:
            feed = {
                name: batch[spec.name]
                for name, spec in zip(graph.input_tensors, graph.signature.inputs, strict=True)
            }
            found = session.run(largest, feed)
            large |= {name for name, value in found.items() if not value <= FLOAT16_LIMIT}
    return [
        op.name
        for op in operations
        if op.type not in ("Const", "Identity", "Placeholder")
        and any(tensor.name in large for tensor in (*op.inputs, *op.outputs))
    ]


def note_on_large(names: list[str]) -> str:
    """What a user should know of operations that `beyond_float16` named."""
    shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    what = "operation stays" if len(names) == 1 else "operations stay"
    return f"{len(names)} {what} float32 for values near the largest of float16: {shown}."


@contextlib.contextmanager
def _denied(ops: Iterable[str]) -> Iterator[None]:
    """Moves operations to TensorFlow's list of those that stay in float32.

    An operation on two lists would end the rewrite without a word, so that each is taken from the
    others. What the user has set in these variables stays in force.
    """
    names = {f"{_VARIABLE}{key}_REMOVE": ops for key in ("ALLOWLIST", "INFERLIST", "CLEARLIST")}
    names[f"{_VARIABLE}DENYLIST_ADD"] = ops
    before = {name: os.environ.get(name) for name in names}
    try:
        for name, value in names.items():
            os.environ[name] = ",".join(filter(None, (before[name], *value)))
        yield
    finally:
        for name, old in before.items():
            if old is None:
                del os.environ[name]
            else:
                os.environ[name] = old


def _unoptimized() -> Any:
    """A session's configuration in which every tensor has the value that its node says."""
    import tensorflow as tf

    config = tf.compat.v1.ConfigProto()
    config.graph_options.rewrite_options.disable_meta_optimizer = True
    return config


def _cpu() -> Any:
    from tensorflow.core.protobuf import device_properties_pb2 as pb2

    return pb2.NamedDevice(name="/CPU:0", properties=pb2.DeviceProperties(type="CPU"))


def _gpu() -> Any:
    """A GPU that multiplies float16, which need not be there."""
    from tensorflow.core.protobuf import device_properties_pb2 as pb2

    environment = {"architecture": "8.0", "cuda": "12000", "cudnn": "8900"}
    properties = pb2.DeviceProperties(type="GPU", environment=environment)
    return pb2.NamedDevice(name="/GPU:0", properties=properties)
