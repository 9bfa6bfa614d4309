"""What is in a `.tflite` file, by LiteRT's own schema.

The schema: https://github.com/google-ai-edge/LiteRT/blob/main/tflite/converter/schema/schema.fbs
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfopt.errors import ConversionError
from tfopt.graph import SIGNATURE_KEY

_QUANTIZED_TYPES = ("INT4", "INT8", "UINT8", "INT16")


def read(content: bytes) -> Any:
    """Parses a file into a `ModelT`, which can be changed."""
    from ai_edge_litert import schema_py_generated as schema

    return schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))


def op_name(model: Any, operator: Any) -> str:
    """The name of an operation, as in `CONV_2D`."""
    code = model.operatorCodes[operator.opcodeIndex]
    return _names("BuiltinOperator").get(max(code.builtinCode, code.deprecatedBuiltinCode), "?")


def type_name(tensor: Any) -> str:
    """The type of a tensor, as in `FLOAT32`."""
    return _names("TensorType").get(tensor.type, "?")


def text(value: bytes | str) -> str:
    """A name; flatbuffers hold bytes."""
    return value.decode() if isinstance(value, bytes) else value


def quantized_tensors(model: Any) -> Iterator[Any]:
    """Tensors with a scale, and weights in float16."""
    for subgraph in model.subgraphs:
        for tensor in subgraph.tensors:
            kind, scales = type_name(tensor), getattr(tensor.quantization, "scale", None)
            is_quantized = kind in _QUANTIZED_TYPES and scales is not None and len(scales) > 0
            if is_quantized or (
                kind == "FLOAT16" and model.buffers[tensor.buffer].data is not None
            ):
                yield tensor


def with_float32_weights(content: bytes) -> bytes:
    """The file with weights in float32 where they are float16 and widened when it is loaded.

    Returns:
      The same bytes where there is nothing to change.

    Raises:
      ConversionError: when the weights lie behind the flatbuffer, as in files beyond 2 GB.
    """
    model = read(content)
    halves = []
    for subgraph in model.subgraphs:
        kept = []
        for operator in subgraph.operators or []:
            if (weights := _float16_weights(model, subgraph, operator)) is None:
                kept.append(operator)
                continue
            buffer = type(model.buffers[0])()
            buffer.data = np.frombuffer(weights.astype(np.float32).tobytes(), np.uint8)
            subgraph.tensors[operator.outputs[0]].buffer = len(model.buffers)
            model.buffers.append(buffer)
            halves.append(subgraph.tensors[operator.inputs[0]])
        subgraph.operators = kept
    for tensor in halves:  # which nothing reads any more
        tensor.buffer = 0
    _drop_unused_buffers(model)
    return _write(model) if halves else content


def _float16_weights(model: Any, subgraph: Any, operator: Any) -> np.ndarray | None:
    """What an operation widens to float32; None unless these are constants in float16."""
    if op_name(model, operator) != "DEQUANTIZE":
        return None
    tensor = subgraph.tensors[operator.inputs[0]]
    data = model.buffers[tensor.buffer].data
    if type_name(tensor) != "FLOAT16" or data is None:
        return None
    return np.frombuffer(bytes(data), np.float16)


def only_signature(content: bytes, key: str) -> bytes:
    """The file without other signatures; the subgraph of the one becomes the first.

    Interpreters set and read tensors of the first subgraph.

    Args:
      content: of the file.
      key: of the signature to keep.

    Returns:
      The same bytes where there is nothing to change, or no signature.

    Raises:
      ConversionError: when the weights lie behind the flatbuffer, as in files beyond 2 GB.
    """
    model = read(content)
    signatures = model.signatureDefs or []
    kept = next((s for s in signatures if text(s.signatureKey) == key), None)
    if kept is None or (len(signatures) == 1 and kept.subgraphIndex == 0):
        return content
    _keep_subgraphs(model, kept)
    return _write(model)


def with_signature(content: bytes) -> bytes:
    """The file with a signature, which has the names of the tensors where there was none.

    Raises:
      ConversionError: when the weights lie behind the flatbuffer, as in files beyond 2 GB.
    """
    model = read(content)
    if model.signatureDefs:
        return content
    model.signatureDefs = [_made_signature(model.subgraphs[0])]
    return _write(model)


def called_subgraphs(operator: Any) -> Iterator[tuple[Any, str]]:
    """Where an operation names a subgraph that it runs: the object, and its attribute."""
    for options in (operator.builtinOptions, operator.builtinOptions2):
        for name in vars(options) if options is not None else ():
            if name == "subgraph" or name.endswith(("SubgraphIndex", "SubgraphIndices")):
                yield options, name


def _write(model: Any) -> bytes:
    from ai_edge_litert.tools import flatbuffer_utils

    if any(buffer.offset > 1 for buffer in model.buffers):
        raise ConversionError(
            "The weights of this .tflite file lie behind its flatbuffer, as in files beyond 2 GB, "
            "and its signatures cannot be changed; convert the model again with one signature."
        )
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _made_signature(subgraph: Any) -> Any:
    from ai_edge_litert import schema_py_generated as schema

    def ports(indices: Any) -> list[Any]:
        found = []
        for index in indices:
            port = schema.TensorMapT()
            port.name, port.tensorIndex = subgraph.tensors[index].name, int(index)
            found.append(port)
        return found

    made = schema.SignatureDefT()
    made.signatureKey, made.subgraphIndex = SIGNATURE_KEY, 0
    made.inputs, made.outputs = ports(subgraph.inputs), ports(subgraph.outputs)
    return made


def _keep_subgraphs(model: Any, signature: Any) -> None:
    """Drops what a signature does not run, and its weights."""
    kept = [signature.subgraphIndex]
    for index in kept:  # grows
        for operator in model.subgraphs[index].operators or []:
            for options, name in called_subgraphs(operator):
                kept += [i for i in _indices(options, name) if i >= 0 and i not in kept]
    places = {index: place for place, index in enumerate(kept)}
    model.subgraphs = [model.subgraphs[index] for index in kept]
    for subgraph in model.subgraphs:
        for operator in subgraph.operators or []:
            for options, name in called_subgraphs(operator):
                found = [places.get(index, index) for index in _indices(options, name)]
                setattr(options, name, found if name.endswith("Indices") else found[0])
    signature.subgraphIndex = 0
    model.signatureDefs = [signature]
    _drop_unused_buffers(model)


def _drop_unused_buffers(model: Any) -> None:
    used = {tensor.buffer for subgraph in model.subgraphs for tensor in subgraph.tensors}
    used |= {metadata.buffer for metadata in model.metadata or []}
    for index, buffer in enumerate(model.buffers):
        if index not in used:
            buffer.data = None


def _indices(options: Any, name: str) -> list[int]:
    value = getattr(options, name)
    if name.endswith("Indices"):
        return [] if value is None else [int(index) for index in value]
    return [int(value)]


@functools.cache
def _names(kind: str) -> dict[int, str]:
    from ai_edge_litert import schema_py_generated as schema

    found = vars(getattr(schema, kind)).items()
    return {value: name for name, value in found if isinstance(value, int)}
