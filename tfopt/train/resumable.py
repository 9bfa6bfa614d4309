"""`fit` of a Keras model with a record and a backup of each epoch, interrupted and resumed."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import InputError, ResultError, first_line
from tfopt.keras_callback import KerasCallback
from tfopt.output_folder import Contents
from tfopt.progress import Progress
from tfopt.train import several_workers
from tfopt.train.backup import BackupAndRestore
from tfopt.train.data_errors import told
from tfopt.train.layers import Layer, framework_of
from tfopt.train.watch import PrecisionWatch

STATE = "train.json"
FILES = ("backup", "history.csv", STATE)


class ResumableFit:
    """Training that writes into a folder of its own, and goes on from there.

    The folder gets `train.json` (what has to be the same at the next time), `backup` and
    `history.csv`, with a row of losses and metrics for each epoch. What was trained is not saved:
    that is up to the caller, who also makes the model in the scope of `several_workers.strategy()`
    and calls `several_workers.mend` on it.

    Making one checks the arguments and changes nothing, so that all else can be checked before
    `claim`.

    Args:
      contents: all that the caller writes, with `FILES` among it, and `STATE` as what it goes on
        from.
      output_dir: folder of the first worker; others get one beside it.
      identity: what has to be the same in a run that is resumed, by name; values of JSON.
      inputs: files and folders that are read, which `overwrite` must not delete.
      subject: of sentences, such as the file that is trained.
      resume: go on with what is there.
      overwrite: delete what is there.
      progress: where lines go to; closed by `fit`.

    Attributes:
      folder: of this worker, absolute.

    Raises:
      InputError: for a folder that cannot be had like this, or an identity that is another.
    """

    def __init__(
        self,
        contents: Contents,
        output_dir: str | Path,
        identity: Mapping[str, Any],
        *,
        inputs: Sequence[Path] = (),
        subject: str,
        resume: bool,
        overwrite: bool,
        progress: Progress,
    ):
        self._first_folder = Path(output_dir).absolute()
        folder = several_workers.own_folder(self._first_folder)
        self.folder = contents.check(folder, resume, overwrite)
        self._contents, self._identity = contents, identity
        self._resume, self._overwrite = resume, overwrite
        self._subject, self._progress = subject, progress
        if overwrite:
            self._check_kept(inputs)
        if resume:
            self._check_same()

    def claim(self) -> None:
        """Makes the folder, empties it if that was asked for, and writes the identity.

        Raises:
          InputError: when it cannot be written.
        """
        self._contents.claim(self.folder, self._resume, self._overwrite)
        if not self._resume:
            text = json.dumps(self._identity, indent=2)
            (self.folder / STATE).write_text(f"{text}\n")

    @contextlib.contextmanager
    def before_fit(self) -> Iterator[None]:
        """What is to be done once between `claim` and `fit`, and gone on with after an interrupt.

        A first try that fails leaves nothing, so that the next need not overwrite.
        """
        try:
            yield
        except KeyboardInterrupt:
            self._say_interrupted()
            self._progress.close()
            raise
        except Exception:
            self._progress.close()
            if not self._resume:
                self._contents.empty(self.folder)
            raise

    def fit(
        self,
        network: Layer,
        arguments: Mapping[str, Any],
        *,
        epochs: int,
        seed: int,
        learning_rate: float | None = None,
    ) -> dict[str, list[float]]:
        """Trains a model until it has seen so many epochs, with `PrecisionWatch`.

        An epoch that leaves weights that are not finite is not backed up and ends the training.

        Args:
          network: compiled and built model of Keras 3 or tf_keras.
          arguments: data and batch size as `fit` takes them.
          epochs: in all, those before an interruption included.
          seed: of the order of examples, dropout and the like.
          learning_rate: instead of the one that the optimizer or the backup has.

        Returns:
          Losses and metrics by name, one value an epoch, those before an interruption included.

        Raises:
          InputError: when the data do not fit the model.
          ResultError: when training cannot work or another worker ended, with the reason; the
            last backup stays.
        """
        import tensorflow as tf

        keras = framework_of(network)
        record = _Record(self.folder / "history.csv", epochs, self._progress)
        # Where there are several workers, those of tf_keras read what the first one wrote.
        place = self.folder if keras.__name__ == "keras" else self._first_folder
        watch, backup = PrecisionWatch(), _backup(keras, place / "backup")
        rate = [] if learning_rate is None else [_Rate(learning_rate)]
        # What came before is not to come again: each resumed run has an order of its own.
        keras.utils.set_random_seed(seed + record.num_epochs())
        try:
            with told(self._subject):
                network.fit(
                    **arguments,
                    epochs=epochs,
                    callbacks=[watch, backup, *rate, record],
                    verbose=0,
                )
        except KeyboardInterrupt:
            self._say_interrupted()
            raise
        except (tf.errors.UnavailableError, tf.errors.AbortedError) as error:
            raise ResultError(
                f"Another worker ended or cannot be reached ({first_line(error)}); finished epochs "
                f"are in {self.folder}, start all workers again with `resume=True`."
            ) from error
        except Exception:
            if not self._resume and not record.num_epochs():
                self._contents.empty(self.folder)  # so that the next try need not overwrite
            raise
        finally:
            self._progress.close()
        if watch.problem is not None or backup.is_spoiled:
            problem = (
                watch.problem or "The weights are not finite any more: lower the learning rate."
            )
            raise ResultError(f"Training was stopped. {problem}")
        return record.history()

    def _say_interrupted(self) -> None:
        self._progress.say(
            f"Interrupted; what is finished is in {self.folder}; run it again with resume to go on."
        )

    def _check_kept(self, inputs: Sequence[Path]) -> None:
        """Checks that what is read does not lie in what is to be deleted."""
        lost = [(self.folder / name).resolve() for name in self._contents.names]
        for file in inputs:
            if file.exists() and any(file.resolve().is_relative_to(path) for path in lost):
                raise InputError(
                    f"{file} is part of what `overwrite=True` would delete; name another "
                    "`output_dir`."
                )

    def _check_same(self) -> None:
        """Checks that what is to be resumed is what was begun."""
        before = json.loads((self.folder / STATE).read_text())
        for name, value in self._identity.items():
            if before.get(name) != value:
                raise InputError(
                    f"The {name} is not that of the run to resume in {self.folder}; give the same, "
                    "or another `output_dir`."
                )


class _Record(KerasCallback):
    """Writes the figures of each epoch to a file, also across interruptions, and says them."""

    def __init__(self, file: Path, epochs: int, progress: Progress):
        super().__init__()
        self._file, self._epochs, self._progress = file, epochs, progress
        self._is_first = True

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        if self._is_first:
            _check_same_backup(self.model, epoch)
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

        def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
            is_there = any(path.is_file() for path in folder.rglob("*"))
            _check_same_backup(self.model, int(is_there))
            super().on_train_begin(logs)

        def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
            weights = [value for value in self.model.get_weights() if value.dtype.kind == "f"]
            self.is_spoiled = not all(np.isfinite(value).all() for value in weights)
            if self.is_spoiled:
                self.model.stop_training = True
            else:
                super().on_epoch_end(epoch, logs)

    return Backup(str(folder), delete_checkpoint=False)


def _check_same_backup(model: Layer, number: int) -> None:
    """Checks that a number which tells of a backup is the same for all workers.

    It need not be after a kill between their backups, and each would go on with other weights.
    """
    found = several_workers.gather(model, number)
    if len(set(found)) > 1:
        raise InputError(
            f"The workers do not find the same backups ({', '.join(map(str, found))} epochs); put "
            "`output_dir` where all of them see it, or copy the folder backup of one to the others."
        )
