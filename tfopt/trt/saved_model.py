"""Converting SavedModels with TF-TRT, and building their engines anew on another machine.

TF-TRT replaces parts of a graph by `TRTEngineOp`s and keeps the rest in TensorFlow
(https://docs.nvidia.com/deeplearning/frameworks/tf-trt-user-guide). It goes on without a word when
nothing was replaced, or when an engine cannot be built: what came of it is read from the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from tfopt.errors import ConversionError, first_line
from tfopt.graph import SIGNATURE_KEY, FrozenGraph
from tfopt.logs import copied_stderr
from tfopt.runtimes.base import Arrays
from tfopt.signature import Signature
from tfopt.trt import converted
from tfopt.trt.converted import Converted
from tfopt.trt.profiles import ENDS, Profile

# TensorFlow's `RangeStrategy` takes the maximum for the optimum; with `Range+Optimal` the profiles
# of single shapes come first (tf2tensorrt/utils/trt_shape_optimization_profiles.cc).
STRATEGIES = ("Range+Optimal", "Range", "Optimal", "ImplicitBatchModeCompatible")
# What TF-TRT takes ranges from; of `EXPLICIT` it makes Q/DQ pairs, and int8 engines whatever else
# is asked for (tf2tensorrt/convert/ops/quantization_ops.h, convert/trt_optimization_pass.cc).
EXPLICIT = "QuantizeAndDequantizeV2"
QUANTIZED_OPS = frozenset(
    ["FakeQuantWithMinMaxVars", "FakeQuantWithMinMaxArgs", EXPLICIT, "QuantizeAndDequantizeV3"]
)
# The same computation with another gradient, which TF-TRT does not know.
_SAME_AS_EXPLICIT = "QuantizeAndDequantizeV4"
SMALLER_WORKSPACES_BYTES = (4 << 30, 1 << 30, 256 << 20)  # tried when the GPU's memory ran out

_OUT_OF_MEMORY = re.compile(r"out of memory|OutOfMemory|insufficient memory|cudaMalloc", re.I)
# Kernels that need more scratch than there is, and TensorFlow's allocator when it tries its luck.
_HARMLESS = re.compile(r"Skipping tactic|indicates that this is not a failure", re.I)
_CALIBRATION_ERROR = re.compile(r"Calibration failed: (.*)")
_REASON = re.compile(r"Engine creation for (\S+) failed.*?Reason: (.*)")
_TENSORRT_ERROR = re.compile(r"(?:DefaultLogger|TRT.*?Error) (.*)")


@dataclasses.dataclass(frozen=True)
class TfTrtOptions:
    """What TF-TRT is told.

    Attributes:
      precision: `FP32`, `FP16` or `INT8`.
      is_dynamic: engines for a range of shapes instead of one.
      strategy: one of STRATEGIES, how profiles follow from shapes; for dynamic ones.
      min_segment_size: operations that a part must have to go to TensorRT.
      workspace_bytes: scratch memory of an engine; None is TF-TRT's default, all that there is.
      max_cached_engines: engines that each part keeps.
      tf32: whether float32 products may be computed in TF32.
    """

    precision: str
    is_dynamic: bool = False
    strategy: str = STRATEGIES[0]
    min_segment_size: int = 3
    workspace_bytes: int | None = None
    max_cached_engines: int = 1
    tf32: bool = True


@dataclasses.dataclass(frozen=True)
class Result:
    """What a conversion made.

    Attributes:
      converted: engines, and what stayed in TensorFlow.
      reasons: why it stayed, by operation.
      notes: sentences for the user.
    """

    converted: Converted
    reasons: dict[str, list[str]]
    notes: tuple[str, ...]


def convert(
    graph: FrozenGraph,
    folder: Path,
    profile: Profile,
    options: TfTrtOptions,
    calibration: Callable[[], Iterable[Arrays]] | None,
) -> Result:
    """Writes a converted SavedModel with its engines.

    Args:
      graph: frozen; of fixed shapes where the options are not dynamic.
      folder: of the new SavedModel; must not be there yet.
      profile: the shapes to build for.
      options: for TF-TRT.
      calibration: batches of one shape for INT8; None for the others, and for graphs that hold
        their ranges.

    Raises:
      ConversionError: when no engine came of it; says why.
    """
    smaller = [
        size for size in SMALLER_WORKSPACES_BYTES if size < (options.workspace_bytes or 1 << 62)
    ]
    sizes = [options.workspace_bytes, *smaller]
    notes: list[str] = []
    for size in sizes:
        tried = dataclasses.replace(options, workspace_bytes=size)
        result, lines, failure = _try(graph, folder, profile, tried, calibration)
        is_whole = failure is None and all(s.num_engines for s in result.converted.segments)
        if is_whole or not _is_out_of_memory([*lines, failure or ""]):
            break
        if size != sizes[-1]:
            shutil.rmtree(folder, ignore_errors=True)
    else:
        if failure is not None or not result.converted.num_engines:
            reason = failure or _why_nothing(result, lines, options.min_segment_size)
            raise ConversionError(
                "The GPU's memory ran out while engines were built, also with a workspace of "
                f"{size or 0:,} bytes; free memory of the GPU, or convert for smaller batches "
                f"({reason[:300]})"
            )
    if failure is not None:
        raise ConversionError(f"TF-TRT failed: {failure[:300]}")
    if not result.converted.num_engines:
        raise ConversionError(_why_nothing(result, lines, options.min_segment_size))
    if others := {s.mode for s in result.converted.segments} - {options.precision, ""}:
        raise ConversionError(
            f"TF-TRT made {' and '.join(sorted(others))} of what was to be {options.precision}: "
            "the model was trained with quantization, and its ranges make int8 engines only; "
            "convert it to int8@tf_trt."
        )
    if calibration is not None:
        notes += _without_ranges(result.converted)
    if size is not None and size != options.workspace_bytes:
        notes.append(
            "The GPU's memory ran out while engines were built, so that their workspace is "
            f"{size:,} bytes at most."
        )
    failed = [match for line in lines if (match := _REASON.search(line))]
    notes += [
        f"{match[1]} could not become an engine and stayed in TensorFlow: {match[2][:300]}"
        for match in {match[1]: match for match in failed}.values()
    ]
    return dataclasses.replace(result, notes=tuple(notes))


def holds_ranges(graph: FrozenGraph) -> bool:
    """Whether a graph was trained with quantization and says what range each tensor has."""
    return any(node.op in QUANTIZED_OPS for node in graph.graph_def.node)


def with_known_ranges(graph: FrozenGraph) -> FrozenGraph:
    """The same graph, with `tf.quantization.quantize_and_dequantize_v2` as TF-TRT knows it."""
    if all(node.op != _SAME_AS_EXPLICIT for node in graph.graph_def.node):
        return graph
    graph_def = type(graph.graph_def)()
    graph_def.CopyFrom(graph.graph_def)
    for node in graph_def.node:
        if node.op == _SAME_AS_EXPLICIT:
            node.op = EXPLICIT
    return dataclasses.replace(graph, graph_def=graph_def)


def rebuild(
    folder: Path,
    new_folder: Path,
    signature: Signature,
    profile: Profile,
    *,
    is_dynamic: bool,
    tf32: bool,
) -> Converted:
    """Copies a converted SavedModel and builds its engines on this machine.

    The graph holds all that they are built from, ranges of INT8 included.

    Args:
      folder: of the SavedModel.
      new_folder: for the copy; must not be there yet.
      signature: of the SavedModel.
      profile: the shapes to build for.
      is_dynamic: whether an engine is for a range of shapes, and not for one.
      tf32: whether float32 products may be computed in TF32.

    Raises:
      ConversionError: when no engine can be built here.
    """
    import tensorflow as tf

    shutil.copytree(folder, new_folder)
    files = converted.engine_files(new_folder)
    for file in files:
        file.write_bytes(b"")  # a loaded model without engines builds them at its first run
    with copied_stderr() as lines, passed_over_patches(), _tf32(tf32):
        from tensorflow.compiler.tf2tensorrt.ops import gen_trt_ops

        inputs = list(_inputs(signature, profile))
        loaded = []  # whoever collects shapes, and whoever builds for them, share one cache
        for is_collecting in (True, False) if is_dynamic else (False,):
            _collect_shapes(new_folder, is_collecting)
            loaded.append(tf.saved_model.load(str(new_folder)))
            function = loaded[-1].signatures[signature.key]
            # Once the shapes are collected, any of them has the engine built for all.
            for batch in inputs[:1] if is_dynamic and not is_collecting else inputs:
                function(**{name: tf.constant(value) for name, value in batch.items()})
        for file in files:
            gen_trt_ops.serialize_trt_resource(
                resource_name=file.name.removeprefix(converted.ASSET_PREFIX),
                filename=str(file),
                delete_resource=False,
                save_gpu_specific_engines=True,
            )
        del loaded, function
        gc.collect()  # engines go by their names, and the next model's may be the same
    result = converted.read(new_folder)
    if not result.num_engines:
        raise ConversionError(_why_nothing(Result(result, {}, ()), lines, 1))
    return result


@contextlib.contextmanager
def passed_over_patches() -> Iterator[None]:
    """Lets TF-TRT run with an older patch of the TensorRT that TensorFlow was linked against.

    TF-TRT refuses 8.6.0 where it was linked against 8.6.1, though patches of a minor version take
    each other's place; `tfopt.trt.libraries.runs_together` was asked before.
    """
    from tensorflow.python.compiler.tensorrt import trt_convert

    check = trt_convert._check_trt_version_compatibility
    trt_convert._check_trt_version_compatibility = lambda: None
    try:
        yield
    finally:
        trt_convert._check_trt_version_compatibility = check


def _try(
    graph: FrozenGraph,
    folder: Path,
    profile: Profile,
    options: TfTrtOptions,
    calibration: Callable[[], Iterable[Arrays]] | None,
) -> tuple[Result, list[str], str | None]:
    """One conversion: what came of it, what was written to standard error, and why it failed."""
    import tensorflow as tf
    from tensorflow.python.compiler.tensorrt import trt_convert

    given = {} if options.workspace_bytes is None else {
        "max_workspace_size_bytes": options.workspace_bytes
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        source, report = Path(name, "source"), Path(name, "report.csv")
        graph.save(source)
        with (
            copied_stderr() as lines,
            passed_over_patches(),
            _environment("TF_TRT_SHOW_DETAILED_REPORT", str(report)),
            _tf32(options.tf32),
        ):
            converter = trt_convert.TrtGraphConverterV2(
                input_saved_model_dir=str(source),
                input_saved_model_signature_key=SIGNATURE_KEY,
                use_dynamic_shape=options.is_dynamic,
                dynamic_shape_profile_strategy=options.strategy if options.is_dynamic else None,
                precision_mode=options.precision,
                minimum_segment_size=options.min_segment_size,
                maximum_cached_engines=options.max_cached_engines,
                use_calibration=calibration is not None,
                **given,
            )
            try:
                if calibration is None:
                    converter.convert()
                else:
                    converter.convert(calibration_input_fn=calibration)
                inputs = list(_inputs(graph.signature, profile))
                # Calibrating built the engine of the calibration's shape.
                if calibration is None or options.is_dynamic or len(inputs) > 1:
                    converter.build(input_fn=lambda: iter(inputs))
                converter.save(str(folder))
            except (ValueError, RuntimeError, tf.errors.OpError) as error:
                failure: str | None = first_line(error)
            else:
                failure = None
        if failure is not None:
            told = [match[1] for line in lines if (match := _CALIBRATION_ERROR.search(line))]
            return Result(Converted((), ()), {}, ()), lines, (told or [failure])[0]
        return Result(converted.read(folder), converted.read_reasons(report), ()), lines, None


def _is_out_of_memory(lines: Iterable[str]) -> bool:
    return any(_OUT_OF_MEMORY.search(line) and not _HARMLESS.search(line) for line in lines)


def _without_ranges(found: Converted) -> list[str]:
    """What TF-TRT did not calibrate; it goes on with a warning in its log.

    Raises:
      ConversionError: when that is every engine.
    """
    engines = [segment for segment in found.segments if segment.num_engines]
    missing = [segment.name for segment in engines if not segment.has_ranges]
    if len(missing) == len(engines):
        raise ConversionError(
            "TF-TRT collected no ranges while it calibrated, so that nothing would be int8."
        )
    return [
        f"{name} has no ranges from calibration and is not int8; the examples may not reach it."
        for name in missing
    ]


def _why_nothing(result: Result, lines: list[str], min_segment_size: int) -> str:
    if result.converted.segments:
        failed = [match[2] for line in lines if (match := _REASON.search(line))]
        errors = [match[1] for line in lines if (match := _TENSORRT_ERROR.search(line))]
        reason = (failed or errors or ["TensorRT does not say why"])[0]
        return f"TF-TRT built no engine: {reason[:300]}."
    reasons = [
        f"{op}: {texts[0]}" for op, texts in result.reasons.items()
        if op not in converted.NOT_COUNTED
    ]  # fmt: skip
    told = f" ({'; '.join(reasons[:3])})" if reasons else ""
    return (
        "TF-TRT found no part of the graph with at least "
        f"{min_segment_size} operations that TensorRT takes{told}."
    )


def _inputs(signature: Signature, profile: Profile) -> Iterator[Arrays]:
    """Zeros of the smallest, the best and the largest shape, each once."""
    dtypes = {spec.name: spec.dtype for spec in signature.inputs}
    seen = set()
    for end in ("optimum", *ENDS):
        shapes = {name: getattr(shapes, end) for name, shapes in profile.inputs.items()}
        if (key := tuple(sorted(shapes.items()))) not in seen:
            seen.add(key)
            yield {name: np.zeros(shape, dtypes[name]) for name, shape in shapes.items()}


def _collect_shapes(folder: Path, value: bool) -> None:
    """Has the parts of a saved graph collect the shapes that come, or build engines for them."""
    model = converted.saved_model(folder)
    for node in converted.engine_nodes(folder, model):
        node.attr["_profile_generation_mode"].b = value
    (folder / "saved_model.pb").write_bytes(model.SerializeToString())


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _tf32(value: bool) -> Iterator[None]:
    """TF-TRT builds engines with TF32 if TensorFlow itself may use it."""
    import tensorflow as tf

    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(value)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
