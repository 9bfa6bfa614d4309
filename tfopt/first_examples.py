"""The first examples of any data, as the data name them, before a model's inputs are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.dataset.arrays import as_array
from tfopt.dataset.streams import (
    call,
    is_function,
    is_several,
    is_train_and_test,
    open_text,
    parts_of,
)
from tfopt.npz import Member, NpzFile

NUM_EXAMPLES = 2

LABELS = ("y", "y_train", "y_test")


def first_examples(data: Any, num_inputs: int | None = None) -> Any:
    """Inputs of the first few examples: an array, or a dictionary or list of arrays.

    Args:
      data: as `dataset.write` takes it.
      num_inputs: of the model. Where it is not known, a list of arrays has one for each input, and
        a pair of pairs is a training and a test part.

    Returns:
      None when the data can be read only once, are empty, or are no data set.

    Raises:
      InputError: when they hold something else than numbers or text.
    """
    if isinstance(data, (str, Path)):
        data = open_text(str(data))
    runs_once = isinstance(data, Iterator)
    if is_function(data):
        data = call(data)
    if isinstance(data, NpzFile):
        names = list(data.keys())
        data = {name: data[name] for name in names}
    if is_train_and_test(data, num_inputs or 1):
        data = data[-1]
    if isinstance(data, Mapping):
        return _inputs(data) if data else None
    if num_inputs is None and isinstance(data, list) and is_several(data):
        return _inputs(data)
    if (parts := parts_of(data, num_inputs or 1)) is not None:
        return _inputs(parts[0])
    if runs_once:
        return None
    if hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        element = data[0] if len(data) else None
    else:
        element = next(iter(data), None) if hasattr(data, "__iter__") else None
    return None if element is None else _of_element(element, num_inputs or 1)


def _inputs(x: Any) -> Any:
    """The first rows of an array, or of each in a dictionary or list.

    Of a training and a test part among named arrays, those of the first.
    """
    if isinstance(x, Mapping):
        found: dict[str, Any] = {}
        for name, value in x.items():
            if name not in LABELS:
                part = str(name).removesuffix("_train").removesuffix("_test")
                found.setdefault(part, _inputs(value))
        return found["x"] if set(found) == {"x"} else found
    return [_rows(item) for item in x] if is_several(x) else _rows(x)


def _of_element(element: Any, num_inputs: int) -> Any:
    if not isinstance(element, Mapping):
        element = (parts_of(element, num_inputs) or (element,))[0]
    if isinstance(element, Mapping):
        return {k: as_array(v, f"input {k!r}") for k, v in element.items() if k not in LABELS}
    if is_several(element):
        return [as_array(item, "input") for item in element]
    return as_array(element, "input")


def _rows(column: Any) -> np.ndarray:
    if isinstance(column, Member):
        return column.take(column.open(), min(NUM_EXAMPLES, column.shape[0]))
    is_single = isinstance(column, (int, float)) or getattr(column, "shape", None) == ()
    return as_array(column if is_single else column[:NUM_EXAMPLES], "input")
