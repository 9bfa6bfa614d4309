"""Copies of Keras models whose layers have other policies."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from tfopt.errors import InputError, first_line
from tfopt.train.layers import (
    POLICIES,
    Layer,
    Place,
    framework_of,
    global_policy,
    listening,
    policy_name,
    set_global_policy,
    set_policy,
    settle_model,
    walk,
)

_FREE_SIZES = (2, 32, 256)  # of free dimensions, for a trial


def copy_with_policies(model: Layer, names: Mapping[int, str], policy: str) -> Layer:
    """Returns a copy with the same weights, uncompiled.

    Args:
      model: a built Keras 3 or tf_keras model.
      names: the policy of each layer, by the layer's `id`: `policy` or float32.
      policy: of layers that the model creates again and that are not in `names`.

    Raises:
      InputError: when the model cannot be made again from its configuration, or a layer cannot
        compute with this policy.
    """
    try:
        copy = _made_again(model, names, policy)
        _try_out(copy, model)
    except Exception as error:
        if policy != "float32":
            _blame_layer(error, model)
        reason = first_line(_causes(error)[-1])
        raise InputError(
            f"Model {model.name!r} cannot be made again from its configuration ({reason}); give "
            "its classes get_config and from_config, or set the policy before it is made, with "
            "tfopt.precision(…)."
        ) from error
    settle_model(copy)
    return copy


def _made_again(model: Layer, names: Mapping[int, str], policy: str) -> Layer:
    keras = framework_of(model)
    by_path = {place.path: names.get(id(place.layer), policy) for place in walk(model)}
    with keras.utils.custom_object_scope(custom_objects(model)), _handed_down(keras, policy):
        config = keras.saving.serialize_keras_object(model)
        config.pop("compile_config", None)
        is_keras_3 = keras.__name__ == "keras"
        for value in config["config"].values():
            is_in_sequential = config["class_name"] == "Sequential"
            _rewrite(value, "", by_path, policy, is_keras_3, is_in_sequential)
        copy = keras.saving.deserialize_keras_object(config, safe_mode=False)
    for place, origin in matched(copy, model):
        wanted = policy if origin is None else names.get(id(origin.layer), policy)
        if policy_name(place.layer) in POLICIES and policy_name(place.layer) != wanted:
            set_policy(place.layer, wanted)
        if origin is not None:
            _copy_vocabulary(origin.layer, place.layer)
            # Outer layers come first, and what is set for them goes for all inside.
            place.layer.trainable = origin.layer.trainable
    copy.set_weights(model.get_weights())
    for place in walk(copy):
        if type(place.layer).__name__ == "Normalization":
            place.layer.finalize_state()  # its constants come from weights
    return copy


def matched(copy: Layer, model: Layer) -> list[tuple[Place, Place | None]]:
    """The layers inside a copy, each with what it was made from, as far as that is known."""
    new, old = list(walk(copy)), list(walk(model))
    if [type(place.layer) for place in old] == [type(place.layer) for place in new]:
        return list(zip(new, old, strict=True))  # layers without a name may be named anew
    by_path = {place.path: place for place in old}
    return [(place, by_path.get(place.path)) for place in new]


@contextlib.contextmanager
def _handed_down(keras: Any, policy: str) -> Iterator[None]:
    """Layers that are made without a policy take that of the last one that was made with one.

    Which is the custom layer that makes them, when models are made from configurations: these
    hold the policies of all other layers. Variables of tf_keras are cast only in layers that were
    mixed when they were built, so that it would be too late afterwards.
    """

    def hand_down(layer: Layer, is_given: bool) -> None:
        if is_given and policy_name(layer) in POLICIES:
            set_global_policy(keras, policy_name(layer))

    with global_policy(keras, policy), listening(keras, hand_down):
        yield


def _rewrite(
    value: Any,
    prefix: str,
    by_path: Mapping[str, str],
    inherited: str,
    is_keras_3: bool,
    is_in_sequential: bool,
) -> None:
    """Writes the policies of layers into a configuration, in place."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _rewrite(item, prefix, by_path, inherited, is_keras_3, is_in_sequential)
        return
    if not isinstance(value, dict):
        return
    name, config = value.get("class_name"), value.get("config")
    if name is not None and isinstance(config, dict) and "name" in config:
        prefix = f"{prefix}/{config['name']}".lstrip("/")
        inherited = by_path.get(prefix, inherited)
        dtype = config.get("dtype")
        if name == "InputLayer":
            if is_in_sequential and dtype in ("bfloat16", "float16"):
                config["dtype"] = "float32"  # it was made after the first layer
        elif _policy_in(dtype, is_keras_3) in POLICIES:
            config["dtype"] = inherited
        is_in_sequential = name == "Sequential"
    for item in value.values():
        _rewrite(item, prefix, by_path, inherited, is_keras_3, is_in_sequential)


def _policy_in(dtype: Any, is_keras_3: bool) -> str | None:
    """The policy of a layer as its configuration spells it.

    In Keras 3 a plain string is the dtype of an operation such as a cast.
    """
    if isinstance(dtype, dict):
        return dtype.get("config", {}).get("name")
    return None if is_keras_3 else dtype


def _copy_vocabulary(origin: Layer, layer: Layer) -> None:
    """Copies what a lookup has learned, which is in neither weights nor configuration."""
    if not hasattr(origin, "get_vocabulary") or not hasattr(layer, "set_vocabulary"):
        return
    words = origin.get_vocabulary(include_special_tokens=False)
    if len(words) and list(layer.get_vocabulary(include_special_tokens=False)) != list(words):
        layer.set_vocabulary(words)


def custom_objects(model: Layer) -> dict[str, Any]:
    """The classes of a model that its framework does not know by itself, by name."""
    classes = [type(model), *(type(place.layer) for place in walk(model))]
    return {
        found.__name__: found
        for found in classes
        if found.__module__.partition(".")[0] not in ("keras", "tf_keras")
    }


@contextlib.contextmanager
def in_float32(model: Layer) -> Iterator[None]:
    """Inside, all of the model computes in float32."""
    places = list(walk(model))
    before = [
        (layer, policy_name(layer))
        for layer in (model, *(place.layer for place in places))
        if policy_name(layer).startswith("mixed_")
    ]
    try:
        for layer, _ in before:
            set_policy(layer, "float32")
        yield
    finally:
        for layer, policy in before:
            set_policy(layer, policy)


def _try_out(copy: Layer, model: Layer) -> None:
    """Calls a functional or sequential copy once, on zeros that its original takes, too.

    Raises:
      Exception: what the copy raises, if the original does not.
    """
    inputs = getattr(copy, "inputs", None)
    if not inputs or any(_dtype(tensor) == "string" for tensor in inputs):
        return
    failures = []
    for size in _FREE_SIZES:  # small ones are quick, and too small for some
        try:
            copy(_zeros(copy, size))
            return
        except Exception as error:
            failures.append(error)
    for size, failure in zip(_FREE_SIZES, failures, strict=True):
        try:
            model(_zeros(model, size))
        except Exception:
            continue
        raise failure


def _zeros(model: Layer, size: int) -> Any:
    """An input in the structure that the model was made with."""
    import tensorflow as tf

    def zeros(tensor: Any) -> np.ndarray:
        shape = [size if length is None else length for length in tensor.shape]
        return np.zeros(shape, _dtype(tensor))

    return tf.nest.map_structure(zeros, model.input)


def _dtype(tensor: Any) -> Any:
    return getattr(tensor.dtype, "name", tensor.dtype)


def _blame_layer(error: Exception, model: Layer) -> None:
    """Names the innermost layer whose `call` raised an error, if float32 would have done.

    Raises:
      InputError: with its name and how to go on without it.
    """
    raised = [(found, _raising_layer(found)) for found in _causes(error)]
    found, layer = next((pair for pair in raised if pair[1] is not None), (error, None))
    if layer is None:
        return
    try:
        _try_out(_made_again(model, {}, "float32"), model)
    except Exception:
        return
    raise InputError(
        f"Layer {layer.name!r} ({type(layer).__name__}) cannot compute in half precision: "
        f"{first_line(found)} Keep it in float32 with keep_float32=[{layer.name!r}], or have it "
        "compute in self.compute_dtype."
    ) from error


def _raising_layer(error: BaseException) -> Layer | None:
    layer, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name in ("call", "tf__call") and hasattr(owner, "dtype_policy"):
            layer = owner
        trace = trace.tb_next
    return layer


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from, the first cause last."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(cause)
    return found
