"""Students that a search distils from the model, to try them like it."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import re
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfopt import live
from tfopt import source as sources
from tfopt.dataset import in_memory
from tfopt.errors import MAX_REASON, ConversionError, InputError, ResultError, first_line
from tfopt.examples import is_input_column, is_label_column, output_of
from tfopt.keras_files import load_keras_file
from tfopt.npz import NpzFile
from tfopt.progress import Progress, duration
from tfopt.source import Source

FILE = "student.keras"
POLL_S = 1.0


@dataclasses.dataclass(frozen=True)
class Training:
    """How a student is made and taught; see `tfopt.distill`."""

    student: str
    epochs: int
    alpha: float
    temperature: float
    batch_size: int
    seed: int
    custom_objects: str | None
    trust_model: bool


def name_of(text: str) -> str:
    """A short name of a student, as in `int8(student=width0.5)@litert`.

    `teacher(depth=0.5,width=0.5)` is `depth0.5-width0.5`, `MobileNetV2(alpha=0.5)` is
    `MobileNetV2-alpha0.5`, and files and functions are called by their last name.
    """
    name, _, options = text.partition("(")
    last = re.split(r"[/:]", name)[-1].removesuffix(".keras").removesuffix(".h5")
    parts = [] if last == "teacher" and options else [last]
    parts += sorted(part.replace("=", "") for part in options.rstrip(")").split(",") if part)
    return re.sub(r"[^A-Za-z0-9_.+-]+", "-", "-".join(part.strip() for part in parts)).strip("-")


def names(texts: Sequence[str]) -> list[str]:
    """Names of all students.

    Raises:
      InputError: when two have the same.
    """
    found = [name_of(text) for text in texts]
    for name, text in zip(found, texts, strict=True):
        if not name or found.count(name) > 1:
            raise InputError(
                f"Student {text!r} would be called {name!r} like another; give each student once, "
                "in files of different names."
            )
    return found


def origin(text: str, model: str, epochs: int) -> str:
    """What a student was distilled from, in a sentence."""
    return f"The student is {text}, distilled from {model} for {epochs} epochs."


def check_data(data: Any) -> Any:
    """Data that a worker can read, with examples that accuracy is not measured on.

    Raises:
      InputError: when there are none.
    """
    found: list[str] = []
    if isinstance(data, Mapping):
        found = [str(name) for name in data]
    elif isinstance(data, (str, Path)) and Path(data).is_file():
        data = Path(data).absolute()
        found = list(NpzFile(data).keys())
    is_pair = isinstance(data, (tuple, list)) and all(isinstance(part, tuple) for part in data)
    if not is_pair and not any(name.endswith("_train") for name in found):
        raise InputError(
            "A student needs examples that accuracy is not measured on, and the data have no "
            "training part; give an .npz file or a dictionary with arrays …_train and …_test, or "
            "((x, y), (x, y)) of training and evaluation."
        )
    return data


def teacher_file(model: Any, folder: Path) -> Path:
    """The model as a file that a worker reads; a live one is saved in the folder.

    Raises:
      InputError: when it cannot be a teacher.
    """
    if isinstance(model, Path):
        if model.suffix in (".tflite", ".onnx"):
            raise InputError(
                f"{model} cannot teach as it is; search from the Keras model or the SavedModel."
            )
        return model.absolute()
    if not hasattr(model, "save"):
        raise InputError(
            f"A {type(model).__name__} cannot teach; search from a Keras model or a SavedModel."
        )
    file = folder.absolute() / "teacher.keras"
    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        try:
            model.save(file)
        except Exception as error:  # classes of the user's raise whatever they raise
            raise InputError(
                f"Model {model.name!r} cannot be saved for training a student "
                f"({first_line(error)[:MAX_REASON]}); give its classes get_config, or search from "
                "its SavedModel."
            ) from error
    return file


def train(teacher: Path, source: Source, data: Any, folder: Path, options: Training) -> None:
    """Makes and teaches a student; an interrupted training goes on. Called in a worker.

    Args:
      teacher: the model, a Keras file or a SavedModel.
      source: what the search made of it.
      data: with a training part.
      folder: gets `student.keras` and what it takes to go on.
      options: of the training.

    Raises:
      ConversionError: when it cannot be made, or training cannot work.
    """
    from tfopt.distillation.distill import distill
    from tfopt.distillation.students import make_student
    from tfopt.distillation.teacher import Teacher

    train, validation, _ = in_memory(data, source.signature)
    try:
        model: Any = teacher
        if teacher.suffix.lower() in (".keras", ".h5"):
            model = load_keras_file(
                teacher, options.custom_objects, compile=False, trust_model=options.trust_model
            )
        taught_by = Teacher(model, signature=source.signature.key)
        inputs, outputs = source.signature.inputs, source.signature.outputs
        single = len(inputs) == len(outputs) == 1
        shape, classes = inputs[0].shape, outputs[0].shape
        import keras

        keras.utils.set_random_seed(options.seed)
        student = make_student(
            options.student,
            taught_by.keras_model,
            input_shape=shape[1:] if single and shape else None,
            num_classes=classes[-1] if single and classes else None,
            custom_objects=options.custom_objects,
            trust_model=options.trust_model,
        )
        file = folder / FILE
        distill(
            [taught_by],
            student,
            _as_arrays(train, validation),
            file,
            alpha=options.alpha,
            temperature=options.temperature,
            epochs=options.epochs,
            batch_size=options.batch_size,
            seed=options.seed,
            resume=(file.with_suffix("") / "train.json").is_file(),
            quiet=True,
        )
        shutil.rmtree(file.with_suffix("") / "cache", ignore_errors=True)
    except (InputError, ResultError) as error:
        raise ConversionError(str(error)) from error


def prepare(
    folder: Path,
    source: Source,
    name: str,
    origin: str,
    custom_objects: str | None,
    trust_model: bool = False,
) -> Source:
    """Freezes a student under the names of the model's inputs and outputs. Called in a worker.

    Raises:
      ConversionError: when it takes or returns another number of tensors.
    """
    import tensorflow as tf

    file = folder / FILE
    student = load_keras_file(file, custom_objects, compile=False, trust_model=trust_model)
    inputs, outputs = source.signature.inputs, source.signature.outputs
    given = list(getattr(student, "inputs", None) or inputs)
    if len(given) != len(inputs):
        raise ConversionError(
            f"Student {name} takes {len(given)} inputs and the model {len(inputs)}."
        )

    @tf.function(
        input_signature=[
            tf.TensorSpec(spec.shape, tf.as_dtype(spec.dtype), name=spec.name) for spec in inputs
        ]
    )
    def serve(*tensors: Any) -> dict[str, Any]:
        by_name = dict(zip((spec.name for spec in inputs), tensors, strict=True))
        structure = getattr(student, "input", None)
        argument: Any = tensors[0]
        if isinstance(structure, Mapping):
            argument = {key: by_name[key] for key in structure}
        elif len(tensors) > 1:
            argument = [by_name[tensor.name] for tensor in given]
        made = tf.nest.flatten(student(argument, training=False))
        return {spec.name: output for spec, output in zip(outputs, made, strict=True)}

    shutil.rmtree(folder / "export", ignore_errors=True)
    live.export(serve, folder / "export")
    found = sources.prepare(
        folder / "export", folder / "source", name=name, sha256=sources.hash_files(file)
    )
    return dataclasses.replace(found, origin=origin)


def _as_arrays(train: Mapping[str, Any], validation: Mapping[str, Any] | None) -> dict[str, Any]:
    """What `in_memory` read, as `distill` takes it."""
    found = {}
    for part, chunk in (("train", train), ("test", validation or {})):
        labels = {output_of(name): array for name, array in chunk.items() if is_label_column(name)}
        named = {name: array for name, array in chunk.items() if is_input_column(name)}
        for name, array in named.items():
            found[f"{'x' if len(named) == 1 else name}_{part}"] = array
        for output, array in labels.items():
            found[f"{output or 'y'}_{part}"] = array
    return found


@contextlib.contextmanager
def told(progress: Progress, folder: Path, epochs: int) -> Iterator[None]:
    """Tells how far a training in a worker is, while it runs."""
    history = (folder / FILE).with_suffix("") / "history.csv"
    is_over = threading.Event()

    def watch() -> None:
        num_before = num_told = _num_rows(history)
        waited = 0.0
        while not is_over.wait(POLL_S):
            waited += POLL_S
            num_done = _num_rows(history)
            if num_done > num_told and num_done < epochs:
                left = duration(waited / (num_done - num_before) * (epochs - num_done))
                progress.say(f"Epoch {num_done} of {epochs} (about {left} left)")
                num_told = num_done

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _num_rows(file: Path) -> int:
    if not file.is_file():
        return 0
    with file.open() as lines:
        return max(0, sum(1 for _ in csv.reader(lines)) - 1)
