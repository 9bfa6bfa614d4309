"""What tf2onnx leaves behind is freed while it works."""

import gc

import numpy as np
import pytest

from tfopt import live, source
from tfopt.onnx.export import to_onnx


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    import keras

    folder = tmp_path_factory.mktemp("collecting")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, activation="relu"),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    live.export(model, folder / "live")
    return model, source.prepare(folder / "live", folder / "source").frozen_graph()


def test_copies_of_the_graph_do_not_pile_up(frozen, monkeypatch):
    import tf2onnx.graph
    from tf2onnx import optimizer

    counts = []

    class Counting(optimizer.IdentityOptimizer):
        def __init__(self):
            super().__init__()
            graphs = [one for one in gc.get_objects() if isinstance(one, tf2onnx.graph.Graph)]
            counts.append(len(graphs))

    monkeypatch.setitem(optimizer._optimizers, "remove_identity", Counting)
    to_onnx(frozen[1])
    # The graph, its copy, and what TensorFlow's functions may hold; without: 10 and more.
    assert counts and max(counts) <= 3


def test_everything_is_put_back(frozen):
    import onnxruntime
    from tf2onnx import optimizer

    before, frozen_objects = dict(optimizer._optimizers), gc.get_freeze_count()
    model, graph = frozen
    onnx_model = to_onnx(graph)
    assert dict(optimizer._optimizers) == before
    assert gc.get_freeze_count() == frozen_objects
    inputs = np.random.default_rng(0).normal(size=(3, 8, 8, 3)).astype(np.float32)
    session = onnxruntime.InferenceSession(
        onnx_model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    outputs = session.run(None, {session.get_inputs()[0].name: inputs})[0]
    np.testing.assert_allclose(outputs, model.predict(inputs, verbose=0), rtol=1e-4, atol=1e-6)
