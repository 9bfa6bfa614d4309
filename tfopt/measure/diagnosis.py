"""Why a variant is slower, or less accurate, than one would hope: in sentences.

What is executed comes from the runtimes (`Runtime.layers`), with the times of their profilers;
what quantization does to the values inside comes from `Runtime.activations` of the variant and of
the float32 variant of the same runtime, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfopt import runtimes
from tfopt.artifact import Artifact
from tfopt.runtimes.base import Activation, Arrays, Layer, Runtime

if TYPE_CHECKING:
    import pandas as pd

MAX_ACTIVATIONS_S = 3.0  # for the activations of one variant
CUT_OFF = 0.001  # share of a tensor's values outside its range that is worth a sentence
MIN_EXAMPLES = 16  # before a channel is called dead
NUM_NAMED = 3

_QUANTIZATIONS = frozenset(
    ["QUANTIZE", "DEQUANTIZE", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",
     "FakeQuantize", "QuantizeV2", "Dequantize"]
)  # fmt: skip
_CASTS = frozenset(["CAST", "Cast", "Convert"])
_REORDERINGS = frozenset(["TRANSPOSE", "Transpose", "ReorderInput", "ReorderOutput", "Reorder"])
_RESHAPINGS = frozenset(
    ["RESHAPE", "SQUEEZE", "EXPAND_DIMS", "SHAPE", "Reshape", "Squeeze", "Unsqueeze", "Flatten",
     "Shape", "ExpandDims"]
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was found in one variant.

    Attributes:
      sentences: for a person, the most telling first.
      layers: what the runtime executes, in order; empty where that cannot be seen.
    """

    sentences: tuple[str, ...]
    layers: tuple[Layer, ...] = ()

    @property
    def table(self) -> pd.DataFrame:
        """One row a layer: `name, op, dtype, time_ms, executor, is_fallback`."""
        import pandas as pd

        names = [field.name for field in dataclasses.fields(Layer)]
        rows = [dataclasses.astuple(layer) for layer in self.layers]
        return pd.DataFrame(rows, columns=names)

    def slowest(self, count: int) -> list[dict[str, Any]]:
        """The layers that take longest, with their `share` of the time; none without times."""
        total = _time(self.layers)
        timed = [layer for layer in self.layers if layer.time_ms]
        timed.sort(key=lambda layer: layer.time_ms or 0, reverse=True)
        return [
            {**dataclasses.asdict(layer), "share": (layer.time_ms or 0) / total}
            for layer in timed[:count]
        ]

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def open(cls, path: Path) -> Diagnosis:
        """Reads what `save` wrote."""
        value = json.loads(path.read_text())
        layers = tuple(Layer(**layer) for layer in value["layers"])
        return cls(tuple(value["sentences"]), layers)


def diagnose(
    artifact: Artifact,
    batches: Sequence[Arrays],
    examples: Sequence[Arrays],
    num_threads: int | None = None,
    reference: Artifact | None = None,
) -> Diagnosis:
    """Looks into an artifact.

    Args:
      artifact: a converted model.
      batches: real inputs of one shape, to profile with.
      examples: real inputs, one by one or as many as the artifact's fixed batch has, to look at
        the tensors inside with.
      num_threads: threads inside the runtime; None leaves the runtime's own default.
      reference: the float32 variant of the same runtime, which shows the values before
        quantization; without it nothing is said about them.
    """
    runtime = runtimes.get(artifact.variant.runtime)
    layers = tuple(runtime.layers(artifact, batches, num_threads))
    precision = artifact.variant.precision
    num_ports = len(artifact.signature.inputs) + len(artifact.signature.outputs)
    sentences = describe_layers(layers, precision, num_ports)
    try:
        sentences += _describe_values(artifact, examples, reference)
    except Exception as error:  # of any runtime; what was found so far counts all the same
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        sentences.append(f"The values inside could not be seen: {reason}")
    return Diagnosis(tuple(sentences), layers)


def _describe_values(
    artifact: Artifact, examples: Sequence[Arrays], reference: Artifact | None
) -> list[str]:
    """What the tensors inside tell about accuracy."""
    runtime = runtimes.get(artifact.variant.runtime)
    each = artifact.signature.batch_size or 1
    if not examples:
        return []
    if artifact.variant.precision == "float32":
        found, num_batches = _survey(runtime, artifact, examples)
        return describe_dead_channels(found, num_batches * each)
    if reference is None or not runtime.precision_of(artifact.variant).is_calibrated:
        return []
    after, num_batches = _survey(runtime, artifact, examples)
    before, _ = _survey(runtime, reference, examples[:num_batches], after)
    return [
        *describe_cut_off(before, num_batches * each),
        *describe_lost_channels(before, after, num_batches * each),
    ]


def describe_layers(layers: Sequence[Layer], precision: str, num_ports: int) -> list[str]:
    """What executed layers tell about speed.

    Args:
      layers: in order.
      precision: of the variant.
      num_ports: inputs and outputs of the model, each of which may need a quantization.
    """
    sentences = []
    if total := _time(layers):
        spent: dict[str, float] = {}
        for layer in layers:
            spent[layer.op] = spent.get(layer.op, 0.0) + (layer.time_ms or 0)
        worst = sorted(spent, key=spent.__getitem__, reverse=True)[:NUM_NAMED]
        parts = [f"{spent[op] / total:.0%} {op}" for op in worst]
        sentences.append(f"Most of the time goes into {_join(parts)}.")
    if fallback := [layer for layer in layers if layer.is_fallback]:
        executor = fallback[0].executor
        if len(fallback) == len(layers):
            sentences.append(f"No operation is delegated: {executor} compute all {len(layers)}.")
        else:
            main = next(layer.executor for layer in layers if not layer.is_fallback)
            sentences.append(
                f"{main} computes {len(layers) - len(fallback)} of {len(layers)} operations; "
                f"{_ops(fallback)} {_verb(fallback, 'run')} in {executor}{_share(fallback, total)}."
            )
    flex = [layer for layer in layers if layer.op.startswith("Flex")]
    if flex:
        sentences.append(
            f"{_ops(flex)} {_verb(flex, 'run')} in TensorFlow inside LiteRT (Select TF ops), with "
            f"a copy on every way in and out{_share(flex, total)}."
        )
    helpers = _QUANTIZATIONS | _CASTS | _REORDERINGS | _RESHAPINGS
    working = [layer for layer in layers if layer.op not in helpers]
    in_float = [layer for layer in working if layer.dtype == "float32"]
    if precision != "float32" and in_float:
        what = f"{len(in_float)} of {len(working)} operations {_verb(in_float, 'compute')}"
        if len(in_float) == len(working):
            what = f"All operations ({len(working)}) compute"
        sentences.append(f"{what} in float32{_share(in_float, total)}: {_ops(in_float)}.")
    found = [layer for layer in layers if layer.op in _QUANTIZATIONS]
    if len(found) > num_ports:
        sentences.append(
            f"{len(found)} quantizations and dequantizations are left{_share(found, total)}; "
            f"inputs and outputs need {num_ports} at most, the others stand between layers."
        )
    for ops, one, many in (
        (_CASTS, "cast between dtypes is", "casts between dtypes are"),
        (_REORDERINGS, "transpose or reordering of a layout is",
         "transposes and reorderings of layouts are"),
    ):  # fmt: skip
        if found := [layer for layer in layers if layer.op in ops]:
            what = one if len(found) == 1 else many
            sentences.append(f"{len(found)} {what} executed{_share(found, total)}.")
    return sentences


@dataclasses.dataclass
class Survey:
    """What a tensor inside a model held, over several batches.

    Attributes:
      limits: lowest and highest value that its quantization in the variant can hold.
      num_values: how many values there were.
      num_cut_off: how many of them lie outside the limits by more than a step of 8 bits.
      lowest: of each channel; None where the tensor has no channels.
      highest: likewise.
    """

    limits: tuple[float, float] | None = None
    num_values: int = 0
    num_cut_off: int = 0
    lowest: np.ndarray | None = None
    highest: np.ndarray | None = None

    def add(self, activation: Activation) -> None:
        """Takes in one batch."""
        values = activation.values
        self.num_values += values.size
        if self.limits is not None:
            low, high = self.limits
            step = (high - low) / 255
            self.num_cut_off += int(((values < low - step) | (values > high + step)).sum())
        if activation.channel_axis is None or values.ndim < 2 or not values.size:
            return
        flat = np.moveaxis(values, activation.channel_axis, -1)
        flat = flat.reshape(-1, flat.shape[-1])
        low, high = flat.min(axis=0), flat.max(axis=0)
        self.lowest = low if self.lowest is None else np.minimum(self.lowest, low)
        self.highest = high if self.highest is None else np.maximum(self.highest, high)

    @property
    def is_constant(self) -> np.ndarray:
        """Of each channel, whether it held one value throughout."""
        if self.lowest is None or self.highest is None:
            return np.zeros(0, bool)
        return self.lowest == self.highest


def _survey(
    runtime: Runtime,
    artifact: Artifact,
    batches: Sequence[Arrays],
    variant: Mapping[str, Survey] | None = None,
) -> tuple[dict[str, Survey], int]:
    """Surveys an artifact over as many batches as there is time for.

    Args:
      runtime: of the artifact.
      artifact: what to look into.
      batches: real inputs.
      variant: what was found in the quantized variant; its limits hold, and only its tensors count.

    Returns:
      The surveys by tensor, and the number of batches.
    """
    used: list[Arrays] = []
    end = time.monotonic() + MAX_ACTIVATIONS_S

    def in_time() -> Iterator[Arrays]:
        for batch in batches:
            if used and variant is None and time.monotonic() > end:
                return
            used.append(batch)
            yield batch

    found: dict[str, Survey] = {}
    for activation in runtime.activations(artifact, in_time()):
        name = activation.name
        if variant is None:
            found.setdefault(name, Survey(activation.limits)).add(
                dataclasses.replace(activation, limits=None)
            )
        elif name in variant:
            found.setdefault(name, Survey(variant[name].limits)).add(activation)
    return found, len(used)


def describe_cut_off(before: Mapping[str, Survey], num_examples: int) -> list[str]:
    """Which tensors have float32 values outside the limits of their quantization."""
    shares = {name: found.num_cut_off / max(1, found.num_values) for name, found in before.items()}
    worst = sorted((name for name in shares if shares[name] > CUT_OFF), key=shares.__getitem__)[
        ::-1
    ]
    if not worst:
        return []
    parts = [
        f"{shares[name]:.2%} of the values of {short_name(name)}" for name in worst[:NUM_NAMED]
    ]
    more = len(worst) - NUM_NAMED
    return [
        f"Saturated: {_join(parts)} lie outside the quantized range and are cut off, on "
        f"{num_examples} examples{f'; {more} more tensors are affected' if more > 0 else ''}."
    ]


def describe_lost_channels(
    before: Mapping[str, Survey], after: Mapping[str, Survey], num_examples: int
) -> list[str]:
    """Which channels vary in float32 and hold one value after quantization."""
    lost = {}
    for name, found in after.items():
        if name in before and len(found.is_constant) == len(before[name].is_constant):
            lost[name] = found.is_constant & ~before[name].is_constant
    return _describe_channels(lost, "Dead by quantization", "vary in float32 only", num_examples)


def describe_dead_channels(found: Mapping[str, Survey], num_examples: int) -> list[str]:
    """Which channels of the model itself never change; said only after enough examples."""
    if num_examples < MIN_EXAMPLES:
        return []
    dead = {name: survey.is_constant for name, survey in found.items()}
    return _describe_channels(
        dead, "Dead in the model itself", "never change and could be pruned", num_examples
    )


def _describe_channels(
    channels: Mapping[str, np.ndarray], title: str, what: str, num_examples: int
) -> list[str]:
    worst = sorted(
        (name for name in channels if channels[name].any()), key=lambda name: -channels[name].sum()
    )
    if not worst:
        return []
    parts = [
        f"{int(channels[name].sum())} of {len(channels[name])} channels of {short_name(name)}"
        for name in worst[:NUM_NAMED]
    ]
    more = len(worst) - NUM_NAMED
    return [
        f"{title}: {_join(parts)} {what}, on {num_examples} examples"
        f"{f'; {more} more tensors have some' if more > 0 else ''}."
    ]


def _time(layers: Iterable[Layer]) -> float:
    return sum(layer.time_ms or 0 for layer in layers)


def _share(layers: Iterable[Layer], total: float) -> str:
    return f" ({_time(layers) / total:.0%} of the time)" if total else ""


def _verb(layers: Sequence[Layer], verb: str) -> str:
    return f"{verb}s" if len(layers) == 1 else verb


def _ops(layers: Iterable[Layer]) -> str:
    """Such as `2 × Softmax, 1 × Add`."""
    counts = Counter(layer.op for layer in layers).most_common()
    named = [f"{count} × {op}" for op, count in counts[:NUM_NAMED]]
    more = sum(count for _, count in counts[NUM_NAMED:])
    return ", ".join(named) + (f" and {more} more" if more else "")


def short_name(name: str) -> str:
    """A layer's or tensor's name as the model's author would say it.

    LiteRT joins the names of what it fused with semicolons; functions leave their own in paths.
    """
    parts = name.split(";")[0].split("/")
    telling = [part for part in parts if not re.fullmatch(r"\w*PartitionedCall(_\d+)*", part)]
    return "/".join(telling[-2:]).removesuffix(":0") or name


def _join(parts: Sequence[str]) -> str:
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last
