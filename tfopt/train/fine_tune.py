"""Training or fine-tuning a model file, in float32 or half precision, interrupted and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import dataset as datasets
from tfopt import source as sources
from tfopt.errors import InputError, ResultError
from tfopt.graph import first_line
from tfopt.keras_callback import KerasCallback
from tfopt.output_folder import Contents
from tfopt.progress import Progress
from tfopt.signature import Signature, TensorSpec
from tfopt.train.backup import BackupAndRestore
from tfopt.train.layers import Layer, Pattern, framework_of, output_layers
from tfopt.train.precision import check_policy, set_precision
from tfopt.train.profile import PrecisionProfile, profile_precision
from tfopt.train.watch import PrecisionWatch

BATCH_SIZE = 32

CONTENTS = Contents(
    "backup", "model.keras", "history.csv", "precision.csv", "train.json",
    state="train.json", marks=("train.json",),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Training:
    """What `fine_tune` did.

    Attributes:
      folder: holds `model.keras`, `history.csv` and, if layers were chosen, `precision.csv`.
      model: as trained.
      history: of losses and metrics by name, one value an epoch.
      profile: what layers were chosen by, or None.
    """

    folder: Path
    model: Layer
    history: dict[str, list[float]]
    profile: PrecisionProfile | None = None

    @property
    def summary(self) -> str:
        """The figures of the last epoch."""
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self.history.items())
        return f"{self.folder / 'model.keras'}: {last}."


def fine_tune(
    model: str | Path,
    data: Any,
    output_dir: str | Path,
    *,
    precision: str = "float32",
    keep_float32: Sequence[Pattern] = (),
    max_error: float | None = None,
    epochs: int = 1,
    batch_size: int = BATCH_SIZE,
    learning_rate: float | None = None,
    jit_compile: bool = False,
    seed: int = 0,
    custom_objects: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Training:
    """Trains a model from a file, or trains it further.

    A model that was compiled keeps its loss, metrics and optimizer, with the state that this has.
    Another gets Adam and, by its labels, sparse categorical cross-entropy and accuracy (whole
    numbers) or the mean square error. Gradients are watched (`PrecisionWatch`), and the model is
    backed up after each epoch.

    With several GPUs it trains on all of them (MirroredStrategy; `batch_size` is that of all
    together). Several workers (`TF_CONFIG`) work with models of tf_keras: `fit` of Keras 3 fails
    under MultiWorkerMirroredStrategy.

    Args:
      model: a .keras or .h5 file of Keras 3 or tf_keras.
      data: an .npz file or a dictionary of arrays as `tfopt.optimize` takes them: `…_train` is
        trained on and `…_test` gives the figures of validation; or `package.module:function` that
        returns what `fit` takes, or a pair of that for training and validation.
      output_dir: a new folder.
      precision: `float32`, `mixed_bfloat16` or `mixed_float16`.
      keep_float32: as `set_precision` takes it.
      max_error: choose layers by `profile_precision` so that the outputs are off by no more.
      epochs: that the model is to have been trained for at the end, those before an interruption
        included.
      batch_size: examples in a step.
      learning_rate: instead of the one that the model was compiled with.
      jit_compile: compile the training step with XLA.
      seed: of the order of examples, dropout and the like.
      custom_objects: `package.module` with layers and functions that the file needs.
      resume: go on with what an interrupted run left in the output folder, in another precision if
        that is asked for.
      overwrite: delete what an earlier run left there.
      quiet: print no progress.

    Raises:
      InputError: for a wrong model, data, option or output folder.
      ResultError: when training cannot work, with the reason; the last backup stays.
    """
    check_policy(precision)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected 1 or more.")
    path = sources.check_path(model)
    if path.suffix not in (".keras", ".h5"):
        raise InputError(f"{path} cannot be trained; expected a .keras or .h5 file.")
    folder = CONTENTS.claim(_own_folder(Path(output_dir)), resume, overwrite)
    _check_same(folder / "train.json", {"model": sources.hash_files(path), "seed": seed}, resume)
    progress = Progress(quiet)
    strategy = _strategy(path)
    load = functools.partial(
        sources.load_keras_file, path, custom_objects, frameworks=_frameworks()
    )
    loaded, profile = load(), None
    keras = framework_of(loaded)
    train, validation = _training_data(data, loaded, batch_size)
    _compile(loaded, train, learning_rate, jit_compile)
    if max_error is not None and precision != "float32":
        profile = profile_precision(
            loaded,
            train,
            precision,
            max_error=max_error,
            keep_float32=keep_float32,
            batch_size=batch_size,
            quiet=quiet,
        )
        progress.say(str(profile))
        profile.table.to_csv(folder / "precision.csv", index=False)
        precision, keep_float32 = profile.policy, profile.keep_float32
    keras.utils.set_random_seed(seed)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        if strategy is not None:  # variables have to be made in its scope
            loaded = load()
            _compile(loaded, train, learning_rate, jit_compile)
        network = set_precision(loaded, precision, keep_float32)
    watch, record = PrecisionWatch(), _Record(folder / "history.csv", epochs, progress)
    callbacks = [_backup(keras, folder / "backup"), watch, record]
    inputs: dict[str, Any] = {"x": train}
    if isinstance(train, tuple):
        inputs = {"x": train[0], "y": train[1], "batch_size": batch_size}
    try:
        network.fit(
            **inputs, epochs=epochs, validation_data=validation, callbacks=callbacks, verbose=0
        )
    except KeyboardInterrupt:
        progress.say(f"Interrupted; finished epochs are in {folder}, go on with --resume.")
        raise
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path} cannot be trained on these data: {first_line(error)}; expected labels that "
            "fit its outputs and its loss."
        ) from error
    finally:
        progress.close()
    if watch.problem is not None:
        raise ResultError(f"Training was stopped. {watch.problem}")
    network.save(folder / "model.keras")
    return Training(folder, network, record.history(), profile)


class _Record(KerasCallback):
    """Writes the figures of each epoch to a file, also across interruptions, and says them."""

    def __init__(self, file: Path, epochs: int, progress: Progress):
        super().__init__()
        self._file, self._epochs, self._progress = file, epochs, progress
        self._is_first = True

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._is_first:
            if epoch:
                self._progress.say(f"Going on after epoch {epoch}.")
            self._progress.start(self._epochs - epoch)
            self._is_first = False
        self._progress.doing(f"epoch {epoch + 1}")

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        import pandas as pd

        figures = {name: float(value) for name, value in (logs or {}).items()}
        before = self._table().query("epoch <= @epoch")
        row = pd.DataFrame([{"epoch": epoch + 1, **figures}])
        table = row if before.empty else pd.concat([before, row])
        table.to_csv(self._file, index=False)
        told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self._progress.finish(f"epoch {epoch + 1}: {told}")

    def history(self) -> dict[str, list[float]]:
        """All epochs, those before an interruption included."""
        table = self._table()
        return {name: table[name].tolist() for name in table if name != "epoch"}

    def _table(self) -> Any:
        import pandas as pd

        return pd.read_csv(self._file) if self._file.is_file() else pd.DataFrame({"epoch": []})


def _backup(keras: Any, folder: Path) -> Any:
    if keras.__name__ == "keras":
        return BackupAndRestore(str(folder), delete_checkpoint=False)
    return keras.callbacks.BackupAndRestore(str(folder), delete_checkpoint=False)


def _compile(model: Layer, train: Any, learning_rate: float | None, jit_compile: bool) -> None:
    """Compiles as the model was, or by the labels."""
    keras = framework_of(model)
    if getattr(model, "compiled", getattr(model, "_is_compiled", False)):
        options = dict(model._compile_config.config)
        options["optimizer"] = model.optimizer
    else:
        options = {"optimizer": keras.optimizers.Adam(), **_loss(model, _some_labels(train))}
    model.compile(**{**options, "jit_compile": jit_compile})
    if learning_rate is not None:
        model.optimizer.learning_rate = learning_rate


def _loss(model: Layer, labels: np.ndarray) -> dict[str, Any]:
    """The loss and metrics that fit the labels and the last activation."""
    losses = framework_of(model).losses
    if labels.dtype.kind not in "iub":
        return {"loss": losses.MeanSquaredError()}
    heads = output_layers(model)
    last = heads[0] if heads else None
    activation = getattr(getattr(last, "activation", None), "__name__", type(last).__name__).lower()
    if model.output_shape[-1] == 1:
        loss = losses.BinaryCrossentropy(from_logits=activation != "sigmoid")
        return {"loss": loss}
    loss = losses.SparseCategoricalCrossentropy(from_logits=activation != "softmax")
    return {"loss": loss, "metrics": ["accuracy"]}


def _some_labels(train: Any) -> np.ndarray:
    """Labels of a batch at least."""
    batch = train if isinstance(train, tuple) else next(iter(train))
    if not isinstance(batch, tuple) or len(batch) < 2:
        raise InputError("The data yield no labels; yield (x, y).")
    return np.asarray(batch[1])


def _training_data(data: Any, model: Layer, batch_size: int) -> tuple[Any, Any]:
    """What `fit` trains on and validates with: arrays `(x, y)`, or batches."""
    if isinstance(data, (str, Path)):
        data = datasets.open_text(str(data))
    if isinstance(data, tuple) and len(data) == 2 and all(map(_is_batched, data)):
        return data
    if _is_batched(data):
        return data, None
    signature = Signature("fit", _specs(model), ())
    parts = [_columns(part, signature) for part in datasets.in_memory(data, signature)]
    return parts[0], parts[1]


def _is_batched(data: Any) -> bool:
    """Whether something is a data set, of TensorFlow or Keras, that yields batches."""
    names = {found.__name__ for found in type(data).__mro__}
    return bool(names & {"DatasetV2", "PyDataset", "Sequence"})


def _columns(chunk: Mapping[str, np.ndarray] | None, signature: Signature) -> Any:
    if chunk is None:
        return None
    inputs = {name: array for name, array in chunk.items() if name != datasets.LABELS}
    if datasets.LABELS not in chunk:
        raise InputError("The data have no labels; name them y, or y_train and y_test.")
    x = inputs if len(inputs) > 1 else next(iter(inputs.values()))
    return x, chunk[datasets.LABELS]


def _specs(model: Layer) -> tuple[TensorSpec, ...]:
    names = getattr(model, "input_names", None) or [tensor.name for tensor in model.inputs or ()]
    specs = [
        TensorSpec(name, tuple(tensor.shape), np.dtype(_dtype(tensor)).name)
        for name, tensor in zip(names, model.inputs or (), strict=True)
    ]
    return tuple(specs) or (TensorSpec("x", None, "float32"),)


def _dtype(tensor: Any) -> Any:
    return getattr(tensor.dtype, "as_numpy_dtype", tensor.dtype)


def _own_folder(output_dir: Path) -> Path:
    """The output folder of this worker: the first one's is as asked for."""
    task = json.loads(os.environ.get("TF_CONFIG") or "{}").get("task", {})
    is_first = task.get("type") == "chief" or not task.get("index")
    if is_first:
        return output_dir
    return output_dir.with_name(f"{output_dir.name}-worker-{task['index']}")


def _workers() -> list[str]:
    """Addresses of all workers, as `TF_CONFIG` names them."""
    cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
    return [*cluster.get("chief", ()), *cluster.get("worker", ())]


def _frameworks() -> tuple[str, ...]:
    return ("tf_keras",) if len(_workers()) > 1 else ("keras", "tf_keras")


def _strategy(path: Path) -> Any:
    """How to use several workers or GPUs; None where there is one."""
    import tensorflow as tf

    if len(_workers()) > 1:
        if _is_keras_3_file(path):
            raise InputError(
                f"TF_CONFIG names {len(_workers())} workers, and {path} is a Keras 3 model, whose "
                "fit fails under MultiWorkerMirroredStrategy; use a model of tf_keras, or several "
                "GPUs of one machine without TF_CONFIG."
            )
        return tf.distribute.MultiWorkerMirroredStrategy()
    return (
        tf.distribute.MirroredStrategy()
        if len(tf.config.list_physical_devices("GPU")) > 1
        else None
    )


def _is_keras_3_file(path: Path) -> bool:
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            version = json.loads(archive.read("metadata.json")).get("keras_version", "")
    else:
        import h5py

        with h5py.File(path) as file:
            version = file.attrs.get("keras_version", "")
    return str(version).startswith("3")


def _check_same(file: Path, identity: Mapping[str, Any], resume: bool) -> None:
    """Writes down what is trained, or checks that it is the same as before."""
    if not resume:
        file.write_text(json.dumps(identity, indent=2) + "\n")
        return
    before = json.loads(file.read_text())
    for name, value in identity.items():
        if before.get(name) != value:
            raise InputError(
                f"The {name} is not that of the run to resume in {file.parent}; give the same, or "
                "another --output_dir."
            )
