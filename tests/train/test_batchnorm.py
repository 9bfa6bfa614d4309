import importlib

import numpy as np
import pytest
import tensorflow as tf

import tfopt
from tests.train.models import FRAMEWORKS, IMAGES, LABELS, compile_, conv


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


def norm_of(model):
    return model.get_layer("block3").get_layer("norm")


def statistics(model):
    norm = norm_of(model)
    return np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)


def inputs_of_norm(model, images):
    """What goes into the normalisation, by the layers before it."""
    stem = model.get_layer("stem")(images)
    return np.asarray(model.get_layer("block3").get_layer("conv1")(stem)).astype(np.float64)


@pytest.mark.parametrize("batch_size", [32, 8, 5])
def test_statistics_are_those_of_all_examples(framework, batch_size):
    model = conv(framework)
    weights = [np.asarray(weight) for weight in model.trainable_weights]
    tfopt.reestimate_batchnorm(model, IMAGES, batch_size=batch_size)
    values = inputs_of_norm(model, IMAGES)
    mean, variance = statistics(model)
    np.testing.assert_allclose(mean, values.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(variance, values.var((0, 1, 2)), rtol=1e-3, atol=1e-6)
    for before, after in zip(weights, model.trainable_weights, strict=True):
        np.testing.assert_array_equal(np.asarray(after), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"image": IMAGES},
        lambda: [IMAGES],
        lambda: (IMAGES, LABELS),
        lambda: tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(8),
        lambda: (IMAGES[begin : begin + 8] for begin in range(0, 32, 8)),
    ],
)
def test_data_come_in_many_shapes(framework, make):
    plain, other = conv(framework), conv(framework)
    tfopt.reestimate_batchnorm(plain, IMAGES, batch_size=8)
    tfopt.reestimate_batchnorm(other, make())
    for wanted, found in zip(statistics(plain), statistics(other), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0.01, atol=1e-4)


def test_the_layer_is_as_before(framework):
    model = conv(framework)
    norm = norm_of(model)
    norm.trainable = False
    tfopt.reestimate_batchnorm(model, IMAGES)
    assert (norm.momentum, norm.trainable) == (0.99, False)
    after = statistics(model)
    model(IMAGES, training=True)  # frozen: nothing moves
    for before, now in zip(after, statistics(model), strict=True):
        np.testing.assert_array_equal(now, before)
    compile_(model, framework).fit(IMAGES, LABELS, verbose=0)


def test_dropout_is_off(framework):
    layers = importlib.import_module(framework).layers
    model = importlib.import_module(framework).Sequential(
        [layers.Input((4,)), layers.Dropout(0.9), layers.BatchNormalization(name="norm")]
    )
    values = np.random.default_rng(1).normal(size=(64, 4)).astype(np.float32)
    tfopt.reestimate_batchnorm(model, values)
    np.testing.assert_allclose(model.layers[-1].moving_variance, values.var(0), rtol=0.02)


def test_makes_a_model_of_slow_statistics_right(framework):
    """Momentum 0.999 and a few steps: inference knows next to nothing of what was learned."""
    model = compile_(conv(framework, momentum=0.999), framework)
    model.fit(IMAGES, LABELS, batch_size=32, epochs=30, verbose=0)
    by_batch = np.asarray(model(IMAGES, training=True))
    error_before = np.abs(np.asarray(model(IMAGES)) - by_batch).max()
    tfopt.reestimate_batchnorm(model, IMAGES, batch_size=32)
    error_after = np.abs(np.asarray(model(IMAGES)) - by_batch).max()
    assert error_before > 0.05
    assert error_after < 0.05 * error_before


def test_a_layer_that_is_used_twice(framework):
    keras = importlib.import_module(framework)
    a, b = keras.Input((3,), name="a"), keras.Input((3,), name="b")
    norm = keras.layers.BatchNormalization(name="norm")
    model = keras.Model([a, b], keras.layers.add([norm(a), norm(b)]))
    rng = np.random.default_rng(2)
    first, second = (rng.normal(at, 1, size=(40, 3)).astype(np.float32) for at in (0, 5))
    dataset = tf.data.Dataset.from_tensor_slices(((first, second), np.zeros(40))).batch(16)
    for data in (dataset, ((first, second), np.zeros(40)), [first, second]):
        tfopt.reestimate_batchnorm(model, data, batch_size=16)
        both = np.concatenate([first, second])
        np.testing.assert_allclose(norm.moving_mean, both.mean(0), atol=1e-4)
        np.testing.assert_allclose(norm.moving_variance, both.var(0), rtol=1e-3)


def test_masked_values_do_not_count(framework):
    keras = importlib.import_module(framework)
    model = keras.Sequential(
        [
            keras.layers.Input((5, 3)),
            keras.layers.Masking(),
            keras.layers.BatchNormalization(name="norm"),
        ]
    )
    values = np.random.default_rng(3).normal(5, 2, size=(12, 5, 3)).astype(np.float32)
    values[:6, 1:] = values[9:, 3:] = 0  # batches with few and with many
    tfopt.reestimate_batchnorm(model, values, batch_size=6)
    counted = values[np.any(values != 0, axis=-1)].astype(np.float64)
    norm = model.get_layer("norm")
    np.testing.assert_allclose(norm.moving_mean, counted.mean(0), rtol=1e-5)
    np.testing.assert_allclose(norm.moving_variance, counted.var(0), rtol=1e-4)


def test_subclasses_other_axes_and_compiled_calls(framework):
    keras = importlib.import_module(framework)

    class Own(keras.layers.BatchNormalization):
        @tf.function
        def call(self, inputs, training=None, mask=None):
            return super().call(inputs, training=training, mask=mask)

    model = keras.Sequential([keras.layers.Input((3, 7)), Own(axis=1, name="norm")])
    values = np.random.default_rng(4).normal(1, 3, size=(20, 3, 7)).astype(np.float32)
    tfopt.reestimate_batchnorm(model, values, batch_size=8)
    norm = model.get_layer("norm")
    np.testing.assert_allclose(norm.moving_mean, values.mean((0, 2)), rtol=1e-4)
    np.testing.assert_allclose(norm.moving_variance, values.var((0, 2)), rtol=1e-4)
    assert not tf.config.functions_run_eagerly()


class TestMistakes:
    def test_nothing_to_estimate(self, framework):
        keras = importlib.import_module(framework)
        model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)], name="plain")
        with pytest.raises(tfopt.InputError, match="'plain' has no batch normalisation"):
            tfopt.reestimate_batchnorm(model, np.zeros((4, 4)))

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            (IMAGES[:0], "have 0 examples"),
            (np.full((4, 8, 8, 3), np.nan, np.float32), "'norm' are not finite"),
        ],
    )
    def test_leaves_the_model_as_it_was(self, framework, data, message):
        model = conv(framework)
        before = statistics(model)
        with pytest.raises(tfopt.InputError, match=message):
            tfopt.reestimate_batchnorm(model, data)
        for wanted, found in zip(before, statistics(model), strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert norm_of(model).momentum == 0.99
