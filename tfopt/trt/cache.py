"""Engines and kernel timings that are kept for the next time.

Engines go by everything that they depend on: GPU, driver, libraries, model, what was asked for, and
the version of tfopt, which decides how it is asked.
Timings go by GPU, driver and libraries; a build that finds them need not measure kernels again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tfopt
from tfopt.trt.spec import Built, EngineSpec
from tfopt.trt.target import Target


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/tfopt/tensorrt`, else `~/.cache/tfopt/tensorrt`."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home, "tfopt", "tensorrt")


def timing_file(folder: Path, target: Target) -> Path:
    """Where the timings of a target are kept."""
    return folder / f"{target.key('timings')}.timings"


def engine_key(target: Target, onnx_file: Path, spec: EngineSpec, builder: str) -> str:
    """What an engine goes by."""
    asked: dict[str, Any] = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name not in ("timing_cache", "profile")
    }
    return target.key(
        "engine", tfopt.__version__, builder, hash_model(onnx_file), asked, spec.profile.to_json()
    )


def hash_model(onnx_file: Path) -> str:
    """SHA-256 of an ONNX file and of what lies beside it, such as its weights."""
    digest = hashlib.sha256()
    for file in sorted(path for path in onnx_file.parent.rglob("*") if path.is_file()):
        digest.update(file.relative_to(onnx_file.parent).as_posix().encode() + bytes(1))
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def fetch(folder: Path, key: str, engine_file: Path) -> Built | None:
    """Copies a kept engine to where it is needed; None if there is none."""
    engine, record = folder / f"{key}.engine", folder / f"{key}.json"
    try:
        value: Mapping[str, Any] = json.loads(record.read_text())
        built = Built(
            value["builder"], value["seconds"], tuple(value["layers"]), value["figures"],
            tuple(value["notes"]),
        )  # fmt: skip
        shutil.copyfile(engine, engine_file)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # it is made anew
    return built


def keep(folder: Path, key: str, engine_file: Path, built: Built) -> None:
    """Keeps an engine; whoever looks finds all of it or nothing.

    Args:
      folder: of the cache.
      key: what `engine_key` gives.
      engine_file: the engine.
      built: what building it told.

    Raises:
      OSError: when the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (
        (f"{key}.engine", lambda path: shutil.copyfile(engine_file, path)),
        (f"{key}.json", lambda path: path.write_text(json.dumps(dataclasses.asdict(built)))),
    ):
        unfinished = folder / f".{name}.{os.getpid()}"
        write(unfinished)
        unfinished.replace(folder / name)
