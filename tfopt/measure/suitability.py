"""What a processor or GPU gains from half precision, and a GPU from int8."""

from __future__ import annotations

import dataclasses
import sys

from tfopt.measure import environment

_INSTRUCTIONS = {
    "bfloat16": {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "BF16"},
    "float16": {"amx_fp16": "AMX-FP16", "avx512_fp16": "AVX512-FP16", "asimdhp": "FP16"},
}
_TENSOR_CORES_SINCE = {"bfloat16": (8, 0), "float16": (7, 0), "int8": (7, 5)}


@dataclasses.dataclass(frozen=True)
class Suitability:
    """Whether a machine gains from a precision.

    Attributes:
      suits: whether a search tries it by itself.
      reason: why, a sentence.
      works: whether it can be tried at all; if not, a search skips it even when asked for.
    """

    suits: bool
    reason: str
    works: bool = True


def cpu(dtype: str, flags: frozenset[str]) -> Suitability:
    """What a processor gains from `bfloat16` or `float16`, by its extensions as Linux names them.

    Source: oneDNN's documentation of data types, which instructions each needs. On x86 without
    AVX512 it has no bfloat16 at all: TensorFlow then rewrites nothing, and OpenVINO computes in
    float32.
    """
    found = next((text for flag, text in _INSTRUCTIONS[dtype].items() if flag in flags), None)
    if found:
        return Suitability(
            True,
            f"This CPU has {dtype} instructions ({found}), which convolutions and matrix products "
            "can use.",
        )
    expected = " or ".join(list(_INSTRUCTIONS[dtype].values())[:2])
    return Suitability(
        False,
        f"This CPU has no {dtype} instructions ({expected}) and casts to float32 and back, so it "
        "would only be slower.",
        works=dtype != "bfloat16" or "sse2" not in flags or "avx512f" in flags,
    )


def gpu(dtype: str, compute_capability: tuple[int, int] | None) -> Suitability:
    """What an NVIDIA GPU gains from `bfloat16`, `float16` or `int8`.

    Source: NVIDIA, "Train With Mixed Precision", which data types Tensor Cores multiply.

    Args:
      dtype: one of these.
      compute_capability: (major, minor); None where nothing tells it.
    """
    if compute_capability is None:
        return Suitability(False, f"This GPU does not tell whether it gains from {dtype}.")
    version = ".".join(map(str, compute_capability))
    if compute_capability >= _TENSOR_CORES_SINCE[dtype]:
        return Suitability(
            True, f"This GPU's Tensor Cores (compute capability {version}) multiply {dtype}."
        )
    what = "has no Tensor Cores"
    if compute_capability >= min(_TENSOR_CORES_SINCE.values()):
        what = f"has no Tensor Cores for {dtype}"
    needed = ".".join(map(str, _TENSOR_CORES_SINCE[dtype]))
    return Suitability(
        False,
        f"This GPU {what} (compute capability {version}, they came with {needed}), so it would "
        "hardly be faster.",
    )


def of_this_cpu(dtype: str) -> Suitability:
    """What this machine's processor gains."""
    return cpu(dtype, environment.cpu_flags())


def of_tensorflow(dtype: str) -> Suitability:
    """What TensorFlow gains here: on its first GPU, else on the processor."""
    # Without a sign of a GPU it is not imported for this, which takes seconds.
    device = tensorflow_gpu() if environment.gpus() or "tensorflow" in sys.modules else None
    if device is not None:
        return gpu(dtype, device[1])
    if dtype == "float16":
        return Suitability(False, "TensorFlow computes float16 fast on GPUs only, and sees none.")
    return of_this_cpu(dtype)


def tensorflow_gpu() -> tuple[str, tuple[int, int] | None] | None:
    """Name and compute capability of TensorFlow's first GPU; None if it sees none."""
    import tensorflow as tf

    for device in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(device)
        return details.get("device_name", device.name), details.get("compute_capability")
    return None
