"""Loss scaling of optimizers of both Kerases.

Gradients below 2^-24 are 0 in float16. Scaled losses give scaled gradients, which the optimizer
divides again; steps whose gradients overflow are left out and halve the scale.
"""

from __future__ import annotations

from typing import Any


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
