"""Trains a small network on scikit-learn's scans of handwritten digits; takes half a minute.

Writes `saved_model/` and `digits.npz`, which `tfopt optimize` takes as --model and --data.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from absl import flags

if TYPE_CHECKING:
    import keras

FLAGS = flags.FlagValues()
OUTPUT_DIR = flags.DEFINE_string(
    "output_dir", None, "Folder for model and data.", flag_values=FLAGS
)
NUM_EPOCHS = flags.DEFINE_integer(
    "num_epochs", 30, "Passes over the training data.", lower_bound=1, flag_values=FLAGS
)
OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace an earlier model and data there.", flag_values=FLAGS
)

NUM_TEST = 900  # enough to tell whether a variant lost one point of accuracy


def load_data(seed: int = 0) -> dict[str, np.ndarray]:
    """1797 scans of 8 × 8 pixels in 0 to 1, half of them for testing."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.target))
    x = (digits.images[order, :, :, None] / 16).astype(np.float32)
    y = digits.target[order]
    return {
        "x_train": x[:-NUM_TEST],
        "y_train": y[:-NUM_TEST],
        "x_test": x[-NUM_TEST:],
        "y_test": y[-NUM_TEST:],
    }


def build_model() -> keras.Model:
    """Three convolutions with batch normalization and a classifier."""
    import keras

    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(64, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Conv2D(64, 3, strides=2, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dropout(0.3),
            layers.Dense(10, activation="softmax"),
        ],
        name="digits",
    )


def train(data: dict[str, np.ndarray], num_epochs: int) -> tuple[keras.Model, float]:
    """Trains a model; returns it and its accuracy on the test examples."""
    import keras

    keras.utils.set_random_seed(0)
    model = build_model()
    num_steps = num_epochs * -(-len(data["x_train"]) // 32)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(3e-3, num_steps)),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,
    )
    model.fit(data["x_train"], data["y_train"], batch_size=32, epochs=num_epochs, verbose=0)
    _, accuracy = model.evaluate(data["x_test"], data["y_test"], verbose=0)
    return model, accuracy


def main(argv: list[str]) -> int:
    """Trains and saves; returns the exit status."""
    if "--help" in argv:
        print(f"{__doc__}\nFlags:{FLAGS.get_help()}")
        return 0
    try:
        unexpected = FLAGS(argv)[1:]
        if unexpected:
            raise flags.Error(f"unexpected argument {unexpected[0]!r}")
        if OUTPUT_DIR.value is None:
            raise flags.Error("missing --output_dir")
        folder = Path(OUTPUT_DIR.value)
        model_folder, data_file = folder / "saved_model", folder / "digits.npz"
        if not OVERWRITE.value and (model_folder.exists() or data_file.exists()):
            raise flags.Error(f"{folder} holds a model already; give --overwrite or another folder")
    except flags.Error as error:
        print(f"train_digits.py: {error}.", file=sys.stderr)
        return 2
    data = load_data()
    model, accuracy = train(data, NUM_EPOCHS.value)
    shutil.rmtree(model_folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(data_file, **data)
    model.export(model_folder, verbose=False)
    print(f"Test accuracy {accuracy:.4f}; wrote {model_folder} and {data_file}.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
