"""OpenVINO on the CPU, quantized by NNCF; the extra `openvino` installs both."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tfopt.artifact import Artifact
from tfopt.errors import MAX_REASON, ConversionError, first_line
from tfopt.graph import SIGNATURE_KEY
from tfopt.measure import environment, suitability
from tfopt.measure.suitability import Suitability
from tfopt.runtimes.base import (
    Activation,
    Arrays,
    Conversion,
    Layer,
    Runtime,
    Session,
    precision,
)
from tfopt.variant import Variant

FILE = "model.xml"
KINDS = ("saved_model", "tflite", "onnx")
MAX_STATIC_SHAPES = 8
MAX_PROFILED_RUNS, PROFILE_S = 100, 0.5


class OpenVinoSession(Session):
    """Compiled models with the latency hint; the variant chooses the inference precision.

    OpenVINO runs static shapes about a sixth faster than dynamic ones, so that the model is
    compiled for each of the first input shapes that come, and with dynamic shapes for the rest.
    """

    def __init__(self, artifact: Artifact, num_threads: int | None, is_profiled: bool = False):
        super().__init__(artifact)
        import openvino

        self._config: dict[str, Any] = {
            "PERF_COUNT": is_profiled,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _hint(artifact.variant),
        }
        if num_threads is not None:
            self._config["INFERENCE_NUM_THREADS"] = num_threads
            # With cores to spare, which ones to use is for the scheduler, or whoever sets limits.
            self._config["ENABLE_CPU_PINNING"] = num_threads >= environment.num_cores()
        self._core = openvino.Core()
        self._model = self._core.read_model(artifact.folder / FILE)
        self._names = [_name(port, self.signature.output_names) for port in self._model.outputs]
        self._requests: dict[tuple[tuple[int, ...], ...], Any] = {}
        self._dynamic: Any = None

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        try:
            shapes = tuple([value.shape for value in inputs.values()])
            request = self._requests.get(shapes) or self._compile(inputs)
            results = request.infer(inputs)
        except Exception as error:
            self.check_inputs(inputs, error)
            raise
        return dict(zip(self._names, results.values(), strict=True))

    def profiling_info(self, inputs: Arrays) -> list[Any]:
        """What OpenVINO's profiler says of one run with these inputs."""
        self.run(inputs)
        return self._requests[tuple([value.shape for value in inputs.values()])].profiling_info

    def close(self) -> None:  # noqa: D102
        del self._requests, self._dynamic, self._model

    def _compile(self, inputs: Arrays) -> Any:
        """The request for new input shapes."""
        if len(self._requests) < MAX_STATIC_SHAPES:
            model = self._model.clone()
            model.reshape({name: list(value.shape) for name, value in inputs.items()})
            request = self._core.compile_model(model, "CPU", self._config).create_infer_request()
            self._requests[tuple([value.shape for value in inputs.values()])] = request
            return request
        if self._dynamic is None:
            compiled = self._core.compile_model(self._model, "CPU", self._config)
            self._dynamic = compiled.create_infer_request()
        return self._dynamic


class OpenVino(Runtime):
    """Converts with `openvino.convert_model`, quantizes with `nncf.quantize`."""

    name = "openvino"
    packages = ("openvino", "nncf")
    library = "openvino"

    def missing(self) -> str | None:  # noqa: D102
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed; pip install 'tfopt[openvino]'."
        return None

    def load(self, artifact: Artifact, num_threads: int | None) -> Session:  # noqa: D102
        return OpenVinoSession(artifact, num_threads)

    def layers(  # noqa: D102
        self, artifact: Artifact, batches: Sequence[Arrays], num_threads: int | None
    ) -> list[Layer]:
        with OpenVinoSession(artifact, num_threads, is_profiled=True) as session:
            first = session.profiling_info(batches[0])
            # Times are averages over all runs so far, in whole microseconds: enough runs make
            # little of the first, which is slower.
            end = time.perf_counter() + PROFILE_S
            for index in range(MAX_PROFILED_RUNS):
                session.run(batches[index % len(batches)])
                if index >= len(batches) and time.perf_counter() > end:
                    break
            last = session.profiling_info(batches[0])
        # An average below a microsecond is 0, and counts as not run.
        return [
            Layer(
                name=info.node_name,
                op=_op(info),
                dtype=_dtype(info.exec_type),
                time_ms=info.real_time.total_seconds() * 1e3,
            )
            for before, info in zip(first, last, strict=True)
            if "EXECUTED" in (before.status.name, info.status.name)
        ]

    def activations(  # noqa: D102
        self, artifact: Artifact, batches: Iterable[Arrays]
    ) -> Iterator[Activation]:
        import openvino

        core = openvino.Core()
        model = core.read_model(artifact.folder / FILE)
        tensors = _tensors_inside(model)
        num_outputs = len(model.outputs)
        model.add_outputs([port for port, *_ in tensors])
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        request = compiled.create_infer_request()
        for batch in batches:
            request.infer(batch)
            for index, (_, name, limits, axis) in enumerate(tensors, num_outputs):
                yield Activation(name, request.get_output_tensor(index).data, limits, axis)

    def parent(self, variant: Variant) -> Variant | None:  # noqa: D102
        if variant.precision == "int8" and variant.options:
            return Variant("int8", self.name, student=variant.student)
        return super().parent(variant)

    def suitability(self, variant: Variant) -> Suitability | None:  # noqa: D102
        if ("activations", "bfloat16") in variant.options:
            return suitability.of_this_cpu("bfloat16")
        return super().suitability(variant)

    @precision("float32", kinds=KINDS)
    def float32(self, conversion: Conversion) -> None:
        """The numbers as they are."""
        import openvino

        path = conversion.source.path
        if conversion.source.kind == "saved_model":
            path = conversion.source.frozen_folder
        try:
            model = openvino.convert_model(path)
        except Exception as error:  # the front ends raise errors of several kinds
            raise ConversionError(
                f"OpenVINO cannot convert this model: {_reason(error)}"
            ) from error
        _read_float64_as_float32(model)
        _name_ports(model.inputs, conversion.signature.input_names)
        _name_ports(model.outputs, conversion.signature.output_names)
        _save(conversion, model)

    @precision(
        "float16",
        kinds=KINDS,
        parent="float32",
        suitability=lambda: _float16_suitability(),
    )
    def float16(self, conversion: Conversion) -> None:
        """Weights in float16: half the file. Computed in float16 where the CPU can (AMX-FP16).

        Elsewhere the plugin widens the weights when it loads, and computes in float32.
        """
        import openvino

        model = openvino.Core().read_model(_parent_folder(conversion) / FILE)
        _save(conversion, model, compress_to_fp16=True)

    @precision(
        "bfloat16",
        kinds=KINDS,
        parent="float32",
        suitability=lambda: suitability.of_this_cpu("bfloat16"),
    )
    def bfloat16(self, conversion: Conversion) -> None:
        """The float32 file, computed in bfloat16: the plugin casts weights when it loads.

        Matrix products and convolutions run up to twice as fast with AVX512-BF16, more with AMX;
        the file is as large as float32.
        """
        _copy_parent(conversion)

    @precision(
        "int8",
        options={"activations": ("float32", "bfloat16")},
        tried=({}, {"activations": "bfloat16"}),
        kinds=KINDS,
        parent="float32",
        is_calibrated=True,
    )
    def int8(self, conversion: Conversion, activations: str) -> None:
        """int8 weights and activations by `nncf.quantize` with fast bias correction.

        `activations=bfloat16` computes what was not quantized in bfloat16
        (https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html).
        """
        if activations == "bfloat16":
            _copy_parent(conversion)
            conversion.needs += conversion.parent.needs if conversion.parent else ()
            return
        import nncf
        import openvino

        batches = list(conversion.calibration_batches())
        model = openvino.Core().read_model(_parent_folder(conversion) / FILE)
        try:
            quantized = nncf.quantize(
                model, nncf.Dataset(batches), subset_size=len(batches), **_nncf_options(model)
            )
        except Exception as error:  # nncf has no common base class for its errors
            raise ConversionError(f"NNCF cannot quantize this model: {_reason(error)}") from error
        count = sum(op.get_type_name() == "FakeQuantize" for op in quantized.get_ordered_ops())
        if not count:
            raise ConversionError("NNCF quantized no layer of this model.")
        conversion.notes.append(f"{count} tensors are quantized.")
        if environment.has_vnni():
            conversion.needs.append("vnni")
        else:
            conversion.notes.append(
                "Weights have 7 bits, since this processor lacks VNNI and saturates sums of 8-bit "
                "weights."
            )
        _save(conversion, quantized)


def _read_float64_as_float32(model: Any) -> None:
    """Lets OpenVINO cast float64 inputs that are cast anyway.

    Its CPU plugin fuses the cast into the quantization behind it, and that has no float64 kernel.
    """
    import openvino

    for parameter in model.get_parameters():
        readers = [target.get_node() for target in parameter.output(0).get_target_inputs()]
        if parameter.get_element_type() == openvino.Type.f64 and all(
            reader.get_type_name() == "Convert" for reader in readers
        ):
            parameter.set_element_type(openvino.Type.f32)
    model.validate_nodes_and_infer_types()


def _op(info: Any) -> str:
    """What a node does; quantization of an activation is compiled into a fused subgraph."""
    is_quantization = info.node_type == "Subgraph" and "/fq_" in info.node_name
    return "FakeQuantize" if is_quantization else info.node_type


def _dtype(exec_type: str) -> str:
    """What a kernel such as `brgconv_avx512_I8` computes in."""
    dtype = exec_type.rpartition("_")[2].lower()
    known = {"f32": "float32", "fp32": "float32", "f16": "float16", "fp16": "float16",
             "bf16": "bfloat16", "i8": "int8", "u8": "uint8"}  # fmt: skip
    return known.get(dtype, "")


_Tensor = tuple[Any, str, tuple[float, float] | None, int | None]  # port, name, limits, axis


def _tensors_inside(model: Any) -> list[_Tensor]:
    """Quantized activations under the name of what is quantized, or every float32 tensor."""
    operations = model.get_ordered_ops()
    quantized: list[_Tensor] = []
    others: list[_Tensor] = []
    for op in operations:
        kind = op.get_type_name()
        if kind == "FakeQuantize":
            node, *ends = (op.input_value(index).get_node() for index in (0, 1, 2))
            if node.get_type_name() in ("Constant", "Convert"):  # weights
                continue
            if not all(end.get_type_name() == "Constant" for end in ends):
                continue
            low, high = float(ends[0].get_data().min()), float(ends[1].get_data().max())
            quantized.append(
                (op.output(0), node.get_friendly_name(), (low, high), _channel_axis(node))
            )
        elif kind not in ("Constant", "Parameter", "Result", "Convert") and [
            port.get_element_type().to_string() for port in op.outputs()
        ] == ["f32"]:
            others.append((op.output(0), op.get_friendly_name(), None, _channel_axis(op)))
    return [tensor for tensor in quantized or others if not _is_output(tensor[0])]


def _is_output(port: Any) -> bool:
    return any(target.get_node().get_type_name() == "Result" for target in port.get_target_inputs())


def _channel_axis(node: Any) -> int | None:
    """Where the channels of a layer's output are, looking back over what keeps them."""
    is_moved = False
    for _ in range(6):
        kind = node.get_type_name()
        if kind in ("Convolution", "GroupConvolution"):
            return -1 if is_moved else 1
        if kind == "MatMul":
            weights = node.input_value(1).get_node().get_type_name()
            return -1 if weights in ("Constant", "Convert", "FakeQuantize", "Multiply") else None
        if kind not in ("Relu", "Clamp", "Add", "Multiply", "Transpose", "FakeQuantize"):
            return None
        is_moved ^= kind == "Transpose"
        node = node.input_value(0).get_node()
    return None


def _nncf_options(model: Any) -> dict[str, Any]:
    """What NNCF's documentation advises for a model of this kind.

    Activations that go below zero (swish, gelu and the like) want the MIXED preset, transformers
    the model type that keeps attention exact. Without VNNI, sums of 8-bit weights saturate.
    """
    import nncf

    options: dict[str, Any] = {}
    if not environment.has_vnni():  # by default only the first convolution is kept from saturating
        options["advanced_parameters"] = nncf.AdvancedQuantizationParameters(
            overflow_fix=nncf.OverflowFix.ENABLE
        )
    for op in model.get_ordered_ops():
        kind = op.get_type_name()
        if kind in ("Swish", "HSwish", "Gelu", "Erf", "Elu", "PRelu", "Mish"):
            options["preset"] = nncf.QuantizationPreset.MIXED
        if kind == "Softmax" and any(
            port.get_node().get_type_name() == "MatMul" for port in op.output(0).get_target_inputs()
        ):
            options["model_type"] = nncf.ModelType.TRANSFORMER
    return options


def _hint(variant: Variant) -> str:
    """What to compute in.

    Asked for a float16 that the CPU lacks, the plugin would compute in bfloat16.
    """
    if variant.precision == "bfloat16" or ("activations", "bfloat16") in variant.options:
        return "bf16"
    has_float16 = suitability.of_this_cpu("float16").suits
    return "f16" if variant.precision == "float16" and has_float16 else "f32"


def _float16_suitability() -> Suitability:
    found = suitability.of_this_cpu("float16")
    if found.suits:
        return found
    return Suitability(
        True, "OpenVINO widens the weights to float32 at load: half the file, the same time."
    )


def _save(conversion: Conversion, model: Any, compress_to_fp16: bool = False) -> None:
    import openvino

    openvino.save_model(model, conversion.folder / FILE, compress_to_fp16=compress_to_fp16)
    conversion.signature = dataclasses.replace(conversion.signature, key=SIGNATURE_KEY)


def _parent_folder(conversion: Conversion) -> Path:
    if conversion.parent is None:
        raise ConversionError("This precision starts from float32@openvino, which is missing.")
    return conversion.parent.folder


def _copy_parent(conversion: Conversion) -> None:
    for suffix in (".xml", ".bin"):
        file = (_parent_folder(conversion) / FILE).with_suffix(suffix)
        shutil.copyfile(file, conversion.folder / file.name)
    conversion.signature = dataclasses.replace(conversion.signature, key=SIGNATURE_KEY)


def _name_ports(ports: Any, names: tuple[str, ...]) -> None:
    """Adds the signature's names to ports that do not bear them, in order."""
    unnamed = [port for port in ports if not port.get_names() & set(names)]
    left = [name for name in names if not any(name in port.get_names() for port in ports)]
    for port, name in zip(unnamed, left, strict=True):
        port.get_tensor().add_names({name})


def _name(port: Any, names: tuple[str, ...]) -> str:
    return next(iter(port.get_names() & set(names)), port.get_any_name())


def _reason(error: Exception) -> str:
    """Why OpenVINO refused: the operations, where its front end lists them."""
    listed = re.findall(
        r"^-- (?:No conversion rule found for operations|Conversion is failed for): *(.+)$",
        str(error),
        re.MULTILINE,
    )
    if listed:
        ops = ", ".join(dict.fromkeys(op.strip() for ops in listed for op in ops.split(",")))
        return f"it has no conversion for {ops}. Another runtime may, or take it out of the model."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "not support" in line or "No translator" in line
               or line.startswith("[")]  # fmt: skip
    return (telling or [first_line(error)])[0][:MAX_REASON]


RUNTIME = OpenVino()
