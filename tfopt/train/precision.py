"""Half precision in training code: a scope for new models, a copy of those that are there."""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import warnings
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from tfopt.errors import InputError
from tfopt.measure import suitability
from tfopt.train import compiling, copies
from tfopt.train.choice import ALWAYS_FLOAT32, choose
from tfopt.train.layers import (
    POLICIES,
    Layer,
    Pattern,
    Patterns,
    check_built,
    framework_of,
    global_policy,
    is_model,
    listening,
    policy_name,
    set_policy,
    settle_model,
    walk,
)
from tfopt.train.loss_scaling import warn_of_own_step


def set_precision(model: Layer, policy: str, keep_float32: Sequence[Pattern] = ()) -> Layer:
    """Returns a copy of a built or trained model whose layers compute in half precision.

    The original is untouched. Weights are the same float32 values, so the copy can be trained on
    and turned back with `policy="float32"`. A compiled model gives a compiled copy with the state
    of its optimizer, wrapped for loss scaling when some layer computes in float16, and only then.

    What it gains and costs: see `tfopt.recommend_precision`; where it gains nothing it is done all
    the same, with a warning. Half precision keeps 8 bits
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
    _warn_of_loss(policy, stacklevel=3)
    framework_of(model)
    patterns = Patterns(keep_float32)
    check_built(model)
    names = choose([model], policy, patterns, is_strict=True)
    copy = copies.copy_with_policies(model, names, policy)
    compiling.compile_like(model, copy)
    warn_of_own_step(copy, stacklevel=2)
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
    _warn_of_loss(policy, stacklevel=4)
    patterns = Patterns(keep_float32)
    made: list[weakref.ref[Layer]] = []
    with contextlib.ExitStack() as stack:
        for name in ("keras", "tf_keras"):
            if name == "keras" or name in sys.modules:
                stack.enter_context(_applied(importlib.import_module(name), policy, patterns, made))
        yield
    for model in _settle(made, policy, patterns, is_strict=True):
        warn_of_own_step(model, stacklevel=3)


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


def _warn_of_loss(policy: str, stacklevel: int) -> None:
    """Says where half precision gains nothing; it is done all the same."""
    if policy == "float32":
        return
    found = suitability.of_tensorflow(policy.removeprefix("mixed_"))
    if not found.suits:
        warnings.warn(
            f"{policy} is not known to be faster than float32 here. {found.reason} "
            "tfopt.recommend_precision() says what is.",
            stacklevel=stacklevel,
        )


@contextlib.contextmanager
def _applied(
    keras: Any, policy: str, patterns: Patterns, made: list[weakref.ref[Layer]]
) -> Iterator[None]:
    """The global policy of a framework, and an ear for the layers made under it."""
    trainer = next(found for found in keras.Model.__mro__ if "compile" in vars(found))
    compile_ = trainer.compile

    def hear(layer: Layer, _: bool) -> None:
        made.append(weakref.ref(layer))
        if type(layer).__name__ in ALWAYS_FLOAT32 and policy_name(layer) == policy:
            set_policy(layer, "float32")  # it makes constants when it is adapted

    @functools.wraps(compile_)
    def settling_compile(model: Layer, /, *args: Any, **kwargs: Any) -> None:
        _settle(made, policy, patterns)
        compile_(model, *args, **kwargs)
        if any(layer is model for layer in (reference() for reference in made)):
            warn_of_own_step(model, stacklevel=2)

    with global_policy(keras, policy), listening(keras, hear):
        trainer.compile = settling_compile
        try:
            yield
        finally:
            trainer.compile = compile_


def _settle(
    made: Sequence[weakref.ref[Layer]], policy: str, patterns: Patterns, is_strict: bool = False
) -> list[Layer]:
    """Turns those of the layers that are to be kept to float32; returns the outermost models."""
    layers = [layer for layer in (reference() for reference in made) if layer is not None]
    roots = _outermost(layers)
    names = choose(roots, policy, patterns, is_strict)
    for place in walk(*roots):
        if names[id(place.layer)] == "float32" and policy_name(place.layer) == policy:
            set_policy(place.layer, "float32")
    models = list(filter(is_model, roots))
    for model in models:
        settle_model(model)
    return models


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
