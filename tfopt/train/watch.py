"""Watching gradients while a model trains in half precision."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfopt.errors import InputError
from tfopt.keras_callback import KerasCallback
from tfopt.train.forward import ForwardCheck
from tfopt.train.gradients import Counts, Tally
from tfopt.train.layers import Layer, framework_of
from tfopt.train.loss_scaling import is_scaled, scale_variable, warn_of_own_step

if TYPE_CHECKING:
    import pandas as pd

EVERY = 100
MAX_OVERFLOWS = 30  # in a row: by then the scale has been divided by 10⁹
MAX_NOT_FINITE = 3  # in a row without loss scaling, where the first spoils the weights
MAX_ZERO_STEPS = 20  # in a row, of all gradients
MIN_LOSS_SCALE = 1.0  # here even losses that are not scaled overflow; tf_keras stops at it
ALL_FINITE = (
    "The outputs of all layers are finite: train in mixed_bfloat16, which has the range of "
    "float32, or look for a value in the labels or the loss that is not finite."
)
NUM_CHECKED = 64  # batches at most whose forward pass is looked at, where some overflow


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
    looked at in 20 were 0. When gradients overflow without end, or the loss scale falls to 1,
    the next batches are run with a look at every layer, so that the warning can name the first one
    whose output is not finite; where all are finite a low scale alone does not stop training.

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
        self._counts: Counts | None = None
        self._writer: Any = None
        self._step = self._num_batches = 0
        self._check: ForwardCheck | None = None
        self._pending: Callable[[str | None], str | None] | None = None
        self._checked_scale = MIN_LOSS_SCALE

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
        self._counts, self._check, self._pending = None, None, None
        self._checked_scale = MIN_LOSS_SCALE
        warn_of_own_step(self.model, stacklevel=3)
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
        if self._check is not None:
            self._finish_check(is_last=True)
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
        if self._check is not None:
            self._finish_check()
        elif self._num_batches % self._every == 0:
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
        self._counts = Counts(self.model)
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
            self._judge(counts, since, row.get("loss_scale"))

    def _judge(self, counts: Counts, since: Tally, scale: float | None) -> None:
        """Looks for a reason to stop, and for the layer where it begins if gradients overflow."""
        bad = [place for place, num in zip(counts.places, since.overflows, strict=True) if num]
        streaks = (counts.bad_streak, counts.zero_streak)
        is_float16 = any(dtype == "float16" for _, dtype in counts.places)

        def problem(cause: str | None) -> str | None:
            return find_problem(
                bad_streak=streaks[0],
                bad=bad,
                zero_streak=streaks[1],
                is_float16=is_float16,
                loss_scale=scale,
                cause=cause,
            )

        self._pending = problem
        if self._check is not None:
            return
        found = problem(None)
        is_low = scale is not None and scale <= self._checked_scale and since.num_overflows > 0
        if scale is not None and (is_low or (found and streaks[0] >= MAX_OVERFLOWS)):
            self._checked_scale = min(scale, self._checked_scale) / 16
            self._check = ForwardCheck(self.model)
            self._check.start()
        elif found is not None:
            self._stop(found)

    def _finish_check(self, is_last: bool = False) -> None:
        """Ends looking at layers once there is a finding, or enough batches were looked at."""
        assert self._check is not None and self._pending is not None
        cause, problem = self._check.finding(), self._pending(None)
        num_needed = NUM_CHECKED if problem is None else 1
        if cause is None and self._check.num_batches < num_needed and not is_last:
            return
        self._check.stop()
        self._check = None
        if cause is not None or problem is not None:
            self._stop(self._pending(cause or ALL_FINITE))

    def _stop(self, problem: str | None) -> None:
        self.problem = problem
        self.model.stop_training = True
        warnings.warn(f"Training was stopped. {problem}", stacklevel=2)

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


def find_problem(
    *,
    bad_streak: int,
    bad: Sequence[tuple[str, str]],
    zero_streak: int,
    is_float16: bool,
    loss_scale: float | None,
    cause: str | None = None,
) -> str | None:
    """Why training cannot work, and what to do; None if it may.

    Args:
      bad_streak: steps up to the last one without a break in which some gradient was not finite.
      bad: paths of the layers that had them, and the dtypes that these compute in.
      zero_streak: steps up to the last one without a break in which all gradients were 0.
      is_float16: whether some layer computes in float16.
      loss_scale: at the last step; None without loss scaling.
      cause: what was found out about the forward pass, a sentence, if that was looked at.
    """
    dtypes = {dtype for _, dtype in bad}
    what = f"The gradients of {_named(bad)} ({' and '.join(sorted(dtypes))}) were not finite"
    if loss_scale is not None and bad_streak >= MAX_OVERFLOWS:
        return (
            f"{what} in the last {bad_streak} steps, and the loss scale fell to {loss_scale:.3g}. "
            f"{cause or ALL_FINITE}"
        )
    if loss_scale is not None and cause is not None and not zero_streak:
        return (
            f"Gradients overflow again and again: the loss scale fell to {loss_scale:.3g}. {cause}"
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


def _warn_without_scaling(model: Layer, counts: Counts) -> None:
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
