"""Which variants a search tries, and which it leaves out with a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tfopt import runtimes
from tfopt.measure import environment
from tfopt.measure.suitability import Suitability
from tfopt.variant import Variant

OWN_RUNTIME = {"saved_model": "tensorflow", "tflite": "litert", "onnx": "onnxruntime"}
NOT_FROZEN = "It starts from the frozen graph, and this model cannot be frozen."


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do with one source.

    Attributes:
      baselines: unchanged ways of running the source, the first as it was saved.
      candidates: everything else, in order.
      skipped: variants that are left out, with the reason.
    """

    baselines: tuple[Variant, ...]
    candidates: tuple[Variant, ...]
    skipped: dict[Variant, str]

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All that is tried or left out, in order."""
        return self.baselines + self.candidates + tuple(self.skipped)

    def of_student(self, name: str) -> tuple[Variant, ...]:
        """What is tried of a student: unchanged, and in all ways in which the source is tried."""
        tried = (*self.baselines, *self.candidates)
        return tuple(dataclasses.replace(variant, student=name) for variant in tried)

    @property
    def unsuited(self) -> dict[Variant, str]:
        """Candidates that this machine is not made for, with the reason."""
        found = {variant: _unsuited(variant) for variant in self.candidates}
        return {variant: item.reason for variant, item in found.items() if item}


def plan(kind: str, requested: Sequence[str] | None = None, not_frozen: str | None = None) -> Plan:
    """Plans a search.

    Args:
      kind: of the source.
      requested: variants and patterns; None tries everything that suits this machine.
      not_frozen: why the source has no frozen graph, which all start from but the model as saved.

    Raises:
      InputError: when a requested variant is unknown.
    """
    own = OWN_RUNTIME[kind]
    tried = runtimes.tried_variants()
    baselines = [
        variant
        for variant in tried
        if variant.runtime == own and runtimes.precision_of(variant).is_unchanged
    ]
    asked = tried if requested is None else runtimes.expand(requested)
    candidates: list[Variant] = []
    skipped: dict[Variant, str] = {}
    for variant in asked:
        if variant in baselines:
            continue
        precision = runtimes.precision_of(variant)
        runtime = runtimes.get(variant.runtime)
        if requested is None and runtime.has_engines and not environment.gpus():
            continue  # nobody without a GPU asks for them
        if kind not in precision.kinds:
            if requested is not None:
                skipped[variant] = f"{variant} cannot start from {kind}."
        elif reason := runtime.missing():
            skipped[variant] = reason[0].upper() + reason[1:]
        elif (found := _unsuited(variant)) and not (found.works and requested is not None):
            skipped[variant] = found.reason
        else:
            candidates.append(variant)
    if not_frozen is not None:
        skipped |= dict.fromkeys((*baselines[1:], *candidates), NOT_FROZEN)
        del baselines[1:], candidates[:]
    return Plan(tuple(baselines), tuple(candidates), skipped)


def _unsuited(variant: Variant) -> Suitability | None:
    found = runtimes.get(variant.runtime).suitability(variant)
    return None if found is None or found.suits else found
