"""From a frozen TensorFlow graph to an ONNX model, with tf2onnx."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfopt.errors import ConversionError, first_line
from tfopt.graph import FrozenGraph
from tfopt.onnx.collecting import copies_collected
from tfopt.onnx.padding import keep_zeros

OPSET = 17  # the last that TensorRT 8.6 reads; nothing that later ones add is of use here
_FOLDED = re.compile(r"const_fold_opt__\d+")


def to_onnx(graph: FrozenGraph) -> Any:
    """Converts a frozen graph to an ONNX model whose inputs and outputs bear signature names.

    Raises:
      ConversionError: names the operators that ONNX does not have.
    """
    from tf2onnx import convert

    graph = graph.inlined()
    unsupported = _Collect(logging.getLogger("tf2onnx.tfonnx"))
    try:
        with unsupported, _numbered_anew(), copies_collected():
            model, _ = convert.from_graph_def(
                graph.graph_def,
                input_names=list(graph.input_tensors),
                output_names=list(graph.output_tensors),
                opset=OPSET,
                custom_op_handlers={"Erfc": (_convert_erfc, [])},
            )
    except Exception as error:  # tf2onnx raises whatever its handlers raise
        reason = unsupported.message or first_line(error)
        raise ConversionError(f"tf2onnx cannot convert this model: {reason}") from error
    if unsupported.message:
        raise ConversionError(f"tf2onnx cannot convert this model: {unsupported.message}")
    renamed = dict(zip(graph.input_tensors, graph.signature.input_names, strict=True))
    renamed.update(zip(graph.output_tensors, graph.signature.output_names, strict=True))
    _rename_tensors(model.graph, renamed | _folded_in_order(model.graph))
    keep_zeros(model)
    initializers = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)
    return model


def _folded_in_order(graph: Any) -> dict[str, str]:
    """Names of folded constants by where they are used; tf2onnx numbers them as they come."""
    used = [name for node in graph.node for name in node.input if _FOLDED.fullmatch(name)]
    return {name: f"folded_{index}" for index, name in enumerate(dict.fromkeys(used))}


@contextlib.contextmanager
def _numbered_anew() -> Iterator[None]:
    """tf2onnx numbers what it names through the whole process.

    Numbered from the start, the same graph gives the same file: engines are found in the cache, and
    layers are called the same at each conversion.
    """
    from tf2onnx import utils

    before, utils.INTERNAL_NAME = utils.INTERNAL_NAME, 1
    try:
        yield
    finally:
        utils.INTERNAL_NAME = max(before, utils.INTERNAL_NAME)


def _convert_erfc(context: Any, node: Any, name: str, args: Any) -> None:
    """Erfc(x) = 1 - Erf(x); ONNX has Erf only.

    TensorFlow writes exact gelu as 0.5 x Erfc(-x / √2). Since Erf is odd this is
    0.5 x (1 + Erf(x / √2)), and spelled like that ONNX Runtime fuses it into one Gelu kernel.
    """
    dtype = np.dtype(
        {1: np.float32, 10: np.float16, 11: np.float64}[context.get_dtype(node.output[0])]
    )
    shapes, dtypes, outputs = node.output_shapes, node.output_dtypes, node.output
    one = context.make_const(f"{name}_one", np.array(1, dtype))
    inner = _negated_half_root(node)
    if inner is not None:
        root = context.make_const(f"{name}_root", np.array(np.sqrt(2), dtype))
        argument = context.make_node("Div", [inner, root.output[0]]).output[0]
        operation, left_is_one = "Add", False
    else:
        argument, operation, left_is_one = node.input[0], "Sub", True
    erf = context.make_node("Erf", [argument]).output[0]
    context.remove_node(node.name)
    operands = [one.output[0], erf] if left_is_one else [erf, one.output[0]]
    context.make_node(
        operation, operands, outputs=outputs, name=node.name, shapes=shapes, dtypes=dtypes
    )


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
            return other.input[0]
    return None


def _rename_tensors(graph: Any, names: dict[str, str]) -> None:
    for value in itertools.chain(graph.input, graph.output, graph.value_info, graph.initializer):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename_tensors(attribute.g, names)


class _Collect(logging.Handler):
    """Keeps tf2onnx's last error about unsupported operators; it logs instead of raising."""

    def __init__(self, logger: logging.Logger):
        super().__init__(logging.ERROR)
        self.message = ""
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()

    def __enter__(self) -> _Collect:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
