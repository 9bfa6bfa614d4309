"""TF-TRT: parts of a SavedModel in TensorRT engines, the rest in TensorFlow."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tfopt import gpu_function
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.graph import SIGNATURE_KEY, FrozenGraph
from tfopt.measure import environment, suitability
from tfopt.runtimes.base import (
    Arrays,
    Conversion,
    Layer,
    Runtime,
    Session,
    WholeNumber,
    precision,
)
from tfopt.runtimes.tensorflow import FOLDER, TensorFlowSession
from tfopt.trt import converted, libraries, saved_model, shapes
from tfopt.trt.converted import Converted
from tfopt.trt.profiles import ENDS
from tfopt.trt.saved_model import TfTrtOptions
from tfopt.trt.spec import MIN_CALIBRATION, note_on_tf32
from tfopt.trt.target import NO_GPU, Record, Target
from tfopt.variant import Value

LAST_TENSORFLOW = (2, 17)
OPTIONS: dict[str, tuple[Value, ...] | WholeNumber] = {
    "shapes": ("static", "dynamic"),
    "strategy": saved_model.STRATEGIES,
    "min_segment_size": WholeNumber(3),
    "workspace_mib": WholeNumber(None),
    "max_cached_engines": WholeNumber(1),
}


class TfTrtSession(TensorFlowSession):
    """A signature call on the engines' GPU, with shapes that engines were built for."""

    def __init__(self, artifact: Artifact, num_threads: int | None):
        record = Record.open(artifact.folder)
        record.check_runs_here(artifact.folder, Target.here(_libraries()))
        # Registers the operation.
        import tensorflow as tf
        from tensorflow.python.compiler.tensorrt import trt_convert  # noqa: F401

        try:
            super().__init__(artifact, num_threads)
        except tf.errors.InternalError as error:
            if "engine cache" not in str(error):
                raise
            raise InputError(
                f"{artifact.folder} cannot be loaded beside another TF-TRT model whose engines "
                "have the same names; close that one, or load it in another process."
            ) from error
        self._profile, self._is_exact = record.profile, record.details["is_exact"]
        self._strategy = record.details.get("strategy")
        self._accepted: set[tuple[Any, ...]] = set()

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        try:
            key = tuple((name, value.shape) for name, value in inputs.items())
        except AttributeError as error:
            self.check_inputs(inputs, error)
            raise
        if key not in self._accepted:
            self._check_shapes(inputs)
            self._accepted.add(key)
        return super().run(inputs)

    def close(self) -> None:  # noqa: D102
        super().close()
        gc.collect()  # engines go by their names, and the next model's may be the same

    def _check_shapes(self, inputs: Arrays) -> None:
        """TF-TRT itself would compute other shapes in TensorFlow, without a word.

        Raises:
          InputError: when no engine is for these shapes.
        """
        if set(inputs) != set(self._profile.inputs):
            return  # TensorFlow says it better
        reason = self._profile.outside(inputs)
        has_smaller = self._strategy == "ImplicitBatchModeCompatible"
        if reason is None and (self._is_exact or has_smaller):
            shapes = {name: tuple(value.shape) for name, value in inputs.items()}
            if not any(self._is_of(shapes, end, has_smaller) for end in ENDS):
                reason = (
                    "No engine was built for these shapes but for "
                    f"{'; '.join(self._profile.spell(end) for end in ENDS)}"
                    f"{', each with smaller batches' if has_smaller else ''}."
                )
        if reason is not None:
            raise InputError(reason)

    def _is_of(self, shapes: dict[str, tuple[int, ...]], end: str, has_smaller: bool) -> bool:
        """Whether shapes are those of an end of the profile; of smaller batches, too, if asked."""
        for name, of_input in self._profile.inputs.items():
            built, got = getattr(of_input, end), shapes[name]
            is_smaller = has_smaller and got[1:] == built[1:] and got[:1] <= built[:1]
            if got != built and not is_smaller:
                return False
        return True


class TfTrt(Runtime):
    """Converts and runs with TensorFlow's own TensorRT converter; 2.17 is the last that has it."""

    name = "tf_trt"
    packages = ("tensorflow", "keras")
    library = "tensorflow"
    shares_threads = True
    has_engines = True
    opens_once = True

    def missing(self) -> str | None:  # noqa: D102
        try:
            version = importlib.metadata.version("tensorflow")
        except importlib.metadata.PackageNotFoundError:
            return "TensorFlow is not installed; pip install 'tensorflow[and-cuda]==2.17.1'."
        if tuple(int(part) for part in version.split(".")[:2]) > LAST_TENSORFLOW:
            return (
                f"TensorFlow {version} is built without TensorRT, and 2.17 is the last with it; "
                "pip install 'tensorflow[and-cuda]==2.17.1', or use the runtime tensorrt, which "
                "takes any TensorFlow."
            )
        if not environment.gpus():
            return NO_GPU
        return _library_missing()

    def remarks(self) -> list[str]:  # noqa: D102
        linked, loaded = _linked(), _loaded().version
        if loaded is None or loaded == linked:
            return gpu_function.remarks()
        return [
            f"TensorFlow was linked against TensorRT {libraries.spell(linked)} and runs with "
            f"{libraries.spell(loaded)}, which takes its place.",
            *gpu_function.remarks(),
        ]

    def versions(self) -> dict[str, str]:  # noqa: D102
        found = super().versions()
        return found if self.missing() else found | _libraries()

    def load(self, artifact: Artifact, num_threads: int | None) -> Session:  # noqa: D102
        return TfTrtSession(artifact, num_threads)

    def layers(  # noqa: D102
        self, artifact: Artifact, batches: Sequence[Arrays], num_threads: int | None
    ) -> list[Layer]:
        # An engine is one operation to TensorFlow, whose profiler needs CUPTI on GPUs.
        del batches, num_threads
        found = converted.read(artifact.folder / FOLDER)
        engines = [
            Layer(
                segment.name,
                f"engine of {segment.num_nodes} operations",
                artifact.variant.precision,
                executor="TensorRT",
            )
            for segment in found.segments
            if segment.num_engines
        ]
        return engines + [
            Layer(name, op, "", executor="TensorFlow", is_fallback=True) for name, op in found.left
        ]

    def rebuild(self, artifact: Artifact, folder: Path) -> list[str]:  # noqa: D102
        record, target = Record.open(artifact.folder), Target.here(_libraries())
        begin = time.perf_counter()
        made = saved_model.rebuild(
            artifact.folder / FOLDER,
            folder / FOLDER,
            artifact.signature,
            record.profile,
            is_dynamic=record.details["is_dynamic"],
            tf32=bool(dict(artifact.variant.options).get("tf32", True)),
        )
        seconds, before = time.perf_counter() - begin, record.details["num_engines"]
        notes = [
            made.describe({}),
            f"Built anew in {seconds:.0f} s; it runs on {target} only.",
        ]
        if made.num_engines < before:
            notes.append(
                f"Before it had {before} engines; parts without one are computed in TensorFlow."
            )
        details = {**record.details, **_figures(made, seconds), "notes": notes}
        Record(target, record.profile, details).save(folder)
        return notes

    @precision("float32", options={**OPTIONS, "tf32": (True, False)})
    def float32(self, conversion: Conversion, tf32: bool, **options: Any) -> None:
        """float32 in and out; products in TF32, with ten bits of mantissa, unless `tf32=False`.

        On GPUs with Tensor Cores TF32 is what TensorFlow itself does by default. Kernels are fused
        and chosen by timing them, which is worth two to five times TensorFlow at small batches.
        `workspace_mib` bounds the scratch memory of kernels; with `strategy` profiles follow from
        minimum, optimum and maximum shapes (`shapes=dynamic`), and `max_cached_engines` is how
        many engines each part keeps.
        """
        graph = conversion.source.frozen_graph()
        _convert(conversion, graph, "FP32", None, tf32=tf32, **options)
        conversion.notes.append(note_on_tf32(tf32))

    @precision("float16", options=OPTIONS, suitability=lambda: _suitability("float16"))
    def float16(self, conversion: Conversion, **options: Any) -> None:
        """float16 kernels wherever TensorRT finds them faster; inputs and outputs stay float32.

        Values beyond 65504 overflow; the outputs are compared on real examples.
        """
        _convert(conversion, conversion.source.frozen_graph(), "FP16", None, **options)

    @precision(
        "int8",
        options=OPTIONS,
        is_calibrated=True,
        suitability=lambda: _suitability("int8"),
    )
    def int8(self, conversion: Conversion, **options: Any) -> None:
        """int8 kernels with ranges from real examples (TensorRT's entropy calibration), symmetric.

        Of a model that was trained with quantization its own ranges are taken. Other layers run in
        float16 or float32, whatever is faster. Little faster than float16 at batch 1, more at
        large batches of convolutional networks.
        """
        graph = saved_model.with_known_ranges(conversion.source.frozen_graph())
        if saved_model.holds_ranges(graph):
            conversion.notes.append("Ranges are those that the model was trained with.")
            _convert(conversion, graph, "INT8", None, **options)
            return
        _convert(conversion, graph, "INT8", _of_one_shape(conversion), **options)


def _convert(
    conversion: Conversion,
    graph: FrozenGraph,
    mode: str,
    calibration: Callable[[], Iterable[Arrays]] | None,
    *,
    tf32: bool = True,
    **options: Any,
) -> None:
    if conversion.engine.float32_layers:
        raise InputError(
            "TF-TRT cannot keep single layers in float32; name them for the runtime tensorrt."
        )
    if conversion.engine.cache_folder is not None:
        raise InputError(
            "TF-TRT keeps no engines for the next time; only the runtime tensorrt does."
        )
    profile = shapes.choose(conversion, options["shapes"])
    if profile.is_fixed:
        is_explicit = any(node.op == saved_model.EXPLICIT for node in graph.graph_def.node)
        graph = graph.with_batch_size(profile.batch_size, keeps_ranges=is_explicit)
    # Of shapes that the user gave, static engines are for each by itself.
    is_dynamic = not profile.is_fixed and (
        options["shapes"] == "dynamic" or conversion.engine.profile is None
    )
    has_ranges = mode == "INT8" and calibration is None
    num_shapes = len({profile.spell(end) for end in ENDS})
    mib = options["workspace_mib"]
    target, begin = Target.here(_libraries()), time.perf_counter()
    made = saved_model.convert(
        graph,
        conversion.folder / FOLDER,
        profile,
        TfTrtOptions(
            precision=mode,
            # Ranges in the graph need explicit batches.
            is_dynamic=has_ranges or is_dynamic,
            strategy=options["strategy"],
            min_segment_size=options["min_segment_size"],
            workspace_bytes=None if mib is None else mib << 20,
            max_cached_engines=max(options["max_cached_engines"], 1 if is_dynamic else num_shapes),
            tf32=tf32,
        ),
        calibration,
    )
    seconds = time.perf_counter() - begin
    best = "maximum" if is_dynamic and options["strategy"] == "Range" else "optimum"
    notes = [
        made.converted.describe(made.reasons),
        f"Built in {seconds:.0f} s for {profile.spell(best)}; it runs on {target} only.",
        *made.notes,
    ]
    details = {
        "is_dynamic": has_ranges or is_dynamic,
        "is_exact": not is_dynamic or options["strategy"] == "Optimal",
        "strategy": options["strategy"] if is_dynamic else None,
        **_figures(made.converted, seconds),
        "notes": notes,
    }
    Record(target, profile, details).save(conversion.folder)
    conversion.signature = dataclasses.replace(graph.signature, key=SIGNATURE_KEY)
    conversion.notes += notes


def _figures(made: Converted, seconds: float) -> dict[str, float]:
    """What `engine.json` tells of a build."""
    return {
        "build_seconds": round(seconds, 1),
        "num_engines": made.num_engines,
        "share_inside": round(made.share_inside, 4),
    }


def _of_one_shape(conversion: Conversion) -> Callable[[], Iterator[Arrays]]:
    """Calibration batches of the most frequent shape: TF-TRT ends the process at another one.

    Raises:
      ConversionError: when there are too few examples; before minutes of work.
    """
    conversion.calibration_batches(MIN_CALIBRATION)
    counts = Counter() if conversion.count_shapes is None else conversion.count_shapes()
    if len(counts) < 2:
        return conversion.calibration_batches
    chosen, num_examples = counts.most_common(1)[0]
    if num_examples < MIN_CALIBRATION:
        raise ConversionError(
            "TF-TRT calibrates on examples of one shape, and of the "
            f"{conversion.num_calibration} that were set aside at most {num_examples} have the "
            f"same; give more `data` of one shape: {MIN_CALIBRATION} are needed."
        )
    conversion.notes.append(
        f"Calibrated on {num_examples} of {conversion.num_calibration} examples, those of the most "
        "frequent shape: TF-TRT takes one."
    )
    shapes = dict(zip(conversion.source.signature.input_names, chosen, strict=True))
    return lambda: (
        batch
        for batch in conversion.calibration_batches()
        if all(value.shape[1:] == shapes[name] for name, value in batch.items())
    )


def _suitability(dtype: str) -> suitability.Suitability:
    gpus = environment.gpus()
    if not gpus:
        return suitability.Suitability(False, "TF-TRT needs an NVIDIA GPU, and there is none.")
    return suitability.gpu(dtype, gpus[0].compute_capability)


@functools.cache
def _linked() -> libraries.Version:
    """The TensorRT that TensorFlow was built with; (0, 0, 0) for none."""
    from tensorflow.compiler.tf2tensorrt import _pywrap_py_utils

    return tuple(_pywrap_py_utils.get_linked_tensorrt_version())


def _loaded() -> libraries.Library:
    """What TensorFlow would load: it asks for the full version, NVIDIA's later builds may not."""
    linked = _linked()
    found = libraries.find(f"libnvinfer.so.{libraries.spell(linked)}")
    if found.version is None and linked[0] >= 10:
        return libraries.find(f"libnvinfer.so.{linked[0]}")
    return found


def _libraries() -> dict[str, str]:
    """Versions that engines belong to."""
    loaded = _loaded().version or ()
    return {
        "TensorFlow": importlib.metadata.version("tensorflow"),
        "TensorRT": libraries.spell(loaded),
    }


def _plugin_reason(linked: libraries.Version) -> str:
    """Why the library of plugins, which TF-TRT loads too, cannot be loaded; empty when it can."""
    names = [f"libnvinfer_plugin.so.{libraries.spell(linked)}"]
    names += [f"libnvinfer_plugin.so.{linked[0]}"] if linked[0] >= 10 else []
    reasons = [libraries.why_not(name) for name in names]
    # Others that it needs TensorFlow finds among its own packages, where this process does not.
    return "" if any("libnvinfer" not in reason for reason in reasons) else reasons[0]


def _library_missing() -> str | None:
    import tensorflow as tf

    version = importlib.metadata.version("tensorflow")
    if not tf.sysconfig.get_build_info().get("is_tensorrt_build"):
        return (
            f"this TensorFlow {version} is built without TensorRT; the one on PyPI for Linux and "
            "x86-64 has it, up to 2.17: pip install 'tensorflow[and-cuda]==2.17.1'."
        )
    linked, found = _linked(), _loaded()
    install = (
        f"pip install tensorrt-libs=={libraries.spell(linked)} --extra-index-url "
        "https://pypi.nvidia.com, put its folder tensorrt_libs on LD_LIBRARY_PATH, and in it "
        + " and ".join(
            f"ln -s {name}.so.{linked[0]} {name}.so.{libraries.spell(linked)}"
            for name in ("libnvinfer", "libnvinfer_plugin")
        )
    )
    if reason := found.reason or _plugin_reason(linked):
        return (
            f"TensorFlow {version} looks for TensorRT {libraries.spell(linked)}, which cannot be "
            f"loaded ({reason}); {install}."
        )
    assert found.version is not None
    if not libraries.runs_together(linked, found.version):
        return (
            f"TensorFlow {version} was linked against TensorRT {libraries.spell(linked)} and "
            f"finds {libraries.spell(found.version)}, which does not take its place; {install}."
        )
    return None


RUNTIME = TfTrt()
