"""LiteRT (TensorFlow Lite): one file, XNNPACK kernels on the CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError, first_line
from tfopt.graph import SIGNATURE_KEY
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
from tfopt.signature import Signature, TensorSpec

FILE = "model.tflite"
XNNPACK, OWN_KERNELS = "XNNPACK", "LiteRT's own kernels"
_ACTIVATION_DTYPES = ("float32", "int8", "int16")
_OPS_WITH_CHANNELS = ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV", "FULLY_CONNECTED")


class LiteRTSession(Session):
    """An interpreter; input tensors are resized when the shape of an input changes.

    A model with int8 inputs or outputs still takes and returns the source's float32: the session
    quantizes with the scale and zero point of the tensor, inside the timed region.
    """

    def __init__(self, artifact: Artifact, num_threads: int | None, **options: Any):
        super().__init__(artifact)
        self._interpreter = _open(artifact.folder / FILE, num_threads, **options)
        inputs, outputs = _details(self._interpreter)
        self._inputs = [_Port(name, inputs[name]) for name in self.signature.input_names]
        self._outputs = [_Port(name, outputs[name]) for name in self.signature.output_names]
        self._shapes = [tuple(port.shape) for port in self._inputs]
        self._interpreter.allocate_tensors()

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        interpreter = self._interpreter
        try:
            shapes = [inputs[port.name].shape for port in self._inputs]
            if shapes != self._shapes:
                for port, shape in zip(self._inputs, shapes, strict=True):
                    interpreter.resize_tensor_input(port.index, shape)
                interpreter.allocate_tensors()
                self._shapes = shapes
            for port in self._inputs:
                interpreter.set_tensor(port.index, port.quantize(inputs[port.name]))
        except Exception as error:
            self._shapes = []  # so that the next call allocates anew
            self.check_inputs(inputs, error)
            raise
        interpreter.invoke()
        return {
            port.name: port.dequantize(interpreter.get_tensor(port.index)) for port in self._outputs
        }

    def operations(self) -> list[dict[str, Any]]:
        """The interpreter's description of each operation, those of delegates included."""
        return self._interpreter._get_ops_details()

    def tensors(self) -> dict[int, dict[str, Any]]:
        """The interpreter's description of each tensor, by its index."""
        return {item["index"]: item for item in self._interpreter.get_tensor_details()}

    def tensor(self, index: int) -> np.ndarray:
        """What a tensor holds since the last run."""
        return self._interpreter.get_tensor(index)

    def close(self) -> None:  # noqa: D102
        del self._interpreter


class _Port:
    """An input or output tensor of the interpreter."""

    def __init__(self, name: str, details: dict[str, Any]):
        self.name = name
        self.index: int = details["index"]
        self.shape = details["shape"]
        self._dtype = np.dtype(details["dtype"])
        scale, self._zero_point = details["quantization"]
        self._scale = np.float32(scale)
        if not scale or not np.issubdtype(self._dtype, np.integer):
            self.quantize = self.dequantize = lambda array: array  # type: ignore[method-assign]

    def quantize(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == self._dtype:
            return array
        limits = np.iinfo(self._dtype)
        scaled = np.rint(array / self._scale) + self._zero_point
        return np.clip(scaled, limits.min, limits.max).astype(self._dtype)

    def dequantize(self, array: np.ndarray) -> np.ndarray:
        return (array.astype(np.float32) - self._zero_point) * self._scale


class LiteRT(Runtime):
    """Converts with `tf.lite.TFLiteConverter`, runs with `ai_edge_litert`."""

    name = "litert"
    packages = ("ai-edge-litert", "tensorflow")
    library = "ai_edge_litert.interpreter"

    def missing(self) -> str | None:  # noqa: D102
        if importlib.util.find_spec("ai_edge_litert") is None:
            return "ai-edge-litert is not installed; pip install ai-edge-litert."
        return None

    def load(self, artifact: Artifact, num_threads: int | None) -> Session:  # noqa: D102
        return LiteRTSession(artifact, num_threads)

    def layers(  # noqa: D102
        self, artifact: Artifact, batches: Sequence[Arrays], num_threads: int | None
    ) -> list[Layer]:
        # Python has no access to LiteRT's profiler, so there are no times.
        with LiteRTSession(artifact, num_threads) as session:
            session.run(batches[0])
            operations = session.operations()
        delegated = _delegated(operations)
        return [
            Layer(
                name=f"{op['op_name']} {op['index']}",
                op=op["op_name"],
                dtype=_dtype(op),
                executor=XNNPACK if op["index"] in delegated else OWN_KERNELS,
                is_fallback=op["index"] not in delegated,
            )
            for op in operations
            if op["op_name"] != "DELEGATE" and not _widens_weights(op)
        ]

    def activations(  # noqa: D102
        self, artifact: Artifact, batches: Iterable[Arrays]
    ) -> Iterator[Activation]:
        from ai_edge_litert.interpreter import OpResolverType

        with LiteRTSession(
            artifact,
            None,
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
            experimental_preserve_all_tensors=True,
        ) as session:
            tensors = session.tensors()
            inside = [
                (op["op_name"], tensors[op["outputs"][0]])
                for op in session.operations()
                if len(op["outputs"]) == 1 and op["op_name"] not in ("QUANTIZE", "DEQUANTIZE")
            ]
            for batch in batches:
                session.run(batch)
                for op_name, tensor in inside:
                    if (dtype := np.dtype(tensor["dtype"])).name not in _ACTIVATION_DTYPES:
                        continue
                    values, limits = session.tensor(tensor["index"]), None
                    scale, zero_point = tensor["quantization"]
                    if dtype.kind == "i":
                        if not scale:
                            continue
                        ends = np.iinfo(dtype).min - zero_point, np.iinfo(dtype).max - zero_point
                        limits = float(ends[0] * scale), float(ends[1] * scale)
                        values = (values.astype(np.float32) - zero_point) * np.float32(scale)
                    axis = -1 if op_name in _OPS_WITH_CHANNELS else None
                    yield Activation(tensor["name"], values, limits, axis)

    def read_signature(self, path: Path) -> Signature:  # noqa: D102
        try:
            interpreter = _open(path, None)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{path} is no .tflite model: {first_line(error)}; convert it again."
            ) from error
        inputs, outputs = _details(interpreter)

        def specs(details: dict[str, dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    name,
                    tuple(None if d < 0 else int(d) for d in item["shape_signature"]),
                    np.dtype(item["dtype"]).name,
                )
                for name, item in sorted(details.items())
            )

        return Signature(SIGNATURE_KEY, specs(inputs), specs(outputs))

    @precision("float32", kinds=("saved_model", "tflite"), is_unchanged=True)
    def float32(self, conversion: Conversion) -> None:
        """The numbers as they are."""
        if conversion.source.kind == "tflite":
            shutil.copyfile(conversion.source.path, conversion.folder / FILE)
        else:
            _convert(conversion, lambda converter: None)

    @precision("dynamic_range")
    def dynamic_range(self, conversion: Conversion) -> None:
        """int8 weights, activations quantized for each run; no calibration.

        A quarter of the size; fast where matrix products dominate, since XNNPACK computes fully
        connected layers and convolutions in int8
        (https://ai.google.dev/edge/litert/models/post_training_quantization).
        """
        _convert(conversion, _optimize)

    @precision(
        "float16",
        suitability=lambda: Suitability(
            True, "LiteRT widens the weights to float32 at load: half the file, the same time."
        ),
    )
    def float16(self, conversion: Conversion) -> None:
        """float16 weights that are widened to float32 at load: half the file, the same time."""
        import tensorflow as tf

        def configure(converter: Any) -> None:
            _optimize(converter)
            converter.target_spec.supported_types = [tf.float16]

        _convert(conversion, configure)

    @precision(
        "int8",
        options={"inputs": ("float32", "int8"), "outputs": ("float32", "int8")},
        tried=({}, {"inputs": "int8", "outputs": "int8"}),
        is_calibrated=True,
    )
    def int8(self, conversion: Conversion, inputs: str, outputs: str) -> None:
        """int8 weights for each channel and int8 activations, calibrated by minimum and maximum.

        Layers without an int8 kernel stay float32 and are counted in the notes. A quarter of the
        size, 1.5 to 6 times faster than float32 on CPUs with VNNI or dot product instructions.
        """
        import tensorflow as tf

        for what, wanted, specs in (
            ("inputs", inputs, conversion.source.signature.inputs),
            ("outputs", outputs, conversion.source.signature.outputs),
        ):
            if wanted == "int8" and any(spec.dtype != "float32" for spec in specs):
                raise ConversionError(f"Only float32 {what} can become int8: {specs[0]}.")

        def configure(converter: Any) -> None:
            _calibrate(converter, conversion)
            converter.target_spec.supported_ops = [
                tf.lite.OpsSet.TFLITE_BUILTINS_INT8,
                tf.lite.OpsSet.TFLITE_BUILTINS,
            ]
            converter.inference_input_type = getattr(tf, inputs)
            converter.inference_output_type = getattr(tf, outputs)

        _convert(conversion, configure)
        _note_float_layers(conversion, "INT8")

    @precision(
        "int16x8",
        is_calibrated=True,
        suitability=lambda: Suitability(
            False,
            "LiteRT runs int16x8 in reference kernels, many times slower than int8; ask for it "
            "with --variants when size with 16-bit activations matters.",
        ),
    )
    def int16x8(self, conversion: Conversion) -> None:
        """int8 weights and int16 activations: nearly the accuracy of float32, a quarter the size.

        XNNPACK does not take it: expect 15 to 30 times the time of int8.
        """
        import tensorflow as tf

        def configure(converter: Any) -> None:
            _calibrate(converter, conversion)
            converter.target_spec.supported_ops = [
                tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
                tf.lite.OpsSet.TFLITE_BUILTINS,
            ]

        _convert(conversion, configure)
        _note_float_layers(conversion, "INT16")


def _optimize(converter: Any) -> None:
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]


def _calibrate(converter: Any, conversion: Conversion) -> None:
    def examples() -> Iterator[tuple[str, Arrays]]:
        for batch in conversion.calibration_batches():
            yield SIGNATURE_KEY, batch

    if conversion.source.frozen_graph().has_loops:
        raise ConversionError(
            "LiteRT cannot calibrate models with loops (LSTM, GRU): its calibrator crashes; "
            "dynamic_range and float16 work."
        )
    next(iter(conversion.calibration_batches()))
    _optimize(converter)
    converter.representative_dataset = examples


def _convert(conversion: Conversion, configure: Callable[[Any], None]) -> None:
    """Converts the frozen graph, with a fixed batch size where the converter insists on one."""
    fixed = conversion.signature.with_batch_size(conversion.batch_size)
    try:
        content = _run_converter(conversion.source.frozen_folder, configure)
    except ConversionError:
        if fixed == conversion.signature:
            raise
        folder = conversion.folder / "fixed"
        conversion.source.frozen_graph().with_batch_size(conversion.batch_size).save(folder)
        content = _run_converter(folder, configure)
        shutil.rmtree(folder)
        conversion.signature = fixed
        conversion.notes.append(
            f"The batch size is fixed at {conversion.batch_size}: LiteRT cannot convert this model "
            "with a free one."
        )
    conversion.signature = dataclasses.replace(conversion.signature, key=SIGNATURE_KEY)
    (conversion.folder / FILE).write_bytes(content)


def _run_converter(folder: Path, configure: Callable[[Any], None]) -> bytes:
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(
        str(folder), signature_keys=[SIGNATURE_KEY]
    )
    configure(converter)
    try:
        return converter.convert()
    except ConversionError:
        raise
    except Exception as error:  # the converter raises bare Exception subclasses of its own
        raise ConversionError(_reason(str(error), first_line(error))) from error


def _reason(text: str, fallback: str) -> str:
    """Why the converter refused, from its message: the operations, where it names them.

    It names what TensorFlow's own kernels could run inside LiteRT ("TF Select ops"), which no
    package for Python brings, and what nobody can ("Custom ops").
    """
    named = re.findall(r"^(?:TF Select|Custom) ops: *(.+)$", text, re.MULTILINE)
    named += [] if named else re.findall(r"'tf\.(\w+)' op is neither a custom op nor", text)
    ops = sorted({op.strip() for names in named for op in names.split(",")})
    if ops:
        layers = re.findall(
            rf'"(?:{"|".join(map(re.escape, ops))}):", "(?:\w*PartitionedCall/)*([^"@]+)', text
        )
        where = f" (in {', '.join(dict.fromkeys(layers))})" if layers else ""
        return (
            f"LiteRT has no kernel for {', '.join(ops)}{where}; it would need TensorFlow's (Select "
            "TF ops), which ai-edge-litert does not run. Another runtime may, or take it out of "
            "the model."
        )
    # Other reasons carry long locations; what follows the last one is the reason.
    reasons = [reason for reason in re.findall(r"error: (.+)", text) if "loc(" not in reason]
    return f"The LiteRT converter refused: {(reasons[0] if reasons else fallback)[:300]}"


def _open(path: Path, num_threads: int | None, **options: Any) -> Any:
    from ai_edge_litert.interpreter import Interpreter

    return Interpreter(model_path=str(path), num_threads=num_threads, **options)


def _delegated(operations: list[dict[str, Any]]) -> set[int]:
    """Indices of the operations that a delegate has taken over.

    The interpreter lists them still; what a delegate computes lies between its inputs and outputs.
    """
    producers = {
        tensor: op for op in operations if op["op_name"] != "DELEGATE" for tensor in op["outputs"]
    }
    found: set[int] = set()
    for delegate in operations:
        if delegate["op_name"] != "DELEGATE":
            continue
        given, wanted = set(delegate["inputs"]), list(delegate["outputs"])
        while wanted:
            tensor = wanted.pop()
            op = producers.get(tensor)
            if tensor not in given and op is not None and op["index"] not in found:
                found.add(op["index"])
                wanted += list(op["inputs"])
    return found


def _dtype(op: dict[str, Any]) -> str:
    """What an operation computes in."""
    if not op["result_types"]:
        return ""
    result = np.dtype(op["result_types"][0]).name
    # With int8 weights and float32 activations, activations are quantized for the product.
    is_hybrid = result == "float32" and np.int8 in op["operand_types"]
    return "int8" if is_hybrid and op["op_name"] != "DEQUANTIZE" else result


def _widens_weights(op: dict[str, Any]) -> bool:
    """Whether an operation is done once, when the model is loaded."""
    return op["op_name"] == "DEQUANTIZE" and op["operand_types"][:1] == [np.float16]


def _details(interpreter: Any) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Details of inputs and outputs by signature name, or by tensor name without a signature."""
    if keys := interpreter.get_signature_list():
        key = SIGNATURE_KEY if SIGNATURE_KEY in keys else next(iter(keys))
        runner = interpreter.get_signature_runner(key)
        return runner.get_input_details(), runner.get_output_details()
    return (
        {item["name"]: item for item in interpreter.get_input_details()},
        {item["name"]: item for item in interpreter.get_output_details()},
    )


def _note_float_layers(conversion: Conversion, dtype: str) -> None:
    """Counts the layers that stayed in float32, by op."""
    from ai_edge_litert import schema_py_generated as schema

    codes = {value: name for name, value in vars(schema.BuiltinOperator).items()
             if isinstance(value, int)}  # fmt: skip
    content = (conversion.folder / FILE).read_bytes()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAsModel(content, 0))
    in_float: dict[str, int] = {}
    num_layers = num_quantized = 0
    for subgraph in model.subgraphs:
        for operator in subgraph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            name = codes.get(max(code.builtinCode, code.deprecatedBuiltinCode), "?")
            types = {subgraph.tensors[index].type for index in operator.outputs}
            if name in ("QUANTIZE", "DEQUANTIZE"):
                continue
            num_layers += 1
            num_quantized += getattr(schema.TensorType, dtype) in types
            if schema.TensorType.FLOAT32 in types:
                in_float[name] = in_float.get(name, 0) + 1
    if not num_quantized:
        raise ConversionError("LiteRT quantized no layer of this model.")
    if in_float:
        ops = ", ".join(f"{count} × {name}" for name, count in sorted(in_float.items()))
        conversion.notes.append(
            f"{sum(in_float.values())} of {num_layers} layers stayed float32: {ops}."
        )


RUNTIME = LiteRT()
