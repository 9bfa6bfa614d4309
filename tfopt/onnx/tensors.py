"""The tensors inside an ONNX graph whose values tell what quantization did."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

_KEEP_CHANNELS = ("Relu", "Clip", "LeakyRelu", "Add", "BatchNormalization", "DequantizeLinear",
                  "QuantizeLinear")  # fmt: skip
_OF_WEIGHTS = ("DequantizeLinear", "QuantizeLinear", "Transpose", "Cast", "Reshape")


class InnerTensor(NamedTuple):
    """A tensor between layers.

    Attributes:
      name: in the graph before quantization.
      shown: what to ask for: of a quantized tensor, its dequantized values.
      limits: lowest and highest value that its quantization has, or None.
      channel_axis: of a layer's channels, or None.
    """

    name: str
    shown: str
    limits: tuple[float, float] | None
    channel_axis: int | None


def floats_inside(model: Any) -> list[InnerTensor]:
    """The quantized activations of a QDQ graph, or every float32 tensor of another one.

    Args:
      model: after `onnx.shape_inference.infer_shapes`.
    """
    import onnx

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    dequantized = {
        node.input[0]: node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"
    }
    quantized = [
        InnerTensor(
            node.input[0], shown, limits, _channel_axis(node.input[0], producers, constants)
        )
        for node in graph.node
        if node.op_type == "QuantizeLinear"
        and node.input[0] not in constants
        and (shown := dequantized.get(node.output[0])) is not None
        and (limits := _limits(node, constants)) is not None
    ]
    floats = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    return quantized or [
        InnerTensor(name, name, None, _channel_axis(name, producers, constants))
        for name in producers
        if name in floats
    ]


def _limits(node: Any, constants: dict[str, Any]) -> tuple[float, float] | None:
    """What one scale and zero point for the whole tensor can hold."""
    from onnx import numpy_helper

    if len(node.input) < 3 or not all(name in constants for name in node.input[1:3]):
        return None
    scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
    if scale.size != 1 or zero_point.dtype.kind not in "iu":
        return None
    ends, zero = np.iinfo(zero_point.dtype), int(zero_point)
    return float((ends.min - zero) * scale), float((ends.max - zero) * scale)


def _channel_axis(name: str, producers: dict[str, Any], constants: dict[str, Any]) -> int | None:
    """Where a layer's channels are, looking back over what keeps them in place."""
    while (node := producers.get(name)) is not None:
        if node.op_type in ("Conv", "ConvTranspose"):
            return 1
        if node.op_type in ("MatMul", "Gemm"):  # of two activations it has no channels
            weights = node.input[1]
            while (maker := producers.get(weights)) is not None and maker.op_type in _OF_WEIGHTS:
                weights = maker.input[0]
            return -1 if weights in constants else None
        if node.op_type not in _KEEP_CHANNELS:
            return None
        name = node.input[0]
    return None
