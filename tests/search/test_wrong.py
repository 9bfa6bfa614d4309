"""A search with a model that XLA may compute wrongly, with augmentation that must be off."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import tfopt

XLA = "float32(xla=True)@tensorflow"
FROZEN = "float32(frozen=True)@tensorflow"


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    image = keras.Input((8, 8, 3), name="image")
    x = keras.layers.GaussianNoise(0.5)(keras.layers.RandomFlip()(image))
    # TensorFlow 2.21 enlarges by 3 wrongly with XLA on processors.
    x = keras.layers.UpSampling2D(3, interpolation="bilinear")(x)
    x = keras.layers.Conv2D(4, 3, activation="swish")(x)
    return keras.Model(image, keras.layers.Dense(4)(keras.layers.Flatten()(x)))


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(60, 8, 8, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def result(model, images, tmp_path_factory):
    return tfopt.optimize(
        model, images, output_dir=tmp_path_factory.mktemp("search") / "out", quiet=True,
        variants=["int8@litert"], max_timing_s=0.1, interval_width=0.5,
    )  # fmt: skip


def test_the_model_is_that_of_predict(result, model, images):
    expected = model.predict(images[:8], verbose=0)
    artifact = result.output_dir / "artifacts" / "float32@tensorflow"
    with tfopt.load(artifact) as session:
        found = [session.run({"image": images[:8]})["output_0"] for _ in range(2)]
    np.testing.assert_array_equal(*found)
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_an_unchanged_way_passes_the_same_gate(result, model, images):
    """XLA is judged by TensorFlow itself, whichever version is installed."""
    run = tf.function(lambda x: model(x, training=False), jit_compile=True)
    got, expected = run(images).numpy(), model.predict(images, verbose=0)
    signal = np.square(expected - expected.mean(0)).sum()
    is_wrong = signal / np.square(got - expected).sum() < 10**5
    row = result.table.set_index("variant").loc[XLA]
    assert row.status == ("wrong" if is_wrong else "ok")
    if is_wrong:
        assert "Output 'output_0' is not the model's: its signal is" in row.reason
        assert np.isnan(row.median_ms) and np.isnan(row.speedup)
        assert XLA not in (result.comparison.details["baseline"], str(result.best.variant))


def test_the_others_are_near(result):
    table = result.table.set_index("variant")
    assert table.loc[FROZEN].status == "ok" and table.loc[FROZEN].accuracy_drop < 1e-4
    rows = {row["variant"]: row for row in result.comparison.rows}
    assert rows["int8@litert"]["fidelity"]["output_0"]["sqnr_db"] > 10
    assert rows["int8@litert"]["question"] == (
        "the error as a share of the output's standard deviation in output 'output_0'"
    )
