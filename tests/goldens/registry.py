"""The registry of golden models, and inputs for them.

Each has a few thousand parameters at most, the same weights on every build, and one trait that
conversions are known to stumble over: batch normalization, dynamic lengths, integer inputs, the
order of inputs and so on. Biases and moving statistics are not left at 0 and 1, where dropping
them would go unseen.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tfopt.variant import Variant

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
    precisions: tuple[str, ...]
    """The precisions that it is tried on, without options; empty for all, with all options."""
    rounding: float
    """How far the live model is off by itself, from the precision that it computes in."""

    def is_tried_on(self, variant: Variant) -> bool:
        """Whether the conformance tests convert it to a variant."""
        if not self.precisions:
            return True
        return variant.precision in self.precisions and not variant.options


GOLDENS: dict[str, Golden] = {}


def export(golden: Golden, path: str | Path) -> None:
    """Builds the model of `golden` and writes it to `path` as a SavedModel."""
    golden.save(golden.build(), str(path))


def save_keras(model, path: str) -> None:
    model.export(path, verbose=False)


def save_tf_keras(model, path: str) -> None:
    import tensorflow as tf

    tf.saved_model.save(model, path)


def save_module(module, path: str) -> None:
    import tensorflow as tf

    tf.saved_model.save(
        module, path, signatures={"serving_default": module.__call__.get_concrete_function()}
    )


def register(
    examples: Examples,
    save: Callable[[object, str], None] = save_keras,
    precisions: tuple[str, ...] = (),
    rounding: float = 0.0,
):
    """Returns a decorator that makes a golden of the function that builds its model."""

    def decorate(build: Callable[[], object]) -> Callable[[], object]:
        if build.__name__ in GOLDENS:
            raise ValueError(
                f"Got a second golden named {build.__name__!r}; expected each name once. Rename "
                "the function that builds it."
            )
        GOLDENS[build.__name__] = Golden(
            build.__name__, build, examples, save, precisions, rounding
        )
        return build

    return decorate


def normal(*, dtype: str = "float32", **shapes: tuple[int, ...]) -> Examples:
    """Inputs such as standardised features."""

    def examples(num_examples: int, seed: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        return {
            name: generator.normal(size=(num_examples, *shape)).astype(dtype)
            for name, shape in shapes.items()
        }

    return examples


def smooth_images(name: str) -> Examples:
    """Inputs such as pixels scaled to 0 to 1: a smooth brightness with some noise on it."""

    def examples(num_examples: int, seed: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        coarse = generator.uniform(0.1, 0.9, size=(num_examples, 4, 4, 3))
        smooth = coarse.repeat(4, axis=1).repeat(4, axis=2)
        images = smooth + generator.normal(scale=0.05, size=smooth.shape)
        return {name: images.clip(0, 1).astype(np.float32)}

    return examples


def tones(name: str, length: int) -> Examples:
    """Inputs such as sounds: one tone each, with noise."""

    def examples(num_examples: int, seed: int) -> dict[str, np.ndarray]:
        generator = np.random.default_rng(seed)
        frequency = generator.uniform(0.02, 0.4, size=(num_examples, 1))
        waves = np.sin(2 * np.pi * frequency * np.arange(length))
        waves *= generator.uniform(0.2, 0.9, size=(num_examples, 1))
        return {name: (waves + generator.normal(0, 0.1, waves.shape)).astype(np.float32)}

    return examples


def words(name: str, length: int, vocabulary_size: int) -> Examples:
    """Inputs such as words: small ids are frequent, large ones rare."""

    def examples(num_examples: int, seed: int) -> dict[str, np.ndarray]:
        frequencies = 1 / np.arange(1, vocabulary_size + 1)
        token_ids = np.random.default_rng(seed).choice(
            vocabulary_size, size=(num_examples, length), p=frequencies / frequencies.sum()
        )
        return {name: token_ids.astype(np.int32)}

    return examples


def unsettle(model, seed: int = 0):
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
