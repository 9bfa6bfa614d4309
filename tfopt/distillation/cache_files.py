"""The folder of a cache: a record, a lock, and arrays of which rows are appended and read."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.distillation.nested import difference
from tfopt.errors import InputError, ResultError

RECORD, LOCK, DATA, TARGETS = "cache.json", "lock", "data", "targets"
FORMAT = 1  # of the files, and of the orders and seeds that the targets of views depend on
RECORD_EVERY_S = 1.0

FIX = "name another folder, or delete this one"

Record = dict[str, Any]
Column = dict[str, Any]  # dtype and shape of a row


def open_record(folder: Path, key: dict[str, Any]) -> Record:
    """The record of a folder; a new one if it is empty.

    Raises:
      InputError: when it has another key, or the folder holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; expected the folder of a cache.")
    key = {"format": FORMAT, **key}
    if not (folder / RECORD).is_file():
        names = {LOCK, f"{RECORD}.new"}
        if folder.exists() and any(path.name not in names for path in folder.iterdir()):
            raise InputError(
                f"{folder} holds files and is no cache of what teachers say; name another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            if not (folder / RECORD).is_file():
                write_record(folder, {"key": key, "columns": [], "num_done": 0})
    record = read_record(folder)
    _check_key(folder, record["key"], key)
    return record


def _check_key(folder: Path, kept: dict[str, Any], key: dict[str, Any]) -> None:
    if kept == key:
        return
    if kept["format"] != FORMAT:
        raise InputError(f"The cache in {folder} is of another version of tfopt; {FIX}.")
    if kept["identity"] != key["identity"]:
        where, old, new = difference(kept["identity"], key["identity"])
        raise InputError(
            f"The cache in {folder} is from another teacher: {where} is {old} in it and {new} now; "
            f"{FIX}."
        )
    if kept["view"] is None or key["view"] is None:
        how, given = ("without", "one is") if kept["view"] is None else ("with", "none is")
        raise InputError(f"The cache in {folder} was made {how} a view and {given} given; {FIX}.")
    where, old, new = difference(kept["view"], key["view"])
    raise InputError(
        f"The views in {folder} were made with {where} {old} and {new} is given; give {old}, {FIX}."
    )


def read_record(folder: Path) -> Record:
    """What `cache.json` says.

    Raises:
      InputError: when it is damaged.
    """
    try:
        return json.loads((folder / RECORD).read_text())
    except ValueError as error:
        raise InputError(f"{folder / RECORD} is damaged ({error}); delete {folder}.") from error


def write_record(folder: Path, record: Record) -> None:
    """Replaces `cache.json` at once: it is never half of one."""
    path = folder / f"{RECORD}.new"
    with path.open("wb") as file:
        file.write((json.dumps(record, indent=2) + "\n").encode())
        _sync(file)
    path.replace(folder / RECORD)
    _sync_folder(folder)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes the names of files in a folder survive a failure of power."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Inside, no other process writes to the folder; the lock ends with its process.

    Raises:
      InputError: when another one has it.
    """
    import fcntl

    with writing(folder):
        file = (folder / LOCK).open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"Another process writes the cache in {folder}; wait for it, or name another "
                "folder (each of several workers needs one)."
            ) from error
        yield


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns what the system refuses into a sentence.

    Raises:
      ResultError: when something cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        raise ResultError(
            f"The cache in {folder} cannot be written ({error.strerror or error}); make room, or "
            "name another folder."
        ) from error


class Rows:
    """An array on disk of which rows are read, as `rows[numbers]`.

    It is mapped for one read only: mapped pages count as memory of the process.

    Attributes:
      dtype: of NumPy.
      shape: of all.
    """

    def __init__(self, path: Path, column: Column, num_rows: int):
        self.dtype, self.shape = dtype_of(column["dtype"]), (num_rows, *column["shape"])
        self.path = path

    @property
    def size_bytes(self) -> int:
        """Of all rows."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def __getitem__(self, numbers: slice | np.ndarray) -> np.ndarray:
        mapped = np.memmap(self.path, self.dtype, "r", shape=self.shape).view(np.ndarray)
        return mapped[numbers].copy() if isinstance(numbers, slice) else mapped[numbers]

    def check(self) -> None:
        """Sees that the file is as long as it should be.

        Raises:
          InputError: when it is not.
        """
        if not self.path.is_file() or self.path.stat().st_size < self.size_bytes:
            raise InputError(
                f"{self.path} is damaged: it does not hold the {self.shape[0]} rows that {RECORD} "
                f"tells of; delete {self.path.parent.parent}."
            )


def open_rows(folder: Path, columns: Sequence[Column], num_rows: int) -> list[Rows]:
    """Arrays that `RowWriter` wrote."""
    return [Rows(folder / f"{place}.bin", column, num_rows) for place, column in enumerate(columns)]


class RowWriter:
    """Appends rows to files; a context manager.

    Args:
      folder: where to; made if it is not there.
      columns: what rows are like, one for each file.
      num_rows: to keep of those that are there; the rest may be half written.
    """

    def __init__(self, folder: Path, columns: Sequence[Column], num_rows: int = 0):
        folder.mkdir(exist_ok=True)
        self._folder = folder
        self._files = []
        for rows in open_rows(folder, columns, num_rows):
            file = rows.path.open("ab")
            file.truncate(rows.size_bytes)
            self._files.append(file)

    def append(self, arrays: Sequence[np.ndarray]) -> None:
        """Adds rows to each file."""
        for file, array in zip(self._files, arrays, strict=True):
            file.write(bytes_of(array))

    def sync(self) -> None:
        """Returns when all is on disk."""
        for file in self._files:
            _sync(file)
        _sync_folder(self._folder)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.ExitStack() as stack:
            for file in self._files:
                stack.callback(file.close)


class TargetWriter:
    """Appends targets, and records how many there are once they are on disk; a context manager.

    Args:
      folder: of the cache.
      record: goes on from it, and keeps it up to date.
    """

    def __init__(self, folder: Path, record: Record):
        self._folder, self._record = folder, record
        self._num_done = record["num_done"]
        self._rows: RowWriter | None = None
        self._recorded = time.monotonic()

    def append(self, targets: Sequence[np.ndarray]) -> None:
        """Adds the targets of some examples."""
        with writing(self._folder):
            if self._rows is None:
                columns = self._record["columns"]
                self._rows = RowWriter(self._folder / TARGETS, columns, self._num_done)
            self._rows.append(targets)
            self._num_done += len(targets[0])
            if time.monotonic() >= self._recorded + RECORD_EVERY_S:
                self._keep(self._rows)

    def __enter__(self) -> TargetWriter:
        return self

    def __exit__(self, *error: object) -> None:
        if self._rows is not None:
            with writing(self._folder), self._rows:
                self._keep(self._rows)

    def _keep(self, rows: RowWriter) -> None:
        rows.sync()
        self._record["num_done"] = self._num_done
        write_record(self._folder, self._record)
        self._recorded = time.monotonic()


def describe(arrays: Sequence[np.ndarray]) -> list[Column]:
    """What rows of arrays are like."""
    return [{"dtype": array.dtype.name, "shape": list(array.shape[1:])} for array in arrays]


def bytes_of(array: np.ndarray) -> Any:
    """The bytes of each row, of shape (rows, bytes)."""
    return np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)


def dtype_of(name: str) -> np.dtype:
    """A dtype by its name, bfloat16 among them."""
    import ml_dtypes

    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def is_number(dtype: np.dtype) -> bool:
    """Whether NumPy and TensorFlow both keep it in a fixed number of bytes."""
    return dtype.kind in "iub" or is_float(dtype)


def is_float(dtype: np.dtype) -> bool:
    """Whether it is a floating-point dtype, bfloat16 among them."""
    return dtype.kind == "f" or dtype.name == "bfloat16"
