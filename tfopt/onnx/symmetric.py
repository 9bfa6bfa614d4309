"""Symmetric int8 as TensorRT wants it: where pairs of Q and DQ stand, and their scales.

After NVIDIA's advice on explicit quantization (TensorRT documentation, "Explicit Quantization",
Q/DQ Layer-Placement Recommendations):

- All inputs of convolutions and of matrix products with constant weights have a pair. Products of
  two activations stay float, as TensorRT fuses attention in float16.
- Outputs have none, and biases and activation functions stay float, so that they are fused.
- Of an addition behind a convolution, the other input has a pair: convolution, addition and
  activation function become one kernel that reads the shortcut in int8.
- Inputs of average pooling have one. Those of maximum pooling need none: TensorRT moves a pair that
  follows to before it.

Every node has pairs of its own, and weights are float32 before their pair, as TensorRT 8 wants
them; later versions take that, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from tfopt.errors import ConversionError

OPS = (
    "Add", "AveragePool", "Conv", "ConvTranspose", "Gemm", "GlobalAveragePool", "MatMul",
)  # fmt: skip
"""The operators that are looked at."""

_SMALLEST, _LARGEST = 2.0**-24, 65504.0  # of float16


def insert_pairs(
    model: Any, limits: Mapping[str, float], per_channel: bool, excluded: Collection[str]
) -> None:
    """Puts pairs of Q and DQ into a model.

    Args:
      model: in float32, of opset 13 or later; changed in place.
      limits: the largest absolute value of each activation.
      per_channel: whether each channel of weights has a scale of its own.
      excluded: names of nodes that get none.

    Raises:
      ConversionError: when no node gets one.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    pairs: dict[int, list[Any]] = {}
    scales: dict[str, np.ndarray] = {}
    for number, index, axis in list(_places(graph, limits, excluded)):
        node = graph.node[number]
        tensor = node.input[index]
        axis = axis if per_channel else None
        scale = f"{tensor}_scale" if axis is None else f"{tensor}_scale_of_axis_{axis}"
        if scale not in scales:
            scales[scale] = scale_of(
                limits[tensor]
                if tensor in limits
                else _limit(numpy_helper.to_array(constants[tensor]), axis)
            )
        if node.op_type == "Conv" and tensor in constants:
            _tell_kernel_shape(node, constants[tensor])
        made = _pair(tensor, scale, f"{node.output[0]}_input_{index}", axis)
        node.input[index] = made[-1].output[0]
        pairs.setdefault(number, []).extend(made)
    if not pairs:
        raise ConversionError(
            "The model has no convolution or matrix product with constant weights for int8."
        )
    for name, values in scales.items():
        zeros = np.zeros(values.shape, np.int8)
        graph.initializer.append(numpy_helper.from_array(values, name))
        graph.initializer.append(numpy_helper.from_array(zeros, f"{name}_zero"))
    nodes = [made for i, node in enumerate(graph.node) for made in (*pairs.get(i, ()), node)]
    kept = type(graph)(node=nodes)
    graph.ClearField("node")
    graph.node.extend(kept.node)


def scale_of(limit: np.ndarray | float) -> np.ndarray:
    """The step of int8 for values up to a limit: the limit over 127.

    Rounded up to a number that float16 has, so that a float16 network has the same scales; the
    range grows by 0.1 % at most, where the step is at least 2**-14.

    Args:
      limit: largest absolute value, of the tensor or of each channel.

    Returns:
      float32 of the same shape, above 0.
    """
    step = np.asarray(limit, np.float64) / 127
    with np.errstate(over="ignore"):
        half = step.astype(np.float16)
        half = np.where(half < step, np.nextafter(half, np.float16(np.inf)), half)
    return np.where(step <= _LARGEST, np.maximum(half, _SMALLEST), step).astype(np.float32)


def quantize(
    values: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int
) -> np.ndarray:
    """What ONNX's QuantizeLinear makes: rounded to even, cut off at the ends of the type.

    Args:
      values: float.
      scale: for all, or of shape (channels,).
      zero_point: of the scale's shape; its type is the result's.
      axis: of the channels.
    """
    shape = [1] * values.ndim
    if scale.ndim:
        shape[axis] = -1
    ends = np.iinfo(zero_point.dtype)
    steps = np.rint(values / scale.reshape(shape)) + zero_point.astype(values.dtype).reshape(shape)
    return np.clip(steps, ends.min, ends.max).astype(zero_point.dtype)


def _tell_kernel_shape(node: Any, weights: Any) -> None:
    """Writes down what a pair hides: TensorRT before 10.4 takes it from the attribute only."""
    from onnx import helper

    if all(item.name != "kernel_shape" for item in node.attribute):
        node.attribute.append(helper.make_attribute("kernel_shape", list(weights.dims[2:])))


def _places(
    graph: Any, limits: Mapping[str, float], excluded: Collection[str]
) -> Iterator[tuple[int, int, int | None]]:
    """The numbers of node and input and, of weights, the axis of channels."""
    constants = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    makers = {name: (index, node) for index, node in enumerate(graph.node) for name in node.output}
    uses: dict[str, int] = {value.name: 1 for value in graph.output}
    for node in graph.node:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    for number, node in enumerate(graph.node):
        if node.name in excluded:
            continue
        if node.op_type == "ConvTranspose" and _num_groups(node) > 1:
            continue  # TensorRT 8 refuses them (https://github.com/NVIDIA/TensorRT/issues/1934)
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            first, second = node.input[:2]
            if first in limits and second in constants:
                yield number, 0, None
                yield number, 1, _channel_axis(node, len(constants[second]))
            elif node.op_type == "MatMul" and first in constants and second in limits:
                yield number, 0, None
                yield number, 1, None
        elif node.op_type in ("AveragePool", "GlobalAveragePool"):
            if node.input[0] in limits:
                yield number, 0, None
        elif node.op_type == "Add" and all(name in limits for name in node.input):
            fused = [
                (makers[name][0], index)
                for index, name in enumerate(node.input)
                if name in makers
                and makers[name][1].op_type in ("Conv", "ConvTranspose")
                and makers[name][1].name not in excluded
                and uses[name] == 1
            ]
            if fused:  # with the convolution that comes last
                yield number, 1 - max(fused)[1], None


def _channel_axis(node: Any, rank: int) -> int | None:
    """Of the output channels in a node's weights; None where one scale serves all."""
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        # TensorRT takes those of output channels and computes something else
        # (https://github.com/NVIDIA/TensorRT/issues/1694 and 2380).
        return None
    if node.op_type == "Gemm":
        return 0 if attributes.get("transB") else 1
    return 1 if rank == 2 else None


def _num_groups(node: Any) -> int:
    return next((item.i for item in node.attribute if item.name == "group"), 1)


def _limit(values: np.ndarray, axis: int | None) -> np.ndarray:
    """The largest absolute value, of all or of each channel."""
    others = tuple(other for other in range(values.ndim) if other != axis)
    return np.abs(values).max(axis=others, initial=0)


def _pair(tensor: str, scale: str, base: str, axis: int | None) -> list[Any]:
    from onnx import helper

    made, read = [], tensor
    for op_type, suffix in (("QuantizeLinear", "int8"), ("DequantizeLinear", "dequantized")):
        written = f"{base}_{suffix}"
        node = helper.make_node(
            op_type, [read, scale, f"{scale}_zero"], [written], name=f"{base}_{op_type}"
        )
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        made.append(node)
        read = written
    return made
