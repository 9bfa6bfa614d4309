"""Makes a network, converts it, and runs what became of it; `every_architecture.py` calls this in
worker processes."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from typing import Any

import architectures
import numpy as np
from architectures import NUM_EXAMPLES, Architecture

from tfopt import api, live, runtimes
from tfopt import source as sources
from tfopt.runtimes.base import Session
from tfopt.search import steps
from tfopt.source import Source
from tfopt.variant import Variant


@dataclasses.dataclass(frozen=True)
class Made:
    """A network that is ready for conversion.

    Attributes:
      source: as converters take it.
      num_parameters: of the Keras model.
      inputs: names and shapes.
      variation: of the output that varies least from example to example: the root mean square of
        its deviation from the mean over all examples, as a share of its own.
    """

    source: Source
    num_parameters: int
    inputs: str
    variation: float


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far outputs are from those of Keras; of several outputs the worst.

    Attributes:
      max_error: the largest absolute error, in units of the output's root mean square deviation
        from its mean over all examples.
      sqnr_db: that deviation squared over the mean square error, in decibels; infinite when equal.
      problem: why the outputs are not comparable; empty otherwise.
    """

    max_error: float
    sqnr_db: float
    problem: str = ""


def make(architecture: Architecture, folder: pathlib.Path) -> Made:
    """Builds a network, runs Keras on it, and prepares it as a search does.

    Args:
      architecture: which.
      folder: new; gets the frozen graph, `inputs.npz`, and what Keras makes of them at once
        (`reference.npz`) and of the first alone (`alone.npz`): in some networks, such as
        KerasHub's XLNet, examples depend on the others of their batch.
    """
    import keras

    keras.utils.clear_session()
    example = architectures.build(architecture)
    model = example.model
    reference, alone = (_predict(model, _first(example.inputs, n)) for n in (NUM_EXAMPLES, 1))
    folder.mkdir(parents=True)
    live.export(model, folder / "live")
    source = sources.prepare(
        folder / "live", folder / "source", name=str(architecture), sha256=live.hash_live(model)
    )
    inputs = example.inputs
    if len(inputs) == 1:
        inputs = {source.signature.input_names[0]: next(iter(inputs.values()))}
    if len(reference) == 1:
        name = source.signature.output_names[0]
        reference, alone = ({name: next(iter(made.values()))} for made in (reference, alone))
    np.savez(folder / "inputs.npz", **inputs)
    np.savez(folder / "reference.npz", **reference)
    np.savez(folder / "alone.npz", **alone)
    with np.errstate(invalid="ignore"):  # NaN where all is zero
        variation = float(
            np.min([_deviation(value) / _norm(value) for value in reference.values()])
        )
    shapes = ", ".join(f"{name} {value.shape[1:]}" for name, value in inputs.items())
    return Made(source, model.count_params(), shapes, variation)


def _predict(model: Any, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    given = inputs if len(inputs) > 1 else next(iter(inputs.values()))
    return _named(model.predict(given, batch_size=NUM_EXAMPLES, verbose=0))


def _first(inputs: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    return {name: value[:count] for name, value in inputs.items()}


def _named(outputs: Any) -> dict[str, np.ndarray]:
    """Outputs of Keras under the names that its export gives them."""
    if isinstance(outputs, dict):
        return {name: np.asarray(value) for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return {f"output_{place}": np.asarray(value) for place, value in enumerate(outputs)}
    return {"output_0": np.asarray(outputs)}


def variants() -> list[Variant]:
    """float32 on the runtimes that are installed, in each way that a search tries."""
    return [
        variant
        for variant in runtimes.tried_variants()
        if variant.precision == "float32" and runtimes.get(variant.runtime).missing() is None
    ]


def convert_and_compare(source: Source, variant: str, folder: pathlib.Path) -> Difference:
    """Converts a network, runs it on all examples at once and on the first alone, and compares.

    Args:
      source: that `make` returned.
      variant: by name.
      folder: of `make`.

    Raises:
      ConversionError: when the runtime cannot do it.
    """
    with tempfile.TemporaryDirectory() as work:
        artifact = steps.convert(
            source, Variant.parse(variant), pathlib.Path(work) / "artifact", None, None, 1
        )
        return compare(artifact.folder, folder)


def compare(artifact: pathlib.Path, folder: pathlib.Path) -> Difference:
    """Runs an artifact on all examples at once and on the first alone, and compares with Keras.

    One with a fixed batch size runs in batches of that size.

    Args:
      artifact: the folder of one.
      folder: of `make`.
    """
    inputs, reference, alone = (
        _arrays(folder / f"{name}.npz") for name in ("inputs", "reference", "alone")
    )
    found = []
    with api.load(artifact) as session:
        for expected in (reference, alone):
            count = len(next(iter(expected.values())))
            outputs = _run(session, _first(inputs, count))
            if outputs.keys() != reference.keys():
                problem = f"outputs {sorted(outputs)}, Keras has {sorted(reference)}"
                return Difference(np.nan, np.nan, problem)
            found += [
                _difference(name, outputs[name], value, reference[name])
                for name, value in expected.items()
            ]
    return max(found, key=lambda one: (bool(one.problem), one.max_error))


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def _run(session: Session, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    count = len(next(iter(inputs.values())))
    size = session.signature.batch_size or count
    batches = [
        session.run({name: value[start : start + size] for name, value in inputs.items()})
        for start in range(0, count, size)
    ]
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _difference(
    name: str, got: np.ndarray, expected: np.ndarray, reference: np.ndarray
) -> Difference:
    if (got.shape, got.dtype) != (expected.shape, expected.dtype):
        problem = f"{name} {got.dtype} {got.shape}, Keras has {expected.dtype} {expected.shape}"
        return Difference(np.nan, np.nan, problem)
    if not np.isfinite(got).all():
        return Difference(np.nan, np.nan, f"{name} is not finite")
    deviation = _deviation(reference)
    error = got.astype(np.float64) - expected
    with np.errstate(divide="ignore", invalid="ignore"):
        max_error = np.abs(error).max() / deviation
        sqnr_db = 20 * np.log10(deviation / _norm(error))
    return Difference(float(max_error), float(sqnr_db))


def _norm(values: np.ndarray) -> np.float64:
    return np.sqrt(np.mean(np.square(values, dtype=np.float64)))


def _deviation(values: np.ndarray) -> np.float64:
    return _norm(values - values.mean(axis=0, dtype=np.float64))
