"""Float64 and half precision rewritten to float32, against NumPy."""

import numpy as np
import pytest

from tfopt import dataset, float32_graph, runtimes, source
from tfopt.errors import ConversionError
from tfopt.graph import SIGNATURE_KEY, FrozenGraph
from tfopt.search import steps
from tfopt.variant import Variant

X = np.random.default_rng(0).normal(size=(64, 4))
WEIGHTS = np.random.default_rng(1).normal(size=(4, 3))


def prepare(function, folder, **specs):
    import tensorflow as tf

    specs = [tf.TensorSpec(shape, dtype, name=name) for name, (shape, dtype) in specs.items()]
    traced = tf.function(function, input_signature=specs)
    tf.saved_model.save(
        tf.Module(), str(folder / "m"), signatures={SIGNATURE_KEY: traced.get_concrete_function()}
    )
    return source.prepare(folder / "m", folder / "source")


def run(graph, folder, **inputs):
    import tensorflow as tf

    graph.save(folder / "run")
    function = tf.saved_model.load(str(folder / "run")).signatures[SIGNATURE_KEY]
    outputs = function(**{name: tf.constant(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in outputs.items()}


def test_float64_with_loops_and_branches(tmp_path):
    import tensorflow as tf

    def network(x):
        h = tf.matmul(x, WEIGHTS)
        step = lambda i, h: (i + 1, tf.cond(i > 1, lambda: h * 0.5, lambda: h + 1.0))  # noqa: E731
        _, h = tf.while_loop(lambda i, h: i < 3, step, [0, h])
        return {"values": h, "class": tf.argmax(h, -1)}

    prepared = prepare(network, tmp_path, x=((None, 4), tf.float64))
    assert prepared.computes_in == "float64"
    assert "computes in float64" in prepared.notes[0]
    assert float32_graph.computes_in(prepared.frozen_graph()) == "float32"
    assert float32_graph.computes_in(prepared.unchanged_graph()) == "float64"
    found = run(prepared.frozen_graph(), tmp_path, x=X)
    expected = (X @ WEIGHTS + 2) * 0.5
    assert found["values"].dtype == np.float64
    np.testing.assert_allclose(found["values"], expected, atol=1e-5)
    np.testing.assert_array_equal(found["class"], expected.argmax(-1))


def test_arithmetic_on_large_integers_stays_exact(tmp_path):
    import tensorflow as tf

    def network(ids, column):
        rest = tf.cast(tf.math.floormod(tf.cast(ids, tf.float64), 7.0), tf.int64)
        return {"rest": rest, "column": tf.cast(column, tf.int64), "root": tf.sqrt(column)}

    prepared = prepare(network, tmp_path, ids=((None,), tf.int64), column=((None,), tf.float64))
    ids = np.array([2**40 + 1, 2**24 + 1, 5])
    found = run(prepared.frozen_graph(), tmp_path, ids=ids, column=ids.astype(np.float64))
    np.testing.assert_array_equal(found["rest"], ids % 7)
    np.testing.assert_array_equal(found["column"], ids)
    np.testing.assert_allclose(found["root"], np.sqrt(ids), rtol=1e-6)
    ops = {n.name: n for n in prepared.frozen_graph().graph_def.node}
    assert [n.attr["T"].type for n in ops.values() if n.op == "Sqrt"] == [1]  # float32


def test_functions_return_and_reuse_exact_numbers(tmp_path):
    import tensorflow as tf

    @tf.function(autograph=False)
    def inner(ids, x):
        seven = tf.constant(7.0, tf.float64)
        rest = tf.math.floormod(tf.cast(ids, tf.float64), seven)
        return tf.cast(rest, tf.int64), rest, x * seven

    def network(ids, x):
        branch = lambda: inner(ids, x)  # noqa: E731
        rest, as_float, scaled = tf.cond(tf.reduce_sum(x) > -1e9, branch, branch)
        return {"rest": rest, "as_float": as_float * 0.5, "scaled": scaled}

    prepared = prepare(network, tmp_path, ids=((None,), tf.int64), x=((None,), tf.float64))
    assert prepared.frozen_unchanged is not None
    ids = np.array([2**40 + 1, 2**24 + 1, 5])
    found = run(prepared.frozen_graph(), tmp_path, ids=ids, x=X[:3, 0])
    np.testing.assert_array_equal(found["rest"], ids % 7)
    np.testing.assert_array_equal(found["as_float"], (ids % 7) * 0.5)
    np.testing.assert_allclose(found["scaled"], X[:3, 0] * 7, rtol=1e-6)


def test_constants_beyond_float32_do_not_make_nan(tmp_path):
    import tensorflow as tf

    def network(x):
        return tf.nn.softmax(tf.where(x > 0, x, -1e300)) / (tf.zeros_like(x) + 1e-300) * 1e-300

    prepared = prepare(network, tmp_path, x=((None, 4), tf.float64))
    assert np.isfinite(next(iter(run(prepared.frozen_graph(), tmp_path, x=X).values()))).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(tmp_path, dtype):
    import tensorflow as tf

    def network(x):
        return tf.cast(tf.matmul(tf.cast(x, dtype), tf.constant(WEIGHTS, dtype)), tf.float32)

    prepared = prepare(network, tmp_path, x=((None, 4), tf.float32))
    assert prepared.computes_in == dtype
    found = run(prepared.frozen_graph(), tmp_path, x=X.astype(np.float32))
    rounded = tf.cast(tf.constant(WEIGHTS, dtype), tf.float64).numpy()
    np.testing.assert_allclose(next(iter(found.values())), X @ rounded, atol=1e-5)


def test_bits_cannot_be_rewritten(tmp_path):
    import tensorflow as tf

    prepared = prepare(lambda x: tf.bitcast(x * 2.0, tf.int64), tmp_path, x=((None, 4), tf.float64))
    assert prepared.frozen_unchanged is None
    assert "Bitcast reads the bits" in prepared.notes[0]
    with pytest.raises(ConversionError, match="Bitcast"):
        float32_graph.to_float32(FrozenGraph.from_saved_model(prepared.frozen_folder))


def test_float32_models_stay_as_they_are(tmp_path):
    import tensorflow as tf

    prepared = prepare(lambda x: tf.cast(x * 2.0, tf.float64), tmp_path, x=((None, 4), tf.float32))
    assert (prepared.computes_in, prepared.frozen_unchanged, prepared.notes) == (
        "float32",
        None,
        (),
    )


@pytest.mark.parametrize("runtime", ["litert", "onnxruntime", "openvino"])
def test_runtimes_take_float64(tmp_path, runtime):
    import tensorflow as tf

    if runtimes.get(runtime).missing():
        pytest.skip(f"{runtime} is not installed")
    kernel = np.random.default_rng(2).normal(size=(3, 3, 2, 4))

    def network(x):
        h = tf.nn.relu(tf.nn.conv2d(x, kernel, 1, "VALID"))
        return tf.matmul(tf.reduce_mean(h, [1, 2]), WEIGHTS)

    images = np.random.default_rng(3).normal(size=(64, 5, 5, 2))
    windows = np.lib.stride_tricks.sliding_window_view(images[:1], (3, 3), axis=(1, 2))
    hidden = np.maximum(np.einsum("nijchw,hwco->nijo", windows, kernel), 0)
    expected = hidden.mean((1, 2)) @ WEIGHTS
    prepared = prepare(network, tmp_path, x=((None, 5, 5, 2), tf.float64))
    data = dataset.write({"x": images}, prepared.signature, tmp_path / "data")
    folder = None
    for name, tolerance in (("float32", 1e-5), ("int8", 0.1)):
        variant = Variant.parse(f"{name}@{runtime}")
        made = steps.convert(prepared, variant, tmp_path / name, folder, data, 1)
        with runtimes.load(made) as session:
            found = next(iter(session.run({"x": images[:1]}).values()))
        folder = made.folder
        assert found.dtype == np.float64
        np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max())


def test_litert_names_operations_without_kernel(tmp_path):
    import tensorflow as tf

    prepared = prepare(
        lambda x: tf.linalg.inv(x + 3 * tf.eye(4)), tmp_path, x=((1, 4, 4), tf.float32)
    )
    variant = Variant.parse("float32@litert")
    with pytest.raises(ConversionError, match=r"no kernel for MatrixInverse.*Select TF ops"):
        steps.convert(prepared, variant, tmp_path / "a", None, None, 1)
