"""Columns against what the model takes: shapes and dtypes, adjusted and cast as Keras does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from tfopt.errors import InputError
from tfopt.examples import is_input_column
from tfopt.signature import Signature, TensorSpec

Chunk = dict[str, np.ndarray]  # columns by name, those of labels among them


def fits(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in which a batch of this shape can be fed, or None.

    Like Keras this adds a last dimension of 1 where the model has one, and removes one.
    """
    if spec.shape is None:
        return shape
    want = (None, *spec.shape[1:])
    candidates = [shape]
    if len(want) > 1 and want[-1] == 1:
        candidates.append((*shape, 1))
    if shape[-1:] == (1,):
        candidates.append(shape[:-1])
    for found in candidates:
        if len(found) == len(want) and all(
            w is None or w == size for w, size in zip(want, found, strict=True)
        ):
            return found
    return None


def is_batch(spec: TensorSpec, shape: tuple[int, ...]) -> bool:
    """Whether an array of a stream is a batch of examples, and not one example."""
    assert spec.shape is not None
    one = (1, *shape)
    if len(shape) == len(spec.shape) and fits(spec, shape) == shape:
        return True
    if fits(spec, one) == one:
        return False
    return fits(spec, shape) is not None or (
        fits(spec, one) is None and len(shape) == len(spec.shape)
    )


@dataclasses.dataclass
class _NonFinite:
    """How many values of an input are no numbers."""

    nan: int = 0
    infinite: int = 0
    examples: int = 0


class Fitter:
    """Checks columns against the signature, casts them, and counts values that are not finite.

    Float64 becomes float32 and whole numbers become floats, rounded as in `fit` and `predict`.
    Casts that lose more are refused: fractions, and values beyond the range of the dtype.
    """

    def __init__(self, signature: Signature):
        self._specs = {spec.name: spec for spec in signature.inputs}
        self._casts: dict[str, str] = {}
        self._non_finite: dict[str, _NonFinite] = {}
        self._num_examples = 0

    def __call__(self, chunk: Mapping[str, np.ndarray]) -> tuple[Chunk, np.ndarray]:
        """Columns as they are kept, and which examples have finite inputs only.

        Raises:
          InputError: when shapes or dtypes do not fit.
        """
        count = len(next(iter(chunk.values())))
        self._num_examples += count
        found, is_finite = {}, np.ones(count, bool)
        for name, array in chunk.items():
            if is_input_column(name):
                array = self._fit(self._specs[name], array)
                is_finite &= self._count(name, array)
            found[name] = array
        return found, is_finite

    def notes(self) -> list[str]:
        """What was cast and what is not finite, one sentence each."""
        return [f"{name} was cast from {cast}." for name, cast in self._casts.items()] + [
            f"Input {name!r} has {found.nan} NaN and {found.infinite} infinite values, in "
            f"{found.examples} of {self._num_examples} examples."
            for name, found in self._non_finite.items()
        ]

    def _count(self, name: str, array: np.ndarray) -> np.ndarray:
        is_finite = finite_examples(array)
        if not is_finite.all():
            others = array[~is_finite]
            found = self._non_finite.setdefault(name, _NonFinite())
            found.nan += int(np.isnan(others).sum())
            found.infinite += int(np.isinf(others).sum())
            found.examples += len(others)
        return is_finite

    def _fit(self, spec: TensorSpec, array: np.ndarray) -> np.ndarray:
        shape = fits(spec, array.shape)
        if shape is None:
            want = ", ".join("?" if d is None else str(d) for d in (spec.shape or ())[1:])
            raise InputError(
                f"Data for input {spec.name!r} has examples of shape {array.shape[1:]}; the "
                f"model takes ({want}); reshape the data."
            )
        array = array.reshape(shape)
        is_string = array.dtype.kind in "OSU"
        if is_string or spec.dtype == "string":
            if is_string and spec.dtype == "string":
                return array
            raise InputError(
                f"Data for input {spec.name!r} is {_dtype_name(array)}; the model takes "
                f"{spec.dtype}; pass {'text' if spec.dtype == 'string' else 'numbers'}."
            )
        dtype = np.dtype(spec.dtype)
        if array.dtype == dtype:
            return array
        # NumPy calls int64 to float64 safe too, although large values are rounded.
        if array.itemsize < dtype.itemsize and np.can_cast(array.dtype, dtype, "safe"):
            self._casts[spec.name] = f"{array.dtype} to {dtype}"
            return array  # kept small on disk; cast when it is read
        with np.errstate(all="ignore"):
            is_lost = array.dtype.kind == "c" and dtype.kind != "c"
            cast = None if is_lost else array.astype(dtype)
        if cast is None or not _keeps_meaning(array, cast):
            raise InputError(
                f"Data for input {spec.name!r} is {array.dtype}; the model takes {spec.dtype}, "
                f"which cannot hold every value; save the data as {spec.dtype}."
            )
        self._casts[spec.name] = f"{array.dtype} to {dtype}"
        return cast


def finite_examples(array: np.ndarray) -> np.ndarray:
    """Which examples, along the first dimension, hold no NaN and no infinity."""
    if not _is_float(array.dtype):
        return np.ones(len(array), bool)
    return np.isfinite(array).reshape(len(array), -1).all(1)


def _dtype_name(array: np.ndarray) -> str:
    return "text" if array.dtype.kind == "O" else str(array.dtype)


def _is_float(dtype: np.dtype) -> bool:
    return dtype.kind in "fc" or (dtype.kind == "V" and dtype.names is None)


def _keeps_meaning(array: np.ndarray, cast: np.ndarray) -> bool:
    """Whether a cast only rounded, as Keras does: floats stay in range, other dtypes stay equal."""
    if not _is_float(cast.dtype):
        return _is_same(array, cast)
    with np.errstate(all="ignore"):
        was_finite = np.isfinite(array) if _is_float(array.dtype) else True
        return bool((np.isfinite(cast) | ~np.asarray(was_finite)).all())


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
