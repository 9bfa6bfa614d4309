"""Training on several workers (`TF_CONFIG`) or several GPUs of one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tfopt.errors import InputError
from tfopt.train.layers import Layer, is_model_of


def strategy() -> Any:
    """How to use several workers or GPUs; None where there is one.

    Raises:
      InputError: when `TF_CONFIG` cannot be read, or came too late.
    """
    import tensorflow as tf

    if len(addresses()) > 1:
        try:
            return tf.distribute.MultiWorkerMirroredStrategy()
        except RuntimeError as error:  # TensorFlow's devices were used before
            raise InputError(
                f"TF_CONFIG names {len(addresses())} workers, which TensorFlow can only join "
                "before anything else is computed; train in a process of its own."
            ) from error
    num_gpus = len(tf.config.list_physical_devices("GPU"))
    return tf.distribute.MirroredStrategy() if num_gpus > 1 else None


def addresses() -> list[str]:
    """Of all workers, as `TF_CONFIG` names them; of one process alone it names none."""
    cluster = _config().get("cluster", {})
    return [*cluster.get("chief", ()), *cluster.get("worker", ())]


def own_folder(output_dir: Path) -> Path:
    """The output folder of this worker: the first one's is as asked for."""
    if is_first():
        return output_dir
    return output_dir.with_name(f"{output_dir.name}-worker-{_config()['task']['index']}")


def is_first() -> bool:
    """Whether this is the first worker, or the only process."""
    task = _config().get("task", {})
    return task.get("type") == "chief" or not task.get("index")


def _config() -> dict[str, Any]:
    text = os.environ.get("TF_CONFIG") or "{}"
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise InputError(
            f"TF_CONFIG is {text!r}, which is no JSON; expected "
            '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}}.'
        ) from error


def is_of_several(model: Layer) -> bool:
    """Whether a model was made in the scope of MultiWorkerMirroredStrategy, with other workers."""
    import tensorflow as tf

    found = model.distribute_strategy
    return (
        isinstance(found, tf.distribute.MultiWorkerMirroredStrategy)
        and len(found.extended.worker_devices) < found.num_replicas_in_sync
    )


def gather(model: Layer, number: int) -> list[int]:
    """What each worker has of a number; of one process alone its own."""
    import tensorflow as tf

    if not is_of_several(model):
        return [number]
    found = model.distribute_strategy.gather(tf.constant([number]), axis=0)
    return [int(each) for each in found.numpy()]


def mend(model: Layer) -> Layer:
    """Makes `fit`, `evaluate` and the like of a Keras 3 model work on several workers.

    Keras 3.15 fails on them for two reasons, both in `keras/src/backend/tensorflow/trainer.py`:

    - `_maybe_symbolic_build` hands the first batch, a structure of distributed values, to
      `strategy.reduce`, which takes a single one. Here it gets what this worker has of the batch.
    - `reduce_per_replica` takes the mean of a step's logs over their first axis, which losses and
      metrics do not have. Here `train_step` and `test_step` of the model, Keras's or its own, are
      given one.

    Keras 3 also leaves each replica its own statistics of batch normalisation. Here all workers
    have their mean after each step, as tf_keras has it, so that they end with the same model.

    The methods are put on this one model, and nothing of them is saved. Models of tf_keras, of one
    worker and of other strategies are left as they are. So are the logs where Keras takes their
    mean without help, which is tried out, and the first batch is right for a Keras that is mended.

    Figures of training and validation are those of all workers together. As everywhere in Keras,
    the loss of a step is the mean over the workers' parts of the batch, whose examples weigh more
    in a smaller part. Loops of several steps (`steps_per_execution`) fail, too, and are left out.

    Args:
      model: after `compile` and before `fit`; all workers have to call this.

    Returns:
      The model itself.

    Raises:
      InputError: for a step on processors that is to be compiled with XLA, which cannot exchange
        gradients there; with tf_keras, too.
    """
    if not is_of_several(model):
        return model
    _check_jit_compile(model)
    if not is_model_of(model, "keras"):
        return model
    model.steps_per_execution = 1
    model._maybe_symbolic_build = _of_local_batch(model)
    train_step = _with_shared_statistics(model)
    test_step = type(model).test_step.__get__(model)
    if _fails_on_scalars(model):
        train_step, test_step = _with_axis(train_step), _with_axis(test_step)
    model.train_step, model.test_step = train_step, test_step
    model.train_function = model.test_function = None  # traced with the former ones
    return model


def _check_jit_compile(model: Layer) -> None:
    import tensorflow as tf

    is_asked_for = getattr(model, "jit_compile", None)
    if is_asked_for and not tf.config.list_physical_devices("GPU"):
        raise InputError(
            "XLA cannot compile the steps of several workers without GPUs; train with "
            "`jit_compile=False`."
        )


def _of_local_batch(model: Layer) -> Callable[..., None]:
    build = type(model)._maybe_symbolic_build.__get__(model)

    def of_local_batch(iterator: Any = None, data_batch: Any = None) -> None:
        import keras

        for _, _, batches in iterator or ():
            data_batch = keras.tree.map_structure(
                lambda value: model.distribute_strategy.experimental_local_results(value)[0],
                next(batches),
            )
            break
        build(data_batch=data_batch)

    return of_local_batch


def _with_shared_statistics(model: Layer) -> Callable[[Any], Any]:
    """A training step that adds the mean over all replicas of what it added to statistics."""
    step = type(model).train_step.__get__(model)

    def with_shared_statistics(data: Any) -> Any:
        import tensorflow as tf

        found = [
            variable
            for layer in model._flatten_layers()
            for variable in layer._non_trainable_variables  # without weights that are frozen
            if tf.as_dtype(variable.dtype).is_floating
        ]
        before = [tf.identity(variable.value) for variable in found]
        logs = step(data)
        if found:
            added = [variable.value - old for variable, old in zip(found, before, strict=True)]
            replicas = tf.distribute.get_replica_context()
            means = replicas.all_reduce(tf.distribute.ReduceOp.MEAN, added)
            for variable, old, mean in zip(found, before, means, strict=True):
                variable.assign(old + mean)
        return logs

    return with_shared_statistics


def _with_axis(step: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def with_axis(data: Any) -> Any:
        import keras
        import tensorflow as tf

        return keras.tree.map_structure(lambda value: tf.expand_dims(value, 0), step(data))

    return with_axis


def _fails_on_scalars(model: Layer) -> bool:
    """Whether Keras fails to take the mean of a step's logs over all workers."""
    import tensorflow as tf

    step = model._make_function(lambda batch: {"loss": tf.constant(0.0)})
    try:
        step(iter([()]))
    except ValueError:
        return True
    return False
