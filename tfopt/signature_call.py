"""Signatures of TensorFlow, called as TensorFlow calls one function within another.

A signature's own call spends 0.15 ms in Python, half a millisecond with a hundred variables, and
more than twice that on slow processors, which is as long as an engine of TensorRT takes. Here it is
one operation (https://www.tensorflow.org/api_docs/python/tf/raw_ops/StatefulPartitionedCall), which
takes a tenth of that. The function is optimized, placed and run by the same code, with two
differences: what `tf.config.optimizer` was told is not looked at, and operations that run on the
processor do so one after another. So it is for functions whose work is on a GPU.
"""

from __future__ import annotations

import weakref
from typing import Any


class SignatureCall:
    """A signature that takes tensors by name and returns a dictionary of them.

    Args:
      signature: of a loaded SavedModel, which must stay alive.

    Attributes:
      graph: of the function that is called, with all functions that it calls.
    """

    def __init__(self, signature: Any):
        import tensorflow as tf

        specs = signature.structured_input_signature[1]
        input_names, output_names = tuple(specs), tuple(signature.structured_outputs)

        @tf.function(autograph=False)
        def in_order(*tensors: Any) -> list[Any]:
            outputs = signature(**dict(zip(input_names, tensors, strict=True)))
            return [outputs[name] for name in output_names]

        self._input_names, self._output_names = input_names, output_names
        self._function = in_order.get_concrete_function(*specs.values())
        self._variables = list(self._function.captured_inputs)
        self._dtypes = [output.dtype for output in self._function.outputs]
        self._call = tf.raw_ops.StatefulPartitionedCall
        self.graph = self._function.graph
        weakref.finalize(self, _forget_operations).atexit = False

    def __call__(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Calls it once.

        Args:
          tensors: one for each input, of its type.

        Raises:
          KeyError: when an input is missing, or there are others.
          tf.errors.OpError: when TensorFlow cannot compute it.
        """
        if len(tensors) != len(self._input_names):
            raise KeyError(f"{sorted(tensors)}; expected {sorted(self._input_names)}")
        args = [tensors[name] for name in self._input_names]
        outputs = self._call(args=args + self._variables, Tout=self._dtypes, f=self._function)
        return dict(zip(self._output_names, outputs, strict=True))


def _forget_operations() -> None:
    """TensorFlow keeps what it made of an operation, weights of its function included."""
    from tensorflow.python.eager import context

    context.context().clear_kernel_cache()
