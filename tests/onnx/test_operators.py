"""Operations on NaN, infinity, negative and large numbers: ONNX Runtime against TensorFlow."""

import inspect

import keras
import numpy as np
import onnxruntime
import pytest
import tensorflow as tf

from tfopt.errors import ConversionError
from tfopt.graph import FrozenGraph
from tfopt.onnx.export import to_onnx

NAN, INF = np.nan, np.inf
INPUTS = {
    "s": np.float32([[NAN, INF, -INF, 0, -0.0, 1], [1e30, -1e30, 1e-30, -1.5, 2.5, 3]]),
    "t": np.float32([[1, NAN, 2, -INF, 0, 0], [INF, 3, -2, 0.5, -0.0, 1e30]]),
    "x": np.float32([[1e-8, -1e-8, 1e-4, -0.9, 5.3, 0], [30, -0.49, 0.51, 3.25, 0.0, -1e-4]]),
    "z": np.float32([[2, -2, 3, -3, 1.5, -1], [-7, 7, 0.5, -0.75, 1, 2]]),
    "b": np.array([[1, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 1]], bool),
    "i": np.int32([[7, -7, 16777217, 2**30 + 1, -5, 3], [1, 0, -1, 5, -16777217, 2]]),
    "j": np.int32([[2, 2, 16777216, 2**30, -3, -2], [3, 3, 2, -5, -16777216, 1]]),
    "k": np.int32([[0, 2, -1, 1, 3, -2], [1, 1, -3, 2, 0, 7]]),
}
ops = tf.raw_ops


CASES = {
    "where": lambda b, s, t: tf.where(b, s, t),
    "where, left out": lambda s: tf.where(tf.math.is_finite(s), s, 0.0),
    "where, attention": lambda b, x: tf.nn.softmax(tf.where(b, x, -INF)),
    "where, log of 0": lambda x: tf.where(x > 0, tf.math.log(x), 0.0),
    "where, column": lambda b, s: tf.where(b[:, :1], s, -INF),
    "where, lower ranks": lambda b, s: tf.where(b, s[0], s[1, :1]),
    "where, one condition": lambda b, s, t: tf.where(b[0, 0], s, t),
    "where, scalars": lambda b: tf.where(b, 1.0, -INF),
    "where, bool": lambda b, i, j: tf.where(b, i > 0, j < 0),
    "where, int32": lambda b, i, j: tf.where(b, i, j),
    "where, int64": lambda b, i, j: tf.where(b, tf.cast(i, tf.int64) * 2**20, tf.cast(j, tf.int64)),
    "where, uint8": lambda b, i, j: tf.where(b, tf.cast(i, tf.uint8), tf.cast(j, tf.uint8)),
    "where, int16": lambda b, i, j: tf.where(b, tf.cast(i, tf.int16), tf.cast(j, tf.int16)),
    "where, float16": lambda b, s, t: tf.where(b, tf.cast(s, tf.float16), tf.cast(t, tf.float16)),
    "where, float64": lambda b, s, t: tf.where(b, tf.cast(s, tf.float64), tf.cast(t, tf.float64)),
    "where, strings": lambda b: tf.where(b, "yes", "no"),
    "Select, rows": lambda b, s, t: ops.Select(condition=b[:, 0], x=s, y=t),
    "Select, rows of matrices": lambda b, s, t: ops.Select(
        condition=b[:, 0], x=s[:, :, None], y=t[:, :, None]
    ),
    "Select, vectors": lambda b, s, t: ops.Select(condition=b[0], x=s[1], y=t[1]),
    "Select, one condition": lambda b, s, t: ops.Select(condition=b[1, 0], x=s, y=t),
    "nan_to_num": lambda s: keras.ops.nan_to_num(s),
    "threshold": lambda s: keras.activations.threshold(s, 1.0, 0.0),
    "hard_shrink": lambda s: keras.activations.hard_shrink(s),
    "celu": lambda s: keras.activations.celu(s),
    "relu with slope": lambda s: keras.ops.relu(s - 0.5) - 0.1 * keras.ops.relu(-s),
    "masked softmax": lambda b, t: keras.layers.Softmax()(t[:, 2:], b[:, 2:]),
    "band_part": lambda s: tf.linalg.band_part(tf.reshape(s, (2, 2, 3)), -1, 0),
    "band_part, diagonal": lambda s: tf.linalg.band_part(tf.reshape(s, (2, 2, 3)), 0, 0),
    "band_part, bool": lambda b: tf.linalg.band_part(tf.reshape(b, (2, 3, 2)), 1, 0),
    "band_part, int32": lambda i: tf.linalg.band_part(i, 0, 2),
    "one_hot": lambda k: tf.one_hot(k, 3),
    "one_hot, infinite": lambda k: tf.one_hot(k, 3, on_value=0.0, off_value=-INF),
    "one_hot, first axis": lambda k: tf.one_hot(k, 3, axis=0),
    "one_hot, middle axis": lambda k: tf.one_hot(k, 3, axis=1),
    "one_hot, one index": lambda k: tf.one_hot(k[0, 1], 3),
    "one_hot, int32": lambda k: tf.one_hot(k, 3, dtype=tf.int32),
    "one_hot, bool": lambda k: tf.one_hot(tf.cast(k, tf.int64), 3, True, False, dtype=tf.bool),
    "one_hot, uint8": lambda k: tf.one_hot(tf.cast(k, tf.uint8), 3),
    "less, int32": lambda i, j: j < i,
    "greater, int64": lambda i, j: tf.cast(i, tf.int64) * 1000003 > tf.cast(j, tf.int64) * 1000003,
    "greater, uint8": lambda i, j: tf.cast(i, tf.uint8) > tf.cast(j, tf.uint8),
    "less, int16": lambda i, j: tf.cast(i, tf.int16) < tf.cast(j, tf.int16),
    "less, float32": lambda s, t: s < t,
    "greater, float64": lambda s, t: tf.cast(s, tf.float64) > tf.cast(t, tf.float64),
    "floordiv, int32": lambda i, j: i // j,
    "floordiv, int64": lambda i, j: tf.cast(i, tf.int64) * 1000003 // tf.cast(j, tf.int64),
    "floordiv, int8": lambda k: tf.cast(k, tf.int8) // 2,
    "floordiv, uint8": lambda i: tf.cast(i, tf.uint8) // 3,
    "floordiv, float32": lambda x, z: x // z,
    "floormod, int32": lambda i, j: i % j,
    "floormod, int64": lambda i, j: tf.cast(i, tf.int64) * 1000003 % tf.cast(j, tf.int64),
    "floormod, int8": lambda k: tf.cast(k, tf.int8) % 3,
    "floormod, float32": lambda x, z: x % z,
    "floormod, extremes": lambda s: s % 3.0,
    "truncatemod, int32": lambda i, j: tf.truncatemod(i, j),
    "truncatemod, float32": lambda x, z: tf.truncatemod(x, z),
    "multiply_no_nan": lambda s, t: tf.math.multiply_no_nan(s, t),
    "xlogy": lambda s, t: tf.math.xlogy(s, t),
    "xdivy": lambda s, t: tf.math.xdivy(s, t),
    "log1p": lambda x: tf.math.log1p(x),
    "log1p, extremes": lambda s: tf.math.log1p(s),
    "expm1": lambda x: tf.math.expm1(x),
    "expm1, extremes": lambda s: tf.math.expm1(s),
    "erfc": lambda x: tf.math.erfc(x),
}


@pytest.fixture(scope="module")
def found_and_wanted(tmp_path_factory):
    """Outputs of all cases, which are converted together, and TensorFlow's."""

    specs = [tf.TensorSpec((None, 6), value.dtype, name) for name, value in INPUTS.items()]

    @tf.function(input_signature=specs, autograph=False)
    def serve(*tensors):
        by_name = dict(zip(INPUTS, tensors, strict=True))
        return {
            f"case_{index}": case(*(by_name[key] for key in inspect.signature(case).parameters))
            for index, case in enumerate(CASES.values())
        }

    module = tf.Module()
    module.serve = serve
    folder = tmp_path_factory.mktemp("operators")
    tf.saved_model.save(module, str(folder), signatures=serve.get_concrete_function())
    model = to_onnx(FrozenGraph.from_saved_model(folder))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    found = dict(zip(names, session.run(None, INPUTS), strict=True))
    return found, serve(*map(tf.constant, INPUTS.values()))


@pytest.mark.parametrize("name", CASES)
def test_equals_tensorflow(name, found_and_wanted):
    found, wanted = (outputs[f"case_{list(CASES).index(name)}"] for outputs in found_and_wanted)
    wanted = wanted.numpy()
    if wanted.dtype == object:
        assert found.tolist() == np.vectorize(bytes.decode)(wanted).tolist()
        return
    assert found.dtype == wanted.dtype
    # Of log1p and expm1 near 0 every digit counts; 1 - Erf loses those of a small Erfc.
    atol = 1e-7 if name == "erfc" else 1e-37
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=atol)


def test_refused_operations_are_named_with_their_layer(tmp_path):
    @tf.function(input_signature=[tf.TensorSpec((None, 4), tf.float32, "x")])
    def serve(x):
        with tf.name_scope("spectrum"):
            return {"y": tf.math.real(tf.signal.fft(tf.cast(x, tf.complex64)))}

    module = tf.Module()
    module.serve = serve
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=serve)
    with pytest.raises(ConversionError, match=r"no conversion for Real \(in spectrum/Real\)\. An"):
        to_onnx(FrozenGraph.from_saved_model(tmp_path / "model"))
