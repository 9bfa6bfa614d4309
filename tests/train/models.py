"""Small models of both Kerases, layer for layer the same."""

import importlib

import numpy as np

from tfopt.train import layers

FRAMEWORKS = ("keras", "tf_keras")

IMAGES = np.random.default_rng(0).uniform(size=(32, 8, 8, 3)).astype(np.float32)
LABELS = np.arange(32) % 4


def conv(framework, seed=0, momentum=0.99):
    """Convolution, normalisation, a nested block, an average, logits and a softmax."""
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(seed)
    new = keras.layers
    block = keras.Sequential(
        [
            new.Input((8, 8, 8)),
            new.Conv2D(8, 3, padding="same", use_bias=False, name="conv1"),
            new.BatchNormalization(momentum=momentum, name="norm"),
            new.ReLU(name="relu"),
        ],
        name="block3",
    )
    image = keras.Input((8, 8, 3), name="image")
    x = new.Conv2D(8, 3, padding="same", activation="relu", name="stem")(image)
    x = new.add([x, block(x)], name="add")
    x = new.GlobalAveragePooling2D(name="average")(x)
    x = new.Dense(16, activation="relu", name="hidden")(x)
    logits = new.Dense(4, name="logits")(x)
    return keras.Model(image, new.Softmax(name="probabilities")(logits), name="conv")


def policies(model):
    """Name of the policy of each layer that is no model, by path."""
    return {
        place.path: layers.policy_name(place.layer)
        for place in layers.walk(model)
        if not layers.is_model(place.layer)
    }


def compile_(model, framework, optimizer="adam", **options):
    """Compiles for `LABELS`, without XLA."""
    keras = importlib.import_module(framework)
    if optimizer == "adam":
        optimizer = keras.optimizers.Adam(1e-2)
    model.compile(optimizer, "sparse_categorical_crossentropy", jit_compile=False, **options)
    return model
