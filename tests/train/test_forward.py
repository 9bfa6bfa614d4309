"""Models that overflow in float16 at a place that is known, found by training them."""

import importlib

import numpy as np
import pytest
import tensorflow as tf

import tfopt
from tests.train.models import FRAMEWORKS
from tfopt.train.layers import framework_of

each = pytest.mark.parametrize("framework", FRAMEWORKS)
pytestmark = pytest.mark.filterwarnings("ignore:mixed_", "ignore:Training was stopped")

X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
Y = np.arange(64) % 3


def trained(framework, layers, x=X, keep=(), every=5, epochs=12, **options):
    """What `PrecisionWatch` says about a model of these layers."""
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(x.shape[1:]), *layers(keras.layers)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-3), loss, **{"jit_compile": False, **options})
    half = tfopt.set_precision(model, "mixed_float16", list(keep))
    watch = tfopt.PrecisionWatch(every=every)
    half.fit(x, Y[: len(x)], batch_size=16, epochs=epochs, verbose=0, callbacks=[watch])
    assert not any("call" in vars(layer) for layer in half.layers)
    assert "train_step" not in vars(half)
    return watch.problem


def exponential(layers):
    base = type(layers.Dense(1)).__mro__[1]

    class Exponential(base):
        def call(self, inputs):
            return 1e-5 * tf.exp(12.0 + 0.0 * inputs)  # 1.6e5 in between

    return [
        layers.Dense(5, name="first"),
        Exponential(name="exponential"),
        layers.Dense(4, name="after"),
        layers.Dense(3, name="logits", dtype="float32"),
    ]


def variance(layers):
    base = type(layers.Dense(1)).__mro__[1]

    class Normalized(base):
        def call(self, inputs):
            centred = inputs - tf.reduce_mean(inputs, -1, keepdims=True)
            return centred / tf.sqrt(tf.reduce_mean(centred**2, -1, keepdims=True) + 1e-9)

    return [
        layers.Dense(4, name="first"),
        # All equal, so that the variance is 0 and 1e-9 is 0 in float16.
        layers.Dense(4, name="flat", kernel_initializer="zeros"),
        Normalized(name="normalized"),
        layers.Dense(3, name="logits", dtype="float32"),
    ]


@each
@pytest.mark.parametrize(
    ("layers", "culprit"), [(exponential, "exponential"), (variance, "normalized")]
)
def test_the_first_layer_that_overflows_is_named(framework, layers, culprit):
    problem = trained(framework, layers)
    assert f"first output that is not finite is that of layer '{culprit}'" in problem
    assert f"keep_float32=['{culprit}']" in problem
    assert "after" not in problem.partition("first output")[2]
    assert trained(framework, layers, keep=[culprit]) is None


def test_with_xla():
    problem = trained("keras", exponential, jit_compile=True)
    assert "is that of layer 'exponential'" in problem


def dense(layers):
    return [layers.Dense(4, name="first"), layers.Dense(3, name="logits", dtype="float32")]


@each
def test_inputs_that_float16_does_not_have_are_named(framework):
    x = X.copy()
    x[3, 2] = 70_000.0  # in one batch of four
    problem = trained(framework, dense, x, epochs=30)
    assert "inputs of the model go up to 7e+04, and float16 ends at 65504" in problem
    assert "'first'" in problem


@each
def test_large_values_between_layers(framework):
    """Finite in float32, where the first layer computes, and too large for the second."""

    def layers(new):
        return [
            new.Dense(4, name="first", kernel_initializer="ones", dtype="float32"),
            new.Dense(4, name="second"),
            new.Dense(3, name="logits", dtype="float32"),
        ]

    problem = trained(framework, layers, np.full_like(X, 60_000.0), keep=["first"])
    assert "What goes into layer 'second' (Dense, float16) is the first" in problem


@each
def test_data_that_are_not_finite_are_named(framework):
    x = X.copy()
    x[::16] = np.inf
    problem = trained(framework, dense, x, epochs=30)
    assert "inputs of the model hold values that are not finite" in problem


@each
def test_a_loss_that_is_not_finite_blames_no_layer(framework):
    keras = importlib.import_module(framework)
    model = keras.Sequential([keras.Input((6,)), *dense(keras.layers)])
    model.compile(
        keras.optimizers.SGD(1e-3),
        lambda y, p: tf.reduce_sum(p, -1) / tf.zeros_like(p[:, 0]),
        jit_compile=False,
    )
    half = tfopt.set_precision(model, "mixed_float16")
    watch = tfopt.PrecisionWatch(every=5)
    half.fit(X, Y, batch_size=16, epochs=12, verbose=0, callbacks=[watch])
    assert "outputs of all layers are finite" in watch.problem
    assert "keep_float32" not in watch.problem


@each
def test_the_last_batch_may_be_the_one_that_shows_it(framework):
    # 30 steps that overflow, and no other batch to look at.
    problem = trained(framework, dense, np.full_like(X[:16], np.nan), every=30, epochs=30)
    assert "loss scale fell" in problem


def own_step(keras, is_scaled):
    class Own(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
                scaled = loss
                if is_scaled and keras.__name__ == "keras":
                    scaled = self.optimizer.scale_loss(loss)
                elif is_scaled:
                    scaled = self.optimizer.get_scaled_loss(loss)
            gradients = tape.gradient(scaled, self.trainable_variables)
            if is_scaled and keras.__name__ != "keras":
                gradients = self.optimizer.get_unscaled_gradients(gradients)
            self.optimizer.apply_gradients(
                list(zip(gradients, self.trainable_variables, strict=True))
            )
            return {"loss": loss}

    class Silent(keras.Model):
        def train_step(self, data):
            x, y = data
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(self(x, training=True) - y))
            gradients = tape.gradient(loss, self.trainable_variables)
            self.optimizer.apply_gradients(
                list(zip(gradients, self.trainable_variables, strict=True))
            )
            return {"loss": loss}

    cls = Own if is_scaled else Silent
    inputs = keras.Input((6,))
    hidden = keras.layers.Dense(4, name="hidden")(inputs)
    return cls(inputs, keras.layers.Dense(1, name="out", dtype="float32")(hidden))


class TestOwnTrainSteps:
    @each
    @pytest.mark.parametrize(
        ("precision", "is_scaled"),
        [("mixed_float16", False), ("mixed_float16", True), ("mixed_bfloat16", False)],
    )
    def test_are_warned_of_once(self, framework, precision, is_scaled, recwarn):
        keras = importlib.import_module(framework)
        model = own_step(keras, is_scaled)
        model.compile(keras.optimizers.SGD(0.1), jit_compile=False)
        half = tfopt.set_precision(model, precision)
        watch = tfopt.PrecisionWatch()
        half.fit(X, np.ones((64, 1), np.float32), verbose=0, callbacks=[watch])
        told = [str(each.message) for each in recwarn if "train_step" in str(each.message)]
        assert len(told) == (precision == "mixed_float16" and not is_scaled)
        name = "scale_loss" if framework == "keras" else "get_scaled_loss"
        assert all(name in text and "Silent" in text for text in told)

    @each
    @pytest.mark.parametrize("is_compiled_inside", [False, True])
    def test_in_a_scope(self, framework, is_compiled_inside, recwarn):
        keras = importlib.import_module(framework)
        with tfopt.precision("mixed_float16", keep_float32=["out"]):
            model = own_step(keras, False)
            if is_compiled_inside:
                model.compile(keras.optimizers.SGD(0.1))
        assert framework_of(model) is keras
        told = [str(each.message) for each in recwarn if "train_step" in str(each.message)]
        assert len(told) == 1
