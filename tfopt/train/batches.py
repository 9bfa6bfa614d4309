"""Data as `fit` takes them, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def batches(data: Any, batch_size: int) -> Iterator[Any]:
    """Yields the inputs of each batch, without labels.

    Args:
      data: an array or a list or dictionary of arrays of shape (examples, …), or an iterable of
        batches. Of tuples, which hold labels, the first part is taken.
      batch_size: of arrays.
    """
    if isinstance(data, tuple):
        data = data[0]
    if isinstance(data, (list, tuple, dict)) or hasattr(data, "shape"):
        num_examples = len(leaves(data)[0]) if leaves(data) else 0
        for begin in range(0, num_examples, batch_size):
            yield _map(lambda array, at=begin: array[at : at + batch_size], data)
    else:
        for batch in data:
            yield batch[0] if isinstance(batch, tuple) else batch


def _map(function: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {name: function(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [function(item) for item in value]
    return function(value)


def leaves(value: Any) -> list[Any]:
    """The arrays of one batch."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]
