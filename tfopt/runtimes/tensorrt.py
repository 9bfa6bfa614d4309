"""TensorRT: the whole model in one engine, from an ONNX file, with any TensorFlow."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from tfopt import runtimes
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
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
from tfopt.trt import bindings, build, cache, inspector, provider, provider_library, shapes, trtexec
from tfopt.trt.profiles import Profile
from tfopt.trt.session import ENGINE, EngineSession
from tfopt.trt.spec import MIN_CALIBRATION, Built, EngineSpec, note_on_tf32
from tfopt.trt.target import NO_GPU, Record, Target
from tfopt.variant import Value, Variant

FILE = "model.onnx"
LAYERS = "layers.json"
BUILDERS = ("python", "trtexec", "onnxruntime")
OPTIONS: dict[str, tuple[Value, ...] | WholeNumber] = {
    "builder": ("any", *BUILDERS),
    "shapes": ("static", "dynamic"),
    "workspace_mib": WholeNumber(None),
}
LAST_OPSET_OF_8 = 17  # onnx-tensorrt, docs/operators.md of release 8.6
NUM_NAMED = 5
MAX_FILE_BYTES = (1 << 31) - 1  # of protocol buffers


class TensorRT(Runtime):
    """Engines of TensorRT 8.6, 10 and 11, built from ONNX files and run by themselves.

    They are built with TensorRT's Python API, with `trtexec`, or by ONNX Runtime, which then runs
    them, too.
    """

    name = "tensorrt"
    packages = ("onnx", "tf2onnx", "cuda-bindings")
    library = "tfopt.trt.session"
    has_engines = True

    def missing(self) -> str | None:  # noqa: D102
        if not environment.gpus():
            return NO_GPU
        by_itself = bindings.missing()
        if by_itself is None or provider_library.missing() is None:
            return None
        return by_itself

    def versions(self) -> dict[str, str]:  # noqa: D102
        found = super().versions()
        return found if self.missing() else found | _libraries(_builder("any"))

    def remarks(self) -> list[str]:  # noqa: D102
        reasons = {
            "TensorRT's Python API": bindings.missing(),
            "trtexec": trtexec.missing(),
            "ONNX Runtime's provider": provider_library.missing(),
        }
        there = [name for name, reason in reasons.items() if reason is None]
        return [
            f"Engines can be built by {' and '.join(there)}.",
            *(f"Not by {name}: {reason}" for name, reason in reasons.items() if reason),
        ]

    def load(self, artifact: Artifact, num_threads: int | None) -> Session:  # noqa: D102
        record = Record.open(artifact.folder)
        builder = record.details["builder"]
        if builder == "onnxruntime":
            record.check_runs_here(artifact.folder, Target.here(_libraries(builder)))
            return provider.ProviderSession(artifact, num_threads)
        if reason := bindings.missing():
            raise InputError(f"{artifact.folder} holds an engine, and {reason}")
        # Whoever built it, the Python API runs it.
        record.check_runs_here(artifact.folder, Target.here(_libraries("python")))
        return EngineSession(artifact)

    def layers(  # noqa: D102
        self, artifact: Artifact, batches: Sequence[Arrays], num_threads: int | None
    ) -> list[Layer]:
        file = artifact.folder / LAYERS
        if not file.is_file():
            return []
        found, times_ms = json.loads(file.read_text()), None
        if batches:
            with self.load(artifact, num_threads) as session:
                assert isinstance(session, EngineSession)  # ONNX Runtime leaves no such file
                times_ms = session.layer_times_ms(batches)
        return inspector.layers(found, times_ms)

    def rebuild(self, artifact: Artifact, folder: Path) -> list[str]:  # noqa: D102
        record = Record.open(artifact.folder)
        left_behind = (ENGINE, provider.ENGINES, "*.json")
        shutil.copytree(
            artifact.folder, folder, dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(*left_behind),
        )  # fmt: skip
        asked = record.details["spec"]
        spec = EngineSpec(
            profile=record.profile,
            **{**asked, "float32_layers": tuple(asked["float32_layers"])},
        )
        builder = _builder(record.details["builder"])
        is_free = spec.precision != "float32" and not spec.is_strongly_typed
        if is_free and _is_typed(builder, spec.float32_layers):
            _cast(folder / FILE, spec.float32_layers)
            spec = dataclasses.replace(spec, is_strongly_typed=True, float32_layers=())
        return _build(folder, spec, builder, cache.default_folder())

    @precision("float32", options={**OPTIONS, "tf32": (True, False)}, kinds=("saved_model", "onnx"))
    def float32(self, conversion: Conversion, tf32: bool, **options: Any) -> None:
        """float32 in and out; products in TF32, with ten bits of mantissa, unless `tf32=False`.

        On GPUs with Tensor Cores TF32 is what TensorFlow itself does by default. Kernels are fused
        and chosen by timing them. `builder` names who builds the engine; by default the first
        that is there of TensorRT's Python API and ONNX Runtime's provider.
        """
        if conversion.engine.float32_layers:
            raise InputError(
                "All layers of float32@tensorrt are float32; name layers for float16 or int8, or "
                "give tf32=False."
            )
        builder = _builder(options["builder"])
        _prepare(conversion)
        _finish(conversion, builder, options, precision="float32", tf32=tf32)
        conversion.notes.append(note_on_tf32(tf32))

    @precision(
        "float16",
        options=OPTIONS,
        kinds=("saved_model", "onnx"),
        suitability=lambda: _suitability("float16"),
    )
    def float16(self, conversion: Conversion, **options: Any) -> None:
        """float16 kernels; inputs and outputs keep their types.

        Until TensorRT 10 float16 is allowed, and taken where it is faster. Since TensorRT 11, and
        with 10 where anything stays float32, networks are strongly typed: the file is cast to
        float16. Operations whose values on real
        examples come near the largest of float16 (65504) stay float32, and so do the layers that
        `float32_layers` names.
        """
        builder = _builder(options["builder"])
        _prepare(conversion)
        _finish_half(conversion, builder, options, "float16", _named(conversion))

    @precision(
        "int8",
        options={**OPTIONS, "calibration": ("minmax", "percentile", "entropy")},
        kinds=("saved_model", "onnx"),
        is_calibrated=True,
        suitability=lambda: _suitability("int8"),
    )
    def int8(self, conversion: Conversion, calibration: str, **options: Any) -> None:
        """int8 products by symmetric pairs of quantization in the file; the rest in float16.

        Ranges of activations are from real examples (`minmax`, `percentile` or `entropy`, see
        `tfopt.onnx.quantize`), scales of weights are by channel, and all versions of TensorRT get
        the same pairs: their own calibrators are gone since TensorRT 11. A file that holds pairs
        already, from training with quantization, keeps them.
        """
        import onnx

        from tfopt.onnx import quantize

        builder = _builder(options["builder"])
        _prepare(conversion)
        file, kept = conversion.folder / FILE, _named(conversion)
        nodes = onnx.load(file, load_external_data=False).graph.node
        if any(node.op_type == "QuantizeLinear" for node in nodes):
            conversion.notes.append("Ranges are those that the model was trained with.")
        else:
            batches = conversion.calibration_batches(MIN_CALIBRATION)
            original = file.with_name("float32.onnx")
            file.rename(original)
            conversion.notes += quantize.to_int8(
                original, file, batches,
                calibration=calibration, per_channel=True, is_symmetric=True, excluded=kept,
            )  # fmt: skip
            original.unlink()
        _finish_half(conversion, builder, options, "int8", kept)


def _builder(asked: Value) -> str:
    """Who builds.

    Raises:
      ConversionError: when that one is not there.
    """
    reasons: dict[str, Callable[[], str | None]] = {
        "python": bindings.missing,
        "trtexec": trtexec.missing,
        "onnxruntime": provider_library.missing,
    }
    if asked == "any":
        return "python" if bindings.missing() is None else "onnxruntime"
    reason = reasons[str(asked)]()
    if reason is None and asked == "trtexec":
        reason = _cannot_run_trtexec()
    if reason is not None:
        raise ConversionError(f"builder={asked} cannot be used here: {reason}")
    return str(asked)


def _cannot_run_trtexec() -> str | None:
    """Why an engine that `trtexec` builds would not run here: the Python API runs it."""
    if (reason := bindings.missing()) is not None:
        return f"its engines are run by TensorRT's Python API, and {reason}"
    made, run = (_libraries(builder)["TensorRT"] for builder in ("trtexec", "python"))
    if made == run:
        return None
    return (
        f"trtexec is of TensorRT {made} and the package tensorrt loads {run}, which does not run "
        "its engines; put the trtexec of the same version on the PATH."
    )


def _libraries(builder: str) -> dict[str, str]:
    """Versions that engines of a builder belong to."""
    if builder == "onnxruntime":
        return provider_library.versions()
    if builder == "trtexec":
        program = trtexec.find()
        version = "" if program is None else trtexec.version(program) or ""
    else:
        version = bindings.version()
    return {"TensorRT": version}


def _needs_types(builder: str) -> bool:
    """Whether the builder's TensorRT takes precisions from the file alone."""
    if builder == "python":
        return build.needs_strong_typing()
    return _major(builder) >= 11


def _is_typed(builder: str, kept: Collection[str]) -> bool:
    """Whether the file says the types, and not flags of the builder.

    With layers that stay float32 it does from TensorRT 10 on: 10.0 was seen not to obey what layers
    are told, and nobody says since when it does (https://github.com/NVIDIA/TensorRT/issues/3941).
    ONNX Runtime has no option for single layers.
    """
    return _needs_types(builder) or (
        bool(kept) and (builder == "onnxruntime" or _major(builder) >= 10)
    )


def _major(builder: str) -> int:
    """The first number of the builder's TensorRT."""
    return int(_libraries(builder).get("TensorRT", "0").split(".")[0] or 0)


def _prepare(conversion: Conversion) -> None:
    """Writes the ONNX file: the one of `float32@onnxruntime`, whose notes are of no interest."""
    alone = dataclasses.replace(conversion, notes=[])
    runtimes.get("onnxruntime").convert(Variant("float32", "onnxruntime"), alone)
    _take_in_weights(conversion.folder / FILE)
    _inline_functions(conversion.folder / FILE)
    _name_nodes(conversion.folder / FILE)


def _take_in_weights(file: Path) -> None:
    """Moves weights that lie beside the file into it, as it is rewritten with them."""
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    tensors = onnx.load(file, load_external_data=False).graph.initializer
    beside = {ExternalDataInfo(tensor).location for tensor in tensors if uses_external_data(tensor)}
    if beside:
        num_bytes = sum((file.parent / name).stat().st_size for name in beside)
        if num_bytes + file.stat().st_size > MAX_FILE_BYTES:
            raise ConversionError(
                f"The ONNX model has {num_bytes:,} bytes of weights beside it, and is rewritten as "
                "one file here, which holds 2 GiB at most; build its engine with trtexec itself."
            )
        _rewrite(file, lambda model: model)
        for name in beside:
            (file.parent / name).unlink()


def _inline_functions(file: Path) -> None:
    """Puts functions of the file's own in their place: TensorRT 8 reads none."""
    import onnx
    from onnx import inliner

    if onnx.load(file, load_external_data=False).functions:
        _rewrite(file, lambda model: inliner.inline_local_functions(model, convert_version=True))


def _name_nodes(file: Path) -> None:
    """Gives every node a name: layers that stay float32 are chosen by it."""
    import onnx

    if all(node.name for node in onnx.load(file, load_external_data=False).graph.node):
        return

    def name(model: Any) -> Any:
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"unnamed_{index}"
        return model

    _rewrite(file, name)


def _named(conversion: Conversion) -> list[str]:
    """The nodes that the user wants in float32.

    Raises:
      InputError: when a pattern matches no node.
    """
    import onnx

    graph = onnx.load(conversion.folder / FILE, load_external_data=False).graph
    names = [node.name for node in graph.node if node.name]
    found: dict[str, None] = {}
    for pattern in conversion.engine.float32_layers:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            some = ", ".join(names[:NUM_NAMED])
            raise InputError(
                f"No layer matches {pattern!r} of `float32_layers`; the layers are {some}, … "
                f"({len(names)} in all)."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def _finish_half(
    conversion: Conversion,
    builder: str,
    options: dict[str, Any],
    precision: str,
    named: Collection[str],
) -> None:
    """Finishes an engine that computes in float16 where it computes in nothing narrower.

    Args:
      conversion: whose folder holds the ONNX file in float32, with pairs of Q and DQ for int8.
      builder: who builds.
      options: of the variant.
      precision: `float16` or `int8`.
      named: nodes that the user wants in float32.
    """
    from tfopt.onnx import half

    file, kept = conversion.folder / FILE, list(named)
    if conversion.calibration is not None:
        kept = list(dict.fromkeys([*kept, *half.beyond_float16(file, conversion.calibration())]))
    is_typed = _is_typed(builder, kept)
    if is_typed:
        _cast(file, kept)
    _note_kept(conversion, kept)
    _finish(
        conversion, builder, options, precision=precision, is_strongly_typed=is_typed,
        float32_layers=() if is_typed else tuple(half.of_floats(file, kept)),
    )  # fmt: skip


def _cast(file: Path, kept: Collection[str]) -> None:
    """Has the file itself say float16, as strongly typed networks want it."""
    from tfopt.onnx import half

    _rewrite(file, lambda model: half.to_float16(model, kept))


def _note_kept(conversion: Conversion, kept: Collection[str]) -> None:
    if kept:
        some = ", ".join(list(kept)[:NUM_NAMED])
        more = f" and {len(kept) - NUM_NAMED} more" if len(kept) > NUM_NAMED else ""
        conversion.notes.append(f"Kept in float32: {some}{more}.")


def _rewrite(file: Path, change: Callable[[Any], Any]) -> None:
    import onnx

    onnx.save_model(change(onnx.load(file)), file)


def _finish(conversion: Conversion, builder: str, options: dict[str, Any], **asked: Any) -> None:
    """Chooses the shapes, builds the engine and writes down what it is."""
    profile = shapes.choose(conversion, options["shapes"])
    signature = conversion.source.signature
    if profile.is_fixed:
        _fix_shapes(conversion.folder / FILE, profile)
        signature = signature.with_batch_size(profile.batch_size)
    mib = options["workspace_mib"]
    spec = EngineSpec(
        profile=profile, workspace_bytes=None if mib is None else mib << 20, **asked
    )  # fmt: skip
    folder = conversion.engine.cache_folder or cache.default_folder()
    conversion.notes += _build(conversion.folder, spec, builder, folder)
    conversion.signature = signature


def _fix_shapes(file: Path, profile: Profile) -> None:
    """Writes the one shape into the file, which tells TensorRT more than a profile."""

    def fix(model: Any) -> Any:
        from onnxruntime.tools.onnx_model_utils import fix_output_shapes, make_input_shape_fixed

        for name, found in profile.inputs.items():
            make_input_shape_fixed(model.graph, name, list(found.optimum))
        del model.graph.value_info[:]
        fix_output_shapes(model)
        return model

    _rewrite(file, fix)


def _lower(file: Path) -> None:
    """Brings a file to the operators that TensorRT 8.6 knows.

    It takes later ones for those, and computes something else.

    Raises:
      ConversionError: when that cannot be done.
    """
    from tfopt.onnx import opset

    try:
        _rewrite(file, lambda model: opset.lower_opset(model, LAST_OPSET_OF_8))
    except ConversionError as error:
        raise ConversionError(
            f"TensorRT 8.6 reads ONNX's operators up to version {LAST_OPSET_OF_8}; export the "
            f"model in that one (opset_version={LAST_OPSET_OF_8} in PyTorch). {error}"
        ) from error


def _build(folder: Path, spec: EngineSpec, builder: str, cache_folder: Path) -> list[str]:
    """Builds, or takes from the cache, the engine of a folder with an ONNX file.

    Returns:
      Sentences for the user.
    """
    target = Target.here(_libraries(builder))
    onnx_file, engine_file = folder / FILE, folder / ENGINE
    if _major(builder) == 8:
        _lower(onnx_file)
    key, notes = cache.engine_key(target, onnx_file, spec, builder), []
    try:
        cache_folder.mkdir(parents=True, exist_ok=True)
        spec = dataclasses.replace(spec, timing_cache=cache.timing_file(cache_folder, target))
    except OSError as error:
        notes.append(f"Nothing is kept for the next time in {cache_folder}: {error.strerror}.")
    built = None if builder == "onnxruntime" else cache.fetch(cache_folder, key, engine_file)
    if built is not None:
        notes.append("The engine was taken from the cache of an earlier build.")
    elif builder == "onnxruntime":
        built = provider.build(onnx_file, folder, spec)
    else:
        builders = {"python": build.build, "trtexec": trtexec.build}
        built = builders[builder](onnx_file, engine_file, spec)
        if spec.timing_cache is not None:
            try:
                cache.keep(cache_folder, key, engine_file, built)
            except OSError as error:
                notes.append(f"The engine is not kept in {cache_folder}: {error.strerror}.")
    if inspector.is_silently_float32(built.layers, spec.precision):
        raise ConversionError(
            f"TensorRT built an engine in which nothing is {spec.precision}: it found float32 "
            f"faster for every layer, or has no {spec.precision} kernels for them."
        )
    if built.layers:
        (folder / LAYERS).write_text(json.dumps(list(built.layers)))
    asked = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name not in ("profile", "timing_cache")
    }
    made = [
        f"Built with {built.builder} in {built.seconds:.0f} s for "
        f"{spec.profile.spell('optimum')}; it runs on {target} only.",
        *inspector.report(built.layers, spec.precision),
        *_of_memory(built),
        *built.notes,
        *notes,
    ]
    details = {
        "builder": builder,
        "spec": asked,
        "build_seconds": round(built.seconds, 1),
        "num_engines": int(built.figures.get("num_engines", 1)),
        "figures": dict(built.figures),
        "notes": made,
    }
    Record(target, spec.profile, details).save(folder)
    return made


def _of_memory(built: Built) -> list[str]:
    size = built.figures.get("device_memory_bytes")
    return [] if size is None else [f"Its activations take {size / 2**20:,.1f} MiB on the GPU."]


def _suitability(dtype: str) -> suitability.Suitability:
    gpus = environment.gpus()
    if not gpus:
        return suitability.Suitability(False, "TensorRT needs an NVIDIA GPU, and there is none.")
    return suitability.gpu(dtype, gpus[0].compute_capability)


RUNTIME = TensorRT()
