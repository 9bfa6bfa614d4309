"""Data in, examples on disk out: npz files, arrays, tf.data, Keras PyDataset, generators.

Examples for calibration and for evaluation never overlap. Where the data has parts `…_train` and
`…_test`, calibration takes from the first and evaluation is all of the second. Otherwise a seeded
choice is made: at random where the number of examples is known, and by a seeded hash of the
example's position in a stream.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.examples import LABELS, Arrays, Examples, ExampleWriter
from tfopt.npz import Member, NpzFile
from tfopt.signature import Signature, TensorSpec

NUM_CALIBRATION = 256
CALIBRATION_SHARE = 0.1  # of a stream whose length is not known
CHUNK_BYTES = 8 << 20

Chunk = dict[str, np.ndarray]  # columns by name, `labels` among them


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
      notes: casts that were made, one sentence each.
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
        a dict of arrays named like the .npz members (inputs, or `x` for a single input, and
        labels `y`; each may stand as `…_train` and `…_test`); a tuple `(x, y)` of arrays; a
        tf.data.Dataset, Keras PyDataset, or a function that returns an iterator, of examples or
        batches `x`, `(x, y)`, `(x, y, sample_weight)` or dicts.
      signature: what the model takes.
      folder: where to.
      seed: of the split.
      num_calibration: how many examples to set aside, at most a quarter of all.
      progress: called with the number of examples so far.

    Raises:
      InputError: when names, shapes, dtypes or lengths do not fit, or there are no examples.
    """
    folder = Path(folder)
    stream = _Stream(data, signature)
    fitted = _Fitter(signature)
    with (
        ExampleWriter(folder / "calibration") as calibration,
        ExampleWriter(folder / "evaluation") as evaluation,
    ):
        is_calibration: Callable[[int], bool] | None
        if stream.train is not None:
            count = min(num_calibration, stream.num_train)
            split = f"{count} of {stream.num_train} training examples, chosen with seed {seed}"
            chosen = _choose(stream.num_train, count, seed)
            for start, chunk in _numbered(stream.train()):
                mask = _mask(chunk, start, chosen.__contains__)
                if mask.any():
                    calibration.append(fitted({k: v[mask] for k, v in chunk.items()}))
            is_calibration = None
        elif stream.num_test is not None:
            count = min(num_calibration, stream.num_test // 4)
            split = f"{count} of {stream.num_test} examples, chosen with seed {seed}"
            is_calibration = _choose(stream.num_test, count, seed).__contains__
        else:
            split = f"a share of {CALIBRATION_SHARE:.0%} by a hash of the position, seed {seed}"
            is_calibration = _by_hash(seed)
        for start, chunk in _numbered(stream.test()):
            fitted_chunk = fitted(chunk)
            if is_calibration is None:
                evaluation.append(fitted_chunk)
            else:
                mask = _mask(chunk, start, is_calibration)
                for writer, part in ((calibration, mask), (evaluation, ~mask)):
                    if part.any():
                        writer.append({k: v[part] for k, v in fitted_chunk.items()})
            if progress is not None:
                progress(evaluation.num_examples)
        digest = hashlib.sha256(
            f"{split} {calibration.hexdigest()} {evaluation.hexdigest()}".encode()
        ).hexdigest()
    if not evaluation.num_examples:
        raise InputError("The data holds no examples; at least one is needed to run the model on.")
    notes = fitted.notes()
    if stream.has_weights:
        notes += ("Sample weights are not used: every example counts the same.",)
    result = Dataset(
        folder, min(num_calibration, calibration.num_examples), evaluation.num_examples,
        Examples(folder / "evaluation").has_labels, split, digest, notes,
    )  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(result.describe(), indent=2) + "\n")
    return result


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


class _Fitter:
    """Checks columns against the signature and casts where every value survives."""

    def __init__(self, signature: Signature):
        self._specs = {spec.name: spec for spec in signature.inputs}
        self._casts: dict[str, str] = {}

    def __call__(self, chunk: Chunk) -> Chunk:
        return {
            name: array if name == LABELS else self._fit(self._specs[name], array)
            for name, array in chunk.items()
        }

    def notes(self) -> tuple[str, ...]:
        return tuple(f"{name} was cast from {cast}." for name, cast in self._casts.items())

    def _fit(self, spec: TensorSpec, array: np.ndarray) -> np.ndarray:
        if spec.shape is not None:
            want = (None, *spec.shape[1:]) if spec.shape else (None,)
            if len(array.shape) != len(want) or any(
                w is not None and w != got for w, got in zip(want, array.shape, strict=True)
            ):
                example = "(" + ", ".join("?" if d is None else str(d) for d in want[1:]) + ")"
                raise InputError(
                    f"Data for input {spec.name!r} has examples of shape {array.shape[1:]}; the "
                    f"model takes {example}; reshape the data."
                )
        is_string = array.dtype.kind in "OSU"
        if is_string or spec.dtype == "string":
            if is_string and spec.dtype == "string":
                return array
            raise self._wrong_dtype(spec, array)
        dtype = np.dtype(spec.dtype)
        if array.dtype == dtype:
            return array
        # NumPy calls int64 to float64 safe too, although large values are rounded.
        if array.itemsize < dtype.itemsize and np.can_cast(array.dtype, dtype, "safe"):
            self._casts[spec.name] = f"{array.dtype} to {dtype}"
            return array  # kept small on disk; cast when it is read
        with np.errstate(all="ignore"):
            cast = array.astype(dtype)
        if not _is_same(array, cast):
            raise self._wrong_dtype(spec, array)
        self._casts[spec.name] = f"{array.dtype} to {dtype}"
        return cast

    @staticmethod
    def _wrong_dtype(spec: TensorSpec, array: np.ndarray) -> InputError:
        return InputError(
            f"Data for input {spec.name!r} is {array.dtype}; the model takes {spec.dtype}, which "
            f"cannot hold every value; save the data as {spec.dtype}."
        )


def _is_same(array: np.ndarray, cast: np.ndarray) -> bool:
    """Whether a cast kept every value: there and back again, and inside what integers hold.

    The way back alone proves nothing: uint8 200 to int8 is -56, and back it is 200.
    """
    with np.errstate(all="ignore"):
        back = cast.astype(array.dtype)
    if not np.array_equal(back, array, equal_nan=array.dtype.kind == "f"):
        return False
    for values, other in ((array, cast.dtype), (cast, array.dtype)):
        if other.kind in "iu" and values.size:
            limits = np.iinfo(other)
            # Python compares whole numbers with floats exactly.
            if values.min().item() < limits.min or values.max().item() > limits.max:
                return False
    return True


class _Stream:
    """One or two re-startable streams of chunks.

    Attributes:
      test: returns the examples to evaluate (and to split, when `train` is None).
      train: returns the examples to calibrate with, or None.
      num_test: their number where it is known.
      has_weights: whether sample weights came with the data; they are not used.
    """

    def __init__(self, data: Any, signature: Signature):
        self._signature = signature
        self.train: Callable[[], Iterator[Chunk]] | None = None
        self.num_train = 0
        self.num_test: int | None = None
        self.has_weights = isinstance(data, (tuple, list)) and len(data) == 3
        if isinstance(data, (str, Path)):
            data = open_text(str(data))
        if _is_pair_of_pairs(data):
            (x_train, y_train), (x_test, y_test) = data
            data = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
        if isinstance(data, (tuple, list)) and len(data) in (2, 3) and _is_column(data[0]):
            data = {"x": data[0], "y": data[1]}
        elif (
            isinstance(data, (tuple, list)) and len(data) in (2, 3) and isinstance(data[0], Mapping)
        ):
            data = {**data[0], "y": data[1]}
        elif _is_column(data):
            data = {"x": data}
        if isinstance(data, NpzFile) or (
            isinstance(data, Mapping) and all(_is_column(value) for value in data.values())
        ):
            if isinstance(data, Mapping):
                # Tensors have dtypes of their own; an h5py data set is left on disk.
                data = {
                    name: value if isinstance(value.dtype, np.dtype) else np.asarray(value)
                    for name, value in data.items()
                }
            self._open_columns(data)
        else:
            self.test = lambda: self._elements(_iterate(data))

    def _open_columns(self, columns: Any) -> None:
        names = set(columns.keys())
        others = names.difference(self._signature.input_names)
        has_test = any(name.endswith("_test") for name in others)
        test = self._match(names, "_test" if has_test else "")
        self.num_test = _common_length(columns, test)
        self.test = lambda: _cut(columns, test)
        if has_test and any(name.endswith("_train") for name in others):
            train = self._match(names, "_train")
            self.num_train = _common_length(columns, train)
            self.train = lambda: _cut(columns, train)

    def _match(self, names: set[str], suffix: str) -> dict[str, str]:
        """Members by column name."""
        inputs = self._signature.input_names
        found = {name: name + suffix for name in inputs if name + suffix in names}
        if not found and len(inputs) == 1 and "x" + suffix in names:
            found = {inputs[0]: "x" + suffix}
        missing = [name for name in inputs if name not in found]
        if missing:
            hint = " or 'x'" if len(inputs) == 1 else ""
            raise InputError(
                f"The data has arrays {', '.join(sorted(names)) or 'none'}; the model's inputs are "
                f"{', '.join(inputs)}; name the arrays after them{hint}"
                f"{' with ' + suffix if suffix else ''}."
            )
        if "y" + suffix in names and "y" not in inputs:
            found[LABELS] = "y" + suffix
        return found

    def _elements(self, elements: Iterable[Any]) -> Iterator[Chunk]:
        for element in elements:
            yield self._chunk(element)

    def _chunk(self, element: Any) -> Chunk:
        labels = None
        inputs = self._signature.input_names
        if isinstance(element, tuple) and len(element) in (2, 3):
            self.has_weights = len(element) == 3 or self.has_weights
            element, labels = element[:2]
        if isinstance(element, Mapping):
            columns = dict(element)
            if labels is None and "y" not in inputs:
                labels = columns.pop("y", None)
            if len(inputs) == 1 and set(columns) == {"x"}:
                columns = {inputs[0]: columns["x"]}
        elif len(inputs) == 1:
            columns = {inputs[0]: element}
        else:
            raise InputError(
                f"The data yields {type(element).__name__}; the model has several inputs "
                f"({', '.join(inputs)}); yield a dict with their names."
            )
        if set(columns) != set(inputs):
            raise InputError(
                f"The data yields {', '.join(map(str, sorted(columns)))}; the model's inputs are "
                f"{', '.join(inputs)}; use their names."
            )
        arrays = {name: _to_numpy(value) for name, value in columns.items()}
        if isinstance(labels, Mapping):
            if len(labels) != 1:
                raise InputError(
                    f"The data yields labels for {', '.join(map(str, labels))}; one output is "
                    "scored, so yield its labels alone."
                )
            labels = next(iter(labels.values()))
        if labels is not None:
            arrays[LABELS] = _to_numpy(labels)
        if not self._is_batch(arrays):
            arrays = {name: array[None] for name, array in arrays.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(f"A batch has columns of unequal lengths: {lengths}; make them equal.")
        return arrays

    def _is_batch(self, arrays: Arrays) -> bool:
        for spec in self._signature.inputs:
            if spec.shape:
                return arrays[spec.name].ndim == len(spec.shape)
        return all(array.ndim for array in arrays.values())


def _is_column(value: Any) -> bool:
    return isinstance(value, (np.ndarray, Member)) or (
        hasattr(value, "__array__") and hasattr(value, "shape") and hasattr(value, "dtype")
    )


def _is_pair_of_pairs(data: Any) -> bool:
    return (
        isinstance(data, (tuple, list))
        and len(data) == 2
        and all(isinstance(part, (tuple, list)) and len(part) == 2 for part in data)
        and all(_is_column(value) for part in data for value in part)
    )


def _to_numpy(value: Any) -> np.ndarray:
    if hasattr(value, "numpy"):
        value = value.numpy()
    try:
        # As an object, since the S dtype drops trailing zero bytes.
        return np.asarray(value, object if isinstance(value, (bytes, str)) else None)
    except ValueError as error:
        raise InputError(
            f"The data yields {type(value).__name__} that is no array ({error}); yield arrays, "
            "and x and y as a tuple."
        ) from error


def _iterate(data: Any) -> Iterable[Any]:
    """Elements of whatever is left: a PyDataset, a tf.data.Dataset, a function, an iterable."""
    if isinstance(data, Mapping):
        kinds = ", ".join(sorted({type(value).__name__ for value in data.values()}))
        raise InputError(
            f"The data is a dict of {kinds}; expected NumPy arrays with one row an example."
        )
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        return (data[index] for index in range(len(data)))
    if callable(data) and not hasattr(data, "__iter__"):
        data = data()
    if not hasattr(data, "__iter__"):
        raise InputError(
            f"{type(data).__name__} is no data set; expected a path, arrays, a tf.data.Dataset, a "
            "PyDataset, or a function that returns an iterator."
        )
    return data


def _common_length(columns: Any, members: dict[str, str]) -> int:
    for member in members.values():
        if not columns[member].shape:
            raise InputError(
                f"The array {member!r} holds a single number; expected one row an example."
            )
    lengths = {member: columns[member].shape[0] for member in members.values()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"The arrays have unequal numbers of examples: {lengths}; make them equal."
        )
    return next(iter(lengths.values()))


def _cut(columns: Any, members: dict[str, str]) -> Iterator[Chunk]:
    """Chunks of all columns in lockstep."""
    count = _common_length(columns, members)
    if not count:
        return
    readers = {name: columns[member] for name, member in members.items()}
    bytes_each = sum(max(1, int(np.prod(r.shape[1:])) * r.dtype.itemsize) for r in readers.values())
    step = max(1, CHUNK_BYTES // bytes_each)
    streams = {
        name: reader.open() if isinstance(reader, Member) else None
        for name, reader in readers.items()
    }
    for start in range(0, count, step):
        stop = min(count, start + step)
        yield {
            name: np.asarray(reader[start:stop])
            if streams[name] is None
            else reader.take(streams[name], stop - start)
            for name, reader in readers.items()
        }


def open_text(text: str) -> Any:
    """The .npz file, or what the function returns, that a text names.

    Raises:
      InputError: when there is none.
    """
    module, colon, function = text.partition(":")
    if text.endswith(".npz") or not colon or Path(text).exists():
        return NpzFile(Path(text))
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"--data={text} names no function ({error}); expected FILE.npz or "
            "package.module:function, importable from here."
        ) from error
    data = found()
    # A generator object runs once; the function can be asked again.
    return found if hasattr(data, "__next__") else data


def in_memory(data: Any, signature: Signature) -> tuple[Chunk, Chunk | None]:
    """Reads all examples, for training.

    Args:
      data: a path to an .npz file, or arrays as `write` takes them.
      signature: what the model takes.

    Returns:
      What to train on and what to validate with, by input and `LABELS`; without `…_train` and
      `…_test` everything is for training.

    Raises:
      InputError: as `write` does.
    """
    stream, fitted = _Stream(data, signature), _Fitter(signature)

    def read(chunks: Iterable[Chunk]) -> Chunk:
        parts = [fitted(chunk) for chunk in chunks]
        if not parts:
            raise InputError("The data holds no examples; at least one is needed to train on.")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    if stream.train is None:
        return read(stream.test()), None
    return read(stream.train()), read(stream.test())


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
