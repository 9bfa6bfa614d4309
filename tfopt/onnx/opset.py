"""The version of ONNX's operators that a model is written in."""

from __future__ import annotations

from typing import Any

from tfopt.errors import ConversionError
from tfopt.graph import first_line

IR_VERSION = 9  # came with opset 19


def raise_opset(model: Any, version: int) -> Any:
    """A model in at least this version of ONNX's operators.

    Args:
      model: stays as it is.
      version: such as 19, with which scales may be float16.

    Raises:
      ConversionError: when ONNX cannot convert an operator to the version.
    """
    import onnx

    found = max(item.version for item in model.opset_import if item.domain in ("", "ai.onnx"))
    if found >= version:
        return model
    try:
        raised = onnx.version_converter.convert_version(model, version)
    except Exception as error:  # of several kinds
        raise ConversionError(
            f"The ONNX model is written in version {found} of ONNX's operators and cannot be "
            f"brought to version {version}: {first_line(error)}"
        ) from error
    raised.ir_version = max(raised.ir_version, IR_VERSION)
    return raised
