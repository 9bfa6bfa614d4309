"""New statistics for batch normalisation."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.train.batches import batches, leaves
from tfopt.train.copies import matched
from tfopt.train.layers import Layer, framework_of, walk

_CLASSES = {"BatchNormalization", "SyncBatchNormalization"}


def reestimate_batchnorm(model: Layer, data: Any, batch_size: int = 64) -> None:
    """Replaces the moving statistics of batch normalisation by those of data, in place.

    The moving averages that training leaves lag behind the weights, the more so the higher the
    momentum is, and they are those of the precision that was trained in. Labels are not needed and
    weights do not change. It costs one forward pass over the data; some thousand examples will do,
    augmented as in training: resnet20, trained on crops with black margins, lost 4 points by the
    statistics of the same images without margins.

    Batches are normalised by their own statistics meanwhile, and everything else (dropout) works
    as in inference. Means and variances are those of all examples together, not averages over
    batches. Source: Wu & Johnson 2021, "Rethinking 'Batch' in BatchNorm" (arXiv 2105.07576),
    section 3.

    Args:
      model: a built Keras 3 or tf_keras model. When anything fails it is as it was.
      data: as `fit` takes it: an array or a list or dictionary of arrays of shape
        (examples, …), or an iterable of batches such as a `tf.data.Dataset`. Of tuples, which
        hold labels, the first part is taken.
      batch_size: of arrays; the larger, the nearer to inference.

    Raises:
      InputError: when the model has no batch normalisation, or the data have no two examples or
        lead to values that are not finite.
    """
    framework_of(model)
    layers = [place.layer for place in walk(model) if _is_batchnorm(place.layer)]
    if not layers:
        raise InputError(f"Model {model.name!r} has no batch normalisation to estimate anew.")
    before = [_statistics(layer) for layer in layers]
    try:
        with contextlib.ExitStack() as stack:
            sums = [stack.enter_context(_summed(layer)) for layer in layers]
            stack.enter_context(_eagerly())
            num_examples = 0
            for batch in batches(data, batch_size):
                model(batch, training=False)
                num_examples += len(leaves(batch)[0])
        if num_examples < 2:
            raise InputError(f"The data have {num_examples} examples; expected hundreds.")
        for layer, found in zip(layers, sums, strict=True):
            if not found.num_values:
                continue  # not used in inference
            mean = found.total / found.num_values
            variance = found.squares / found.num_values - mean**2
            if not np.all(np.isfinite(mean) & np.isfinite(variance)):
                raise InputError(
                    f"The inputs of layer {layer.name!r} are not finite on these data; expected "
                    "finite weights and examples."
                )
            _assign(layer, mean, np.maximum(variance, 0))
    except BaseException:
        for layer, values in zip(layers, before, strict=True):
            _assign(layer, *values)
        raise


def has_batchnorm(model: Layer) -> bool:
    """Whether a model has batch normalisation anywhere."""
    return any(_is_batchnorm(place.layer) for place in walk(model))


def largest_shift(model: Layer, other: Layer) -> tuple[float, str]:
    """How far statistics of two copies of a model are apart, and where most.

    Returns:
      The distance in the layer where it is largest, averaged over its channels: of means, in
      standard deviations of the first model, or of variances, as the logarithm of their ratio.
      And the name of that layer.
    """
    found = (0.0, "")
    for place, twin in matched(other, model):
        if not _is_batchnorm(place.layer) or twin is None:
            continue
        mean, variance = _statistics(place.layer)
        old_mean, old_variance = _statistics(twin.layer)
        epsilon = place.layer.epsilon
        shift = np.abs(mean - old_mean) / np.sqrt(old_variance + epsilon)
        ratio = np.abs(np.log((variance + epsilon) / (old_variance + epsilon)))
        found = max(found, (float(shift.mean()), place.path), (float(ratio.mean()), place.path))
    return found


@dataclasses.dataclass
class _Sums:
    """Of the values of each channel, and of their squares."""

    total: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(()))
    squares: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(()))
    num_values: float = 0.0

    def add(self, inputs: Any, mask: Any, axis: int) -> None:
        """Adds the values that normalisation counts: those that are not masked out.

        Args:
          inputs: tensor of shape (…, channels, …).
          mask: None, or tensor of the shape of `inputs` without the channels.
          axis: of the channels.
        """
        import tensorflow as tf

        values = tf.cast(inputs, tf.float32)
        others = [index for index in range(len(values.shape)) if index != axis % len(values.shape)]
        weights = tf.ones_like(values) if mask is None else tf.cast(mask, tf.float32)
        if mask is not None:
            weights = tf.expand_dims(weights, axis) * tf.ones_like(values)
        count = float(tf.reduce_sum(weights)) / values.shape[axis]
        mean, variance = tf.nn.weighted_moments(values, others, weights)
        if count:
            mean, variance = (np.asarray(found, np.float64) for found in (mean, variance))
            self.total = self.total + count * mean
            self.squares = self.squares + count * (variance + mean**2)
            self.num_values += count


@contextlib.contextmanager
def _summed(layer: Layer) -> Iterator[_Sums]:
    """The layer uses the statistics of each batch, which are added up; at each of its places."""
    call, trainable = layer.call, layer.trainable
    axis = layer.axis if isinstance(layer.axis, int) else layer.axis[0]  # tf_keras has a list
    sums = _Sums()

    def training_call(inputs: Any, training: Any = None, mask: Any = None) -> Any:
        sums.add(inputs, mask, axis)
        masked = {} if mask is None else {"mask": mask}
        return call(inputs, training=True, **masked)

    layer.call, layer.trainable = training_call, True
    try:
        yield sums
    finally:
        del layer.call
        layer.trainable = trainable


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Inside, functions that layers compiled for themselves run step by step, too."""
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


def _is_batchnorm(layer: Layer) -> bool:
    return any(found.__name__ in _CLASSES for found in type(layer).__mro__)


def _statistics(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.asarray(layer.moving_mean).astype(np.float64),
        np.asarray(layer.moving_variance).astype(np.float64),
    )


def _assign(layer: Layer, mean: np.ndarray, variance: np.ndarray) -> None:
    layer.moving_mean.assign(mean.astype(np.float32))
    layer.moving_variance.assign(variance.astype(np.float32))
