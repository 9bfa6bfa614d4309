"""What a student is to lose against its teachers, output by output and feature by feature."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfopt.distillation import labels as labels_of
from tfopt.distillation.losses import (
    DistillationLoss,
    FeatureHint,
    SoftTargets,
    SquaredError,
    logits_of,
)
from tfopt.distillation.taps import TappedModel, logits_under
from tfopt.distillation.teacher import Taught, Teacher, activation_of
from tfopt.errors import InputError, first_line
from tfopt.train.layers import Layer, framework_of

MAX_LOST_SHARE = 0.1  # of probabilities that were rounded to 0, under a temperature

VALUES = "values"

Targets = tuple[dict[str, Any], ...]  # of each teacher: "outputs" by name and "features" by pair


@dataclasses.dataclass(frozen=True)
class FeaturePair:
    """A layer of the student and one of a teacher, and what the first loses against the second.

    Args:
      student: path or name of a layer of the student.
      teacher: path or name of a layer of the teacher.
      loss: compares what the two make.
      weight: of this loss beside the others.
      of: which teacher, counted from 0.
    """

    student: str
    teacher: str
    loss: DistillationLoss = dataclasses.field(default_factory=FeatureHint)
    weight: float = 1.0
    of: int = 0


class Objective:
    """Losses of a student against its teachers.

    Args:
      student: a built Keras model.
      teachers: at least one.
      losses: of all outputs, or of some by their names; None for the default of each.
      temperature: of the default of outputs that are classes.
      pairs: of features.

    Attributes:
      notes: what was found out about teachers and chosen for the outputs; after `prepare`.
      projections: layers to train with the student, by their place among the pairs.
    """

    def __init__(
        self,
        student: Layer,
        teachers: Sequence[Teacher],
        losses: DistillationLoss | Mapping[str, DistillationLoss] | None,
        temperature: float | None,
        pairs: Sequence[FeaturePair],
    ):
        self.teachers, self.pairs = tuple(teachers), tuple(pairs)
        if not self.teachers:
            raise InputError("There is no teacher; give one model, or several.")
        if losses is not None and temperature is not None:
            raise InputError(
                "Both losses and a temperature are given; give the temperature to the loss, as in "
                "SoftTargets(temperature=4)."
            )
        default = SoftTargets() if temperature is None else SoftTargets(temperature)
        self._temperature = default.temperature
        self._check_pairs()
        self._given = losses
        self.student = TappedModel(student, [pair.student for pair in self.pairs])
        self._keras, self._name = framework_of(student), student.name
        self._output_names = output_names(student)
        self._losses: dict[str, DistillationLoss] = {}
        self._activations: dict[str, str] = {}
        self._sizes: dict[str, int] = {}
        self._of_teachers: list[tuple[str, ...]] = []
        self.is_of_classes: dict[str, bool] = {}
        self.projections: dict[int, Any] = {}
        self.notes: tuple[str, ...] = ()

    @property
    def is_prepared(self) -> bool:
        """Whether `prepare` was called."""
        return bool(self._of_teachers)

    @property
    def teachers_in_python(self) -> list[str]:
        """Names of the teachers that are not TensorFlow all through."""
        return [teacher.name for teacher in self.teachers if not teacher.is_in_graph]

    def prepare(self, inputs: Any, label_losses: Mapping[str, str]) -> None:
        """Runs student and teachers on some examples and checks that they fit each other.

        Args:
          inputs: a batch as the student takes it.
          label_losses: names of the losses against labels, by output, as far as there are some.

        Raises:
          InputError: when they do not, in a sentence.
        """
        import tensorflow as tf

        inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
        outputs, features = self._run_student(inputs)
        found = dict(zip(self._output_names, tf.nest.flatten(outputs), strict=True))
        self._activations = {name: _made_by(output) for name, output in found.items()}
        self._sizes = {name: output.shape[-1] for name, output in found.items()}
        of_teachers = [teacher.examine(inputs) for teacher in self.teachers]
        taught = [teacher(inputs) for teacher in self.teachers]
        for teacher in self.teachers:
            if teacher.num_outputs != len(found):
                raise InputError(
                    f"{teacher.name} has {teacher.num_outputs} outputs and the student "
                    f"{len(found)} ({', '.join(found)}); expected as many, in the same order."
                )
        self._choose_losses(of_teachers, label_losses)
        notes = []
        for teacher, said, activations in zip(self.teachers, taught, of_teachers, strict=True):
            notes.append(f"{teacher.name} {_described(said, activations)}")
            self._check_outputs(teacher, said, activations, found)
        for name, loss in self._losses.items():
            notes.append(f"Output {name!r} is taught by {type(loss).__name__}")
        self._of_teachers = of_teachers
        self._prepare_pairs(features, taught)
        self.notes = tuple(f"{note}." for note in notes)

    def ask(self, inputs: Any) -> Targets:
        """What the teachers say about a batch, as far as the losses need it; also in a graph."""
        found = []
        for index, (teacher, activations) in enumerate(
            zip(self.teachers, self._of_teachers, strict=True)
        ):
            taught = teacher(inputs)
            logits = teacher.logits(taught, activations)
            outputs = {
                name: logits[place] if self._losses[name].needs_logits else taught.outputs[place]
                for place, name in enumerate(self._output_names)
                if name in self._losses
            }
            features = {
                str(place): taught.features[pair.teacher]
                for place, pair in enumerate(self.pairs)
                if pair.of == index
            }
            found.append({"outputs": outputs, "features": features})
        return tuple(found)

    def of_outputs(self, outputs: Any, targets: Targets, labels: Mapping[str, Any]) -> Any:
        """The mean over the teachers of what outputs lose, by their weights.

        Args:
          outputs: the student's, of a run that has just ended.
          targets: as `ask` returned them.
          labels: by output, as far as there are some.

        Returns:
          Losses of shape (examples,), by output.
        """
        import tensorflow as tf

        total = sum(teacher.weight for teacher in self.teachers)
        by_name = dict(zip(self._output_names, tf.nest.flatten(outputs), strict=True))
        found = {}
        for name, loss in self._losses.items():
            made = by_name[name]
            if loss.needs_logits:
                made = _logits(made, self._activations[name])
            truth = labels.get(name)
            if truth is not None:
                truth = labels_of.classes(truth, made.shape[-1])
            found[name] = tf.add_n(
                [
                    (teacher.weight / total) * loss(made, said["outputs"][name], truth)
                    for teacher, said in zip(self.teachers, targets, strict=True)
                ]
            )
        return found

    def of_features(self, features: Mapping[str, Any], targets: Targets) -> Any | None:
        """What features lose, weighted and added up, of shape (examples,); None without pairs."""
        import tensorflow as tf

        found = []
        for place, pair in enumerate(self.pairs):
            made = features[pair.student]
            if place in self.projections:
                made = self.projections[place](made)
            found.append(pair.weight * pair.loss(made, targets[pair.of]["features"][str(place)]))
        return tf.add_n(found) if found else None

    def _check_pairs(self) -> None:
        for pair in self.pairs:
            if not isinstance(pair, FeaturePair) or not (pair.student and pair.teacher):
                raise InputError(
                    f"{pair!r} is no pair of features; expected FeaturePair(student, teacher) with "
                    "a layer of each."
                )
            if not 0 <= pair.of < len(self.teachers):
                raise InputError(
                    f"A pair of features is of teacher {pair.of}, and there are "
                    f"{len(self.teachers)}, counted from 0."
                )
            if pair.loss.needs_logits:
                raise InputError(
                    f"{type(pair.loss).__name__} compares logits, and the pair {pair.student!r}, "
                    f"{pair.teacher!r} has features; expected a loss such as AttentionTransfer()."
                )
        for index, teacher in enumerate(self.teachers):
            teacher.tap([pair.teacher for pair in self.pairs if pair.of == index])

    def _run_student(self, inputs: Any) -> tuple[Any, dict[str, Any]]:
        try:
            return self.student(inputs, training=False)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"Model {self._name!r}, the student, cannot run on the data: {first_line(error)}"
            ) from error

    def _choose_losses(
        self, of_teachers: Sequence[tuple[str, ...]], label_losses: Mapping[str, str]
    ) -> None:
        given, names = self._given, self._output_names
        if isinstance(given, Mapping):
            for name in given:
                if name not in names:
                    near = difflib.get_close_matches(name, names, 3, 0.3) or names
                    raise InputError(
                        f"The student has no output {name!r}; expected one of {', '.join(near)}."
                    )
        kinds = {
            name: _kind(
                [self._activations[name], *(found[place] for found in of_teachers)],
                label_losses.get(name),
                self._sizes[name],
            )
            for place, name in enumerate(names)
        }
        self.is_of_classes = {name: kind != VALUES for name, kind in kinds.items()}
        if isinstance(given, Mapping):
            self._losses = dict(given)
        elif given is not None:
            self._losses = dict.fromkeys(names, given)
        else:
            self._losses = {
                name: SquaredError()
                if kind == VALUES
                else SoftTargets(self._temperature, "sigmoid" if kind == "sigmoid" else "softmax")
                for name, kind in kinds.items()
            }

    def _check_outputs(
        self,
        teacher: Teacher,
        taught: Taught,
        activations: Sequence[str],
        made: Mapping[str, Any],
    ) -> None:
        for place, name in enumerate(self._output_names):
            loss = self._losses.get(name)
            if loss is None:
                continue
            mine, theirs = made[name].shape, taught.outputs[place].shape
            if loss.needs_logits and mine[-1] != theirs[-1]:
                raise InputError(
                    f"The student has {mine[-1]} classes and {teacher.name} has {theirs[-1]}; "
                    "expected the same classes in the same order."
                )
            is_plain = isinstance(loss, (SoftTargets, SquaredError)) or loss.needs_logits
            if is_plain and tuple(mine[1:]) != tuple(theirs[1:]):
                raise InputError(
                    f"Output {name!r} of the student has shape {tuple(mine[1:])} and that of "
                    f"{teacher.name} {tuple(theirs[1:])}; expected the same."
                )
            is_told = taught.logits[place] is not None or activations[place] == "linear"
            temperature = getattr(loss, "temperature", 1.0)
            if loss.needs_logits and not is_told and temperature != 1.0:
                lost = float((np.asarray(taught.outputs[place], np.float32) == 0).mean())
                if lost > MAX_LOST_SHARE:
                    raise InputError(
                        f"{teacher.name} returns probabilities, {lost:.0%} of them rounded to 0, "
                        f"which a temperature of {temperature:g} cannot soften; give a teacher "
                        "that returns logits, or a temperature of 1."
                    )

    def _prepare_pairs(self, features: Mapping[str, Any], taught: Sequence[Taught]) -> None:
        for place, pair in enumerate(self.pairs):
            mine, theirs = features[pair.student], taught[pair.of].features[pair.teacher]
            if hasattr(pair.loss, "projection") and place not in self.projections:
                layer = pair.loss.projection(self._keras, mine.shape, theirs.shape)
                self.projections[place] = layer
            elif isinstance(pair.loss, SquaredError) and mine.shape[1:] != theirs.shape[1:]:
                raise InputError(
                    f"Features {pair.student!r} have shape {tuple(mine.shape[1:])} and "
                    f"{pair.teacher!r} {tuple(theirs.shape[1:])}; expected the same."
                )
        # One run of all losses: whatever does not fit is told before training starts.
        try:
            self.of_features(features, self._as_targets(taught))
        except InputError:
            raise
        except Exception as error:
            shapes = "; ".join(
                f"{pair.student!r} {tuple(features[pair.student].shape[1:])} and {pair.teacher!r} "
                f"{tuple(taught[pair.of].features[pair.teacher].shape[1:])}"
                for pair in self.pairs
            )
            raise InputError(
                f"Features of student and teacher cannot be compared ({shapes}): "
                f"{first_line(error)}"
            ) from error

    def _as_targets(self, taught: Sequence[Taught]) -> Targets:
        return tuple(
            {
                "outputs": {},
                "features": {
                    str(place): said.features[pair.teacher]
                    for place, pair in enumerate(self.pairs)
                    if pair.of == index
                },
            }
            for index, said in enumerate(taught)
        )


def output_names(model: Layer) -> list[str]:
    """Names of a model's outputs, in their order; numbers where it has no names."""
    names = getattr(model, "output_names", None)
    if names:
        return list(names)
    return [f"output_{place}" for place in range(len(getattr(model, "outputs", None) or [None]))]


def _made_by(output: Any) -> str:
    """The activation of an output of a model that has just run."""
    values = np.asarray(output, np.float32)
    if logits_under(output) is not None:
        return "softmax" if activation_of(values) == "softmax" else "sigmoid"
    return activation_of(values)


def _logits(output: Any, activation: str) -> Any:
    """The student's logits, float32 or float64."""
    import tensorflow as tf

    found = logits_under(output)
    if found is None and activation == "linear":
        return output
    if found is not None:
        return found
    dtype = output.dtype if output.dtype == tf.float64 else tf.float32
    return logits_of(tf.cast(output, dtype), activation)


def _kind(activations: Sequence[str], label_loss: str | None, size: int) -> str:
    """`softmax` or `sigmoid` for classes, `values` for everything else.

    Linear outputs of which no loss against labels tells are taken for logits if there are several.
    """
    if label_loss is not None:
        name = label_loss.lower().replace("_", "")
        if "binary" in name:
            return "sigmoid"
        return "softmax" if "crossentropy" in name or "kldiv" in name else VALUES
    known = [activation for activation in activations if activation != "linear"]
    if known:
        return known[0]
    return "softmax" if size > 1 else VALUES


def _described(taught: Taught, activations: Sequence[str]) -> str:
    parts = []
    for logits, activation in zip(taught.logits, activations, strict=True):
        if activation == "linear":
            parts.append("returns logits or values")
        elif logits is not None:
            parts.append(f"returns probabilities ({activation}) and tells their logits")
        else:
            parts.append(f"returns probabilities ({activation}), taken for logits by logarithm")
    return "; ".join(dict.fromkeys(parts))
