"""Result files: read with checks, written as a whole or not at all."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from tfopt.compare.text import plain
from tfopt.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 2
FILE_NAME = "results.json"
_TEXTS = frozenset(
    ["model", "variant", "parent", "status", "verdict", "reason", "file", "machine", "baseline"]
)
_REQUIRED = ("model", "variant", "status")
_KINDS = {
    "text": frozenset({str, type(None)}),
    "true or false": frozenset({bool, type(None)}),
    "a number or null": frozenset({int, float, type(None)}),
}


def read(path: Path) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Returns rows and details of a result file; what a row's figures are is for `check`.

    Raises:
      InputError: names the file and the field that is missing, wrong or of another version.
    """
    if not path.is_file():
        raise InputError(f"No results at {path}; expected a {FILE_NAME} that tfopt wrote.")
    try:
        text = path.read_text(encoding="utf-8")
        with _without_collection():
            value = json.loads(text, parse_constant=_refuse_constant)
    except _NotANumberError:
        found = next(_constants(json.loads(text)), "?")
        raise InputError(
            f"{path} holds a number that is none in its field {found}; expected a number or null."
        ) from None
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path} is cut off or no JSON ({error}); write it again with tfopt optimize or "
            "tfopt benchmark."
        ) from error
    if not isinstance(value, dict) or "format" not in value:
        raise InputError(
            f"{path} lacks the field 'format', so tfopt did not write it; expected a {FILE_NAME}."
        )
    if (version := value.pop("format")) != FORMAT:
        raise InputError(
            f"{path} has {version!r} in its field 'format' and this version of tfopt reads "
            f"{FORMAT}; measure again, or read it with the version that wrote it."
        )
    rows = value.pop("rows", None)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} has no list of rows in its field 'rows'; measure again.")
    if not isinstance(value.get("environment", {}), dict):
        raise InputError(f"{path} has no description in its field 'environment'; measure again.")
    return tuple(rows), value


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Holds the garbage collector back, which looks through all rows again and again."""
    is_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_on:
            gc.enable()


def check(path: Path, rows: Sequence[dict[str, Any]], table: pd.DataFrame) -> None:
    """Checks the figures of rows, column by column: files may have a hundred thousand rows.

    Args:
      path: where they come from.
      rows: what they hold besides the table's columns is not checked.
      table: the same rows as a DataFrame, whose dtypes tell that most columns are right.

    Raises:
      InputError: names the file and the field that is missing or wrong.
    """
    for name, column in table.items():
        kind = "text" if name in _TEXTS else "a number or null"
        kind = "true or false" if name == "chosen" else kind
        if kind == "a number or null" and column.dtype.kind in "if" and not np.isinf(column).any():
            continue
        allowed = _KINDS[kind] - ({type(None)} if name in _REQUIRED else set())
        for index, row in enumerate(rows):
            found = row.get(str(name))
            if type(found) not in allowed or (isinstance(found, float) and math.isinf(found)):
                came = "is missing" if found is None else f"is {found!r}"
                raise InputError(f"{path}: rows[{index}].{name} {came}; expected {kind}.")


class _NotANumberError(ValueError):
    pass


def _refuse_constant(text: str) -> float:
    raise _NotANumberError(text)


def _constants(value: Any, where: str = "") -> Any:
    """Yields the places of NaN and infinity, such as `rows[3].median_ms`."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _constants(item, f"{where}.{name}" if where else name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _constants(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        yield where


def write_json(path: Path, rows: Sequence[dict[str, Any]], details: dict[str, Any]) -> None:
    """Writes what `read` reads; figures that are not finite become null."""
    plain_rows = [{name: plain(value) for name, value in row.items()} for row in rows]
    head = json.dumps({"format": FORMAT, **details}, indent=1, allow_nan=False)
    lines = ",\n  ".join(json.dumps(row, allow_nan=False) for row in plain_rows)
    with replacing(path) as file:  # a line a row: quick to read, and to compare with diff
        file.write(f'{head.removesuffix("}").rstrip()},\n "rows": [\n  {lines}\n ]\n}}\n')


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Opens a file that takes its name only once it is complete."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            yield file
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
