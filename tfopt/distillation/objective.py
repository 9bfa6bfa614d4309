"""What a student is to lose against its teachers, output by output and feature by feature."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tfopt.distillation import heads, reduction
from tfopt.distillation import labels as labels_of
from tfopt.distillation.heads import Heads
from tfopt.distillation.kinds import VALUES, Made, kind_of
from tfopt.distillation.losses import (
    DistillationLoss,
    FeatureHint,
    SoftTargets,
    SquaredError,
    logits_of,
)
from tfopt.distillation.taps import TappedModel, activations_of, logits_under
from tfopt.distillation.teacher import Taught, Teacher, activation_of
from tfopt.errors import InputError, first_line
from tfopt.train.layers import Layer, framework_of

MAX_LOST_SHARE = 0.1  # of probabilities that were rounded to 0, under a temperature

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
      heads: the student's outputs; after `prepare`, as all that follows.
      is_of_classes: by output.
      label_losses: names of the losses against labels, by output, as far as there are some.
      notes: what was found out about teachers and chosen for the outputs.
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
        self._layer_names = getattr(student, "output_names", None)
        self._known = activations_of(student)
        self._losses: dict[str, DistillationLoss] = {}
        self._activations: dict[str, str] = {}
        self._of_teachers: list[tuple[str, ...]] = []
        self._places: list[dict[str, int]] = []  # of the student's outputs among each teacher's
        self.heads: Heads | None = None
        self.is_of_classes: dict[str, bool] = {}
        self.label_losses: dict[str, str] = {}
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

    def by_name(self, outputs: Any) -> dict[str, Any]:
        """The student's outputs by their names, in the order in which `tf.nest` flattens them."""
        return heads.by_name(outputs, self._layer_names)

    def prepare(self, inputs: Any, label_loss: Any) -> None:
        """Runs student and teachers on some examples and checks that they fit each other.

        Args:
          inputs: a batch as the student takes it.
          label_loss: what `compile` got as loss against labels, or None.

        Raises:
          InputError: when they do not, in a sentence.
        """
        import tensorflow as tf

        inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
        outputs, features = self._run_student(inputs)
        found = self.by_name(outputs)
        self.heads = Heads.of(outputs, self._layer_names)
        self.label_losses = _loss_names(label_loss, self.heads.names)
        made = {name: _made_by(output, self._known.get(name)) for name, output in found.items()}
        self._activations = {name: each.activation for name, each in made.items()}
        of_teachers = [teacher.examine(inputs) for teacher in self.teachers]
        taught = [teacher(inputs) for teacher in self.teachers]
        to_teach = self.heads
        if isinstance(self._given, Mapping):
            to_teach = self.heads.only(heads.given(self._given, self.heads.names, "losses"))
        pairings = [
            heads.pair(to_teach, said.heads, teacher.name, teacher.outputs)
            for teacher, said in zip(self.teachers, taught, strict=True)
        ]
        self._places = [
            {own: said.heads.names.index(other) for own, other in pairing.items()}
            for pairing, said in zip(pairings, taught, strict=True)
        ]
        self._choose_losses(made, of_teachers)
        notes = []
        for index, teacher in enumerate(self.teachers):
            said, activations = taught[index], of_teachers[index]
            notes.append(f"{teacher.name} {_described(said, activations)}")
            if any(own != other for own, other in pairings[index].items()) and len(found) > 1:
                pairs = ", ".join(f"{own!r} by {other!r}" for own, other in pairings[index].items())
                notes.append(f"{teacher.name} teaches the outputs {pairs}")
            self._check_outputs(index, said, activations, found)
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
                name: (logits if loss.needs_logits else taught.outputs)[self._places[index][name]]
                for name, loss in self._losses.items()
            }
            features = {
                str(place): taught.features[pair.teacher]
                for place, pair in enumerate(self.pairs)
                if pair.of == index
            }
            found.append({"outputs": outputs, "features": features})
        return tuple(found)

    def of_outputs(
        self,
        outputs: Any,
        targets: Targets,
        labels: Mapping[str, Any],
        counted: Mapping[str, Any],
    ) -> dict[str, Any]:
        """The mean over the teachers of what outputs lose, by their weights.

        Args:
          outputs: the student's, of a run that has just ended.
          targets: as `ask` returned them.
          labels: by output, as far as there are some.
          counted: by output, of shape (examples, positions…), bool: positions that are no padding;
            where an output has none, all count.

        Returns:
          Losses of shape (examples,) or (examples, positions…), by output.
        """
        import tensorflow as tf

        total = sum(teacher.weight for teacher in self.teachers)
        by_name, found = self.by_name(outputs), {}
        for name, loss in self._losses.items():
            made, mask = by_name[name], counted.get(name)
            if loss.needs_logits:
                made = _logits(made, self._activations[name])
            truth = labels.get(name)
            if truth is not None:
                truth = labels_of.classes(truth, made.shape)
            made = reduction.without_padding(made, mask)
            found[name] = tf.add_n(
                [
                    (teacher.weight / total)
                    * loss.by_position(
                        made, reduction.without_padding(said["outputs"][name], mask), truth
                    )
                    for teacher, said in zip(self.teachers, targets, strict=True)
                ]
            )
        return found

    def of_features(self, features: Mapping[str, Any], targets: Targets) -> list[tuple[Any, Any]]:
        """What the features of each pair lose, weighted, and which positions of them count.

        Returns:
          Losses of shape (examples,) or (examples, positions…), and Keras's masks of the student's
          features, or None.
        """
        found = []
        for place, pair in enumerate(self.pairs):
            made = features[pair.student]
            mask = reduction.mask_of(made)
            if place in self.projections:
                made = self.projections[place](made)
            given = reduction.without_padding(targets[pair.of]["features"][str(place)], mask)
            losses = pair.loss.by_position(reduction.without_padding(made, mask), given)
            found.append((pair.weight * losses, mask))
        return found

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
        self, made: Mapping[str, Made], of_teachers: Sequence[tuple[str, ...]]
    ) -> None:
        given = self._given
        kinds = {
            name: kind_of(
                each,
                [
                    found[places[name]]
                    for found, places in zip(of_teachers, self._places, strict=True)
                    if name in places
                ],
                self.label_losses.get(name),
            )
            for name, each in made.items()
        }
        self.is_of_classes = {name: kind != VALUES for name, kind in kinds.items()}
        if isinstance(given, Mapping):
            self._losses = heads.given(given, list(made), "losses")
        elif given is not None:
            self._losses = dict.fromkeys(made, given)
        else:
            self._losses = {
                name: SquaredError()
                if kind == VALUES
                else SoftTargets(self._temperature, "sigmoid" if kind == "sigmoid" else "softmax")
                for name, kind in kinds.items()
            }

    def _check_outputs(
        self, index: int, taught: Taught, of_teacher: Sequence[str], made: Mapping[str, Any]
    ) -> None:
        teacher = self.teachers[index]
        for name, loss in self._losses.items():
            place = self._places[index][name]
            activation = of_teacher[place]
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
            is_told = taught.logits[place] is not None or activation == "linear"
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


def _loss_names(loss: Any, outputs: Sequence[str]) -> dict[str, str]:
    """Names of what `compile` got as losses, by output."""
    is_one = not isinstance(loss, (Mapping, list, tuple))
    by_name = dict.fromkeys(outputs, loss) if is_one else heads.given(loss, outputs, "losses")
    return {
        name: str(getattr(each, "name", None) or getattr(each, "__name__", each))
        for name, each in by_name.items()
        if each is not None
    }


def _made_by(output: Any, known: str | None) -> Made:
    """What made an output of a model that has just run: its layer tells, else its values."""
    values = np.asarray(output, np.float32)
    found = known or activation_of(values)
    if known is None and logits_under(output) is not None:
        return Made("softmax" if found == "softmax" else "sigmoid", True, values.shape[-1])
    return Made(found, known is not None, values.shape[-1])


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
