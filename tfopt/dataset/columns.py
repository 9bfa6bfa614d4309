"""Inputs and labels as `fit` takes them, in any structure: columns by name out.

A column of an input has the input's name. Labels are one column where they are not said to belong
to a certain output, else one column for each output.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from tfopt.dataset.arrays import as_column, is_array, is_frame, names
from tfopt.dataset.casting import fits
from tfopt.errors import InputError
from tfopt.examples import label_column, weight_column
from tfopt.signature import Signature, TensorSpec, in_order

MAX_MATCHED = 6  # inputs that are told apart by their shapes: so many have 720 orders
WEIGHTS = "sample_weight"

_KINDS = {"labels": label_column, "weights": weight_column}


@dataclasses.dataclass(frozen=True)
class Part:
    """Arrays of the same examples.

    Attributes:
      columns: inputs, labels and weights.
      used: the names that they had, where they had names.
    """

    columns: dict[str, Any]
    used: frozenset[str] = frozenset()


def from_parts(parts: Sequence[Any], signature: Signature, *, is_element: bool = False) -> Part:
    """Columns of `x`, `(x, y)` or `(x, y, sample_weight)`.

    Args:
      parts: one to three; labels and weights may be None.
      signature: of the model.
      is_element: whether they are one element of a stream.

    Raises:
      InputError: when a name, a number of arrays or a type does not fit.
    """
    x, y, weights = (*parts, None, None)[:3]
    columns = _inputs(x, signature, is_element)
    for value, kind in ((y, "labels"), (weights, "weights")):
        if value is not None:
            columns.update(_by_output(value, signature, kind))
    return Part(columns)


def from_mapping(
    data: Mapping[str, Any], signature: Signature, suffix: str = "", *, is_element: bool = False
) -> Part:
    """Columns of arrays by name: inputs, labels `y` or by output, and `sample_weight`.

    Args:
      data: arrays named like inputs and outputs of the model; `x` is a single input, or holds all.
      signature: of the model.
      suffix: of the names, such as `_train`.
      is_element: whether it is one element of a stream, where other names are refused.

    Raises:
      InputError: when inputs are missing, or labels contradict each other.
    """
    given = {str(key).removesuffix(suffix): key for key in data if str(key).endswith(suffix)}
    inputs = {name: found for name in given if (found := signature.input_called(name))}
    columns: dict[str, Any] = {}
    if not inputs and "x" in given and _is_all(data[given["x"]], signature):
        inputs = {"x": "x"}
        columns = _inputs(data[given["x"]], signature, is_element)
    else:
        for name, found in inputs.items():
            columns[found] = as_column(data[given[name]], f"input {name!r}")
    outputs = {
        name: found
        for name in given
        if name not in inputs and (found := signature.output_called(name))
    }
    single = [name for name in ("y", WEIGHTS) if name in given and name not in {*inputs, *outputs}]
    if "y" in single and outputs:
        if len(signature.outputs) > 1:
            raise InputError(
                f"The data has labels y{suffix} and labels of {names(outputs)}; name all of them "
                "after outputs."
            )
        outputs = {}
    used = [*inputs, *outputs, *single]
    if set(signature.input_names) - set(columns) or (is_element and len(used) < len(given)):
        raise _wrong_names(list(data.keys()), signature, suffix, is_element)
    if outputs:
        labels = {name: data[given[name]] for name in outputs}
        columns.update(_by_output(labels, signature, "labels"))
    for name in single:
        kind = "labels" if name == "y" else "weights"
        columns.update(_by_output(data[given[name]], signature, kind))
    return Part(columns, frozenset(str(given[name]) for name in used))


def _is_all(x: Any, signature: Signature) -> bool:
    """Whether something can hold all inputs of the model."""
    return len(signature.inputs) == 1 or is_frame(x) or not is_array(x)


def _wrong_names(
    given: Sequence[Any], signature: Signature, suffix: str, is_element: bool
) -> InputError:
    inputs, listed = names(signature.input_names), names(sorted(map(str, given)))
    if is_element:
        return InputError(
            f"The data yields {listed}; the model's inputs are {inputs}; use their names."
        )
    hint = " or 'x'" if len(signature.inputs) == 1 else ""
    return InputError(
        f"The data has arrays {listed}; the model's inputs are {inputs}; name the arrays after "
        f"them{hint}{' with ' + suffix if suffix else ''}."
    )


def _inputs(x: Any, signature: Signature, is_element: bool) -> dict[str, Any]:
    specs = signature.inputs
    if isinstance(x, Mapping):
        only_inputs = dataclasses.replace(signature, outputs=())
        found = from_mapping(x, only_inputs, is_element=is_element).columns
        return {name: column for name, column in found.items() if name in signature.input_names}
    if is_frame(x) and (len(specs) > 1 or _names_only(x, signature)):
        return _inputs_of_frame(x, signature)
    if len(specs) == 1:
        spec = specs[0]
        if isinstance(x, (list, tuple)) and len(x) == 1 and is_array(x[0]):
            only = as_column(x[0], f"input {spec.name!r}")  # as Keras takes a list of one input
            if spec.shape is not None and len(only.shape) == len(spec.shape):
                return {spec.name: only}
        column = as_column(x, f"input {spec.name!r}")
        if is_frame(x) and spec.shape is not None and fits(spec, column.shape) is None:
            raise InputError(
                f"The DataFrame has columns {names(x.columns)}, {column.shape[1]} in all, and "
                f"input {spec.name!r} takes examples of shape {tuple(spec.shape[1:])}; pass the "
                "columns of the input only, and labels apart: (x, y)."
            )
        return {spec.name: column}
    if isinstance(x, (list, tuple)):
        return _inputs_of_list(x, signature)
    raise InputError(
        f"The data is a single {type(x).__name__}; the model has several inputs "
        f"({names(signature.input_names)}); pass a dict with their names."
    )


def _names_only(frame: Any, signature: Signature) -> bool:
    return [signature.input_called(str(name)) for name in frame.columns] == [
        signature.inputs[0].name
    ]


def _inputs_of_frame(frame: Any, signature: Signature) -> dict[str, Any]:
    """One input a column, by name."""
    found = {signature.input_called(str(name)): name for name in frame.columns}
    if None in found or len(found) < max(len(frame.columns), len(signature.inputs)):
        raise InputError(
            f"The DataFrame has columns {names(frame.columns)}; the model's inputs are "
            f"{names(signature.input_names)}; pass exactly these columns, and labels apart: (x, y)."
        )
    return {
        name: as_column(frame[column], f"input {name!r}")
        for name, column in found.items()
        if name is not None
    }


def _inputs_of_list(x: Sequence[Any], signature: Signature) -> dict[str, Any]:
    specs = signature.inputs
    if len(x) != len(specs):
        raise InputError(
            f"The data is a list of {len(x)} and the model has {len(specs)} inputs "
            f"({names(signature.input_names)}); pass one array for each, or a dict."
        )
    arrays = [as_column(value, f"input number {place}") for place, value in enumerate(x, 1)]
    order = in_order(specs) or _order_by_shape(arrays, specs)
    if order is None:
        raise InputError(
            f"The data is a list, and in which order the model takes {names(signature.input_names)}"
            " is not recorded in it; pass a dict with these names."
        )
    return dict(zip(order, arrays, strict=True))


def _order_by_shape(arrays: Sequence[Any], specs: Sequence[TensorSpec]) -> list[str] | None:
    """The only order in which shapes and kinds fit; None where there is none or another."""
    if len(specs) > MAX_MATCHED:
        return None
    orders = [
        order for order in itertools.permutations(specs) if all(map(_could_be, arrays, order))
    ]
    return [spec.name for spec in orders[0]] if len(orders) == 1 else None


def _could_be(array: Any, spec: TensorSpec) -> bool:
    if (array.dtype.kind in "OSU") != (spec.dtype == "string"):
        return False
    if array.dtype.kind == "f" and spec.dtype.startswith(("int", "uint", "bool")):
        return False
    return any(fits(spec, shape) is not None for shape in (array.shape, (1, *array.shape)))


def _by_output(y: Any, signature: Signature, kind: str) -> dict[str, Any]:
    """Columns of labels or weights: one for all, or one for each output that has some."""
    outputs, column_of = signature.outputs, _KINDS[kind]
    if isinstance(y, Mapping):
        return _of_named_outputs(y, signature, kind)
    if len(outputs) > 1:
        if is_frame(y) and all(signature.output_called(str(name)) for name in y.columns):
            return _of_named_outputs({name: y[name] for name in y.columns}, signature, kind)
        is_list = isinstance(y, tuple) or (
            isinstance(y, list) and all(each is None or is_array(each) for each in y)
        )
        if is_list and len(y) == len(outputs):
            order = in_order(outputs)
            if order is None:
                raise InputError(
                    f"The {kind} are a list, and the order of the outputs "
                    f"{names(signature.output_names)} is not recorded in the model; pass a dict "
                    "with these names."
                )
            return _of_named_outputs(dict(zip(order, y, strict=True)), signature, kind)
    elif isinstance(y, (list, tuple)) and len(y) == 1 and is_array(y[0]):
        y = y[0]  # as Keras takes a list of one output
    return {column_of(): as_column(y, f"column of {kind}")}


def _of_named_outputs(y: Mapping[Any, Any], signature: Signature, kind: str) -> dict[str, Any]:
    outputs, column_of = signature.outputs, _KINDS[kind]
    given = {str(name): value for name, value in y.items() if value is not None}
    if len(outputs) <= 1:
        if len(given) != 1:
            raise InputError(
                f"The data has {kind} for {names(given)}; the model has one output, so pass its "
                f"{kind} alone."
            )
        return {column_of(): as_column(next(iter(given.values())), f"column of {kind}")}
    found = {name: signature.output_called(name) for name in given}
    if None in found.values() or len(set(found.values())) < len(given):
        known = [
            spec.name + (f" (or {' or '.join(spec.aliases)})" if spec.aliases else "")
            for spec in outputs
        ]
        raise InputError(
            f"The data has {kind} for {names(given)}; the model's outputs are {names(known)}; use "
            "their names."
        )
    return {
        column_of(found[name]): as_column(value, f"column of {kind} of {name!r}")
        for name, value in given.items()
    }
