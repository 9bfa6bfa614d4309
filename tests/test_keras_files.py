"""Keras files that need more than their path: data, trust, or classes of a script."""

import json
import subprocess
import sys

import numpy as np
import pytest

from tfopt import source
from tfopt.errors import InputError

X = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)


def run(prepared, folder, array):
    import tensorflow as tf

    prepared.frozen_graph().save(folder)
    loaded = tf.saved_model.load(str(folder))
    function = loaded.signatures["serving_default"]
    (name,) = prepared.signature.input_names
    (output,) = function(**{name: tf.constant(array)}).values()
    return output.numpy()


@pytest.fixture(scope="module")
def never_called(tmp_path_factory):
    """A file of a subclassed model that was saved without a call."""
    import keras

    @keras.saving.register_keras_serializable("tests")
    class NeverCalled(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = keras.layers.Dense(4, kernel_initializer="ones", bias_initializer="ones")

        def call(self, x):
            return self.dense(x)

    path = tmp_path_factory.mktemp("subclassed") / "model.keras"
    NeverCalled().save(path)
    return path


class TestNeverCalled:
    def test_is_called_on_the_data(self, never_called, tmp_path):
        prepared = source.prepare(never_called, tmp_path / "source", example=X)
        found = run(prepared, tmp_path / "frozen", X)
        np.testing.assert_allclose(found, np.repeat(X.sum(-1, keepdims=True) + 1, 4, -1), atol=1e-5)

    def test_without_data(self, never_called, tmp_path):
        with pytest.raises(InputError, match="was never called, so its inputs are unknown; give"):
            source.prepare(never_called, tmp_path / "source")

    def test_on_data_that_does_not_fit(self, never_called, tmp_path):
        with pytest.raises(InputError, match="was never called, and it cannot be called on") as e:
            source.prepare(never_called, tmp_path / "source", example=np.array([b"word", b"b"]))
        assert len(str(e.value)) < 1000


@pytest.mark.parametrize(("framework", "suffix"), [("keras", "keras"), ("tf_keras", "h5")])
def test_lambda_layers_want_trust(framework, suffix, tmp_path):
    import importlib

    keras = importlib.import_module(framework)
    inputs = keras.Input((3,), name="x")
    outputs = keras.layers.Lambda(lambda x: x * 2.0 + 1.0, output_shape=(3,), name="double")(inputs)
    path = tmp_path / f"model.{suffix}"
    keras.Model(inputs, outputs).save(path)
    with pytest.raises(
        InputError, match=r"in layer 'double' \(a Lambda\).*`trust_model=True`"
    ) as e:
        source.prepare(path, tmp_path / "refused")
    assert len(str(e.value)) < 500
    prepared = source.prepare(path, tmp_path / "source", trust_model=True)
    np.testing.assert_allclose(run(prepared, tmp_path / "frozen", X), 2 * X + 1, atol=1e-6)


SCRIPT = """
import json
import sys

import keras
import numpy as np

import tfopt


class Shift(keras.layers.Layer):
    def __init__(self, by=0.0, **kwargs):
        super().__init__(**kwargs)
        self.by = by

    def call(self, x):
        return x + self.by

    def get_config(self):
        return super().get_config() | {"by": self.by}


if __name__ == "__main__":
    folder = sys.argv[1]
    inputs = keras.Input((3,), name="x")
    keras.Model(inputs, Shift(7.0)(inputs)).save(folder + "/model.keras")
    artifact = tfopt.convert(folder + "/model.keras", "float32@litert", folder + "/artifact")
    with tfopt.load(artifact.folder) as session:
        (found,) = session.run({"x": np.arange(3, dtype=np.float32)[None]}).values()
    print(json.dumps(found.tolist()))
"""


def test_classes_of_the_script_itself(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [[7.0, 8.0, 9.0]]
