"""Keras models as ONNX files in ONNX Runtime, with its optimizer on, against `predict`."""

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

from tfopt.graph import FrozenGraph
from tfopt.onnx.export import to_onnx

layers = keras.layers


def low():
    """A bias that makes most values negative."""
    return keras.initializers.Constant(-2.0)


MODELS = {
    "gelu": ((8,), lambda: [layers.Dense(6, "gelu"), layers.Dense(4)]),
    "approximate gelu": (
        (8,),
        lambda: [
            layers.Dense(6),
            layers.Lambda(lambda x: keras.ops.gelu(x, approximate=True)),
            layers.Dense(4),
        ],
    ),
    "grouped convolution": ((9, 9, 4), lambda: [layers.Conv2D(8, 3, groups=4, activation="gelu")]),
    "grouped convolution, 1d": ((9, 6), lambda: [layers.Conv1D(6, 2, groups=3)]),
    # ResNet50V2 begins like this.
    "padded pooling": (
        (9, 9, 4),
        lambda: [
            layers.Conv2D(8, 3, bias_initializer=low()),
            layers.ZeroPadding2D(1),
            layers.MaxPooling2D(3, 2),
        ],
    ),
    "padded pooling behind gelu": (
        (9, 9, 4),
        lambda: [
            layers.Conv2D(8, 3, groups=2, activation="gelu", bias_initializer=low()),
            layers.ZeroPadding2D(1),
            layers.MaxPooling2D(3, 2),
        ],
    ),
    "padded pooling, 1d": (
        (9, 4),
        lambda: [
            layers.Conv1D(8, 2, bias_initializer=low()),
            layers.ZeroPadding1D(1),
            layers.MaxPooling1D(3, 2),
        ],
    ),
    "padded average": ((9, 9, 4), lambda: [layers.ZeroPadding2D(1), layers.AveragePooling2D(3)]),
}


def run(model, x):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {session.get_inputs()[0].name: x})[0]


@pytest.mark.parametrize("name", MODELS)
def test_equals_predict(name, tmp_path):
    shape, make = MODELS[name]
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape), *make()])
    model.export(str(tmp_path / "model"), verbose=False)
    x = np.random.default_rng(0).normal(size=(5, *shape)).astype(np.float32)
    wanted = model.predict(x, verbose=0)
    found = run(to_onnx(FrozenGraph.from_saved_model(tmp_path / "model")), x)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() < 1e-6 + 2e-5 * wanted.std()


def test_functions_that_are_not_inlined(tmp_path):
    """`jit_compile=True` and `_noinline` keep TensorFlow from inlining, one inside the other."""

    class Module(tf.Module):
        @tf.function(jit_compile=True)
        def inner(self, x):
            return tf.sin(x) * x

        @tf.function(experimental_attributes={"_noinline": True})
        def outer(self, x):
            return self.inner(x) + self.inner(2 * x)

        @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, name="x")])
        def serve(self, x):
            return {"y": self.outer(x)}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.serve)
    graph = FrozenGraph.from_saved_model(tmp_path / "model")
    assert any("Call" in node.op for node in graph.graph_def.node)
    assert not any("Call" in node.op for node in graph.inlined().graph_def.node)
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    wanted = np.sin(x) * x + np.sin(2 * x) * 2 * x
    np.testing.assert_allclose(run(to_onnx(graph), x), wanted, atol=1e-6)
