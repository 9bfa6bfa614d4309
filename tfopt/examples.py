"""Examples on disk: written once while they stream in, read in batches by every process.

Memory stays the same however many there are, every variant sees the same examples in the same
order, and arrays keep the dtype they came with (images stay uint8 until they are fed).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.signature import Signature

Arrays = dict[str, np.ndarray]

INDEX = "index.json"
LABELS = "<labels>"  # a model's inputs may have any name, "labels" too
_LABELS_OF, _WEIGHTS = "<labels of ", "<weights"


def label_column(output: str | None = None) -> str:
    """The column of the labels of an output; None for labels that name none."""
    return LABELS if output is None else f"{_LABELS_OF}{output}>"


def weight_column(output: str | None = None) -> str:
    """The column of sample weights, likewise."""
    return f"{_WEIGHTS}>" if output is None else f"{_WEIGHTS} of {output}>"


def is_label_column(name: str) -> bool:
    """Whether a column holds labels."""
    return name == LABELS or name.startswith(_LABELS_OF)


def is_weight_column(name: str) -> bool:
    """Whether a column holds sample weights."""
    return name.startswith(_WEIGHTS)


def is_input_column(name: str) -> bool:
    """Whether a column is fed to the model."""
    return not (is_label_column(name) or is_weight_column(name))


def plain(column: str) -> str:
    """The name of a column in messages."""
    return column.strip("<>")


def output_of(column: str) -> str | None:
    """The output that a column of labels or weights belongs to, or None where it names none."""
    return column[:-1].partition(" of ")[2] or None


Labels = np.ndarray | dict[str, np.ndarray] | None


def labels_for(labels: Labels, output: str) -> np.ndarray | None:
    """The labels of one output: those that name it, or those that name none."""
    return labels.get(output) if isinstance(labels, dict) else labels


class ExampleWriter:
    """Appends examples to a folder; a context manager.

    Args:
      folder: where to; made if it is not there.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._columns: dict[str, _ColumnWriter] = {}
        self.num_examples = 0

    def append(self, columns: Arrays) -> None:
        """Adds examples: arrays with one first dimension; every call has the same columns.

        Raises:
          InputError: when columns or their dtypes are not those of the first call.
        """
        if self._columns and columns.keys() != self._columns.keys():
            raise InputError(
                f"The data yields {', '.join(map(plain, columns))} after it began with "
                f"{', '.join(map(plain, self._columns))}; yield the same of every example."
            )
        for name, array in columns.items():
            if name not in self._columns:
                file = self._folder / f"{len(self._columns)}.bin"
                self._columns[name] = _ColumnWriter(name, file, array.dtype)
            self._columns[name].append(array)
        self.num_examples += len(next(iter(columns.values())))

    def hexdigest(self) -> str:
        """SHA-256 of everything written so far, however it was cut into calls."""
        digest = hashlib.sha256()
        for name, column in sorted(self._columns.items()):
            digest.update(f"{name} {column.dtype} {column.shapes} ".encode())
            digest.update(column.digest.digest())
        return digest.hexdigest()

    def __enter__(self) -> ExampleWriter:
        return self

    def __exit__(self, *error: object) -> None:
        index = {
            "num_examples": self.num_examples,
            "columns": {name: column.close() for name, column in self._columns.items()},
        }
        (self._folder / INDEX).write_text(json.dumps(index))


class _ColumnWriter:
    def __init__(self, name: str, file: Path, dtype: np.dtype):
        self.dtype = _dtype_name(dtype)
        self.is_string = self.dtype == "string"
        self._name, self._numpy_dtype = name, dtype
        self.digest = hashlib.sha256()
        self._file = file
        self._stream = file.open("wb")
        self._shapes: list[tuple[int, ...]] = []
        self._lengths: list[int] = []
        self._is_ragged = False
        self._count = 0

    def append(self, array: np.ndarray) -> None:
        if _dtype_name(array.dtype) != self.dtype:
            raise InputError(
                f"The data's column {plain(self._name)!r} changes from {self._numpy_dtype} to "
                f"{array.dtype}; yield one dtype."
            )
        if self.is_string:
            # Strings have no fixed size: each example is a JSON list, with its length kept.
            rows = [_encode_strings(example) for example in array]
            self._lengths += [len(row) for row in rows]
            content = b"".join(rows)
        else:
            content = np.ascontiguousarray(array).tobytes()
        self.digest.update(content)
        self._stream.write(content)
        shape = array.shape[1:]
        if not self._is_ragged and self._shapes and shape != self._shapes[0]:
            self._is_ragged = True
            self._shapes *= self._count
        if self._is_ragged:
            self._shapes += [shape] * len(array)
        elif not self._shapes:
            self._shapes = [shape]
        self._count += len(array)

    @property
    def shapes(self) -> Any:
        """The shape of every example, or the one that all have."""
        return self._shapes if self._is_ragged or not self._shapes else self._shapes[0]

    def close(self) -> dict[str, Any]:
        self._stream.close()
        return {
            "file": self._file.name,
            "dtype": self.dtype,
            "shapes": self.shapes,
            "is_ragged": self._is_ragged,
            "lengths": self._lengths,
        }


class Examples:
    """Reads what `ExampleWriter` wrote.

    Files are read, not mapped: mapped pages would count as this process's memory.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = json.loads((self.folder / INDEX).read_text())
        self.num_examples: int = index["num_examples"]
        self._columns = {
            name: _ColumnReader(self.folder, column) for name, column in index["columns"].items()
        }

    def __len__(self) -> int:
        return self.num_examples

    @property
    def has_labels(self) -> bool:
        """Whether there are labels, of any output."""
        return LABELS in self._columns or bool(self.label_names)

    @property
    def label_names(self) -> tuple[str, ...]:
        """The outputs that there are labels of, sorted; empty where labels name no output."""
        found = [output_of(name) for name in self._columns if is_label_column(name)]
        return tuple(sorted(name for name in found if name is not None))

    def read_labels(self, start: int, stop: int) -> dict[str | None, list[np.ndarray]]:
        """Labels of examples `start` to `stop` by output; by None where they name none."""
        return {
            output_of(name): column.read(start, stop)
            for name, column in self._columns.items()
            if is_label_column(name)
        }

    def count_shapes(
        self, names: Sequence[str], limit: int | None = None
    ) -> Counter[tuple[tuple[int, ...], ...]]:
        """How many examples have which shapes in these columns, without a batch dimension.

        Args:
          names: the columns.
          limit: as in `batches`.
        """
        columns, chosen = [self._columns[name] for name in names], self._chosen(limit)
        if not any(column.is_ragged for column in columns):
            return Counter({tuple(column.shape(0) for column in columns): len(chosen)})
        return Counter(tuple(column.shape(index) for column in columns) for index in chosen)

    def read(self, name: str, start: int, stop: int) -> list[np.ndarray]:
        """Examples `start` to `stop` of one column, each with its own shape."""
        return self._columns[name].read(start, stop)

    def batches(
        self, signature: Signature, batch_size: int, limit: int | None = None
    ) -> Iterator[tuple[Arrays, Labels, int]]:
        """Batches of model inputs with their labels.

        Args:
          signature: which columns, and the dtypes to feed.
          batch_size: examples in a batch. Consecutive examples cannot share a batch when their
            shapes differ, or their values of an input that has no batch dimension. A batch that
            lacks examples is filled by repeating its last one, so that every batch has this size.
          limit: at most this many examples, evenly spread over all.

        Yields:
          Inputs by name; labels (by output where they belong to certain ones, else one array, or
          None); and how many rows are real.
        """
        names = [*signature.input_names, *filter(is_label_column, self._columns)]
        scalars = [spec.name for spec in signature.inputs if spec.shape == ()]
        if scalars and len(scalars) == len(signature.inputs):
            batch_size = 1
        pending: list[int] = []
        shared: Any = None
        for index in self._chosen(limit):
            new = [self._columns[name].shape(index) for name in names]
            new += [self.read(name, index, index + 1)[0].tolist() for name in scalars]
            if pending and (len(pending) == batch_size or new != shared):
                yield self._batch(signature, pending, batch_size)
                pending = []
            shared = new
            pending.append(index)
        if pending:
            yield self._batch(signature, pending, batch_size)

    def _chosen(self, limit: int | None) -> Sequence[int]:
        """Numbers of the examples that are read: at most so many, evenly spread over all."""
        count = self.num_examples
        if limit is None or limit >= count:
            return range(count)
        return [index * count // limit for index in range(limit)]

    def _batch(
        self, signature: Signature, indices: list[int], batch_size: int
    ) -> tuple[Arrays, Labels, int]:
        inputs = {}
        for spec in signature.inputs:
            rows = self._rows(spec.name, indices)
            if spec.shape == ():
                inputs[spec.name] = _as_input(rows[0], spec.dtype)
                continue
            rows += [rows[-1]] * (batch_size - len(rows))
            inputs[spec.name] = _as_input(np.stack(rows), spec.dtype)
        found = {
            output_of(name): np.stack(self._rows(name, indices))
            for name in self._columns
            if is_label_column(name)
        }
        by_output = {name: labels for name, labels in found.items() if name is not None}
        return inputs, by_output or found.get(None), len(indices)

    def _rows(self, name: str, indices: list[int]) -> list[np.ndarray]:
        if indices[-1] - indices[0] == len(indices) - 1:
            return self.read(name, indices[0], indices[-1] + 1)
        return [self.read(name, index, index + 1)[0] for index in indices]


class _ColumnReader:
    def __init__(self, folder: Path, column: dict[str, Any]):
        self._path = folder / column["file"]
        self._is_string = column["dtype"] == "string"
        self._dtype = np.dtype(object if self._is_string else column["dtype"])
        self.is_ragged = column["is_ragged"]
        self._shapes = column["shapes"]
        self._offsets: np.ndarray | None = None
        if self._is_string:
            self._offsets = np.concatenate([[0], np.cumsum(column["lengths"])])
        elif self.is_ragged:
            sizes = [int(np.prod(shape)) * self._dtype.itemsize for shape in self._shapes]
            self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        else:
            self._size = int(np.prod(self._shapes)) * self._dtype.itemsize

    def shape(self, index: int) -> tuple[int, ...]:
        return tuple(self._shapes[index] if self.is_ragged else self._shapes)

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        begin, end = (
            (start * self._size, stop * self._size)
            if self._offsets is None
            else (int(self._offsets[start]), int(self._offsets[stop]))
        )
        with self._path.open("rb") as stream:
            stream.seek(begin)
            content = stream.read(end - begin)
        if self._offsets is None:
            shape = (stop - start, *self._shapes)
            return list(np.frombuffer(content, self._dtype).reshape(shape))
        pieces = [
            content[int(self._offsets[index]) - begin : int(self._offsets[index + 1]) - begin]
            for index in range(start, stop)
        ]
        shapes = [self.shape(index) for index in range(start, stop)]
        if self._is_string:
            return [_decode_strings(p, s) for p, s in zip(pieces, shapes, strict=True)]
        return [
            np.frombuffer(p, self._dtype).reshape(s) for p, s in zip(pieces, shapes, strict=True)
        ]


def _as_input(array: np.ndarray, dtype: str) -> np.ndarray:
    return array if dtype == "string" else np.asarray(array, np.dtype(dtype), order="C")


def _dtype_name(dtype: np.dtype) -> str:
    """How a dtype is written down; NumPy knows bfloat16 and its like by name only."""
    if dtype.kind in "OSU":
        return "string"
    return dtype.name if dtype.kind == "V" else dtype.str


def _encode_strings(example: Any) -> bytes:
    flat = np.asarray(example, object).ravel()
    texts = [
        item if isinstance(item, bytes) else str(item).encode(errors="surrogatepass")
        for item in flat
    ]
    return json.dumps([text.decode("latin-1") for text in texts]).encode()


def _decode_strings(content: bytes, shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(shape, object)
    array[...] = np.array([text.encode("latin-1") for text in json.loads(content)], object).reshape(
        shape
    )
    return array
