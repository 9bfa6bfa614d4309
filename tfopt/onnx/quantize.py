"""ONNX models in int8, with pairs of QuantizeLinear and DequantizeLinear (Q/DQ)."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import ConversionError, InputError
from tfopt.logs import only_errors
from tfopt.onnx import symmetric
from tfopt.onnx.calibration import onnxruntime_method, ranges
from tfopt.onnx.opset import raise_opset

FEW_EXAMPLES = 8
"""With fewer, the result says so: what they do not reach is cut off."""
QDQ = ("QuantizeLinear", "DequantizeLinear")
PRODUCTS = ("Clip", "Conv", "ConvTranspose", "Gemm", "MatMul", "Relu")
"""Where the arithmetic is, and the activation functions that are fused into it."""

_PER_CHANNEL = 13  # the opset that brought scales for each channel

Arrays = dict[str, np.ndarray]


def to_int8(
    file: Path,
    output: Path,
    batches: Iterable[Arrays],
    *,
    calibration: str,
    per_channel: bool,
    is_symmetric: bool,
    reduce_range: bool = False,
    only_products: bool = False,
    excluded: Collection[str] = (),
) -> list[str]:
    """Writes a model with pairs of quantization and dequantization.

    Ranges of activations are from real examples: their ends (`minmax`), what leaves out one value
    in 100,000 (`percentile`), or what minimizes the Kullback-Leibler divergence of histograms
    (`entropy`; of 512 bins where symmetric, else of 128); see
    https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.

    Args:
      file: an ONNX model in float32.
      output: the file to write.
      batches: real inputs.
      calibration: one of `calibration.METHODS`.
      per_channel: whether each channel of weights has a scale of its own.
      is_symmetric: int8 activations and weights, all zero points 0, where TensorRT wants them (see
        `tfopt.onnx.symmetric`). Otherwise uint8 activations and int8 weights of all operators
        that ONNX Runtime has integer kernels for, which suits x86.
      reduce_range: whether weights have 7 bits, where 8 would saturate; not with `is_symmetric`.
      only_products: whether everything but `PRODUCTS` stays float32. GELU and layer normalization
        are chains of products and sums in an ONNX file, and int8 loses their small differences.
      excluded: names of nodes that are not quantized.

    Returns:
      Sentences for the user.

    Raises:
      ConversionError: when there are no examples, or nothing can be quantized.
      InputError: when an excluded node is not there.
    """
    import onnx

    examples = _Counted(batches)
    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name, "prepared.onnx")
        _prepare(file, prepared, excluded)
        if only_products:
            nodes = onnx.load(prepared).graph.node
            excluded = {*excluded, *(n.name for n in nodes if n.op_type not in PRODUCTS)}
        if is_symmetric:
            notes = _to_s8s8(prepared, output, examples, calibration, per_channel, excluded)
        else:
            notes = _to_u8s8(
                prepared, output, examples, calibration, per_channel, reduce_range, excluded
            )
    if examples.count >= FEW_EXAMPLES:
        return notes
    noun = "example" if examples.count == 1 else "examples"
    return [
        *notes,
        f"Ranges of activations are from {examples.count} {noun} only, and what others reach is "
        f"cut off; give more `data`, at least {FEW_EXAMPLES} examples.",
    ]


def store_int8_weights(model: Any) -> None:
    """Quantizes constants where a QuantizeLinear stands behind them: a quarter of the size.

    TensorRT takes such weights from version 10 on, earlier ones float32 before a Q/DQ pair only.

    Args:
      model: changed in place.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    folded = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and all(name in constants for name in node.input):
            values, scale, *zero_point = (
                numpy_helper.to_array(constants[name]) for name in node.input
            )
            axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
            zeros = zero_point[0] if zero_point else np.zeros(scale.shape, np.uint8)
            if zeros.dtype in (np.int8, np.uint8) and scale.ndim <= 1:
                stored = symmetric.quantize(values, scale, zeros, axis)
                folded[node.output[0]] = numpy_helper.from_array(stored, node.output[0])
    nodes = [node for node in graph.node if node.output[0] not in folded]
    used = {name for node in nodes for name in node.input} | {v.name for v in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend([*kept, *folded.values()])


def _prepare(file: Path, prepared: Path, excluded: Collection[str]) -> None:
    """Infers shapes and fuses what need not be apart, unless that takes an excluded node away."""
    import onnx
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model = onnx.load(file)
    if unknown := set(excluded) - {node.name for node in model.graph.node}:
        raise InputError(
            f"The ONNX model has no node {min(unknown)!r} that could be left out of quantization; "
            "names are those of the nodes in the .onnx file."
        )
    model = raise_opset(model, _PER_CHANNEL)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{index}"
    whole = prepared.with_name("whole.onnx")  # with its weights
    onnx.save_model(model, whole)
    quant_pre_process(whole, prepared, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    if not set(excluded) <= {node.name for node in model.graph.node}:
        quant_pre_process(whole, prepared, skip_symbolic_shape=True, skip_optimization=True)
        model = onnx.load(prepared)
    _flatten_biases(model.graph)
    for index, node in enumerate(model.graph.node):  # of those that the optimizer made
        node.name = node.name or f"made_{index}"
    onnx.save_model(model, prepared)


def _flatten_biases(graph: Any) -> None:
    """Gives every Gemm a bias of shape (columns,) or none.

    ONNX allows whatever broadcasts to the result, and ONNX Runtime's quantizer fails for
    (1, columns), which its own optimizer makes of a product and a sum.
    """
    from onnx import helper, numpy_helper

    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type != "Gemm" or len(node.input) < 3 or node.input[1] not in constants:
            continue
        attributes = {item.name: item for item in node.attribute}
        weights, bias = constants[node.input[1]], constants.get(node.input[2])
        is_transposed = "transB" in attributes and attributes["transB"].i
        columns = weights.shape[0 if is_transposed else 1]
        if bias is not None and bias.shape == (columns,):
            continue
        output = node.output[0]
        if bias is not None and (bias.ndim < 2 or bias.shape[0] == 1):
            node.input[2] = f"{output}_bias"
            flat = np.ascontiguousarray(np.broadcast_to(bias.reshape(-1), (columns,)))
            graph.initializer.append(numpy_helper.from_array(flat, node.input[2]))
        elif "beta" not in attributes or attributes["beta"].f == 1:
            added = node.input.pop()
            node.output[0] = f"{output}_without_bias"
            nodes.append(
                helper.make_node("Add", [node.output[0], added], [output], f"{node.name}_bias")
            )
    made = type(graph)(node=nodes)
    graph.ClearField("node")
    graph.node.extend(made.node)


def _to_s8s8(
    prepared: Path,
    output: Path,
    batches: Iterator[Arrays],
    calibration: str,
    per_channel: bool,
    excluded: Collection[str],
) -> list[str]:
    import onnx

    found, not_finite = ranges(prepared, calibration, batches, symmetric.OPS, is_symmetric=True)
    limits = {
        name: float(np.abs(item.range_value).max())
        for name, item in found.data.items()
        if name not in not_finite
    }
    model = onnx.load(prepared)
    symmetric.insert_pairs(model, limits, per_channel, excluded)
    onnx.save_model(model, output)
    return _note_on(_users(model, not_finite, symmetric.OPS), not_finite)


def _to_u8s8(
    prepared: Path,
    output: Path,
    batches: Iterator[Arrays],
    calibration: str,
    per_channel: bool,
    reduce_range: bool,
    excluded: Collection[str],
) -> list[str]:
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import save_tensors_data
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    ops = {*QDQRegistry, *QLinearOpsRegistry}
    cache = prepared.with_name("ranges.json")
    found, not_finite = ranges(prepared, calibration, batches, ops, is_symmetric=False)
    for tensor in not_finite:
        found.data.pop(tensor, None)
    save_tensors_data(found, cache)
    kept = _users(onnx.load(prepared), not_finite, ops)
    # Its warning asks for the pre-processing that was just done.
    with only_errors(""):
        quantize_static(
            prepared,
            output,
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=per_channel,
            reduce_range=reduce_range,
            nodes_to_exclude=sorted({*excluded, *kept}),
            calibrate_method=onnxruntime_method(calibration),
            calibration_cache_path=cache,
        )
    if not any(node.op_type in QDQ for node in onnx.load(output).graph.node):
        raise ConversionError(" ".join(["No operation can be int8.", *_note_on(kept, not_finite)]))
    return _note_on(kept, not_finite)


def _users(model: Any, tensors: Collection[str], ops: Collection[str]) -> list[str]:
    """Names of nodes of some operators that read or make one of the tensors."""
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ops and {*node.input, *node.output} & set(tensors)
    ]


def _note_on(kept: Collection[str], not_finite: Collection[str]) -> list[str]:
    if not kept:
        return []
    names = ", ".join(sorted(not_finite)[:3]) + (" …" if len(not_finite) > 3 else "")
    what = "operation stays" if len(kept) == 1 else "operations stay"
    return [
        f"{len(kept)} {what} float32 beside NaN or infinite values, for which int8 has no range: "
        f"{names}."
    ]


class _Counted(Iterator[Arrays]):
    """Batches, and how many examples they had."""

    def __init__(self, batches: Iterable[Arrays]):
        self._batches = iter(batches)
        self.count = 0

    def __next__(self) -> Arrays:
        batch = next(self._batches)
        self.count += max(np.shape(value)[0] if np.ndim(value) else 1 for value in batch.values())
        return batch
