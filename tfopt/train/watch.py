"""Watching gradients while a model trains in half precision."""

from __future__ import annotations

import collections
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tfopt.errors import InputError
from tfopt.keras_callback import KerasCallback
from tfopt.train.layers import Layer, framework_of, walk
from tfopt.train.loss_scaling import is_scaled, scale_variable

if TYPE_CHECKING:
    import pandas as pd

EVERY = 100
MAX_OVERFLOWS = 30  # in a row: by then the scale has been divided by 10⁹
MAX_NOT_FINITE = 3  # in a row without loss scaling, where the first spoils the weights
MAX_ZERO_STEPS = 20  # in a row, of all gradients
SAMPLE_SIZE = 4096  # values of a variable's gradient that are looked at for zeros and underflow


class PrecisionWatch(KerasCallback):
    """Records what half precision does to gradients, and stops when training cannot work.

        model.fit(…, callbacks=[tfopt.PrecisionWatch()])

    For Keras 3 and tf_keras models. It looks at the gradients that the optimizer gets, so that
    there is no second backward pass: in each step whether they are finite, which loss scaling looks
    at anyway, and how many are 0 or too small, of a variable with more than 4,096 values in the
    same even sample of them in each step. Loss scaling goes on as it is.

    A gradient underflows when it is not 0 and its absolute value, loss scale included, is below the
    smallest normal number of the dtype that its layer computes in (2^-14 in float16, 2^-126 in
    bfloat16 and float32): it has lost bits. Below 2^-24 float16 has only 0, so that shares of zeros
    that grow with the depth of a layer are a sign of underflow, too; units that are never active
    have zeros as well. Source: Micikevicius et al. 2018, "Mixed Precision Training" (arXiv
    1710.03740), section 3.2.

    At the end of an epoch the logs get `loss_scale` (if there is one), `overflow_steps` (steps of
    the epoch with gradients that were not finite), `zero_gradients` and `underflowing_gradients`
    (shares of all gradients of the epoch, 0…1). A `TensorBoard` or `CSVLogger` callback that comes
    after this one writes them, too.

    A `train_step` of its own may use the optimizer several times in a batch: each counts as a step.

    Training is stopped, with a warning that says why and what to do, when 30 steps in a row
    overflowed in spite of loss scaling, 3 without it were not finite, or all gradients that were
    looked at in 20 were 0.

    Args:
      every: batches between two looks at what was counted, which wait for the device.
      log_dir: folder for TensorBoard; gets the same figures at each look, and by layer.

    Attributes:
      problem: why training was stopped, or None.

    Raises:
      InputError: when `every` is below 1; when training begins, for an optimizer that is none of
        Keras's.
    """

    def __init__(self, every: int = EVERY, log_dir: str | Path | None = None):
        super().__init__()
        if every < 1:
            raise InputError(f"every is {every}; expected a number of batches, such as 10.")
        self.problem: str | None = None
        self._every, self._log_dir = every, log_dir
        self._rows: list[dict[str, float]] = []
        self._counts: _Counts | None = None
        self._writer: Any = None
        self._step = self._num_batches = 0

    @property
    def history(self) -> pd.DataFrame:
        """One row a look: `step`, `loss_scale` and the figures of the steps since the last look.

        `overflow_steps`, `zero_gradients` and `underflowing_gradients` are as in the logs.
        """
        import pandas as pd

        return pd.DataFrame(self._rows)

    @property
    def layers(self) -> pd.DataFrame:
        """One row a layer with weights, of the last epoch, or of this one before it ends.

        Columns: `layer` (its path), `dtype` (that it computes in), `zero_gradients`,
        `underflowing_gradients` (shares, 0…1) and `overflow_steps`.
        """
        import pandas as pd

        return pd.DataFrame([] if self._counts is None else self._counts.by_layer())

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Puts itself between the model and its optimizer."""
        framework_of(self.model)
        optimizer = self.model.optimizer
        name = "apply" if hasattr(optimizer, "apply") else "apply_gradients"
        if not hasattr(optimizer, name):
            raise InputError(
                f"The optimizer is a {type(optimizer).__name__}; expected one of Keras or tf_keras."
            )
        self.problem, self._rows, self._step, self._num_batches = None, [], 0, 0
        self._counts = None
        if self.model.built:
            with self.model.distribute_strategy.scope():
                self._start_counting()
        _stop_listening(optimizer)  # if another training ended by an error
        _listen(optimizer, name, self._hear)
        self.model.make_train_function(force=True)
        if self._log_dir is not None:
            import tensorflow as tf

            self._writer = tf.summary.create_file_writer(str(self._log_dir))

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Leaves the optimizer as it was."""
        _stop_listening(self.model.optimizer)
        self.model.train_function = None  # traced with this callback in it
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Starts to count anew."""
        if self._counts is not None:
            self._counts.start_epoch()

    def on_train_batch_end(self, batch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Looks at what was counted, every so many batches."""
        self._num_batches += 1
        if self._num_batches % self._every == 0:
            self._look()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the figures of the epoch to the logs."""
        self._look()
        if self._counts is None or not self._counts.of_epoch.num_steps:
            warnings.warn(
                f"No gradients came to the optimizer of model {self.model.name!r}, so that nothing "
                "was watched: its train_step uses another one, or nothing in it is trainable.",
                stacklevel=2,
            )
        elif logs is not None:
            logs.update(self._with_scale(self._counts.of_epoch.figures()))

    def _start_counting(self) -> None:
        self._counts = _Counts(self.model)
        _warn_without_scaling(self.model, self._counts)

    def _hear(self, gradients: Sequence[Any], variables: Sequence[Any]) -> None:
        """Counts one step; traced into the training step."""
        import tensorflow as tf

        if self._counts is None:  # a model that is built by its first batch
            with tf.init_scope():
                self._start_counting()
        assert self._counts is not None
        self._counts.add(gradients, variables)

    def _with_scale(self, figures: dict[str, float]) -> dict[str, float]:
        import tensorflow as tf

        scale = scale_variable(self.model.optimizer)
        if scale is None:
            return figures
        # NumPy cannot read those that tf_keras distributes.
        return {"loss_scale": float(tf.convert_to_tensor(scale)), **figures}

    def _look(self) -> None:
        if (counts := self._counts) is None:
            return
        since = counts.read()
        if not since.num_steps:
            return
        self._step += since.num_steps
        row = {"step": self._step, **self._with_scale(since.figures())}
        self._rows.append(row)
        self._write(row)
        if self.problem is None:
            scale = row.get("loss_scale")
            bad = [place for place, num in zip(counts.places, since.overflows, strict=True) if num]
            self.problem = find_problem(
                bad_streak=counts.bad_streak,
                bad=bad,
                zero_streak=counts.zero_streak,
                is_float16=any(dtype == "float16" for _, dtype in counts.places),
                loss_scale=scale,
            )
            if self.problem is not None:
                self.model.stop_training = True
                warnings.warn(f"Training was stopped. {self.problem}", stacklevel=2)

    def _write(self, row: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        import tensorflow as tf

        assert self._counts is not None
        with self._writer.as_default(step=self._step):
            for name, value in row.items():
                if name != "step":
                    tf.summary.scalar(f"precision/{name}", value)
            for layer in self._counts.by_layer():
                for name in ("zero_gradients", "underflowing_gradients", "overflow_steps"):
                    tf.summary.scalar(f"{name}/{layer['layer']}", layer[name])
        self._writer.flush()


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


def find_problem(
    *,
    bad_streak: int,
    bad: Sequence[tuple[str, str]],
    zero_streak: int,
    is_float16: bool,
    loss_scale: float | None,
) -> str | None:
    """Why training cannot work, and what to do; None if it may.

    Args:
      bad_streak: steps up to the last one without a break in which some gradient was not finite.
      bad: paths of the layers that had them, and the dtypes that these compute in.
      zero_streak: steps up to the last one without a break in which all gradients were 0.
      is_float16: whether some layer computes in float16.
      loss_scale: at the last step; None without loss scaling.
    """
    dtypes = {dtype for _, dtype in bad}
    what = f"The gradients of {_named(bad)} ({' and '.join(sorted(dtypes))}) were not finite"
    if loss_scale is not None and bad_streak >= MAX_OVERFLOWS:
        return (
            f"{what} in the last {bad_streak} steps, and the loss scale fell to {loss_scale:.3g}: "
            "keep the first of these layers in float32 (keep_float32=…), train in mixed_bfloat16, "
            "or look for a value in the data or the loss that is not finite."
        )
    if loss_scale is None and bad_streak >= MAX_NOT_FINITE:
        other = ", train in mixed_bfloat16 (which has the range of float32)" * is_float16
        return (
            f"{what} in the last {bad_streak} steps, and neither are the weights now: lower the "
            f"learning rate, clip the gradients{other}, or look for a value in the data or the "
            "loss that is not finite."
        )
    if zero_streak >= MAX_ZERO_STEPS:
        advice = "look at the loss, which does not depend on the weights"
        if is_float16 and loss_scale is None:
            advice = (
                "float16 needs loss scaling, so wrap the optimizer in LossScaleOptimizer, or use "
                "tfopt.set_precision on a compiled model"
            )
        return f"All gradients of the last {zero_streak} steps were 0: {advice}."
    return None


class _Counts:
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


def _stop_listening(optimizer: Any) -> None:
    for name in ("apply", "apply_gradients"):
        if getattr(vars(optimizer).get(name), "is_watching", False):
            delattr(optimizer, name)


def _listen(
    optimizer: Any, name: str, hear: Callable[[Sequence[Any], Sequence[Any]], None]
) -> None:
    """Has `hear` called with gradients and variables before the optimizer gets them."""
    original = getattr(optimizer, name)

    def apply(grads: Any, trainable_variables: Any = None, **kwargs: Any) -> Any:
        grads = list(grads)
        hear(grads, trainable_variables or optimizer._trainable_variables)
        return original(grads, trainable_variables, **kwargs)

    def apply_gradients(grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        pairs = list(grads_and_vars)
        hear([pair[0] for pair in pairs], [pair[1] for pair in pairs])
        return original(pairs, *args, **kwargs)

    listening: Any = apply if name == "apply" else apply_gradients
    listening.is_watching = True
    setattr(optimizer, name, listening)


def _warn_without_scaling(model: Layer, counts: _Counts) -> None:
    if is_scaled(model.optimizer) or getattr(model.optimizer, "loss_scale_factor", None):
        return
    layers = [place for place in counts.places if place[1] == "float16"]
    if layers:
        warnings.warn(
            f"{_named(layers)} compute in float16 and the optimizer does not scale the loss, so "
            "that small gradients become 0: wrap it in LossScaleOptimizer, or use "
            "tfopt.set_precision on a compiled model.",
            stacklevel=4,
        )


def _named(places: Sequence[tuple[str, str]]) -> str:
    paths = list(dict.fromkeys(path for path, _ in places))
    shown = ", ".join(paths[:3])
    return shown if len(paths) <= 3 else f"{shown} and {len(paths) - 3} more layers"
