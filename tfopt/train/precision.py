"""Which layers of a Keras model compute in half precision.

Variables are float32 throughout; layers differ in what they cast them and their inputs to. Some
layers stay in float32 unless half precision is worth nothing without them, because they lose by
it and cost little:

- outputs, and layers with a softmax: eight bits of logits do not tell classes apart, and
  probabilities near 0 vanish in the loss
- averages over whole images or sequences, which add up many values
- normalisation that does not compute its statistics in float32 by itself; batch, layer and group
  normalisation of Keras do

Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv 1710.03740), and the guide
https://www.tensorflow.org/guide/mixed_precision.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from tfopt.errors import InputError
from tfopt.train import copies
from tfopt.train.layers import (
    POLICIES,
    Layer,
    Pattern,
    Patterns,
    framework_of,
    inputs_of,
    is_model,
    output_layers,
    policy_name,
    set_policy,
    settle_model,
    walk,
)

_STAY = {
    "GlobalAveragePooling1D", "GlobalAveragePooling2D", "GlobalAveragePooling3D", "Softmax",
    "UnitNormalization",
}  # fmt: skip
_PASSING = {"Activation", "Flatten", "Reshape", "Softmax"}
_ATTENTION = {"Attention", "AdditiveAttention", "MultiHeadAttention", "GroupQueryAttention"}


def set_precision(model: Layer, policy: str, keep_float32: Sequence[Pattern] = ()) -> Layer:
    """Returns a copy of a built or trained model whose layers compute in half precision.

    The original is untouched. Weights are the same float32 values, so the copy can be trained on
    and turned back with `policy="float32"`. A compiled model gives a compiled copy with the state
    of its optimizer, wrapped for loss scaling when some layer computes in float16, and only then.

    What it gains and costs: see `tfopt.recommend_precision`. Half precision keeps 8 bits
    (bfloat16) or 11 (float16) of each value.

    Args:
      model: a Keras 3 or tf_keras model; subclasses need `get_config`.
      policy: `mixed_bfloat16`, `mixed_float16` or `float32`.
      keep_float32: layers that compute in float32, besides those that always do: names, paths
        like `block3/conv1`, regular expressions of either, or classes of layers. What is inside
        such a layer stays in float32, too.

    Raises:
      InputError: when the policy is unknown, a pattern means no layer or a name means several,
        the model is not built or cannot be copied, or a layer cannot compute in half precision.
    """
    check_policy(policy)
    framework_of(model)
    patterns = Patterns(keep_float32)
    if not model.built:
        raise InputError(
            f"Model {model.name!r} is not built: its input shapes are unknown; call it on data "
            "once, or build it inside `with tfopt.precision(…)`."
        )
    patterns.check(list(walk(model)))
    copy = copies.copy_with_policies(model, choose([model], policy, patterns), policy)
    copies.check_runs(model, copy)
    copies.compile_like(model, copy)
    return copy


@contextlib.contextmanager
def precision(policy: str, keep_float32: Sequence[Pattern] = ()) -> Iterator[None]:
    """Layers made in this scope compute in half precision, but for those to keep.

        with tfopt.precision("mixed_bfloat16", keep_float32=["logits", keras.layers.Softmax]):
            model = make_model()
        model.compile(…)

    It works for Keras 3 and, where that is imported already, for tf_keras. Layers get their final
    precision when the scope ends, or at `compile` inside of it. The scope is global: models made
    in other threads meanwhile come under it, too.

    Args:
      policy: `mixed_bfloat16`, `mixed_float16` or `float32`.
      keep_float32: as `set_precision` takes it; paths begin inside the outermost model.

    Raises:
      InputError: when the policy is unknown, or at the end of the scope, when a pattern means no
        layer made in it, or a name means several.
    """
    check_policy(policy)
    patterns = Patterns(keep_float32)
    made: list[weakref.ref[Layer]] = []
    with contextlib.ExitStack() as stack:
        for name in ("keras", "tf_keras"):
            if name == "keras" or name in sys.modules:
                stack.enter_context(_applied(importlib.import_module(name), policy, patterns, made))
        yield
    patterns.check(list(walk(*_settle(made, policy, patterns))))


def check_policy(policy: str) -> None:
    """Checks the name of a policy.

    Raises:
      InputError: when it is none of `POLICIES`.
    """
    if policy not in POLICIES:
        raise InputError(
            f"The policy is {policy!r}; expected one of {', '.join(POLICIES)}, which all keep "
            "variables in float32."
        )


def choose(roots: Sequence[Layer], policy: str, patterns: Patterns) -> dict[int, str]:
    """The names of the policies of all layers inside the roots, by `id`."""
    kept = {id(layer) for root in roots for layer in _heads(root)}
    names: dict[int, str] = {}
    inside_attention: set[int] = set()
    for place in walk(*roots):
        layer, parent = place.layer, id(place.parent)
        if parent in inside_attention or type(place.parent).__name__ in _ATTENTION:
            inside_attention.add(id(layer))  # it makes its softmax precise by itself
        is_float32 = (
            names.get(parent) == "float32"
            or id(layer) in kept
            or (_loses(layer) and id(layer) not in inside_attention)
            or patterns.match(place)
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
    return type(layer).__name__ in _STAY or activation in ("softmax", "log_softmax")


@contextlib.contextmanager
def _applied(
    keras: Any, policy: str, patterns: Patterns, made: list[weakref.ref[Layer]]
) -> Iterator[None]:
    """The global policy of a framework, and an ear for the layers made under it."""
    base, model_class = keras.layers.Layer, keras.Model
    init, compile_ = base.__init__, model_class.compile

    @functools.wraps(init)
    def listening_init(layer: Layer, *args: Any, **kwargs: Any) -> None:
        init(layer, *args, **kwargs)
        made.append(weakref.ref(layer))

    @functools.wraps(compile_)
    def settling_compile(model: Layer, *args: Any, **kwargs: Any) -> None:
        _settle(made, policy, patterns)
        compile_(model, *args, **kwargs)

    with _global_policy(keras, policy):
        base.__init__, model_class.compile = listening_init, settling_compile
        try:
            yield
        finally:
            base.__init__, model_class.compile = init, compile_


@contextlib.contextmanager
def _global_policy(keras: Any, policy: str) -> Iterator[None]:
    if keras.__name__ == "keras":
        get, put = keras.config.dtype_policy, keras.config.set_dtype_policy
    else:
        get, put = keras.mixed_precision.global_policy, keras.mixed_precision.set_global_policy
    before = get()
    put(policy)
    try:
        yield
    finally:
        put(before)


def _settle(made: Sequence[weakref.ref[Layer]], policy: str, patterns: Patterns) -> list[Layer]:
    """Turns those of the layers that are to be kept to float32; returns the outermost ones."""
    layers = [layer for layer in (reference() for reference in made) if layer is not None]
    roots = _outermost(layers)
    names = choose(roots, policy, patterns)
    for place in walk(*roots):
        if names[id(place.layer)] == "float32" and policy_name(place.layer) == policy:
            set_policy(place.layer, "float32")
    for root in filter(is_model, roots):
        settle_model(root)
    return roots


def _outermost(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that are in no other; of models that share theirs, those with the most."""
    inside = {
        id(layer): {id(place.layer) for place in walk(layer)} - {id(layer)} for layer in layers
    }
    contained = set().union(*inside.values())
    found: list[Layer] = []
    for layer in sorted(layers, key=lambda layer: -len(inside[id(layer)])):
        is_part = is_model(layer) and any(inside[id(layer)] <= inside[id(other)] for other in found)
        if id(layer) not in contained and not is_part:
            found.append(layer)
    return found
