import importlib
import threading

import numpy as np
import pytest
import tensorflow as tf

import tfopt
from tests.train.models import FRAMEWORKS, IMAGES, conv
from tfopt.distillation import taps

NAMES = ["block3/conv1", "hidden", "block3"]

each = pytest.mark.parametrize("framework", FRAMEWORKS)


def by_hand(model, framework, name):
    """A second model that ends at the layer, as Keras has it."""
    keras = importlib.import_module(framework)
    if name == "hidden":
        return keras.Model(model.input, model.get_layer(name).output)(IMAGES)
    stem = keras.Model(model.input, model.get_layer("stem").output)(IMAGES)
    block = model.get_layer("block3")
    return block(stem) if name == "block3" else block.get_layer("conv1")(stem)


@each
@pytest.mark.parametrize("mode", ["eager", "graph", "xla"])
def test_features_against_models_that_end_there(framework, mode):
    model = conv(framework)
    tapped = taps.TappedModel(model, NAMES)
    run = tapped if mode == "eager" else tf.function(tapped, jit_compile=mode == "xla")
    outputs, features = run(tf.constant(IMAGES))
    np.testing.assert_allclose(outputs, model(IMAGES), rtol=1e-5, atol=1e-6)
    assert list(features) == NAMES
    for name, found in features.items():
        expected = np.asarray(by_hand(model, framework, name))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@each
def test_the_model_runs_once_and_stays_as_it_was(framework):
    keras = importlib.import_module(framework)

    class Counting(keras.layers.Layer):
        num_runs = 0

        def call(self, inputs):
            self.num_runs += 1
            return 2.0 * inputs

    inputs = keras.Input((3,))
    layer = Counting(name="counting")
    model = keras.Model(inputs, keras.layers.Dense(2)(layer(inputs)))
    before = layer.num_runs
    _, features = taps.TappedModel(model, ["counting"])(np.ones((1, 3), np.float32))
    assert layer.num_runs - before == 1
    assert np.asarray(features["counting"]).tolist() == [[2, 2, 2]]
    assert "call" not in vars(layer)


@each
def test_after_an_error_the_model_is_as_it_was(framework):
    model = conv(framework)
    with pytest.raises(Exception, match=r"(?i)shape|dimension|incompatible"):
        taps.TappedModel(model, NAMES)(np.ones((1, 8, 8, 5), np.float32))
    assert all("call" not in vars(taps.find_layer(model, name)) for name in NAMES)


@each
def test_two_taps_on_one_model(framework):
    model = conv(framework)
    outer, inner = (taps.TappedModel(model, ["hidden"]) for _ in range(2))
    with outer._listening():
        outer._made.of_run = {"hidden": []}
        _, features = inner(IMAGES)
        assert outer._made.of_run["hidden"][0] is features["hidden"]
        inner(IMAGES)
        assert len(outer._made.of_run["hidden"]) == 2
    assert "call" not in vars(model.get_layer("hidden"))


@each
def test_gradients_go_through_features(framework):
    model = conv(framework)
    tapped = taps.TappedModel(model, ["stem"])
    stem = model.get_layer("stem")
    with tf.GradientTape() as tape:
        _, features = tapped(tf.constant(IMAGES), training=True)
        loss = tf.reduce_sum(features["stem"] ** 2)
    found = tape.gradient(loss, stem.trainable_weights)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(stem(tf.constant(IMAGES)) ** 2)
    for one, other in zip(found, tape.gradient(loss, stem.trainable_weights), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)


@each
def test_training_reaches_the_model(framework):
    model = conv(framework)
    outputs, _ = taps.TappedModel(model, ["block3/norm"])(IMAGES, training=True)
    assert not np.allclose(outputs, conv(framework)(IMAGES), atol=1e-4)


@each
def test_replicas_that_take_turns(framework):
    """Two threads are inside the model at once."""
    keras = importlib.import_module(framework)
    both = threading.Barrier(2, timeout=60)

    class Waiting(keras.layers.Layer):
        is_waiting = False

        def call(self, inputs):
            if self.is_waiting:
                both.wait()
            return inputs

    inputs = keras.Input((1,))
    waiting = Waiting(name="first")
    x = keras.layers.Rescaling(2.0, name="double")(waiting(inputs))
    model = keras.Model(inputs, Waiting(name="last")(x))
    waiting.is_waiting = model.get_layer("last").is_waiting = True
    tapped = taps.TappedModel(model, ["double"])
    found = {}

    def run(value):
        found[value] = np.asarray(tapped(np.full((1, 1), value, np.float32))[1]["double"])

    threads = [threading.Thread(target=run, args=(value,)) for value in (1.0, 5.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {value: array.item() for value, array in found.items()} == {1.0: 2.0, 5.0: 10.0}
    assert "call" not in vars(model.get_layer("double"))


@each
def test_subclassed_models(framework):
    keras = importlib.import_module(framework)

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.hidden = keras.layers.Dense(3, name="hidden")
            self.out = keras.layers.Dense(1, name="out")

        def call(self, inputs):
            return self.out(self.hidden(inputs))

    model = Own()
    model(np.ones((2, 4), np.float32))
    _, features = taps.TappedModel(model, ["hidden"])(np.ones((2, 4), np.float32))
    assert features["hidden"].shape == (2, 3)


@each
def test_wrong_names(framework):
    keras = importlib.import_module(framework)
    model = conv(framework)
    with pytest.raises(tfopt.InputError, match=r"no layer 'block3/conv'.*such as block3/conv1"):
        taps.TappedModel(model, ["block3/conv"])
    with pytest.raises(tfopt.InputError, match=r"no layer '~~~~'; .* such as stem, block3, "):
        taps.TappedModel(model, ["~~~~"])
    assert taps.find_layer(model, "conv1") is taps.find_layer(model, "block3/conv1")
    inputs = keras.Input((8, 8, 3))
    blocks = [keras.Sequential([keras.layers.ReLU(name="same")], name=name) for name in "ab"]
    twice = keras.Model(inputs, blocks[1](blocks[0](inputs)))
    with pytest.raises(tfopt.InputError, match=r"2 layers .* 'same'; .* a/same, b/same"):
        taps.TappedModel(twice, ["same"])


@each
def test_layers_that_run_twice(framework):
    keras = importlib.import_module(framework)
    inputs = keras.Input((3,))
    layer = keras.layers.Dense(3, name="shared")
    model = keras.Model(inputs, layer(layer(inputs)))
    with pytest.raises(tfopt.InputError, match="'shared' runs 2 times"):
        taps.TappedModel(model, ["shared"])(np.ones((1, 3), np.float32))


@each
def test_layers_that_make_several_tensors(framework):
    keras = importlib.import_module(framework)
    inputs = keras.Input((3, 2))
    sequence, state = keras.layers.GRU(4, return_sequences=True, return_state=True, name="gru")(
        inputs
    )
    model = keras.Model(inputs, [sequence, state])
    with pytest.raises(tfopt.InputError, match="'gru' makes 2 tensors"):
        taps.TappedModel(model, ["gru"])(np.ones((1, 3, 2), np.float32))


@each
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("is_layer", [True, False])
@pytest.mark.parametrize("is_graph", [True, False])
def test_logits_under_probabilities(framework, activation, is_layer, is_graph):
    keras = importlib.import_module(framework)
    inputs = keras.Input((3,))
    x = keras.layers.Dense(4, name="logits", activation=None if is_layer else activation)(inputs)
    model = keras.Model(inputs, keras.layers.Activation(activation)(x) if is_layer else x)
    data = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)

    def run(batch):
        return taps.logits_under(model(batch))

    found = (tf.function(run) if is_graph else run)(tf.constant(data))
    kernel, bias = (np.asarray(value) for value in model.get_layer("logits").get_weights())
    np.testing.assert_allclose(found, data @ kernel + bias, rtol=1e-5, atol=1e-6)


@each
def test_outputs_without_probabilities(framework):
    keras = importlib.import_module(framework)
    inputs = keras.Input((3,))
    model = keras.Model(inputs, keras.layers.Dense(4)(inputs))
    assert taps.logits_under(model(np.ones((1, 3), np.float32))) is None
