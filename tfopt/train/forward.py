"""Which layer's output is the first that is not finite, seen while a model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from tfopt.train.gradients import is_not_finite
from tfopt.train.layers import Layer, Place, walk

LARGEST_FLOAT16 = 65504.0

GOES_IN, COMES_OUT = 0, 1


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A layer that ran."""

    place: Place
    goes_in_bad: bool
    comes_out_bad: bool


class ForwardCheck:
    """Looks at what goes into and comes out of each layer in the steps of `fit`.

    The training step is traced anew, since looking costs time that is only worth it when gradients
    overflow already.

    Args:
      model: that `fit` trains, of Keras 3 or tf_keras.

    Attributes:
      num_batches: that were looked at, so many times as `finding` was asked.
    """

    def __init__(self, model: Layer):
        import tensorflow as tf

        self._model = model
        self._places = list(walk(model))
        self._order: list[int] = []  # of layers, as they end
        self._own: list[tuple[Any, str, Any]] = []
        self.num_batches = 0
        with model.distribute_strategy.scope():

            def zeros(*shape: int) -> Any:
                return tf.Variable(
                    tf.zeros(shape),
                    trainable=False,
                    synchronization=tf.VariableSynchronization.ON_READ,
                    aggregation=tf.VariableAggregation.MEAN,
                )

            self._flags = zeros(len(self._places), 2)
            # Of the model's inputs: whether they are not finite, and the largest.
            self._inputs = zeros(2)

    def start(self) -> None:
        """Begins to look, from the next batch on."""
        for index, place in enumerate(self._places):
            self._replace(place.layer, "call", self._looking(index, place.layer.call))
        self._replace(self._model, "train_step", self._reading(self._model.train_step))
        self._model.make_train_function(force=True)

    def stop(self) -> None:
        """Leaves the model as it was."""
        for owner, name, own in reversed(self._own):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self._own.clear()
        self._model.make_train_function(force=True)

    def finding(self) -> str | None:
        """Where values stop being finite, and what to do, a sentence; None if they do not."""
        self.num_batches += 1
        not_finite, largest = np.asarray(self._inputs.read_value())
        if not_finite:
            return "The inputs of the model hold values that are not finite: check the data."
        flags = np.asarray(self._flags.read_value()) > 0
        seen = [_Seen(self._places[index], *flags[index]) for index in self._order]
        first = next((each for each in seen if each.goes_in_bad or each.comes_out_bad), None)
        return None if first is None else _sentence(first, float(largest))

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._own.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, value)

    def _looking(self, index: int, call: Callable[..., Any]) -> Callable[..., Any]:
        import tensorflow as tf

        row = np.eye(len(self._places), dtype=np.float32)[index][:, None]

        def looking_call(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            if index not in self._order:
                self._order.append(index)
            both = [_any_not_finite((args, kwargs)), _any_not_finite(outputs)]
            self._flags.assign(tf.maximum(self._flags, row * tf.stack(both)[None]))
            return outputs

        return looking_call

    def _reading(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        import tensorflow as tf

        def reading_step(data: Any) -> Any:
            inputs = data[0] if isinstance(data, (list, tuple)) else data
            values = _floats(inputs)
            if values:
                largest = [tf.reduce_max(tf.abs(tf.cast(each, tf.float32))) for each in values]
                found = tf.stack([_any_not_finite(inputs), tf.reduce_max(tf.stack(largest))])
                self._inputs.assign(tf.maximum(self._inputs, found))
            return train_step(data)

        return reading_step


def _sentence(found: _Seen, largest_input: float) -> str:
    layer, path = found.place.layer, found.place.path
    dtype = str(layer.compute_dtype)
    what = f"{path!r} ({type(layer).__name__}, {dtype})"
    keep = f"keep it in float32 (keep_float32=[{path!r}])"
    if found.goes_in_bad:
        if dtype == "float16" and largest_input > LARGEST_FLOAT16:
            return (
                f"The inputs of the model go up to {largest_input:.3g}, and float16 ends at "
                f"{LARGEST_FLOAT16:.0f}, which layer {what} meets first: scale the inputs down, or "
                f"{keep}."
            )
        return (
            f"What goes into layer {what} is the first that is not finite: it is too large for "
            f"{dtype}, or an operation before the layer overflows; {keep}, or scale what goes in."
        )
    begins = f"The first output that is not finite is that of layer {what}, whose inputs are finite"
    if dtype != "float16":
        return (
            f"{begins}: look for a division by 0, a logarithm or a root in it, or lower the "
            "learning rate."
        )
    return f"{begins}: {keep}."


def _floats(values: Any) -> list[Any]:
    import tensorflow as tf

    flat = [each for each in tf.nest.flatten(values) if tf.is_tensor(each)]
    return [each for each in flat if each.dtype.is_floating]


def _any_not_finite(values: Any) -> Any:
    """1 if some floating-point tensor is not finite, else 0; float32."""
    import tensorflow as tf

    found = [is_not_finite(each) for each in _floats(values)]
    return tf.reduce_max(tf.stack(found)) if found else tf.constant(0.0)
