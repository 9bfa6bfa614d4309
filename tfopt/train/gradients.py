"""What half precision does to gradients, counted on the device while a model trains."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfopt.train.layers import Layer, framework_of, walk
from tfopt.train.loss_scaling import is_scaled, scale_variable

SAMPLE_SIZE = 4096  # values of a variable's gradient that are looked at for zeros and underflow


class Tally:
    """Sums over steps, for each variable.

    Attributes:
      num_steps: all.
      num_overflows: steps in which some gradient was not finite.
      num_seen: array of shape (variables,), float64: steps in which a variable had a gradient.
      sums: array of shape (variables, 2), float64: shares of zeros and of underflowing gradients.
      overflows: array of shape (variables,), float64: steps in which not all were finite.
      sizes: elements of each variable.
    """

    def __init__(self, sizes: Sequence[int]):
        self.num_steps = self.num_overflows = 0
        self.num_seen = np.zeros(len(sizes))
        self.sums = np.zeros((len(sizes), 2))
        self.overflows = np.zeros(len(sizes))
        self.sizes = np.asarray(sizes, np.float64)

    def add(self, other: Tally) -> None:
        """Adds other steps."""
        self.num_steps += other.num_steps
        self.num_overflows += other.num_overflows
        self.num_seen += other.num_seen
        self.sums += other.sums
        self.overflows += other.overflows

    def shares(self, variables: Sequence[int] | slice = slice(None)) -> tuple[float, float]:
        """Of zeros and of underflow; variables weigh as much as they have elements."""
        seen = self.num_seen[variables]
        weights = self.sizes[variables] * (seen > 0)
        if not weights.any():
            return 0.0, 0.0
        means = self.sums[variables] / np.maximum(seen, 1)[:, None]
        zeros, small = np.average(means, axis=0, weights=weights)
        return float(zeros), float(small)

    def figures(self) -> dict[str, float]:
        """Of all variables together."""
        zeros, small = self.shares()
        return {
            "overflow_steps": float(self.num_overflows),
            "zero_gradients": zeros,
            "underflowing_gradients": small,
        }


class Counts:
    """Counters on the device, by variable, and what was read of them."""

    def __init__(self, model: Layer):
        import tensorflow as tf

        inside = {
            id(variable): (place.path, str(place.layer.compute_dtype))
            for place in walk(model)
            for variable in place.layer.trainable_weights
        }  # the innermost layer comes last
        self.variables = list(model.trainable_variables)
        own = (model.name, str(model.compute_dtype))
        self.places = [inside.get(id(variable), own) for variable in self.variables]
        self._index = {id(variable): index for index, variable in enumerate(self.variables)}
        self._scale = lambda: scale_variable(model.optimizer)
        # Optimizers of tf_keras get gradients that are divided by the loss scale already.
        self._is_unscaled = framework_of(model).__name__ == "tf_keras" and is_scaled(
            model.optimizer
        )

        def zeros(*shape: int, aggregation: Any) -> Any:
            return tf.Variable(
                tf.zeros(shape),
                trainable=False,
                synchronization=tf.VariableSynchronization.ON_READ,
                aggregation=aggregation,
            )

        mean, first = tf.VariableAggregation.MEAN, tf.VariableAggregation.ONLY_FIRST_REPLICA
        self._sums = zeros(len(self.variables), 2, aggregation=mean)
        self._overflows = zeros(len(self.variables), aggregation=mean)
        self._steps = zeros(2, aggregation=mean)  # all, and those not finite
        # By variable, since a training step may use the optimizer several times, for parts.
        self._seen = zeros(len(self.variables), aggregation=mean)
        self._streaks = zeros(2, aggregation=first)  # not finite, and zeros only
        sizes = [int(np.prod(variable.shape)) for variable in self.variables]
        self._new = lambda: Tally(sizes)
        self.bad_streak = self.zero_streak = 0
        self.start_epoch()

    def start_epoch(self) -> None:
        """Starts the figures of an epoch."""
        self.read()
        self.of_epoch = self._new()

    def add(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Counts one use of the optimizer."""
        import tensorflow as tf

        scale = self._scale() if self._is_unscaled else None
        found = {
            self._index[id(variable)]: _of_known_shape(gradient, variable)
            for gradient, variable in zip(gradients, variables, strict=True)
            if gradient is not None and id(variable) in self._index
        }
        if not found:
            return

        overflows = tf.stack([is_not_finite(gradient) for gradient in found.values()])
        is_bad = tf.reduce_max(overflows)
        limits = [smallest_normal(self.places[index][1]) for index in found]
        shares = small_shares(list(found.values()), limits, scale)
        is_zero = tf.cast(tf.reduce_all(shares[:, 0] == 1.0), tf.float32)

        def of_all(rows: Any) -> Any:
            """Rows of the variables in `found` as rows of all variables."""
            if list(found) == list(range(len(self.variables))):
                return rows
            places = [[index] for index in found]
            return tf.scatter_nd(places, rows, [len(self.variables), *rows.shape[1:]])

        self._overflows.assign_add(of_all(overflows))
        self._sums.assign_add(of_all(shares))
        self._seen.assign_add(of_all(tf.ones(len(found))))
        self._streaks.assign((self._streaks + 1.0) * tf.stack([is_bad, is_zero]))
        self._steps.assign_add(tf.stack([1.0, is_bad]))

    def read(self) -> Tally:
        """What was counted since the last time."""
        tally = self._new()
        tally.sums = np.asarray(self._sums.read_value(), np.float64)
        tally.overflows = np.asarray(self._overflows.read_value(), np.float64)
        steps = np.asarray(self._steps.read_value())
        tally.num_seen = np.asarray(self._seen.read_value(), np.float64)
        tally.num_steps = int(steps[0])
        tally.num_overflows = math.ceil(steps[1])
        self.bad_streak, self.zero_streak = map(int, np.asarray(self._streaks.read_value()))
        for variable in (self._sums, self._overflows, self._steps, self._seen):
            variable.assign(np.zeros(variable.shape, np.float32))
        if hasattr(self, "of_epoch"):
            self.of_epoch.add(tally)
        return tally

    def by_layer(self) -> list[dict[str, Any]]:
        """Figures of the epoch."""
        rows: dict[str, list[int]] = collections.defaultdict(list)
        for index, (path, _) in enumerate(self.places):
            rows[path].append(index)
        found = []
        for path, indices in rows.items():
            zeros, small = self.of_epoch.shares(indices)
            found.append(
                {
                    "layer": path,
                    "dtype": self.places[indices[0]][1],
                    "zero_gradients": zeros,
                    "underflowing_gradients": small,
                    "overflow_steps": math.ceil(self.of_epoch.overflows[indices].max()),
                }
            )
        return found


def is_not_finite(gradient: Any) -> Any:
    """Whether a value is not finite; a scalar, float32: 0 or 1."""
    import tensorflow as tf

    values = gradient.values if isinstance(gradient, tf.IndexedSlices) else gradient
    # As loss scaling asks, so that a compiler asks once.
    return 1.0 - tf.cast(tf.reduce_all(tf.math.is_finite(values)), tf.float32)


def small_shares(gradients: Sequence[Any], limits: Sequence[float], scale: Any = None) -> Any:
    """Shares of zeros and of underflowing values, of gradients of any shapes.

    Samples of all tensors lie in one matrix, because a GPU takes as long to begin with a tensor as
    to read thousands of values.

    Args:
      gradients: tensors, or slices of some, of float32 or half precision.
      limits: for each, the smallest normal number of the dtype that it was computed in.
      scale: what the gradients were divided by since then.

    Returns:
      Tensor of shape (gradients, 2), float32.
    """
    import tensorflow as tf

    smallest = tf.constant(limits, tf.float32)
    if scale is not None:
        smallest /= tf.cast(scale, tf.float32)
    sliced = [index for index, each in enumerate(gradients) if isinstance(each, tf.IndexedSlices)]
    dense = [index for index in range(len(gradients)) if index not in sliced]
    found = [_shares_of_slices(gradients[index], smallest[index])[None] for index in sliced]
    if dense:
        samples = [tf.cast(sample(gradients[index]), tf.float32) for index in dense]
        sizes = [each.shape[0] for each in samples]
        # Infinity is neither 0 nor small.
        matrix = tf.stack(
            [
                tf.pad(each, [[0, max(sizes) - size]], constant_values=math.inf)
                for each, size in zip(samples, sizes, strict=True)
            ]
        )
        of_sizes = np.maximum(sizes, 1).astype(np.float32)
        found.append(_shares(matrix, tf.gather(smallest, dense)[:, None], of_sizes))
    return tf.gather(tf.concat(found, 0), np.argsort(sliced + dense))


def _of_known_shape(gradient: Any, variable: Any) -> Any:
    """The gradient, with the shape of its variable where it tells none."""
    import tensorflow as tf

    if isinstance(gradient, tf.IndexedSlices):
        return gradient
    gradient = tf.convert_to_tensor(gradient)
    is_known = gradient.shape.is_fully_defined()
    return gradient if is_known else tf.ensure_shape(gradient, variable.shape)


def _shares(values: Any, limit: Any, size: Any) -> Any:
    """Shares of zeros and of other values below a limit, along the last axis of that size."""
    import tensorflow as tf

    absolute = tf.abs(values)
    is_zero = absolute == 0.0
    is_small = tf.logical_and(absolute < limit, tf.logical_not(is_zero))
    # 1 − 0 is exact where a quotient need not be.
    num_zeros, num_small = (
        tf.reduce_sum(tf.cast(which, tf.float32), -1) for which in (is_zero, is_small)
    )
    return tf.stack([1.0 - (size - num_zeros) / size, num_small / size], -1)


def _shares_of_slices(slices: Any, limit: Any) -> Any:
    import tensorflow as tf

    # Rows that were not looked up have no gradient.
    ones = tf.ones_like(slices.indices, tf.float32)
    looked_up = tf.math.unsorted_segment_max(ones, slices.indices, slices.dense_shape[0])
    num_rows = tf.cast(slices.dense_shape[0], tf.float32)
    share_of_rows = tf.reduce_sum(tf.maximum(looked_up, 0.0)) / num_rows
    values = tf.reshape(tf.cast(slices.values, tf.float32), [-1])
    shares = _shares(values, limit, tf.cast(tf.size(values), tf.float32))
    return share_of_rows * shares + (1.0 - share_of_rows) * tf.constant([1.0, 0.0])


def sample(values: Any) -> Any:
    """At most 4,096 values, evenly spaced.

    Their distance has no factor in common with the number of values, so that they come from all
    channels alike.

    Args:
      values: tensor of any static shape.

    Returns:
      Tensor of shape (values,).
    """
    import tensorflow as tf

    flat = tf.reshape(values, [-1])
    size = flat.shape[0]
    distance = max(1, math.ceil(size / SAMPLE_SIZE))
    while math.gcd(distance, size) > 1:
        distance += 1
    return flat[::distance]


def smallest_normal(dtype: str) -> float:
    """The smallest positive number of a dtype that has all its bits; of float64, float32's."""
    return 2.0**-14 if dtype == "float16" else 2.0**-126
