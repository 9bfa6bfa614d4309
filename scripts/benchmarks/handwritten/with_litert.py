"""By hand with LiteRT: the four documented ways of post-training conversion, on XNNPACK.

python with_litert.py --model=SAVED_MODEL --data=FILE.npz --output_dir=DIR --num_threads=2

TensorFlow is imported by what converts only: a process that serves has LiteRT alone. (With
TensorFlow in the process, the same file was seen to run 3 to 9 % faster.)
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from ai_edge_litert.interpreter import Interpreter

if TYPE_CHECKING:
    import tensorflow as tf

_SIGNATURE = "serving_default"


def _float32(converter: tf.lite.TFLiteConverter, calibration: list[dict[str, np.ndarray]]) -> None:
    """Leaves the weights as they are."""


def _float16(converter: tf.lite.TFLiteConverter, calibration: list[dict[str, np.ndarray]]) -> None:
    """Halves the file; XNNPACK computes in float32 where the CPU has no float16 arithmetic."""
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]


def _dynamic_range(
    converter: tf.lite.TFLiteConverter, calibration: list[dict[str, np.ndarray]]
) -> None:
    """Weights in int8, activations quantized while the model runs."""
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]


def _int8(converter: tf.lite.TFLiteConverter, calibration: list[dict[str, np.ndarray]]) -> None:
    """Weights and activations in int8, inputs and outputs in float32.

    Operators without an int8 kernel stay in float32 ("integer with float fallback").
    """
    import tensorflow as tf

    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ((_SIGNATURE, x) for x in calibration)


def convert(
    saved_model: pathlib.Path, calibration: list[dict[str, np.ndarray]], folder: pathlib.Path
) -> list[str]:
    """Writes `<name>.tflite` for every way that works and returns the names."""
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for configure in (_float32, _float16, _dynamic_range, _int8):
        name = configure.__name__.removeprefix("_")
        converter = tf.lite.TFLiteConverter.from_saved_model(
            str(saved_model), signature_keys=[_SIGNATURE]
        )
        configure(converter, calibration)
        try:
            model = converter.convert()
        except Exception as error:
            print(f"litert {name}: skipped, {error}")
            continue
        (folder / f"{name}.tflite").write_bytes(model)
        names.append(name)
    return names


def open_runner(
    folder: pathlib.Path, name: str, num_threads: int
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Loads `<name>.tflite` and returns a function that runs one inference of batch size 1.

    It sets and reads tensors by index, which costs less than calling the signature runner.
    """
    interpreter = Interpreter(str(folder / f"{name}.tflite"), num_threads=num_threads)
    interpreter.allocate_tensors()
    signature = interpreter.get_signature_runner(_SIGNATURE)
    input_indices = {key: x["index"] for key, x in signature.get_input_details().items()}
    output_indices = {key: x["index"] for key, x in signature.get_output_details().items()}

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        for key, index in input_indices.items():
            interpreter.set_tensor(index, inputs[key])
        interpreter.invoke()
        return {key: interpreter.get_tensor(index) for key, index in output_indices.items()}

    return run


if __name__ == "__main__":
    import timing

    timing.main(convert, open_runner)
