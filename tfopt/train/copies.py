"""Copies of Keras models whose layers have other policies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.graph import first_line
from tfopt.train.layers import (
    POLICIES,
    Layer,
    framework_of,
    policy_name,
    set_policy,
    settle_model,
    walk,
)

_FREE_SIZE = 2  # of a free dimension, for a trial


def copy_with_policies(model: Layer, names: Mapping[int, str], policy: str) -> Layer:
    """Returns a copy with the same weights.

    Args:
      model: a built Keras 3 or tf_keras model.
      names: the policy of each layer, by the layer's `id`.
      policy: of layers that the model creates again and that are not in `names`.

    Raises:
      InputError: when the model cannot be made again from its configuration.
    """
    keras = framework_of(model)
    by_path = {place.path: names[id(place.layer)] for place in walk(model)}
    try:
        with keras.utils.custom_object_scope(_custom_objects(model)):
            config = keras.saving.serialize_keras_object(model)
            config.pop("compile_config", None)
            for value in config["config"].values():
                _rewrite(value, "", by_path, policy)
            copy = keras.saving.deserialize_keras_object(config, safe_mode=False)
            copy.set_weights(model.get_weights())
    except Exception as error:
        _check_layer(error)
        raise InputError(
            f"Model {model.name!r} cannot be made again from its configuration "
            f"({first_line(error)}); give its classes get_config and from_config, or build it "
            "inside `with tfopt.precision(…)`."
        ) from error
    for place in walk(copy):
        wanted = by_path.get(place.path, policy)
        if policy_name(place.layer) in POLICIES and policy_name(place.layer) != wanted:
            set_policy(place.layer, wanted)
    settle_model(copy)
    return copy


def _rewrite(value: Any, prefix: str, by_path: Mapping[str, str], inherited: str) -> None:
    """Writes the policies of layers into a configuration, in place."""
    if isinstance(value, (list, tuple)):
        for item in value:
            _rewrite(item, prefix, by_path, inherited)
        return
    if not isinstance(value, dict):
        return
    config = value.get("config")
    if "class_name" in value and isinstance(config, dict) and "name" in config:
        prefix = f"{prefix}/{config['name']}".lstrip("/")
        inherited = by_path.get(prefix, inherited)
        if value["class_name"] != "InputLayer" and _name_in(config.get("dtype")) in POLICIES:
            config["dtype"] = inherited
    for item in value.values():
        _rewrite(item, prefix, by_path, inherited)


def _name_in(dtype: Any) -> str | None:
    """The name of a policy as configurations spell it."""
    if isinstance(dtype, dict):
        return dtype.get("config", {}).get("name")
    return dtype


def _custom_objects(model: Layer) -> dict[str, Any]:
    """The classes of a model that its framework does not know by itself."""
    classes = [type(model), *(type(place.layer) for place in walk(model))]
    return {
        found.__name__: found
        for found in classes
        if found.__module__.partition(".")[0] not in ("keras", "tf_keras")
    }


def check_runs(model: Layer, copy: Layer) -> None:
    """Calls the copy of a functional or sequential model once, on zeros.

    Raises:
      InputError: when that fails though the model itself can be called.
    """
    inputs = getattr(model, "inputs", None)
    if not inputs:
        return
    zeros = [
        np.zeros([_FREE_SIZE if size is None else size for size in tensor.shape], _dtype(tensor))
        for tensor in inputs
    ]
    try:
        copy(zeros if len(zeros) > 1 else zeros[0])
    except Exception as error:
        try:
            model(zeros if len(zeros) > 1 else zeros[0])
        except Exception:
            return
        _check_layer(error)
        raise


def _dtype(tensor: Any) -> Any:
    return getattr(tensor.dtype, "name", tensor.dtype)


def _check_layer(error: Exception) -> None:
    """Names the innermost layer whose `call` raised an error, if one did.

    Raises:
      InputError: with its name and how to go on without it.
    """
    found: BaseException | None = error
    while found is not None:
        if (layer := _raising_layer(found)) is not None:
            raise InputError(
                f"Layer {layer.name!r} ({type(layer).__name__}) cannot compute in half precision: "
                f"{first_line(found)} Keep it in float32 with keep_float32=[{layer.name!r}], or "
                "have it compute in self.compute_dtype."
            ) from error
        found = found.__cause__ or found.__context__


def _raising_layer(error: BaseException) -> Layer | None:
    layer, trace = None, error.__traceback__
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if trace.tb_frame.f_code.co_name in ("call", "tf__call") and hasattr(owner, "dtype_policy"):
            layer = owner
        trace = trace.tb_next
    return layer


def compile_like(model: Layer, copy: Layer) -> None:
    """Compiles the copy of a compiled model, with the state of its optimizer.

    Raises:
      InputError: when the loss or another part cannot be made again.
    """
    config = model.get_compile_config() if _is_compiled(model) else None
    if not config:
        return
    keras = framework_of(model)
    try:
        with keras.utils.custom_object_scope(_compiled_objects(model)):
            optimizer = config.get("optimizer")
            is_scaled = isinstance(optimizer, dict) and "inner_optimizer" in optimizer["config"]
            if is_scaled and policy_name(copy) != "mixed_float16":
                config["optimizer"] = optimizer["config"]["inner_optimizer"]
            copy.compile_from_config(config)
    except Exception as error:
        raise InputError(
            f"What model {model.name!r} was compiled with cannot be made again "
            f"({first_line(error)}); register its functions with "
            f"{keras.__name__}.saving.register_keras_serializable, or compile the result yourself."
        ) from error
    copy_optimizer_state(model.optimizer, copy.optimizer)


def _is_compiled(model: Layer) -> bool:
    return bool(getattr(model, "compiled", getattr(model, "_is_compiled", False)))


def _compiled_objects(model: Layer) -> dict[str, Any]:
    """Functions and classes of the user's that a model was compiled with, by name."""
    found = {}
    for value in _leaves([model.loss, *getattr(model._compile_config, "config", {}).values()]):
        made_by = value if hasattr(value, "__name__") else type(value)
        if made_by.__module__.partition(".")[0] not in ("keras", "tf_keras", "builtins"):
            found[made_by.__name__] = made_by
    return found


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in _leaves(item)]
    return [value]


def copy_optimizer_state(source: Any, target: Any) -> None:
    """Copies slots, step and loss scale of one optimizer to another of the same kind.

    Either may be wrapped for loss scaling. An optimizer that made no step yet has no slots; those
    of the target stay as they are then.
    """
    if source is None or target is None:
        return
    old, new = (_variables(getattr(item, "inner_optimizer", item)) for item in (source, target))
    if len(old) == len(new):
        for before, after in zip(old, new, strict=True):
            after.assign(before)
    for before, after in zip(_scale_state(source), _scale_state(target), strict=False):
        after.assign(before)


def _variables(optimizer: Any) -> list[Any]:
    found = optimizer.variables
    return list(found() if callable(found) else found)


def _scale_state(optimizer: Any) -> list[Any]:
    """The variables of loss scaling; empty where there is none or it was not built yet."""
    if hasattr(optimizer, "dynamic_scale"):
        return [optimizer.dynamic_scale, optimizer.step_counter]
    state = getattr(optimizer, "_loss_scale", None)
    return [] if state is None else [state.current_loss_scale, state.counter]
