"""LiteRT (TensorFlow Lite): one file, XNNPACK kernels on the CPU."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError, first_line
from tfopt.graph import SIGNATURE_KEY, missing_signature
from tfopt.litert import flatbuffer
from tfopt.litert.convert import calibrate, convert, optimize
from tfopt.litert.quantize import quantize
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
KINDS = ("saved_model", "tflite")
XNNPACK, OWN_KERNELS = "XNNPACK", "LiteRT's own kernels"
_INFINITE = 1e30  # a scale of a range that ends at the largest float32
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
                # LiteRT resizes fixed inputs, too, and computes on with the sizes inside.
                self.check_inputs(inputs)
                for port, shape in zip(self._inputs, shapes, strict=True):
                    interpreter.resize_tensor_input(port.index, shape)
                interpreter.allocate_tensors()
                self._shapes = shapes
            for port in self._inputs:
                interpreter.set_tensor(port.index, port.quantize(inputs[port.name]))
        except InputError:
            raise
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
    packages = ("ai-edge-litert", "litert-quantizer", "tensorflow")
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

    def read_signature(self, path: Path, key: str = SIGNATURE_KEY) -> Signature:  # noqa: D102
        try:
            interpreter = _open(path, None)
        except (ValueError, RuntimeError) as error:
            raise InputError(
                f"{path} is no .tflite model: {first_line(error)}; convert it again."
            ) from error
        keys = list(interpreter.get_signature_list())
        if key not in keys and key != SIGNATURE_KEY:
            raise missing_signature(path, key, keys)
        inputs, outputs = _details(interpreter, key)

        def specs(details: dict[str, dict[str, Any]]) -> tuple[TensorSpec, ...]:
            return tuple(
                TensorSpec(
                    name,
                    tuple(None if d < 0 else int(d) for d in item["shape_signature"]),
                    np.dtype(item["dtype"]).name,
                )
                for name, item in sorted(details.items())
            )

        return Signature(key if key in keys else (keys or [key])[0], specs(inputs), specs(outputs))

    @precision("float32", kinds=KINDS, is_unchanged=True)
    def float32(self, conversion: Conversion) -> None:
        """The numbers as they are."""
        if conversion.source.kind == "tflite":
            content = _one_signature(conversion)
        else:
            content = convert(conversion, lambda converter: None)
        (conversion.folder / FILE).write_bytes(content)

    @precision("dynamic_range", kinds=KINDS)
    def dynamic_range(self, conversion: Conversion) -> None:
        """int8 weights, activations quantized for each run; no calibration.

        A quarter of the size; fast where matrix products dominate, since XNNPACK computes fully
        connected layers and convolutions in int8
        (https://ai.google.dev/edge/litert/models/post_training_quantization).
        """
        _make(conversion, "dynamic_range", optimize)

    @precision(
        "float16",
        kinds=KINDS,
        suitability=lambda: Suitability(
            True, "LiteRT widens the weights to float32 at load: half the file, the same time."
        ),
    )
    def float16(self, conversion: Conversion) -> None:
        """float16 weights that are widened to float32 at load: half the file, the same time."""
        import tensorflow as tf

        def configure(converter: Any) -> None:
            optimize(converter)
            converter.target_spec.supported_types = [tf.float16]

        _make(conversion, "float16", configure)

    @precision(
        "int8",
        kinds=KINDS,
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
            others = [spec for spec in specs if spec.dtype != "float32"]
            if wanted == "int8" and others:
                raise ConversionError(
                    f"Only float32 {what} can become int8, and {others[0].name} is "
                    f"{others[0].dtype}."
                )

        def configure(converter: Any) -> None:
            calibrate(converter, conversion)
            converter.target_spec.supported_ops = [
                tf.lite.OpsSet.TFLITE_BUILTINS_INT8,
                tf.lite.OpsSet.TFLITE_BUILTINS,
            ]
            converter.inference_input_type = getattr(tf, inputs)
            converter.inference_output_type = getattr(tf, outputs)

        _make(conversion, "int8", configure, inputs == "int8", outputs == "int8")
        _note_float_layers(conversion, "INT8")

    @precision(
        "int16x8",
        kinds=KINDS,
        is_calibrated=True,
        suitability=lambda: Suitability(
            False,
            "LiteRT runs int16x8 in reference kernels, many times slower than int8; ask for it "
            "with `variants` when size with 16-bit activations matters.",
        ),
    )
    def int16x8(self, conversion: Conversion) -> None:
        """int8 weights and int16 activations: nearly the accuracy of float32, a quarter the size.

        XNNPACK does not take it: expect 15 to 30 times the time of int8.
        """
        import tensorflow as tf

        def configure(converter: Any) -> None:
            calibrate(converter, conversion)
            converter.target_spec.supported_ops = [
                tf.lite.OpsSet.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8,
                tf.lite.OpsSet.TFLITE_BUILTINS,
            ]

        _make(conversion, "int16x8", configure)
        _note_float_layers(conversion, "INT16")


def _make(
    conversion: Conversion,
    precision: str,
    configure: Callable[[Any], None],
    int8_inputs: bool = False,
    int8_outputs: bool = False,
) -> None:
    """Writes the file: converts a SavedModel, or quantizes what is a `.tflite` file already.

    Args:
      conversion: what to convert.
      precision: of the result.
      configure: sets up the converter of SavedModels.
      int8_inputs: whether inputs become int8.
      int8_outputs: whether outputs become int8.
    """
    if conversion.source.kind == "tflite":
        is_calibrated = LiteRT.precisions[precision].is_calibrated
        batches = conversion.calibration_batches() if is_calibrated else ()
        content = quantize(
            _one_signature(conversion), precision, batches, int8_inputs, int8_outputs
        )
    else:
        content = convert(conversion, configure)
    (conversion.folder / FILE).write_bytes(content)


def _one_signature(conversion: Conversion) -> bytes:
    """The source file, without other signatures than the chosen one."""
    source = conversion.source
    return flatbuffer.only_signature(source.path.read_bytes(), source.signature.key)


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


def _details(
    interpreter: Any, key: str = SIGNATURE_KEY
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
    """Details of inputs and outputs by signature name, or by tensor name without a signature."""
    if keys := interpreter.get_signature_list():
        runner = interpreter.get_signature_runner(key if key in keys else next(iter(keys)))
        return runner.get_input_details(), runner.get_output_details()
    return (
        {item["name"]: item for item in interpreter.get_input_details()},
        {item["name"]: item for item in interpreter.get_output_details()},
    )


def _note_float_layers(conversion: Conversion, dtype: str) -> None:
    """Counts the layers that stayed in float32, by op.

    Raises:
      ConversionError: when there are no others, or one holds infinite values, as of masks, beside
        which few bits cannot hold ordinary ones.
    """
    model = flatbuffer.read((conversion.folder / FILE).read_bytes())
    in_float: Counter[str] = Counter()
    num_layers = num_quantized = 0
    for subgraph in model.subgraphs:
        for operator in subgraph.operators:
            name = flatbuffer.op_name(model, operator)
            types = {flatbuffer.type_name(subgraph.tensors[index]) for index in operator.outputs}
            if name in ("QUANTIZE", "DEQUANTIZE"):
                continue
            scales = [subgraph.tensors[i].quantization.scale for i in operator.outputs
                      if subgraph.tensors[i].quantization is not None]  # fmt: skip
            if any(scale is not None and (scale > _INFINITE).any() for scale in scales):
                raise ConversionError(
                    f"LiteRT cannot quantize a layer that holds infinite values ({name}), such as "
                    "-inf in a mask; mask with a number a little below the others (-20), or take "
                    "dynamic_range or float16."
                )
            num_layers += 1
            num_quantized += dtype in types
            in_float[name] += "FLOAT32" in types
    if not num_quantized:
        raise ConversionError("LiteRT quantized no layer of this model.")
    if num_float := in_float.total():
        ops = ", ".join(f"{count} × {name}" for name, count in sorted(in_float.items()) if count)
        conversion.notes.append(f"{num_float} of {num_layers} layers stayed float32: {ops}.")


RUNTIME = LiteRT()
