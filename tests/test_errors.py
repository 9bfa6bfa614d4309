"""What errors of other libraries are shortened to."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from tfopt.errors import first_line


def test_the_reason_and_not_where_nodes_were_defined():
    @tf.function(input_signature=[tf.TensorSpec([2], tf.float32)])
    def logarithm(x):
        return tf.debugging.check_numerics(tf.math.log(x), "The logarithm is wrong")

    with pytest.raises(tf.errors.InvalidArgumentError) as raised:
        logarithm(tf.constant([1.0, 0.0]))
    assert str(raised.value).splitlines()[0] == "Graph execution error:"
    assert first_line(raised.value).startswith("The logarithm is wrong : Tensor had")


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("\n  first\nsecond", "first"),
        ("Graph execution error:\n\nDetected at node Mul defined at (most recent call last):\n"
         '  File "a.py", line 3, in f\n    x * y\n\nNo kernel for Mul', "No kernel for Mul"),
        ("in user code:\n\n    File \"a.py\", line 1, in f  *\n        g(x)\n\n    ValueError: no",
         "ValueError: no"),
        ("<stack traces unavailable>\nIt failed.", "It failed."),
        ("Graph execution error:", "Graph execution error:"),
        ("Exception from src/inference/src/cpp/core.cpp:117:\nException from src/inference/src/dev/"
         "plugin.cpp:54:\nCheck 'is_cpu_precision' failed at src/plugins/intel_cpu/src/a.cpp:109:\n"
         "CPU plugin does not support f64 precision\n\n",
         "CPU plugin does not support f64 precision"),
        ("Check 'false' failed at src/frontends/common_translators/src/unconverted_ops_report.cpp:"
         "151:\nFrontEnd API failed with OpConversionFailure:\nModel wasn't fully converted. "
         "Failed operations detailed log:\n-- StatefulPartitionedCall with a message:\n"
         "Exception from src/core/src/node.cpp:581:\nnode index is out of range\n\nSummary:\n"
         "-- Conversion is failed for: StatefulPartitionedCall\n", "node index is out of range"),
        ("failed while converting: 'main': \n"
         "Some ops are not supported by the native TFLite runtime",
         "Some ops are not supported by the native TFLite runtime"),
        ("<unknown>:0: error: failed while converting: 'main':\n<unknown>:0: error: 'tf.FFT' op is "
         "neither a custom op nor a flex op", "'tf.FFT' op is neither a custom op nor a flex op"),
        ("", "ValueError"),
    ],
)  # fmt: skip
def test_lines_that_tell_nothing_are_passed_over(message, line):
    assert first_line(ValueError(message)) == line


class NoConfig(keras.layers.Layer):
    """Cannot be made again: it takes none of what Keras passes."""

    def __init__(self, units):
        super().__init__()
        self.units = units

    def get_config(self):
        return {**super().get_config(), "units": self.units}


class Sums(keras.layers.Layer):
    """Fails when it is called."""

    def call(self, x):
        return x + tf.ones((3,), tf.float64)


def test_a_layer_that_cannot_be_made_again():
    with pytest.raises(TypeError) as raised:
        NoConfig.from_config(NoConfig(4).get_config())
    line = first_line(raised.value)
    assert line.startswith("NoConfig.__init__() got an unexpected keyword argument '")
    assert "config=" in str(raised.value)


def test_a_layer_that_cannot_be_called():
    with pytest.raises(Exception, match="Exception encountered when calling") as raised:
        Sums()(np.ones((2, 3), np.float32))
    line = first_line(raised.value)
    assert "expected to be" in line and "\x1b" not in line
