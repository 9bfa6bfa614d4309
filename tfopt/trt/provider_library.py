"""Whether ONNX Runtime can use TensorRT here: it was built for one version and loads no other."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import io
import re
from pathlib import Path

from tfopt.measure import environment
from tfopt.trt import libraries

TENSORRT = "TensorrtExecutionProvider"
LIBRARY = "libonnxruntime_providers_tensorrt.so"
INDEX = "--extra-index-url https://pypi.nvidia.com"

_MISSING = re.compile(r"(lib\S+?\.so)\.?([\d.]*): cannot open shared object file")


def missing() -> str | None:
    """Why ONNX Runtime cannot use TensorRT here, and what to install; None when it can."""
    try:
        import onnxruntime
    except ImportError:
        return "ONNX Runtime is not installed; pip install onnxruntime-gpu."
    if TENSORRT not in onnxruntime.get_available_providers():
        return (
            f"The installed onnxruntime {onnxruntime.__version__} was built without TensorRT; "
            "pip uninstall -y onnxruntime && pip install onnxruntime-gpu."
        )
    if not environment.gpus():
        return "There is no NVIDIA GPU here, which engines are built on."
    if (reason := unloadable()) is not None:
        return f"ONNX Runtime cannot load TensorRT: {advice(reason, _cuda_version())}"
    return None


def unloadable() -> str | None:
    """What the loader says when it cannot load the provider's library; None when it can."""
    preload()
    try:
        # As ONNX Runtime loads them: the second has symbols of the first.
        ctypes.CDLL(str(_folder() / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(_folder() / LIBRARY))
    except OSError as error:
        return str(error)
    return None


def advice(reason: str, cuda_version: str) -> str:
    """A sentence on what to install when the loader gave this reason.

    Args:
      reason: such as `libnvinfer.so.10: cannot open shared object file: …`.
      cuda_version: that ONNX Runtime was built for, such as `13.0`.
    """
    if (match := _MISSING.match(reason)) is None:
        return f"{reason}."
    library, number = match.groups()
    if not library.startswith(("libnvinfer", "libnvonnxparser")):
        pip = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    elif number.split(".")[0] == "8":
        pip = f"pip install tensorrt-libs==8.6.1 {INDEX}"
    else:
        package = f"tensorrt-cu{cuda_version.split('.')[0]}"
        pip = f"pip install '{package}~={number.split('.')[0]}.0' {INDEX}"
    return f"{library}.{number} is missing; {pip}."


def versions() -> dict[str, str]:
    """What its engines belong to besides the GPU: the versions of ONNX Runtime and TensorRT."""
    import onnxruntime

    found = {"onnxruntime": onnxruntime.__version__}
    tensorrt = libraries.find(f"libnvinfer.so.{linked()}").version
    if tensorrt is not None:
        found["TensorRT"] = libraries.spell(tensorrt)
    return found


def _folder() -> Path:
    """Where ONNX Runtime's libraries lie."""
    import onnxruntime

    return Path(onnxruntime.__file__).parent / "capi"


def linked() -> int:
    """The major version of TensorRT that ONNX Runtime was built for; 0 when for none."""
    file = _folder() / LIBRARY
    content = file.read_bytes() if file.is_file() else b""  # of 1 MB
    match = re.search(rb"libnvinfer\.so\.(\d+)", content)
    return int(match[1]) if match else 0


def _cuda_version() -> str:
    from onnxruntime.capi import build_and_package_info

    return getattr(build_and_package_info, "cuda_version", "")


def preload() -> None:
    """Loads what pip installed where the loader does not look: CUDA, cuDNN and TensorRT."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
        onnxruntime.preload_dlls()
    with contextlib.suppress(ImportError):
        importlib.import_module("tensorrt_libs")
