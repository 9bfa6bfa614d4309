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
    kept = why_float32(roots, patterns, is_strict)
    return {
        id(place.layer): "float32" if id(place.layer) in kept else policy for place in walk(*roots)
    }


def why_float32(
    roots: Sequence[Layer], patterns: Patterns, is_strict: bool = False
) -> dict[int, str]:
    """Why layers stay in float32, by `id`; the others are not in it.

    Raises:
      InputError: as `choose` does.
    """
    places = list(walk(*roots))
    asked = patterns.find(places, is_strict)
    heads = {id(layer) for root in roots for layer in _heads(root)}
    reasons: dict[int, str] = {}
    inside_attention: set[int] = set()
    for place in places:
        layer, parent = place.layer, id(place.parent)
        if parent in inside_attention or type(place.parent).__name__ in _ATTENTION:
            inside_attention.add(id(layer))  # it makes its softmax precise by itself
        if id(layer) in asked:
            reason = "asked for"
        elif id(layer) in heads:
            reason = "makes the outputs"
        elif parent in reasons:
            reason = reasons[parent]
        elif type(layer).__name__ in ALWAYS_FLOAT32:
            reason = "computes statistics"
        elif id(layer) not in inside_attention and (loss := _loss(layer)) and _is_cast_for(place):
            reason = loss
        else:
            continue
        reasons[id(layer)] = reason
    return reasons


def _heads(model: Layer) -> list[Layer]:
    """Output layers, and those before them as long as these only pass values on."""
    found, ahead = [], output_layers(model)
    while ahead:
        layer = ahead.pop()
        found.append(layer)
        if type(layer).__name__ in _PASSING:
            ahead += inputs_of(layer)
    return found


def _loss(layer: Layer) -> str | None:
    """What a layer would lose by half precision, or None."""
    activation = getattr(getattr(layer, "activation", None), "__name__", "")
    name = type(layer).__name__
    if name == "Softmax" or activation in ("softmax", "log_softmax"):
        return "is a softmax: small probabilities would vanish"
    return "adds up many values" if name in _AVERAGES else None


def _is_cast_for(place: Place) -> bool:
    """Whether everything that takes a layer's outputs casts them to what it computes in.

    Code in the `call` of a subclass does not, nor do TensorFlow's functions in tf_keras models.
    """
    consumers = consumers_of(place.layer)
    if not consumers:
        return type(place.parent).__name__ == "Sequential"
    return all(getattr(item, "autocast", getattr(item, "_autocast", True)) for item in consumers)
