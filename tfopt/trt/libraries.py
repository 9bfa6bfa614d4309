"""Which TensorRT is installed: asked of the library itself, without TensorFlow.

TensorFlow ends the whole process when it is asked for the version of a library that cannot be
loaded, and so does the import of its converter: here it is looked at first.
"""

from __future__ import annotations

import ctypes
import dataclasses

Version = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Library:
    """TensorRT's library `libnvinfer`, as far as it can be loaded.

    Attributes:
      version: (major, minor, patch); None when it cannot be loaded.
      reason: why not, as the loader says it: it names the file that is missing.
    """

    version: Version | None
    reason: str = ""


def find(name: str) -> Library:
    """Loads a library such as `libnvinfer.so.8.6.1` and asks for its version."""
    try:
        library = ctypes.CDLL(name)
        number = library.getInferLibVersion()
    except (OSError, AttributeError) as error:
        return Library(None, str(error))
    return Library(decode(number))


def why_not(name: str) -> str:
    """Why a library cannot be loaded, as the loader says it; empty when it can."""
    try:
        ctypes.CDLL(name)
    except OSError as error:
        return str(error)
    return ""


def decode(number: int) -> Version:
    """Reads what `getInferLibVersion` returns.

    Source: NvInferVersion.h, NV_TENSORRT_VERSION: major × 1000 + minor × 100 + patch until
    TensorRT 9, major × 10000 + minor × 100 + patch since.
    """
    scale = 1000 if number < 10000 else 10000
    return number // scale, number % scale // 100, number % 100


def spell(version: Version) -> str:
    """A version with points."""
    return ".".join(map(str, version))


def runs_together(linked: Version, loaded: Version) -> bool:
    """Whether a program that was linked against one version runs with another.

    Within a minor version the patches are compatible both ways, beyond that a newer one of the same
    major version takes the place of an older one (NVIDIA's documentation, "Versioning").
    """
    return loaded[0] == linked[0] and loaded[:2] >= linked[:2]
