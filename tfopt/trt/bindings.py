"""NVIDIA's Python bindings of TensorRT: whether they are there, which version, and their logger."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

from tfopt import cuda
from tfopt.trt import libraries

_BINDINGS = ("tensorrt-bindings", "tensorrt-cu12-bindings", "tensorrt-cu13-bindings")
INDEX = "--extra-index-url https://pypi.nvidia.com"


def load() -> Any:
    """NVIDIA's module `tensorrt`, or the bindings that it is another name of.

    Raises:
      ImportError: when it, or a library that it needs, is not there.
    """
    try:
        import tensorrt
    except ModuleNotFoundError as failure:
        if failure.name != "tensorrt":
            raise
        import tensorrt_bindings as tensorrt
    return tensorrt


def version() -> str:
    """The version of the loaded library, which engines belong to; bindings may be a patch off."""
    bindings = load().__version__
    found = libraries.find(f"libnvinfer.so.{bindings.split('.')[0]}").version
    return ".".join(bindings.split(".")[:3]) if found is None else libraries.spell(found)


@functools.cache
def missing() -> str | None:
    """Why the Python API cannot be used, and what to install; None when it can."""
    try:
        load()
    except ModuleNotFoundError:
        return (
            "NVIDIA's package tensorrt is not installed; pip install tensorrt-cu12, or "
            "tensorrt-cu13 where the driver is of CUDA 13."
        )
    except (ImportError, OSError) as error:
        return (
            f"TensorRT's libraries cannot be loaded ({error}); {_install()}, or put their folder "
            "on LD_LIBRARY_PATH."
        )
    return cuda.missing()


def _install() -> str:
    """How to get the libraries that the installed bindings want."""
    for package in _BINDINGS:
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
        return f"pip install {package.replace('bindings', 'libs')}=={found} {INDEX}"
    return "pip install tensorrt-cu12-libs of the version of tensorrt-cu12-bindings"


@functools.cache
def the_logger() -> Any:
    """The logger of this process, which keeps errors and prints nothing; plugins are registered.

    TensorRT stays with the first logger that it got for as long as any object of it lives, such as
    a session's, and passes over others: there is one.
    """
    trt = load()

    class Logger(trt.ILogger):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                self.messages.append(message)

        def reason(self) -> str:
            """The first error that tells something, as one line."""
            lines = [" ".join(text.split()) for text in self.messages]
            telling = [line for line in lines if "Skipping tactic" not in line]
            return (telling or lines or ["it does not say why."])[0][:300]

    logger = Logger()
    trt.init_libnvinfer_plugins(logger, "")
    return logger
