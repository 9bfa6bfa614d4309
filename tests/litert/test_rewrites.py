"""Operations that LiteRT has no kernel for, against NumPy."""

import numpy as np
import pytest

from tfopt import source
from tfopt.runtimes import load
from tfopt.search import steps
from tfopt.variant import Variant


@pytest.mark.parametrize("dtype", ["int32", "int64", "float32"])
def test_abs_and_sign(tmp_path, dtype):
    import tensorflow as tf

    module = tf.Module()
    module.call = tf.function(
        lambda x: {"abs": tf.abs(x), "sign": tf.sign(x)},
        input_signature=[tf.TensorSpec((None, 7), dtype, name="x")],
    )
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.call)
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    variant = Variant.parse("float32@litert")
    artifact = steps.convert(prepared, variant, tmp_path / "artifact", None, None, 1)
    limits = np.finfo(dtype) if dtype == "float32" else np.iinfo(dtype)
    values = np.array([[limits.min, limits.min + 1, -2, 0, 1, 3, limits.max]], dtype)
    with load(artifact) as session:
        found = session.run({"x": values})
    np.testing.assert_array_equal(found["abs"], np.abs(values))
    np.testing.assert_array_equal(found["sign"], np.sign(values))
