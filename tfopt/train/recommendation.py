"""What half precision this machine gains from."""

from __future__ import annotations

import dataclasses

from tfopt.measure import environment


@dataclasses.dataclass(frozen=True)
class PrecisionAdvice:
    """A policy for this machine.

    Attributes:
      policy: `mixed_bfloat16`, `mixed_float16` or `float32`, as `set_precision` takes it.
      device: what would compute.
      reason: why, in a sentence.
    """

    policy: str
    device: str
    reason: str

    def __str__(self) -> str:
        return f"{self.policy} on {self.device}: {self.reason}"


def recommend_precision() -> PrecisionAdvice:
    """Says what half precision this machine gains from, and why.

    The first GPU that TensorFlow sees decides, else the processor. Sources: NVIDIA, "Train With
    Mixed Precision" (which data types Tensor Cores multiply by compute capability), and oneDNN's
    documentation of data types (which instructions bfloat16 needs).
    """
    import tensorflow as tf

    for gpu in tf.config.list_physical_devices("GPU"):
        details = tf.config.experimental.get_device_details(gpu)
        return for_gpu(details.get("device_name", gpu.name), details.get("compute_capability"))
    return for_cpu(environment.cpu_model(), environment.cpu_flags())


def for_gpu(name: str, compute_capability: tuple[int, int] | None) -> PrecisionAdvice:
    """The advice for a GPU; `compute_capability` is (major, minor), None for one without."""
    if compute_capability is None:
        reason = "it tells no compute capability, so nothing is known of its half precision."
        return PrecisionAdvice("float32", name, reason)
    version = ".".join(map(str, compute_capability))
    if compute_capability >= (8, 0):
        reason = (
            f"its Tensor Cores (compute capability {version}) multiply bfloat16 as fast as "
            "float16, and bfloat16 has the range of float32, so that no loss is scaled; float16 "
            "has three bits more and can be a few percent faster."
        )
        return PrecisionAdvice("mixed_bfloat16", name, reason)
    if compute_capability >= (7, 0):
        reason = (
            f"its Tensor Cores (compute capability {version}) multiply float16 and not bfloat16."
        )
        return PrecisionAdvice("mixed_float16", name, reason)
    reason = f"it has no Tensor Cores (compute capability {version}; they came with 7.0)."
    return PrecisionAdvice("float32", name, reason)


def for_cpu(name: str, flags: frozenset[str]) -> PrecisionAdvice:
    """The advice for a processor with these extensions, as Linux names them."""
    known = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "BF16"}
    found = next((text for flag, text in known.items() if flag in flags), None)
    if found is None:
        reason = (
            "it has no bfloat16 instructions (AVX512-BF16 or AMX), and converts float16 back and "
            "forth: half precision is slower."
        )
        return PrecisionAdvice("float32", name, reason)
    reason = (
        f"it has bfloat16 instructions ({found}), which convolutions and matrix products use; "
        "float16 would be slower than float32."
    )
    return PrecisionAdvice("mixed_bfloat16", name, reason)
