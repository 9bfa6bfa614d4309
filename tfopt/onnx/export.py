"""From a frozen TensorFlow graph to an ONNX model, with tf2onnx."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator
from typing import Any

from tfopt.errors import MAX_REASON, ConversionError, first_line
from tfopt.graph import FrozenGraph
from tfopt.onnx import operators
from tfopt.onnx.collecting import copies_collected
from tfopt.onnx.padding import keep_zeros

OPSET = 17  # the last that TensorRT 8.6 reads; nothing that later ones add is of use here
_FOLDED = re.compile(r"const_fold_opt__\d+")
_CALLS = r"(?:\w*PartitionedCall(?:_\d+)?/)*"
_UNSUPPORTED = re.compile(rf"Tensorflow op \[{_CALLS}(.+): (\w+)\] is not supported")


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
                custom_op_handlers=operators.handlers(),
            )
    except Exception as error:  # tf2onnx raises whatever its handlers raise
        raise ConversionError(_reason(unsupported.messages, first_line(error))) from error
    if unsupported.messages:
        raise ConversionError(_reason(unsupported.messages, unsupported.messages[-1]))
    renamed = dict(zip(graph.input_tensors, graph.signature.input_names, strict=True))
    renamed.update(zip(graph.output_tensors, graph.signature.output_names, strict=True))
    _rename_tensors(model.graph, renamed | _folded_in_order(model.graph))
    keep_zeros(model)
    initializers = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    del model.graph.initializer[:]
    model.graph.initializer.extend(initializers)
    return model


def _reason(messages: list[str], other: str) -> str:
    """Why tf2onnx refused: the operations, where it logged them, else what it raised."""
    found = [match.groups() for match in map(_UNSUPPORTED.match, messages) if match]
    if found:
        ops = ", ".join(sorted({op for _, op in found}))
        where = ", ".join(dict.fromkeys(name for name, _ in found))
        return (
            f"tf2onnx has no conversion for {ops} (in {where[:MAX_REASON]}). Another runtime may, "
            "or take it out of the model."
        )
    return f"tf2onnx cannot convert this model: {other[:MAX_REASON]}"


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
    """Keeps tf2onnx's errors about unsupported operators; it logs instead of raising."""

    def __init__(self, logger: logging.Logger):
        super().__init__(logging.ERROR)
        self.messages: list[str] = []
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> _Collect:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._logger.removeHandler(self)
