"""Golden models: small models that every runtime and precision is tried on.

Each has a few thousand parameters at most, the same weights on every build, and one trait that
conversions are known to stumble over: batch normalization, dynamic lengths, integer inputs, the
order of inputs and so on. Biases and moving statistics are not left at 0 and 1, where dropping
them would go unseen.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

Examples = Callable[[int, int], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Golden:
    """A small model and what it takes as input."""

    name: str
    build: Callable[[], object]
    """Returns the live model, with the same weights each time."""
    examples: Examples
    """Given the number of examples and a seed, returns named inputs in their usual range."""
    save: Callable[[object, str], None]
    """Writes a live model as a SavedModel with the signature `serving_default`."""


GOLDENS: dict[str, Golden] = {}


def export(golden: Golden, path: str | Path) -> None:
    """Builds the model of `golden` and writes it to `path` as a SavedModel."""
    golden.save(golden.build(), str(path))


def _save_keras(model, path: str) -> None:
    model.export(path, verbose=False)


def _save_tf_keras(model, path: str) -> None:
    import tensorflow as tf

    tf.saved_model.save(model, path)


def _save_module(module, path: str) -> None:
    import tensorflow as tf

    tf.saved_model.save(
        module, path, signatures={"serving_default": module.__call__.get_concrete_function()}
    )


def _register(examples: Examples, save: Callable[[object, str], None] = _save_keras):
    """Returns a decorator that makes a golden of the function that builds its model."""

    def decorate(build: Callable[[], object]) -> Callable[[], object]:
        if build.__name__ in GOLDENS:
            raise ValueError(
                f"Got a second golden named {build.__name__!r}; expected each name once. Rename "
                "the function that builds it."
            )
        GOLDENS[build.__name__] = Golden(build.__name__, build, examples, save)
        return build

    return decorate


def _normal(**shapes: tuple[int, ...]) -> Examples:
    """Inputs such as standardised features."""

    def examples(num_examples: int, seed: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        return {
            name: generator.normal(size=(num_examples, *shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    return examples


def _images(name: str) -> Examples:
    """Inputs such as pixels scaled to 0 to 1: a smooth brightness with some noise on it."""

    def examples(num_examples: int, seed: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        coarse = generator.uniform(0.1, 0.9, size=(num_examples, 4, 4, 3))
        smooth = coarse.repeat(4, axis=1).repeat(4, axis=2)
        images = smooth + generator.normal(scale=0.05, size=smooth.shape)
        return {name: images.clip(0, 1).astype(np.float32)}

    return examples


def _token_ids(name: str, length: int, vocabulary_size: int) -> Examples:
    """Inputs such as words: small ids are frequent, large ones rare."""

    def examples(num_examples: int, seed: int) -> dict[str, np.ndarray]:
        frequencies = 1 / np.arange(1, vocabulary_size + 1)
        token_ids = np.random.default_rng(seed).choice(
            vocabulary_size, size=(num_examples, length), p=frequencies / frequencies.sum()
        )
        return {name: token_ids.astype(np.int32)}

    return examples


def _unsettle(model, seed: int = 0):
    """Moves weights that start at a constant (biases, scales, moving statistics) off it."""
    generator = np.random.default_rng(seed)
    weights = []
    for weight in model.get_weights():
        if weight.ndim == 1 and np.all(weight == 0):
            weight = generator.normal(scale=0.2, size=weight.shape)
        elif weight.ndim == 1 and np.all(weight == 1):
            weight = generator.uniform(0.5, 1.5, size=weight.shape)
        weights.append(weight)
    model.set_weights(weights)
    return model


@_register(_normal(features=(16,)))
def dense():
    """Nothing but matrix products."""
    import keras

    keras.utils.set_random_seed(0)
    return _unsettle(
        keras.Sequential(
            [
                keras.Input((16,), name="features"),
                keras.layers.Dense(32, activation="relu"),
                keras.layers.Dense(16, activation="tanh"),
                keras.layers.Dense(4, activation="softmax"),
            ],
            name="dense",
        )
    )


def _residual_network(keras, name: str):
    """The same layers for Keras 3 and tf_keras."""
    layers = keras.layers
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(image)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    shortcut = x
    x = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.Add()([x, shortcut])
    x = layers.ReLU()(x)
    x = layers.Conv2D(16, 3, strides=2, padding="same")(x)
    x = layers.BatchNormalization()(x)
    x = layers.ReLU()(x)
    x = layers.GlobalAveragePooling2D()(x)
    probabilities = layers.Dense(5, activation="softmax", name="probabilities")(x)
    return _unsettle(keras.Model(image, probabilities, name=name))


@_register(_images("image"))
def conv():
    """Convolutions with batch normalization to fold, and a residual addition."""
    import keras

    return _residual_network(keras, "conv")


@_register(_images("image"), save=_save_tf_keras)
def tf_keras_conv():
    """The same network built by tf_keras, whose SavedModels name outputs after layers."""
    import tf_keras

    return _residual_network(tf_keras, "tf_keras_conv")


@_register(_images("image"))
def depthwise():
    """A block of MobileNetV3: depthwise convolution, squeeze-and-excite, hard-swish."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(8, 3, strides=2, padding="same", use_bias=False)(image)
    x = layers.BatchNormalization()(x)
    shortcut = x = layers.Activation("hard_swish")(x)
    x = layers.Conv2D(24, 1, use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.Activation("hard_swish")(x)
    x = layers.DepthwiseConv2D(3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.Activation("hard_swish")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(x)
    gate = layers.Conv2D(8, 1, activation="relu")(gate)
    gate = layers.Conv2D(24, 1, activation="hard_sigmoid")(gate)
    x = layers.Multiply()([x, gate])
    x = layers.Conv2D(8, 1, use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.Add()([x, shortcut])
    x = layers.GlobalAveragePooling2D()(x)
    x = layers.Dense(5, activation="softmax")(x)
    return _unsettle(keras.Model(image, x, name="depthwise"))


@_register(_normal(sequence=(8, 16)))
def transformer():
    """One encoder block: attention, layer normalization, exact GELU."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    sequence = keras.Input((8, 16), name="sequence")
    attended = layers.MultiHeadAttention(num_heads=2, key_dim=8)(sequence, sequence)
    x = layers.LayerNormalization(epsilon=1e-6)(layers.Add()([sequence, attended]))
    hidden = layers.Dense(32, activation="gelu")(x)  # Keras takes the exact one by default.
    hidden = layers.Dense(16)(hidden)
    x = layers.LayerNormalization(epsilon=1e-6)(layers.Add()([x, hidden]))
    x = layers.GlobalAveragePooling1D()(x)
    x = layers.Dense(4)(x)
    return _unsettle(keras.Model(sequence, x, name="transformer"))


@_register(_normal(sequence=(12, 5)))
def lstm():
    """A loop over a dynamic number of steps."""
    import keras

    keras.utils.set_random_seed(0)
    sequence = keras.Input((None, 5), name="sequence")
    x = keras.layers.LSTM(6)(sequence)
    x = keras.layers.Dense(3)(x)
    return _unsettle(keras.Model(sequence, x, name="lstm"))


@_register(_normal(signal=(10, 3), context=(6,)))
def two_inputs():
    """Inputs declared in an order that is not that of their names; outputs in a dict."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    signal = keras.Input((10, 3), name="signal")
    context = keras.Input((6,), name="context")
    x = layers.Conv1D(8, 3, activation="relu")(signal)
    pooled = layers.GlobalAveragePooling1D()(x)
    merged = layers.Concatenate()([pooled, layers.Dense(8, activation="relu")(context)])
    outputs = {
        "scores": layers.Dense(4, activation="softmax")(merged),
        "envelope": layers.Conv1D(2, 1)(x),
    }
    return _unsettle(keras.Model([signal, context], outputs, name="two_inputs"))


@_register(_normal(sequence=(12, 4)))
def dynamic():
    """A dynamic length besides the dynamic number of examples."""
    import keras

    keras.utils.set_random_seed(0)
    sequence = keras.Input((None, 4), name="sequence")
    x = keras.layers.Conv1D(8, 3, padding="same", activation="relu")(sequence)
    x = keras.layers.GlobalMaxPooling1D()(x)
    x = keras.layers.Dense(3)(x)
    return _unsettle(keras.Model(sequence, x, name="dynamic"))


@_register(_token_ids("token_ids", length=12, vocabulary_size=50))
def integer_input():
    """Integer inputs, which no precision may turn into floating point or quantize."""
    import keras

    keras.utils.set_random_seed(0)
    token_ids = keras.Input((12,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(50, 8)(token_ids)
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dense(3)(x)
    return _unsettle(keras.Model(token_ids, x, name="integer_input"))


@_register(_normal(features=(6,)), save=_save_module)
def module():
    """A tf.Module without Keras: one function with an input signature."""
    import tensorflow as tf

    generator = np.random.default_rng(0)

    class TwoLayers(tf.Module):
        """Two products, the second by the transpose of what the first is multiplied by."""

        def __init__(self):
            super().__init__(name="module")
            self.kernel = tf.Variable(generator.normal(scale=0.4, size=(6, 8)), dtype=tf.float32)
            self.bias = tf.Variable(generator.normal(scale=0.2, size=(8,)), dtype=tf.float32)

        @tf.function(input_signature=[tf.TensorSpec((None, 6), tf.float32, name="features")])
        def __call__(self, features):
            hidden = tf.nn.relu(tf.matmul(features, self.kernel) + self.bias)
            return {"reconstruction": tf.matmul(hidden, self.kernel, transpose_b=True)}

    return TwoLayers()
