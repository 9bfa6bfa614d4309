"""Training or fine-tuning a model file, in float32 or half precision, interrupted and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import source as sources
from tfopt.errors import InputError, ResultError
from tfopt.graph import first_line
from tfopt.keras_callback import KerasCallback
from tfopt.output_folder import Contents
from tfopt.progress import Progress
from tfopt.train import training_data
from tfopt.train.backup import BackupAndRestore
from tfopt.train.compiling import compile_options, is_compiled, overrider
from tfopt.train.layers import Layer, Pattern, framework_of
from tfopt.train.precision import check_policy, set_precision
from tfopt.train.profile import PrecisionProfile, profile_precision
from tfopt.train.training_data import TrainingData
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
    jit_compile: bool | None = None,
    seed: int = 0,
    custom_objects: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Training:
    """Trains a model from a file, or trains it further.

    A model that was compiled keeps its loss, metrics and optimizer, with the state that this has.
    Another gets Adam and a loss by its labels, which is said; see `tfopt.train.training_data`.
    Gradients are watched (`PrecisionWatch`), and the model is backed up after each epoch that
    leaves its weights finite.

    With several GPUs it trains on all of them (MirroredStrategy; `batch_size` is that of all
    together). Several workers (`TF_CONFIG`) work with models of tf_keras: `fit` of Keras 3 fails
    under MultiWorkerMirroredStrategy.

    Args:
      model: a .keras or .h5 file of Keras 3 or tf_keras.
      data: an .npz file or a dictionary of arrays as `tfopt.optimize` takes them: `…_train` is
        trained on and `…_test` gives the figures of validation; arrays `(x, y)` or
        `(x, y, sample_weight)`; a `tf.data.Dataset` or `PyDataset` of batches, or a pair of them
        for training and validation; or `package.module:function` that returns any of these.
        Generators are read to their end first.
      output_dir: a new folder.
      precision: `float32`, `mixed_bfloat16` or `mixed_float16`.
      keep_float32: as `set_precision` takes it.
      max_error: choose layers by `profile_precision` so that the outputs are off by no more.
      epochs: that the model is to have been trained for at the end, those before an interruption
        included.
      batch_size: examples in a step.
      learning_rate: instead of the one that the model was compiled with, or that an interrupted run
        had.
      jit_compile: compile the training step with XLA; None does so if the model was compiled with
        `jit_compile=True`.
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
    if max_error is not None and precision == "float32":
        raise InputError(
            "max_error chooses layers for half precision, and the precision is float32; give "
            "precision mixed_bfloat16 or mixed_float16, or leave max_error out."
        )
    path = sources.check_path(model)
    if path.suffix not in (".keras", ".h5"):
        raise InputError(f"{path} cannot be trained; expected a .keras or .h5 file.")
    folder = CONTENTS.check(_own_folder(Path(output_dir)), resume, overwrite)
    for file in (path, *([Path(data)] if isinstance(data, (str, Path)) else [])):
        lost = any(
            file.resolve().is_relative_to(folder.resolve() / name) for name in CONTENTS.names
        )
        if overwrite and lost and file.exists():
            raise InputError(
                f"{file} is part of what --overwrite would delete; name another --output_dir."
            )
    identity = {"model": sources.hash_files(path), "seed": seed}
    if resume:
        _check_same(folder / "train.json", identity)
    progress = Progress(quiet)
    strategy = _strategy(path)
    load = functools.partial(
        sources.load_keras_file, path, custom_objects, frameworks=_frameworks()
    )
    loaded, profile = load(), None
    keras = framework_of(loaded)
    found = training_data.read(data, loaded)
    for text in _compile(loaded, found, learning_rate, jit_compile):
        progress.say(text)
    if max_error is not None:
        profile = profile_precision(
            loaded,
            found.train["x"],
            precision,
            max_error=max_error,
            keep_float32=keep_float32,
            batch_size=batch_size,
            quiet=quiet,
        )
        progress.say(str(profile))
        precision, keep_float32 = profile.policy, profile.keep_float32
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        if strategy is not None:  # variables have to be made in its scope
            loaded = load()
            _compile(loaded, found, learning_rate, jit_compile)
        network = set_precision(loaded, precision, keep_float32)
    if not is_compiled(network):
        raise InputError(
            f"{path} was compiled with parts that cannot be copied; give them get_config, or call "
            "fit of what tfopt.set_precision returns yourself."
        )
    with _told(path):
        _try_out(network, found)
    CONTENTS.claim(folder, resume, overwrite)
    if not resume:
        (folder / "train.json").write_text(json.dumps(identity, indent=2) + "\n")
    if profile is not None:
        profile.table.to_csv(folder / "precision.csv", index=False)
    record = _Record(folder / "history.csv", epochs, progress)
    watch, backup = PrecisionWatch(), _backup(keras, folder / "backup")
    rate = [] if learning_rate is None else [_Rate(learning_rate)]
    # What came before is not to come again: each resumed run has an order of its own.
    keras.utils.set_random_seed(seed + record.num_epochs())
    try:
        with _told(path):
            network.fit(
                **found.train,
                **({} if found.is_batched else {"batch_size": batch_size}),
                epochs=epochs,
                validation_data=found.validation,
                callbacks=[watch, backup, *rate, record],
                verbose=0,
            )
    except KeyboardInterrupt:
        progress.say(f"Interrupted; finished epochs are in {folder}, go on with --resume.")
        raise
    except Exception:
        if not resume and not record.num_epochs():
            CONTENTS.empty(folder)  # so that the next try need not overwrite
        raise
    finally:
        progress.close()
    if watch.problem is not None or backup.is_spoiled:
        problem = watch.problem or "The weights are not finite any more: lower the learning rate."
        raise ResultError(f"Training was stopped. {problem}")
    network.save(folder / "model.keras")
    return Training(folder, network, record.history(), profile)


def _try_out(network: Layer, data: TrainingData) -> None:
    """One batch forward, with its loss; raises whatever that raises."""
    if overrider(network, "train_step") is not None:
        return  # which may take what test_step does not
    if data.is_batched:
        batch = next(iter(data.train["x"]))
        network.test_on_batch(*batch[:3])
        return
    import tensorflow as tf

    few = tf.nest.map_structure(lambda array: array[:2], dict(data.train))
    network.test_on_batch(few["x"], few["y"], few.get("sample_weight"))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Makes errors of Keras and TensorFlow that data can be blamed for a sentence."""
    import tensorflow as tf

    try:
        yield
    except (TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        raise InputError(f"{path} cannot be trained on these data: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The line that tells; errors inside a graph come with its whole story."""
    before, found, _ = str(error).partition("[[{{node")
    lines = [line.strip() for line in before.splitlines() if line.strip()]
    return lines[-1] if found and lines else first_line(error)


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

    def num_epochs(self) -> int:
        """That are finished."""
        return len(self._table())

    def history(self) -> dict[str, list[float]]:
        """All epochs, those before an interruption included."""
        table = self._table()
        return {name: table[name].tolist() for name in table if name != "epoch"}

    def _table(self) -> Any:
        import pandas as pd

        return pd.read_csv(self._file) if self._file.is_file() else pd.DataFrame({"epoch": []})


class _Rate(KerasCallback):
    """Sets the learning rate, also after a backup was restored, which brings its own."""

    def __init__(self, learning_rate: float):
        super().__init__()
        self._learning_rate = learning_rate

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        self.model.optimizer.learning_rate = self._learning_rate


def _backup(keras: Any, folder: Path) -> Any:
    """The framework's callback that backs up and restores, for finite weights only."""
    is_keras_3 = keras.__name__ == "keras"
    base: Any = BackupAndRestore if is_keras_3 else keras.callbacks.BackupAndRestore

    class Backup(base):
        is_spoiled = False

        def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
            weights = [value for value in self.model.get_weights() if value.dtype.kind == "f"]
            self.is_spoiled = not all(np.isfinite(value).all() for value in weights)
            if self.is_spoiled:
                self.model.stop_training = True
            else:
                super().on_epoch_end(epoch, logs)

    return Backup(str(folder), delete_checkpoint=False)


def _compile(
    model: Layer, data: TrainingData, learning_rate: float | None, jit_compile: bool | None
) -> list[str]:
    """Compiles as the model was, or by the labels; returns what a user should know of it."""
    keras, told = framework_of(model), []
    if (owner := overrider(model, "compile")) is not None:
        raise InputError(
            f"{owner} has a compile of its own, which cannot be called here; build the model "
            "inside tfopt.precision(…) and call fit yourself."
        )
    if is_compiled(model):
        options = compile_options(model)
        options["optimizer"] = model.optimizer
    else:
        options = {"optimizer": keras.optimizers.Adam(), **training_data.choose_loss(model, data)}
        told.append(
            f"The model was not compiled: it is trained with Adam on {options['loss'].name}."
        )
    if jit_compile is None:
        jit_compile = options.get("jit_compile") is True
    model.compile(**{**options, "jit_compile": jit_compile})
    training_data.check_labels(model, data)
    if learning_rate is not None:
        inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        schedule = getattr(inner, "_learning_rate", None)
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            raise InputError(
                f"The model was compiled with a schedule ({type(schedule).__name__}), which a "
                "learning rate cannot replace; leave it out, or compile the model anew."
            )
    return told


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


def _check_same(file: Path, identity: Mapping[str, Any]) -> None:
    """Checks that what is to be resumed is what was begun."""
    before = json.loads(file.read_text())
    for name, value in identity.items():
        if before.get(name) != value:
            raise InputError(
                f"The {name} is not that of the run to resume in {file.parent}; give the same, or "
                "another --output_dir."
            )
