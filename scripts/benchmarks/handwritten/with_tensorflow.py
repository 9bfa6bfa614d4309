"""By hand with TensorFlow: the SavedModel as it is, and compiled with XLA.

python with_tensorflow.py --model=SAVED_MODEL --data=FILE.npz --output_dir=DIR --num_threads=2
"""

import pathlib
import shutil
from collections.abc import Callable

import numpy as np
import tensorflow as tf


def convert(
    saved_model: pathlib.Path, calibration: list[dict[str, np.ndarray]], folder: pathlib.Path
) -> list[str]:
    """Copies the SavedModel, which both versions run, and returns their names."""
    del calibration  # nothing is quantized
    shutil.copytree(saved_model, folder / "saved_model", dirs_exist_ok=True)
    return ["as_saved", "xla"]


def open_runner(
    folder: pathlib.Path, name: str, num_threads: int
) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Loads the model and returns a function that runs one inference.

    TensorFlow has one set of pools of threads for the whole process and fixes their size at the
    first operation: call this before anything else uses TensorFlow, always with the same number.
    XLA compiles in the first call, once for every shape.
    """
    tf.config.threading.set_intra_op_parallelism_threads(num_threads)
    tf.config.threading.set_inter_op_parallelism_threads(num_threads)
    loaded = tf.saved_model.load(folder / "saved_model")
    signature = loaded.signatures["serving_default"]

    def call_signature(**inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return signature(**inputs)

    function = {
        "as_saved": signature,
        "xla": tf.function(call_signature, jit_compile=True),
    }[name]

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = function(**{key: tf.constant(value) for key, value in inputs.items()})
        return {key: value.numpy() for key, value in outputs.items()}

    run.loaded = loaded  # the signature does not keep the variables of its model alive
    return run


if __name__ == "__main__":
    import timing

    timing.main(convert, open_runner)
