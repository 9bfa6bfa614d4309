"""Building engines on GPUs that have little memory left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tfopt.cuda import OutOfMemoryError
from tfopt.errors import ConversionError
from tfopt.trt.spec import Built, EngineSpec

FIRST_SMALLER_BYTES = 4 << 30  # after a workspace without limit
NUM_SMALLER = 3


def smaller(workspace_bytes: int | None) -> list[int]:
    """The workspaces that are tried when one was too large, each half of the one before."""
    first = FIRST_SMALLER_BYTES if workspace_bytes is None else workspace_bytes // 2
    return [first >> halvings for halvings in range(NUM_SMALLER)]


def build(builder: Callable[[EngineSpec], Built], spec: EngineSpec) -> Built:
    """Calls a builder, and again with smaller workspaces while it runs out of memory.

    Args:
      builder: raises OutOfMemoryError when the GPU has no memory left.
      spec: what to build first.

    Raises:
      ConversionError: when the smallest workspace is too large, too; says which was tried.
    """
    for workspace in (spec.workspace_bytes, *smaller(spec.workspace_bytes)):
        try:
            built = builder(dataclasses.replace(spec, workspace_bytes=workspace))
        except OutOfMemoryError as error:
            # Its traceback would keep the builder, with all it holds, beside the next one.
            failure, least = str(error), workspace
            continue
        if workspace == spec.workspace_bytes:
            return built
        note = (
            f"The engine was built with a workspace of {_mebibytes(workspace)}: with "
            f"{_mebibytes(spec.workspace_bytes)} the GPU ran out of memory."
        )
        return dataclasses.replace(built, notes=(*built.notes, note))
    raise ConversionError(
        "The GPU ran out of memory while the engine was built, at last with a workspace of "
        f"{_mebibytes(least)}; free memory on it, or use smaller batches ({failure})"
    )


def _mebibytes(workspace_bytes: int | None) -> str:
    return "no limit" if workspace_bytes is None else f"{workspace_bytes >> 20} MiB"
