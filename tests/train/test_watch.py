import importlib
import math
import warnings

import numpy as np
import pytest
import tensorflow as tf

import tfopt
from tests.train.models import FRAMEWORKS, IMAGES, LABELS, compile_, conv
from tfopt.train import gradients, watch
from tfopt.train.loss_scaling import scale_variable

HALF_NORMAL = 2.0**-14  # the smallest normal number of float16


def fit(model, callback, epochs=1, **options):
    options = {"batch_size": 8, "epochs": epochs, "verbose": 0, "shuffle": False} | options
    return model.fit(IMAGES, LABELS, callbacks=[callback], **options)


def shares_of(gradient, limit=HALF_NORMAL, scale=None):
    """Shares of one gradient, computed beside others."""
    others = [tf.zeros([3, 2]), tf.IndexedSlices(tf.ones([1, 2]), tf.constant([0]), [2, 2])]
    limits = [1.0, limit, 1.0]
    found = gradients.small_shares([others[0], gradient, others[1]], limits, scale).numpy()
    assert found[[0, 2]].tolist() == [[1, 0], [0.5, 0]]
    return found[1]


class TestCount:
    def test_by_hand(self):
        gradient = tf.constant([0.0, 2.0**-14, 2.0**-15, -(2.0**-20), 1.0, 0.0, 3.0, -4.0])
        assert shares_of(gradient).tolist() == [2 / 8, 2 / 8]
        assert gradients.is_not_finite(gradient).numpy() == 0

    def test_what_was_divided_by_the_scale_counts_as_it_was_before(self):
        scale = 1024.0
        scaled = np.array([0, 2.0**-14, 2.0**-15, -(2.0**-20), 1, 0, 3, -4])
        found = shares_of(tf.constant(scaled / scale, tf.float32), scale=scale)
        assert found.tolist() == [2 / 8, 2 / 8]

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_not_finite(self, value):
        gradient = tf.constant([[value, 0.0], [1.0, 2.0]])
        assert gradients.is_not_finite(gradient).numpy() == 1
        assert shares_of(gradient, 1e-3).tolist() == [1 / 4, 0]

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_gradients_in_half_precision(self, dtype):
        gradient = tf.constant([0.0, 2.0**-15, 1.0, 2.0], dtype)
        assert shares_of(gradient).tolist() == [0.25, 0.25]

    def test_rows_that_were_not_looked_up_are_zeros(self):
        slices = tf.IndexedSlices(
            tf.constant([[1.0, 0.0], [2.0**-15, 3.0]]), tf.constant([4, 1]), tf.constant([5, 2])
        )
        assert shares_of(slices) == pytest.approx([7 / 10, 1 / 10])
        assert gradients.is_not_finite(slices).numpy() == 0

    @pytest.mark.parametrize("shape", [(3, 3, 64, 64), (7, 1, 1000), (4096,), (4097,), (123457,)])
    def test_large_gradients_are_sampled_from_all_channels(self, shape):
        taken = gradients.sample(tf.range(math.prod(shape))).numpy()
        assert 512 < len(taken) <= gradients.SAMPLE_SIZE
        assert len(set(taken)) == len(taken)
        for axis, places in enumerate(np.unravel_index(taken, shape)):
            counts = np.bincount(places, minlength=shape[axis])
            assert counts.max() - counts.min() <= max(1, len(taken) // shape[axis] // 4)

    def test_a_sample_tells_the_share_of_all(self):
        gradient = np.random.default_rng(0).normal(size=(3, 3, 128, 128)).astype(np.float32)
        gradient[..., :32] = 0  # channels without any
        assert shares_of(tf.constant(gradient))[0] == pytest.approx(0.25, abs=0.001)


@pytest.mark.parametrize("framework", FRAMEWORKS)
class TestTraining:
    def test_same_weights_as_without(self, framework):
        models = [compile_(conv(framework), framework) for _ in range(2)]
        fit(models[0], importlib.import_module(framework).callbacks.Callback())
        fit(models[1], tfopt.PrecisionWatch())
        for first, second in zip(models[0].get_weights(), models[1].get_weights(), strict=True):
            np.testing.assert_array_equal(first, second)

    def test_shares_against_gradients_by_hand(self, framework):
        """One step of plain descent tells the gradients by the difference of the weights."""
        keras = importlib.import_module(framework)
        inputs = keras.Input((4,))
        model = keras.Model(inputs, keras.layers.Dense(2, name="only", use_bias=False)(inputs))
        model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=False)
        x = np.array([[1.0, 0.0, 2.0**-140, 2.0]], np.float32)
        before = model.get_weights()[0]
        callback = tfopt.PrecisionWatch()
        model.fit(x, np.ones((1, 2)), verbose=0, callbacks=[callback])
        # The gradient is x ⊗ (y − target): row 2 of 4 is 0, row 3 is below 2^-126.
        row = callback.layers.set_index("layer").loc["only"]
        assert np.array_equal(model.get_weights()[0][1], before[1])
        assert row.zero_gradients + row.underflowing_gradients == pytest.approx(0.5)
        assert row.zero_gradients >= 0.25
        assert row.overflow_steps == 0

    def test_logs_and_history(self, framework):
        model = tfopt.set_precision(compile_(conv(framework), framework), "mixed_float16")
        callback = tfopt.PrecisionWatch(every=2)
        logs = fit(model, callback, epochs=2).history
        scale = float(np.asarray(scale_variable(model.optimizer)))
        assert logs["loss_scale"][-1] == scale
        assert len(logs["zero_gradients"]) == 2
        assert set(callback.history) == {
            "step", "loss_scale", "overflow_steps", "zero_gradients", "underflowing_gradients",
        }  # fmt: skip
        assert list(callback.history.step) == [2, 4, 6, 8]
        assert set(callback.layers.dtype) == {"float16", "float32"}
        assert {"stem", "block3/conv1", "logits"} <= set(callback.layers.layer)
        assert callback.problem is None

    def test_loss_scale_by_hand(self, framework):
        """Steps that overflow halve the scale and are counted; the weights stay."""
        model = tfopt.set_precision(compile_(conv(framework), framework), "mixed_float16")
        before = model.get_weights()
        scale = scale_variable(model.optimizer)
        scale.assign(2.0**127)
        callback = tfopt.PrecisionWatch(every=1)
        fit(model, callback)
        assert list(callback.history.loss_scale) == [2.0**126, 2.0**125, 2.0**124, 2.0**123]
        assert list(callback.history.overflow_steps) == [1, 1, 1, 1]
        assert callback.layers.overflow_steps.max() == 4
        assert callback.problem is None
        trainable = {id(variable) for variable in model.trainable_variables}
        for variable, value in zip(model.weights, before, strict=True):
            if id(variable) in trainable:
                np.testing.assert_array_equal(np.asarray(variable), value)

    def test_growth_by_hand(self, framework):
        """A scale doubles after as many finite steps as were asked for."""
        keras = importlib.import_module(framework)
        wrapper = (
            keras.optimizers if framework == "keras" else keras.mixed_precision
        ).LossScaleOptimizer
        optimizer = wrapper(keras.optimizers.SGD(0.0), initial_scale=8.0, dynamic_growth_steps=2)
        model = tfopt.set_precision(conv(framework), "mixed_float16")
        model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False)
        callback = tfopt.PrecisionWatch(every=1)
        fit(model, callback)
        assert list(callback.history.loss_scale) == [8, 16, 16, 32]

    def test_endless_overflow_stops(self, framework):
        model = tfopt.set_precision(compile_(conv(framework), framework), "mixed_float16")
        callback = tfopt.PrecisionWatch(every=10)
        images = np.full_like(IMAGES, np.nan)
        with pytest.warns(UserWarning, match="Training was stopped.*loss scale fell"):
            history = model.fit(
                images, LABELS, batch_size=4, epochs=50, verbose=0, callbacks=[callback]
            )
        assert "loss scale fell" in callback.problem
        assert "inputs of the model hold values that are not finite" in callback.problem
        assert len(history.epoch) <= 4  # 30 steps of 8 in an epoch

    def test_values_that_are_not_finite_stop_without_scaling(self, framework):
        model = tfopt.set_precision(compile_(conv(framework), framework), "mixed_bfloat16")
        callback = tfopt.PrecisionWatch()
        images = np.full_like(IMAGES, np.nan)
        with pytest.warns(UserWarning, match="neither are the weights"):
            model.fit(images, LABELS, batch_size=8, epochs=5, verbose=0, callbacks=[callback])
        assert "lower the learning rate" in callback.problem
        assert len(model.history.epoch) == 1

    def test_gradients_that_vanish_stop(self, framework):
        keras = importlib.import_module(framework)
        model = conv(framework)
        model.compile(
            keras.optimizers.SGD(0.1), lambda y_true, y_pred: 0.0 * y_pred, jit_compile=False
        )
        callback = tfopt.PrecisionWatch(every=20)
        with pytest.warns(UserWarning, match="All gradients of the last 20 steps were 0"):
            fit(model, callback, epochs=20)
        assert len(model.history.epoch) == 5

    def test_float16_without_scaling_is_warned_of(self, framework):
        keras = importlib.import_module(framework)
        inputs = keras.Input((8, 8, 3))
        x = keras.layers.Conv2D(4, 3, dtype="mixed_float16", name="half")(inputs)
        x = keras.layers.Flatten(dtype="float32")(x)
        model = keras.Model(inputs, keras.layers.Dense(4, activation="softmax")(x))
        compile_(model, framework)
        with pytest.warns(UserWarning, match="compute in float16 and the optimizer does not scale"):
            fit(model, tfopt.PrecisionWatch())

    def test_afterwards_the_optimizer_is_as_before(self, framework):
        model = compile_(conv(framework), framework)
        optimizer = model.optimizer
        names = set(vars(optimizer))
        callback = tfopt.PrecisionWatch()
        fit(model, callback)
        steps = callback.history.step.max()
        assert set(vars(optimizer)) - names <= {"_variables", "built"} or not (
            {"apply", "apply_gradients"} & set(vars(optimizer))
        )
        model.fit(IMAGES, LABELS, verbose=0)
        assert callback.history.step.max() == steps
        fit(model, callback)  # a second time
        assert len(callback.history) == 1

    def test_a_failing_fit_can_be_repeated(self, framework):
        model = compile_(conv(framework), framework)
        keras = importlib.import_module(framework)

        class Failing(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                raise RuntimeError("planted")

        with pytest.raises(RuntimeError, match="planted"):
            model.fit(IMAGES, LABELS, verbose=0, callbacks=[tfopt.PrecisionWatch(), Failing()])
        callback = tfopt.PrecisionWatch(every=1)
        fit(model, callback)
        assert list(callback.history.step) == [1, 2, 3, 4]

    def test_the_hook_of_a_failed_fit_goes(self, framework):
        model = compile_(conv(framework), framework)
        left = tfopt.PrecisionWatch()
        left.set_model(model)
        left.on_train_begin()
        fit(model, tfopt.PrecisionWatch())
        assert left.history.empty
        assert not {"apply", "apply_gradients"} & set(vars(model.optimizer))

    @pytest.mark.parametrize("is_subclass", [False, True])
    def test_models_that_the_first_batch_builds(self, framework, is_subclass):
        keras = importlib.import_module(framework)

        class Subclass(keras.Model):
            def __init__(self):
                super().__init__()
                self.hidden = keras.layers.Dense(5, name="hidden")
                self.last = keras.layers.Dense(4, activation="softmax", name="last")

            def call(self, inputs):
                return self.last(self.hidden(inputs))

        with tfopt.precision("mixed_float16", keep_float32=["last"]):
            layers = keras.layers
            model = (
                Subclass()
                if is_subclass
                else keras.Sequential(
                    [layers.Dense(5, name="hidden"), layers.Dense(4, "softmax", name="last")]
                )
            )
        compile_(model, framework)
        callback = tfopt.PrecisionWatch(every=2)
        x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
        logs = model.fit(x, LABELS, batch_size=8, epochs=2, verbose=0, callbacks=[callback]).history
        assert list(callback.history.step) == [2, 4, 6, 8]
        assert len(logs["zero_gradients"]) == 2
        table = callback.layers.set_index("layer")
        assert table.dtype["hidden"] == "float16"
        assert table.dtype["last"] == "float32"

    def test_nothing_to_watch(self, framework):
        model = conv(framework)
        model.trainable = False
        compile_(model, framework)
        with pytest.warns(UserWarning, match="'conv', so that nothing was watched"):
            logs = fit(model, tfopt.PrecisionWatch()).history
        assert "zero_gradients" not in logs

    def test_two_uses_of_the_optimizer_in_a_step(self, framework):
        """The first layer's gradients are 0 and the second's are not, one after the other."""
        keras = importlib.import_module(framework)

        class InTurns(keras.Model):
            def train_step(self, data):
                x, y = data
                for layer in ("first", "second"):
                    variables = self.get_layer(layer).trainable_variables
                    with tf.GradientTape() as tape:
                        loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
                    pairs = zip(tape.gradient(loss, variables), variables, strict=True)
                    self.optimizer.apply_gradients(list(pairs))
                return {"loss": loss}

        inputs = keras.Input((2,))
        hidden = keras.layers.Dense(3, use_bias=False, name="first")(inputs)
        out = keras.layers.Dense(1, name="second")(hidden)
        model = InTurns(inputs, out)
        model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
        model.optimizer.build(model.trainable_variables)
        callback = tfopt.PrecisionWatch()
        zeros = np.zeros((12, 2), np.float32)
        model.fit(
            zeros, np.ones((12, 1), np.float32), batch_size=2, verbose=0, callbacks=[callback]
        )
        table = callback.layers.set_index("layer")
        assert table.zero_gradients["first"] == 1
        # Of the kernel's 3 gradients and the bias's 1 only the bias's is not 0.
        assert table.zero_gradients["second"] == pytest.approx(3 / 4)
        assert callback.history.step.max() == 12

    def test_gradients_that_tell_no_shape(self, framework):
        keras = importlib.import_module(framework)

        class ThroughPython(keras.Model):
            def train_step(self, data):
                x, y = data
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((self(x, training=True) - y) ** 2)
                variables = self.trainable_variables
                gradients = [
                    tf.numpy_function(lambda value: value, [gradient], gradient.dtype)
                    for gradient in tape.gradient(loss, variables)
                ]
                self.optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))
                return {"loss": loss}

        inputs = keras.Input((2,))
        model = ThroughPython(inputs, keras.layers.Dense(3, name="only", use_bias=False)(inputs))
        model.compile(keras.optimizers.SGD(0.0), jit_compile=False)
        callback = tfopt.PrecisionWatch()
        x = np.array([[1.0, 0.0]], np.float32)
        model.fit(x, np.ones((1, 3), np.float32), verbose=0, callbacks=[callback])
        assert callback.layers.zero_gradients.tolist() == [0.5]

    def test_double_precision(self, framework):
        keras = importlib.import_module(framework)
        inputs = keras.Input((2,), dtype="float64")
        model = keras.Model(inputs, keras.layers.Dense(1, dtype="float64")(inputs))
        model.compile("sgd", "mse", jit_compile=False)
        callback = tfopt.PrecisionWatch()
        model.fit(np.ones((4, 2)), np.zeros((4, 1)), verbose=0, callbacks=[callback])
        assert callback.layers.zero_gradients.tolist() == [0.0]

    def test_with_xla(self, framework):
        keras = importlib.import_module(framework)
        model = conv(framework)
        model.compile(
            keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", jit_compile=True
        )
        model = tfopt.set_precision(model, "mixed_bfloat16")
        callback = tfopt.PrecisionWatch(every=2)
        fit(model, callback)
        assert list(callback.history.step) == [2, 4]
        assert 0 <= callback.history.zero_gradients.iloc[0] < 1

    def test_tensorboard(self, framework, tmp_path):
        model = compile_(conv(framework), framework)
        fit(model, tfopt.PrecisionWatch(every=2, log_dir=tmp_path))
        (file,) = tmp_path.iterdir()
        tags = {
            value.tag
            for record in tf.compat.v1.train.summary_iterator(str(file))
            for value in record.summary.value
        }
        assert "precision/zero_gradients" in tags
        assert "underflowing_gradients/block3/conv1" in tags

    def test_embeddings(self, framework):
        keras = importlib.import_module(framework)
        inputs = keras.Input((3,), dtype="int32")
        x = keras.layers.Embedding(10, 4, name="words")(inputs)
        x = keras.layers.GlobalAveragePooling1D()(x)
        model = keras.Model(inputs, keras.layers.Dense(1, name="out")(x))
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
        callback = tfopt.PrecisionWatch()
        x, y = np.array([[1, 2, 3], [1, 2, 3]]), np.ones((2, 1))
        model.fit(x, y, verbose=0, callbacks=[callback])
        row = callback.layers.set_index("layer").loc["words"]
        assert row.zero_gradients == pytest.approx(0.7)  # of 10 words 3 were looked up, twice each


def test_several_devices():
    """On two processors of one machine, as on two GPUs."""
    script = """
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, tfopt
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    inputs = keras.Input((4,))
    model = keras.Model(inputs, keras.layers.Dense(2, name="only")(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
callback = tfopt.PrecisionWatch(every=2)
model.fit(np.ones((32, 4)), np.zeros((32, 2)), batch_size=8, verbose=0, callbacks=[callback])
print(list(callback.history.step), list(callback.history.overflow_steps))
print(callback._counts.of_epoch.num_steps)
"""
    import subprocess
    import sys

    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.stdout.split("\n")[-3:-1] == ["[2, 4] [0.0, 0.0]", "4"], found.stderr


@pytest.mark.parametrize("value", [0, -1])
def test_wrong_interval(value):
    with pytest.raises(tfopt.InputError, match=f"every is {value}"):
        tfopt.PrecisionWatch(every=value)


def problem(**found):
    healthy = {"bad_streak": 0, "bad": [], "zero_streak": 0, "is_float16": True, "loss_scale": 8.0}
    return watch.find_problem(**(healthy | found))


def test_problems():
    bad = [("a", "float16"), ("b", "float32"), ("a", "float16")]
    assert problem() is None
    assert problem(bad_streak=29, bad=bad) is None
    assert problem(bad_streak=30, bad=bad).startswith(
        "The gradients of a, b (float16 and float32) were not finite in the last 30 steps, and the "
        "loss scale fell to 8"
    )
    assert problem(bad_streak=2, bad=bad, loss_scale=None) is None
    assert "train in mixed_bfloat16" in problem(bad_streak=3, bad=bad, loss_scale=None)
    assert "mixed_bfloat16" not in problem(
        bad_streak=3, bad=[("a", "bfloat16")], loss_scale=None, is_float16=False
    )
    assert problem(zero_streak=19) is None
    assert "loss, which does not depend" in problem(zero_streak=20)
    assert "float16 needs loss scaling" in problem(zero_streak=20, loss_scale=None)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_vanishing_float16_gradients_without_scaling(framework):
    """A loss of 1e-12 has gradients that float16 does not have, unless it is scaled."""
    keras = importlib.import_module(framework)
    found = {}
    for loss_scale in (None, 2.0**30):
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        layer = keras.layers.Dense(3, dtype="mixed_float16", name="half")
        model = keras.Model(inputs, keras.layers.Dense(1, dtype="float32")(layer(inputs)))
        optimizer = keras.optimizers.SGD(0.0)
        if loss_scale is not None:
            home = keras.optimizers if framework == "keras" else keras.mixed_precision
            optimizer = home.LossScaleOptimizer(optimizer, initial_scale=loss_scale)
        model.compile(optimizer, lambda y_true, y_pred: 1e-12 * y_pred, jit_compile=False)
        callback = tfopt.PrecisionWatch()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0, callbacks=[callback])
        found[loss_scale] = callback.layers.set_index("layer").loc["half"].zero_gradients
    assert found == {None: 1.0, 2.0**30: 0.0}
