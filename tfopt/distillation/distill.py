"""Distilling model files into a student file, interrupted and resumed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import source as sources
from tfopt.distillation.distiller import Distiller
from tfopt.distillation.first_batch import first_inputs
from tfopt.distillation.losses import (
    AttentionTransfer,
    DecoupledTargets,
    DistillationLoss,
    FeatureHint,
    RelationalTargets,
    SoftTargets,
    SquaredError,
)
from tfopt.distillation.objective import FeaturePair
from tfopt.distillation.students import KERAS_FILES, make_student
from tfopt.distillation.teacher import Teacher
from tfopt.distillation.views import Chain, CropAndFlip, Mixup, View
from tfopt.errors import InputError
from tfopt.keras_files import load_keras_file
from tfopt.output_folder import Contents
from tfopt.progress import Progress
from tfopt.train import several_workers, training_data
from tfopt.train.layers import Layer, Pattern, framework_of
from tfopt.train.precision import check_policy, set_precision
from tfopt.train.resumable import FILES, STATE, ResumableFit
from tfopt.train.training_data import TrainingData

LOSSES = {
    "soft_targets": SoftTargets,
    "decoupled": DecoupledTargets,
    "squared_error": SquaredError,
    "relational": RelationalTargets,
}
FEATURE_LOSSES = {
    "hint": FeatureHint,
    "attention": AttentionTransfer,
    "relational": RelationalTargets,
}
VIEWS = {"crop_and_flip": CropAndFlip, "mixup": Mixup}

CACHE = "cache"
CONTENTS = Contents(*FILES, CACHE, state=STATE, marks=(STATE,))


@dataclasses.dataclass(frozen=True)
class Distillation:
    """What `distill` did.

    Attributes:
      file: the student.
      folder: holds `history.csv`, the backup and what the teachers said.
      student: as trained, a plain Keras model.
      history: of losses and metrics by name, one value an epoch.
      notes: what was found out about the teachers, one sentence each.
    """

    file: Path
    folder: Path
    student: Layer
    history: dict[str, list[float]]
    notes: tuple[str, ...]

    @property
    def summary(self) -> str:
        """The figures of the last epoch."""
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self.history.items())
        return f"{self.file}: {last}."


def distill(
    teachers: Any,
    student: Any,
    data: Any,
    output: str | Path,
    *,
    alpha: float = 0.1,
    temperature: float | None = None,
    loss: str | DistillationLoss | None = None,
    features: Sequence[str | FeaturePair] = (),
    view: str | View | None = None,
    num_views: int | None = None,
    cache: bool = True,
    precision: str = "float32",
    keep_float32: Sequence[Pattern] = (),
    epochs: int = 10,
    batch_size: int = 32,
    learning_rate: float | None = None,
    jit_compile: bool = False,
    seed: int = 0,
    custom_objects: str | None = None,
    trust_model: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Distillation:
    """Trains a student on what teachers say, and on labels where there are some.

    It is `Distiller` with Adam and the loss that fits the labels, a backup after each epoch, and
    gradients watched. With several GPUs or workers (`TF_CONFIG`) it trains on all of them. Without
    a view what the teachers say is asked once and kept, so that an epoch costs the student only.

    Args:
      teachers: one or several models, paths or `Teacher`s; see `Teacher`. `.keras` and `.h5` files,
        SavedModels and artifacts.
      student: a file, `package.module:function`, `teacher(width=0.5,depth=0.5)`, a name of
        `keras.applications`, or a model; see `make_student`.
      data: as `fine_tune` takes them; labels may be missing, all of them or those that are -1.
      output: a new .keras file (or .h5, for a student of tf_keras). A folder of the same name
        without the ending holds what is needed to go on.
      alpha: share of the labels' loss, 0 to 1.
      temperature: of soft or decoupled targets, by default 4.
      loss: of outputs: `soft_targets`, `decoupled`, `squared_error`, `relational`, or a loss; by
        default soft targets for classes and the squared error for values.
      features: pairs of layers: `FeaturePair`s, or `student_layer:teacher_layer`, with `:hint`,
        `:attention` or `:relational` behind, and a weight behind that, as in
        `block2:block4:attention:100`. Of the first teacher.
      view: `crop_and_flip`, `mixup`, both with a comma, or a view.
      num_views: keep what teachers say about so many views, which come again in turn.
      cache: whether to keep what teachers say; with a view only if num_views is given.
      precision: of the student, `float32`, `mixed_bfloat16` or `mixed_float16`.
      keep_float32: as `set_precision` takes it.
      epochs: in all, those before an interruption included.
      batch_size: examples in a step.
      learning_rate: of Adam, by default 0.001.
      jit_compile: compile the training step with XLA.
      seed: of weights, order of examples, views and the like.
      custom_objects: `package.module` with layers and functions that files need.
      trust_model: whether Python code that is stored in Keras files may run.
      resume: go on with what an interrupted run left.
      overwrite: replace the output, and delete what an earlier run left.
      quiet: print no progress.

    Raises:
      InputError: when models, data and options do not fit each other, before training starts.
      ResultError: when training cannot work, with the reason; the last backup stays.
    """
    check_policy(precision)
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise InputError(f"{name} is {value}; expected 1 or more.")
    paths = [
        Path(each) for each in (*_as_list(teachers), student, data) if isinstance(each, (str, Path))
    ]
    file = _check_output(Path(output), paths, resume, overwrite)
    pairs, chosen_view = [_pair(each) for each in features], _view(view)
    _check_num_views(chosen_view, num_views, cache)
    outputs_loss, temperature = _loss(loss, temperature)
    progress = Progress(quiet)
    strategy = several_workers.strategy()
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        taught_by = _teachers(teachers, custom_objects, trust_model)
        model = _student(student, taught_by, custom_objects, trust_model, seed)
        if precision != "float32":
            model = set_precision(model, precision, keep_float32)
    identity = {
        "list of teachers": [teacher.sha256() for teacher in taught_by],
        "student": _identity(student, model),
        "seed": seed,
    }
    run = ResumableFit(
        CONTENTS,
        file.with_suffix(""),
        identity,
        inputs=paths,
        subject=f"Student {model.name!r}",
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )
    found = training_data.read(
        data, model, needs_labels=False, progress=progress.counter("examples")
    )
    for note in found.notes:
        progress.say(f"Note: {note}")
    examined = first_inputs(found.train["x"])[1]
    keras = framework_of(model)
    with contextlib.nullcontext() if strategy is None else strategy.scope():
        distiller: Any = Distiller(
            model,
            taught_by,
            alpha=alpha,
            temperature=temperature,
            losses=outputs_loss,
            features=pairs,
            view=chosen_view,
        )
        rate = 1e-3 if learning_rate is None else learning_rate
        options = _label_options(model, found)
        distiller.compile(keras.optimizers.Adam(rate), **options, jit_compile=jit_compile)
    several_workers.mend(distiller)
    distiller.examine(examined)
    for note in distiller.notes:
        progress.say(note)
    run.claim()
    arguments: dict[str, Any] = {**found.train, "validation_data": found.validation}
    if cache and (chosen_view is None or num_views is not None):
        options = {"batch_size": batch_size, "seed": seed, "num_views": num_views}
        with run.before_fit():
            kept = distiller.cached(_examples(found), run.folder / CACHE, **options)
            kept.fill(progress)
        arguments = {"x": kept, "validation_data": found.validation}
    elif not found.is_batched:
        arguments["batch_size"] = batch_size
    history = run.fit(distiller, arguments, epochs=epochs, seed=seed, learning_rate=learning_rate)
    if several_workers.is_first():
        distiller.save(file)
    return Distillation(file, run.folder, distiller.student, history, distiller.notes)


def _check_output(file: Path, paths: Sequence[Path], resume: bool, overwrite: bool) -> Path:
    if file.suffix not in (".keras", ".h5") or file.is_dir():
        raise InputError(f"The output is {file}; expected a .keras or .h5 file.")
    if any(path.resolve() == file.resolve() for path in paths):
        raise InputError(f"{file} is read, so it cannot be the output, too; name another `output`.")
    if file.exists() and not (resume or overwrite):
        raise InputError(
            f"{file} is there already; give `overwrite=True` to replace it, or another `output`."
        )
    return file


def _as_list(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (list, tuple)) else [values]


def _check_num_views(view: View | None, num_views: int | None, cache: bool) -> None:
    if num_views is None:
        return
    if view is None or not cache:
        missing = "no view" if view is None else "no cache"
        raise InputError(
            f"num_views is {num_views}, the number of views that are kept, and there is {missing}; "
            "give both, or leave num_views out."
        )
    if num_views < 1:
        raise InputError(f"num_views is {num_views}; expected 1 or more.")


def _teachers(teachers: Any, custom_objects: str | None, trust_model: bool) -> list[Teacher]:
    found = _as_list(teachers)
    if not found:
        raise InputError("There is no teacher; give one model, or several.")
    made = []
    for each in found:
        if isinstance(each, (str, Path)) and Path(each).suffix.lower() in KERAS_FILES:
            path = sources.check_path(each)
            each = load_keras_file(path, custom_objects, compile=False, trust_model=trust_model)
        made.append(each if isinstance(each, Teacher) else Teacher(each))
    return made


def _identity(student: Any, model: Layer) -> str:
    """What tells students apart: the hash of a file, a name, or the size of a live one."""
    if isinstance(student, (str, Path)):
        return sources.hash_files(Path(student)) if Path(student).exists() else str(student)
    return f"{model.count_params()} parameters"


def _examples(data: TrainingData) -> Any:
    """What `cached` takes."""
    if data.is_batched:
        return data.train["x"]
    return tuple(data.train.get(name) for name in ("x", "y", "sample_weight"))


def _student(
    spec: Any,
    teachers: Sequence[Teacher],
    custom_objects: str | None,
    trust_model: bool,
    seed: int,
) -> Any:
    known = [each.keras_model for each in teachers if each.keras_model is not None]
    framework = framework_of(known[0]) if known else None
    import keras

    (framework or keras).utils.set_random_seed(seed)
    return make_student(
        spec,
        known[0] if known else None,
        framework="keras" if framework is None else framework.__name__,
        custom_objects=custom_objects,
        trust_model=trust_model,
    )


def _loss(
    loss: str | DistillationLoss | None, temperature: float | None
) -> tuple[DistillationLoss | None, float | None]:
    """The loss of outputs, and the temperature if the default is to get it."""
    if loss is None or isinstance(loss, DistillationLoss):
        return loss, temperature
    if loss not in LOSSES:
        raise InputError(f"The loss is {loss!r}; expected one of {', '.join(LOSSES)}.")
    if loss == "soft_targets":
        return None, temperature  # for one class or several labels at once it is a sigmoid's
    if temperature is None:
        return LOSSES[loss](), None
    if loss != "decoupled":
        raise InputError(f"Loss {loss!r} has no temperature; leave it out, or use soft_targets.")
    return DecoupledTargets(temperature=temperature), None


def _pair(text: str | FeaturePair) -> FeaturePair:
    if isinstance(text, FeaturePair):
        return text
    parts = text.split(":")
    kind = parts[2] if len(parts) > 2 else "hint"
    try:
        weight = float(parts[3]) if len(parts) > 3 else 1.0
    except ValueError:
        weight = float("nan")
    if not 2 <= len(parts) <= 4 or not all(parts) or kind not in FEATURE_LOSSES or weight != weight:
        raise InputError(
            f"{text!r} is no pair of features; expected student_layer:teacher_layer, with a loss "
            f"({', '.join(FEATURE_LOSSES)}) and a weight behind if needed, as in "
            "block2:block4:attention:100."
        )
    return FeaturePair(parts[0], parts[1], FEATURE_LOSSES[kind](), weight)


def _view(view: str | View | None) -> View | None:
    if view is None or isinstance(view, View):
        return view
    names = [name.strip() for name in view.split(",")]
    for name in names:
        if name not in VIEWS:
            raise InputError(f"The view is {name!r}; expected {' or '.join(VIEWS)}.")
    made = [VIEWS[name]() for name in names]
    return made[0] if len(made) == 1 else Chain(made)


def _label_options(model: Layer, data: TrainingData) -> dict[str, Any]:
    """Loss and metrics by those labels that are there; none where there are none."""
    if data.is_batched:
        first = next(iter(data.train["x"]))
        if not (isinstance(first, (list, tuple)) and len(first) > 1):
            return {}
        return training_data.choose_loss(model, data)
    labels = data.train.get("y")
    if labels is None:
        return {}
    flat = labels.reshape(len(labels), -1)
    is_missing = np.isnan(flat).all(1) if labels.dtype.kind == "f" else (flat == -1).all(1)
    if is_missing.all():
        return {}
    present = TrainingData({"x": data.train["x"], "y": labels[~is_missing]}, None)
    options = training_data.choose_loss(model, present)
    training_data.check_labels(model, present, options["loss"])
    return options
