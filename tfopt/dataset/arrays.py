"""Whatever holds numbers or text in, NumPy arrays out: lists, tensors, pandas, h5py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.npz import Member

_REFUSED = {
    "RaggedTensor": "call to_tensor() on it, or yield the examples one by one",
    "RaggedTensorValue": "call to_tensor() on it, or yield the examples one by one",
    "SparseTensor": "call tf.sparse.to_dense on it",
    "SparseTensorValue": "call tf.sparse.to_dense on it",
    "DatasetV2": "pass it alone, as the data",
    "KerasTensor": "pass values",
}


def is_array(value: Any) -> bool:
    """Whether something has a shape and a dtype, or converts to an array by itself."""
    return isinstance(value, Member) or (
        hasattr(value, "shape") and (hasattr(value, "dtype") or is_frame(value))
    )


def is_frame(value: Any) -> bool:
    """Whether something is a pandas DataFrame."""
    return _is_pandas(value) and hasattr(value, "columns")


def as_column(value: Any, what: str) -> Any:
    """An array, or what reads slices of one from disk: members of .npz files, h5py data sets.

    Args:
      value: to convert.
      what: names it in messages, such as `input 'image'`.

    Raises:
      InputError: as `as_array` does.
    """
    is_on_disk = isinstance(value, Member) or type(value).__module__.partition(".")[0] == "h5py"
    return value if is_on_disk and isinstance(value.dtype, np.dtype) else as_array(value, what)


def as_array(value: Any, what: str) -> np.ndarray:
    """A NumPy array of numbers or text.

    Args:
      value: a number, text, array, tensor, DataFrame, Series, or nested lists of these.
      what: names it in messages, such as `input 'image'`.

    Raises:
      InputError: when it is none, is ragged or sparse, or holds something else.
    """
    for found in type(value).__mro__:
        if found.__name__ in _REFUSED:
            raise InputError(f"The {what} is a {found.__name__}; {_REFUSED[found.__name__]}.")
    if type(value).__module__.startswith("scipy.sparse"):
        raise InputError(f"The {what} is a sparse {type(value).__name__}; call toarray() on it.")
    if value is None or isinstance(value, (Mapping, set, frozenset, Iterator)) or callable(value):
        raise InputError(f"The {what} is of type {type(value).__name__}; expected an array.")
    if _is_pandas(value):
        return _from_pandas(value, what)
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError(
            f"The {what} has masked values, which models do not know; replace them with filled()."
        )
    return _checked(_convert(value, what), what)


def _convert(value: Any, what: str) -> np.ndarray:
    try:
        if callable(getattr(value, "numpy", None)):
            value = value.numpy()
        # As an object, since the S dtype drops trailing zero bytes.
        if _holds_text(value):
            return np.asarray(value, object)
        return np.asarray(value)
    except Exception as error:  # whatever a library's __array__ raises
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(
            f"The {what} is a {type(value).__name__} that is no array ({reason}); expected an "
            "array with one row an example, or examples one by one."
        ) from error


def _holds_text(value: Any) -> bool:
    while isinstance(value, (list, tuple)) and value:
        value = value[0]
    return isinstance(value, (bytes, str))


def _checked(array: np.ndarray, what: str) -> np.ndarray:
    kind = array.dtype.kind
    if kind == "T":  # NumPy's strings of any length
        return array.astype(object)
    if kind == "O":
        return _from_objects(array, what)
    if kind in "mM":
        raise InputError(f"The {what} holds dates or times; turn them into numbers.")
    if array.dtype.names is not None or array.dtype.type is np.void:
        raise InputError(f"The {what} is a structured array; pass each field as an array.")
    return array


def _from_objects(array: np.ndarray, what: str) -> np.ndarray:
    """Text as it is; numbers with the dtype that NumPy gives them; arrays of one shape stacked."""
    items = list(array.ravel())
    if all(isinstance(item, (str, bytes)) for item in items):
        return array
    if all(isinstance(item, (bool, int, float, complex, np.number, np.bool_)) for item in items):
        found = np.asarray(items).reshape(array.shape)
        if found.dtype.kind != "O":
            return found
        raise InputError(f"The {what} holds whole numbers beyond 64 bits.")
    if all(isinstance(item, (np.ndarray, list)) for item in items):
        rows = [as_array(item, what) for item in items]
        if len({row.shape for row in rows}) == 1:
            stacked = np.stack(rows)
            return _checked(stacked.reshape(array.shape + stacked.shape[1:]), what)
        raise InputError(
            f"The {what} has rows of unequal shapes; pad them, or yield the examples one by one."
        )
    kinds = sorted({type(item).__name__ for item in items})
    raise InputError(f"The {what} holds {', '.join(kinds)}; expected numbers only, or text only.")


def _is_pandas(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas"


def _from_pandas(value: Any, what: str) -> np.ndarray:
    """Values in the order of rows and columns, whatever the index; missing numbers are NaN."""
    if is_frame(value):
        columns = [
            _from_pandas(value.iloc[:, place], f"column {str(name)!r} of the {what}")
            for place, name in enumerate(value.columns)
        ]
        if not columns:
            return np.zeros((len(value), 0), np.float32)
        texts = [
            str(name)
            for name, column in zip(value.columns, columns, strict=True)
            if column.dtype.kind in "OSU"
        ]
        if texts and len(texts) < len(columns):
            raise InputError(
                f"The {what} is a DataFrame whose columns are numbers and text ({', '.join(texts)})"
                "; a model takes one or the other, so encode the text as numbers or leave it out."
            )
        return np.stack(columns, axis=1)
    dtype = getattr(value, "dtype", None)
    if isinstance(dtype, np.dtype):
        return _checked(np.asarray(value), what)
    if getattr(dtype, "categories", None) is not None and hasattr(value, "cat"):
        value = value.astype(value.cat.categories.dtype) if not value.isna().any() else value
        dtype = value.dtype
    values = value.array if hasattr(value, "array") else value
    is_missing = np.asarray(values.isna())
    if getattr(dtype, "kind", "O") in "biuf":  # pandas's own numbers, which may be missing
        number = (
            dtype.numpy_dtype
            if dtype is not None and hasattr(dtype, "numpy_dtype")
            else np.dtype(float)
        )
        if is_missing.any():
            number = np.result_type(number, np.float32 if number.itemsize < 4 else np.float64)
            return values.to_numpy(dtype=number, na_value=np.nan)
        return values.to_numpy(dtype=number)
    if is_missing.any():
        raise InputError(
            f"The {what} has {int(is_missing.sum())} missing values; fill them, or leave these "
            "examples out."
        )
    return _checked(np.asarray(value, object), what)


def names(values: Iterable[Any]) -> str:
    """Names as a message lists them."""
    return ", ".join(map(str, values)) or "none"
