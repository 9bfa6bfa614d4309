"""Losses of pixels and tokens: the mean over those that count, with their own weights."""

import importlib

import numpy as np
import pytest
import tensorflow as tf

import tfopt
from tests.train.models import FRAMEWORKS
from tfopt.distillation import reduction

each = pytest.mark.parametrize("framework", FRAMEWORKS)

TOKENS = np.array([[3, 1, 2, 0, 0], [4, 0, 0, 0, 0], [1, 2, 3, 4, 5], [2, 2, 0, 0, 0]])
MASK = TOKENS != 0
WEIGHTS = np.random.default_rng(0).uniform(0.5, 2, TOKENS.shape).astype(np.float32)


def tagger(framework, seed):
    """Three classes for each token; 0 is padding."""
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((5,), dtype="int64")
    hidden = keras.layers.Embedding(6, 4, mask_zero=True)(inputs)
    return keras.Model(inputs, keras.layers.Dense(3, name="tags")(hidden))


def divergence(student, teacher, temperature):
    def log_softmax(logits):
        logits = logits / temperature
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    p, q = log_softmax(teacher), log_softmax(student)
    return temperature**2 * (np.exp(p) * (p - q)).sum(-1)


def outputs_of(model, x):
    return np.asarray(model(x, training=False), np.float64)


def teacher_loss(framework, models, x, y=None, weights=None, loss=True, **options):
    keras = importlib.import_module(framework)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller = tfopt.Distiller(*models, **options)
    distiller.compile(keras.optimizers.SGD(0.0), entropy if loss else None, jit_compile=False)
    history = distiller.fit(
        x, y, sample_weight=weights, batch_size=len(x), shuffle=False, verbose=0
    ).history
    return history["teacher_loss"][0]


@each
@pytest.mark.parametrize("is_weighted", [False, True])
def test_padding_teaches_nothing(framework, is_weighted):
    models = tagger(framework, 0), tagger("keras", 1)
    found = teacher_loss(
        framework, models, TOKENS, TOKENS % 3, WEIGHTS if is_weighted else None, temperature=2.0
    )
    by_token = divergence(*(outputs_of(model, TOKENS) for model in models), 2.0)
    weights = WEIGHTS if is_weighted else np.ones(MASK.shape)
    np.testing.assert_allclose(found, (by_token * weights)[MASK].sum() / MASK.sum(), rtol=1e-4)


@each
def test_a_teacher_that_differs_on_padding_only(framework):
    """However wrong it is there, the loss is 0."""
    student, teacher = tagger(framework, 0), tagger("keras", 0)
    weights = student.get_weights()
    teacher.set_weights(weights)
    odd = [value.copy() for value in weights]
    odd[0][0] += 50.0  # the vector of padding
    teacher.set_weights(odd)
    assert teacher_loss(framework, (student, teacher), TOKENS, loss=False) == pytest.approx(0)


@each
def test_labels_that_pad_teach_nothing(framework):
    """-1 beside tokens with a label is padding; an example without any is taught."""
    models = tagger(framework, 0), tagger("keras", 1)
    tokens = np.maximum(TOKENS, 1)  # nothing that Keras masks
    labels = np.where(MASK, TOKENS % 3, -1)
    labels[3] = -1
    counted = MASK.copy()
    counted[3] = True
    found = teacher_loss(framework, models, tokens, labels, temperature=2.0)
    by_token = divergence(*(outputs_of(model, tokens) for model in models), 2.0)
    np.testing.assert_allclose(found, by_token[counted].mean(), rtol=1e-4)


@each
@pytest.mark.parametrize("has_weights", [False, True])
def test_pixels_are_averaged(framework, has_weights):
    """The loss of an image does not grow with its size, so that alpha means the same."""

    def segmenter(framework, seed):
        keras = importlib.import_module(framework)
        keras.utils.set_random_seed(seed)
        inputs = keras.Input((8, 8, 2))
        return keras.Model(inputs, keras.layers.Conv2D(3, 1, name="mask")(inputs))

    x = np.random.default_rng(0).normal(size=(4, 8, 8, 2)).astype(np.float32)
    y = np.random.default_rng(1).integers(0, 3, (4, 8, 8))
    weights = (np.arange(64).reshape(8, 8) % 5 > 1).astype(np.float32)[None].repeat(4, 0)
    models = segmenter(framework, 0), segmenter("keras", 1)
    found = teacher_loss(framework, models, x, y, weights if has_weights else None)
    by_pixel = divergence(*(outputs_of(model, x) for model in models), 4.0)
    np.testing.assert_allclose(
        found, (by_pixel * (weights if has_weights else 1)).mean(), rtol=1e-4
    )


class TestMean:
    """Against sums by hand."""

    LOSSES = np.arange(12, dtype=np.float32).reshape(3, 4)

    def mean(self, weights=None, mask=None):
        given = [None if each is None else tf.constant(each) for each in (weights, mask)]
        return float(reduction.mean(tf.constant(self.LOSSES), *given))

    def test_plain(self):
        assert self.mean() == pytest.approx(5.5)

    def test_weights_of_examples_go_for_all_their_positions(self):
        weights = np.array([1.0, 0.0, 2.0], np.float32)
        assert self.mean(weights) == pytest.approx((self.LOSSES * weights[:, None]).sum() / 12)

    def test_masks(self):
        mask = self.LOSSES % 3 == 0
        assert self.mean(mask=mask) == pytest.approx(self.LOSSES[mask].mean())

    def test_nothing_left(self):
        assert self.mean(mask=np.zeros((3, 4), bool)) == 0

    def test_what_is_masked_may_be_infinite(self):
        losses = tf.constant([1.0, np.inf, np.nan])
        mask = tf.constant([True, False, False])
        assert float(reduction.mean(losses, None, mask)) == 1
