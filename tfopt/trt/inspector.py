"""In which precision each layer of an engine computes, by TensorRT's engine inspector."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tfopt.runtimes.base import Layer

# Spellings of TensorRT 8 ("Thirty-two wide … Int8 format") and 10 ("Half", "FP16").
_DTYPES = {
    "Int8": "int8", "FP8": "float8", "FP16": "float16", "Half": "float16", "BF16": "bfloat16",
    "BFloat16": "bfloat16", "FP32": "float32", "Float": "float32", "Int32": "int32",
    "Int64": "int64", "Bool": "bool", "UInt8": "uint8",
}  # fmt: skip
_DTYPE = re.compile(rf"\b({'|'.join(_DTYPES)})\b", re.IGNORECASE)
_BY_LOWER = {spelling.lower(): dtype for spelling, dtype in _DTYPES.items()}
# What hands values on, or changes their form, is no layer that computes.
_HELPERS = frozenset(
    ["Reformat", "NoOp", "Shuffle", "Constant", "Cast", "Quantize", "Dequantize", "Signal", "Wait",
     "ShapeHostToDevice", "ShapeHostToDeviceNode", "TrainStation", "Slice", "Gather"]
)  # fmt: skip
# What TensorRT 8 makes of attention and much else: one layer that does not tell what is inside.
_OPAQUE = frozenset(["Myelin"])
_NARROW = ("int8", "float8", "float16", "bfloat16")
NUM_NAMED = 3
MAX_NAME = 80  # characters of a layer's name in a sentence
# Strings, which stay, and words that are no numbers of JSON.
_NO_NUMBER = re.compile(r'("[^"\\]*(?:\\.[^"\\]*)*")|-?\b(?:inf|nan)\b', re.DOTALL)


def dtype_of(layer: Mapping[str, Any]) -> str:
    """What a layer computes in: the narrowest type of its inputs; of its outputs without inputs.

    An int8 convolution takes int8 and may give float32. Where shapes are free TensorRT may tell no
    types of tensors ("N/A due to dynamic shapes", as 8.6); then that of the weights is taken.
    Empty where the inspector does not say, as of several operations in one, which may compute in
    other types than they hand on.
    """
    found = _dtype_of_ends(layer) or _dtype_of_weights(layer)
    return "" if layer.get("LayerType") in _OPAQUE and found not in _NARROW else found


def _dtype_of_ends(layer: Mapping[str, Any]) -> str:
    for side in ("Inputs", "Outputs"):
        found = list(filter(None, (_named(_format(tensor)) for tensor in layer.get(side) or ())))
        for dtype in (*_NARROW, "float32"):
            if dtype in found:
                return dtype
        if found:
            return found[0]
    return ""


def _dtype_of_weights(layer: Mapping[str, Any]) -> str:
    weights = layer.get("Weights")
    return _named(str(weights.get("Type"))) if isinstance(weights, Mapping) else ""


def _named(text: str) -> str:
    """The type that a text of TensorRT names; empty where it names none."""
    match = _DTYPE.search(text)
    return _BY_LOWER[match[1].lower()] if match else ""


def _format(tensor: Any) -> str:
    if not isinstance(tensor, Mapping):
        return ""
    return str(tensor.get("Datatype") or tensor.get("Format/Datatype") or "")


def parse(text: str) -> tuple[list[dict[str, Any]], str]:
    """Reads the inspector's JSON, which is not always JSON.

    TensorRT 8.6 puts control characters into its strings, between the names of nodes that became
    one layer (https://github.com/NVIDIA/TensorRT/issues/2779), and writes numbers such as -inf.

    Returns:
      The layers that tell more than a name, and a sentence when nothing can be read.
    """
    try:
        whole = json.loads(_NO_NUMBER.sub(lambda match: match[1] or "null", text), strict=False)
        return [layer for layer in whole["Layers"] if isinstance(layer, dict)], ""
    except (ValueError, KeyError, TypeError) as error:
        return [], f"What TensorRT tells of the engine's layers cannot be read: {error}."


def layers(
    found: Sequence[Mapping[str, Any]], times_ms: Mapping[str, float] | None = None
) -> list[Layer]:
    """The layers as every runtime gives them.

    Args:
      found: the inspector's.
      times_ms: the profiler's, by name.
    """
    return [
        Layer(
            str(layer.get("Name", "")),
            str(layer.get("LayerType", "")) or "layer",
            dtype_of(layer),
            (times_ms or {}).get(str(layer.get("Name", ""))),
            executor="TensorRT",
        )
        for layer in found
    ]


def report(found: Sequence[Mapping[str, Any]], precision: str) -> list[str]:
    """Sentences: how many layers compute in what, and which did not take the precision."""
    working = [layer for layer in layers(found) if layer.op not in _HELPERS]
    if not working:
        return []
    counts = Counter(layer.dtype or "an untold type" for layer in working)
    parts = ", ".join(f"{count} in {dtype}" for dtype, count in counts.most_common())
    sentences = [f"The engine has {len(working)} layers that compute: {parts}."]
    others = [layer.name for layer in working if layer.dtype not in (precision, "")]
    if precision in ("float16", "int8") and others:
        named = ", ".join(map(_shortened, others[:NUM_NAMED]))
        more = f" and {len(others) - NUM_NAMED} more" if len(others) > NUM_NAMED else ""
        sentences.append(f"Not in {precision} are {named}{more}.")
    return sentences


def _shortened(name: str) -> str:
    """A name for a sentence; that of a layer of many nodes holds all of theirs."""
    if len(name) <= MAX_NAME:
        return name
    half = MAX_NAME // 2 - 1
    return f"{name[:half]}…{name[-half:]}"


def is_silently_float32(found: Sequence[Mapping[str, Any]], precision: str) -> bool:
    """Whether an engine that was to be float16 or int8 has no such layer at all.

    Where a layer does not tell, nobody knows.
    """
    working = [layer.dtype for layer in layers(found) if layer.op not in _HELPERS]
    return (
        precision in ("float16", "int8")
        and bool(working)
        and precision not in working
        and "" not in working
    )
