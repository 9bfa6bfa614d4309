"""Operations and dtypes that conversions stumble over, each in a network of its own."""

import numpy as np

from tests.goldens.registry import (
    normal,
    register,
    save_module,
    smooth_images,
    tones,
    unsettle,
    words,
)

FLOAT32 = ("float32",)
FLOAT32_AND_INT8 = ("float32", "int8")


@register(smooth_images("image"), precisions=FLOAT32_AND_INT8)
def swish():
    """A block of EfficientNet: swish, whose gradient is a custom one, with squeeze-and-excite."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(16, 3, strides=2, padding="same", use_bias=False)(image)
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    x = layers.DepthwiseConv2D(5, padding="same", use_bias=False)(x)
    x = layers.Activation("swish")(layers.BatchNormalization()(x))
    gate = layers.GlobalAveragePooling2D()(x)
    gate = layers.Reshape((1, 1, 16))(gate)
    gate = layers.Conv2D(4, 1, activation="swish")(gate)
    gate = layers.Conv2D(16, 1, activation="sigmoid")(gate)
    x = layers.GlobalAveragePooling2D()(layers.Multiply()([x, gate]))
    return unsettle(keras.Model(image, layers.Dense(5)(x), name="swish"))


@register(normal(features=(12,), dtype="float64"), precisions=FLOAT32)
def float64():
    """Inputs, weights and outputs in float64."""
    import keras

    keras.utils.set_random_seed(0)
    features = keras.Input((12,), dtype="float64", name="features")
    x = keras.layers.Dense(24, activation="relu", dtype="float64")(features)
    x = keras.layers.LayerNormalization(dtype="float64")(x)
    x = keras.layers.Dense(4, dtype="float64")(x)
    return unsettle(keras.Model(features, x, name="float64"))


@register(smooth_images("image"), precisions=FLOAT32, rounding=5e-3)
def mixed_float16():
    """Layers that compute in float16, in a SavedModel."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    half = {"dtype": "mixed_float16"}
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(8, 3, strides=2, padding="same", **half)(image)
    x = layers.ReLU(**half)(layers.BatchNormalization(**half)(x))
    x = layers.DepthwiseConv2D(3, activation="relu", **half)(x)
    x = layers.GlobalAveragePooling2D(dtype="float32")(x)
    x = layers.Dense(5, dtype="float32")(x)
    return unsettle(keras.Model(image, x, name="mixed_float16"))


@register(normal(volume=(9, 10, 8, 2)), precisions=FLOAT32_AND_INT8)
def volumes():
    """Convolution and pooling in three dimensions, over the edge, too."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    volume = keras.Input((9, 10, 8, 2), name="volume")
    x = layers.Conv3D(6, 3, padding="same")(volume)
    x = layers.MaxPooling3D(2)(x)
    x = layers.AveragePooling3D(3, strides=2, padding="same")(x)
    x = layers.Conv3D(6, 2)(x)
    x = layers.Flatten()(x)
    return unsettle(keras.Model(volume, layers.Dense(3)(x), name="volumes"))


@register(tones("wave", 1024), save=save_module, precisions=FLOAT32)
def spectrum():
    """A front end of audio: the short-time Fourier transform, a mel scale, logarithms."""
    import tensorflow as tf

    generator = np.random.default_rng(0)

    class Spectrum(tf.Module):
        """Log-mel energies, and a product with their average over time."""

        def __init__(self):
            super().__init__(name="spectrum")
            self.kernel = tf.Variable(generator.normal(scale=0.2, size=(20, 4)), dtype=tf.float32)

        @tf.function(input_signature=[tf.TensorSpec((None, 1024), tf.float32, name="wave")])
        def __call__(self, wave):
            frames = tf.signal.stft(wave, frame_length=128, frame_step=64, fft_length=128)
            mel = tf.signal.linear_to_mel_weight_matrix(20, 65, 8000, 80.0, 3600.0)
            log_mel = tf.math.log(tf.tensordot(tf.abs(frames), mel, 1) + 1e-3)
            return {"scores": tf.matmul(tf.reduce_mean(log_mel, 1), self.kernel)}

    return Spectrum()


@register(smooth_images("image"), save=save_module, precisions=FLOAT32)
def detector():
    """Boxes that CombinedNonMaxSuppression chooses, and how many."""
    import tensorflow as tf

    generator = np.random.default_rng(0)

    class Detector(tf.Module):
        """A convolution that gives a box and three scores for each of 16 places."""

        def __init__(self):
            super().__init__(name="detector")
            self.kernel = tf.Variable(generator.normal(size=(4, 4, 3, 7)), dtype=tf.float32)

        @tf.function(input_signature=[tf.TensorSpec((None, 16, 16, 3), tf.float32, name="image")])
        def __call__(self, image):
            found = tf.sigmoid(tf.nn.conv2d(image - 0.5, self.kernel, 4, "SAME"))
            found = tf.reshape(found, [-1, 16, 7])
            corner, size = found[..., :2] * 0.6, found[..., 2:4] * 0.4
            boxes = tf.concat([corner, corner + size], -1)[:, :, None]
            chosen = tf.image.combined_non_max_suppression(boxes, found[..., 4:], 4, 9, 0.4, 0.9)
            return {
                "boxes": chosen.nmsed_boxes,
                "scores": chosen.nmsed_scores,
                "classes": chosen.nmsed_classes,
                "count": chosen.valid_detections,
            }

    return Detector()


@register(smooth_images("image"), precisions=FLOAT32_AND_INT8)
def padded_pooling():
    """The maximum of negative numbers with zeros around them, as in ResNet50V2."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(8, 3, strides=2, padding="same")(image)
    x = -layers.ReLU()(x)
    x = layers.ZeroPadding2D(1)(x)
    x = layers.MaxPooling2D(3, strides=2)(x)
    x = layers.Flatten()(x)
    return unsettle(keras.Model(image, layers.Dense(4)(x), name="padded_pooling"))


@register(smooth_images("image"), precisions=FLOAT32_AND_INT8)
def grouped():
    """A convolution in groups, which Keras 3 compiles with XLA."""
    import keras

    layers = keras.layers
    keras.utils.set_random_seed(0)
    image = keras.Input((16, 16, 3), name="image")
    x = layers.Conv2D(12, 3, strides=2, padding="same", activation="relu")(image)
    x = layers.Conv2D(18, 3, padding="same", groups=3, activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return unsettle(keras.Model(image, layers.Dense(4)(x), name="grouped"))


@register(words("token_ids", length=10, vocabulary_size=40), save=save_module,
          precisions=FLOAT32_AND_INT8)  # fmt: skip
def masked_attention():
    """Attention that gives padding, token 0, a logit of -inf."""
    import tensorflow as tf

    generator = np.random.default_rng(0)

    class Attention(tf.Module):
        """An embedding, and each token's average of the others that are no padding."""

        def __init__(self):
            super().__init__(name="masked_attention")
            shapes = {"table": (40, 8), "query": (8, 8), "key": (8, 8), "head": (8, 3)}
            for name, shape in shapes.items():
                setattr(self, name, tf.Variable(generator.normal(size=shape), dtype=tf.float32))

        @tf.function(input_signature=[tf.TensorSpec((None, 10), tf.int32, name="token_ids")])
        def __call__(self, token_ids):
            x = tf.gather(self.table, token_ids)
            logits = tf.matmul(x @ self.query, x @ self.key, transpose_b=True) * 0.2
            logits = tf.where(token_ids[:, None, :] > 0, logits, -np.inf)
            attended = tf.matmul(tf.nn.softmax(logits), x)
            return {"scores": tf.reduce_mean(attended, 1) @ self.head}

    return Attention()
