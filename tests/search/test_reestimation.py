"""New statistics of batch normalisation are offered where they are seen to win accuracy back."""

import dataclasses
import importlib

import numpy as np
import pytest
import tensorflow as tf

import tfopt
from tfopt import dataset, live, source
from tfopt.errors import ConversionError
from tfopt.search import reestimation
from tfopt.search.reestimation import MIN_SHIFT, Gain
from tfopt.signature import Signature, TensorSpec
from tfopt.train.batchnorm import has_batchnorm, largest_shift

OTHER = Signature("serve", (TensorSpec("x", (None, 5, 6, 3), "float32"),), ())
QUICK = {"num_threads": 1, "quiet": True, "max_timing_s": 0.2}
IMAGES = np.random.default_rng(0).normal(1, 2, (600, 6, 6, 3)).astype(np.float32)


def network(framework, spoiled):
    """A small network whose statistics are those of `IMAGES`, or far from them; and its labels."""
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(1)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3), name="image"),
            layers.Conv2D(8, 3, name="conv"),
            layers.BatchNormalization(name="norm"),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(4, name="logits"),
        ]
    )
    tfopt.reestimate_batchnorm(model, IMAGES)
    labels = np.asarray(model(IMAGES)).argmax(-1)
    if spoiled:
        norm = model.get_layer("norm")
        norm.moving_mean.assign_add(np.linspace(-4, 4, 8, dtype=np.float32))
        norm.moving_variance.assign(norm.moving_variance * 30.0)
    return model, labels


def search(model, labels, folder):
    return tfopt.optimize(
        model,
        (IMAGES, labels),
        tfopt.Budget(0.05),
        folder,
        variants=["float32@tensorflow"],
        **QUICK,
    )


def test_offered_for_a_model_in_memory_which_stays_as_it_is(tmp_path):
    model, labels = network("tf_keras", spoiled=True)
    weights = [np.array(weight) for weight in model.get_weights()]
    result = search(model, labels, tmp_path / "out")
    before = result.table.set_index("variant").loc["float32@tensorflow"].accuracy
    assert before < 0.9
    assert "Statistics of batch normalisation lag behind: those of norm are" in result.summary
    assert f"instead of {before:.4g}" in result.summary
    assert "call tfopt.reestimate_batchnorm(model, data)" in result.summary
    for weight, old in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(weight, old)
    # What was offered holds: the call wins as much, on these and the same examples.
    tfopt.reestimate_batchnorm(model, IMAGES)
    assert (np.asarray(model(IMAGES)).argmax(-1) == labels).mean() > 0.97


def test_offered_for_a_file_and_remembered(tmp_path):
    model, labels = network("keras", spoiled=True)
    model.save(tmp_path / "model.keras")
    first = search(tmp_path / "model.keras", labels, tmp_path / "out")
    assert "lag behind" in first.summary
    assert not list((tmp_path / "out" / "source" / "reestimated").iterdir())
    again = tfopt.optimize(
        tmp_path / "model.keras", (IMAGES, labels), tfopt.Budget(0.05), tmp_path / "out",
        variants=["float32@tensorflow"], resume=True, **QUICK,
    )  # fmt: skip
    assert again.summary == first.summary


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_new_source_only_where_statistics_move(framework, precision, tmp_path):
    for spoiled in (False, True):
        folder = tmp_path / str(spoiled)
        model, labels = network(framework, spoiled)
        live.export(model, folder / "export")
        before = source.prepare(folder / "export", folder / "before")
        data = dataset.write((IMAGES, labels), before.signature, folder / "data")
        found = reestimation.reestimate(model, before, data, precision, folder / "after")
        assert (found is not None) == spoiled
    assert found.layer == "norm"
    assert found.source.signature == before.signature
    assert found.source.sha256 != before.sha256
    loaded = tf.saved_model.load(str(found.source.path)).signatures["serving_default"]
    outputs = loaded(**{before.signature.inputs[0].name: tf.constant(IMAGES)})
    logits = next(iter(outputs.values())).numpy()
    assert logits.dtype == np.float32
    spoiled_accuracy = (np.asarray(model(IMAGES)).argmax(-1) == labels).mean()
    assert (logits.argmax(-1) == labels).mean() > max(0.9, spoiled_accuracy + 0.05)


def test_what_does_not_run_is_told(tmp_path):
    """Images of another size than the last layer was made for."""
    model, labels = network("keras", spoiled=True)
    live.export(model, tmp_path / "export")
    before = source.prepare(tmp_path / "export", tmp_path / "before")
    data = dataset.write((IMAGES[:, :5], labels), OTHER, tmp_path / "data")
    with pytest.raises(ConversionError):
        reestimation.reestimate(
            model, dataclasses.replace(before, signature=OTHER), data, "float32", tmp_path / "new"
        )


def test_models_that_have_none(tmp_path):
    import keras

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    assert not has_batchnorm(model)
    assert has_batchnorm(network("keras", spoiled=False)[0])
    assert reestimation.reestimate(model, None, None, "float32", tmp_path / "new") is None


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
def test_shift_is_in_standard_deviations(framework):
    model, _ = network(framework, spoiled=False)
    other = tfopt.set_precision(model, "float32")
    assert largest_shift(model, other)[0] == 0
    norm = other.get_layer("norm")
    deviation = np.sqrt(np.asarray(norm.moving_variance) + norm.epsilon)
    norm.moving_mean.assign_add((deviation * np.linspace(0, 1, 8)).astype(np.float32))
    shift, layer = largest_shift(model, other)
    assert layer == "norm"
    assert shift == pytest.approx(0.5, rel=1e-4)
    norm.moving_variance.assign(norm.moving_variance * np.float32(np.e**2))
    assert largest_shift(model, other)[0] == pytest.approx(2, rel=0.02)
    assert MIN_SHIFT < 0.5


def test_the_sentence():
    gain = Gain("bfloat16@tensorflow", "stem/bn", 2.13, 0.108, 0.868, 0.7412, 0.7789, "top1")
    assert gain.offer() == (
        "Statistics of batch normalisation lag behind: those of stem/bn are 2.1 standard "
        "deviations from the calibration examples'. With new ones bfloat16@tensorflow has top1 "
        "0.868 instead of 0.108 (95 % bounds of the gain 0.74 to 0.78): call "
        "tfopt.reestimate_batchnorm(model, data) and search again."
    )


def taking(kind, keras):
    """A model of one way to take its inputs, and the arrays by their names in the signature."""
    layers = keras.layers

    class Subclass(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm, self.dense = layers.BatchNormalization(name="norm"), layers.Dense(2)

        def get_config(self):
            return {}

        @classmethod
        def from_config(cls, config):
            return cls()

        def call(self, inputs, training=False):
            if kind == "subclass of a list":
                inputs = inputs[0] + inputs[1]
            return self.dense(self.norm(inputs, training=training))

    x = np.random.default_rng(1).normal(5, 1, (300, 3)).astype(np.float32)
    if kind.startswith("subclass"):
        model = Subclass()
        model([x, x] if "list" in kind else x)
        return model
    inputs = [keras.Input((3,), name=name) for name in ("right", "left")]
    out = layers.Dense(2)(layers.BatchNormalization(name="norm")(layers.add(inputs)))
    return keras.Model(
        {"list": inputs, "dictionary": {"right": inputs[0], "left": inputs[1]},
         "other keys": {"p": inputs[0], "q": inputs[1]}}[kind],
        out,
    )  # fmt: skip


@pytest.mark.parametrize("framework", ["keras", "tf_keras"])
@pytest.mark.parametrize(
    "kind",
    ["list", "dictionary", "other keys", "subclass", "subclass of a list"],
)
def test_inputs_as_the_model_takes_them(framework, kind, tmp_path):
    keras = importlib.import_module(framework)
    model = taking(kind, keras)
    live.export(model, tmp_path / "export")
    before = source.prepare(tmp_path / "export", tmp_path / "before")
    x = np.random.default_rng(1).normal(5, 1, (300, 3)).astype(np.float32)
    arrays = dict.fromkeys(before.signature.input_names, x)
    data = dataset.write((arrays, np.zeros(300)), before.signature, tmp_path / "data")
    found = reestimation.reestimate(model, before, data, "float32", tmp_path / "after")
    assert found.shift > 4
    assert found.layer == "norm"
