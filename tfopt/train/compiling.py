"""What a model was compiled with, for a copy of it."""

from __future__ import annotations

import warnings
from typing import Any

from tfopt.errors import first_line
from tfopt.train.copies import custom_objects
from tfopt.train.layers import Layer, framework_of, policy_name
from tfopt.train.loss_scaling import scale_state, with_scaling


def is_compiled(model: Layer) -> bool:
    """Whether a model has an optimizer and a loss."""
    return bool(getattr(model, "compiled", getattr(model, "_is_compiled", False)))


def overrider(model: Layer, method: str) -> str | None:
    """The class that gives a model another method than Keras's; None if none does."""
    owner = next(found for found in type(model).__mro__ if method in vars(found))
    is_kerases = owner.__module__.partition(".")[0] == framework_of(model).__name__
    return None if is_kerases else owner.__name__


def compile_options(model: Layer) -> dict[str, Any]:
    """What a compiled model's `compile` was called with.

    Keras 3 reads files of tf_keras, whose None for steps_per_execution it then fails on.
    """
    return {k: v for k, v in model._compile_config.config.items() if v is not None}


def compile_like(model: Layer, copy: Layer) -> None:
    """Compiles the copy of a compiled model, with the state of its optimizer.

    The optimizer is wrapped for loss scaling if the copy computes in float16, and only then. What
    cannot be copied leaves the copy uncompiled, with a warning that says why.
    """
    if not is_compiled(model):
        return
    keras = framework_of(model)
    try:
        if (owner := overrider(model, "compile")) is not None:
            raise ValueError(f"{owner} has a compile of its own")
        with keras.utils.custom_object_scope(custom_objects(model)):
            options = _copied(compile_options(model), keras)
        options["optimizer"] = with_scaling(
            keras, keras.optimizers.get(options["optimizer"]), policy_name(copy) == "mixed_float16"
        )
        copy.compile(**options)
    except Exception as error:
        warnings.warn(
            f"The copy of model {model.name!r} is not compiled, since its parts cannot be copied: "
            f"{first_line(error)}",
            stacklevel=3,
        )
        return
    _copy_state(model.optimizer, copy.optimizer, copy)


def _copied(value: Any, keras: Any) -> Any:
    """New objects where there is a configuration; functions, names and numbers as they are."""
    if isinstance(value, dict):
        return {name: _copied(item, keras) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, keras) for item in value)
    if not hasattr(value, "get_config") or isinstance(value, type):
        return value
    functions = [getattr(value, name, None) for name in ("fn", "_fn")]
    own = {
        found.__name__: found
        for found in (type(value), *functions)
        if found is not None and found.__module__.partition(".")[0] != keras.__name__
    }
    with keras.utils.custom_object_scope(own):
        config = keras.saving.serialize_keras_object(value)
        return keras.saving.deserialize_keras_object(config)


def _copy_state(source: Any, target: Any, model: Layer) -> None:
    """Copies slots, step, learning rate and loss scale of one optimizer to another."""
    old, new = (getattr(item, "inner_optimizer", item) for item in (source, target))
    _build(target, model)
    before, after = _variables(old), _variables(new)
    if len(before) == len(after):
        for value, variable in zip(before, after, strict=True):
            variable.assign(value)
    elif int(old.iterations):
        warnings.warn(
            f"The state of the optimizer was not copied: {len(before)} variables became "
            f"{len(after)}.",
            stacklevel=4,
        )
    rates = [getattr(item, "learning_rate", None) for item in (old, new)]
    if all(hasattr(rate, "assign") for rate in rates):
        rates[1].assign(rates[0])  # type: ignore[union-attr]
    for value, variable in zip(scale_state(source), scale_state(target), strict=False):
        variable.assign(value)


def _build(optimizer: Any, model: Layer) -> None:
    """Makes the variables of an optimizer before its first step."""
    if hasattr(optimizer, "build"):
        optimizer.build(model.trainable_variables)
    else:  # a legacy one of tf_keras
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        inner._create_all_weights(model.trainable_variables)


def _variables(optimizer: Any) -> list[Any]:
    found = optimizer.variables
    return list(found() if callable(found) else found)
