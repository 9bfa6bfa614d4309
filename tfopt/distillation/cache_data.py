"""The examples of a cache: arrays of the user's, or a data set that is copied to disk."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.distillation.cache_files import (
    DATA,
    FIX,
    Column,
    Record,
    RowWriter,
    bytes_of,
    describe,
    is_number,
    locked,
    open_rows,
    read_record,
    write_record,
)  # fmt: skip
from tfopt.distillation.nested import difference, put_together, take_apart
from tfopt.errors import InputError
from tfopt.progress import Progress

CHUNK_BYTES = 8 << 20  # hashed at once


@dataclasses.dataclass(frozen=True)
class Examples:
    """Inputs, labels and weights, of which any rows can be read.

    Attributes:
      template: of `(inputs, labels, weights)`, with numbers of columns for arrays.
      columns: arrays in memory or `Rows` on disk.
    """

    template: Any
    columns: Sequence[Any]

    @property
    def num_examples(self) -> int:
        """Of all columns."""
        return self.columns[0].shape[0]


def open_examples(
    data: Any, folder: Path, record: Record, has_view: bool, progress: Progress
) -> Examples:
    """The examples, after it is clear that the cache is of these and no others.

    Args:
      data: as `cached` takes it.
      folder: of the cache.
      record: of the folder; gets the key of the data if it has none.
      has_view: whether targets depend on labels, too.
      progress: told about copying.

    Raises:
      InputError: when the data do not fit, or are others.
    """
    import tensorflow as tf

    with contextlib.ExitStack() as stack:
        if "data" not in record:
            stack.enter_context(locked(folder))
            record |= read_record(folder)  # another process may have been faster
        if isinstance(data, tf.data.Dataset):
            return _copied(data, folder, record, progress)
        template, leaves = take_apart(_parts(data))
        columns = [np.asarray(leaf) for leaf in leaves]
        num_examples = _num_rows(columns)
        if not num_examples:
            raise InputError("The data hold no examples; at least one is needed.")
        # Labels and weights are read from the user each time; only views may look at labels.
        hashed, numbers = take_apart(put_together(template[: 2 if has_view else 1], columns))
        _claim(folder, record, num_examples, _sha256(hashed, numbers))
        return Examples(template, columns)


def _parts(data: Any) -> tuple[Any, Any, Any]:
    """Inputs, labels and weights, told apart as Keras does."""
    parts = data if isinstance(data, tuple) else (data,)
    if not 1 <= len(parts) <= 3 or parts[0] is None:
        raise InputError(
            f"The data are a tuple of {len(parts)} parts; expected x, (x, y) or "
            "(x, y, sample_weight), and (x, None) where x is a tuple itself."
        )
    inputs, labels, weights = (*parts, None, None)[:3]
    return inputs, labels, weights


def _num_rows(columns: Sequence[np.ndarray]) -> int:
    """Number of examples, after checks of all columns."""
    for column in columns:
        if not is_number(column.dtype):
            raise InputError(
                f"The data hold values of dtype {column.dtype}; expected arrays of numbers, or a "
                "tf.data.Dataset of batches of them."
            )
        if not column.ndim:
            raise InputError(
                "The data hold a single number where one for each example was expected; batch a "
                "tf.data.Dataset with batch()."
            )
        if not np.prod(column.shape[1:]):
            raise InputError(f"The data hold an array of shape {column.shape}; expected values.")
    lengths = sorted({len(column) for column in columns})
    if len(lengths) > 1:
        raise InputError(
            f"The data hold arrays of {' and '.join(map(str, lengths))} examples; expected one "
            "number."
        )
    return lengths[0]


def _sha256(template: Any, columns: Sequence[np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps([template, describe(columns)]).encode())
    for column in columns:
        step = max(1, CHUNK_BYTES // column[:1].nbytes)
        for begin in range(0, len(column), step):
            digest.update(bytes_of(column[begin : begin + step]))
    return digest.hexdigest()


def _copied(data: Any, folder: Path, record: Record, progress: Progress) -> Examples:
    """Reads a data set once: copies it, or sees that it is the one that was copied."""
    import tensorflow as tf

    if int(data.cardinality()) == tf.data.INFINITE_CARDINALITY:
        raise InputError("The data set never ends, and so would no epoch; leave out repeat().")
    template, specs = take_apart(_parts(data.element_spec))
    for spec in specs:
        if not isinstance(spec, tf.TensorSpec) or spec.dtype == tf.string:
            raise InputError(
                f"The data set yields {spec}; expected tensors of numbers: encode texts, and pad "
                "what is ragged."
            )
    is_new = "data" not in record
    if is_new:
        progress.say(f"Copying the data set to {folder / DATA}.")
        shutil.rmtree(folder / DATA, ignore_errors=True)  # what an earlier process began
    num_examples, sha256, columns = _read(data, template, folder / DATA if is_new else None)
    _claim(folder, record, num_examples, sha256)
    rows = open_rows(folder / DATA, columns, num_examples)
    for column in rows:
        column.check()
    return Examples(template, rows)


def _read(data: Any, template: Any, folder: Path | None) -> tuple[int, str, list[Column]]:
    """Number of examples, a hash of them that knows no order, and what the columns are like.

    Args:
      data: a tf.data.Dataset.
      template: of its elements.
      folder: where to write the columns; None writes nothing.
    """
    num_examples, total = 0, 0
    columns: list[Column] = []
    with contextlib.ExitStack() as stack:
        writer = None
        for element in data:
            arrays = [np.asarray(leaf) for leaf in take_apart(_parts(element))[1]]
            if not _num_rows(arrays):
                continue
            columns = columns or describe(arrays)
            if describe(arrays) != columns:
                where, old, new = difference(columns, describe(arrays))
                raise InputError(
                    f"The data set yields examples that differ: {where} is {old} first and {new} "
                    "later; make them equal."
                )
            rows = np.concatenate([bytes_of(array) for array in arrays], axis=1)
            for row in rows:
                total += int.from_bytes(hashlib.sha256(row).digest(), "big")
            num_examples += len(rows)
            if folder is not None:
                writer = writer or stack.enter_context(RowWriter(folder, columns))
                writer.append(arrays)
        if writer is not None:
            writer.sync()
    if not num_examples:
        raise InputError("The data set yields no examples; at least one is needed.")
    # A sum, so that a data set that shuffles is the same each time.
    text = json.dumps([template, columns, total % 2**256])
    return num_examples, hashlib.sha256(text.encode()).hexdigest(), columns


def _claim(folder: Path, record: Record, num_examples: int, sha256: str) -> None:
    """Writes down which data the cache is of, or sees that it is of these."""
    known = record.setdefault("data", {"num_examples": num_examples, "sha256": sha256})
    if known["num_examples"] != num_examples:
        raise InputError(
            f"The cache in {folder} is of other data: it has {known['num_examples']} examples and "
            f"{num_examples} are given; {FIX}."
        )
    if known["sha256"] != sha256:
        raise InputError(
            f"The cache in {folder} is of other data: as many examples, with other values or in "
            f"another form; {FIX}, and where data change at random in each epoch, give what "
            "changes them as a view."
        )
    if "data" not in read_record(folder):
        write_record(folder, record)
