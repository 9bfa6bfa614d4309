"""Zeros around what a pooling reads, kept from ONNX Runtime's optimizer."""

from __future__ import annotations

from typing import Any

import numpy as np

_NEVER_NEGATIVE = ("Abs", "Relu", "Sigmoid", "Softmax")
# What may stand between the two; the optimizer moves transposes before it fuses.
_PASSED = (
    "Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Reshape", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip


def keep_zeros(model: Any) -> int:
    """Keeps ONNX Runtime from fusing a Pad of zeros into the pooling that reads it.

    Its rule `Pad_Fusion` (`onnxruntime/core/optimizer/pad_fusion.cc`, seen in 1.31) adds the
    padding to the pooling's own. But MaxPool pads with minus infinity, so a window of negative
    values at the border loses its zeros, and AveragePool leaves its padding out of the mean, which
    only later versions respect. The rule skips a pooling that has `auto_pad=VALID`, another
    spelling of no padding, or that also returns indices. A MaxPool of values that are never
    negative is still fused.

    Args:
      model: changed in place; its weights may be in other files.

    Returns:
      How many poolings were changed.
    """
    return _keep_in_graph(model.graph, {})


def _keep_in_graph(graph: Any, outer: dict[str, Any]) -> int:
    producers = outer | {name: node for node in graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    count = 0
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                count += _keep_in_graph(inner, producers)
        if node.op_type in ("AveragePool", "MaxPool") and len(node.output) == 1:
            pad = _pad_before(node, producers)
            if pad is not None and not (
                node.op_type == "MaxPool"
                and _is_never_negative(_origin(pad.input[0], producers), constants)
            ):
                count += _protect(node)
    return count


def _pad_before(node: Any, producers: dict[str, Any]) -> Any | None:
    """The Pad with a constant that a pooling reads."""
    found = _origin(node.input[0], producers)
    if found is None or found.op_type != "Pad":
        return None
    modes = [item.s for item in found.attribute if item.name == "mode"]
    return found if modes in ([], [b"constant"]) else None


def _origin(name: str, producers: dict[str, Any]) -> Any | None:
    """The node that a tensor's values are from; None for inputs and constants."""
    found = producers.get(name)
    while found is not None and found.op_type in _PASSED:
        found = producers.get(found.input[0])
    return found


def _protect(node: Any) -> bool:
    """Rewrites a pooling that the rule would fuse as one that it skips; the values are the same."""
    from onnx import helper

    attributes = {item.name: item for item in node.attribute}
    if "auto_pad" in attributes and attributes["auto_pad"].s != b"NOTSET":
        return False
    has_padding = "pads" in attributes and any(attributes["pads"].ints)
    if not has_padding and not ("ceil_mode" in attributes and attributes["ceil_mode"].i):
        kept = [item for name, item in attributes.items() if name not in ("auto_pad", "pads")]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute("auto_pad", "VALID")])
        return True
    if node.op_type == "MaxPool":
        node.output.append(f"{node.output[0]}_indices")
        return True
    return False


def _is_never_negative(node: Any | None, constants: dict[str, Any]) -> bool:
    from onnx import TensorProto, numpy_helper

    if node is None:
        return False
    if node.op_type == "Clip":
        low = constants.get(node.input[1]) if len(node.input) > 1 else None
        if low is None or low.data_location == TensorProto.EXTERNAL:
            return False
        return bool(np.all(numpy_helper.to_array(low) >= 0))
    return node.op_type in _NEVER_NEGATIVE
