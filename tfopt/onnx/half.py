"""ONNX models in float16, by casts: what is rewritten and what stays float32."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import ConversionError, InputError, first_line
from tfopt.half_graph import FLOAT16_LIMIT
from tfopt.onnx.opset import raise_opset
from tfopt.onnx.quantize import QDQ, store_int8_weights
from tfopt.onnx.values import values_inside

_FLOAT16_SCALES = 19  # the opset that brought them


def to_float16(model: Any, float32_nodes: Collection[str] = ()) -> Any:
    """A model that computes in float16, with weights in float16.

    Inputs and outputs keep their types. Operations that ONNX Runtime has no float16 kernels for
    stay float32, too (`onnxruntime.transformers.float16.DEFAULT_OP_BLOCK_LIST`).

    What stands between quantization and dequantization stays int8, and scales become float16, so
    that the rest of a strongly typed network is float16. A pair stays float32 where float16 does
    not have its scale, before nodes that stay float32, and where inputs of the model are quantized.

    Args:
      model: in float32, from tf2onnx or PyTorch or `quantize.to_int8`; stays as it is.
      float32_nodes: names of nodes that stay float32; a node without a name is called `unnamed_3`
        by its place.

    Raises:
      InputError: when there is no such node.
      ConversionError: when it cannot be converted.
    """
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = _plain_copy(model)
    if unknown := set(float32_nodes) - {node.name for node in model.graph.node}:
        raise InputError(
            f"The ONNX model has no node {min(unknown)!r} that could stay float32; "
            "names are those of the nodes in the .onnx file."
        )
    kept = set(float32_nodes)
    is_quantized = any(node.op_type in QDQ for node in model.graph.node)
    if is_quantized:
        model = raise_opset(model, _FLOAT16_SCALES)
        store_int8_weights(model)
        _separate_scales(model)
        kept |= _float32_pairs(model, kept)
    try:
        found = OnnxModel(
            convert_float_to_float16(model, keep_io_types=True, node_block_list=sorted(kept))
        )
    except (onnx.shape_inference.InferenceError, ValueError, AssertionError) as error:
        raise ConversionError(
            f"The ONNX model cannot be converted to float16: {first_line(error)}"
        ) from error
    if kept:
        _join_float32(found, {node.name for node in model.graph.node})
    found.topological_sort()  # the casts of inputs were appended at the end
    return found.model


def beyond_float16(file: Path, batches: Iterable[dict[str, np.ndarray]]) -> list[str]:
    """The nodes that read or make values too large for float16 (`half_graph.FLOAT16_LIMIT`).

    Args:
      file: the model in float32, or one that `quantize.to_int8` wrote.
      batches: real inputs.

    Returns:
      Their names, as `to_float16` takes them.
    """
    import onnx

    model = onnx.shape_inference.infer_shapes(_plain_copy(onnx.load(file)))
    nodes = list(model.graph.node)
    floats = {
        value.name
        for value in (*model.graph.value_info, *model.graph.output)
        if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    names = [name for node in nodes for name in node.output if name in floats]
    large: set[str] = set()

    def look(found: dict[str, np.ndarray]) -> None:
        large.update(
            name for name, values in found.items()
            if values.dtype == np.float32 and not np.abs(values).max(initial=0) <= FLOAT16_LIMIT
        )  # fmt: skip

    def looked_at() -> Iterator[dict[str, np.ndarray]]:
        for batch in batches:
            look(batch)
            yield batch

    for found in values_inside(model, names, looked_at()):
        look(found)
    return [node.name for node in nodes if large & {*node.input, *node.output}]


def of_floats(file: Path, names: Iterable[str]) -> list[str]:
    """Those of the named nodes that compute float32 values only, as far as shape inference tells.

    Others have no precision that could be chosen, such as those that compute shapes.
    """
    import onnx

    wanted = set(names)
    model = onnx.shape_inference.infer_shapes(onnx.load(file))
    kinds = {
        value.name: value.type.tensor_type.elem_type
        for value in (*model.graph.value_info, *model.graph.output)
    }
    return [
        node.name
        for node in model.graph.node
        if node.name in wanted
        and node.op_type not in ("Cast", "QuantizeLinear", "DequantizeLinear")
        and all(
            kinds.get(name, onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
            for name in node.output
            if name
        )
    ]


def _plain_copy(model: Any) -> Any:
    """A copy without functions, whose nodes have names and whose inputs are no weights."""
    from onnx import inliner

    copy = type(model)()
    copy.CopyFrom(model)
    if copy.functions:
        copy = inliner.inline_local_functions(copy, convert_version=True)
    for index, node in enumerate(copy.graph.node):
        node.name = node.name or f"unnamed_{index}"
    weights = {tensor.name for tensor in copy.graph.initializer}
    inputs = [value for value in copy.graph.input if value.name not in weights]
    del copy.graph.input[:]
    copy.graph.input.extend(inputs)
    return copy


def _separate_scales(model: Any) -> None:
    """Gives every quantization and dequantization a scale of its own, as their types may differ."""
    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, node in enumerate(model.graph.node):
        if node.op_type in QDQ and node.input[1] in scales:
            own = model.graph.initializer.add()
            own.CopyFrom(scales[node.input[1]])
            own.name = node.input[1] = f"{own.name}_of_{index}"


def _float32_pairs(model: Any, kept: Collection[str]) -> set[str]:
    """The quantizations and dequantizations that stay float32.

    Args:
      model: whose scales are constants with one user each.
      kept: the other nodes that stay.
    """
    producers = {name: node.name for node in model.graph.node for name in node.output}
    inputs = {value.name for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    users: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, set()).add(node.name)
    scales = {tensor.name: tensor for tensor in model.graph.initializer}
    found = set()
    for node in model.graph.node:
        if node.op_type not in QDQ:
            continue
        if node.input[1] in scales and not _float16_has(scales[node.input[1]]):
            found.add(node.name)
        elif node.op_type == "QuantizeLinear":
            if node.input[0] in inputs or producers.get(node.input[0]) in kept:
                found.add(node.name)
        elif node.output[0] in outputs or users.get(node.output[0], set()) <= set(kept):
            found.add(node.name)
    return found


def _float16_has(scale: Any) -> bool:
    """Whether float16 has the values to 0.1 %."""
    from onnx import numpy_helper

    values = numpy_helper.to_array(scale).astype(np.float64)
    with np.errstate(over="ignore"):
        return bool(np.all(np.abs(values.astype(np.float16) - values) <= 1e-3 * np.abs(values)))


def _join_float32(model: Any, own: Collection[str]) -> None:
    """Hands float32 from one node that stays so to the next, where the converter casts between.

    Args:
      model: an ONNX Runtime `OnnxModel`.
      own: names of nodes that are not the converter's.
    """
    import onnx

    casts = {node.output[0]: node for node in model.nodes() if node.op_type == "Cast"}
    joined = {}
    for name, node in casts.items():
        before = casts.get(node.input[0])
        if (
            before is not None
            and _cast_to(node) == onnx.TensorProto.FLOAT
            and _cast_to(before) == onnx.TensorProto.FLOAT16
        ):
            node.input[0] = before.input[0]
            if before.name not in own:  # it was float32 already
                joined[name] = before.input[0]
    for node in model.nodes():
        for index, name in enumerate(node.input):
            while name in joined:
                name = joined[name]
            node.input[index] = name
    model.prune_graph()


def _cast_to(node: Any) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "to")
