"""What an engine is to be, and what came of building it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfopt.trt.profiles import Profile

MIN_CALIBRATION = 8  # examples; ranges of fewer are chance


def note_on_tf32(tf32: bool) -> str:
    """What an artifact in float32 says of its products."""
    if tf32:
        return "Products of float32 are computed in TF32, as TensorFlow does by itself."
    return "Engines compute products of float32 in float32, without TF32."


@dataclasses.dataclass(frozen=True)
class EngineOptions:
    """What a user may say of engines besides the variant.

    Attributes:
      profile: shapes that the engine is for; None takes them from the data.
      float32_layers: names of layers that stay float32, shell patterns such as `*/Softmax`.
      cache_folder: where engines and timings of kernels are kept for the next time; None is
        `$XDG_CACHE_HOME/tfopt/tensorrt`, else `~/.cache/tfopt/tensorrt`.
    """

    profile: Profile | None = None
    float32_layers: tuple[str, ...] = ()
    cache_folder: Path | None = None


@dataclasses.dataclass(frozen=True)
class EngineSpec:
    """One engine to build from an ONNX file.

    Attributes:
      precision: `float32`, `float16` or `int8`; an int8 file holds Q/DQ pairs already.
      profile: the shapes.
      tf32: whether float32 products may be computed in TF32, with ten bits of mantissa.
      workspace_bytes: scratch memory of kernels; None is all that the GPU has.
      float32_layers: names of layers that must stay float32, resolved from the patterns.
      is_strongly_typed: whether the file says by its types what each layer computes in.
      optimization_level: TensorRT's builder optimization level, 0 to 5; 3 is TensorRT's default.
      timing_cache: file with the timings of kernels, read and written; None keeps none.
    """

    precision: str
    profile: Profile
    tf32: bool = True
    workspace_bytes: int | None = None
    float32_layers: tuple[str, ...] = ()
    is_strongly_typed: bool = False
    optimization_level: int = 3
    timing_cache: Path | None = None


@dataclasses.dataclass(frozen=True)
class Built:
    """What building an engine told.

    Attributes:
      builder: what built it, such as `tensorrt 10.13.3` or `trtexec 8.6.1`.
      seconds: of building, without the conversion before.
      layers: the engine inspector's layers; empty where there is no inspector.
      figures: others that the builder reported, such as `device_memory_bytes`.
      notes: sentences for the user.
    """

    builder: str
    seconds: float
    layers: tuple[Mapping[str, Any], ...] = ()
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
