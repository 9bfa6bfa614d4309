"""Signatures of TensorFlow, called by the name of their function.

A signature's own call spends 0.15 ms in Python, 0.4 ms with a hundred variables, and more than
twice that on slow processors, which is as long as an engine of TensorRT takes. Eager TensorFlow
itself needs a quarter to a third of that to call a function whose name and variables are known.
"""

from __future__ import annotations

from typing import Any


class SignatureCall:
    """A signature that takes tensors by name and returns a dictionary of them.

    Args:
      signature: of a loaded SavedModel, which must stay alive.

    Attributes:
      input_names: in the order of the function.
    """

    def __init__(self, signature: Any):
        import tensorflow as tf
        from tensorflow.python.eager import context

        self.input_names = tuple(signature._arg_keywords)
        self._num_outputs = len(signature.outputs)
        self._places: dict[str, int] = tf.nest.pack_sequence_as(
            signature.structured_outputs, range(self._num_outputs)
        )
        self._variables = list(signature.captured_inputs)
        self._signature, self._name = signature, signature.name
        self._call = context.context().call_function

    def __call__(self, tensors: dict[str, Any]) -> dict[str, Any]:
        """Calls it once.

        Args:
          tensors: one for each input, of its type.

        Raises:
          KeyError: when an input is missing, or there are others.
          tf.errors.OpError: when TensorFlow cannot compute it.
        """
        if len(tensors) != len(self.input_names):
            raise KeyError(f"{sorted(tensors)}; expected {sorted(self.input_names)}")
        args = [tensors[name] for name in self.input_names]
        outputs = self._call(self._name, args + self._variables, self._num_outputs)
        return {name: outputs[place] for name, place in self._places.items()}
