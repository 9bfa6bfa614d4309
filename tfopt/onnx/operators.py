"""TensorFlow operations that tf2onnx computes wrongly or lacks, in operators of ONNX.

tf2onnx writes a choice as `mask * x + (1 - mask) * y`, which is NaN wherever the value left out is
NaN or infinite; divides whole numbers towards zero; compares them in float32; and lets negative
indices of one_hot count from the end. Each function here has the signature that tf2onnx asks of
custom handlers: (graph, node, name of the node, arguments).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

BOOL, FLOAT, INT32, INT64, FLOAT16, DOUBLE = 9, 1, 6, 7, 10, 11  # onnx.TensorProto.DataType
_FLOATS = (FLOAT, FLOAT16, DOUBLE)
# What ONNX Runtime has no kernels of Where, Less and Mod for, and what holds the same values;
# float16 has to be the type of the whole file for that.
_WIDER = {
    2: INT32, 3: INT32, 4: INT32, 5: INT32, BOOL: INT32, FLOAT16: FLOAT, 12: INT64, 13: INT64,
}  # fmt: skip


class _Builder:
    """Writes the nodes that stand in the place of a TensorFlow node."""

    def __init__(self, graph: Any, node: Any):
        self.inputs = list(node.input)
        self.dtype = graph.get_dtype(node.output[0])
        self._graph, self._node = graph, node

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        return str(self._graph.make_node(op, list(inputs), attr=attributes).output[0])

    def constant(self, value: Any, dtype: int | None = None) -> str:
        """A constant of an ONNX dtype, by default that of the node's output."""
        from tf2onnx import utils

        array = np.array(value, utils.map_onnx_to_numpy_type(dtype or self.dtype))
        return str(self._graph.make_const(utils.make_name(self._node.name), array).output[0])

    def cast(self, tensor: str, dtype: int) -> str:
        if self.dtype_of(tensor) == dtype:
            return tensor
        return self.add("Cast", tensor, to=dtype)

    def dtype_of(self, tensor: str) -> int:
        return int(self._graph.get_dtype(tensor))

    def rank_of(self, tensor: str) -> int | None:
        shape = self._graph.get_shape(tensor)
        return None if shape is None else len(shape)

    def where(self, condition: str, x: str, y: str) -> str:
        """Elements of x where the condition holds, else of y; all three are broadcast."""
        dtype = self.dtype_of(x)
        wider = _WIDER.get(dtype, dtype)
        chosen = self.add("Where", condition, self.cast(x, wider), self.cast(y, wider))
        return self.cast(chosen, dtype) if wider != dtype else chosen

    def replace(self, tensor: str) -> None:
        """Puts a tensor in the place of the node's output."""
        node = self._node
        outputs, shapes, dtypes = list(node.output), node.output_shapes, node.output_dtypes
        self._graph.remove_node(node.name)
        self._graph.make_node(
            "Identity", [tensor], outputs=outputs, name=node.name, shapes=shapes, dtypes=dtypes
        )


def handlers() -> dict[str, tuple[Callable[..., None], list[Any]]]:
    """The custom handlers, as tf2onnx takes them."""
    found = {
        "Select": select,
        "SelectV2": select,
        "Greater": compare,
        "Less": compare,
        "FloorDiv": floor_div,
        "FloorMod": floor_mod,
        "TruncateMod": truncate_mod,
        "MatrixBandPart": band_part,
        "OneHot": one_hot,
        "MulNoNan": mul_no_nan,
        "Xlogy": xlogy,
        "Xdivy": xdivy,
        "Log1p": log1p,
        "Expm1": expm1,
        "Erfc": erfc,
    }
    return {op: (function, []) for op, function in found.items()}


def select(graph: Any, node: Any, name: str, args: Any) -> None:
    """`tf.where` with three arguments; Select's vector condition chooses among whole rows."""
    del name, args
    build = _Builder(graph, node)
    condition, x, y = build.inputs
    if node.type == "Select" and build.rank_of(condition) == 1:
        rank = next((r for r in map(build.rank_of, (x, y, node.output[0])) if r is not None), None)
        if rank is None:
            raise ValueError("Select by rows of tensors of unknown rank")
        if rank > 1:
            shape = build.constant([-1] + [1] * (rank - 1), INT64)
            condition = build.add("Reshape", condition, shape)
    build.replace(build.where(condition, x, y))


def compare(graph: Any, node: Any, name: str, args: Any) -> None:
    """Greater and Less; float32 would hold whole numbers up to 2²⁴ only."""
    del name, args
    build = _Builder(graph, node)
    x, y = build.inputs
    dtype = build.dtype_of(x)
    wider = _WIDER.get(dtype, dtype)
    build.replace(build.add(node.type, build.cast(x, wider), build.cast(y, wider)))


def floor_div(graph: Any, node: Any, name: str, args: Any) -> None:
    """Rounds down; ONNX's Div of whole numbers rounds towards zero."""
    del name, args
    build = _Builder(graph, node)
    x, y = build.inputs
    if build.dtype in _FLOATS:
        build.replace(build.add("Floor", build.add("Div", x, y)))
        return
    wider = _WIDER.get(build.dtype, build.dtype)
    x, y = build.cast(x, wider), build.cast(y, wider)
    # Less the remainder, which has the divisor's sign, nothing is left to be rounded.
    quotient = build.add("Div", build.add("Sub", x, build.add("Mod", x, y)), y)
    build.replace(build.cast(quotient, build.dtype))


def floor_mod(graph: Any, node: Any, name: str, args: Any) -> None:
    """The remainder with the sign of the divisor."""
    del name, args
    build = _Builder(graph, node)
    x, y = build.inputs
    if build.dtype not in _FLOATS:
        wider = _WIDER.get(build.dtype, build.dtype)
        remainder = build.add("Mod", build.cast(x, wider), build.cast(y, wider))
        build.replace(build.cast(remainder, build.dtype))
        return
    zero = build.constant(0)
    remainder = build.add("Mod", x, y, fmod=1)  # of the sign of x
    has_other_sign = build.add(
        "Xor", build.add("Less", remainder, zero), build.add("Less", y, zero)
    )
    is_moved = build.add(
        "And", has_other_sign, build.add("Not", build.add("Equal", remainder, zero))
    )
    build.replace(build.where(is_moved, build.add("Add", remainder, y), remainder))


def truncate_mod(graph: Any, node: Any, name: str, args: Any) -> None:
    """The remainder with the sign of the dividend."""
    del name, args
    build = _Builder(graph, node)
    wider = _WIDER.get(build.dtype, build.dtype)
    x, y = (build.cast(tensor, wider) for tensor in build.inputs)
    build.replace(build.cast(build.add("Mod", x, y, fmod=1), build.dtype))


def band_part(graph: Any, node: Any, name: str, args: Any) -> None:
    """`tf.linalg.band_part`, with tf2onnx's mask."""
    del name, args
    from tf2onnx.onnx_opset.nn import MatrixBandPart

    class BandPart(MatrixBandPart):  # type: ignore[misc, unused-ignore]
        @classmethod
        def _apply_mask_and_transform(cls, ctx: Any, node: Any, mask: Any) -> None:
            build = _Builder(ctx, node)
            condition = build.cast(mask.output[0], BOOL)
            build.replace(build.where(condition, node.input[0], build.constant(0)))

    BandPart.version_11(graph, node)


def one_hot(graph: Any, node: Any, name: str, args: Any) -> None:
    """Of indices of any rank and values of any dtype; indices out of range are hot nowhere."""
    del name, args
    build = _Builder(graph, node)
    indices, depth, on, off = build.inputs
    axis = node.get_attr_value("axis", -1)
    rank = build.rank_of(indices)
    if axis != -1 and rank is None:
        raise ValueError("OneHot of indices of unknown rank")
    after = 0 if axis == -1 or rank is None else rank - axis  # dimensions behind the new one
    zero, one = build.constant(0, INT64), build.constant(1, INT64)
    depth = build.cast(depth, INT64)
    classes = build.add("Range", zero, depth, one)
    if after:
        classes = build.add("Reshape", classes, build.constant([-1] + [1] * after, INT64))
    axes = build.constant([axis], INT64)
    indices = build.add("Unsqueeze", build.cast(indices, INT64), axes)
    build.replace(build.where(build.add("Equal", indices, classes), on, off))


def mul_no_nan(graph: Any, node: Any, name: str, args: Any) -> None:
    """X * y, and 0 where y is 0."""
    del name, args
    build = _Builder(graph, node)
    x, y = build.inputs
    _zero_where_zero(build, y, build.add("Mul", x, y))


def xlogy(graph: Any, node: Any, name: str, args: Any) -> None:
    """X * log(y), and 0 where x is 0."""
    del name, args
    build = _Builder(graph, node)
    x, y = build.inputs
    _zero_where_zero(build, x, build.add("Mul", x, build.add("Log", y)))


def xdivy(graph: Any, node: Any, name: str, args: Any) -> None:
    """X / y, and 0 where x is 0."""
    del name, args
    build = _Builder(graph, node)
    x, y = build.inputs
    _zero_where_zero(build, x, build.add("Div", x, y))


def _zero_where_zero(build: _Builder, factor: str, value: str) -> None:
    zero = build.constant(0)
    build.replace(build.where(build.add("Equal", factor, zero), zero, value))


def log1p(graph: Any, node: Any, name: str, args: Any) -> None:
    """Log(1 + x), also of an x that is lost in 1 + x.

    What rounding leaves of x is u - 1 with u = 1 + x, and log(u) / (u - 1) hardly changes with it
    (N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 1.14).
    """
    del name, args
    build = _Builder(graph, node)
    (x,) = build.inputs
    one = build.constant(1)
    u = build.add("Add", one, x)
    log = build.add("Log", u)
    near = build.add("Div", build.add("Mul", log, x), build.add("Sub", u, one))
    _near_zero(build, u, near, log)


def expm1(graph: Any, node: Any, name: str, args: Any) -> None:
    """Exp(x) - 1, also of an x near 0, in the way of `log1p`."""
    del name, args
    build = _Builder(graph, node)
    (x,) = build.inputs
    one = build.constant(1)
    u = build.add("Exp", x)
    difference = build.add("Sub", u, one)
    near = build.add("Div", build.add("Mul", difference, x), build.add("Log", u))
    _near_zero(build, u, near, difference)


def _near_zero(build: _Builder, u: str, near: str, far: str) -> None:
    """The accurate value where |x| < ½, and x itself where u, which is near 1, is 1."""
    (x,) = build.inputs
    is_near = build.add("Less", build.add("Abs", x), build.constant(0.5))
    is_lost = build.add("Equal", u, build.constant(1))
    build.replace(build.where(is_lost, x, build.where(is_near, near, far)))


def erfc(graph: Any, node: Any, name: str, args: Any) -> None:
    """Erfc(x) = 1 - Erf(x); ONNX has Erf only.

    TensorFlow writes exact gelu as 0.5 x Erfc(-x / √2). Since Erf is odd this is
    0.5 x (1 + Erf(x / √2)), and spelled like that ONNX Runtime fuses it into one Gelu kernel.
    """
    del name, args
    build = _Builder(graph, node)
    one = build.constant(1)
    inner = _negated_half_root(node)
    if inner is None:
        build.replace(build.add("Sub", one, build.add("Erf", build.inputs[0])))
        return
    argument = build.add("Div", inner, build.constant(math.sqrt(2)))
    build.replace(build.add("Add", build.add("Erf", argument), one))


def _negated_half_root(node: Any) -> str | None:
    """The tensor x when the node's input is -x times √½, else None."""
    product = node.inputs[0]
    if product.type != "Mul":
        return None
    for factor, other in (product.inputs, reversed(product.inputs)):
        is_half_root = factor.is_const() and np.allclose(
            factor.get_tensor_value(as_list=False), np.sqrt(0.5), atol=1e-3
        )
        if is_half_root and other.type == "Neg":
            return str(other.input[0])
    return None
