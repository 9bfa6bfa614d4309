"""ONNX Runtime, from ONNX files that tf2onnx makes: on CUDA where it was built for it, else CPU."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tfopt import cuda, half_graph
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError, first_line
from tfopt.graph import SIGNATURE_KEY
from tfopt.measure import environment, suitability
from tfopt.measure.suitability import Suitability
from tfopt.onnx import calibration as calibrations
from tfopt.onnx import half, quantize
from tfopt.onnx import tensors as onnx_tensors
from tfopt.onnx.export import to_onnx
from tfopt.onnx.padding import keep_zeros
from tfopt.onnx.values import values_inside
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
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
WARM_UP_RUNS = 3
INSTALL = "pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'"


class OnnxRuntimeSession(Session):
    """An `onnxruntime.InferenceSession` with all graph optimizations on.

    With the package onnxruntime-gpu and an NVIDIA GPU it computes there, float32 in TF32 unless the
    variant says otherwise; CUDA_VISIBLE_DEVICES="" keeps it on the processor. Where cuda-bindings
    is installed it computes on a stream of ours, so that events can be put into it.
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
        self._stream: cuda.Stream | None = None
        with contextlib.ExitStack() as stack:
            providers: list[Any] = [CPU]
            if _providers()[0] == CUDA:
                # Not before: TensorFlow, if it is in this process, would take this cuDNN, too.
                onnxruntime.preload_dlls()
                # Else biases become int32 in the hope of kernels that CUDA has not.
                options.add_session_config_entry("session.disable_quant_qdq", "1")
                if cuda.missing() is None:
                    self._stream = stack.enter_context(cuda.Stream())
                providers = [(CUDA, self._cuda_options()), CPU]
            self._session = onnxruntime.InferenceSession(
                str(artifact.folder / FILE), options, providers=providers
            )
            if _providers()[0] not in self._session.get_providers():  # it goes on without a word
                raise ConversionError(
                    "ONNX Runtime cannot use the GPU: its libraries of CUDA or cuDNN are missing; "
                    "install them (pip install 'onnxruntime-gpu[cuda,cudnn]'), or set "
                    "CUDA_VISIBLE_DEVICES= to compute on the processor."
                )
            self._opened = stack.pop_all()
        self._names = [output.name for output in self._session.get_outputs()]

    def _cuda_options(self) -> dict[str, str]:
        """Options of the CUDA provider.

        https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html
        """
        tf32 = dict(self.artifact.variant.options).get("tf32", True)
        found = {"use_tf32": "1" if tf32 else "0"}
        if self._stream is not None:
            found["user_compute_stream"] = str(self._stream.handle)
        return found

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        try:
            outputs = self._session.run(None, inputs)
        except Exception as error:
            self.check_inputs(inputs, error)
            raise
        return dict(zip(self._names, outputs, strict=True))

    def device_seconds(self, inputs: Arrays, num_runs: int) -> list[float] | None:  # noqa: D102
        ends = (*self._session.get_inputs(), *self._session.get_outputs())
        if self._stream is None or any(end.type == "tensor(string)" for end in ends):
            return None
        import onnxruntime

        binding = self._session.io_binding()
        try:
            for name, value in inputs.items():
                on_device = onnxruntime.OrtValue.ortvalue_from_numpy(
                    np.asarray(value, order="C"), "cuda", 0
                )
                binding.bind_ortvalue_input(name, on_device)
            for name in self._names:
                binding.bind_output(name, "cuda", 0)
            binding.synchronize_inputs()
            for _ in range(WARM_UP_RUNS):
                self._session.run_with_iobinding(binding)
        except Exception as error:
            self.check_inputs(inputs, error)
            raise
        options = onnxruntime.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return cuda.seconds_of_runs(
            lambda: self._session.run_with_iobinding(binding, options), num_runs, self._stream
        )

    def end_profiling(self) -> list[dict[str, Any]]:
        """The events of all runs since the session was opened."""
        return json.loads(Path(self._session.end_profiling()).read_text())

    def close(self) -> None:  # noqa: D102
        del self._session
        self._opened.close()


class OnnxRuntime(Runtime):
    """Converts with tf2onnx, quantizes with `onnxruntime.quantization`."""

    name = "onnxruntime"
    packages = ("onnxruntime", "onnxruntime-gpu", "onnx", "tf2onnx", "tensorflow")
    library = "onnxruntime"
    has_own_cuda = True

    def missing(self) -> str | None:  # noqa: D102
        return None

    def remarks(self) -> list[str]:  # noqa: D102
        if not environment.gpus():
            return []
        if _providers()[0] == CUDA:
            return [f"It computes on {environment.gpus()[0].name} (CUDA)."]
        return [
            "It computes on the processor and not on "
            f"{environment.gpus()[0].name}: the installed onnxruntime has no CUDA; {INSTALL}."
        ]

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
        # On a GPU the times are those of launching a node, and beside them others mean nothing.
        is_told = all(
            found[0]["args"].get("provider", "") in ("", "CPUExecutionProvider")
            for found in nodes.values()
        )
        return [
            Layer(
                name=name,
                op=found[0]["args"]["op_name"],
                dtype=_dtype(found[0]["args"]),
                time_ms=sum(event["dur"] for event in found) / len(batches) / 1e3
                if is_told
                else None,
                executor=found[0]["args"].get("provider", ""),
            )
            for name, found in nodes.items()
        ]

    def activations(  # noqa: D102
        self, artifact: Artifact, batches: Iterable[Arrays]
    ) -> Iterator[Activation]:
        import onnx

        model = onnx.shape_inference.infer_shapes(onnx.load(artifact.folder / FILE))
        # A tensor may be quantized once for each of its readers, always alike.
        tensors = {tensor.name: tensor for tensor in onnx_tensors.floats_inside(model)}
        shown = [tensor.shown for tensor in tensors.values()]
        for found in values_inside(model, shown, batches):
            for name, tensor in tensors.items():
                yield Activation(name, found[tensor.shown], tensor.limits, tensor.channel_axis)

    def read_signature(self, path: Path, key: str = SIGNATURE_KEY) -> Signature:  # noqa: D102
        del key
        model = _read(path)
        initializers = {tensor.name for tensor in model.graph.initializer}
        inputs = [value for value in model.graph.input if value.name not in initializers]
        return Signature("onnx", _specs(inputs), _specs(model.graph.output))

    @precision(
        "float32",
        options={"tf32": (True, False)},
        kinds=("saved_model", "onnx"),
        is_unchanged=True,
    )
    def float32(self, conversion: Conversion, tf32: bool) -> None:
        """The numbers as they are, as an ONNX file of opset 17.

        On NVIDIA GPUs since Ampere convolutions and matrix products are computed in TF32, with ten
        bits of mantissa instead of 23, unless `tf32=False`.
        """
        if conversion.source.kind == "onnx":
            conversion.notes += _copy_model(conversion.source.path, conversion.folder)
        else:
            _save(to_onnx(conversion.source.frozen_graph()), conversion.folder / FILE)
        if _providers()[0] == CUDA:
            conversion.notes.append(
                "On CUDA, float32 is computed in TF32 where the GPU has it (compute capability 8.0 "
                "and later): ten bits of mantissa instead of 23."
                if tf32
                else "On CUDA, float32 is computed without TF32."
            )

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

        file = _parent_file(conversion)
        large = [] if conversion.calibration is None else half.beyond_float16(
            file, conversion.calibration()
        )  # fmt: skip
        if large:
            conversion.notes.append(half_graph.note_on_large(large))
        _save(half.to_float16(onnx.load(file), large), conversion.folder / FILE)

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
            reduce_range=_reduce_range(conversion),
            weight_type=QuantType.QInt8,
        )
        num_quantized = sum("Integer" in node.op_type for node in onnx.load(file).graph.node)
        if not num_quantized:
            raise ConversionError("The model has no MatMul or Gemm with constant weights.")
        conversion.notes.append(f"{num_quantized} matrix products are int8; the rest is float32.")

    @precision(
        "int8",
        options={
            "calibration": calibrations.METHODS,
            "per_channel": (True, False),
            "operators": ("all", "products"),
        },
        tried=(
            {},
            {"calibration": "percentile"},
            {"calibration": "entropy"},
            {"per_channel": False},
            {"operators": "products"},
            {"calibration": "percentile", "operators": "products"},
        ),
        kinds=("saved_model", "onnx"),
        parent="float32",
        is_calibrated=True,
    )
    def int8(
        self, conversion: Conversion, calibration: str, per_channel: bool, operators: str
    ) -> None:
        """Activations and weights in QDQ form, of all supported operators or of products only.

        With `operators=products` sums, normalization and activation functions stay float32, except
        those that are fused into a product. That suits networks with GELU or layer normalization;
        convolutional ones are faster when all of a block is int8.

        On CPUs uint8 activations and int8 weights, ONNX Runtime's advice for x86 with VNNI; weights
        have 7 bits where the processor lacks VNNI, since sums of 16 bits would saturate
        (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). ONNX
        Runtime's default (int8 activations) is slower than float32 on convolutions. On CUDA int8
        and symmetric, as TensorRT takes it; see `tfopt.onnx.quantize.to_int8`.
        """
        import onnx

        is_symmetric = _providers()[0] == CUDA
        file = conversion.folder / FILE
        conversion.notes += quantize.to_int8(
            _parent_file(conversion),
            file,
            conversion.calibration_batches(),
            calibration=calibration,
            per_channel=per_channel,
            is_symmetric=is_symmetric,
            reduce_range=not is_symmetric and _reduce_range(conversion),
            only_products=operators == "products",
        )
        if is_symmetric:
            model = onnx.load(file)
            quantize.store_int8_weights(model)
            onnx.save_model(model, file)
            conversion.notes.append(
                "Activations and weights are int8 with zero points of 0, as NVIDIA's libraries "
                "want them. ONNX Runtime has no int8 convolutions and matrix products for CUDA: it "
                "rounds to int8 and computes in float32, which shows the accuracy of int8 but is "
                "not fast; int8@tensorrt computes in int8."
            )
        _check(file)


def _reduce_range(conversion: Conversion) -> bool:
    """Whether weights must have 7 bits on this processor; notes what that means elsewhere."""
    if environment.has_vnni():
        conversion.needs.append("vnni")
        return False
    conversion.notes.append(
        "Weights have 7 bits, since this processor lacks VNNI and saturates sums of 8-bit weights."
    )
    return True


@functools.cache
def _providers() -> list[str]:
    """What computes, in order of preference."""
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers() or not environment.gpus():
        return [CPU]
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


def _copy_model(path: Path, folder: Path) -> list[str]:
    """Copies a model and what it keeps in other files; returns sentences for the user."""
    model = _read(path)
    for name in _external_files(model):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path.parent / name, folder / name)
    shutil.copyfile(path, folder / FILE)
    notes = []
    if num_pools := keep_zeros(model):
        # Not by `save_model`, which would look for weights beside the file.
        (folder / FILE).write_bytes(model.SerializeToString())
        noun = "pooling" if num_pools == 1 else "poolings"
        notes.append(
            f"{num_pools} {noun} of padded values had to be written in another way, since ONNX "
            "Runtime's optimizer changes what they compute; outputs may differ from those of the "
            "original file in ONNX Runtime, but not from the model's."
        )
    _check(folder / FILE)
    return notes


def _specs(values: Iterable[Any]) -> tuple[TensorSpec, ...]:
    import onnx

    specs = []
    for value in values:
        tensor = value.type.tensor_type
        if not tensor.elem_type:
            kind = (value.type.WhichOneof("value") or "tensor of no type").removesuffix("_type")
            raise InputError(
                f"{value.name!r} of the ONNX file is a {kind}, and expected are tensors; export it "
                "again with tensors only (skl2onnx: options={'zipmap': False})."
            )
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
