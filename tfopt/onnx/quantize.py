"""ONNX models in int8, with pairs of QuantizeLinear and DequantizeLinear (Q/DQ)."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import ConversionError, InputError
from tfopt.logs import only_errors
from tfopt.onnx import symmetric
from tfopt.onnx.opset import raise_opset

CALIBRATIONS = ("minmax", "percentile", "entropy")
FEW_EXAMPLES = 8
"""With fewer, the result says so: what they do not reach is cut off."""
QDQ = ("QuantizeLinear", "DequantizeLinear")

_PER_CHANNEL = 13  # the opset that brought scales for each channel
_ENTROPY_BINS = 512  # of ONNX Runtime's 128 symmetric int8 leaves only the whole range to choose
_CHUNK = 16  # batches whose activations the histogram calibrators hold at a time

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
      calibration: one of `CALIBRATIONS`.
      per_channel: whether each channel of weights has a scale of its own.
      is_symmetric: int8 activations and weights, all zero points 0, where TensorRT wants them (see
        `tfopt.onnx.symmetric`). Otherwise uint8 activations and int8 weights of all operators
        that ONNX Runtime has integer kernels for, which suits x86.
      reduce_range: whether weights have 7 bits, where 8 would saturate; not with `is_symmetric`.
      excluded: names of nodes that are not quantized.

    Returns:
      Sentences for the user.

    Raises:
      ConversionError: when there are no examples, or nothing can be quantized.
      InputError: when an excluded node is not there.
    """
    examples = _Counted(batches)
    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name, "prepared.onnx")
        _prepare(file, prepared, excluded)
        if is_symmetric:
            _to_s8s8(prepared, output, examples, calibration, per_channel, excluded)
        else:
            _to_u8s8(prepared, output, examples, calibration, per_channel, reduce_range, excluded)
    if examples.count >= FEW_EXAMPLES:
        return []
    noun = "example" if examples.count == 1 else "examples"
    return [
        f"Ranges of activations are from {examples.count} {noun} only, and what others reach is "
        f"cut off; give more data (--data), at least {FEW_EXAMPLES} examples."
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
    whole = prepared.with_name("whole.onnx")  # with its weights
    onnx.save_model(raise_opset(model, _PER_CHANNEL), whole)
    quant_pre_process(whole, prepared, skip_symbolic_shape=True)
    if not set(excluded) <= {node.name for node in onnx.load(prepared).graph.node}:
        quant_pre_process(whole, prepared, skip_symbolic_shape=True, skip_optimization=True)


def _to_s8s8(
    prepared: Path,
    output: Path,
    batches: Iterator[Arrays],
    calibration: str,
    per_channel: bool,
    excluded: Collection[str],
) -> None:
    import onnx

    ranges = _ranges(prepared, calibration, batches, symmetric.OPS, is_symmetric=True)
    limits = {
        name: limit
        for name, found in ranges.data.items()
        if np.isfinite(limit := float(np.abs(found.range_value).max()))
    }
    model = onnx.load(prepared)
    symmetric.insert_pairs(model, limits, per_channel, excluded)
    onnx.save_model(model, output)


def _to_u8s8(
    prepared: Path,
    output: Path,
    batches: Iterator[Arrays],
    calibration: str,
    per_channel: bool,
    reduce_range: bool,
    excluded: Collection[str],
) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import save_tensors_data
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    ops = {*QDQRegistry, *QLinearOpsRegistry}
    cache = prepared.with_name("ranges.json")
    ranges = _ranges(prepared, calibration, batches, ops, is_symmetric=False)
    save_tensors_data(ranges, cache)
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
            nodes_to_exclude=sorted(excluded),
            calibrate_method=_method(calibration),
            calibration_cache_path=cache,
        )


def _ranges(
    file: Path,
    calibration: str,
    batches: Iterator[Arrays],
    ops: Collection[str],
    *,
    is_symmetric: bool,
) -> Any:
    """Ranges of what operators read and make, as ONNX Runtime's `TensorsData`.

    The histogram calibrators hold all activations of all batches that one `collect_data` call
    reads, so they get a few batches at a time.
    """
    from onnxruntime.quantization.calibrate import create_calibrator

    options: dict[str, bool | int] = {"symmetric": is_symmetric}
    if is_symmetric and calibration == "entropy":
        options["num_bins"] = _ENTROPY_BINS
    calibrator = create_calibrator(
        file,
        sorted(ops),
        augmented_model_path=str(file.with_name("augmented.onnx")),
        calibrate_method=_method(calibration),
        extra_options=options,
    )
    is_empty = True
    while chunk := list(itertools.islice(batches, _CHUNK)):
        calibrator.collect_data(_Reader(chunk))
        is_empty = False
    if is_empty:
        raise ConversionError(
            "int8 is calibrated on real examples and there are none; give more data (--data)."
        )
    return calibrator.compute_data()


def _method(calibration: str) -> Any:
    from onnxruntime.quantization import CalibrationMethod

    methods = (
        CalibrationMethod.MinMax, CalibrationMethod.Percentile, CalibrationMethod.Entropy,
    )  # fmt: skip
    return dict(zip(CALIBRATIONS, methods, strict=True))[calibration]


class _Counted(Iterator[Arrays]):
    """Batches, and how many examples they had."""

    def __init__(self, batches: Iterable[Arrays]):
        self._batches = iter(batches)
        self.count = 0

    def __next__(self) -> Arrays:
        batch = next(self._batches)
        self.count += max(np.shape(value)[0] if np.ndim(value) else 1 for value in batch.values())
        return batch


class _Reader:
    """The reader that ONNX Runtime's calibrators ask for: one batch a call, then None."""

    def __init__(self, batches: Iterable[Arrays]):
        self._batches = iter(batches)

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)
