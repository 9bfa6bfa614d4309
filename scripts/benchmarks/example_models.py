"""The models that benchmarks run on: files of the user, or two well-known networks.

`mobilenet_v2` and `resnet50` come from `keras.applications` at 224 pixels with random weights, so
that nothing is downloaded: speed and memory do not depend on what a network has learned.
"""

import concurrent.futures
import multiprocessing
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

NAMES = {"mobilenet_v2": "MobileNetV2", "resnet50": "ResNet50"}
_NUM_IMAGES = 48
_SIZE = 224


def in_child(function: Callable[..., Any], *args: object) -> Any:
    """Calls a function in a process of its own, which ends with its memory and threads."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args).result()


def prepare(model: str, data: str | None, folder: pathlib.Path) -> tuple[pathlib.Path, str]:
    """Returns a SavedModel and a data file; makes those that are not there yet in `folder`."""
    if model in NAMES:
        saved_model, npz = folder / model, folder / f"{model}.npz"
        if not (npz.exists() and saved_model.exists()):
            in_child(_make, model, saved_model, npz)
        return saved_model, data or str(npz)
    if data is None:
        raise ValueError(f"--data is missing: only {' and '.join(NAMES)} come with data.")
    path = pathlib.Path(model)
    if not path.exists():
        raise ValueError(f"--model is {model}: no such file, and not one of {', '.join(NAMES)}.")
    if path.is_dir():
        return path, data
    saved_model = folder / "saved_model"
    if not saved_model.exists():
        in_child(_export, path, saved_model)
    return saved_model, data


def _export(path: pathlib.Path, folder: pathlib.Path) -> None:
    import keras

    model = keras.saving.load_model(path, compile=False)
    _export_whole(model, folder)


def _export_whole(model: Any, folder: pathlib.Path) -> None:
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    model.export(str(unfinished), format="tf_saved_model", verbose=False)
    unfinished.rename(folder)


def _make(name: str, folder: pathlib.Path, npz: pathlib.Path) -> None:
    """Writes a network and images for it.

    The statistics of batch normalization are those of the images: with the initial ones,
    activations shrink or grow from layer to layer until they are denormal or infinite, which
    costs time that no trained network costs.
    """
    import keras

    keras.utils.set_random_seed(0)
    module = getattr(keras.applications, name)
    model = getattr(module, NAMES[name])(weights=None)
    random = np.random.default_rng(0)
    coarse = random.uniform(0, 255, (_NUM_IMAGES, 7, 7, 3))
    smooth = coarse.repeat(_SIZE // 7, axis=1).repeat(_SIZE // 7, axis=2)
    images = (smooth + random.normal(0, 10, smooth.shape)).clip(0, 255).astype(np.float32)
    images = module.preprocess_input(images)
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.0  # the next batch replaces the statistics
    model(images[:16], training=True)
    if not folder.exists():
        _export_whole(model, folder)
    np.savez(npz, x=images)


def make_small(folder: pathlib.Path, npz: pathlib.Path, width: int = 16) -> None:
    """Writes a small convolutional network with random weights and images for it."""
    import keras
    from keras import layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((32, 32, 3), name="image")])
    for filters in (width, 2 * width, 4 * width):
        model.add(layers.Conv2D(filters, 3, padding="same", activation="relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(10))
    model.export(str(folder), format="tf_saved_model", verbose=False)
    images = np.random.default_rng(0).uniform(0, 1, (32, 32, 32, 3))
    np.savez(npz, image=images.astype(np.float32))


def resnet20(momentum: float) -> Any:
    """A network for CIFAR-10, untrained.

    He et al. 2016, section 4.2, with n = 3 and projections where the size changes. `momentum` is
    that of batch normalisation.
    """
    import keras
    from keras import layers

    def normalized(x: Any, filters: int, size: int, strides: int) -> Any:
        x = layers.Conv2D(
            filters, size, strides, padding="same", use_bias=False, kernel_initializer="he_normal"
        )(x)
        return layers.BatchNormalization(momentum=momentum)(x)

    image = keras.Input((32, 32, 3), name="image")
    x = layers.Rescaling(1 / 128, -1)(image)
    x = layers.ReLU()(normalized(x, 16, 3, 1))
    for filters in (16, 32, 64):
        for block in range(3):
            strides = 2 if filters > 16 and block == 0 else 1
            y = layers.ReLU()(normalized(x, filters, 3, strides))
            y = normalized(y, filters, 3, 1)
            if strides == 2:
                x = normalized(x, filters, 1, 2)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, layers.Dense(10, name="logits")(x))
