"""Values against NumPy, gradients against finite differences."""

import numpy as np
import pytest
import tensorflow as tf

from tfopt.distillation import losses
from tfopt.errors import InputError

RNG = np.random.default_rng(0)


def normal(*shape, scale=2.0):
    return RNG.normal(scale=scale, size=shape)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl(p, q):
    return (p * np.log(p / q)).sum(-1)


def soft_targets(student, teacher, labels, temperature=4.0):
    return temperature**2 * kl(softmax(teacher / temperature), softmax(student / temperature))


def yes_or_no(student, teacher, labels, temperature=3.0):
    p, q = (1 / (1 + np.exp(-x / temperature)) for x in (teacher, student))
    return temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean(-1)


def decoupled(student, teacher, labels, alpha=1.5, beta=3.0, temperature=2.0):
    found = []
    for s, t, label in zip(student, teacher, labels, strict=True):
        target = t.argmax() if label < 0 else label
        p, q = softmax(t / temperature), softmax(s / temperature)
        others = np.arange(len(p)) != target
        sure = kl(np.array([p[target], 1 - p[target]]), np.array([q[target], 1 - q[target]]))
        among = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
        found.append(temperature**2 * (alpha * sure + beta * among))
    return np.array(found)


def attention(student, teacher, labels):
    maps = [(x**2).sum(-1).reshape(len(x), -1) for x in (student, teacher)]
    unit = [m / np.linalg.norm(m, axis=-1, keepdims=True) for m in maps]
    return ((unit[0] - unit[1]) ** 2).sum(-1)


def huber(x):
    return np.where(np.abs(x) <= 1, x**2 / 2, np.abs(x) - 0.5)


def relational(student, teacher, labels):
    """By loops over pairs and triples, as the paper writes it."""
    count = len(student)

    def distances(x):
        found = np.array(
            [[np.linalg.norm(x[i] - x[j]) for j in range(count)] for i in range(count)]
        )
        return found / found[found > 0].mean()

    def cosine(x, i, j, k):
        if i in (j, k):
            return 0.0
        a, b = x[j] - x[i], x[k] - x[i]
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    loss = 25 * huber(distances(student) - distances(teacher)).mean(-1)
    for i in range(count):
        triples = [
            huber(cosine(student, i, j, k) - cosine(teacher, i, j, k))
            for j in range(count)
            for k in range(count)
        ]
        loss[i] += 50 * np.mean(triples)
    return loss


def with_gradient(function, values):
    """What a function gives, and the gradient of its sum."""
    variable = tf.constant(values)
    with tf.GradientTape() as tape:
        tape.watch(variable)
        found = function(variable)
    return found, tape.gradient(found, variable)


NO_LABELS = np.full(5, -1)
SOME_LABELS = np.array([2, -1, 0, 5, -1])
CASES = {
    "soft": (losses.SoftTargets(), soft_targets, normal(5, 6), normal(5, 6), None),
    "soft, cold": (
        losses.SoftTargets(1.0),
        lambda *found: soft_targets(*found, temperature=1.0),
        normal(5, 6), normal(5, 6), None,
    ),
    "yes or no": (
        losses.SoftTargets(3.0, "sigmoid"), yes_or_no, normal(5, 6), normal(5, 6), None
    ),
    "decoupled": (
        losses.DecoupledTargets(1.5, 3.0, 2.0), decoupled, normal(5, 6), normal(5, 6), SOME_LABELS
    ),
    "decoupled, unlabelled": (
        losses.DecoupledTargets(1.5, 3.0, 2.0),
        lambda student, teacher, _: decoupled(student, teacher, NO_LABELS),
        normal(5, 6), normal(5, 6), None,
    ),
    "regression": (
        losses.SquaredError(),
        lambda student, teacher, _: ((student - teacher) ** 2).mean(-1),
        normal(5, 3), normal(5, 3), None,
    ),
    "hint": (
        losses.FeatureHint(),
        lambda student, teacher, _: ((student - teacher) ** 2).mean((1, 2, 3)) / 2,
        normal(5, 3, 4, 2), normal(5, 3, 4, 2), None,
    ),
    "attention": (
        losses.AttentionTransfer(), attention, normal(5, 3, 4, 2), normal(5, 3, 4, 7), None
    ),
    "attention of a sequence": (
        losses.AttentionTransfer(), attention, normal(5, 4, 2), normal(5, 4, 7), None
    ),
    "relational": (losses.RelationalTargets(), relational, normal(5, 3), normal(5, 8), None),
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


@cases
def test_values(case):
    loss, expected, student, teacher, labels = CASES[case]
    found = loss(student, teacher, labels)
    assert found.shape == (5,)
    assert found.dtype == tf.float64
    np.testing.assert_allclose(found, expected(student, teacher, labels), rtol=1e-9)


@cases
def test_gradients(case):
    """Central differences of the sum over the batch, weighted as sample weights do."""
    loss, _, student, teacher, labels = CASES[case]
    weights = np.array([1.0, 0.5, 2.0, 0.0, 1.0])
    _, found = with_gradient(lambda s: weights * loss(s, teacher, labels), student)
    expected, step = np.empty_like(student), 1e-6
    for index in np.ndindex(student.shape):
        ends = []
        for sign in (1, -1):
            moved = student.copy()
            moved[index] += sign * step
            ends.append(np.sum(weights * loss(moved, teacher, labels).numpy()))
        expected[index] = (ends[0] - ends[1]) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-7)


@cases
def test_a_perfect_student_loses_nothing_and_has_no_gradient(case):
    loss, _, _, teacher, labels = CASES[case]
    found, gradient = with_gradient(lambda s: loss(s, teacher, labels), teacher)
    np.testing.assert_allclose(found, np.zeros(5), atol=1e-12)
    np.testing.assert_allclose(gradient, np.zeros(teacher.shape), atol=1e-9)


@cases
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_half_precision_goes_through_float32(case, dtype):
    loss, expected, student, teacher, labels = CASES[case]
    given = [tf.cast(values, dtype) for values in (student, teacher)]
    found = loss(*given, labels)
    assert found.dtype == tf.float32
    seen = [tf.cast(values, tf.float64).numpy() for values in given]
    np.testing.assert_allclose(found, expected(*seen, labels), rtol=2e-4, atol=1e-5)


@cases
@pytest.mark.parametrize("jit_compile", [False, True])
def test_in_a_graph_with_any_number_of_examples(case, jit_compile):
    loss, expected, student, teacher, labels = CASES[case]
    specs = [tf.TensorSpec((None, *values.shape[1:]), tf.float64) for values in (student, teacher)]
    traced = tf.function(
        lambda s, t: loss(s, t, labels), input_signature=specs, jit_compile=jit_compile
    )
    np.testing.assert_allclose(
        traced(student, teacher), expected(student, teacher, labels), rtol=1e-7
    )


@cases
def test_no_gradient_goes_to_the_teacher(case):
    loss, _, student, teacher, labels = CASES[case]
    _, gradient = with_gradient(lambda t: loss(student, t, labels), teacher)
    assert gradient is None


def test_large_logits_stay_finite():
    large = np.array([[1e4, -1e4, 0.0]])
    for loss in (losses.SoftTargets(1.0), losses.DecoupledTargets(temperature=1.0)):
        for values in with_gradient(lambda s, loss=loss: loss(s, large), -large):
            assert np.isfinite(values).all()


def test_equal_examples_have_no_distance_and_a_finite_gradient():
    teacher = normal(4, 3)
    for values in with_gradient(lambda s: losses.RelationalTargets()(s, teacher), np.ones((4, 3))):
        assert np.isfinite(values).all()


def test_maps_of_another_size_are_averaged():
    teacher, student = normal(2, 4, 6, 3), normal(2, 2, 3, 5)
    maps = (teacher**2).sum(-1).reshape(2, 2, 2, 3, 2).mean((2, 4))
    smaller = np.sqrt(maps)[..., None]  # one channel whose square is the averaged map
    found = losses.AttentionTransfer()(student, teacher)
    np.testing.assert_allclose(found, attention(student, smaller, None), rtol=1e-5)


def test_probabilities_are_as_good_as_logits_until_they_are_rounded():
    teacher, student = normal(5, 6), normal(5, 6)
    probabilities = tf.constant(softmax(teacher))
    found = losses.SoftTargets()(student, losses.logits_of(probabilities))
    np.testing.assert_allclose(found, soft_targets(student, teacher, None), rtol=1e-9)


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
def test_projections_are_linear_in_the_channels(framework):
    import importlib

    keras = importlib.import_module(framework)
    layer = losses.FeatureHint.projection(keras, (None, 4, 4, 8), (None, 4, 4, 16))
    features = normal(2, 4, 4, 8).astype(np.float32)
    found = layer(features)
    assert found.shape == (2, 4, 4, 16)
    assert len(layer.trainable_weights) == 1
    np.testing.assert_allclose(found, features @ np.asarray(layer.kernel), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"\(4, 4, 8\) \(student\) and \(2, 2, 16\) \(teacher\)"):
        losses.FeatureHint.projection(keras, (None, 4, 4, 8), (None, 2, 2, 16))


class Own(losses.DistillationLoss):
    """Of one's own: the largest difference."""

    def call(self, student, teacher, labels):
        return tf.reduce_max(tf.abs(student - teacher), -1)


def test_own_losses_are_one_small_class():
    found = Own()(tf.constant([[1.0, 5.0]], tf.bfloat16), [[2.0, 2.0]])
    np.testing.assert_array_equal(found, [3.0])
    assert found.dtype == tf.float32


@pytest.mark.parametrize("temperature", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [losses.SoftTargets, losses.DecoupledTargets])
def test_wrong_temperatures(kind, temperature):
    with pytest.raises(InputError, match="expected a number above 0"):
        kind(temperature=temperature)


def test_wrong_activation():
    with pytest.raises(InputError, match="'relu'; expected softmax or sigmoid"):
        losses.SoftTargets(activation="relu")
