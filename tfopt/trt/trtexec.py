"""Engines built by NVIDIA's program `trtexec`, which comes with TensorRT's packages.

Its options differ between versions (https://github.com/NVIDIA/TensorRT,
samples/common/sampleOptions.cpp; https://docs.nvidia.com/deeplearning/tensorrt, "Migrating trtexec
Usage"): `--fp16`, `--int8` and precisions of layers ended with TensorRT 11, where every network is
strongly typed; `--stronglyTyped` says that in TensorRT 10.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from tfopt.cuda import OutOfMemoryError
from tfopt.errors import ConversionError
from tfopt.trt import free_inputs, inspector, memory, trtexec_log
from tfopt.trt.spec import Built, EngineSpec
from tfopt.trt.trtexec_log import TrtexecLog

PACKAGED = Path("/usr/src/tensorrt/bin/trtexec")
"""Where NVIDIA's Debian packages and containers put it."""
OLDEST = (8, 6)
TIMED_SECONDS = 1
ACCURACY = re.compile(r"accura|overflow|subnormal", re.IGNORECASE)


def find() -> Path | None:
    """The program, on the PATH or where NVIDIA's packages put it."""
    if (found := shutil.which("trtexec")) is not None:
        return Path(found)
    return PACKAGED if PACKAGED.is_file() else None


def version(program: Path) -> str | None:
    """The TensorRT version that the program says it has; None when it cannot be started."""
    return _help(program).version


def missing() -> str | None:
    """Why engines cannot be built by `trtexec`, and what to install; None when they can."""
    try:
        _usable()
    except ConversionError as error:
        return str(error)
    return None


def command(
    program: Path,
    onnx_file: Path,
    engine_file: Path,
    layers_file: Path,
    spec: EngineSpec,
    version: str,
) -> list[str]:
    """What is called to build an engine and to time it for a second.

    Args:
      program: `trtexec`.
      onnx_file: to read.
      engine_file: to write.
      layers_file: to write the inspector's JSON to.
      spec: what to build; its profile is of the inputs that the file leaves free.
      version: of the program.

    Raises:
      ConversionError: when this version cannot build it.
    """
    found = [
        str(program),
        f"--onnx={onnx_file}",
        f"--saveEngine={engine_file}",
        f"--builderOptimizationLevel={spec.optimization_level}",
        "--profilingVerbosity=detailed",
        f"--exportLayerInfo={layers_file}",
        f"--duration={TIMED_SECONDS}",
    ]
    if spec.profile.inputs:
        found += [
            f"--minShapes={spec.profile.spell('minimum')}",
            f"--optShapes={spec.profile.spell('optimum')}",
            f"--maxShapes={spec.profile.spell('maximum')}",
        ]
    found += _precision(spec, version)
    if not spec.tf32:
        found.append("--noTF32")
    if spec.workspace_bytes is not None:
        found.append(f"--memPoolSize=workspace:{max(1, spec.workspace_bytes >> 20)}")  # of MiB
    if spec.timing_cache is not None:
        found.append(f"--timingCacheFile={spec.timing_cache}")
    return found


def build(onnx_file: Path, engine_file: Path, spec: EngineSpec) -> Built:
    """Builds an engine; with smaller workspaces where the GPU runs out of memory.

    Args:
      onnx_file: what to build from.
      engine_file: where the engine goes.
      spec: what to build.

    Raises:
      ConversionError: when it cannot be built here, with the reason from the log.
    """
    program, known = _usable()
    spec = dataclasses.replace(spec, profile=free_inputs.restrict(spec.profile, onnx_file))
    if spec.timing_cache is not None:
        spec.timing_cache.parent.mkdir(parents=True, exist_ok=True)
    return memory.build(
        lambda smaller: _build_once(program, onnx_file, engine_file, smaller, known), spec
    )


def _build_once(
    program: Path, onnx_file: Path, engine_file: Path, spec: EngineSpec, version: str
) -> Built:  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        layers_file = Path(folder, "layers.json")
        begin = time.monotonic()
        ended = subprocess.run(
            command(program, onnx_file, engine_file, layers_file, spec, version),
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False,
        )  # fmt: skip
        seconds = time.monotonic() - begin
        log = trtexec_log.parse(ended.stdout)
        # It may say that it passed without an engine that anything can be done with.
        is_written = engine_file.is_file() and engine_file.stat().st_size > 0
        if ended.returncode or not log.is_passed or not is_written:
            engine_file.unlink(missing_ok=True)
            reason = log.reason or f"it ended with status {ended.returncode}, without a reason"
            kind = OutOfMemoryError if log.is_out_of_memory else ConversionError
            raise kind(f"trtexec {version} built no engine: {reason}.")
        layers, note = _layers(layers_file)
    return Built(
        builder=f"trtexec {version}",
        seconds=seconds if log.build_seconds is None else log.build_seconds,
        layers=tuple(layers),
        figures=_figures(log),
        notes=(*_notes(log), *([note] if note else [])),
    )


def _usable() -> tuple[Path, str]:
    """The program and its version.

    Raises:
      ConversionError: when it cannot be used here.
    """
    if (program := find()) is None:
        raise ConversionError(
            f"trtexec is neither on the PATH nor at {PACKAGED}; it comes with NVIDIA's Debian "
            "packages (apt-get install libnvinfer-bin) and containers, and not with pip."
        )
    log = _help(program)
    if log.version is None:
        raise ConversionError(
            f"{program} cannot be started: {log.reason or 'it does not say why'}."
        )
    if _numbers(log.version) < OLDEST:
        raise ConversionError(
            f"{program} is of TensorRT {log.version}; 8.6 is the oldest that tfopt knows."
        )
    return program, log.version


def _precision(spec: EngineSpec, version: str) -> list[str]:
    """The options that say in which precisions layers may compute."""
    major = _numbers(version)[0]
    if spec.is_strongly_typed or spec.precision == "float32":
        if spec.is_strongly_typed and major < 10:
            raise ConversionError(
                f"trtexec {version} knows no strongly typed networks, which came with TensorRT 10."
            )
        return ["--stronglyTyped"] if spec.is_strongly_typed and major == 10 else []
    if major > 10:
        raise ConversionError(
            f"trtexec {version} has no option for {spec.precision}: TensorRT 11 computes in the "
            "types that the ONNX file has, and would build a float32 engine."
        )
    found = {"float16": ["--fp16"], "int8": ["--int8", "--fp16"]}[spec.precision]
    if spec.float32_layers:
        for name in spec.float32_layers:
            if set(name) & set(",'*"):
                raise ConversionError(
                    f"Layer {name!r} cannot be kept in float32 by trtexec, which splits names at "
                    "commas, drops quotation marks and reads * as a pattern; rename it."
                )
        # What a layer computes in does not say what it hands on, in float16 if that is faster.
        each = ",".join(f"{name}:fp32" for name in spec.float32_layers)
        found += ["--precisionConstraints=obey", f"--layerPrecisions={each}"]
        found.append(f"--layerOutputTypes={each}")
    return found


def _help(program: Path) -> TrtexecLog:
    try:
        ended = subprocess.run(
            [program, "--help"],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace", check=False, timeout=60,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return trtexec_log.parse(f"[E] {error}")
    return trtexec_log.parse(ended.stdout)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def _layers(file: Path) -> tuple[list[dict[str, Any]], str]:
    """As `inspector.parse`; none where the program wrote no such file."""
    return inspector.parse(file.read_text(errors="replace")) if file.is_file() else ([], "")


def _figures(log: TrtexecLog) -> dict[str, float]:
    figures = {
        "engine_bytes": log.engine_bytes,
        "device_memory_bytes": log.device_memory_bytes,
        "throughput_per_s": log.throughput_per_s,
    }
    found = {name: value for name, value in figures.items() if value is not None}
    for name in ("latency", "gpu_compute", "host_to_device", "device_to_host"):
        if (times := getattr(log, name)) is not None:
            found[f"{name}_median_ms"] = times.median_ms
    return found


def _notes(log: TrtexecLog) -> tuple[str, ...]:
    notes = []
    if log.latency is not None and log.gpu_compute is not None:
        notes.append(
            f"trtexec timed it for {TIMED_SECONDS} s on {log.gpu or 'the GPU'} with random inputs "
            f"of the optimal shapes: median latency {log.latency.median_ms:.3g} ms with copies, "
            f"of which the GPU computes {log.gpu_compute.median_ms:.3g} ms."
        )
    warnings = [text.lstrip("- ") for text in log.warnings if ACCURACY.search(text)]
    notes += [f"TensorRT warns: {text}" for text in dict.fromkeys(warnings)]
    return tuple(notes)
