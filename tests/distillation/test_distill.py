import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tensorflow as tf

import tfopt
from tests.distillation.test_distiller import CLASSES, NUM, X, Y, dense, step_by_hand
from tests.train.models import FRAMEWORKS, IMAGES, LABELS, conv, policies
from tests.train.test_fine_tune import start_workers, wait_for
from tfopt import commands
from tfopt.distillation.cache import CachedBatches
from tfopt.distillation.losses import AttentionTransfer
from tfopt.source import load_keras_file

DATA = {"x_train": X, "y_train": Y, "x_test": X[:6], "y_test": Y[:6]}
OPTIONS = {"quiet": True, "batch_size": 4}


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture
def files(framework, tmp_path):
    """A student and two teachers, of the other Kerases, too."""
    dense(framework, 0).save(tmp_path / "untrained.keras")
    dense("keras", 1).save(tmp_path / "one.keras")
    dense("tf_keras", 2, "softmax").save(tmp_path / "two.keras")
    np.savez(tmp_path / "data.npz", **DATA)
    return tmp_path


@pytest.fixture
def call(capsys, monkeypatch):
    """Returns a function that runs the command: status, stdout, stderr."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(folder, *flags):
        usual = [f"--teachers={folder / 'one.keras'}", f"--student={folder / 'untrained.keras'}",
                 f"--data={folder / 'data.npz'}", f"--output={folder / 'student.keras'}",
                 "--epochs=1"]  # fmt: skip
        status = commands.main(["distill", *usual, *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(call):
    """Returns a function that runs the command, checks that it was refused, gives the message."""

    def run(folder, *flags):
        kept = contents(folder)
        status, out, err = call(folder, "--quiet", *flags)
        assert status == commands.WRONG_INPUT, err
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert err.strip().endswith(".")
        assert contents(folder) == kept
        return err

    return run


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(framework, path):
    return importlib.import_module(framework).models.load_model(path)


def assert_same(one, other, **tolerance):
    for a, b in zip(one.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, **{"rtol": 1e-4, "atol": 1e-6, **tolerance})


def losses_by_hand(framework, labels=Y, teachers=(1,), **options):
    """Of labels and of teachers, of an untrained student."""
    options = {"alpha": 0.1, "temperature": 4.0, **options}
    taught_by = [dense("keras", seed) for seed in teachers]
    return step_by_hand(dense(framework, 0), taught_by, labels, **options)[:2]


def test_command(framework, files, call):
    status, out, err = call(files, f"--teachers={files / 'one.keras'},{files / 'two.keras'}",
                            "--learning_rate=0", "--batch_size=12", "--temperature=2",
                            "--alpha=0.3")  # fmt: skip
    assert status == commands.DONE, err
    history = pd.read_csv(files / "student" / "history.csv")
    assert {"val_loss", "accuracy", "val_accuracy", "zero_gradients"} <= set(history)
    of_labels, of_teachers = losses_by_hand(framework, teachers=(1, 2), temperature=2.0)
    assert history.label_loss[0] == pytest.approx(of_labels, rel=1e-4)
    assert history.teacher_loss[0] == pytest.approx(of_teachers, rel=1e-4)
    assert history.loss[0] == pytest.approx(0.3 * of_labels + 0.7 * of_teachers, rel=1e-4)
    assert out.startswith(f"{files / 'student.keras'}: ") and "teacher_loss " in out
    assert "'dense2' returns probabilities (softmax) and tells their logits." in err
    student = load(framework, files / "student.keras")
    assert type(student) is type(dense(framework, 0))
    assert_same(student, dense(framework, 0))


def test_same_as_a_distiller(framework, files):
    """Against `compile` and `fit` by hand."""
    found = tfopt.distill(files / "one.keras", files / "untrained.keras", DATA,
                          files / "student.keras", epochs=2, cache=False, seed=3,
                          **OPTIONS)  # fmt: skip
    keras = importlib.import_module(framework)
    distiller = tfopt.Distiller(dense(framework, 0), dense("keras", 1))
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    distiller.compile(keras.optimizers.Adam(), entropy, metrics=["accuracy"], jit_compile=False)
    keras.utils.set_random_seed(3)
    history = distiller.fit(X, Y, batch_size=4, epochs=2, verbose=0,
                            validation_data=(X[:6], Y[:6])).history  # fmt: skip
    for name, values in history.items():
        assert found.history[name] == pytest.approx(values, rel=1e-4)
    assert_same(load(framework, files / "student.keras"), distiller.student)


def digits():
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.data[order] / 16).astype(np.float32), found.target[order]


def classifier(framework, units, seed=0):
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(seed)
    inputs = keras.Input((64,))
    hidden = keras.layers.Dense(units, activation="relu")(inputs)
    model = keras.Model(inputs, keras.layers.Dense(10)(hidden), name=f"of_{units}")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"], jit_compile=False)
    return model


@pytest.mark.parametrize("are_left_out", [False, True])
def test_a_student_learns_from_what_has_no_labels(framework, tmp_path, are_left_out):
    """Against training on the few labels alone, for so long that more steps gain nothing."""
    (x, y), num_labels = digits(), 50
    teacher = classifier(framework, 128)
    teacher.fit(x[:900], y[:900], epochs=15, verbose=0)
    teacher.save(tmp_path / "teacher.keras")
    labels = np.where(np.arange(900) < num_labels, y[:900], -1)
    data = {"x": x[:900]} if are_left_out else {"x": x[:900], "y": labels}
    found = tfopt.distill(
        tmp_path / "teacher.keras", "teacher(width=0.125)", data, tmp_path / "student.keras",
        epochs=15, learning_rate=1e-2, quiet=True,
    )  # fmt: skip
    alone = classifier(framework, 16)
    assert found.student.count_params() == alone.count_params()
    alone.fit(x[:num_labels], y[:num_labels], epochs=80, verbose=0)
    taught, control = (
        np.mean(np.asarray(model(x[900:])).argmax(-1) == y[900:])
        for model in (load_keras_file(tmp_path / "student.keras"), alone)
    )
    assert taught > control + 0.05
    assert ("label_loss" in found.history) == ("accuracy" in found.history) == (not are_left_out)


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
sys.exit(main(["distill", *sys.argv[1:]]))
"""


def test_interrupted_and_resumed(framework, files, call):
    """With what teachers say kept, it ends where it would have without an interruption."""
    flags = ["--epochs=4", "--batch_size=4", "--view=mixup", "--num_views=2",
             "--learning_rate=0.01"]  # fmt: skip
    interrupted = subprocess.run(
        [sys.executable, "-c", COMMAND.format(framework=framework), *flags,
         f"--teachers={files / 'one.keras'}", f"--student={files / 'untrained.keras'}",
         f"--data={files / 'data.npz'}", f"--output={files / 'student.keras'}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert interrupted.returncode == 130, interrupted.stderr
    assert "run it again with resume" in interrupted.stderr
    assert not (files / "student.keras").exists()
    assert list(pd.read_csv(files / "student" / "history.csv").epoch) == [1, 2]
    status, out, err = call(files, *flags, "--resume")
    assert status == commands.DONE, err
    assert "Going on after epoch 2." in err
    whole = files / "whole.keras"
    assert call(files, *flags, f"--output={whole}")[0] == commands.DONE
    for file in ("student", "whole"):
        history = pd.read_csv(files / file / "history.csv")
        assert list(history.epoch) == [1, 2, 3, 4]
    assert_same(*(load(framework, files / name) for name in ("student.keras", "whole.keras")))
    assert call(files, *flags, "--resume")[1] == out  # and nothing is left to do


def test_interrupted_while_teachers_are_asked(framework, files, call, monkeypatch):
    def interrupt(self, progress=None):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(CachedBatches, "fill", interrupt)
        status, _, err = call(files)
    assert status == commands.INTERRUPTED
    assert "run it again with resume" in err
    status, _, err = call(files, "--resume")
    assert status == commands.DONE, err


def test_live_models(framework, tmp_path):
    """A weight of 3 of 4 for the first teacher."""
    teachers = [tfopt.Teacher(dense("keras", 1), weight=3.0), dense(framework, 2)]
    found = tfopt.distill(teachers, dense(framework, 0), (X, Y), tmp_path / "student.keras",
                          epochs=1, learning_rate=0.0, batch_size=NUM, quiet=True)  # fmt: skip
    _, expected = losses_by_hand(framework, teachers=(1, 2), shares=[0.75, 0.25])
    assert found.history["teacher_loss"] == [pytest.approx(expected, rel=1e-4)]


def test_a_session_teaches_compiled_steps(framework, files, call, refused):
    tfopt.convert(files / "one.keras", "float32@litert", files / "litert")
    flags = [f"--teachers={files / 'litert'}", "--jit_compile"]
    assert "XLA cannot compile" in refused(files, *flags, "--nocache")
    status, _, err = call(files, *flags, "--learning_rate=0", "--batch_size=12")
    assert status == commands.DONE, err
    history = pd.read_csv(files / "student" / "history.csv")
    expected = losses_by_hand(framework)
    assert (history.label_loss[0], history.teacher_loss[0]) == pytest.approx(expected, rel=1e-3)


def test_views_come_again(framework, tmp_path):
    teacher, student = conv("keras", 1), conv(framework, 0)
    options = {"learning_rate": 0.0, "view": "crop_and_flip,mixup", "seed": 2, **OPTIONS}
    for num_views in (None, 2):
        found = tfopt.distill(teacher, student, (IMAGES, LABELS), tmp_path / f"{num_views}.keras",
                              epochs=4, num_views=num_views, **options)  # fmt: skip
        one, two, three, four = found.history["teacher_loss"]
        assert one != pytest.approx(two, rel=1e-4)
        assert (one == pytest.approx(three, rel=1e-5)) == (num_views == 2)
        assert (two == pytest.approx(four, rel=1e-5)) == (num_views == 2)
        assert (found.folder / "cache").exists() == (num_views == 2)


@pytest.mark.parametrize("is_batched", [False, True])
@pytest.mark.parametrize("missing", [(), (0, 3, 4, 11), range(NUM)])
def test_labels_that_are_missing(framework, files, missing, is_batched):
    labels = Y.copy()
    labels[list(missing)] = -1
    data = (X, labels)
    if is_batched:
        data = tf.data.Dataset.from_tensor_slices(data).batch(NUM)
    found = tfopt.distill(files / "one.keras", files / "untrained.keras", data,
                          files / "student.keras", epochs=1, learning_rate=0.0,
                          batch_size=NUM, quiet=True)  # fmt: skip
    of_labels, of_teachers = losses_by_hand(framework, labels)
    assert found.history["teacher_loss"] == [pytest.approx(of_teachers, rel=1e-4)]
    if "label_loss" in found.history:
        assert found.history["label_loss"] == [pytest.approx(of_labels, rel=1e-4)]
    else:
        assert len(missing) == NUM
        assert found.history["loss"] == found.history["teacher_loss"]


def test_no_labels(framework, files):
    """In a data set, too."""
    for data in ({"x": X}, tf.data.Dataset.from_tensor_slices((X,)).batch(NUM)):
        found = tfopt.distill(files / "one.keras", files / "untrained.keras", data,
                              files / "student.keras", epochs=1, learning_rate=0.0,
                              batch_size=NUM, quiet=True, overwrite=True)  # fmt: skip
        assert found.history["loss"] == [pytest.approx(losses_by_hand(framework)[1], rel=1e-4)]


def test_values(framework, tmp_path):
    student, teacher = dense(framework, 0, units=2), dense("keras", 1, units=2)
    values = np.random.default_rng(0).normal(size=(NUM, 2)).astype(np.float32)
    values[[1, 5]] = np.nan
    found = tfopt.distill(teacher, student, (X, values), tmp_path / "student.keras", epochs=1,
                          learning_rate=0.0, batch_size=NUM, quiet=True)  # fmt: skip
    made, said = (np.asarray(model(X)) for model in (student, teacher))
    is_there = ~np.isnan(values).any(1)
    assert found.history["teacher_loss"] == [pytest.approx(np.square(made - said).mean(), rel=1e-4)]
    of_labels = np.square(made - values)[is_there].mean()
    assert found.history["label_loss"] == [pytest.approx(of_labels, rel=1e-4)]


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(framework, tmp_path, precision):
    found = tfopt.distill(conv("keras", 1), conv(framework, 0), (IMAGES, LABELS),
                          tmp_path / "student.keras", epochs=1, precision=precision,
                          keep_float32=["stem"], **OPTIONS)  # fmt: skip
    chosen = policies(load(framework, tmp_path / "student.keras"))
    assert chosen["hidden"] == precision
    assert chosen["stem"] == chosen["logits"] == "float32"
    assert ("loss_scale" in found.history) == (precision == "mixed_float16")
    assert np.isfinite(found.history["loss"]).all()


def test_features(framework, tmp_path, call):
    conv(framework, 0).save(tmp_path / "untrained.keras")
    conv("keras", 1).save(tmp_path / "one.keras")
    np.savez(tmp_path / "data.npz", x=IMAGES, y=LABELS)
    status, _, err = call(tmp_path, "--features=stem:stem:attention:100,hidden:hidden",
                          "--learning_rate=0", "--batch_size=32")  # fmt: skip
    assert status == commands.DONE, err
    maps = []
    for model in (conv(framework, 0), conv("keras", 1)):
        keras = importlib.import_module(type(model).__module__.partition(".")[0])
        maps.append(keras.Model(model.inputs, model.get_layer("stem").output)(IMAGES))
    attention = 100 * float(tf.reduce_mean(AttentionTransfer()(*maps)))
    found = pd.read_csv(tmp_path / "student" / "history.csv").feature_loss[0]
    assert found > attention  # a hint whose projection is new loses something, too
    only_one = [f"--features={pair}" for pair in ("stem:stem:attention:100",)]
    call(tmp_path, *only_one, "--learning_rate=0", "--batch_size=32", "--overwrite")
    found = pd.read_csv(tmp_path / "student" / "history.csv").feature_loss[0]
    assert found == pytest.approx(attention, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "temperature"),
    [("decoupled", 2.0), ("decoupled", None), ("relational", None), ("squared_error", None)],
)
def test_losses(files, loss, temperature):
    found = tfopt.distill(files / "one.keras", files / "untrained.keras", DATA,
                          files / "student.keras", epochs=2, loss=loss, temperature=temperature,
                          learning_rate=0.05, **OPTIONS)  # fmt: skip
    assert found.history["teacher_loss"][1] < found.history["teacher_loss"][0]


class TestNothingIsLost:
    def test_when_something_is_there(self, framework, files, call, refused):
        assert call(files)[0] == commands.DONE
        assert "student.keras is there already; give --overwrite" in refused(files)
        (files / "student.keras").unlink()
        assert "is not empty; give --resume" in refused(files)
        (files / "student" / "mine.txt").write_text("mine")
        assert call(files, "--overwrite")[0] == commands.DONE
        assert (files / "student" / "mine.txt").read_text() == "mine"
        assert list(pd.read_csv(files / "student" / "history.csv").epoch) == [1]

    def test_that_is_read(self, files, call, refused):
        assert call(files)[0] == commands.DONE
        for flags in (
            [f"--output={files / 'one.keras'}"],
            [f"--output={files / 'untrained.keras'}"],
            [f"--student={files / 'student.keras'}"],
        ):
            assert "is read, so it cannot be the output" in refused(files, *flags, "--overwrite")
        (files / "student" / "cache").rename(files / "student" / "backup" / "model")
        (files / "one.keras").rename(files / "student" / "backup" / "one.keras")
        flag = f"--teachers={files / 'student' / 'backup' / 'one.keras'}"
        assert "part of what --overwrite would delete" in refused(files, flag, "--overwrite")

    def test_of_folders_of_others(self, files, refused):
        (files / "student").mkdir()
        (files / "student" / "mine.txt").write_text("mine")
        assert "was not written by tfopt" in refused(files, "--overwrite")

    def test_when_data_fail_late(self, framework, tmp_path, call):
        """Teachers are asked about 256 examples first; what follows is told, too."""
        dense(framework, 0).save(tmp_path / "untrained.keras")
        dense("keras", 1).save(tmp_path / "one.keras")
        x = np.ones((300, 4), np.float32)
        x[299] = np.nan
        np.savez(tmp_path / "data.npz", x=x)
        status, _, err = call(tmp_path, "--quiet")
        assert status == commands.WRONG_INPUT
        assert "is not finite" in err
        np.savez(tmp_path / "data.npz", x=x[:299])
        assert call(tmp_path)[0] == commands.DONE


def rounded():
    """Probabilities of which many are 0, from a model that does not tell logits."""
    import keras

    teacher = dense("keras", 1, "softmax")
    teacher.set_weights([1e5 * value for value in teacher.get_weights()])
    model = keras.Sequential([teacher, keras.layers.Rescaling(1.0)])
    model.build((None, 4))
    return model


def spoiled():
    teacher = dense("keras", 1)
    teacher.set_weights([value * np.nan for value in teacher.get_weights()])
    return teacher


@pytest.mark.parametrize(
    ("make", "flags", "message"),
    [
        (lambda: dense("keras", 1, units=5), (), "has 3 classes and .* has 5; expected the same"),
        (rounded, ("--temperature=4",), "rounded to 0, which a temperature of 4 cannot soften"),
        (spoiled, (), "is not finite in 100.0% of its values"),
        (None, ("--features=logit:logits",), "no layer 'logit'; expected .* such as logits"),
        (None, ("--features=logits:logit",), "no layer 'logit'; expected .* such as logits"),
        (None, ("--features=logits:",), "'logits:' is no pair of features"),
        (None, ("--features=logits",), "'logits' is no pair of features"),
        (None, ("--features=logits:logits:hints",), "is no pair of features"),
        (None, ("--features=logits:logits:hint:heavy",), "is no pair of features"),
        (None, ("--alpha=1.5",), "alpha is 1.5"),
        (None, ("--temperature=0",), "temperature is 0"),
        (None, ("--loss=kl",), "'kl'; expected one of soft_targets, decoupled"),
        (None, ("--loss=relational", "--temperature=2"), "'relational' has no temperature"),
        (None, ("--view=rotate",), "'rotate'; expected crop_and_flip or mixup"),
        (None, ("--view=crop_and_flip",), "CropAndFlip takes one tensor of images"),
        (None, ("--num_views=2",), "num_views is 2, .* there is no view"),
        (None, ("--num_views=2", "--view=mixup", "--nocache"), "there is no cache"),
        (None, ("--num_views=0", "--view=mixup"), "num_views is 0"),
        (None, ("--epochs=0",), "epochs is 0"),
        (None, ("--batch_size=0",), "batch_size is 0"),
        (None, ("--precision=mixed_bfloat16", "--keep_float32=logit"), "near names are logits"),
        (None, ("--student=teacher(height=0.5)",), "no option 'height'"),
        (None, ("--student=none.keras",), "does not exist"),
        (None, ("--teachers=none.keras",), "does not exist"),
        (None, ("--teachers=",), "Missing --teachers"),
        (None, ("--data=none.npz",), "none.npz"),
        (None, ("--output=student",), "expected a .keras or .h5 file"),
        (None, ("--resume",), "Nothing to resume"),
        (None, ("--resume", "--overwrite"), "exclude each other"),
        (None, ("--custom_objects=none",), "none"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("framework", ["keras"], indirect=True)
def test_bad_input(files, refused, make, flags, message):
    import re

    if make is not None:
        make().save(files / "one.keras")
    assert re.search(message, refused(files, *flags))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": X[:0], "y": Y[:0]}, "no examples"),
        ({"x": X[:, :3], "y": Y}, "reshape the data"),
        ({"x": X, "y": Y + 1}, "Labels go from 1 to 3 and the model has 3"),
        ({"x": X, "y": np.ones((NUM, 7))}, r"shape \(7,\) and outputs \(3,\)"),
    ],
)
def test_bad_data(files, data, message):
    with pytest.raises(tfopt.InputError, match=message):
        tfopt.distill(files / "one.keras", files / "untrained.keras", data,
                      files / "student.keras", **OPTIONS)  # fmt: skip
    assert not (files / "student").exists()


def test_data_sets_without_batches(files):
    data = tf.data.Dataset.from_tensor_slices((X[:0], Y[:0])).batch(4)
    with pytest.raises(tfopt.InputError, match="hold no examples"):
        tfopt.distill(files / "one.keras", files / "untrained.keras", data,
                      files / "student.keras", **OPTIONS)  # fmt: skip


def test_resuming_something_else(framework, files, call, refused):
    assert call(files)[0] == commands.DONE
    message = refused(files, "--resume", f"--teachers={files / 'two.keras'}")
    assert "list of teachers is not that of the run to resume" in message
    message = refused(files, "--resume", f"--student={files / 'two.keras'}")
    assert "student is not that of the run to resume" in message
    assert "seed is not that of the run to resume" in refused(files, "--resume", "--seed=1")
    np.savez(files / "data.npz", **{**DATA, "x_train": X + 1})
    assert "is of other data" in refused(files, "--resume", "--epochs=2")


def test_custom_objects(files, call, monkeypatch, tmp_path):
    (tmp_path / "layers_of_mine.py").write_text(
        "import keras\n\nclass Doubled(keras.layers.Layer):\n"
        "    def call(self, inputs):\n        return 2 * inputs\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("layers_of_mine")
    import keras

    for name in ("one", "untrained"):
        model = keras.Sequential([keras.Input((4,)), mine.Doubled(), keras.layers.Dense(CLASSES)])
        model.save(files / f"{name}.keras")
    status, _, err = call(files, "--custom_objects=layers_of_mine")
    assert status == commands.DONE, err


def test_help_needs_no_tensorflow():
    script = (
        "import sys\nfrom tfopt.commands import main\nmain(['distill', '--help'])\n"
        "assert not {'tensorflow', 'keras', 'numpy'} & set(sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert "--[no]cache" in found.stdout


TWO_DEVICES = """
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import tfopt
from tests.distillation.test_distill import DATA
from tfopt.train import several_workers
for devices in (1, 2):
    several_workers.strategy = lambda: (
        tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]) if devices == 2 else None)
    for teachers, cache in ((["one.keras", "two.keras"], False), (["one.keras", "litert"], True)):
        found = tfopt.distill(teachers, "untrained.keras", DATA, f"{devices}.keras", epochs=2,
                              batch_size=12, cache=cache, overwrite=True, quiet=True,
                              learning_rate=0.1)
        print(*found.history["loss"], *found.history["teacher_loss"], *found.history["val_loss"])
"""


def test_several_devices(framework, files):
    """On two processors as on two GPUs; against one."""
    tfopt.convert(files / "two.keras", "float32@litert", files / "litert")
    found = subprocess.run(
        [sys.executable, "-c", TWO_DEVICES], cwd=files, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-3000:]
    lines = [list(map(float, line.split())) for line in found.stdout.splitlines()[-4:]]
    assert lines[2] == pytest.approx(lines[0], rel=1e-4)
    assert lines[3] == pytest.approx(lines[1], rel=1e-4)


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
sys.exit(main(["distill", *sys.argv[1:]]))
"""


def test_several_workers(framework, files):
    """Two workers of which one is killed, resumed, against one process."""
    # Orders of examples do not matter: a batch holds them all.
    flags = [f"--teachers={files / 'one.keras'},{files / 'two.keras'}",
             f"--student={files / 'untrained.keras'}", f"--data={files / 'data.npz'}",
             f"--output={files / 'student.keras'}", "--batch_size=12", "--epochs=3",
             "--learning_rate=0.1"]  # fmt: skip
    script = WORKER.format(framework=framework)
    left = wait_for(start_workers(script, *flags), 1, -signal.SIGKILL)[0]
    assert "Another worker ended or cannot be reached" in left
    assert "Traceback" not in left
    wait_for(start_workers(script, *flags, "--resume"), 0, 0)
    expected = tfopt.distill(
        [files / "one.keras", files / "two.keras"], files / "untrained.keras", DATA,
        files / "alone.keras", epochs=3, batch_size=12, learning_rate=0.1, quiet=True,
    )  # fmt: skip
    for folder in ("student", "student-worker-1"):
        history = pd.read_csv(files / folder / "history.csv")
        assert list(history.epoch) == [1, 2, 3]
        for name in ("loss", "label_loss", "teacher_loss", "accuracy", "val_loss"):
            assert list(history[name]) == pytest.approx(expected.history[name], rel=1e-4)
    assert_same(expected.student, load(framework, files / "student.keras"))
    assert not (files / "student-worker-1.keras").exists()
