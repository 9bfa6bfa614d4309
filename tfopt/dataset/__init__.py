"""Data in, examples on disk out: npz files, arrays, tf.data, Keras PyDataset, generators.

Examples for calibration and for evaluation never overlap. Where the data has parts `…_train` and
`…_test`, calibration takes from the first and evaluation is all of the second. Otherwise a seeded
choice is made: at random where the number of examples is known, and by a seeded hash of the
example's position in a stream. Inputs that are not finite are not calibrated on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.dataset.bounds import bounded
from tfopt.dataset.casting import Chunk, Fitter, finite_examples
from tfopt.dataset.streams import Stream
from tfopt.dataset.weights import WeightNotes
from tfopt.errors import InputError
from tfopt.examples import (
    Arrays,
    Examples,
    ExampleWriter,
    is_label_column,
    is_weight_column,
    plain,
)
from tfopt.signature import Signature

NUM_CALIBRATION = 256
PARTS = ("calibration", "evaluation")
CALIBRATION_SHARE = 0.1  # of a stream whose length is not known


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples that were written to disk.

    Attributes:
      folder: holds `evaluation/` and, unless there were too few, `calibration/`.
      num_calibration: examples set aside for calibration.
      num_evaluation: examples for accuracy and timing.
      has_labels: whether the evaluation examples have labels.
      split: how the two were chosen, in words.
      sha256: of all examples and the split.
      notes: casts that were made and what was left out, one sentence each.
    """

    folder: Path
    num_calibration: int
    num_evaluation: int
    has_labels: bool
    split: str
    sha256: str
    notes: tuple[str, ...]

    @property
    def evaluation(self) -> Examples:
        """The examples that accuracy and latency are measured on."""
        return Examples(self.folder / "evaluation")

    @property
    def calibration(self) -> Examples | None:
        """The examples that quantizers may look at."""
        return Examples(self.folder / "calibration") if self.num_calibration else None

    def describe(self) -> dict[str, Any]:
        """What is recorded with the results."""
        return {
            "num_calibration": self.num_calibration,
            "num_evaluation": self.num_evaluation,
            "has_labels": self.has_labels,
            "split": self.split,
            "sha256": self.sha256,
            "notes": list(self.notes),
        }


def write(
    data: Any,
    signature: Signature,
    folder: str | Path,
    *,
    seed: int = 0,
    num_calibration: int = NUM_CALIBRATION,
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    """Streams data to disk in the form that every worker reads.

    Args:
      data: a path to an .npz file; `package.module:function` that returns any of the following;
        a dict of arrays named like the .npz members (inputs, or `x` for a single input, and labels
        `y` or by output; each may stand as `…_train` and `…_test`); `x`, `(x, y)` or
        `(x, y, sample_weight)`, or two of these for training and test; a tf.data.Dataset, Keras
        PyDataset, another iterable such as a DataLoader, or a function that returns one, of such
        examples or batches. Arrays may be tensors, DataFrames, Series or lists; `x` is a dict,
        a list in the order of the Keras model, or a DataFrame by columns where there are several
        inputs, and so is `y` for outputs.
      signature: what the model takes.
      folder: where to.
      seed: of the split.
      num_calibration: how many examples to set aside, at most a quarter of all.
      progress: called with the number of examples so far.

    Raises:
      InputError: when names, shapes, dtypes or lengths do not fit, there are no examples, the data
        never ends, or labels are not finite. Nothing is left in `folder` then.
    """
    folder = Path(folder)
    stream = Stream(data, signature)
    try:
        return _write(stream, signature, folder, seed, num_calibration, progress)
    except BaseException:
        for name in PARTS:
            shutil.rmtree(folder / name, ignore_errors=True)
        raise


def _write(
    stream: Stream,
    signature: Signature,
    folder: Path,
    seed: int,
    num_calibration: int,
    progress: Callable[[int], None] | None,
) -> Dataset:
    fitted, weights = Fitter(signature), WeightNotes()
    num_unfit = 0  # set aside, and not finite
    with (
        ExampleWriter(folder / PARTS[0]) as calibration,
        ExampleWriter(folder / PARTS[1]) as evaluation,
    ):
        is_calibration: Callable[[int], bool] | None = None
        if stream.train is not None:
            count = min(num_calibration, stream.num_train)
            split = f"{count} of {stream.num_train} training examples, chosen with seed {seed}"
            chosen = _choose(stream.num_train, count, seed)
            for start, chunk in _numbered(bounded(stream.train(), folder=folder)):
                mask = _mask(chunk, start, chosen.__contains__)
                if mask.any():
                    found, is_finite = fitted(weights.without_weights(_take(chunk, mask)))
                    num_unfit += int((~is_finite).sum())
                    _append(calibration, found, is_finite)
        elif stream.num_test is not None:
            count = min(num_calibration, stream.num_test // 4)
            split = f"{count} of {stream.num_test} examples, chosen with seed {seed}"
            is_calibration = _choose(stream.num_test, count, seed).__contains__
        else:
            split = f"a share of {CALIBRATION_SHARE:.0%} by a hash of the position, seed {seed}"
            is_calibration = _by_hash(seed)
        test = bounded(stream.test(), has_end=stream.is_bounded, folder=folder)
        for start, chunk in _numbered(test):
            found, is_finite = fitted(weights.without_weights(chunk))
            mask = np.zeros(len(is_finite), bool)
            if is_calibration is not None:
                mask = _mask(chunk, start, is_calibration)
                num_unfit += int((mask & ~is_finite).sum())
                mask &= is_finite
                _append(calibration, found, mask)
            _check_labels(found, start)
            _append(evaluation, found, ~mask)
            if progress is not None:
                progress(evaluation.num_examples)
        digest = hashlib.sha256(
            f"{split} {calibration.hexdigest()} {evaluation.hexdigest()}".encode()
        ).hexdigest()
    if not evaluation.num_examples:
        raise InputError("The data holds no examples; at least one is needed to run the model on.")
    notes = [*fitted.notes(), *weights.notes()]
    if num_unfit:
        notes.append(
            f"Calibration leaves out {num_unfit} examples with NaN or infinite inputs and has "
            f"{min(num_calibration, calibration.num_examples)} others."
        )
    if stream.unused:
        notes.append(f"Arrays that are neither inputs nor labels: {', '.join(stream.unused)}.")
    result = Dataset(
        folder, min(num_calibration, calibration.num_examples), evaluation.num_examples,
        Examples(folder / "evaluation").has_labels, split, digest, tuple(notes),
    )  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(result.describe(), indent=2) + "\n")
    return result


def _append(writer: ExampleWriter, chunk: Chunk, mask: np.ndarray) -> None:
    if mask.any():
        writer.append(_take(chunk, mask))


def _take(chunk: Chunk, mask: np.ndarray) -> Chunk:
    return {name: array[mask] for name, array in chunk.items()}


def _check_labels(chunk: Chunk, start: int) -> None:
    for name, array in chunk.items():
        if is_label_column(name) and not (is_finite := finite_examples(array)).all():
            raise InputError(
                f"The {plain(name)} are NaN or infinite, first for example "
                f"{start + int(np.argmin(is_finite))} (counted from 0); leave such examples out, "
                "or pass no labels."
            )


def _choose(count: int, num_chosen: int, seed: int) -> set[int]:
    return set(np.random.default_rng(seed).choice(count, num_chosen, replace=False).tolist())


def _by_hash(seed: int) -> Callable[[int], bool]:
    limit = int(CALIBRATION_SHARE * 2**64)

    def is_calibration(index: int) -> bool:
        digest = hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=8).digest()
        # The first is always evaluated: there may be no other.
        return index > 0 and int.from_bytes(digest, "big") < limit

    return is_calibration


def _numbered(chunks: Iterable[Chunk]) -> Iterator[tuple[int, Chunk]]:
    start = 0
    for chunk in chunks:
        yield start, chunk
        start += len(next(iter(chunk.values())))


def _mask(chunk: Chunk, start: int, is_chosen: Callable[[int], bool]) -> np.ndarray:
    count = len(next(iter(chunk.values())))
    return np.array([is_chosen(start + index) for index in range(count)], bool)


def in_memory(
    data: Any, signature: Signature, progress: Callable[[int], None] | None = None
) -> tuple[Chunk, Chunk | None, tuple[str, ...]]:
    """Reads all examples, for training.

    Args:
      data: as `write` takes it.
      signature: what the model takes and returns.
      progress: called with the number of examples so far.

    Returns:
      What to train on and what to validate with, by column of inputs, labels and weights (see
      `tfopt.examples`), and notes; without `…_train` and `…_test` everything is for training.

    Raises:
      InputError: as `write` does, but labels may be missing.
    """
    stream, fitted = Stream(data, signature), Fitter(signature)

    def read(chunks: Iterator[Chunk]) -> Chunk:
        parts = []
        for start, chunk in _numbered(bounded(chunks, has_end=stream.is_bounded)):
            if progress is not None:
                progress(start)
            weights = {name: chunk.pop(name) for name in [*chunk] if is_weight_column(name)}
            parts.append({**fitted(chunk)[0], **weights})
        if not parts:
            raise InputError("The data holds no examples; at least one is needed to train on.")
        return {name: _joined(name, [part[name] for part in parts]) for name in parts[0]}

    train = None if stream.train is None else read(stream.train())
    test = read(stream.test())
    notes = tuple(fitted.notes())
    return (test, None, notes) if train is None else (train, test, notes)


def _joined(name: str, parts: list[np.ndarray]) -> np.ndarray:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise InputError(
            f"The data's column {plain(name)!r} has examples of shapes "
            f"{', '.join(map(str, sorted(shapes)))}; pad them, or pass a tf.data.Dataset of "
            "batches."
        )
    return np.concatenate(parts)


def calibration_batches(
    dataset: Dataset | None, signature: Signature, batch_size: int
) -> Callable[[], Iterator[Arrays]] | None:
    """A function that starts reading calibration batches anew, or None without examples."""
    examples = None if dataset is None else dataset.calibration
    if dataset is None or examples is None:
        return None
    limit = dataset.num_calibration

    def batches() -> Iterator[Arrays]:
        return (inputs for inputs, _, _ in examples.batches(signature, batch_size, limit))

    return batches


def count_calibration_shapes(
    dataset: Dataset, signature: Signature
) -> Counter[tuple[tuple[int, ...], ...]]:
    """How many calibration examples have which shapes of inputs, without a batch dimension."""
    if dataset.calibration is None:
        return Counter()
    return dataset.calibration.count_shapes(signature.input_names, dataset.num_calibration)


def batch_shapes(dataset: Dataset, signature: Signature, batch_size: int) -> Iterator[Arrays]:
    """Arrays of the shapes that batches have, about as often as they come, without their values.

    The values are not read: of all examples, for calibration and for evaluation, only the index is.
    """
    dtypes = {spec.name: spec.dtype for spec in signature.inputs}
    is_scalar = {spec.name: spec.shape == () for spec in signature.inputs}
    for examples in (dataset.calibration, dataset.evaluation):
        if examples is None:
            continue
        for shapes, count in examples.count_shapes(signature.input_names).items():
            batch = {}
            for name, shape in zip(signature.input_names, shapes, strict=True):
                dtype = object if dtypes[name] == "string" else dtypes[name]
                whole = shape if is_scalar[name] else (batch_size, *shape)
                batch[name] = np.broadcast_to(np.zeros((), dtype), whole)
            yield from itertools.repeat(batch, -(-count // batch_size))


def some_batches(
    dataset: Dataset, signature: Signature, batch_size: int, count: int
) -> list[Arrays]:
    """The first evaluation batches, in memory, for timing."""
    batches = dataset.evaluation.batches(signature, batch_size, limit=batch_size * count)
    return [inputs for inputs, _, _ in itertools.islice(batches, count)]
