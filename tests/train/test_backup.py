"""Training that is interrupted and goes on, in the same precision or in another."""

import importlib
import warnings

import numpy as np
import pytest

import tfopt
from tests.train.models import FRAMEWORKS, IMAGES, LABELS, compile_, conv, policies
from tfopt.train.loss_scaling import scale_variable

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")


def backup_of(framework, folder):
    if framework == "keras":
        return tfopt.BackupAndRestore(folder)
    return importlib.import_module(framework).callbacks.BackupAndRestore(str(folder))


def state(model):
    """Weights, moments of the optimizer and its step, as arrays."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    found = optimizer.variables
    found = found() if callable(found) else found
    return [*model.get_weights(), *(np.asarray(value) for value in found)]


def interrupted(framework, policy, folder):
    """A model whose training ended with an error in its third epoch, with a backup."""
    keras = importlib.import_module(framework)

    class Failing(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise RuntimeError("planted")

    model = tfopt.set_precision(compile_(conv(framework), framework), policy)
    model.fit(IMAGES, LABELS, batch_size=8, verbose=0)
    if policy == "mixed_float16":
        scale_variable(model.optimizer).assign(512.0)
    callbacks = [backup_of(framework, folder), Failing()]
    with pytest.raises(RuntimeError, match="planted"):
        model.fit(IMAGES, LABELS, batch_size=8, epochs=4, verbose=0, callbacks=callbacks)
    return model


def gone_on(framework, policy, folder):
    """A new model that goes on, and what its state was when it did: epoch and arrays."""
    keras = importlib.import_module(framework)
    model = tfopt.set_precision(compile_(conv(framework, seed=1), framework), policy)
    seen = []

    class See(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if not seen:
                seen.append((epoch, state(model), scale(model)))

    callbacks = [backup_of(framework, folder), See()]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*[Ss]kipping variable loading.*")
        model.fit(IMAGES, LABELS, batch_size=8, epochs=4, verbose=0, callbacks=callbacks)
    return model, seen[0]


def scale(model):
    found = scale_variable(model.optimizer)
    return None if found is None else float(np.asarray(found))


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("second", POLICIES)
@pytest.mark.parametrize("first", POLICIES)
def test_going_on_in_another_precision(first, second, framework, tmp_path):
    before = interrupted(framework, first, tmp_path / "backup")
    after, (epoch, found, loss_scale) = gone_on(framework, second, tmp_path / "backup")
    assert epoch == 2
    for old, new in zip(state(before), found, strict=True):
        np.testing.assert_array_equal(old, new)
    expected = {"mixed_float16": 512.0 if first == "mixed_float16" else 2.0**15}
    assert loss_scale == expected.get(second)
    assert set(policies(after).values()) <= {second, "float32"}
    assert hasattr(after.optimizer, "inner_optimizer") == (second == "mixed_float16")


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_files_keep_policy_and_loss_scale(framework, tmp_path):
    keras = importlib.import_module(framework)
    model = tfopt.set_precision(
        compile_(conv(framework), framework), "mixed_float16", keep_float32=["block3/conv1"]
    )
    model.fit(IMAGES, LABELS, batch_size=8, verbose=0)
    scale_variable(model.optimizer).assign(1024.0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert policies(loaded) == policies(model)
    # Files of tf_keras hold the initial scale only; its checkpoints hold the last one (above).
    assert scale(loaded) == (1024.0 if framework == "keras" else 2.0**15)
    for old, new in zip(state(model), state(loaded), strict=True):
        np.testing.assert_array_equal(old, new)


def test_tf_keras_models_are_sent_to_their_own(tmp_path):
    model = compile_(conv("tf_keras"), "tf_keras")
    callback = tfopt.BackupAndRestore(tmp_path)
    callback.set_model(model)
    with pytest.raises(tfopt.InputError, match=r"tf_keras\.callbacks.BackupAndRestore"):
        callback.on_train_begin()
