"""Whole small networks, each tried in every way that a runtime has."""

import numpy as np

from tests.goldens.registry import (
    normal,
    register,
    save_module,
    save_tf_keras,
    smooth_images,
    unsettle,
    words,
)


@register(normal(features=(16,)))
def dense():
    """Nothing but matrix products."""
    import keras

    keras.utils.set_random_seed(0)
    return unsettle(
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
    return unsettle(keras.Model(image, probabilities, name=name))


@register(smooth_images("image"))
def conv():
    """Convolutions with batch normalization to fold, and a residual addition."""
    import keras

    return _residual_network(keras, "conv")


@register(smooth_images("image"), save=save_tf_keras)
def tf_keras_conv():
    """The same network built by tf_keras, whose SavedModels name outputs after layers."""
    import tf_keras

    return _residual_network(tf_keras, "tf_keras_conv")


@register(smooth_images("image"))
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
    return unsettle(keras.Model(image, x, name="depthwise"))


@register(normal(sequence=(8, 16)))
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
    return unsettle(keras.Model(sequence, x, name="transformer"))


@register(normal(sequence=(12, 5)))
def lstm():
    """A loop over a dynamic number of steps."""
    import keras

    keras.utils.set_random_seed(0)
    sequence = keras.Input((None, 5), name="sequence")
    x = keras.layers.LSTM(6)(sequence)
    x = keras.layers.Dense(3)(x)
    return unsettle(keras.Model(sequence, x, name="lstm"))


@register(normal(signal=(10, 3), context=(6,)))
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
    return unsettle(keras.Model([signal, context], outputs, name="two_inputs"))


@register(normal(sequence=(12, 4)))
def dynamic():
    """A dynamic length besides the dynamic number of examples."""
    import keras

    keras.utils.set_random_seed(0)
    sequence = keras.Input((None, 4), name="sequence")
    x = keras.layers.Conv1D(8, 3, padding="same", activation="relu")(sequence)
    x = keras.layers.GlobalMaxPooling1D()(x)
    x = keras.layers.Dense(3)(x)
    return unsettle(keras.Model(sequence, x, name="dynamic"))


@register(words("token_ids", length=12, vocabulary_size=50))
def integer_input():
    """Integer inputs, which no precision may turn into floating point or quantize."""
    import keras

    keras.utils.set_random_seed(0)
    token_ids = keras.Input((12,), dtype="int32", name="token_ids")
    x = keras.layers.Embedding(50, 8)(token_ids)
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dense(3)(x)
    return unsettle(keras.Model(token_ids, x, name="integer_input"))


@register(normal(features=(6,)), save=save_module)
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
