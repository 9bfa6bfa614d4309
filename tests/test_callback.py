"""What is checked when training begins, and which weights are optimized."""

import importlib

import numpy as np
import pandas as pd
import pytest

import tfopt
from tests.train.models import FRAMEWORKS
from tfopt import callback as callbacks

each = pytest.mark.parametrize("framework", FRAMEWORKS)

X = np.random.default_rng(0).normal(size=(24, 4)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def compiled(framework):
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,), name="x"), keras.layers.Dense(2, "softmax")])
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy", jit_compile=False)
    return model


@each
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"variants": ["int9@litert"]}, "int9"),
        ({"variant": ["int8@litert"]}, "Unknown option variant; the options are: variants"),
        ({"batch_size": 0}, "batch_size is 0; expected a whole number"),
        ({"budget": 0.01}, r"The budget is a float; expected tfopt.Budget\(…\)"),
        ({"data": (X[:, :3], Y)}, "cannot run on the data of OptimizeCallback: .*give data as"),
        ({"data": "missing.npz"}, "missing.npz"),
    ],
)
def test_arguments_are_checked_before_the_first_epoch(framework, options, match, tmp_path):
    model = compiled(framework)
    before = model.get_weights()
    options = {"data": (X, Y), "output_dir": tmp_path / "out"} | options
    best = tfopt.OptimizeCallback(**options)
    with pytest.raises(tfopt.InputError, match=match):
        model.fit(X, Y, verbose=0, callbacks=[best])
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "data",
    [
        (X.tolist(), Y.tolist()),
        (pd.DataFrame({"a": [1, 2], "b": [0.5, 1], "c": [True, False], "d": [3, 4]}), [0, 1]),
    ],
)
def test_data_that_predict_takes_converted_are_taken(data, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "optimize", lambda *_, **__: "done")
    best = tfopt.OptimizeCallback(data, output_dir=tmp_path / "out")
    compiled("keras").fit(X, Y, verbose=0, callbacks=[best])
    assert best.result == "done"


def test_a_pair_of_arrays_is_what_a_model_with_two_inputs_takes(tmp_path, monkeypatch):
    import keras

    monkeypatch.setattr(callbacks, "optimize", lambda *_, **__: "done")
    left, right = keras.Input((4,), name="left"), keras.Input((2,), name="right")
    heads = [keras.layers.Dense(1)(left), keras.layers.Dense(1)(right)]
    model = keras.Model([left, right], heads)
    model.compile("sgd", "mse")
    best = tfopt.OptimizeCallback(((X, X[:, :2]), (X[:, :1], X[:, 1:2])), output_dir=tmp_path)
    model.fit([X, X[:, :2]], [X[:, :1], X[:, 1:2]], verbose=0, callbacks=[best])
    assert best.result == "done"


@each
def test_a_folder_in_use_is_refused_before_the_first_epoch(framework, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    best = tfopt.OptimizeCallback((X, Y), output_dir=tmp_path)
    seen = []
    keras = importlib.import_module(framework)
    counting = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.append(epoch))
    with pytest.raises(tfopt.InputError, match="is not empty"):
        compiled(framework).fit(X, Y, verbose=0, callbacks=[counting, best])
    assert not seen
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@each
@pytest.mark.parametrize("data", [X.astype(np.float64), {"x": X}, (X, Y), ((X, Y), (X[:2], Y[:2]))])
def test_data_that_fit_takes_passes_the_check(framework, data, tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "optimize", lambda *_, **__: "done")
    best = tfopt.OptimizeCallback(data, output_dir=tmp_path / "out")
    compiled(framework).fit(X, Y, verbose=0, callbacks=[best])
    assert best.result == "done"


@each
@pytest.mark.parametrize("order", ["best stopping after", "stopping best after", "best after"])
def test_restored_weights_are_the_ones_that_are_optimized(framework, order, tmp_path, monkeypatch):
    keras = importlib.import_module(framework)
    model = compiled(framework)
    optimized, after = [], []

    def record(trained, *_, **__):
        optimized.append(trained.get_weights())
        return "done"

    monkeypatch.setattr(callbacks, "optimize", record)
    best = tfopt.OptimizeCallback((X, Y), output_dir=tmp_path / "out")
    listed = {
        "best": best,
        "stopping": keras.callbacks.EarlyStopping("loss", 1, restore_best_weights=True),
        # Reads the result, which it finds in every order.
        "after": keras.callbacks.LambdaCallback(
            on_train_end=lambda logs: after.append(best.result)
        ),
    }
    spoiling = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: epoch and model.set_weights(
            [np.full_like(value, 9.0) for value in model.get_weights()]
        )
    )  # fmt: skip
    epochs = 4 if "stopping" in order else 1
    given = [spoiling, *(listed[name] for name in order.split())]
    model.fit(X, Y, epochs=epochs, verbose=0, callbacks=given)
    assert after == ["done"]
    (found,) = optimized
    for one, other in zip(found, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
        assert np.abs(other).max() < 5
