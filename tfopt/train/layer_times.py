"""What single layers of a Keras model take, called on what they get inside the model."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from tfopt.measure import latency, statistics
from tfopt.train.assignment import INPUT
from tfopt.train.layers import Layer, Place, is_model, walk

BLOCK_S = 0.01  # layers have no threads of their own that would have to wake up
MAX_S = 1.0
INTERVAL_WIDTH = 0.05

_UNLIKE = ("name", "dtype", "seed", "trainable")  # in configurations of layers that take as long


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer inside a model, in float32.

    Attributes:
      args: of its `call`.
      kwargs: of its `call`.
      sources: for each floating-point tensor in both of them the index of the layer that made it,
        or `INPUT`, and how many elements it has.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    sources: list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class LayerTime:
    """Of one layer.

    Attributes:
      float32_s: seconds of all its calls in float32.
      speedup: how many times faster it is in half precision, its casts not counted; None if it was
        only timed in float32.
    """

    float32_s: float
    speedup: statistics.Interval | None


def units(model: Layer) -> list[Place]:
    """The layers that take part as a whole: those directly inside models."""
    return [
        place
        for place in walk(model)
        if not is_model(place.layer) and (place.parent is None or is_model(place.parent))
    ]


def whole(unit: Layer | None) -> list[Layer]:
    """A layer and everything inside it."""
    return [] if unit is None else [place.layer for place in walk(unit)]


def record_calls(
    model: Layer, layers: Sequence[Layer], inputs: Any, is_training: bool
) -> list[list[Call]]:
    """Runs the model once; returns the calls of each of the layers.

    A tensor that none of them made, since operations outside of layers did, counts as made by the
    layer that was called before.
    """
    import tensorflow as tf

    found: list[list[Call]] = [[] for _ in layers]
    made_by = {id(value): INPUT for value in tf.nest.flatten(inputs)}
    kept_alive: list[Any] = []
    last = INPUT

    @contextlib.contextmanager
    def recorded(index: int, layer: Layer) -> Iterator[None]:
        call = layer.call

        def recording_call(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            tensors = [value for value in tf.nest.flatten((args, kwargs)) if is_float(value)]
            sources = [(made_by.get(id(value), last), int(tf.size(value))) for value in tensors]
            outputs = call(*args, **kwargs)
            found[index].append(Call(args, kwargs, sources))
            made_by.update({id(value): index for value in tf.nest.flatten(outputs)})
            kept_alive.append(outputs)
            last = index
            return outputs

        layer.call = recording_call
        try:
            yield
        finally:
            del layer.call

    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            stack.enter_context(recorded(index, layer))
        model(inputs, training=is_training)
    return found


def key(layer: Layer, calls: Sequence[Call]) -> str:
    """The same for layers that take the same time."""
    import tensorflow as tf

    try:
        config = {name: value for name, value in layer.get_config().items() if name not in _UNLIKE}
        written = json.dumps(config, default=str, sort_keys=True)
    except Exception:  # of a custom layer, which has whatever it has
        written = str(id(layer))
    shapes = [
        (str(value.dtype), tuple(value.shape)) if tf.is_tensor(value) else str(value)
        for call in calls
        for value in tf.nest.flatten((call.args, call.kwargs))
    ]
    return f"{type(layer).__name__} {written} {shapes}"


def time_layer(
    layers: Mapping[str, Layer], calls: Sequence[Call], is_training: bool, jit_compile: bool
) -> LayerTime:
    """Times the same layer in float32 and, if it is given, in half precision, side by side.

    Args:
      layers: by the dtype that they compute in, float32 first.
      calls: of the layer.
      is_training: whether gradients are taken, too.
      jit_compile: whether XLA compiles it.
    """
    steps = {
        dtype: [_step(layer, call, dtype, is_training, jit_compile) for call in calls]
        for dtype, layer in layers.items()
    }

    def all_of(steps: list[Callable[[], Any]]) -> Callable[[], Any]:
        return lambda: [step() for step in steps]

    timings = time_steps(
        {dtype: all_of(found) for dtype, found in steps.items()},
        max_s=MAX_S,
        interval_width=INTERVAL_WIDTH,
        block_s=BLOCK_S,
    )
    float32, *half = timings.values()
    return LayerTime(float32.median_s, latency.speedup(float32, half[0]) if half else None)


def time_cast(num_elements: int, dtype: str, is_training: bool, jit_compile: bool) -> float:
    """The seconds that a cast to half precision and back takes, gradients included, halved."""
    import tensorflow as tf

    @tf.function(jit_compile=jit_compile)
    def there_and_back(value: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(value)
            outputs = tf.cast(tf.cast(value, dtype) * 2, tf.float32)
        return (outputs, tape.gradient(outputs, value)) if is_training else outputs

    @tf.function(jit_compile=jit_compile)
    def neither(value: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(value)
            outputs = value * 2
        return (outputs, tape.gradient(outputs, value)) if is_training else outputs

    value = tf.random.normal([num_elements])
    timings = time_steps(
        {"neither": lambda: neither(value), "cast": lambda: there_and_back(value)},
        max_s=MAX_S,
        interval_width=INTERVAL_WIDTH,
        block_s=BLOCK_S,
    )
    return max(0.0, timings["cast"].median_s - timings["neither"].median_s) / 2


def time_steps(steps: Mapping[str, Callable[[], Any]], **options: Any) -> dict[str, latency.Timing]:
    """Times functions side by side, each until its results are there."""
    import tensorflow as tf

    def waiting(step: Callable[[], Any]) -> Callable[[Any], None]:
        def run(_: Any) -> None:
            step()
            tf.test.experimental.sync_devices()

        return run

    timers = {
        name: latency.SessionTimer(_Runs(waiting(step)), [{}]) for name, step in steps.items()
    }
    return latency.time_interleaved(timers, **options)


def model_step(
    model: Layer, inputs: Any, is_training: bool, jit_compile: bool
) -> Callable[[], Any]:
    """One inference, or one forward and backward pass of the mean square of the outputs."""
    import tensorflow as tf

    variables = trainable_variables(model)

    @tf.function(jit_compile=jit_compile)
    def run(inputs: Any) -> Any:
        if not is_training:
            return model(inputs, training=False)
        with tf.GradientTape() as tape:
            outputs = tf.nest.flatten(model(inputs, training=True))
            loss = tf.add_n([tf.reduce_mean(tf.cast(value, tf.float32) ** 2) for value in outputs])
        return tape.gradient(loss, variables)

    return lambda: run(inputs)


def trainable_variables(layer: Layer) -> list[Any]:
    """TensorFlow's variables of a layer of either framework."""
    import tensorflow as tf

    return [
        variable if isinstance(variable, tf.Variable) else variable.value
        for variable in layer.trainable_variables
    ]


def is_float(value: Any) -> bool:
    """Whether something is a tensor of floating-point numbers."""
    return getattr(getattr(value, "dtype", None), "is_floating", False)


@dataclasses.dataclass(frozen=True)
class _Runs:
    """What `latency.SessionTimer` times."""

    run: Callable[[Any], Any]


def _step(
    layer: Layer, call: Call, dtype: str, is_training: bool, jit_compile: bool
) -> Callable[[], Any]:
    """The layer on what it got in a call, in another dtype; its inputs come in that dtype."""
    import tensorflow as tf

    structure = (call.args, call.kwargs)
    flat = tf.nest.flatten(structure)
    places = [index for index, value in enumerate(flat) if tf.is_tensor(value)]
    tensors = [tf.cast(flat[i], dtype) if is_float(flat[i]) else flat[i] for i in places]
    variables = trainable_variables(layer)

    @tf.function(jit_compile=jit_compile)
    def run(*tensors: Any) -> Any:
        values = list(flat)
        for index, tensor in zip(places, tensors, strict=True):
            values[index] = tensor
        args, kwargs = tf.nest.pack_sequence_as(structure, values)
        watched = [tensor for tensor in tensors if is_float(tensor)]
        with tf.GradientTape() as tape:
            tape.watch(watched)
            outputs = layer(*args, **kwargs)
        if not is_training or not (watched or variables):
            return outputs
        return outputs, tape.gradient(outputs, watched + variables)

    return lambda: run(*tensors)


def mean_size(calls: Sequence[Sequence[Call]]) -> int:
    """The mean number of elements of the tensors between layers."""
    sizes = [size for found in calls for call in found for _, size in call.sources]
    return max(1, int(np.mean(sizes))) if sizes else 1
