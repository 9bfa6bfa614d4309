"""Loss scaling of optimizers of both Kerases.

Gradients below 2^-24 are 0 in float16. Scaled losses give scaled gradients, which the optimizer
divides again; steps whose gradients overflow are left out and halve the scale.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Iterator
from typing import Any

from tfopt.train.layers import Layer, framework_of

_SCALING = {"scale_loss", "get_scaled_loss", "minimize"}


def is_scaled(optimizer: Any) -> bool:
    """Whether an optimizer is wrapped for loss scaling."""
    return hasattr(optimizer, "inner_optimizer")


def with_scaling(keras: Any, optimizer: Any, is_float16: bool) -> Any:
    """The optimizer with loss scaling, or without.

    It is wrapped here and not by `compile`, so that a file of the model holds it wrapped: Keras
    does not save the policy of a model, by which it decides when it loads one.
    """
    if is_float16 == is_scaled(optimizer):
        return optimizer
    if is_scaled(optimizer):
        return optimizer.inner_optimizer
    if keras.__name__ == "keras":
        return keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")
    return keras.mixed_precision.LossScaleOptimizer(optimizer)


def scale_variable(optimizer: Any) -> Any:
    """The variable that holds the loss scale; None without one, or before it is built."""
    state = scale_state(optimizer)
    return state[0] if state else None


def scale_state(optimizer: Any) -> list[Any]:
    """The variables of loss scaling; empty where there is none or it was not built yet."""
    if hasattr(optimizer, "dynamic_scale"):
        return [optimizer.dynamic_scale, optimizer.step_counter]
    state = getattr(optimizer, "_loss_scale", None)
    return [] if state is None else [state.current_loss_scale, state.counter]


def warn_of_own_step(model: Layer, stacklevel: int) -> None:
    """Warns, once a model, of a `train_step` in float16 that does not scale its loss.

    Keras scales the loss in its own `train_step` only.
    """
    owner = next(found for found in type(model).__mro__ if "train_step" in vars(found))
    framework = framework_of(model).__name__
    if owner.__module__.partition(".")[0] == framework or getattr(
        model, "_is_warned_of_step", False
    ):
        return
    if model.compute_dtype != "float16" or _SCALING & set(_names_in(type(model), framework)):
        return
    model._is_warned_of_step = True
    is_keras_3 = framework == "keras"
    how = (
        "take gradients of self.optimizer.scale_loss(loss)"
        if is_keras_3
        else "take gradients of self.optimizer.get_scaled_loss(loss) and give them through "
        "self.optimizer.get_unscaled_gradients(gradients)"
    )
    effect = (
        "the optimizer divides gradients by the loss scale, which nothing multiplied before, so "
        "that weights hardly move"
        if is_keras_3
        else "the loss is not scaled, so that small gradients become 0"
    )
    warnings.warn(
        f"{owner.__name__} has a train_step of its own, in which Keras does not scale the loss: in "
        f"float16 {effect}; {how}.",
        stacklevel=stacklevel + 1,
    )


def _names_in(cls: type, framework: str) -> Iterator[str]:
    """Names that the code of a class uses, without that of Keras."""
    for base in cls.__mro__:
        if base is object or base.__module__.partition(".")[0] == framework:
            continue
        for value in vars(base).values():
            function = getattr(value, "__wrapped__", value)
            code = getattr(getattr(function, "__func__", function), "__code__", None)
            yield from _names_of(code) if code is not None else ()


def _names_of(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names_of(constant)
