"""Training states that were saved with another precision than they are loaded with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras

from tfopt.errors import InputError
from tfopt.train.layers import Layer, is_model_of
from tfopt.train.loss_scaling import is_scaled, with_scaling


class BackupAndRestore(keras.callbacks.BackupAndRestore):
    """`keras.callbacks.BackupAndRestore` that goes on in another precision, too.

    Keras's own keeps weights, optimizer and loss scale as long as the policy stays the same. After
    a change between float32 or bfloat16 and float16, whose optimizers are wrapped for loss scaling,
    it leaves out the state of the optimizer with a warning, and training goes on with its moments
    at 0. This one loads it, and keeps the loss scale where there is one on both sides.

    For Keras 3 models; `tf_keras.callbacks.BackupAndRestore` does so by itself. Arguments are those
    of Keras.

    Raises:
      InputError: when training begins, for a model that is not of Keras 3.
    """

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Loads the last backup, if there is one."""
        if not is_model_of(self.model, "keras"):
            raise InputError(
                f"{type(self.model).__name__} is no Keras 3 model; use "
                "tf_keras.callbacks.BackupAndRestore, which goes on in another precision by itself."
            )
        path = Path(str(self.backup_dir)) / "latest.weights.h5"
        with _optimizer_as_saved(self.model, path):
            super().on_train_begin(logs)


@contextlib.contextmanager
def _optimizer_as_saved(model: Layer, weights: Path) -> Iterator[None]:
    """Inside, the model's optimizer is wrapped for loss scaling if the file's is."""
    optimizer = model.optimizer
    if optimizer is None or not weights.is_file() or _has_scaled(weights) is is_scaled(optimizer):
        yield
        return
    if not optimizer.built:
        optimizer.build(model.trainable_variables)
    inside = with_scaling(keras, optimizer, not is_scaled(optimizer))
    if not inside.built:
        inside.build(model.trainable_variables)
    model.optimizer = inside
    try:
        yield
    finally:
        model.optimizer = optimizer


def _has_scaled(weights: Path) -> bool:
    import h5py

    with h5py.File(weights) as file:
        return "optimizer/inner_optimizer" in file
