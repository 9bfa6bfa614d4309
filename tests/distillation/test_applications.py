"""Students that `keras.applications` makes."""

import importlib

import numpy as np
import pytest

import tfopt
from tests.goldens import GOLDENS
from tests.train.models import FRAMEWORKS
from tfopt.distillation.students import make_student

each = pytest.mark.parametrize("framework", FRAMEWORKS)


def scaled_teacher(keras, shape=(32, 32, 3)):
    new = keras.layers
    image = keras.Input(shape)
    norm = new.Normalization(mean=[0.4, 0.5, 0.6][: shape[-1]], variance=[0.04] * shape[-1])
    x = new.GlobalAveragePooling2D()(norm(new.Rescaling(1 / 255)(image)))
    return keras.Model(image, new.Dense(7, activation="softmax")(x))


@pytest.mark.parametrize(("framework", "teachers"), [("keras", "tf_keras"), ("tf_keras", "keras")])
def test_applications_see_what_the_teacher_sees(framework, teachers):
    keras = importlib.import_module(framework)
    teacher = scaled_teacher(importlib.import_module(teachers))
    student = make_student("MobileNetV2(alpha=0.35)", teacher, framework=framework)
    assert student.output_shape == (None, 7)
    bare = keras.applications.MobileNetV2(
        alpha=0.35, weights=None, input_shape=(32, 32, 3), classes=7, classifier_activation=None
    )
    bare.set_weights(student.get_weights())
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    seen = ((images / 255 - [0.4, 0.5, 0.6]) / 0.2).astype(np.float32)
    np.testing.assert_allclose(student(images), bare(seen), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("framework", "name"), [("keras", "EfficientNetB0"), ("tf_keras", "MobileNetV3Small")]
)
def test_applications_without_their_own_preprocessing(framework, name):
    student = make_student(name, input_shape=(32, 32, 1), num_classes=3, framework=framework)
    assert student.output_shape == (None, 3)
    assert not [n for n in student.layers if type(n).__name__ in ("Rescaling", "Normalization")]
    images = np.random.default_rng(0).uniform(size=(2, 32, 32, 1)).astype(np.float32)
    assert np.isfinite(np.asarray(student(images))).all()


def test_applications_with_their_own_preprocessing():
    import keras

    spec = "MobileNetV3Small(include_preprocessing=True,minimalistic=True)"
    student = make_student(spec, scaled_teacher(keras))
    scales = [layer.scale for layer in student.layers if type(layer).__name__ == "Rescaling"]
    assert 1 / 127.5 in scales
    assert 1 / 255 not in scales


@each
def test_pretrained_applications(framework, tmp_path, monkeypatch):
    """With weights the application's own preprocessing is inside; here those of a file."""
    keras = importlib.import_module(framework)
    build = keras.applications.MobileNetV2
    base = build(
        alpha=0.35, include_top=False, pooling="avg", weights=None, input_shape=(32, 32, 3)
    )
    monkeypatch.chdir(tmp_path)
    base.save_weights("own.weights.h5")
    student = make_student(
        "MobileNetV2(alpha=0.35,weights=own.weights.h5)",
        input_shape=(32, 32, 3),
        num_classes=4,
        framework=framework,
    )
    images = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)
    kernel, bias = (np.asarray(weight) for weight in student.layers[-1].get_weights())
    expected = np.asarray(base(images / 127.5 - 1)) @ kernel + bias
    np.testing.assert_allclose(student(images), expected, rtol=1e-3, atol=1e-5)


def test_applications_that_do_not_fit():
    import keras

    with pytest.raises(tfopt.InputError, match=r"ResNet50 cannot be built .*\(28, 28, 1\).*32x32"):
        make_student("ResNet50", input_shape=(28, 28, 1), num_classes=3)
    with pytest.raises(tfopt.InputError, match=r"MobileNetV2 cannot .*must have 3 channels"):
        make_student("MobileNetV2(weights=imagenet)", input_shape=(32, 32, 1), num_classes=3)
    two_inputs = GOLDENS["two_inputs"].build()
    with pytest.raises(tfopt.InputError, match=r"the teacher has 2 inputs; give input_shape"):
        make_student("MobileNetV2", two_inputs)
    inputs = keras.Input((32, 32, 3))
    segmentation = keras.Model(inputs, keras.layers.Conv2D(2, 1)(inputs))
    with pytest.raises(tfopt.InputError, match=r"logits of shape \(classes,\).*\(32, 32, 2\)"):
        make_student("MobileNetV2", segmentation)


@pytest.mark.parametrize("spec", ["teacher(width=0.5)", "teacher(depth=0.5)"])
def test_applications_as_teachers(spec):
    import keras

    teacher = keras.applications.MobileNetV3Small(
        weights=None, input_shape=(32, 32, 3), classes=5, minimalistic=True
    )
    student = make_student(spec, teacher)
    assert student.output_shape == (None, 5)
    assert student.count_params() < 0.9 * teacher.count_params()
    assert np.isfinite(np.asarray(student(np.ones((1, 32, 32, 3), np.float32)))).all()
