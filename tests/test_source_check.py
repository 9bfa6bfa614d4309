"""What Keras models become, against `predict`; and what no comparison can be made with."""

import importlib

import numpy as np
import pytest

from tfopt import dataset, live, source, source_check
from tfopt.errors import InputError

X = np.random.default_rng(0).normal(size=(24, 6)).astype(np.float32)


class Direct:
    """A worker that calls in this process."""

    def call(self, function, /, *args, **kwargs):
        return getattr(source_check, function.partition(":")[2])(*args, **kwargs)


def notes_of(model, folder, data=X):
    live.export(model, folder / "model")
    prepared = source.prepare(folder / "model", folder / "source", name="mine")
    written = dataset.write(data, prepared.signature, folder / "data")
    return source_check.check_model(Direct(), model, prepared, written)


def sequential(*layers):
    import keras

    return keras.Sequential([keras.Input((6,), name="x"), *layers, keras.layers.Dense(2)])


def test_augmentation_is_off(tmp_path):
    from keras import layers

    model = sequential(
        layers.GaussianNoise(1.0), layers.Dropout(0.5), layers.GaussianDropout(0.5),
        layers.BatchNormalization(),
    )  # fmt: skip
    assert notes_of(model, tmp_path) == ()


def test_random_outputs_are_refused(tmp_path):
    import keras

    @keras.saving.register_keras_serializable("tests")
    class Noise(keras.layers.Layer):
        def call(self, x):
            return x + keras.random.normal(keras.ops.shape(x))

    with pytest.raises(InputError, match="Two runs of mine on the same inputs differ: output"):
        notes_of(sequential(Noise()), tmp_path)


def test_outputs_that_depend_on_the_batch_are_noted(tmp_path):
    import keras

    class Centre(keras.layers.Layer):
        def call(self, x):
            return x - keras.ops.mean(x, axis=0, keepdims=True)

    (note,) = notes_of(sequential(Centre()), tmp_path)
    assert note.startswith("Outputs depend on which examples share a batch")
    # The output of every example that runs alone is the bias, which is zero.
    assert "of examples that run alone, output 'output_0' is off by 1" in note


def test_outputs_without_a_batch_dimension_depend_on_nothing(tmp_path):
    import tensorflow as tf

    module = tf.Module()
    module.anchors = tf.Variable(np.arange(64.0, dtype=np.float32).reshape(32, 2))

    @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, "x")])
    def detect(x):
        version = tf.constant(3)
        return {"anchors": module.anchors * 1.0, "y": x * 2, "version": version}

    module.detect = detect
    assert notes_of(detect, tmp_path) == ()


def test_a_predict_step_is_noted(tmp_path):
    import keras

    class Probable(keras.Sequential):
        def predict_step(self, data):
            return keras.ops.softmax(super().predict_step(data))

    model = Probable([keras.Input((6,)), keras.layers.Dense(2)], name="probable")
    (note,) = notes_of(model, tmp_path)
    assert "Model 'probable' has a predict_step of its own" in note


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
def test_stateful_layers_are_named(framework, tmp_path):
    keras = importlib.import_module(framework)
    image = keras.Input(shape=(5, 3), batch_size=1)
    hidden = keras.layers.GRU(4, stateful=True, name="memory")(image)
    model = keras.Model(image, keras.layers.Dense(1)(hidden), name="caption")
    with pytest.raises(InputError, match="Layer 'memory' of model 'caption' keeps its state"):
        live.export(model, tmp_path / "model")
    free = keras.layers.LSTM(4, name="memory")(image)
    live.export(keras.Model(image, keras.layers.Dense(1)(free)), tmp_path / "model")
