"""ONNX Runtime on the CPU, from ONNX files that tf2onnx makes."""

from __future__ import annotations

import itertools
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.graph import FrozenGraph, first_line
from tfopt.logs import only_errors
from tfopt.runtimes.base import Arrays, Conversion, Runtime, Session, precision
from tfopt.signature import Signature, TensorSpec

FILE = "model.onnx"
OPSET = 18  # the highest that tf2onnx writes
CALIBRATION_CHUNK = 16  # batches whose activations the histogram calibrators hold at a time
FLOAT16_REASON = (
    "CPUs compute float16 by casting to float32 and back, so it would only be slower; ask for it "
    "with --variants when size matters."
)


class OnnxRuntimeSession(Session):
    """An `onnxruntime.InferenceSession` with all graph optimizations on."""

    def __init__(self, artifact: Artifact, num_threads: int | None):
        super().__init__(artifact)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        self._session = onnxruntime.InferenceSession(
            str(artifact.folder / FILE), options, providers=["CPUExecutionProvider"]
        )
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        try:
            outputs = self._session.run(None, inputs)
        except Exception as error:
            self.check_inputs(inputs, error)
            raise
        return dict(zip(self._names, outputs, strict=True))

    def close(self) -> None:  # noqa: D102
        del self._session


class OnnxRuntime(Runtime):
    """Converts with tf2onnx, quantizes with `onnxruntime.quantization`."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnx", "tf2onnx", "tensorflow")
    library = "onnxruntime"

    def missing(self) -> str | None:  # noqa: D102
        return None

    def load(self, artifact: Artifact, num_threads: int | None) -> Session:  # noqa: D102
        return OnnxRuntimeSession(artifact, num_threads)

    def read_signature(self, path: Path) -> Signature:  # noqa: D102
        model = _read(path)
        initializers = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in initializers]
        return Signature("onnx", _specs(inputs), _specs(model.graph.output))

    @precision("float32", kinds=("saved_model", "onnx"), is_unchanged=True)
    def float32(self, conversion: Conversion) -> None:
        """The numbers as they are, as an ONNX file of opset 18."""
        if conversion.source.kind == "onnx":
            _copy_model(conversion.source.path, conversion.folder)
        else:
            _save(to_onnx(conversion.source.frozen_graph()), conversion.folder / FILE)

    @precision(
        "float16",
        kinds=("saved_model", "onnx"),
        parent="float32",
        unsuited=lambda: FLOAT16_REASON,
    )
    def float16(self, conversion: Conversion) -> None:
        """Weights and computation in float16, inputs and outputs as they were: half the size.

        Gains on GPUs; the CPU kernels cast to float32 and back.
        """
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        model = OnnxModel(
            convert_float_to_float16(onnx.load(_parent_file(conversion)), keep_io_types=True)
        )
        model.topological_sort()  # the casts of inputs were appended at the end
        _save(model.model, conversion.folder / FILE)

    @precision(
        "dynamic_range",
        kinds=("saved_model", "onnx"),
        parent="float32",
        is_batch_dependent=True,
    )
    def dynamic_range(self, conversion: Conversion) -> None:
        """int8 weights of MatMul and Gemm, activations quantized for each run; no calibration.

        Convolutions stay float32: ONNX Runtime's ConvInteger is slower than its float32 kernel.
        The activations' range is taken over the whole batch, so that outputs depend a little on
        what else is in it.
        """
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        file = conversion.folder / FILE
        quantize_dynamic(
            _parent_file(conversion),
            file,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        num_quantized = sum("Integer" in node.op_type for node in onnx.load(file).graph.node)
        if not num_quantized:
            raise ConversionError("The model has no MatMul or Gemm with constant weights.")
        conversion.notes.append(f"{num_quantized} matrix products are int8; the rest is float32.")

    @precision(
        "int8",
        options={
            "calibration": ("minmax", "percentile", "entropy"),
            "per_channel": (True, False),
        },
        tried=(
            {},
            {"calibration": "percentile"},
            {"calibration": "entropy"},
            {"per_channel": False},
        ),
        kinds=("saved_model", "onnx"),
        parent="float32",
        is_calibrated=True,
    )
    def int8(self, conversion: Conversion, calibration: str, per_channel: bool) -> None:
        """uint8 activations and int8 weights in QDQ form, all supported operators.

        ONNX Runtime's advice for x86 with VNNI; its default (int8 activations) is slower than
        float32 on convolutions. Percentile is the 99.999th, entropy minimizes the
        Kullback-Leibler divergence of histograms with 128 bins
        (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
        """
        from onnxruntime.quantization import (
            CalibrationMethod,
            QuantFormat,
            QuantType,
            quantize_static,
        )
        from onnxruntime.quantization.shape_inference import quant_pre_process

        method = {
            "minmax": CalibrationMethod.MinMax,
            "percentile": CalibrationMethod.Percentile,
            "entropy": CalibrationMethod.Entropy,
        }[calibration]
        with tempfile.TemporaryDirectory() as name:
            prepared = Path(name, "prepared.onnx")
            quant_pre_process(_parent_file(conversion), prepared, skip_symbolic_shape=True)
            ranges = Path(name, "ranges.json")
            _calibrate(prepared, method, conversion.calibration_batches(), ranges)
            # Its warning asks for the pre-processing that was just done.
            with only_errors(""):
                quantize_static(
                    prepared,
                    conversion.folder / FILE,
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    per_channel=per_channel,
                    calibrate_method=method,
                    calibration_cache_path=ranges,
                )
        _check(conversion.folder / FILE)


def to_onnx(graph: FrozenGraph) -> Any:
    """Converts a frozen graph to an ONNX model whose inputs and outputs bear signature names.

    Raises:
      ConversionError: names the operators that ONNX does not have.
    """
    from tf2onnx import convert

    unsupported = _Collect(logging.getLogger("tf2onnx.tfonnx"))
    try:
        with unsupported:
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
    _rename_tensors(model.graph, renamed)
    return model


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


def _save(model: Any, file: Path) -> None:
    import onnx

    onnx.save_model(model, file)
    _check(file)


def _check(file: Path) -> None:
    """Checks an ONNX file with `onnx.checker` and by loading it.

    Raises:
      ConversionError: when either refuses it.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(file))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # neither has a common base class for its errors
        raise ConversionError(f"The ONNX file is not valid: {first_line(error)[:300]}") from error


def _calibrate(
    file: Path, method: Any, batches: Iterator[Arrays], ranges: Path
) -> None:  # fmt: skip
    """Finds the range of every activation and writes it where `quantize_static` reads it.

    The histogram calibrators hold all activations of all batches that one `collect_data` call
    reads, so they get a few batches at a time.
    """
    from onnxruntime.quantization.calibrate import create_calibrator, save_tensors_data
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    calibrator = create_calibrator(
        file,
        sorted({*QDQRegistry, *QLinearOpsRegistry}),
        augmented_model_path=str(file.with_name("augmented.onnx")),
        calibrate_method=method,
        extra_options={"symmetric": False},
    )
    batches = iter(batches)
    while chunk := list(itertools.islice(batches, CALIBRATION_CHUNK)):
        calibrator.collect_data(_Reader(chunk))
    save_tensors_data(calibrator.compute_data(), ranges)


class _Reader:
    """The reader that ONNX Runtime's calibrators ask for: one batch a call, then None."""

    def __init__(self, batches: Iterable[Arrays]):
        self._batches = iter(batches)

    def get_next(self) -> Arrays | None:
        return next(self._batches, None)


def _parent_file(conversion: Conversion) -> Path:
    if conversion.parent is None:
        raise ConversionError("This precision starts from float32@onnxruntime, which is missing.")
    return conversion.parent.folder / FILE


def _read(path: Path) -> Any:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise InputError(f"{path} is no ONNX model: the file is damaged.") from error
    for name in _external_files(model):
        if name.is_absolute() or ".." in name.parts:
            raise InputError(
                f"{path} keeps weights at {name}, outside its folder; this is refused, save the "
                "model again with its weights beside it."
            )
    return model


def _external_files(model: Any) -> set[PurePosixPath]:
    return {
        PurePosixPath(entry.value)
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }


def _copy_model(path: Path, folder: Path) -> None:
    for name in _external_files(_read(path)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / name, folder / name)
    shutil.copyfile(path, folder / FILE)
    _check(folder / FILE)


def _specs(values: Iterable[Any]) -> tuple[TensorSpec, ...]:
    import onnx

    specs = []
    for value in values:
        tensor = value.type.tensor_type
        is_string = tensor.elem_type == onnx.TensorProto.STRING
        dtype = (
            "string" if is_string else onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        )
        shape = (
            tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
            if tensor.HasField("shape")
            else None
        )
        specs.append(TensorSpec(value.name, shape, dtype))
    return tuple(sorted(specs, key=lambda spec: spec.name))


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


RUNTIME = OnnxRuntime()
