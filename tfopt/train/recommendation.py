"""What half precision this machine gains from."""

from __future__ import annotations

import dataclasses

from tfopt.measure import environment, suitability


@dataclasses.dataclass(frozen=True)
class PrecisionAdvice:
    """A policy for this machine.

    Attributes:
      policy: `mixed_bfloat16`, `mixed_float16` or `float32`, as `set_precision` takes it.
      device: what would compute.
      reason: why, in sentences.
    """

    policy: str
    device: str
    reason: str

    def __str__(self) -> str:
        return f"{self.policy} on {self.device}: {self.reason}"


def recommend_precision() -> PrecisionAdvice:
    """Says what half precision this machine gains from, and why.

    The first GPU that TensorFlow sees decides, else the processor; see `tfopt.measure.suitability`.
    """
    device = suitability.tensorflow_gpu()
    if device is not None:
        return for_gpu(*device)
    return for_cpu(environment.cpu_model(), environment.cpu_flags())


def for_gpu(name: str, compute_capability: tuple[int, int] | None) -> PrecisionAdvice:
    """The advice for a GPU; `compute_capability` is (major, minor), None for one without."""
    bfloat16, float16 = (
        suitability.gpu(dtype, compute_capability) for dtype in ("bfloat16", "float16")
    )
    if bfloat16.suits:
        reason = (
            f"{bfloat16.reason} It is as fast as float16 and has the range of float32, so that no "
            "loss is scaled; float16 has three bits more and can be a few percent faster."
        )
        return PrecisionAdvice("mixed_bfloat16", name, reason)
    if float16.suits:
        reason = f"{float16.reason} They do not multiply bfloat16."
        return PrecisionAdvice("mixed_float16", name, reason)
    return PrecisionAdvice("float32", name, float16.reason)


def for_cpu(name: str, flags: frozenset[str]) -> PrecisionAdvice:
    """The advice for a processor with these extensions, as Linux names them."""
    bfloat16 = suitability.cpu("bfloat16", flags)
    policy = "mixed_bfloat16" if bfloat16.suits else "float32"
    return PrecisionAdvice(
        policy, name, f"{bfloat16.reason} Training in float16 would be slower than in float32."
    )
