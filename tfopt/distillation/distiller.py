"""A Keras model that trains a student on labels and on what teachers say."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from tfopt.distillation import first_batch as batches
from tfopt.distillation import reduction
from tfopt.distillation.cache import CachedBatches, cached
from tfopt.distillation.losses import DistillationLoss
from tfopt.distillation.objective import FeaturePair, Objective, Targets
from tfopt.distillation.teacher import Teacher
from tfopt.distillation.truth import Truth
from tfopt.distillation.views import View
from tfopt.errors import InputError
from tfopt.keras_callback import KerasCallback
from tfopt.train.data_errors import told
from tfopt.train.layers import Layer, check_built, framework_of, is_model, policy_name
from tfopt.train.loss_scaling import with_scaling

OWN_LOSSES = ("label_loss", "teacher_loss", "feature_loss")


_Base: Any = object  # a Model of either Keras stands behind it


class Distilling(_Base):
    """What makes a model of either Keras a distiller; see `Distiller`."""

    def __init__(
        self,
        student: Layer,
        teachers: Any,
        *,
        alpha: float = 0.1,
        temperature: float | None = None,
        losses: DistillationLoss | Mapping[str, DistillationLoss] | None = None,
        features: Sequence[FeaturePair] = (),
        view: Any = None,
        name: str | None = None,
    ):
        super().__init__(name=name or f"distilled_{student.name}")
        if not 0 <= alpha <= 1:
            raise InputError(
                f"alpha is {alpha}; expected the share of the labels' loss, from 0 to 1."
            )
        if not isinstance(teachers, (list, tuple)):
            teachers = [teachers]
        taught_by = [each if isinstance(each, Teacher) else Teacher(each) for each in teachers]
        self.student = student
        if getattr(student, "output_names", None):
            self.output_names = list(student.output_names)  # by which Keras names metrics
        self.alpha, self.view = float(alpha), view
        # In an object of its own, so that neither Keras saves or trains teachers.
        self._objective = Objective(student, taught_by, losses, temperature, features)
        self._projections: list[Any] = []
        self._view_seed = int(np.random.randint(2**31 - 1))
        self._framework = framework_of(student)
        mean = self._framework.metrics.Mean
        self._of_labels, self._of_teachers, self._of_features = (
            mean(name=each) for each in OWN_LOSSES
        )
        self._total = mean(name="total_loss")
        self._is_evaluating = False
        self.built = True

    @property
    def teachers(self) -> tuple[Teacher, ...]:
        """All of them, in their order."""
        return self._objective.teachers

    @property
    def notes(self) -> tuple[str, ...]:
        """What was found out about the teachers and chosen for the outputs, when training began."""
        return self._objective.notes

    def call(self, inputs: Any, training: bool = False) -> Any:
        """Runs the student."""
        return self.student(_split(inputs)[0], training=training)

    def compile(self, optimizer: Any = "rmsprop", loss: Any = None, **options: Any) -> None:
        """As that of a Keras model; the loss and `metrics` look at labels.

        Without a loss the student learns from the teachers alone. The optimizer is wrapped for
        loss scaling when a layer of the student computes in float16.
        """
        optimizer = self._framework.optimizers.get(optimizer)
        is_float16 = policy_name(self.student) == "mixed_float16"
        optimizer = with_scaling(self._framework, optimizer, is_float16)
        super().compile(optimizer, loss, **options)  # type: ignore[misc]
        self._loss = loss
        self._asks_for_xla = options.get("jit_compile") is True
        if self._framework is not keras:
            # Figures are those of all workers already, and are not to be added up.
            self.distribute_reduction_method = "first"

    def fit(self, x: Any = None, y: Any = None, **options: Any) -> Any:
        """As that of a Keras model; what does not fit is told before training starts.

        Examples without a label (-1 for classes, NaN for values; or no `y` at all) learn from the
        teachers alone.

        Args:
          x: what `fit` takes, or what `cached` returned.
          y: labels, if `x` has none.
          **options: of Keras's `fit`.

        Raises:
          InputError: when student, teachers and data do not fit each other.
        """
        self._check_compiled()
        if isinstance(x, CachedBatches):
            x.fill()
            options["shuffle"] = False  # they come in an order of their own
            options["callbacks"] = [*_as_list(options.get("callbacks")), _EpochOf(x)]
            x = x.dataset()
        x, y, weights = (
            batches.arrays(each) for each in (x, y, options.pop("sample_weight", None))
        )
        x, first = batches.first_batch(x, y, weights)
        inputs, targets = _split(first[0])
        if targets is None or not self._objective.is_prepared:
            self.examine(inputs)
        if targets is None:
            self._check_python_teachers()
        self._try_out(y if y is not None else first[1], first)
        if options.get("verbose", "auto") and self.notes:
            print("\n".join(self.notes))
        if weights is not None:
            options["sample_weight"] = weights
        with self._telling():
            return super().fit(x, y, **options)  # type: ignore[misc]

    def examine(self, inputs: Any) -> None:
        """Runs student and teachers on some examples, and checks that they fit; `fit` does so.

        Args:
          inputs: a batch as the student takes it.

        Raises:
          InputError: when they do not fit, in a sentence.
        """
        self._check_compiled()
        with self.distribute_strategy.scope():
            self._objective.prepare(batches.arrays(inputs), self._loss)
        for layer in self._objective.projections.values():
            if all(layer is not known for known in self._projections):
                self._projections.append(layer)

    def cached(
        self,
        data: Any,
        folder: Any,
        *,
        batch_size: int = 32,
        seed: int = 0,
        num_views: int | None = None,
        progress: Any = None,
    ) -> CachedBatches:
        """Batches for `fit` whose teachers' outputs are kept on disk.

        Every epoch after the first costs the student only. With a view, `num_views` views of the
        data are kept and come again in turn. LiteRT, ONNX and other teachers that are called
        through Python work with XLA and tf.distribute only so.

        Args:
          data: `x`, `(x, y)` or `(x, y, sample_weight)` of arrays, or a finite `tf.data.Dataset`
            of batches.
          folder: of the cache: new, or one that the same call made.
          batch_size: examples in a step.
          seed: of the order of examples, and of the views.
          num_views: of a `view` that is a `View`.
          progress: a `tfopt.progress.Progress` that tells of the copying of a data set.

        Raises:
          InputError: when the folder holds a cache of something else, or the view is random by
            itself, so that it cannot come again.
        """
        self._check_compiled()
        view = self.view
        if view is not None and not isinstance(view, View):
            raise InputError(
                f"The view is a {type(view).__name__}, which is random by itself, so that what "
                "teachers say about it once does not fit it again; give a View, such as "
                "CropAndFlip(), or train without a cache."
            )
        if (view is None) != (num_views is None):
            raise InputError(
                "num_views is the number of views that are kept; give it with a view, and only "
                "with one."
            )
        self.examine(batches.first_inputs(data[0] if isinstance(data, tuple) else data)[1])
        import tensorflow as tf

        identity = {
            "teachers": [{"name": each.name, "sha256": each.sha256()} for each in self.teachers],
        }
        return cached(
            data,
            tf.function(self._objective.ask, reduce_retracing=True),
            folder,
            identity=identity,
            batch_size=batch_size,
            seed=seed,
            view=view,
            num_views=num_views or 1,
            progress=progress,
        )

    def train_step(self, data: Any) -> dict[str, Any]:
        """One step on a batch, for `fit`."""
        import tensorflow as tf

        inputs, labels, weights = _unpack(data)
        inputs, targets = _split(inputs)
        if targets is None:
            if self.view is not None:
                inputs, labels = self._seen(inputs, labels)
            targets = self._objective.ask(inputs)
        with tf.GradientTape() as tape:
            outputs, features = self._objective.student(inputs, training=True)
            truth = self._truth(labels, outputs)
            of_labels = self._label_loss(truth, outputs, weights)
            of_teachers = self._teacher_loss(outputs, targets, truth, weights)
            of_features = self._feature_loss(features, targets, truth, weights)
            alpha = self.alpha if self._has_label_loss else 0.0
            loss = alpha * of_labels + (1.0 - alpha) * of_teachers + of_features
            loss += self._regularization()
            scaled = self.optimizer.scale_loss(loss) if self._framework is keras else loss
        variables = self.trainable_variables
        if self._framework is keras:
            gradients = tape.gradient(scaled, variables)
            self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        else:
            self.optimizer.minimize(scaled, variables, tape=tape)
        self._track(loss, inputs, (of_labels, of_teachers, of_features))
        return self._logs(truth, inputs, outputs, weights)

    def test_step(self, data: Any) -> dict[str, Any]:
        """One step of `evaluate`: the student on labels, without teachers."""
        inputs, labels, weights = _unpack(data)
        inputs, _ = _split(inputs)
        outputs = self.student(inputs, training=False)
        truth = self._truth(labels, outputs)
        loss = self._label_loss(truth, outputs, weights) + self._regularization()
        self._track(loss, inputs, ())
        return self._logs(truth, inputs, outputs, weights)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """As that of the student: its loss on labels, and metrics."""
        self._is_evaluating = True
        try:
            return super().evaluate(*args, **options)  # type: ignore[misc]
        finally:
            self._is_evaluating = False

    def get_metrics_result(self) -> dict[str, Any]:
        """Loss and metrics by name; both Kerases look here for what all replicas have together."""
        found = dict(super().get_metrics_result())  # type: ignore[misc]
        found["loss"] = found.pop(self._total.name)
        hidden = set() if self._has_label_loss else {self._of_labels.name}
        hidden |= set() if self._objective.pairs else {self._of_features.name}
        hidden |= set(OWN_LOSSES) if self._is_evaluating else set()
        return {name: value for name, value in found.items() if name not in hidden}

    def save(self, filepath: Any, *args: Any, **options: Any) -> None:
        """Saves the student alone, a plain Keras model."""
        self.student.save(filepath, *args, **options)

    def export(self, filepath: Any, *args: Any, **options: Any) -> None:
        """Exports the student alone."""
        self.student.export(filepath, *args, **options)

    @property
    def _has_label_loss(self) -> bool:
        return bool(batches.leaves(self._loss))

    def _check_compiled(self) -> None:
        if not hasattr(self, "_loss"):
            raise InputError("The distiller is not compiled; call compile with an optimizer first.")

    def _check_python_teachers(self) -> None:
        """Checks that teachers outside of TensorFlow are not asked where that cannot be."""
        names = ", ".join(self._objective.teachers_in_python)
        if not names:
            return
        way = "keep what they say: fit(distiller.cached(data, folder))"
        if self.distribute_strategy.num_replicas_in_sync > 1:
            raise InputError(f"{names} cannot be asked by several replicas; {way}.")
        if self._asks_for_xla:
            raise InputError(f"XLA cannot compile {names}; leave out jit_compile, or {way}.")
        self.jit_compile = False

    def _try_out(self, labels: Any, first: tuple[Any, Any, Any]) -> None:
        """Tries labels and weights out, on all that are at hand and on the first batch.

        Raises:
          InputError: when they do not fit outputs and losses.
        """
        assert self._objective.heads is not None
        batches.check_labels(
            labels, self._objective.heads, self._objective.label_losses, self._loss
        )
        inputs, given, weights = first
        if self.distribute_strategy.num_replicas_in_sync > 1:
            return
        import tensorflow as tf

        inputs, targets = _split(inputs)
        inputs, given, weights = (
            tf.nest.map_structure(tf.convert_to_tensor, each) if each is not None else None
            for each in (inputs, given, weights)
        )
        if targets is None:
            targets = self._objective.ask(inputs)
        with self._telling():
            outputs, features = self._objective.student(inputs, training=False)
            truth = self._truth(given, outputs)
            self._teacher_loss(outputs, targets, truth, weights)
            self._feature_loss(features, targets, truth, weights)

    def _telling(self) -> contextlib.AbstractContextManager[None]:
        return told(f"Student {self.student.name!r}")

    def _seen(self, inputs: Any, labels: Any) -> tuple[Any, Any]:
        """A random view of a batch, another one in each step and replica."""
        import tensorflow as tf

        if not isinstance(self.view, View):
            options = {"training": True} if hasattr(self.view, "dtype_policy") else {}
            return self.view(inputs, **options), labels
        inner: Any = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        context = tf.distribute.get_replica_context()
        step = tf.cast(tf.convert_to_tensor(inner.iterations), tf.int32)
        step = step * self.distribute_strategy.num_replicas_in_sync
        step += tf.cast(context.replica_id_in_sync_group, tf.int32)
        return self.view(inputs, labels, tf.stack([tf.constant(self._view_seed), step]))

    def _truth(self, labels: Any, outputs: Any) -> Truth:
        names = self._objective.by_name(outputs)
        ignored = batches.ignored_classes(self._loss, list(names))
        return Truth.of(labels, names, outputs, self._objective.is_of_classes, ignored)

    def _label_loss(self, truth: Truth, outputs: Any, weights: Any) -> Any:
        """As Keras computes it, where there are labels; float32, of one replica."""
        import tensorflow as tf

        if truth.filled is None or not self._has_label_loss:
            return tf.constant(0.0)
        if self._framework is keras:
            given = truth.weights(weights, outputs)
            found = self._compile_loss(truth.filled, truth.masked(outputs), given)
        else:
            marked, given = truth.for_losses(outputs, weights)
            found = self.compiled_loss(truth.filled, marked, given)
        return tf.cast(found, tf.float32)

    def _teacher_loss(self, outputs: Any, targets: Targets, truth: Truth, weights: Any) -> Any:
        import tensorflow as tf

        found = self._objective.of_outputs(outputs, targets, truth.labels, truth.counted)
        means = [
            reduction.mean(losses, truth.weights_of(weights, name), truth.counted.get(name))
            for name, losses in found.items()
        ]
        return _of_one_replica(tf.add_n(means or [tf.constant(0.0)]))

    def _feature_loss(self, features: Any, targets: Targets, truth: Truth, weights: Any) -> Any:
        import tensorflow as tf

        own = truth.weights_of(weights, truth.names[0])
        means = [
            reduction.mean(losses, own, mask)
            for losses, mask in self._objective.of_features(features, targets)
        ]
        return _of_one_replica(tf.add_n(means or [tf.constant(0.0)]))

    def _regularization(self) -> Any:
        import tensorflow as tf

        total = tf.add_n(
            [tf.cast(tf.reduce_sum(each), tf.float32) for each in self.student.losses]
            or [tf.constant(0.0)]
        )
        return _of_one_replica(total)

    def _track(self, loss: Any, inputs: Any, parts: Sequence[Any]) -> None:
        import tensorflow as tf

        size = tf.shape(tf.nest.flatten(inputs)[0])[0]
        num_replicas = tf.distribute.get_strategy().num_replicas_in_sync
        trackers = (self._total, self._of_labels, self._of_teachers, self._of_features)
        for tracker, value in zip(trackers, (loss, *parts), strict=False):
            tracker.update_state(value * num_replicas, sample_weight=size)

    def _logs(self, truth: Truth, inputs: Any, outputs: Any, weights: Any) -> dict[str, Any]:
        if truth.filled is None:
            return {
                "loss": self._total.result(),
                self._of_teachers.name: self._of_teachers.result(),
            }
        marked, given = truth.masked(outputs), truth.weights(weights, outputs)
        return self.compute_metrics(inputs, truth.filled, marked, given)


class Distiller(Distilling, keras.Model):
    """Trains a student on labels and on what teachers say, with `compile` and `fit`.

        distiller = tfopt.Distiller(student, ["wide.keras", "other_saved_model"])
        distiller.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        distiller.fit(images, labels, epochs=50)
        distiller.student.save("student.keras")

    In each step the student loses

        alpha · (loss of `compile`, on labels) + (1 − alpha) · (what outputs lose against teachers)
        + (what features lose) + (regularization of the student)

    averaged over the batch. Labels, sample weights, metrics and regularization count as in `fit` of
    the student itself, and sample weights go for what teachers say, too. An example without a label
    (-1 for classes, NaN for values) learns from the teachers alone, and the loss of labels is the
    mean over the examples that have one. The student runs once, also for features, and teachers do
    not run in `evaluate`. With several teachers the loss is the mean over them by their weights;
    for soft targets its gradient is that of the mean of their softened probabilities.

    What it gains depends on how much better the teacher is and how long one trains: points of
    accuracy rather than tenths where labels are few. It costs a run of each teacher in each step,
    unless what they say is kept (`cached`).

    Of `keras.distillation.Distiller` (3.12 and later) nothing is used: it takes one Keras model of
    the same shapes, reduces its losses to one number a batch, so that sample weights cannot reach
    them, leaves out regularization, takes no softmax of what its default divergence gets, and
    runs the student twice for features. Source of the method: Hinton, Vinyals & Dean 2015,
    "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531).

    `save`, `export` and checkpoints of whole models write the student alone, a plain Keras model;
    `save_weights` and Keras's `BackupAndRestore` also keep the optimizer and the projections of
    feature hints.

    Args:
      student: a built model of Keras 3 or tf_keras; the distiller is one of the same Keras.
      teachers: one or several: `Teacher`s, Keras models, paths of models, SavedModels or artifacts,
        or sessions. Under a strategy of tf.distribute Keras models are best loaded in its scope.
      alpha: share of the labels' loss, 0 to 1; of no account without one.
      temperature: of `SoftTargets`, by default 4, which outputs of classes get that are not in
        `losses`.
      losses: what outputs lose against teachers: one loss for all, or losses by the names of
        outputs, where those that are not named lose nothing. By default `SoftTargets` for classes
        and `SquaredError` for values; which they are is told by the loss of `compile`, else by
        what teacher and student return.
      features: pairs of layers.
      view: random view that student and teachers both see while training: a `View`, or any
        function or Keras layer that takes inputs and returns inputs.
      name: of the distiller.

    Attributes:
      student: the model that is trained.
      teachers: all of them, as `Teacher`s.
      notes: what was found out about teachers and chosen for outputs, once training began.

    Raises:
      InputError: for a wrong student, teacher, loss, layer or share, in a sentence.
    """

    def __new__(cls, student: Layer = None, *args: Any, **options: Any) -> Any:
        """A distiller of the student's Keras."""
        if not is_model(student):
            raise InputError(
                f"The student is a {type(student).__name__}; expected a model of Keras 3 or "
                "tf_keras."
            )
        check_built(student)
        if framework_of(student) is not keras:
            return _of_tf_keras()(student, *args, **options)
        return super().__new__(cls, student, *args, **options)


@functools.cache
def _of_tf_keras() -> type:
    """The same for students of tf_keras."""
    tf_keras = importlib.import_module("tf_keras")
    return type("Distiller", (Distilling, tf_keras.Model), {"__doc__": Distiller.__doc__})


class _EpochOf(KerasCallback):
    """Tells a cache which epoch begins."""

    def __init__(self, batches: CachedBatches):
        super().__init__()
        self._batches = batches

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        self._batches.epoch = epoch


def _of_one_replica(loss: Any) -> Any:
    import tensorflow as tf

    return loss / tf.distribute.get_strategy().num_replicas_in_sync


def _unpack(data: Any) -> tuple[Any, Any, Any]:
    """Inputs, labels and weights of a batch; None where there is none."""
    if not isinstance(data, (list, tuple)):
        return data, None, None
    return (*data, None, None)[:3]


def _split(inputs: Any) -> tuple[Any, Any]:
    """Inputs, and what teachers said about them if that was kept."""
    if isinstance(inputs, Mapping) and set(inputs) == {"inputs", "targets"}:
        return inputs["inputs"], inputs["targets"]
    return inputs, None


def _as_list(callbacks: Any) -> list[Any]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
