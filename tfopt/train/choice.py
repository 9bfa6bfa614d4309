"""Which layers of a Keras model compute in half precision.

Variables are float32 throughout; layers differ in what they cast them and their inputs to. Some
layers stay in float32 always, because they lose by half precision and cost little:

- outputs: eight bits of logits do not tell classes apart
- softmax: probabilities near 0 vanish in the loss
- averages over whole images or sequences, which add up many values
- normalisation that does not compute its statistics in float32 by itself; batch, layer and group
  normalisation of Keras do

A softmax or an average between other layers stays only where Keras casts for what follows it. What
the outputs of a subclassed model are is not known before it runs: name them.

Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), and the guide
https://www.tensorflow.org/guide/mixed_precision.
"""

from __future__ import annotations

from collections.abc import Sequence

from tfopt.train.layers import (
    Layer,
    Patterns,
    Place,
    consumers_of,
    inputs_of,
    output_layers,
    walk,
)

ALWAYS_FLOAT32 = {"Normalization", "UnitNormalization"}
_AVERAGES = {"GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D"}
_PASSING = {"Activation", "Flatten", "Reshape", "Softmax"}
_ATTENTION = {"Attention", "AdditiveAttention", "MultiHeadAttention", "GroupQueryAttention"}


def choose(
    roots: Sequence[Layer], policy: str, patterns: Patterns, is_strict: bool = False
) -> dict[int, str]:
    """The names of the policies of all layers inside the roots, by `id`.

    Raises:
      InputError: when `is_strict` and a pattern means nothing, or a plain name several layers.
    """
    places = list(walk(*roots))
    kept = patterns.find(places, is_strict)
    kept |= {id(layer) for root in roots for layer in _heads(root)}
    names: dict[int, str] = {}
    inside_attention: set[int] = set()
    for place in places:
        layer, parent = place.layer, id(place.parent)
        if parent in inside_attention or type(place.parent).__name__ in _ATTENTION:
            inside_attention.add(id(layer))  # it makes its softmax precise by itself
        is_float32 = (
            names.get(parent) == "float32"
            or id(layer) in kept
            or type(layer).__name__ in ALWAYS_FLOAT32
            or (_loses(layer) and id(layer) not in inside_attention and _is_cast_for(place))
        )
        names[id(layer)] = "float32" if is_float32 else policy
    return names


def _heads(model: Layer) -> list[Layer]:
    """Output layers, and those before them as long as these only pass values on."""
    found, ahead = [], output_layers(model)
    while ahead:
        layer = ahead.pop()
        found.append(layer)
        if type(layer).__name__ in _PASSING:
            ahead += inputs_of(layer)
    return found


def _loses(layer: Layer) -> bool:
    activation = getattr(getattr(layer, "activation", None), "__name__", "")
    name = type(layer).__name__
    return name == "Softmax" or name in _AVERAGES or activation in ("softmax", "log_softmax")


def _is_cast_for(place: Place) -> bool:
    """Whether everything that takes a layer's outputs casts them to what it computes in.

    Code in the `call` of a subclass does not, nor do TensorFlow's functions in tf_keras models.
    """
    consumers = consumers_of(place.layer)
    if not consumers:
        return type(place.parent).__name__ == "Sequential"
    return all(getattr(item, "autocast", getattr(item, "_autocast", True)) for item in consumers)
