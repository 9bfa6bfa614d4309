"""The rewrite to half precision, against NumPy and against what each list should do."""

import os

import numpy as np
import pytest

from tests import goldens
from tfopt import dataset, half_graph, live, runtimes, source
from tfopt.errors import ConversionError
from tfopt.graph import SIGNATURE_KEY, FrozenGraph
from tfopt.search import steps
from tfopt.variant import Variant

EPSILON = {"bfloat16": 2.0**-8, "float16": 2.0**-11}


def freeze(function, tmp_path, *shapes):
    """A function of float32 tensors as a frozen graph."""
    import tensorflow as tf

    specs = [tf.TensorSpec(shape, tf.float32, name=f"x{i}") for i, shape in enumerate(shapes)]
    traced = tf.function(function, input_signature=specs, autograph=False)
    live.export(traced, tmp_path / "model")
    return FrozenGraph.from_saved_model(tmp_path / "model")


def run(graph, tmp_path, **inputs):
    import tensorflow as tf

    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    graph.save(folder)
    loaded = tf.saved_model.load(str(folder))
    outputs = loaded.signatures[SIGNATURE_KEY](**{k: tf.constant(v) for k, v in inputs.items()})
    return next(iter(outputs.values())).numpy()


def dtypes(graph, op):
    import tensorflow as tf

    nodes = [node for node in graph.graph_def.node if node.op == op]
    return {tf.dtypes.as_dtype(node.attr["T"].type).name for node in nodes}


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)


def softmax_between_products(weights):
    import tensorflow as tf

    return lambda x: tf.matmul(tf.nn.softmax(tf.matmul(x, weights)), weights)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
class TestRewrite:
    def test_rounds_weights_inputs_and_the_result(self, tmp_path, weights, dtype):
        import ml_dtypes
        import tensorflow as tf

        graph = freeze(lambda x: tf.matmul(x, weights) + 0.0, tmp_path, (None, 8))
        half = half_graph.to_half(graph, dtype)
        x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
        kind = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
        rounded = [array.astype(kind).astype(np.float64) for array in (x, weights)]
        expected = rounded[0] @ rounded[1]
        found = run(half, tmp_path, x0=x)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=EPSILON[dtype], atol=EPSILON[dtype])
        assert np.abs(found - x @ weights).max() > EPSILON[dtype] / 20
        stored = [n for n in half.graph_def.node if n.op == "Const" and n.attr["dtype"].type != 1]
        assert any(n.attr["value"].tensor.tensor_shape.dim for n in stored)  # weights, folded

    def test_keeps_sensitive_operations(self, tmp_path, weights, dtype):
        graph = freeze(softmax_between_products(weights), tmp_path, (None, 8))
        kept = half_graph.to_half(graph, dtype)
        assert dtypes(kept, "Softmax") == {"float32"}
        assert dtypes(kept, "MatMul") == {dtype}
        assert half_graph.num_half(kept, dtype) == 2

    def test_keeps_named_nodes(self, tmp_path, weights, dtype):
        graph = freeze(softmax_between_products(weights), tmp_path, (None, 8))
        first, second = [n.name for n in graph.graph_def.node if n.op == "MatMul"]
        found = half_graph.to_half(graph, dtype, float32_nodes=[first])
        of = {node.name: node.attr["T"].type for node in found.graph_def.node}
        assert of[first] == 1
        assert of[second] != 1
        assert found.signature == graph.signature

    def test_leaves_the_environment_alone(self, tmp_path, weights, dtype, monkeypatch):
        name = "TF_AUTO_MIXED_PRECISION_GRAPH_REWRITE_DENYLIST_ADD"
        removed = name.replace("DENYLIST_ADD", "ALLOWLIST_REMOVE")
        monkeypatch.setenv(name, "MatMul")
        monkeypatch.setenv(removed, "MatMul")
        before = dict(os.environ)
        graph = freeze(softmax_between_products(weights), tmp_path, (None, 8))
        # What the user denies stays denied.
        assert half_graph.num_half(half_graph.to_half(graph, dtype), dtype) == 0
        assert dict(os.environ) == before

    def test_lists_of_loops_stay_float32(self, tmp_path, dtype):
        golden = goldens.GOLDENS["lstm"]
        goldens.export(golden, tmp_path / "lstm")
        graph = FrozenGraph.from_saved_model(tmp_path / "lstm")
        half = half_graph.to_half(graph, dtype)
        assert half_graph.num_half(half, dtype) > 0
        inputs = golden.examples(3, 0)
        names = half.signature.input_names
        given = {name: inputs[name] for name in names}
        expected, found = run(graph, tmp_path, **given), run(half, tmp_path, **given)
        np.testing.assert_allclose(found, expected, atol=20 * EPSILON[dtype])


def test_sensitive_operations_may_be_left_to_tensorflow(tmp_path, weights):
    graph = freeze(softmax_between_products(weights), tmp_path, (None, 8))
    for dtype in ("bfloat16", "float16"):
        assert dtypes(half_graph.to_half(graph, dtype, ()), "Softmax") == {dtype}


class TestBeyondFloat16:
    def graph(self, tmp_path, scale):
        import tensorflow as tf

        weights = np.eye(4, dtype=np.float32)
        return freeze(
            lambda x: tf.matmul(tf.nn.relu(tf.matmul(x, weights * scale)), weights / scale),
            tmp_path,
            (None, 4),
        ).rewrite(half_graph.BEFORE)

    def test_names_what_reads_or_makes_large_values(self, tmp_path):
        graph = self.graph(tmp_path, 1000)
        operations = {node.name: node.op for node in graph.graph_def.node}
        small, large = ({"x0": np.full((2, 4), value, np.float32)} for value in (16.3, 16.4))
        assert half_graph.beyond_float16(graph, [small]) == []
        found = half_graph.beyond_float16(graph, [small, large])  # 16400 > 65504 / 4
        assert [operations[name] for name in found] == ["MatMul", "Relu", "MatMul"]

    def test_counts_values_that_are_not_finite(self, tmp_path):
        found = half_graph.beyond_float16(
            self.graph(tmp_path, 1), [{"x0": np.full((1, 4), np.nan, np.float32)}]
        )
        assert found

    def test_conversion_keeps_them_and_says_so(self, tmp_path):
        """In float16 throughout the answer would be infinite."""
        x = np.full((64, 4), 100, np.float32)
        graph = self.graph(tmp_path, 1000)
        overflowing = half_graph.to_half(graph, "float16")
        assert not np.isfinite(run(overflowing, tmp_path, x0=x[:1])).all()
        prepared = source.prepare(tmp_path / "model", tmp_path / "source")
        data = dataset.write({"x0": x}, prepared.signature, tmp_path / "data")
        with pytest.raises(ConversionError, match="no operation that it would run in float16"):
            steps.convert(
                prepared, Variant.parse("float16@tensorflow"), tmp_path / "a", None, data, 1
            )
        parent = steps.convert(
            prepared, Variant.parse("float32@onnxruntime"), tmp_path / "onnx", None, data, 1
        )
        made = steps.convert(
            prepared, Variant.parse("float16@onnxruntime"), tmp_path / "b", parent.folder, data, 1
        )
        assert "3 operations stay float32 for values near the largest" in made.notes[0]
        with runtimes.load(made) as session:
            found = next(iter(session.run({"x0": x[:2]}).values()))
        np.testing.assert_allclose(found, x[:2], rtol=1e-5)

    def test_results_beyond_float16_stay_what_they_are(self, tmp_path):
        import tensorflow as tf

        weights = np.eye(4, dtype=np.float32)
        freeze(lambda x: tf.matmul(tf.matmul(x, weights), weights * 1e6), tmp_path, (None, 4))
        x = np.full((64, 4), 2, np.float32)
        prepared = source.prepare(tmp_path / "model", tmp_path / "source")
        data = dataset.write({"x0": x}, prepared.signature, tmp_path / "data")
        for name in ("float32@onnxruntime", "float16@onnxruntime", "float16@tensorflow"):
            variant = Variant.parse(name)
            parent = tmp_path / "float32@onnxruntime" if steps.parents_of(variant) else None
            made = steps.convert(prepared, variant, tmp_path / name, parent, data, 1)
            with runtimes.load(made) as session:
                found = next(iter(session.run({"x0": x[:2]}).values()))
            np.testing.assert_allclose(found, np.full((2, 4), 2e6), rtol=1e-5)
        assert "1 operation stays float32" in "".join(made.notes)
