"""A search with a metric that only this process defines."""

import keras
import numpy as np
import pytest

import tfopt

THRESHOLD = 1.8


@pytest.fixture(scope="module")
def model():
    """Answers 1 where the first feature is above 5 / 3, exactly."""
    x = keras.Input((4,), name="features")
    model = keras.Model(x, keras.layers.Dense(2, "softmax")(x))
    first = 3.0 * np.eye(4)[0]
    model.layers[-1].set_weights([np.stack([-first, first], 1), np.array([5.0, -5.0])])
    return model


@pytest.fixture(scope="module")
def data():
    x = np.random.default_rng(0).normal(size=(400, 4)).astype(np.float32)
    return x, (x[:, 0] > THRESHOLD).astype(int)


def search(model, data, folder, metric):
    return tfopt.optimize(
        model, data, output_dir=folder, quiet=True, variants=["float32@litert"], metric=metric,
        max_timing_s=0.1, interval_width=0.5,
    )  # fmt: skip


def test_a_function_of_this_process(model, data, tmp_path):
    scale = 100.0
    result = search(
        model, data, tmp_path / "out", lambda o, y: scale * (o.argmax(1) == y).astype(float)
    )
    row = result.table.set_index("variant").loc["float32@litert"]
    assert result.comparison.details["metric"].startswith("__main__:")
    assert 90 < row.accuracy < 100


def test_a_function_that_fails_is_one_sentence(model, data, tmp_path):
    with pytest.raises(tfopt.InputError, match=r"fails on outputs of shape .*: KeyError"):
        search(model, data, tmp_path / "out", lambda o, y: {}["nothing"])
