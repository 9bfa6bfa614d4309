"""Engines that ONNX Runtime builds and runs: its TensorRT execution provider.

It splits a model into parts that TensorRT can compute, an engine each, and leaves the rest to CUDA
and the processor (https://onnxruntime.ai/docs/execution-providers/TensorRT-ExecutionProvider.html).
The options used here are those of ONNX Runtime 1.17 and later.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tfopt.artifact import Artifact
from tfopt.cuda import OutOfMemoryError
from tfopt.errors import ConversionError, InputError, first_line
from tfopt.logs import copied_stderr
from tfopt.runtimes.base import Arrays, Session
from tfopt.trt import free_inputs, memory, provider_library
from tfopt.trt.profiles import Profile
from tfopt.trt.provider_library import TENSORRT
from tfopt.trt.spec import Built, EngineSpec

PROVIDERS = (TENSORRT, "CUDAExecutionProvider", "CPUExecutionProvider")
RECORD = "provider.json"
"""What a session is opened with, beside the model."""
ENGINES = "engines"
"""The folder of engines beside the model."""

_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)
_PROFILE = {"minimum": "min", "optimum": "opt", "maximum": "max"}


def options(spec: EngineSpec, engines: Path) -> dict[str, str]:
    """The provider's options that build an engine.

    ONNX Runtime builds a strongly typed network when no precision is allowed besides float32. Where
    float16 is allowed, layer normalization stays in float32, as it overflows easily.

    Args:
      spec: what to build; its profile is of the inputs that the file leaves free.
      engines: the folder of engines, read and written.
    """
    allows = () if spec.is_strongly_typed else {
        "float32": (), "float16": ("float16",), "int8": ("float16", "int8"),
    }[spec.precision]  # fmt: skip
    found = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(engines),
        "trt_fp16_enable": str("float16" in allows),
        "trt_int8_enable": str("int8" in allows),
        "trt_layer_norm_fp32_fallback": str("float16" in allows),
        "trt_builder_optimization_level": str(spec.optimization_level),
    }
    if spec.workspace_bytes is not None:
        found["trt_max_workspace_size"] = str(spec.workspace_bytes)
    if spec.timing_cache is not None:
        # ONNX Runtime names the file by the compute capability alone: a folder for each target.
        found["trt_timing_cache_enable"] = "True"
        found["trt_timing_cache_path"] = str(spec.timing_cache.with_suffix(""))
    if spec.profile.inputs:
        for end, short in _PROFILE.items():
            found[f"trt_profile_{short}_shapes"] = spec.profile.spell(end)
    return found


def check(spec: EngineSpec, tensorrt: int) -> None:
    """Refuses what the provider has no option for.

    Args:
      spec: what is to be built.
      tensorrt: the major version that ONNX Runtime was built for.

    Raises:
      ConversionError: says what and where else it can be had.
    """
    other = "build the engine with the tensorrt package or with trtexec"
    if not spec.tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        raise ConversionError(
            "ONNX Runtime has no option that keeps TensorRT from TF32; set "
            f"NVIDIA_TF32_OVERRIDE=0, or {other}."
        )
    if spec.float32_layers and not spec.is_strongly_typed:
        raise ConversionError(
            f"ONNX Runtime has no option that keeps single layers in float32; {other}."
        )
    if spec.is_strongly_typed and tensorrt < 10:
        raise ConversionError(
            f"This ONNX Runtime is for TensorRT {tensorrt}; strongly typed networks came with 10."
        )
    if spec.precision != "float32" and not spec.is_strongly_typed and tensorrt > 10:
        raise ConversionError(
            f"This ONNX Runtime is for TensorRT {tensorrt}, which computes in the types that the "
            f"ONNX file has and would build a float32 engine instead of {spec.precision}."
        )


def build(onnx_file: Path, folder: Path, spec: EngineSpec) -> Built:
    """Builds the engines of a model, where a `ProviderSession` finds them.

    Args:
      onnx_file: the model; a file of `folder`.
      folder: of the artifact; gets `engines/` and `provider.json`.
      spec: what to build; with smaller workspaces where the GPU runs out of memory.

    Raises:
      ConversionError: when it cannot be built here, or when TensorRT takes no part of the model.
    """
    if (reason := provider_library.missing()) is not None:
        raise ConversionError(reason)
    check(spec, provider_library.linked())
    spec = replace(spec, profile=free_inputs.restrict(spec.profile, onnx_file))
    engines = folder / ENGINES
    engines.mkdir(exist_ok=True)
    if spec.timing_cache is not None:
        spec.timing_cache.with_suffix("").mkdir(parents=True, exist_ok=True)
    return memory.build(lambda smaller: _build_once(onnx_file, engines, smaller), spec)


def _build_once(onnx_file: Path, engines: Path, spec: EngineSpec) -> Built:
    chosen = options(spec, engines)
    lines: list[str] = []
    begin = time.monotonic()
    try:
        with copied_stderr() as lines:
            session = _open(onnx_file, chosen, None)
    except ConversionError as error:
        if any(map(_MEMORY.search, lines)):
            raise OutOfMemoryError(str(error)) from error
        raise
    seconds = time.monotonic() - begin
    notes = describe(_assigned(session), len(list(engines.glob("*.engine"))))
    kept = {
        name: value for name, value in chosen.items()
        if name != "trt_engine_cache_path" and not name.startswith("trt_timing_cache")
    }  # fmt: skip
    record = {"file": onnx_file.name, "options": kept}
    (engines.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    return Built(f"onnxruntime {provider_library.versions()['onnxruntime']}", seconds, notes=notes)


def describe(assigned: Sequence[tuple[str, str]], num_engines: int) -> tuple[str, ...]:
    """Sentences on what runs where.

    Args:
      assigned: provider and operator of each node; empty where ONNX Runtime does not tell.
      num_engines: how many were built.

    Raises:
      ConversionError: when there are none.
    """
    outside = Counter(op for provider, op in assigned if provider != TENSORRT)
    left = ", ".join(f"{op} ({count})" for op, count in sorted(outside.items()))
    if not num_engines:
        raise ConversionError(
            "ONNX Runtime gave no part of the model to TensorRT"
            + (f"; its operators are {left}." if left else ".")
        )
    engines = "one engine" if num_engines == 1 else f"{num_engines} engines"
    if not assigned:
        return (f"The model runs in {engines} of TensorRT.",)
    num_inside = len(assigned) - outside.total()
    notes = [f"{num_inside} of {len(assigned)} nodes run in {engines} of TensorRT."]
    for provider in PROVIDERS[1:]:
        if ops := sorted({op for found, op in assigned if found == provider}):
            place = provider.removesuffix("ExecutionProvider")
            notes.append(f"On {place} stayed: {', '.join(ops)}.")
    return tuple(notes)


class ProviderSession(Session):
    """A session of ONNX Runtime that loads engines and builds none.

    It gets a copy of the engines in a temporary folder, which goes away when they are loaded: ONNX
    Runtime writes into its cache when it finds no engine there that fits, and an artifact is not
    to change by being loaded. That it built another is an error.
    """

    def __init__(self, artifact: Artifact, num_threads: int | None):
        super().__init__(artifact)
        if (reason := provider_library.missing()) is not None:
            raise ConversionError(reason)
        record = _read_record(artifact.folder)
        chosen = record["options"]
        self._profile = Profile({})
        if "trt_profile_min_shapes" in chosen:
            ends = (chosen[f"trt_profile_{short}_shapes"] for short in _PROFILE.values())
            self._profile = Profile.parse(*ends)
        with tempfile.TemporaryDirectory() as name:
            engines = Path(name, ENGINES)
            shutil.copytree(artifact.folder / ENGINES, engines)
            before = _stamps(engines)
            self._session = _open(
                artifact.folder / record["file"],
                {**chosen, "trt_engine_cache_path": str(engines)},
                num_threads,
            )
            if _stamps(engines) != before:
                raise ConversionError(
                    f"ONNX Runtime did not take the engines in {artifact.folder} and built "
                    "others; convert the model again on this machine."
                )
        self._names = [output.name for output in self._session.get_outputs()]

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        try:
            outside = self._profile.outside(inputs)
            outputs = None if outside else self._session.run(None, inputs)
        except Exception as error:
            self.check_inputs(inputs, error)
            raise
        if outputs is None:
            raise InputError(str(outside))
        return dict(zip(self._names, outputs, strict=True))

    def close(self) -> None:  # noqa: D102
        del self._session


def _open(file: Path, chosen: Mapping[str, str], num_threads: int | None) -> Any:
    import onnxruntime

    provider_library.preload()
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # Else ONNX Runtime makes biases int32, which TensorRT does not take.
    settings.add_session_config_entry("session.disable_quant_qdq", "1")
    if num_threads is not None:
        settings.intra_op_num_threads = num_threads
    try:
        session = onnxruntime.InferenceSession(
            str(file),
            settings,
            providers=[(TENSORRT, dict(chosen)), *PROVIDERS[1:]],
            enable_fallback=0,  # it would print the error and go on without TensorRT
        )
    except Exception as error:  # ONNX Runtime's errors have no common base class
        raise ConversionError(
            f"ONNX Runtime has no TensorRT engine for {file.name}: {first_line(error)}"
        ) from error
    if TENSORRT not in session.get_providers():  # it goes on without a word
        raise ConversionError(f"ONNX Runtime left TensorRT out for {file.name}.")
    return session


def _assigned(session: Any) -> list[tuple[str, str]]:
    """Provider and operator of each node; empty before ONNX Runtime 1.24, which cannot tell."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        return []
    return [
        (part.ep_name, node.op_type)
        for part in session.get_provider_graph_assignment_info()
        for node in part.get_nodes()
    ]


def _read_record(folder: Path) -> dict[str, Any]:
    try:
        record = json.loads((folder / RECORD).read_text())
        return {"file": record["file"], "options": dict(record["options"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / RECORD} is missing or damaged ({error}); convert the model again."
        ) from error


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of each file."""
    return {
        path.name: (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.iterdir()
    }  # fmt: skip
