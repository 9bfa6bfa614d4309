"""Figures as people and files have them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

MEASURED = ("ok", "over_budget")  # statuses of rows with figures
NUM_FIGURES = 5  # last columns of a short table, which are numbers
LOGARITHMIC_FROM = 20  # the ratio of largest and smallest value that a linear axis hides


def quality_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """The figure that says how good answers are: `agreement` where nothing has an `accuracy`."""
    return (
        "accuracy" if any(plain(row.get("accuracy")) is not None for row in rows) else "agreement"
    )


def reasons(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Why rows were not chosen: the variants of each reason."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["status"] != "ok" and row.get("reason"):
            found.setdefault(row["reason"], []).append(row["variant"])
    return found


def plain(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(value: float | None) -> str:
    """Bytes for people: 317 kB."""
    if value is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        # From 999.5 on, three digits would be 1e+03.
        if value < 999.5 or unit == "GB":
            is_whole = unit == "B" or value >= 999.5
            return f"{value:.0f} {unit}" if is_whole else f"{value:.3g} {unit}"
        value /= 1000
    return ""


def interval(row: Mapping[str, Any]) -> str:
    """The speed-up with its interval for people: 2.31 (2.25–2.38)."""
    values = [plain(row.get(name)) for name in ("speedup", "speedup_low", "speedup_high")]
    return "" if None in values else "{:.2f} ({:.2f}–{:.2f})".format(*values)


def figure(value: float | None, form: str) -> str:
    """A number in a format, or nothing where there is none."""
    value = plain(value)
    return "" if value is None else format(value, form)


def align(lines: Sequence[Sequence[str]], num_left: int) -> list[str]:
    """Lines of cells as lines of text: so many columns left-aligned, the rest right-aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if index < num_left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def table_to_text(table: pd.DataFrame, is_markdown: bool = False) -> str:
    """A DataFrame for a terminal or for GitHub; figures with four digits."""
    head = [name.replace("_", " ") for name in table.columns]
    lines = [
        [figure(v, ".4g") if v is None or isinstance(v, float) else str(v) for v in row]
        for row in table.itertuples(index=False)
    ]
    num_left = len(list(itertools.takewhile(lambda dtype: dtype.kind not in "if", table.dtypes)))
    if is_markdown:
        return to_markdown(head, lines, num_left)
    return "\n".join(align([head, *lines], num_left))


def to_markdown(head: Sequence[str], lines: Sequence[Sequence[str]], num_left: int) -> str:
    """A table for GitHub: so many columns left-aligned, the rest right-aligned."""
    rule = [":--" if index < num_left else "--:" for index in range(len(head))]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in (head, rule, *lines)
    )
