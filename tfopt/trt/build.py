"""Building engines with TensorRT's Python API, of versions 8.6, 10 and 11.

What differs between them is asked of the module itself, in one place, `Surface`: TensorRT 11 has no
flags for float16 and int8, its networks are strongly typed. A script that sets the flags only where
they exist gets a float32 engine there, without a word
(https://docs.nvidia.com/deeplearning/tensorrt, "Migrating from TensorRT 10.x to 11.x").
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from tfopt import cuda
from tfopt.errors import ConversionError
from tfopt.trt import bindings, memory
from tfopt.trt import inspector as inspector_json
from tfopt.trt.spec import Built, EngineSpec

PRECISION_FLAGS = {"float32": (), "float16": ("FP16",), "int8": ("FP16", "INT8")}
# Types of layers that compute no floats, whose precision cannot be chosen.
_WITHOUT_PRECISION = frozenset(
    ["SHAPE", "CONSTANT", "CONDITION", "TRIP_LIMIT", "CAST", "QUANTIZE", "DEQUANTIZE"]
)
_MEMORY = re.compile(r"out ?of ?memory|could not be allocated|allocator error", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Surface:
    """What one version of the Python API has.

    Attributes:
      has_precision_flags: float16 and int8 are flags of the builder, and layers have a precision.
      has_explicit_batch: networks must be told to have explicit batches (they always have, since).
      has_strong_typing: networks can take their types from the file.
      has_named_errors: the parser's errors name the node.
    """

    has_precision_flags: bool
    has_explicit_batch: bool
    has_strong_typing: bool
    has_named_errors: bool

    @classmethod
    def of(cls, trt: Any) -> Surface:
        """Asks a module."""
        return cls(
            hasattr(trt.BuilderFlag, "FP16"),
            hasattr(trt.NetworkDefinitionCreationFlag, "EXPLICIT_BATCH"),
            hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"),
            hasattr(trt.ParserError, "node_name"),
        )

    def network_flags(self, spec: EngineSpec) -> tuple[str, ...]:
        """Names of the flags that a network is created with.

        Raises:
          ConversionError: when this version cannot build what is asked for.
        """
        flags = ("EXPLICIT_BATCH",) if self.has_explicit_batch else ()
        if not spec.is_strongly_typed:
            if spec.precision != "float32" and not self.has_precision_flags:
                raise ConversionError(
                    f"This TensorRT has no flag for {spec.precision}; its engines take their "
                    "types from the ONNX file, which must be typed so."
                )
            return flags
        if not self.has_strong_typing:
            raise ConversionError("This TensorRT has no strongly typed networks; 10 has them.")
        return (*flags, "STRONGLY_TYPED")

    def builder_flags(self, spec: EngineSpec) -> tuple[str, ...]:
        """Names of the flags that the builder gets."""
        flags = () if spec.is_strongly_typed else PRECISION_FLAGS[spec.precision]
        if spec.float32_layers and not spec.is_strongly_typed and flags:
            flags = (*flags, "OBEY_PRECISION_CONSTRAINTS")
        return (*flags, "TF32") if spec.tf32 else flags


def needs_strong_typing() -> bool:
    """Whether precisions come from the file alone, as in TensorRT 11."""
    return not Surface.of(bindings.load()).has_precision_flags


def build(onnx_file: Path, engine_file: Path, spec: EngineSpec) -> Built:
    """Builds an engine from an ONNX file.

    Args:
      onnx_file: the model.
      engine_file: where the engine goes.
      spec: what it is to be.

    Raises:
      ConversionError: names an operator that TensorRT cannot take and its layer, or says what
        else failed.
    """
    return memory.build(lambda tried: _build_once(onnx_file, engine_file, tried), spec)


def _build_once(onnx_file: Path, engine_file: Path, spec: EngineSpec) -> Built:
    trt = bindings.load()
    surface, logger = Surface.of(trt), bindings.the_logger()
    logger.messages.clear()
    begin = time.perf_counter()
    builder = trt.Builder(logger)
    network = builder.create_network(
        sum(1 << int(getattr(trt.NetworkDefinitionCreationFlag, name))
            for name in surface.network_flags(spec))
    )  # fmt: skip
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_file)):
        raise ConversionError(_refusal(parser, surface, logger, onnx_file))
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    for name in surface.builder_flags(spec):
        config.set_flag(getattr(trt.BuilderFlag, name))
    if spec.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, spec.workspace_bytes)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.builder_optimization_level = spec.optimization_level
    _add_profile(trt, builder, network, config, spec)
    if spec.float32_layers and not spec.is_strongly_typed:
        _keep_float32(trt, network, spec.float32_layers)
    timings = _timing_cache(config, spec.timing_cache, logger)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        reason = logger.reason()
        if _MEMORY.search(" ".join(logger.messages)):
            raise cuda.OutOfMemoryError(reason)
        hint = ""
        if spec.precision != "float32" and "Could not find any implementation" in reason:
            hint = " Such a layer can be left out of it by its name (`float32_layers`)."
        raise ConversionError(f"TensorRT could not build the engine: {reason}{hint}")
    engine_file.write_bytes(serialized)
    if spec.timing_cache is not None:
        _save_timings(spec.timing_cache, timings)
    layers, figures, notes = _inspect(trt, logger, serialized, spec)
    seconds = time.perf_counter() - begin
    return Built(f"tensorrt {trt.__version__}", seconds, layers, figures, notes)


def _refusal(parser: Any, surface: Surface, logger: Any, onnx_file: Path) -> str:
    """Which operator cannot be taken, and where it is."""
    if not parser.num_errors:
        return f"TensorRT cannot read the ONNX file: {logger.reason()}"
    error = parser.get_error(0)
    reason = " ".join(error.desc().split())[:300]
    if surface.has_named_errors and error.node_operator():
        op, name = error.node_operator(), error.node_name()
    else:
        op, name = _node(onnx_file, error.node())
    if not op:
        return f"TensorRT cannot take the model at node {error.node()}: {reason}"
    return f"TensorRT cannot take {op} (layer {name or error.node()}): {reason}"


def _node(onnx_file: Path, index: int) -> tuple[str, str]:
    """Operator and name of a node by its place; empty where there is none."""
    import onnx

    nodes = onnx.load(onnx_file, load_external_data=False).graph.node
    return (nodes[index].op_type, nodes[index].name) if 0 <= index < len(nodes) else ("", "")


def _add_profile(trt: Any, builder: Any, network: Any, config: Any, spec: EngineSpec) -> None:
    """Tells the builder the shapes of inputs that the file leaves free.

    Raises:
      ConversionError: when TensorRT refuses them, or when an input's values decide on shapes.
    """
    profile = builder.create_optimization_profile()
    is_needed = False
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if tensor.is_shape_tensor:
            raise ConversionError(
                f"The values of input {tensor.name} decide on the shapes of tensors inside, which "
                "engines need a range of values for; make it a constant of the model."
            )
        if -1 not in tuple(tensor.shape):
            continue
        shapes = spec.profile.inputs[tensor.name]
        try:
            profile.set_shape(tensor.name, shapes.minimum, shapes.optimum, shapes.maximum)
        except (RuntimeError, ValueError) as error:
            raise ConversionError(
                f"TensorRT refuses the shapes {shapes} of input {tensor.name}: {error}"
            ) from error
        is_needed = True
    if is_needed and config.add_optimization_profile(profile) < 0:
        raise ConversionError("TensorRT refuses the shapes that the engine is to be for.")


def _keep_float32(trt: Any, network: Any, names: Collection[str]) -> None:
    """Has layers compute in float32; the parser gives them the names of their nodes."""
    wanted = set(names)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        origin = re.search(r"\[ONNX Layer: (.*?)\]", layer.metadata or "")
        if not wanted & {layer.name, origin[1] if origin else ""}:
            continue
        if layer.type.name in _WITHOUT_PRECISION:
            continue
        floats = [
            number
            for number in range(layer.num_outputs)
            if layer.get_output(number).dtype in (trt.DataType.FLOAT, trt.DataType.HALF)
        ]
        if floats:
            layer.precision = trt.DataType.FLOAT
        for number in floats:
            layer.set_output_type(number, trt.DataType.FLOAT)


def _timing_cache(config: Any, file: Path | None, logger: Any) -> Any:
    """Gives the builder the timings of earlier builds; returns its cache."""
    if file is None:
        return None
    timings = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if timings is None or not config.set_timing_cache(timings, ignore_mismatch=False):
        # Of another version, or damaged: TensorRT logs an error and would learn no timings.
        logger.messages.clear()
        timings = config.create_timing_cache(b"")
        config.set_timing_cache(timings, ignore_mismatch=False)
    return timings


def _save_timings(file: Path, timings: Any) -> None:
    """Keeps timings for the next build; without room for them that one takes longer."""
    unfinished = file.with_name(f".{file.name}.{time.time_ns()}")
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(timings.serialize())
        unfinished.replace(file)


def _inspect(
    trt: Any, logger: Any, serialized: Any, spec: EngineSpec
) -> tuple[tuple[dict[str, Any], ...], dict[str, float], tuple[str, ...]]:
    """The layers of an engine, its figures, and notes."""
    engine = trt.Runtime(logger).deserialize_cuda_engine(serialized)
    if engine is None:
        raise ConversionError(f"The engine was built but cannot be loaded: {logger.reason()}")
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise ConversionError(
                f"{name} holds shapes, which TensorRT computes on the processor; leave it out of "
                "the model's inputs and outputs."
            )
    inspector = engine.create_engine_inspector()
    # Where shapes are free, the types of tensors are told for a context with shapes only; by
    # TensorRT 8.6 not even then.
    if (context := engine.create_execution_context()) is not None:
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            if name in spec.profile.inputs:
                context.set_input_shape(name, spec.profile.inputs[name].optimum)
        inspector.execution_context = context
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    layers, note = inspector_json.parse(text)
    size = getattr(engine, "device_memory_size_v2", None)
    if size is None:
        size = engine.device_memory_size
    return tuple(layers), {"device_memory_bytes": float(size)}, (note,) if note else ()
