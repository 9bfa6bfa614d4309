"""ONNX Runtime, from ONNX files that tf2onnx makes: on CUDA where it was built for it, else CPU."""

from __future__ import annotations

import functools
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tfopt import half_graph
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.graph import first_line
from tfopt.logs import only_errors
from tfopt.measure import environment, suitability
from tfopt.measure.suitability import Suitability
from tfopt.onnx import tensors as onnx_tensors
from tfopt.onnx.export import to_onnx
from tfopt.runtimes.base import (
    Activation,
    Arrays,
    Conversion,
    Layer,
    Runtime,
    Session,
    precision,
)
from tfopt.signature import Signature, TensorSpec

FILE = "model.onnx"
CALIBRATION_CHUNK = 16  # batches whose activations the histogram calibrators hold at a time
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class OnnxRuntimeSession(Session):
    """An `onnxruntime.InferenceSession` with all graph optimizations on.

    With the package onnxruntime-gpu and an NVIDIA GPU it computes there, float32 in TF32 as is
    ONNX Runtime's default; CUDA_VISIBLE_DEVICES="" keeps it on the processor.
    """

    def __init__(
        self, artifact: Artifact, num_threads: int | None, profile_prefix: str | None = None
    ):
        super().__init__(artifact)
        import onnxruntime

        options = onnxruntime.SessionOptions()
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile_prefix
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        providers = _providers()
        self._session = onnxruntime.InferenceSession(
            str(artifact.folder / FILE), options, providers=providers
        )
        if providers[0] not in self._session.get_providers():  # it goes on without a word
            raise ConversionError(
                "ONNX Runtime cannot use the GPU: its libraries of CUDA or cuDNN are missing; "
                "install them (pip install 'onnxruntime-gpu[cuda,cudnn]'), or set "
                "CUDA_VISIBLE_DEVICES= to compute on the processor."
            )
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        try:
            outputs = self._session.run(None, inputs)
        except Exception as error:
            self.check_inputs(inputs, error)
            raise
        return dict(zip(self._names, outputs, strict=True))

    def end_profiling(self) -> list[dict[str, Any]]:
        """The events of all runs since the session was opened."""
        return json.loads(Path(self._session.end_profiling()).read_text())

    def close(self) -> None:  # noqa: D102
        del self._session


class OnnxRuntime(Runtime):
    """Converts with tf2onnx, quantizes with `onnxruntime.quantization`."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnxruntime-gpu", "onnx", "tf2onnx", "tensorflow")
    library = "onnxruntime"

    def missing(self) -> str | None:  # noqa: D102
        return None

    def load(self, artifact: Artifact, num_threads: int | None) -> Session:  # noqa: D102
        return OnnxRuntimeSession(artifact, num_threads)

    def layers(  # noqa: D102
        self, artifact: Artifact, batches: Sequence[Arrays], num_threads: int | None
    ) -> list[Layer]:
        with (
            tempfile.TemporaryDirectory() as name,
            OnnxRuntimeSession(artifact, num_threads, str(Path(name, "profile"))) as session,
        ):
            for batch in (batches[0], *batches):
                session.run(batch)
            events = session.end_profiling()
        begin = min(e["ts"] + e["dur"] for e in events if e["name"] == "model_run")
        nodes: dict[str, list[dict[str, Any]]] = {}
        for event in events:
            if event.get("cat") != "Node" or event["ts"] < begin:
                continue
            # What loops and branches run is listed by itself.
            if event["args"].get("op_name", "Loop") not in ("Loop", "If", "Scan"):
                nodes.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event)
        return [
            Layer(
                name=name,
                op=found[0]["args"]["op_name"],
                dtype=_dtype(found[0]["args"]),
                time_ms=sum(event["dur"] for event in found) / len(batches) / 1e3,
                executor=found[0]["args"].get("provider", ""),
            )
            for name, found in nodes.items()
        ]

    def activations(  # noqa: D102
        self, artifact: Artifact, batches: Iterable[Arrays]
    ) -> Iterator[Activation]:
        import onnx
        import onnxruntime

        model = onnx.shape_inference.infer_shapes(onnx.load(artifact.folder / FILE))
        tensors = onnx_tensors.floats_inside(model)
        del model.graph.output[:]
        model.graph.output.extend(
            onnx.helper.make_tensor_value_info(tensor.shown, onnx.TensorProto.FLOAT, None)
            for tensor in tensors
        )
        if not tensors:
            return
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as name:
            file = Path(name, FILE)
            onnx.save_model(model, file)
            session = onnxruntime.InferenceSession(str(file), options, providers=[CPU])
        for batch in batches:
            for tensor, values in zip(tensors, session.run(None, batch), strict=True):
                yield Activation(tensor.name, values, tensor.limits, tensor.channel_axis)

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
        suitability=lambda: _suitability("float16"),
    )
    def float16(self, conversion: Conversion) -> None:
        """Weights and computation in float16, inputs and outputs as they were: half the size.

        Operations whose values on real examples come near the largest of float16 (65504) stay
        float32. Gains on GPUs; the CPU kernels cast to float32 and back.
        """
        import onnx
        from onnxruntime.transformers.float16 import convert_float_to_float16
        from onnxruntime.transformers.onnx_model import OnnxModel

        loaded = onnx.load(_parent_file(conversion))
        large = self._beyond_float16(conversion, loaded)
        model = OnnxModel(
            convert_float_to_float16(loaded, keep_io_types=True, node_block_list=large)
        )
        if large:
            _join_float32(model)
            conversion.notes.append(half_graph.note_on_large(large))
        model.topological_sort()  # the casts of inputs were appended at the end
        _save(model.model, conversion.folder / FILE)

    def _beyond_float16(self, conversion: Conversion, model: Any) -> list[str]:
        """The nodes that read or make values too large for float16."""
        if conversion.calibration is None or conversion.parent is None:
            return []
        large = {
            found.name
            for found in self.activations(conversion.parent, conversion.calibration())
            if not np.abs(found.values).max(initial=0) <= half_graph.FLOAT16_LIMIT
        }
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"unnamed_{index}"  # they are kept by their names
        return [node.name for node in model.graph.node if large & {*node.input, *node.output}]

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


@functools.cache
def _providers() -> list[str]:
    """What computes, in order of preference."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers() or not environment.gpus():
        return [CPU]
    onnxruntime.preload_dlls()
    return [CUDA, CPU]


def _suitability(dtype: str) -> Suitability:
    if environment.gpus() and CUDA in _providers():
        return suitability.gpu(dtype, environment.gpus()[0].compute_capability)
    return Suitability(
        False,
        f"ONNX Runtime computes {dtype} on GPUs only, with the package onnxruntime-gpu; on CPUs "
        "it casts to float32 and back.",
    )


def _dtype(event: dict[str, Any]) -> str:
    """What a profiled node computes in."""
    if any(part in event["op_name"] for part in ("QLinear", "QGemm", "QAttention", "Integer")):
        return "int8"  # and uint8 activations
    if event["op_name"] == "DynamicQuantizeMatMul":
        return "int8"  # from float32 to float32
    types = [name for item in event.get("output_type_shape", ()) for name in item]
    known = {"float": "float32", "double": "float64"}
    return known.get(types[0], types[0]) if types else ""


def _join_float32(model: Any) -> None:
    """Hands float32 from one node that stays so to the next, where the converter casts between."""
    import onnx

    casts = {node.output[0]: node for node in model.nodes() if node.op_type == "Cast"}
    widened = [node for node in casts.values() if _cast_to(node) == onnx.TensorProto.FLOAT]
    for node in widened:
        before = casts.get(node.input[0])
        if before is not None and _cast_to(before) == onnx.TensorProto.FLOAT16:
            node.input[0] = before.input[0]  # ONNX Runtime drops what does nothing
    model.prune_graph()


def _cast_to(node: Any) -> int:
    return next(attribute.i for attribute in node.attribute if attribute.name == "to")


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
        onnxruntime.InferenceSession(str(file), options, providers=[CPU])
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


RUNTIME = OnnxRuntime()
