"""What a student's outputs or features lose against its teacher's, by example and position.

All are differentiable TensorFlow functions of both Kerases. They compute in float32, or in float64
where they get it, whatever precision student and teacher compute in; no gradient goes to the
teacher. Pixels, tokens and other positions keep a loss of their own, so that weights, padding and
the mean over them are up to the caller, as with the losses of Keras.

A loss of one's own is a subclass with `call`.
"""

from __future__ import annotations

import abc
from typing import Any

from tfopt.errors import InputError

SMALLEST_PROBABILITY = 1e-7


class DistillationLoss(abc.ABC):
    """What a student loses against one teacher, on outputs or on features.

    Attributes:
      of_features: whether it compares what layers inside make, and not outputs.
      needs_logits: whether it reads outputs as logits of classes.
    """

    of_features = False
    needs_logits = False

    def __call__(self, student: Any, teacher: Any, labels: Any = None) -> Any:
        """The loss of each example.

        Args:
          student: tensor of shape (examples, …), of any float dtype.
          teacher: tensor of shape (examples, …) that fits the student's.
          labels: whole numbers of shape (examples, positions…), -1 where there is none; None
            without labels.

        Returns:
          Tensor of shape (examples,), the mean over positions; float32 (float64 for a student of
          float64).
        """
        import tensorflow as tf

        losses = self.by_position(student, teacher, labels)
        axes = list(range(1, len(losses.shape)))
        return tf.reduce_mean(losses, axes) if axes else losses

    def by_position(self, student: Any, teacher: Any, labels: Any = None) -> Any:
        """The loss of each example, or of each of its positions where `call` keeps them apart.

        Args:
          student, teacher, labels: as `__call__` takes them.

        Returns:
          Tensor of shape (examples,) or (examples, positions…), of the dtype that `__call__` has.
        """
        import tensorflow as tf

        student = tf.convert_to_tensor(student)
        dtype = tf.float64 if student.dtype == tf.float64 else tf.float32
        teacher = tf.stop_gradient(tf.cast(teacher, dtype))
        return self.call(tf.cast(student, dtype), teacher, labels)

    @abc.abstractmethod
    def call(self, student: Any, teacher: Any, labels: Any) -> Any:
        """As `by_position`, with both tensors in the dtype of the result."""


class SoftTargets(DistillationLoss):
    """Kullback-Leibler divergence of softened classes, times the squared temperature.

    T² Σ p log(p / q), with p = softmax(teacher / T) and q = softmax(student / T): the factor keeps
    gradients as large as those of hard labels whatever T is. Source: Hinton, Vinyals & Dean 2015,
    "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), section 2.

    `activation="sigmoid"` takes each output as a class of its own (several labels at once, or a
    single output): the mean of the divergences of yes and no, as binary cross-entropy takes it.

    Args:
      temperature: T, above 0; 1 leaves probabilities as they are.
      activation: `softmax` or `sigmoid`.

    Raises:
      InputError: for another temperature or activation.
    """

    needs_logits = True

    def __init__(self, temperature: float = 4.0, activation: str = "softmax"):
        self.temperature = _positive("temperature", temperature)
        if activation not in ("softmax", "sigmoid"):
            raise InputError(f"The activation is {activation!r}; expected softmax or sigmoid.")
        self.activation = activation

    def call(self, student: Any, teacher: Any, labels: Any) -> Any:  # noqa: D102
        import tensorflow as tf

        student, teacher = student / self.temperature, teacher / self.temperature
        if self.activation == "softmax":
            return self.temperature**2 * _divergence(teacher, student)
        # Yes and no as two classes with logits x and 0.
        student, teacher = (
            tf.stack([logits, tf.zeros_like(logits)], -1) for logits in (student, teacher)
        )
        return self.temperature**2 * _mean_of_last(_divergence(teacher, student))


class DecoupledTargets(DistillationLoss):
    """Soft targets in two parts: how sure of the class, and how the others compare.

    T² (alpha KL(b^t ‖ b^s) + beta KL(p^t ‖ p^s)), where b are the probabilities of the class and of
    all others together, and p those of the others among themselves. In plain soft targets the
    second part weighs as little as the teacher is unsure, which is what holds a student back.
    The class is the label's; without one it is the teacher's first choice. Source: Zhao et al.
    2022, "Decoupled Knowledge Distillation" (arXiv 2203.08679), equation 7; T² as in the authors'
    code.

    Args:
      alpha: weight of the class.
      beta: weight of the others; the paper takes 1 to 8, more for surer teachers.
      temperature: T, above 0.

    Raises:
      InputError: for another temperature.
    """

    needs_logits = True

    def __init__(self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0):
        self.alpha, self.beta = alpha, beta
        self.temperature = _positive("temperature", temperature)

    def call(self, student: Any, teacher: Any, labels: Any) -> Any:  # noqa: D102
        import tensorflow as tf

        target = tf.argmax(teacher, -1)
        if labels is not None:
            labels = tf.cast(labels, target.dtype)
            target = tf.where(labels >= 0, labels, target)
        is_target = tf.one_hot(target, teacher.shape[-1], True, False, dtype=tf.bool)
        lowest = tf.constant(-1e9, teacher.dtype)  # no class, and no NaN in gradients

        def parts(logits: Any) -> tuple[Any, Any]:
            logits = logits / self.temperature
            of_class = tf.reduce_sum(tf.where(is_target, logits, tf.zeros_like(logits)), -1)
            others = tf.where(is_target, lowest, logits)
            return tf.stack([of_class, tf.reduce_logsumexp(others, -1)], -1), others

        (sure, others), (student_sure, student_others) = parts(teacher), parts(student)
        loss = self.alpha * _divergence(sure, student_sure)
        loss += self.beta * _divergence(others, student_others)
        return self.temperature**2 * loss


class SquaredError(DistillationLoss):
    """Mean squared difference of outputs, for regression."""

    def call(self, student: Any, teacher: Any, labels: Any) -> Any:  # noqa: D102
        import tensorflow as tf

        return _mean_of_last(tf.square(student - teacher))


class FeatureHint(DistillationLoss):
    """Half the mean squared difference of features, the student's through a learned projection.

    Source: Romero et al. 2015, "FitNets: Hints for Thin Deep Nets" (arXiv 1412.6550), equation 3;
    the mean over features instead of their sum, so that a weight means the same for any layer. The
    projection is made by whoever trains: see `projection`.
    """

    of_features = True

    def call(self, student: Any, teacher: Any, labels: Any) -> Any:  # noqa: D102
        import tensorflow as tf

        return 0.5 * _mean_of_last(tf.square(student - teacher))

    @staticmethod
    def projection(keras: Any, student_shape: Any, teacher_shape: Any) -> Any:
        """A layer of `keras` that brings features of the student's channels to the teacher's.

        It is linear in the channels, the last axis, and the same at each position.

        Raises:
          InputError: when positions do not fit.
        """
        if list(student_shape[1:-1]) != list(teacher_shape[1:-1]):
            raise InputError(
                f"Features of shape {tuple(student_shape[1:])} (student) and "
                f"{tuple(teacher_shape[1:])} (teacher) have other positions; choose layers that "
                "differ in the last size only."
            )
        return keras.layers.Dense(teacher_shape[-1], use_bias=False, name="hint")


class AttentionTransfer(DistillationLoss):
    """Squared distance of the maps of where layers are active.

    A map is the sum of squares over the channels, scaled to length 1. Maps of other sizes than the
    student's are averaged to it. Source: Zagoruyko & Komodakis 2017, "Paying More Attention to
    Attention" (arXiv 1612.03928), equation 2 with p = 2; the distance is squared as in the authors'
    code, so that its gradient is smooth at 0. Features have shape (examples, height, width,
    channels) or (examples, positions, channels) with as many positions.
    """

    of_features = True

    def call(self, student: Any, teacher: Any, labels: Any) -> Any:  # noqa: D102
        import tensorflow as tf

        maps = [tf.reduce_sum(tf.square(features), -1) for features in (student, teacher)]
        if len(maps[0].shape) == 3 and maps[0].shape[1:] != maps[1].shape[1:]:
            size = tf.shape(maps[0])[1:]
            resized = tf.image.resize(maps[1][..., None], size, method="area")[..., 0]
            maps[1] = tf.cast(resized, maps[0].dtype)
        flat = [tf.reshape(found, [tf.shape(found)[0], -1]) for found in maps]
        normal = [tf.math.l2_normalize(found, -1, epsilon=1e-24) for found in flat]
        return tf.reduce_sum(tf.square(normal[0] - normal[1]), -1)


class RelationalTargets(DistillationLoss):
    """How examples of a batch lie to each other: their distances, and angles between three.

    Huber losses of distances, divided by their mean in the batch, and of cosines; an example's
    loss is the mean over its pairs and triples. Sizes of student and teacher may differ. Angles
    take memory for the cube of the batch size. Source: Park et al. 2019, "Relational Knowledge
    Distillation" (arXiv 1904.05068), equations 4 to 9; weights as in its section 4.

    Args:
      distance_weight: of distances.
      angle_weight: of angles; 0 leaves them out.
    """

    def __init__(self, distance_weight: float = 25.0, angle_weight: float = 50.0):
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def call(self, student: Any, teacher: Any, labels: Any) -> Any:  # noqa: D102
        import tensorflow as tf

        flat = [tf.reshape(found, [tf.shape(found)[0], -1]) for found in (student, teacher)]
        # From each example to each other one.
        steps = [found[None] - found[:, None] for found in flat]
        lengths = [_lengths(step) for step in steps]
        relative = [tf.math.divide_no_nan(found, _mean_of_positive(found)) for found in lengths]
        loss = self.distance_weight * tf.reduce_mean(_huber(relative[0] - relative[1]), -1)
        if self.angle_weight:
            directions = [
                tf.math.divide_no_nan(step, length[..., None])
                for step, length in zip(steps, lengths, strict=True)
            ]
            cosines = [tf.matmul(found, found, transpose_b=True) for found in directions]
            angles = tf.reduce_mean(_huber(cosines[0] - cosines[1]), [-1, -2])
            loss += self.angle_weight * angles
        return loss


def logits_of(probabilities: Any, activation: str = "softmax") -> Any:
    """Logits that softmax or sigmoid makes these probabilities of.

    What was rounded to 0 (of sigmoid, to 1 as well) cannot be told: nearer to it than 1e-7 all are
    alike, which a high temperature shows.

    Args:
      probabilities: tensor of shape (examples, …, classes), float32 or float64.
      activation: `softmax` or `sigmoid`.
    """
    import tensorflow as tf

    smallest = tf.constant(SMALLEST_PROBABILITY, probabilities.dtype)
    logits = tf.math.log(tf.maximum(probabilities, smallest))
    if activation == "sigmoid":
        logits -= tf.math.log(tf.maximum(1.0 - probabilities, smallest))
    return logits


def _positive(name: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise InputError(f"The {name} is {value}; expected a number above 0, such as 4.")
    return float(value)


def _divergence(target: Any, logits: Any) -> Any:
    """Kullback-Leibler divergence of softmax(target) and softmax(logits), over the last axis."""
    import tensorflow as tf

    log_target, log_found = tf.nn.log_softmax(target), tf.nn.log_softmax(logits)
    return tf.reduce_sum(tf.exp(log_target) * (log_target - log_found), -1)


def _mean_of_last(values: Any) -> Any:
    """The mean over the last axis; values of shape (examples,) stay as they are."""
    import tensorflow as tf

    return tf.reduce_mean(values, -1) if len(values.shape) > 1 else values


def _huber(difference: Any) -> Any:
    """Quadratic up to 1, linear beyond."""
    import tensorflow as tf

    size = tf.abs(difference)
    return tf.where(size <= 1, 0.5 * tf.square(size), size - 0.5)


def _lengths(steps: Any) -> Any:
    """Euclidean lengths; where they are 0 no gradient goes through, which the root has none for."""
    import tensorflow as tf

    squared = tf.reduce_sum(tf.square(steps), -1)
    is_none = squared <= 0
    roots = tf.sqrt(tf.where(is_none, tf.ones_like(squared), squared))
    return tf.where(is_none, tf.zeros_like(squared), roots)


def _mean_of_positive(values: Any) -> Any:
    import tensorflow as tf

    count = tf.math.count_nonzero(values, dtype=values.dtype)
    return tf.math.divide_no_nan(tf.reduce_sum(values), count)
