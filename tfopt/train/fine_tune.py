"""Training or fine-tuning a model file, in float32 or half precision, interrupted and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfopt import source as sources
from tfopt.errors import InputError
from tfopt.keras_files import load_keras_file
from tfopt.output_folder import Contents
from tfopt.progress import Progress
from tfopt.train import several_workers, training_data
from tfopt.train.compiling import compile_options, is_compiled, overrider
from tfopt.train.data_errors import told
from tfopt.train.layers import Layer, Pattern, framework_of
from tfopt.train.precision import check_policy, set_precision
from tfopt.train.profile import PrecisionProfile, profile_precision
from tfopt.train.resumable import FILES, STATE, ResumableFit
from tfopt.train.training_data import TrainingData

BATCH_SIZE = 32

CONTENTS = Contents(*FILES, "model.keras", "precision.csv", state=STATE, marks=(STATE,))


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
    trust_model: bool = False,
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
    together), and with several workers, which `TF_CONFIG` names, on all of these
    (MultiWorkerMirroredStrategy): each is started with the same arguments and ends with the same
    model, the first in `output_dir`, number 1 in `output_dir-worker-1` and so on.

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
      trust_model: whether Python code that is stored in the file, as of Lambda layers, may run.
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
    progress = Progress(quiet)
    run = ResumableFit(
        CONTENTS,
        output_dir,
        {"model": sources.hash_files(path), "seed": seed},
        inputs=(path, *([Path(data)] if isinstance(data, (str, Path)) else [])),
        subject=str(path),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    strategy = several_workers.strategy()
    load = functools.partial(load_keras_file, path, custom_objects, trust_model=trust_model)
    loaded, profile = load(), None
    found = training_data.read(data, loaded, progress=progress.counter("examples"))
    for note in found.notes:
        progress.say(f"Note: {note}")
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
    several_workers.mend(network)
    with told(str(path)):
        _try_out(network, found)
    run.claim()
    if profile is not None:
        profile.table.to_csv(run.folder / "precision.csv", index=False)
    history = run.fit(
        network,
        {
            **found.train,
            **({} if found.is_batched else {"batch_size": batch_size}),
            "validation_data": found.validation,
        },
        epochs=epochs,
        seed=seed,
        learning_rate=learning_rate,
    )
    network.save(run.folder / "model.keras")
    return Training(run.folder, network, history, profile)


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


def _compile(
    model: Layer, data: TrainingData, learning_rate: float | None, jit_compile: bool | None
) -> list[str]:
    """Compiles as the model was, or by the labels; returns what a user should know of it."""
    keras, notes = framework_of(model), []
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
        notes.append(
            f"The model was not compiled: it is trained with Adam on {options['loss'].name}."
        )
    if jit_compile is None:
        jit_compile = options.get("jit_compile") is True
    model.compile(**{**options, "jit_compile": jit_compile})
    training_data.check_labels(model, data, model.loss)
    if learning_rate is not None:
        inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        schedule = getattr(inner, "_learning_rate", None)
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            raise InputError(
                f"The model was compiled with a schedule ({type(schedule).__name__}), which a "
                "learning rate cannot replace; leave it out, or compile the model anew."
            )
    return notes
