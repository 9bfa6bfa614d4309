"""Known architectures with random weights whose outputs follow the inputs, and inputs for them.

Freshly initialized networks are poor test objects: residual branches scaled by 1e-6, logits that
are the same for every image. Here the scales and biases of all layers are drawn anew, and batch
normalization gets the statistics of the inputs.
"""

from __future__ import annotations

import dataclasses
import importlib
from typing import Any

import numpy as np

SIZE = 96  # pixels; every family of keras.applications takes it
NUM_EXAMPLES = 16
SUITES = ("keras.applications", "keras_hub", "stand_ins")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes:
      suite: the package that it comes from, one of `SUITES`.
      family: of networks that share their code.
      member: the function or class that makes it.
    """

    suite: str
    family: str
    member: str

    def __str__(self) -> str:
        return f"{self.suite}/{self.member}"


@dataclasses.dataclass(frozen=True)
class Example:
    """A network to convert.

    Attributes:
      model: a Keras 3 model.
      inputs: by name, arrays of `NUM_EXAMPLES` examples.
    """

    model: Any
    inputs: dict[str, np.ndarray]


def applications(every_member: bool = False) -> list[Architecture]:
    """The families of keras.applications, as the installed Keras has them.

    Args:
      every_member: all members of a family; else the one that its module defines first, which is
        the smallest.
    """
    import keras

    makers = [maker for maker in vars(keras.applications).values() if _makes_a_model(maker)]
    makers.sort(key=lambda maker: (maker.__module__, maker.__code__.co_firstlineno))
    found: dict[str, list[Architecture]] = {}
    for maker in makers:
        family = maker.__module__.rpartition(".")[2]
        found.setdefault(family, []).append(Architecture(SUITES[0], family, maker.__name__))
    return [one for members in found.values() for one in (members if every_member else members[:1])]


def hub_backbones() -> list[Architecture]:
    """KerasHub's image and text backbones, as the installed one has them."""
    import hub_backbones

    return [Architecture(SUITES[1], name, name) for name in hub_backbones.names()]


def stand_ins() -> list[Architecture]:
    """Tiny networks for tests and for a first look."""
    import stand_ins

    return [Architecture(SUITES[2], name, name) for name in stand_ins.STAND_INS]


def _makes_a_model(value: Any) -> bool:
    return callable(value) and hasattr(value, "__code__") and value.__name__[:1].isupper()


def build(architecture: Architecture, seed: int = 0) -> Example:
    """Makes a network with weights and inputs that depend on the seed only."""
    import keras

    keras.utils.set_random_seed(seed)
    random = np.random.default_rng(seed)
    if architecture.suite == SUITES[0]:
        maker = getattr(keras.applications, architecture.member)
        model = maker(weights=None, input_shape=(SIZE, SIZE, 3), classifier_activation=None)
        preprocess = importlib.import_module(maker.__module__).preprocess_input
        images = preprocess(smooth_images(random, NUM_EXAMPLES, SIZE))
        inputs = {model.inputs[0].name: images}
    elif architecture.suite == SUITES[1]:
        import hub_backbones

        model, inputs = hub_backbones.build(architecture.member, random)
    else:
        import stand_ins

        model = stand_ins.STAND_INS[architecture.member]()
        inputs = {model.inputs[0].name: smooth_images(random, NUM_EXAMPLES, stand_ins.SIZE)}
    settle(model, inputs, random)
    return Example(model, inputs)


def smooth_images(random: np.random.Generator, count: int, size: int) -> np.ndarray:
    """Images of soft blobs with some noise, 0 to 255, float32 (count, size, size, 3)."""
    coarse = random.uniform(0, 255, (count, 7, 7, 3))
    places = np.linspace(0, 6, size)
    blend = np.stack([np.interp(places, range(7), row) for row in np.eye(7)], axis=1)
    smooth = np.einsum("yh,nhwc,xw->nyxc", blend, coarse, blend)
    return (smooth + random.normal(0, 8, smooth.shape)).clip(0, 255).astype(np.float32)


def settle(model: Any, inputs: dict[str, np.ndarray], random: np.random.Generator) -> None:
    """Draws weights anew and fits batch normalization to the inputs.

    Kernels keep the variance of what passes through them (He et al. 2015), so that the biases do
    not drown the inputs in deep networks without normalization. Batch normalization shifts by
    about 1: with a shift of 0 half of what it gives is cut off by relu, again and again, and deep
    networks amplify differences (InceptionV3: relative differences of its inputs 670 times, with
    statistics of 4 images 13,000 times; so it is 20 times).

    Args:
      model: a Keras 3 model.
      inputs: by name; the statistics of batch normalization become those of these examples.
      random: what the weights are drawn from.
    """
    import keras

    for weight in model.trainable_weights:
        shape = tuple(weight.shape)
        if (values := _draw(weight.path.rpartition("/")[2], shape, random)) is not None:
            weight.assign(values.astype(np.float32))
    normalizations = [
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    if not normalizations:
        return
    momenta = [layer.momentum for layer in normalizations]
    for layer in normalizations:
        layer.momentum = 0.0  # the next batch replaces the statistics
        if layer.center:
            layer.beta.assign_add(np.ones(layer.beta.shape, np.float32))
    model(inputs if len(inputs) > 1 else next(iter(inputs.values())), training=True)
    for layer, momentum in zip(normalizations, momenta, strict=True):
        layer.momentum = momentum


def _draw(name: str, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray | None:
    if name in ("gamma", "scale"):  # of normalization, and of ConvNeXt's LayerScale
        return random.uniform(0.5, 1.5, shape)
    if name in ("beta", "bias"):
        return random.normal(0, 0.1, shape)
    if name == "embeddings":
        return random.normal(0, 0.5, shape)
    if name == "kernel" and len(shape) == 3:  # of attention: one of the sides is split into heads
        return random.normal(0, np.prod(shape) ** -0.25, shape)
    if name == "kernel" and len(shape) > 1:
        # Depthwise kernels get less than they need, and batch normalization behind them.
        return random.normal(0, np.sqrt(2 / np.prod(shape[:-1])), shape)
    return None
