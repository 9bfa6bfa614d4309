"""Would new statistics of batch normalisation win accuracy back? Tried on a copy, then offered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tfopt import live
from tfopt import source as sources
from tfopt.dataset import Dataset, calibration_batches
from tfopt.errors import ConversionError, first_line
from tfopt.keras_files import load_keras_file
from tfopt.runtimes.base import Arrays
from tfopt.source import Source

MIN_SHIFT = 0.25
"""Standard deviations; statistics of trained models are within 0.05 of those of 500 examples."""
BATCH_SIZE = 64
POLICIES = {"bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


@dataclasses.dataclass(frozen=True)
class Reestimated:
    """A model with new statistics.

    Attributes:
      source: of the model, in float32.
      layer: the batch normalisation whose statistics moved most.
      shift: how far, in standard deviations; see `tfopt.train.batchnorm.largest_shift`.
    """

    source: Source
    layer: str
    shift: float


def reestimate(
    model: Any,
    source: Source,
    data: Dataset,
    precision: str,
    folder: Path,
    custom_objects: str | None = None,
    trust_model: bool = False,
) -> Reestimated | None:
    """Estimates statistics on the calibration examples, as a precision computes them.

    Args:
      model: a Keras model, which stays as it is, or the path of its file.
      source: what the search made of it.
      data: with calibration examples.
      precision: `bfloat16` and `float16` compute in the mixed policy, everything else in float32.
      folder: gets the new source; must not be there yet.
      custom_objects: module with what the file needs.
      trust_model: whether Python code that is stored in the file may run.

    Returns:
      None when statistics hardly change, or there are none, so that nothing is to be won.

    Raises:
      ConversionError: when the model cannot be copied or does not run on these data.
    """
    from tfopt.train.batchnorm import has_batchnorm, largest_shift, reestimate_batchnorm
    from tfopt.train.precision import set_precision

    if isinstance(model, Path):
        model = load_keras_file(model, custom_objects, compile=False, trust_model=trust_model)
    if not has_batchnorm(model):
        return None
    try:
        copy = set_precision(model, POLICIES.get(precision, "float32"))
        reestimate_batchnorm(copy, _inputs(copy, source, data))
    except Exception as error:  # layers of the user's raise whatever they raise
        raise ConversionError(first_line(error)) from error
    shift, layer = largest_shift(model, copy)
    if not shift > MIN_SHIFT:
        return None
    live.export(copy, folder / "model")
    return Reestimated(sources.prepare(folder / "model", folder / "source"), layer, shift)


@dataclasses.dataclass(frozen=True)
class Gain:
    """What new statistics won back.

    Attributes:
      variant: that was converted from the model with the new statistics.
      layer: whose statistics moved most.
      shift: how far, in standard deviations.
      before: its accuracy with the old statistics.
      after: and with the new ones.
      low: one-sided 95 % bounds of the difference, paired example by example.
      high: likewise.
      metric: what accuracy is.
    """

    variant: str
    layer: str
    shift: float
    before: float
    after: float
    low: float
    high: float
    metric: str

    def offer(self) -> str:
        """What a user could do."""
        return (
            f"Statistics of batch normalisation lag behind: those of {self.layer} are "
            f"{self.shift:.2g} standard deviations from the calibration examples'. With new ones "
            f"{self.variant} has {self.metric} {self.after:.4g} instead of {self.before:.4g} (95 % "
            f"bounds of the gain {self.low:.2g} to {self.high:.2g}): call "
            "tfopt.reestimate_batchnorm(model, data) and search again."
        )


def _inputs(model: Any, source: Source, data: Dataset) -> Iterator[Any]:
    """Calibration batches as the model takes them, which the signature does not tell."""
    batches = calibration_batches(data, source.signature, BATCH_SIZE)
    assert batches is not None
    ways = _ways(model)
    first = next(iter(batches()))
    errors: list[Exception] = []
    for way in ways:
        try:
            model(way({name: array[:2] for name, array in first.items()}), training=False)
        except Exception as error:
            errors.append(error)
            continue
        yield from map(way, batches())
        return
    raise errors[0]


def _ways(model: Any) -> list[Callable[[Arrays], Any]]:
    """From arrays by their names in the signature to a model's argument."""
    structure = getattr(model, "input", None) if getattr(model, "inputs", None) else None
    if isinstance(structure, dict):
        return [
            lambda batch: {
                key: batch[key if key in batch else tensor.name]
                for key, tensor in structure.items()
            }
        ]
    if isinstance(structure, (list, tuple)) and len(structure) > 1:
        return [lambda batch: [batch[tensor.name] for tensor in structure]]
    ways: list[Callable[[Arrays], Any]] = [
        lambda batch: next(iter(batch.values())) if len(batch) == 1 else list(batch.values()),
        dict,
    ]
    return ways
