"""What people pass as data: arrays at once, or a stream of examples or batches."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.dataset.arrays import as_array, is_array
from tfopt.dataset.casting import Chunk, is_batch
from tfopt.dataset.columns import Part, from_mapping, from_parts
from tfopt.errors import InputError
from tfopt.examples import plain
from tfopt.npz import Member, NpzFile
from tfopt.signature import Signature

CHUNK_BYTES = 8 << 20
FORMS = (
    "a path to an .npz file, arrays, a DataFrame, a tf.data.Dataset, a PyDataset, an iterable of "
    "batches, or a function that returns one"
)


class Stream:
    """One or two re-startable streams of chunks.

    Args:
      data: as `tfopt.dataset.write` takes it.
      signature: what the model takes and returns.

    Attributes:
      test: returns the examples to evaluate (and to split, when `train` is None).
      train: returns the examples to calibrate with, or None.
      num_test: their number where it is known.
      is_bounded: whether the stream is known to end.
      unused: names of arrays that are neither inputs nor labels.

    Raises:
      InputError: when data and model do not go together.
    """

    def __init__(self, data: Any, signature: Signature):
        self._signature = signature
        self.unused: tuple[str, ...] = ()
        self.train: Callable[[], Iterator[Chunk]] | None = None
        self.num_train = 0
        self.num_test: int | None = None
        self.is_bounded = True
        if isinstance(data, (str, Path)):
            data = open_text(str(data))
        if is_function(data):
            data = call(data)
        if isinstance(data, (NpzFile, Mapping)):
            self._open_named(data)
        elif is_train_and_test(data, len(signature.inputs)):
            train, test = (from_parts(part, signature) for part in data)
            self._open(test, train)
        elif (parts := parts_of(data, len(signature.inputs))) is not None:
            self._open(from_parts(parts, signature))
        else:
            self.is_bounded = is_bounded(data)
            self.test = lambda: self._elements(_iterate(data))

    def _open_named(self, data: Any) -> None:
        others = [name for name in map(str, data.keys()) if not self._signature.input_called(name)]
        has_test = any(name.endswith("_test") for name in others)
        test = from_mapping(data, self._signature, "_test" if has_test else "")
        train = None
        if has_test and any(name.endswith("_train") for name in others):
            train = from_mapping(data, self._signature, "_train")
        used = test.used | (train.used if train else set())
        self.unused = tuple(sorted({str(name) for name in data} - used))
        self._open(test, train)

    def _open(self, test: Part, train: Part | None = None) -> None:
        self.num_test = _common_length(test.columns)
        self.test = lambda: _cut(test.columns)
        if train is not None:
            self.num_train = _common_length(train.columns)
            self.train = lambda: _cut(train.columns)

    def _elements(self, elements: Iterable[Any]) -> Iterator[Chunk]:
        for element in elements:
            chunk = self._chunk(element)
            if len(next(iter(chunk.values()))):
                yield chunk

    def _chunk(self, element: Any) -> Chunk:
        if isinstance(element, Mapping):
            part = from_mapping(element, self._signature, is_element=True)
        else:
            parts = parts_of(element, len(self._signature.inputs)) or (element,)
            part = from_parts(parts, self._signature, is_element=True)
        arrays = {name: np.asarray(value) for name, value in part.columns.items()}
        if not self._is_batch(arrays):
            arrays = {name: array[None] for name, array in arrays.items()}
        lengths = {name: len(array) for name, array in arrays.items()}
        if len(set(lengths.values())) > 1:
            raise InputError(
                f"A batch has columns of unequal lengths: {_lengths(lengths)}; make them equal."
            )
        return arrays

    def _is_batch(self, arrays: Chunk) -> bool:
        if not all(array.ndim for array in arrays.values()):
            return False
        for spec in self._signature.inputs:
            if spec.shape:
                return is_batch(spec, arrays[spec.name].shape)
        return True


def open_text(text: str) -> Any:
    """The .npz file, or what the function returns, that a text names.

    Raises:
      InputError: when there is none, or it is a file of another kind.
    """
    path = Path(text)
    module, colon, function = text.partition(":")
    if text.endswith(".npz") or not colon or path.exists():
        _check_file(path)
        return NpzFile(path)
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"`data={text}` names no function ({error}); expected FILE.npz or "
            "package.module:function, importable from here."
        ) from error
    if not callable(found):
        return found
    data = call(found)
    # A generator object runs once; the function can be asked again.
    return found if isinstance(data, Iterator) else data


_READERS = {
    ".csv": "read it with pandas.read_csv and pass the DataFrame",
    ".tsv": "read it with pandas.read_csv and pass the DataFrame",
    ".parquet": "read it with pandas.read_parquet and pass the DataFrame",
    ".feather": "read it with pandas.read_feather and pass the DataFrame",
    ".json": "read it with pandas.read_json and pass the DataFrame",
    ".jsonl": "read it with pandas.read_json and pass the DataFrame",
    ".tfrecord": "pass package.module:function that returns a parsed tf.data.TFRecordDataset",
    ".tfrecords": "pass package.module:function that returns a parsed tf.data.TFRecordDataset",
    ".h5": "open it with h5py and pass its data sets",
    ".hdf5": "open it with h5py and pass its data sets",
    ".npy": "write it with numpy.savez(FILE, x=…, y=…)",
    ".pkl": "write its arrays with numpy.savez(FILE, x=…, y=…)",
}


def _check_file(path: Path) -> None:
    advice = _READERS.get(path.suffix.lower())
    if path.is_dir():
        advice = "pass package.module:function that returns a data set of what is in it"
    if advice is not None:
        what = "a folder" if path.is_dir() else f"a {path.suffix} file"
        raise InputError(f"The data {path} is {what}, and expected is an .npz file; {advice}.")


def is_function(data: Any) -> bool:
    """Whether data are a function that returns a data set."""
    return callable(data) and not hasattr(data, "__iter__") and not hasattr(data, "__getitem__")


def call(function: Callable[..., Any]) -> Any:
    """What a function returns; itself where that is an iterator, which runs only once.

    Raises:
      InputError: when the function needs arguments.
    """
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise InputError(
            f"The data is {name}, which cannot be called without arguments ({error}); expected a "
            "function that returns a data set."
        ) from error
    except ValueError:  # a built-in without a signature
        pass
    return function()


def is_bounded(data: Any) -> bool:
    """Whether a data set is known to end.

    Raises:
      InputError: when it is known not to.
    """
    if hasattr(data, "cardinality"):
        size = int(data.cardinality())
        if size == -1:  # tf.data.INFINITE_CARDINALITY
            raise InputError(
                "The tf.data.Dataset never ends; leave out repeat(), or add take(count)."
            )
        return size >= 0
    try:
        return _num_batches(data) is not None
    except (AttributeError, NotImplementedError, TypeError):  # as DataLoaders of streams raise
        return False


def _num_batches(data: Any) -> int:
    """The length of a PyDataset or another sequence.

    Raises:
      AttributeError, NotImplementedError, TypeError: when it has none.
      InputError: when it is a PyDataset without end.
    """
    if not hasattr(data, "num_batches"):
        return len(data)
    if data.num_batches is None:
        raise InputError(
            f"The {type(data).__name__} never ends, since its num_batches is None; return a number."
        )
    return data.num_batches


def _iterate(data: Any) -> Iterable[Any]:
    """Elements of whatever is left: a PyDataset, a tf.data.Dataset, an iterable."""
    if hasattr(data, "__getitem__") and is_bounded(data) and not isinstance(data, bytes):
        return (data[index] for index in range(_num_batches(data)))
    if not hasattr(data, "__iter__") or isinstance(data, (bytes, bytearray)):
        raise InputError(f"{type(data).__name__} is no data set; expected {FORMS}.")
    return data


def is_train_and_test(data: Any, num_inputs: int) -> bool:
    """Whether data are `((x_train, y_train), (x_test, y_test))`.

    A pair of pairs of arrays are inputs and labels where the model has several inputs.
    """
    if not (isinstance(data, (tuple, list)) and len(data) == 2):
        return False
    for part in data:
        if not (isinstance(part, tuple | list) and len(part) in (2, 3)):
            return False
        x, *others = part
        is_x = is_several(x) or (is_array(x) and num_inputs == 1)
        if not is_x or not all(
            each is None or is_several(each) or is_array(each) or _is_list_beside(x, each)
            for each in others
        ):
            return False
    return True


def _is_list_beside(x: Any, y: Any) -> bool:
    """Whether something is a list of as many labels as an array has examples."""
    return is_array(x) and isinstance(y, list) and x.shape[:1] == (len(y),)


def is_several(value: Any) -> bool:
    """Whether something is a dictionary, list or tuple of arrays."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, (list, tuple)) and bool(value) and all(map(is_array, value))


def parts_of(data: Any, num_inputs: int) -> tuple[Any, ...] | None:
    """The parts of `x`, `(x, y)` and `(x, y, sample_weight)`; None where it is a stream."""
    if is_array(data):
        return (data,)
    if isinstance(data, tuple) and 1 <= len(data) <= 3:
        return data
    if isinstance(data, (tuple, list)) and len(data) == num_inputs > 1 and all(map(is_array, data)):
        return (data,)
    if not isinstance(data, list) or not data:
        return None
    is_x = is_array(data[0]) or is_several(data[0])
    if is_x and len(data) in (2, 3) and all(map(is_array, data[1:])):
        return tuple(data)
    return (data,) if isinstance(data[0], (str, bytes, int, float)) else None


def _lengths(lengths: Mapping[str, int]) -> str:
    """Lengths of columns as a message lists them."""
    return ", ".join(f"{plain(name)} {length}" for name, length in lengths.items())


def _common_length(columns: Mapping[str, Any]) -> int:
    for name, column in columns.items():
        if not column.shape:
            raise InputError(
                f"The column {plain(name)!r} holds a single number; expected one row an example."
            )
    lengths = {name: column.shape[0] for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InputError(
            f"The arrays have unequal numbers of examples: {_lengths(lengths)}; make them equal."
        )
    return next(iter(lengths.values()))


def _cut(columns: Mapping[str, Any]) -> Iterator[Chunk]:
    """Chunks of all columns in lockstep."""
    count = _common_length(columns)
    bytes_each = sum(
        max(1, math.prod(column.shape[1:]) * column.dtype.itemsize) for column in columns.values()
    )
    step = max(1, CHUNK_BYTES // bytes_each)
    streams = {
        name: column.open() if isinstance(column, Member) and count else None
        for name, column in columns.items()
    }
    for start in range(0, count, step):
        stop = min(count, start + step)
        yield {
            name: as_array(
                column[start:stop]
                if streams[name] is None
                else column.take(streams[name], stop - start),
                f"column {plain(name)!r}",
            )
            for name, column in columns.items()
        }
