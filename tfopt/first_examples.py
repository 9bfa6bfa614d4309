"""The first examples of any data, as the data name them, before a model's inputs are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.dataset.streams import open_text
from tfopt.npz import Member, NpzFile

NUM_EXAMPLES = 2

LABELS = ("y", "y_train", "y_test")


def first_examples(data: Any) -> Any:
    """Inputs of the first few examples: an array, or a dictionary or list of arrays.

    Args:
      data: as `dataset.write` takes it.

    Returns:
      None when the data can be read only once.
    """
    if isinstance(data, (str, Path)):
        data = open_text(str(data))
    if isinstance(data, NpzFile):
        names = list(data.keys())
        data = {name: data[name] for name in names}
    if isinstance(data, (tuple, list)) and data and isinstance(data[0], tuple):
        data = data[-1]  # ((x, y), (x, y))
    if isinstance(data, tuple) and len(data) in (1, 2, 3):
        data = data[0]
    if isinstance(data, Mapping):
        return _of_columns(data)
    if isinstance(data, list) and data and all(hasattr(item, "shape") for item in data):
        return [_rows(item) for item in data]
    if hasattr(data, "shape"):
        return _rows(data)
    if callable(data) and not hasattr(data, "__iter__"):
        data = data()
    elif isinstance(data, Iterator):
        return None
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        element = data[0]
    else:
        element = next(iter(data), None)
    return None if element is None else _of_element(element)


def _of_columns(columns: Mapping[str, Any]) -> Any:
    """Inputs among named arrays; of a training and a test part, those of the first."""
    found: dict[str, Any] = {}
    for name, value in columns.items():
        if name not in LABELS:
            found.setdefault(name.removesuffix("_train").removesuffix("_test"), _rows(value))
    return found["x"] if set(found) == {"x"} else found


def _of_element(element: Any) -> Any:
    import tensorflow as tf

    if isinstance(element, (tuple, list)) and len(element) in (2, 3):
        element = element[0]
    if isinstance(element, Mapping):
        element = {name: value for name, value in element.items() if name not in LABELS}
    return tf.nest.map_structure(np.asarray, element)


def _rows(column: Any) -> np.ndarray:
    if isinstance(column, Member):
        return column.take(column.open(), min(NUM_EXAMPLES, column.shape[0]))
    return np.asarray(column[:NUM_EXAMPLES])
