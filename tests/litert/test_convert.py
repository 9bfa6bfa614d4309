"""Batch sizes of what is converted to LiteRT."""

import numpy as np
import pytest

from tfopt import source
from tfopt.errors import ConversionError, InputError
from tfopt.runtimes import load
from tfopt.search import steps
from tfopt.variant import Variant


def converted(folder, call, shape):
    import tensorflow as tf

    module = tf.Module()
    module.call = tf.function(call, input_signature=[tf.TensorSpec(shape, name="x")])
    tf.saved_model.save(module, str(folder / "model"), signatures=module.call)
    prepared = source.prepare(folder / "model", folder / "source")
    return steps.convert(
        prepared, Variant.parse("float32@litert"), folder / "artifact", None, None, 1
    )


def test_other_batch_sizes_than_the_fixed_one_are_refused(tmp_path):
    """LiteRT itself resizes the input and computes on with the sizes inside."""
    import tensorflow as tf

    artifact = converted(tmp_path, lambda x: {"y": tf.reshape(x, [-1, 2])}, (1, 4))
    with load(artifact) as session:
        with pytest.raises(InputError, match=r"got x float32 \(3, 4\); expected x float32 \(1, 4"):
            session.run({"x": np.ones((3, 4), np.float32)})
        outputs = session.run({"x": np.arange(4, dtype=np.float32)[None]})
    np.testing.assert_array_equal(outputs["y"], [[0, 1], [2, 3]])


def test_reason_when_the_fixed_size_is_impossible(tmp_path):
    """The second example is read, and conversions fall back to batches of one."""
    import tensorflow as tf

    def call(x):
        return {"y": tf.abs(tf.signal.fft2d(tf.cast(x, tf.complex64)))[1]}

    with pytest.raises(ConversionError, match=r"no kernel for .*FFT2D"):
        converted(tmp_path, call, (None, 4, 4))
