import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import pytest

import tfopt
from tests.train.models import FRAMEWORKS, IMAGES, LABELS, compile_, conv, policies
from tfopt.train import several_workers

DATA = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:8], "y_test": LABELS[:8]}
QUIET = {"quiet": True, "batch_size": 8}


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture
def model_file(framework, tmp_path):
    path = tmp_path / "model.keras"
    compile_(conv(framework), framework, metrics=["accuracy"]).save(path)
    return path


def load(framework, path):
    return importlib.import_module(framework).models.load_model(path)


def test_same_as_fit(framework, model_file, tmp_path):
    """Against `fit` called by hand, with the same seed."""
    keras = importlib.import_module(framework)
    result = tfopt.fine_tune(model_file, DATA, tmp_path / "out", epochs=2, seed=3, **QUIET)
    model = load(framework, model_file)
    keras.utils.set_random_seed(3)
    expected = model.fit(
        IMAGES, LABELS, batch_size=8, epochs=2, verbose=0,
        validation_data=(DATA["x_test"], DATA["y_test"]),
    ).history  # fmt: skip
    for name, values in expected.items():
        assert result.history[name] == pytest.approx(values, rel=1e-4)
    saved = load(framework, tmp_path / "out" / "model.keras")
    for old, new in zip(model.get_weights(), saved.get_weights(), strict=True):
        np.testing.assert_allclose(old, new, rtol=1e-4, atol=1e-5)
    table = pd.read_csv(tmp_path / "out" / "history.csv")
    assert list(table.epoch) == [1, 2]
    assert {"loss", "accuracy", "val_loss", "zero_gradients"} <= set(table)
    assert "loss" in result.summary


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(framework, model_file, tmp_path, precision):
    result = tfopt.fine_tune(
        model_file, DATA, tmp_path / "out", precision=precision, keep_float32=["stem"], **QUIET
    )
    saved = load(framework, tmp_path / "out" / "model.keras")
    found = policies(saved)
    assert found["hidden"] == precision
    assert found["stem"] == found["logits"] == "float32"
    assert hasattr(saved.optimizer, "inner_optimizer") == (precision == "mixed_float16")
    assert ("loss_scale" in result.history) == (precision == "mixed_float16")


def test_layers_are_chosen(framework, model_file, tmp_path, monkeypatch):
    monkeypatch.setattr("tfopt.train.layer_times.MAX_S", 0.1)
    monkeypatch.setattr("tfopt.train.profile.STEP_MAX_S", 0.5)
    result = tfopt.fine_tune(
        model_file, DATA, tmp_path / "out", precision="mixed_bfloat16", max_error=0.1, **QUIET
    )
    assert list(pd.read_csv(tmp_path / "out" / "precision.csv").layer) == list(
        result.profile.table.layer
    )
    chosen = result.profile.table.set_index("layer").dtype
    for path, policy in policies(result.model).items():
        assert policy.removeprefix("mixed_") == chosen[path]


COMMAND = """
import os, signal, sys
import {framework} as keras
from tfopt.commands import main

class Interrupting(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            os.kill(os.getpid(), signal.SIGINT)

fit = keras.Model.fit
keras.Model.fit = lambda self, *args, callbacks, **kwargs: fit(
    self, *args, callbacks=[*callbacks, Interrupting()], **kwargs)
sys.exit(main(["train", *sys.argv[1:]]))
"""


def test_interrupted_and_resumed_in_another_precision(framework, model_file, tmp_path):
    """The epochs before the interruption count, and their figures stay."""
    np.savez(tmp_path / "data.npz", **DATA)
    out = tmp_path / "out"
    flags = [f"--model={model_file}", f"--data={tmp_path / 'data.npz'}", f"--output_dir={out}",
             "--batch_size=8", "--epochs=3"]  # fmt: skip
    script = COMMAND.format(framework=framework)
    interrupted = subprocess.run(
        [sys.executable, "-c", script, *flags], capture_output=True, text=True
    )
    assert interrupted.returncode == 130, interrupted.stderr
    assert "run it again with resume" in interrupted.stderr
    assert not (out / "model.keras").exists()
    before = pd.read_csv(out / "history.csv")
    assert list(before.epoch) == [1, 2]
    result = tfopt.fine_tune(
        model_file, DATA, out, epochs=3, precision="mixed_float16", resume=True, **QUIET
    )
    after = pd.read_csv(out / "history.csv")
    assert list(after.epoch) == [1, 2, 3]
    pd.testing.assert_frame_equal(after[list(before)].head(2), before)
    inner = result.model.optimizer.inner_optimizer
    assert int(inner.iterations) == 12  # of all three epochs
    assert np.isnan(after.loss_scale[0])
    assert len(result.history["loss"]) == 3


def test_resuming_what_is_finished_changes_nothing(framework, model_file, tmp_path):
    first = tfopt.fine_tune(model_file, DATA, tmp_path / "out", epochs=2, **QUIET)
    again = tfopt.fine_tune(model_file, DATA, tmp_path / "out", epochs=2, resume=True, **QUIET)
    for old, new in zip(first.model.get_weights(), again.model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert again.history == first.history
    more = tfopt.fine_tune(model_file, DATA, tmp_path / "out", epochs=3, resume=True, **QUIET)
    assert more.history["loss"][:2] == first.history["loss"]
    assert len(more.history["loss"]) == 3


@pytest.mark.parametrize(
    "labels, activation, units, loss",
    [
        ("int", "softmax", 4, "sparse_categorical_crossentropy"),
        ("int", None, 4, "sparse_categorical_crossentropy"),
        ("int", "sigmoid", 1, "binary_crossentropy"),
        ("float", None, 2, "mean_squared_error"),
        ("int", None, 1, "binary_crossentropy"),
        ("counts", None, 1, "mean_squared_error"),
        ("one_hot", "softmax", 4, "categorical_crossentropy"),
        ("one_hot", None, 4, "categorical_crossentropy"),
        ("one_hot", "sigmoid", 4, "binary_crossentropy"),
        ("several", "sigmoid", 4, "binary_crossentropy"),
        ("int as float", "softmax", 4, "sparse_categorical_crossentropy"),
    ],
)
def test_uncompiled_models_get_a_loss_by_their_labels(
    framework, tmp_path, capsys, labels, activation, units, loss
):
    keras = importlib.import_module(framework)
    model = keras.Sequential([keras.layers.Input((6,)), keras.layers.Dense(units, activation)])
    model.save(tmp_path / "model.keras")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 6)).astype(np.float32)
    classes = rng.integers(0, units + (units == 1), 16)
    y = {
        "int": classes,
        "int as float": classes.astype(np.float32),
        "several": rng.integers(0, 2, (16, units)),
        "float": rng.normal(size=(16, units)),
        "counts": rng.integers(20, 80, 16),
        "one_hot": np.eye(units, dtype=np.float32)[classes % units],
    }[labels]
    result = tfopt.fine_tune(
        tmp_path / "model.keras", {"x": x, "y": y}, tmp_path / "out",
        learning_rate=0.0, batch_size=8,
    )  # fmt: skip
    assert f"trained with Adam on {loss}" in capsys.readouterr().err
    outputs = np.asarray(model(x), np.float64)
    if loss == "mean_squared_error":
        expected = np.mean((outputs - y.reshape(16, -1)) ** 2)
    elif loss == "binary_crossentropy":
        outputs = outputs if activation else 1 / (1 + np.exp(-outputs))
        expected = -np.mean(np.log(np.where(y.reshape(16, -1) == 1, outputs, 1 - outputs)))
    else:
        if activation is None:
            outputs = np.exp(outputs) / np.exp(outputs).sum(-1, keepdims=True)
        expected = -np.mean(np.log(outputs[np.arange(16), classes]))
    assert ("accuracy" in result.history) == (loss != "mean_squared_error")
    assert result.history["loss"] == [pytest.approx(expected, rel=1e-4)]


def batches():
    import tensorflow as tf

    train = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(8)
    return train, train.take(1)


def test_data_sets(framework, model_file, tmp_path):
    result = tfopt.fine_tune(
        model_file, "tests.train.test_fine_tune:batches", tmp_path / "out", quiet=True
    )
    assert len(result.history["val_loss"]) == 1


def test_several_inputs(framework, tmp_path):
    keras = importlib.import_module(framework)
    a, b = keras.Input((3,), name="a"), keras.Input((2,), name="b")
    x = keras.layers.Concatenate()([a, b])
    model = keras.Model([a, b], keras.layers.Dense(1)(x))
    model.compile("sgd", "mse")
    model.save(tmp_path / "model.keras")
    data = {"a": np.ones((8, 3)), "b": np.ones((8, 2)), "y": np.ones((8, 1))}
    result = tfopt.fine_tune(tmp_path / "model.keras", data, tmp_path / "out", epochs=2, **QUIET)
    assert result.history["loss"][1] < result.history["loss"][0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.ones((8, 3)), r"have shape \(3,\) and outputs \(4,\); expected the same"),
        (np.full(8, 0.5), "labels such as 0.5 are no whole numbers of classes"),
    ],
)
def test_labels_that_fit_no_loss(tmp_path, labels, message):
    keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)]).save(tmp_path / "model.keras")
    data = {"x": np.ones((8, 6)), "y": labels}
    with pytest.raises(tfopt.InputError, match=message):
        tfopt.fine_tune(tmp_path / "model.keras", data, tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_classes_to_ignore(tmp_path):
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(4)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=255)
    model.compile("sgd", loss)
    model.save(tmp_path / "model.keras")
    data = {"x": np.ones((8, 6)), "y": np.array([0, 1, 2, 3, 255, 255, 0, 1])}
    result = tfopt.fine_tune(tmp_path / "model.keras", data, tmp_path / "out", **QUIET)
    assert np.isfinite(result.history["loss"]).all()


def test_subclassed_models(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    class Own(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = keras.layers.Dense(4, activation="softmax", name="dense")

        def build(self, shape):
            self.dense.build(shape)
            super().build(shape)

        def call(self, inputs):
            return self.dense(inputs)

    model = Own()
    x = np.random.default_rng(0).normal(size=(32, 3)).astype(np.float32)
    model(x)
    model.save(tmp_path / "model.keras")
    result = tfopt.fine_tune(
        tmp_path / "model.keras", {"x": x, "y": LABELS}, tmp_path / "out", epochs=2, **QUIET
    )
    assert result.history["loss"][1] < result.history["loss"][0]
    assert "accuracy" in result.history


def test_weights_of_examples(framework, model_file, tmp_path):
    """Of weight 0 nothing is learned."""
    weights = np.zeros(32, np.float32)
    for name, data in (
        ("none", (IMAGES, LABELS, weights)),
        ("ones", (IMAGES, LABELS, weights + 1)),
        ("generated", lambda: iter([(IMAGES, LABELS, weights + 1)])),
    ):
        result = tfopt.fine_tune(model_file, data, tmp_path / name, seed=1, **QUIET)
        assert (result.history["loss"][0] == 0) == (name == "none")
    with pytest.raises(tfopt.InputError, match=r"unequal numbers of examples.*weights 31"):
        tfopt.fine_tune(model_file, (IMAGES, LABELS, weights[:31]), tmp_path / "few", **QUIET)


def test_a_backup_is_of_finite_weights(framework, model_file, tmp_path):
    """Training breaks down in the second epoch, and goes on from the first at a lower rate."""
    out = tmp_path / "out"
    first = tfopt.fine_tune(model_file, DATA, out, learning_rate=0.01, **QUIET)
    weights = first.model.get_weights()
    with pytest.raises(tfopt.ResultError, match="Training was stopped"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tfopt.fine_tune(model_file, DATA, out, learning_rate=1e38, epochs=2, resume=True, **QUIET)
    again = tfopt.fine_tune(
        model_file, DATA, out, learning_rate=0.0, epochs=2, resume=True, **QUIET
    )
    assert float(np.asarray(again.model.optimizer.learning_rate)) == 0
    trained = {id(weight) for weight in again.model.trainable_weights}
    for weight, old in zip(again.model.weights, weights, strict=True):
        if id(weight) in trained:
            np.testing.assert_array_equal(np.asarray(weight), old)


def test_each_resumed_epoch_has_an_order_of_its_own(framework, tmp_path, monkeypatch):
    """As its examples would come if it had not been interrupted: not twice the same."""
    fw = importlib.import_module(framework)
    model = fw.Sequential([fw.layers.Input((1,)), fw.layers.Dense(1, name="dense")])
    model.compile(fw.optimizers.SGD(0.0), "mse", metrics=[])
    model.save(tmp_path / "model.keras")
    losses = []

    class Losses(fw.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            losses.append(logs["loss"])

    fit = fw.Model.fit

    def listening(self, *args, callbacks=(), **kwargs):
        return fit(self, *args, callbacks=[*callbacks, Losses()], **kwargs)

    monkeypatch.setattr(fw.Model, "fit", listening)
    data = {"x": np.arange(16.0)[:, None], "y": np.arange(16.0)[:, None] ** 3}
    for epochs in (1, 2):
        tfopt.fine_tune(
            tmp_path / "model.keras", data, tmp_path / "out", epochs=epochs, quiet=True,
            batch_size=4, resume=epochs > 1,
        )  # fmt: skip
    assert len(losses) == 8
    assert losses[3] == pytest.approx(losses[7])  # the same examples in each epoch
    assert losses[:3] != pytest.approx(losses[4:7])


class TestNothingIsLost:
    def test_when_the_model_lies_in_the_folder(self, framework, model_file, tmp_path):
        tfopt.fine_tune(model_file, DATA, tmp_path / "out", **QUIET)
        trained = tmp_path / "out" / "model.keras"
        with pytest.raises(tfopt.InputError, match="is part of what `overwrite=True` would delete"):
            tfopt.fine_tune(trained, DATA, tmp_path / "out", overwrite=True, **QUIET)
        assert trained.is_file()

    def test_when_an_argument_is_wrong(self, framework, model_file, tmp_path):
        out = tmp_path / "out"
        tfopt.fine_tune(model_file, DATA, out, **QUIET)
        before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
        for wrong in (
            {"data": str(tmp_path / "none.npz")},
            {"data": {"x": IMAGES, "y": LABELS + 3}},
            {"data": {"x": IMAGES, "y": np.ones((32, 7, 2))}},
            {"keep_float32": ["none"], "precision": "mixed_bfloat16"},
        ):
            with pytest.raises(tfopt.InputError):
                tfopt.fine_tune(
                    model_file, output_dir=out, overwrite=True, **{"data": DATA, **QUIET, **wrong}
                )
        assert before == {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}

    def test_a_first_try_that_fails_leaves_room_for_the_next(self, framework, tmp_path):
        fw = importlib.import_module(framework)
        model = fw.Sequential([fw.layers.Input((3,)), fw.layers.Dense(2)])
        model.compile("sgd", "mse")
        model.save(tmp_path / "model.keras")
        x = np.ones((8, 3))
        for labels in (np.ones((8, 7)), np.ones((8, 2))):
            arguments = tmp_path / "model.keras", {"x": x, "y": labels}, tmp_path / "out"
            if labels.shape[1] == 7:
                with pytest.raises(tfopt.InputError, match="cannot be trained on these data"):
                    tfopt.fine_tune(*arguments, **QUIET)
            else:
                tfopt.fine_tune(*arguments, **QUIET)


def test_training_that_cannot_work(framework, model_file, tmp_path):
    data = {"x": np.full_like(IMAGES, np.nan), "y": LABELS}
    with (
        pytest.raises(tfopt.ResultError, match=r"Training was stopped.*not finite"),
        pytest.warns(UserWarning, match="stopped"),
    ):
        tfopt.fine_tune(model_file, data, tmp_path / "out", epochs=3, **QUIET)
    assert not (tmp_path / "out" / "model.keras").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"precision": "half"}, "The policy is 'half'"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"keep_float32": ["sten"], "precision": "mixed_bfloat16"}, "near names are stem"),
        ({"data": {"x": IMAGES}}, "no labels"),
        ({"data": {"x": IMAGES[:, :4], "y": LABELS}}, "reshape the data"),
        ({"data": {"x": IMAGES, "y": np.ones((32, 7))}}, "cannot be trained on these data"),
        ({"data": {"x": IMAGES, "y": LABELS + 1}}, "Labels go from 1 to 4 and the model has 4"),
        ({"max_error": 0.1}, "the precision is float32"),
        ({"resume": True}, "Nothing to resume"),
    ],
)
def test_wrong_arguments(tmp_path, options, message):
    path = tmp_path / "model.keras"
    compile_(conv("keras"), "keras").save(path)
    with pytest.raises(tfopt.InputError, match=message):
        tfopt.fine_tune(path, output_dir=tmp_path / "out", **{"data": DATA, **QUIET, **options})


def test_data_that_never_end(tmp_path):
    path = tmp_path / "model.keras"
    compile_(conv("keras"), "keras").save(path)
    train, _ = batches()
    with pytest.raises(tfopt.InputError, match=r"leave out repeat\(\)"):
        tfopt.fine_tune(path, train.repeat(), tmp_path / "out", **QUIET)
    with pytest.raises(tfopt.InputError, match="yield no batch"):
        tfopt.fine_tune(uncompiled(tmp_path), train.take(0), tmp_path / "out", **QUIET)


def uncompiled(folder):
    conv("keras").save(folder / "uncompiled.keras")
    return folder / "uncompiled.keras"


def test_labels_out_of_range_in_batches(framework, model_file, tmp_path):
    import tensorflow as tf

    train = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS + 1)).batch(8)
    with pytest.raises(tfopt.InputError, match="label value of 4 which is outside the valid range"):
        tfopt.fine_tune(model_file, train, tmp_path / "out", **QUIET)


def test_models_that_only_their_owner_can_compile(tmp_path):
    inputs = keras.Input((3,))
    two = keras.Model(inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(1)(inputs)])
    two.save(tmp_path / "two.keras")
    data = {"x": np.ones((4, 3)), "y": np.ones((4, 2))}
    with pytest.raises(tfopt.InputError, match="has several outputs and is not compiled"):
        tfopt.fine_tune(tmp_path / "two.keras", data, tmp_path / "out", **QUIET)
    model = keras.Sequential([inputs, keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(0.1, 10)), "mse")
    model.save(tmp_path / "schedule.keras")
    with pytest.raises(tfopt.InputError, match=r"a schedule \(CosineDecay\)"):
        tfopt.fine_tune(
            tmp_path / "schedule.keras", data, tmp_path / "out", learning_rate=0.1, **QUIET
        )

    @keras.saving.register_keras_serializable("tests")
    class OwnCompile(keras.Sequential):
        def compile(self, *args, **kwargs):
            super().compile(*args, **kwargs)

    OwnCompile([inputs, keras.layers.Dense(2)]).save(tmp_path / "own.keras")
    with pytest.raises(tfopt.InputError, match="OwnCompile has a compile of its own"):
        tfopt.fine_tune(tmp_path / "own.keras", data, tmp_path / "out", **QUIET)


def test_wrong_models(tmp_path):
    (tmp_path / "model.tflite").write_bytes(b"")
    with pytest.raises(tfopt.InputError, match=r"cannot be trained; expected a \.keras or \.h5"):
        tfopt.fine_tune(tmp_path / "model.tflite", DATA, tmp_path / "out")
    with pytest.raises(tfopt.InputError, match="does not exist"):
        tfopt.fine_tune(tmp_path / "none.keras", DATA, tmp_path / "out")


def test_nothing_is_overwritten_or_mixed(tmp_path):
    path, out = tmp_path / "model.keras", tmp_path / "out"
    compile_(conv("keras"), "keras").save(path)
    tfopt.fine_tune(path, DATA, out, **QUIET)
    with pytest.raises(tfopt.InputError, match="is not empty"):
        tfopt.fine_tune(path, DATA, out, **QUIET)
    with pytest.raises(tfopt.InputError, match="The seed is not that of the run"):
        tfopt.fine_tune(path, DATA, out, resume=True, seed=1, **QUIET)
    (out / "mine.txt").write_text("mine")
    tfopt.fine_tune(path, DATA, out, overwrite=True, **QUIET)
    assert (out / "mine.txt").read_text() == "mine"
    assert list(pd.read_csv(out / "history.csv").epoch) == [1]


def test_several_devices(framework, tmp_path):
    """On two processors as on two GPUs; against one."""
    script = f"""
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import {framework} as keras, tfopt
from tests.train.test_fine_tune import DATA
from tfopt.train import several_workers
model = keras.Sequential([keras.layers.Input((8, 8, 3)), keras.layers.Flatten(),
                          keras.layers.Dense(8), keras.layers.Dense(4)])
model.compile(keras.optimizers.SGD(1e-3), "mse")
model.save("model.keras")
for devices in (1, 2):
    several_workers.strategy = lambda: (
        tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) if devices == 2 else None)
    data = dict(DATA, y_train=np.ones((32, 4)), y_test=np.ones((8, 4)))
    result = tfopt.fine_tune("model.keras", data, f"out{{devices}}", epochs=2, batch_size=8,
                             precision=sys.argv[1], quiet=True)
    print(*result.history["loss"], result.model.layers[-2].compute_dtype)
"""
    for precision, tolerance in (("float32", 1e-4), ("mixed_bfloat16", 0.02)):
        folder = tmp_path / precision
        folder.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
        found = subprocess.run(
            [sys.executable, "-c", script, precision],
            cwd=folder, capture_output=True, text=True, env=environment,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr[-3000:]
        one, two = (line.split() for line in found.stdout.splitlines()[-2:])
        assert [float(x) for x in two[:2]] == pytest.approx(
            [float(x) for x in one[:2]], rel=tolerance
        )
        assert two[2] == precision.removeprefix("mixed_")


WORKER = """
import json, os, signal, sys
import {framework} as keras
from tfopt.commands import main

class Killed(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2 and json.loads(os.environ["TF_CONFIG"])["task"]["index"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)

if "--resume" not in sys.argv:
    fit = keras.Model.fit
    keras.Model.fit = lambda self, *args, callbacks, **kwargs: fit(
        self, *args, callbacks=[*callbacks, Killed()], **kwargs)
sys.exit(main(["train", *sys.argv[1:]]))
"""


def start_workers(script, *flags, num=2):
    """Runs a script in several processes, which `TF_CONFIG` joins."""
    with contextlib.ExitStack() as stack:
        places = [stack.enter_context(socket.socket()) for _ in range(num)]
        for item in places:
            item.bind(("localhost", 0))
        workers = [f"localhost:{item.getsockname()[1]}" for item in places]
    cluster = {"worker": workers}
    return [
        subprocess.Popen(
            [sys.executable, "-c", script, *flags],
            env={
                **os.environ,
                "TF_CONFIG": json.dumps(
                    {"cluster": cluster, "task": {"type": "worker", "index": index}}
                ),
            },
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for index in range(num)
    ]  # fmt: skip


def wait_for(running, *expected):
    """Waits for processes, whose statuses have to be the expected ones; their outputs."""
    try:
        texts = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.send_signal(signal.SIGKILL)
    assert [process.returncode for process in running] == [*expected], texts
    return texts


@pytest.fixture
def dense_file(framework, tmp_path):
    """A model without batch normalisation, whose statistics would be those of one worker's part."""
    fw = importlib.import_module(framework)
    fw.utils.set_random_seed(0)
    new = fw.layers
    model = fw.Sequential(
        [new.Input((8, 8, 3)), new.Flatten(), new.Dense(8, activation="relu"), new.Dense(4)]
    )
    loss = fw.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = fw.optimizers.SGD(1e-2, momentum=0.9)
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=False)
    model.save(tmp_path / "dense.keras")
    return tmp_path / "dense.keras"


def test_several_workers(framework, dense_file, tmp_path):
    """Two workers of which one is killed, resumed, against one process."""
    np.savez(tmp_path / "data.npz", **DATA)
    flags = [f"--model={dense_file}", f"--data={tmp_path / 'data.npz'}", "--batch_size=8",
             f"--output_dir={tmp_path / 'out'}", "--epochs=3"]  # fmt: skip
    script = WORKER.format(framework=framework)
    left = wait_for(start_workers(script, *flags), 1, -signal.SIGKILL)[0]
    assert "Another worker ended or cannot be reached" in left
    assert "Traceback" not in left
    assert len(pd.read_csv(tmp_path / "out" / "history.csv")) == 2
    wait_for(start_workers(script, *flags, "--resume"), 0, 0)
    for epochs in (2, 3):
        expected = tfopt.fine_tune(
            dense_file, DATA, tmp_path / "alone", epochs=epochs, resume=epochs > 2, **QUIET
        )
    for folder in (tmp_path / "out", tmp_path / "out-worker-1"):
        history = pd.read_csv(folder / "history.csv")
        assert list(history.epoch) == [1, 2, 3]
        for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
            assert list(history[name]) == pytest.approx(expected.history[name], rel=1e-4)
        weights = load(framework, folder / "model.keras").get_weights()
        for one, other in zip(expected.model.get_weights(), weights, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


def test_statistics_are_those_of_all_workers(framework, tmp_path):
    """Moving means of the inputs, which do not depend on weights, against one process."""
    fw = importlib.import_module(framework)
    norm = fw.layers.BatchNormalization(momentum=0.5)
    model = fw.Sequential([fw.layers.Input((8, 8, 3)), norm, fw.layers.Flatten()])
    model.add(fw.layers.Dense(4, activation="softmax"))
    model.compile("sgd", "sparse_categorical_crossentropy", jit_compile=False)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", **DATA)
    flags = [f"--model={tmp_path / 'model.keras'}", f"--data={tmp_path / 'data.npz'}",
             "--batch_size=8", f"--output_dir={tmp_path / 'out'}"]  # fmt: skip
    wait_for(start_workers(WORKER.format(framework=framework), *flags), 0, 0)
    tfopt.fine_tune(tmp_path / "model.keras", DATA, tmp_path / "alone", **QUIET)
    alone, first, second = (
        np.asarray(load(framework, tmp_path / folder / "model.keras").layers[0].moving_mean)
        for folder in ("alone", "out", "out-worker-1")
    )
    np.testing.assert_allclose(first, alone, rtol=1e-5)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_several_workers_in_half_precision(framework, model_file, tmp_path, precision):
    """With batch normalisation and loss scaling; all end with the same weights."""
    np.savez(tmp_path / "data.npz", x=IMAGES, y=LABELS)
    flags = [f"--model={model_file}", f"--data={tmp_path / 'data.npz'}", "--batch_size=8",
             f"--output_dir={tmp_path / 'out'}", f"--precision={precision}"]  # fmt: skip
    wait_for(start_workers(WORKER.format(framework=framework), *flags), 0, 0)
    one, other = (
        load(framework, tmp_path / folder / "model.keras") for folder in ("out", "out-worker-1")
    )
    for first, second in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(first, second, rtol=1e-5)
    assert policies(one)["hidden"] == precision
    history = pd.read_csv(tmp_path / "out" / "history.csv")
    assert ("loss_scale" in history) == (precision == "mixed_float16")
    assert (history.overflow_steps < 4).all()


@pytest.mark.parametrize("framework", ["keras"], indirect=True)  # tf_keras has one for all
def test_workers_that_go_on_from_different_epochs(framework, dense_file, tmp_path):
    np.savez(tmp_path / "data.npz", **DATA)
    out = tmp_path / "out"
    for folder, epochs in ((out, 2), (tmp_path / "out-worker-1", 1)):
        tfopt.fine_tune(dense_file, DATA, folder, epochs=epochs, **QUIET)
    flags = [f"--model={dense_file}", f"--data={tmp_path / 'data.npz'}", "--batch_size=8",
             f"--output_dir={out}", "--epochs=3", "--resume"]  # fmt: skip
    for text in wait_for(start_workers(WORKER.format(framework=framework), *flags), 2, 2):
        assert "The workers do not find the same backups (2, 1 epochs)" in text


def test_steps_of_several_workers_that_xla_cannot_compile(framework, monkeypatch):
    monkeypatch.setattr(several_workers, "is_of_several", lambda model: True)
    model = conv(framework)
    model.compile("sgd", "mse", jit_compile=True)
    with pytest.raises(tfopt.InputError, match="XLA cannot compile the steps"):
        several_workers.mend(model)


def test_variables_that_tell_no_workers(monkeypatch, tmp_path):
    monkeypatch.setenv("TF_CONFIG", "{worker")
    with pytest.raises(tfopt.InputError, match="is no JSON"):
        several_workers.own_folder(tmp_path)


def test_one_worker_is_left_as_it_is(framework):
    model = compile_(conv(framework), framework)
    before = set(vars(model))
    assert several_workers.mend(model) is model
    assert set(vars(model)) == before


def test_one_gpu_needs_no_strategy():
    assert several_workers.strategy() is None
