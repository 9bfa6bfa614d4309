import importlib

import numpy as np
import pytest
import tensorflow as tf

import tfopt
from tests.train.models import FRAMEWORKS, IMAGES, conv
from tfopt.distillation.losses import logits_of
from tfopt.distillation.teacher import Teacher

each = pytest.mark.parametrize("framework", FRAMEWORKS)


def dense(framework="keras", activation=None, units=3, size=4):
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(0)
    inputs = keras.Input((size,), name="x")
    return keras.Model(inputs, keras.layers.Dense(units, activation=activation)(inputs))


def by_hand(model, x):
    kernel, bias = (np.asarray(value, np.float64) for value in model.get_weights())
    return x @ kernel + bias


X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """One softmax model in all forms, and its logits on X."""
    folder = tmp_path_factory.mktemp("teachers")
    model = dense(activation="softmax")
    model.save(folder / "model.keras")
    model.export(folder / "saved_model", verbose=False)
    for runtime in ("litert", "onnxruntime", "tensorflow"):
        tfopt.convert(model, f"float32@{runtime}", folder / runtime)
    return folder, by_hand(model, X)


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    "form", ["model.keras", "saved_model", "litert", "onnxruntime", "tensorflow"]
)
@pytest.mark.parametrize("is_graph", [False, True])
def test_every_kind_of_model(kept, form, is_graph):
    folder, expected = kept
    teacher = Teacher(folder / form)
    assert teacher.is_in_graph == (form in ("model.keras", "saved_model"))
    (activation,) = teacher.examine(X)
    assert activation == "softmax"

    def run(batch):
        taught = teacher(batch)
        return taught.outputs[0], teacher.logits(taught, [activation])[0]

    outputs, logits = (tf.function(run) if is_graph else run)(tf.constant(X))
    assert outputs.shape == (6, 3)
    np.testing.assert_allclose(outputs, softmax(expected), atol=1e-5)
    # Only Keras tells the logits themselves; others are the same but for a constant an example.
    shift = 0.0 if form == "model.keras" else (np.asarray(logits) - expected)[:, :1]
    np.testing.assert_allclose(np.asarray(logits) - shift, expected, atol=1e-4)


@pytest.mark.parametrize("form", ["model.keras", "saved_model"])
def test_with_xla(kept, form):
    folder, expected = kept
    teacher = Teacher(folder / form)
    run = tf.function(lambda batch: teacher(batch).outputs[0], jit_compile=True)
    np.testing.assert_allclose(run(tf.constant(X)), softmax(expected), atol=1e-5)


def test_sessions(kept):
    folder, expected = kept
    with tfopt.load(folder / "litert") as session:
        found = Teacher(session)(X).outputs[0]
        np.testing.assert_allclose(found, softmax(expected), atol=1e-5)


def test_sessions_that_insist_on_a_batch_size(tmp_path):
    keras = importlib.import_module("keras")
    inputs = keras.Input((4,), batch_size=4)
    model = keras.Model(inputs, keras.layers.Dense(3)(inputs))
    tfopt.convert(model, "float32@litert", tmp_path / "four", batch_size=4)
    teacher = Teacher(tmp_path / "four")
    np.testing.assert_allclose(teacher(X).outputs[0], by_hand(model, X), atol=1e-5)


@each
@pytest.mark.parametrize(
    ("activation", "units", "expected"),
    [(None, 3, "linear"), ("softmax", 3, "softmax"), ("sigmoid", 3, "sigmoid"),
     ("sigmoid", 1, "sigmoid")],
)  # fmt: skip
def test_what_outputs_hold(framework, activation, units, expected):
    model = dense(framework, activation, units)
    teacher = Teacher(model)
    assert teacher.examine(X) == (expected,)
    (logits,) = teacher.logits(teacher(X), [expected])
    np.testing.assert_allclose(logits, by_hand(model, X), atol=1e-5)


@each
def test_preprocessing_and_input_size(framework):
    """A teacher of half the size that wants values from 0 to 1."""
    keras = importlib.import_module(framework)
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, keras.layers.Flatten()(inputs))
    images = (IMAGES * 255).astype(np.uint8)
    found = Teacher(model, preprocessing=lambda x: x / 255.0)(images).outputs[0]
    # Bilinear at half the size is the mean of the four pixels around.
    means = images.reshape(32, 4, 2, 4, 2, 3).astype(np.float64).mean((2, 4)) / 255
    np.testing.assert_allclose(found, means.reshape(32, -1), atol=1e-5)


@each
def test_an_input_size_that_is_asked_for(framework):
    keras = importlib.import_module(framework)
    inputs = keras.Input((None, None, 3))
    model = keras.Model(inputs, keras.layers.Rescaling(1.0)(inputs))
    assert Teacher(model)(IMAGES).outputs[0].shape == (32, 8, 8, 3)
    assert Teacher(model, input_size=(2, 4))(IMAGES).outputs[0].shape == (32, 2, 4, 3)


@each
def test_channels_first_are_no_sizes(framework):
    keras = importlib.import_module(framework)
    inputs = keras.Input((3, 8, 8))
    model = keras.Model(inputs, keras.layers.Rescaling(1.0)(inputs))
    teacher = Teacher(model, preprocessing=lambda x: tf.transpose(x, [0, 3, 1, 2]))
    np.testing.assert_allclose(teacher(IMAGES).outputs[0], IMAGES.transpose(0, 3, 1, 2))


@each
def test_several_inputs_and_outputs(framework, tmp_path):
    keras = importlib.import_module(framework)
    inputs = {name: keras.Input((2,), name=name) for name in ("a", "b")}
    outputs = [
        keras.layers.Rescaling(2.0)(inputs["a"]),
        keras.layers.Rescaling(3.0)(inputs["b"]),
    ]
    model = keras.Model(inputs, outputs)
    model.export(tmp_path / "saved")
    data = {name: np.full((3, 2), value, np.float32) for name, value in (("a", 1), ("b", 10))}
    for teacher in (Teacher(model), Teacher(tmp_path / "saved")):
        assert len(teacher(data).heads.names) == 2
        assert teacher.examine(data) == ("linear", "linear")
        assert [float(found[0, 0]) for found in teacher(data).outputs] == [2, 30]
    teacher = Teacher(tmp_path / "saved")
    with pytest.raises(tfopt.InputError, match=r"saved takes 2 inputs by name.* a, b"):
        teacher(data["a"])
    with pytest.raises(tfopt.InputError, match="got inputs a; expected a, b"):
        teacher({"a": data["a"]})


@each
def test_features(framework):
    model = conv(framework)
    taught = Teacher(model, features=["block3/conv1", "hidden"])(IMAGES)
    assert list(taught.features) == ["block3/conv1", "hidden"]
    assert taught.features["hidden"].shape == (32, 16)


@each
def test_no_gradient_goes_into_the_teacher(framework):
    model = conv(framework)
    teacher = Teacher(model, features=["hidden"])
    before = model.get_weights()
    with tf.GradientTape() as tape:
        taught = teacher(IMAGES)
        logits = teacher.logits(taught, ["softmax"])
        loss = tf.add_n([tf.reduce_sum(x) for x in (*logits, *taught.features.values())])
    assert all(found is None for found in tape.gradient(loss, model.trainable_variables))
    for one, other in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_logits_of_sigmoid():
    logits = np.array([[-3.0, 0.0, 4.0]])
    found = logits_of(tf.constant(1 / (1 + np.exp(-logits))), "sigmoid")
    np.testing.assert_allclose(found, logits, rtol=1e-6)
    assert np.isfinite(logits_of(tf.constant([[0.0, 1.0]]), "sigmoid")).all()


@each
def test_values_that_are_not_finite(framework):
    model = dense(framework)
    model.set_weights([np.full((4, 3), np.nan), np.zeros(3)])
    with pytest.raises(tfopt.InputError, match=r"Output .* not finite in 100.0%"):
        Teacher(model).examine(X)


@each
def test_examples_that_do_not_fit(framework):
    with pytest.raises(tfopt.InputError, match="cannot run on the student's examples"):
        Teacher(dense(framework)).examine(np.ones((2, 7), np.float32))


def test_wrong_arguments(kept, tmp_path):
    folder, _ = kept
    with pytest.raises(tfopt.InputError, match="weight of a teacher is 0"):
        Teacher(dense(), weight=0)
    with pytest.raises(tfopt.InputError, match="The teacher is a int"):
        Teacher(3)
    with pytest.raises(tfopt.InputError, match="no layers to tap"):
        Teacher(folder / "saved_model", features=["hidden"])
    with pytest.raises(tfopt.InputError, match="No model at"):
        Teacher(tmp_path / "nothing")
    with pytest.raises(tfopt.InputError, match="serving_default"):
        Teacher(folder / "saved_model", signature="other")
    bare = tmp_path / "model.tflite"
    bare.write_bytes(b"")
    with pytest.raises(tfopt.InputError, match="--variant=float32@litert"):
        Teacher(bare)
