"""The version of ONNX's operators that a model is written in."""

from __future__ import annotations

import re
from typing import Any

from tfopt.errors import ConversionError, first_line

IR_VERSION = 9  # came with opset 19


def raise_opset(model: Any, version: int) -> Any:
    """A model in at least this version of ONNX's operators.

    Args:
      model: stays as it is.
      version: such as 19, with which scales may be float16.

    Raises:
      ConversionError: when ONNX cannot convert an operator to the version.
    """
    if opset(model) >= version:
        return model
    raised = _convert(model, version)
    raised.ir_version = max(raised.ir_version, IR_VERSION)
    return raised


def lower_opset(model: Any, version: int) -> Any:
    """A model in at most this version of ONNX's operators, for what reads no later ones.

    Args:
      model: stays as it is.
      version: such as 17, the last that TensorRT 8.6 reads.

    Raises:
      ConversionError: when ONNX cannot convert an operator to the version.
    """
    import onnx

    if opset(model) <= version:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _prepare_reductions(copy.graph)
    lowered = _convert(copy, version)
    try:
        onnx.checker.check_model(lowered)
    except onnx.checker.ValidationError as error:
        raise ConversionError(f"{_cannot(model, version)}: {first_line(error)}") from error
    return lowered


def opset(model: Any) -> int:
    """The version of ONNX's operators that a model is written in."""
    return max(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))


def _convert(model: Any, version: int) -> Any:
    import onnx
    from onnx import inliner

    try:
        if model.functions:  # which the converter would drop without a word
            model = inliner.inline_local_functions(model, convert_version=True)
            if model.functions:
                raise ValueError(f"its function {model.functions[0].name} cannot be inlined")
        return onnx.version_converter.convert_version(model, version)
    except Exception as error:  # of several kinds
        adapter = re.search(r"No Adapter .*? for \w+", str(error))
        reason = adapter[0] if adapter else first_line(error)
        raise ConversionError(f"{_cannot(model, version)}: {reason}") from error


def _cannot(model: Any, version: int) -> str:
    return (
        f"The ONNX model is written in version {opset(model)} of ONNX's operators and cannot be "
        f"brought to version {version}"
    )


def _prepare_reductions(graph: Any) -> None:
    """Writes the axes of reductions as ONNX's converter wants them to bring them below 18.

    It leaves an attribute that no earlier version has and that says nothing where there are axes;
    and up to ONNX 1.17 it sees none where they are stored as bytes, and fails where two nodes
    share them.
    """
    import onnx

    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if not node.op_type.startswith("Reduce"):
            continue
        has_axes = len(node.input) > 1 and bool(node.input[1])
        if has_axes and node.input[1] in constants and not constants[node.input[1]].dims[0]:
            del node.input[1:]
            has_axes = False
        kept = [
            item for item in node.attribute
            if item.name != "noop_with_empty_axes" or (item.i and not has_axes)
        ]  # fmt: skip
        del node.attribute[:]
        node.attribute.extend(kept)
        if not has_axes:
            continue
        if node.input[1] in constants:
            axes = onnx.numpy_helper.to_array(constants[node.input[1]])
            node.input[1] = f"{node.output[0]}_axes"
            graph.initializer.append(
                onnx.helper.make_tensor(
                    node.input[1], onnx.TensorProto.INT64, axes.shape, axes.tolist()
                )
            )
