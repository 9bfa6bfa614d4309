"""Pooling over volumes on LiteRT, against Keras."""

import numpy as np
import pytest

from tfopt import source
from tfopt.litert import rewrites
from tfopt.runtimes import load
from tfopt.search import steps
from tfopt.variant import Variant

# Size, strides and padding of poolings over volumes of 7 x 6 x 5 voxels, all over the edge.
SHAPES = [
    ((2, 2, 2), (2, 2, 2), "same"),
    ((3, 2, 4), (2, 1, 3), "same"),
    ((3, 3, 3), (1, 1, 1), "same"),
    ((1, 3, 2), (3, 2, 2), "same"),
    ((2, 3, 2), (2, 2, 1), "valid"),
    ((7, 1, 5), (1, 2, 1), "valid"),
]
VOLUMES = np.random.default_rng(0).normal(-1, 1, size=(3, 7, 6, 5, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """All poolings in one model: its outputs on LiteRT and those of Keras."""
    import keras

    volumes = keras.Input(VOLUMES.shape[1:], name="volumes")
    outputs = {
        f"{kind}{index}": getattr(keras.layers, kind)(*shape)(volumes)
        for kind in ("MaxPooling3D", "AveragePooling3D")
        for index, shape in enumerate(SHAPES)
    }
    model = keras.Model(volumes, outputs)
    folder = tmp_path_factory.mktemp("pooling")
    model.export(folder / "model", verbose=False)
    prepared = source.prepare(folder / "model", folder / "source")
    artifact = steps.convert(
        prepared, Variant.parse("float32@litert"), folder / "artifact", None, None, 1
    )
    return artifact, model.predict(VOLUMES, verbose=0)


def test_every_shape(converted):
    artifact, expected = converted
    with load(artifact) as session:
        found = session.run({"volumes": VOLUMES})
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)


def test_any_number_of_examples_and_no_traces(converted):
    artifact, expected = converted
    assert artifact.signature.batch_size is None
    assert {path.name for path in artifact.folder.iterdir()} == {"artifact.json", "model.tflite"}
    with load(artifact) as session:
        found = session.run({"volumes": VOLUMES[:1]})
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values[:1], atol=1e-6, err_msg=name)


def test_unknown_sizes_stay(tmp_path):
    import tensorflow as tf

    module = tf.Module()
    module.call = tf.function(
        lambda x: tf.nn.max_pool3d(x, 2, 2, "VALID"),
        input_signature=[tf.TensorSpec((None, None, 4, 4, 1), name="x")],
    )
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.call)
    graph = source.prepare(tmp_path / "model", tmp_path / "source").frozen_graph()
    assert rewrites.rewrite(graph) is graph
