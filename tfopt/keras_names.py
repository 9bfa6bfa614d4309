"""How a Keras model knows its inputs and outputs: their order, and the names beside the exported.

A signature sorts its tensors by name. `fit` and `predict` also take lists, in the model's own
order, and dictionaries by key, by name of an `Input` or by name of the last layer. Keras writes
none of that into a SavedModel, so `write` leaves it in a file beside the graph.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tfopt.signature import Signature, TensorSpec
from tfopt.train.layers import is_model_of

FILE = "keras_names.json"


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output of a Keras model.

    Attributes:
      exported: its name in the exported signature.
      key: its key where `fit` takes a dictionary.
      layer: the name of its `Input` or of its last layer.
    """

    exported: str
    key: str
    layer: str


def inputs_of(structure: Any) -> list[Port]:
    """The inputs of a model, in its order.

    Args:
      structure: of its argument, with the exported names as leaves; see `live.named_inputs`.
    """
    import tensorflow as tf

    exported = tf.nest.flatten(structure)
    keys = _keys(structure, len(exported)) or exported
    return [Port(name, key, name) for name, key in zip(exported, keys, strict=True)]


def outputs_of(model: Any) -> list[Port]:
    """The outputs of a functional model, in its order; of others none."""
    layers = list(getattr(model, "output_names", None) or ())
    keys = _keys(getattr(model, "output", None) if layers else None, len(layers))
    exported = keys or [f"output_{index}" for index in range(len(layers))]
    if is_model_of(model, "tf_keras"):
        exported = layers
    return [Port(*names) for names in zip(exported, keys or layers, layers, strict=True)]


def _keys(structure: Any, count: int) -> list[str]:
    """The keys of a flat dictionary, in the order in which Keras flattens it; else none."""
    if not isinstance(structure, Mapping) or len(structure) != count:
        return []
    return sorted(map(str, structure))


def write(folder: Path, inputs: Any, model: Any) -> None:
    """Writes the names of a Keras model into its exported SavedModel.

    Args:
      folder: the SavedModel.
      inputs: as `inputs_of` takes them.
      model: the live model.
    """
    ports = {
        kind: [dataclasses.astuple(port) for port in found]
        for kind, found in (("inputs", inputs_of(inputs)), ("outputs", outputs_of(model)))
    }
    (folder / FILE).write_text(json.dumps(ports))


def read(folder: Path, signature: Signature) -> Signature:
    """Adds places and other names to the inputs and outputs of a signature, where they are known.

    Args:
      folder: a SavedModel, or another file of a model.
      signature: as the graph has it.
    """
    file = folder / FILE
    known = json.loads(file.read_text()) if folder.is_dir() and file.is_file() else {}
    return dataclasses.replace(
        signature,
        inputs=_annotate(signature.inputs, known.get("inputs", ()), r"args_0(?:_(\d+))?"),
        outputs=_annotate(signature.outputs, known.get("outputs", ()), r"output_(\d+)"),
    )


def _annotate(
    specs: Sequence[TensorSpec], ports: Sequence[Sequence[str]], numbered: str
) -> tuple[TensorSpec, ...]:
    """Names by ports, or else places by numbers that Keras gives to tensors without names."""
    names = {spec.name for spec in specs}
    if {port[0] for port in ports} == names and len(ports) == len(specs):
        others = Counter(other for port in ports for other in set(port[1:]))
        found = {
            exported: (place, tuple(o for o in dict.fromkeys(aliases)
                                    if others[o] == 1 and o not in names))
            for place, (exported, *aliases) in enumerate(ports)
        }  # fmt: skip
        return tuple(
            dataclasses.replace(spec, position=found[spec.name][0], aliases=found[spec.name][1])
            for spec in specs
        )
    matches = [re.fullmatch(numbered, spec.name) for spec in specs]
    if not all(matches):
        return tuple(specs)
    numbers = [int(match[1] or 0) for match in matches if match]
    return tuple(
        dataclasses.replace(spec, position=sorted(numbers).index(number))
        for spec, number in zip(specs, numbers, strict=True)
    )
