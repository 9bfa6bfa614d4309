"""The rows of `every_architecture.py`: judged, kept in a file, printed as a table."""

from __future__ import annotations

import csv
import dataclasses
import pathlib
from collections.abc import Iterable

from architecture_grid import Difference, Made
from architectures import Architecture

MIN_VARIATION = 0.05
MAX_ERROR = 1e-3
OK, WRONG, FAILED, FLAT = "ok", "wrong", "failed", "flat"


@dataclasses.dataclass(frozen=True)
class Row:
    """One network on one runtime; a figure that was not measured is empty.

    Attributes:
      suite: the package that the network comes from.
      family: of the network.
      member: of the family.
      variant: of tfopt; empty when the network could not be made.
      status: ok, wrong (differs by more than rounding), failed, or flat (outputs that hardly
        depend on the inputs, which would prove nothing).
      max_error: as in `architecture_grid.Difference`.
      sqnr_db: likewise.
      variation: as in `architecture_grid.Made`.
      num_parameters: of the Keras model.
      inputs: names and shapes.
      reason: why it is not ok.
    """

    suite: str
    family: str
    member: str
    variant: str
    status: str
    max_error: str = ""
    sqnr_db: str = ""
    variation: str = ""
    num_parameters: str = ""
    inputs: str = ""
    reason: str = ""


def failed(architecture: Architecture, variant: str, reason: str) -> Row:
    """A row for what could not be made, converted or run."""
    return Row(*_names(architecture), variant, FAILED, reason=reason)


def judge(architecture: Architecture, variant: str, made: Made, found: Difference) -> Row:
    """A row for what ran."""
    row = Row(
        *_names(architecture),
        variant,
        OK,
        variation=f"{made.variation:.3g}",
        num_parameters=str(made.num_parameters),
        inputs=made.inputs,
    )
    if found.problem:
        return dataclasses.replace(row, status=WRONG, reason=found.problem)
    row = dataclasses.replace(
        row, max_error=f"{found.max_error:.2g}", sqnr_db=f"{found.sqnr_db:.1f}"
    )
    if not found.max_error <= MAX_ERROR:
        reason = f"The error is {found.max_error:.2g} of the spread, more than {MAX_ERROR:g}."
        return dataclasses.replace(row, status=WRONG, reason=reason)
    if not made.variation >= MIN_VARIATION:
        reason = f"The outputs vary by {made.variation:.2g} of their size only."
        return dataclasses.replace(row, status=FLAT, reason=reason)
    return row


def _names(architecture: Architecture) -> tuple[str, str, str]:
    return architecture.suite, architecture.family, architecture.member


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a file; none when it is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [Row(**values) for values in csv.DictReader(file)]


def append(path: pathlib.Path, row: Row) -> None:
    """Adds a row to a file, which is made when it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Row)])
        if is_new:
            writer.writeheader()
        writer.writerow(dataclasses.asdict(row))


def markdown(rows: Iterable[Row]) -> str:
    """A table with a line for each network and a column for each variant, and reasons below it.

    A cell is the error, or "no" and the number of the reason.
    """
    by_member: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_member.setdefault(row.member, {})[row.variant] = row
    columns = list(dict.fromkeys(name for found in by_member.values() for name in found if name))
    lines = [
        "| Network | " + " | ".join(f"`{column}`" for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    reasons: dict[str, int] = {}
    for member, found in by_member.items():
        cells = [_cell(found.get(column, found.get("")), reasons) for column in columns]
        lines.append(f"| {member} | " + " | ".join(cells) + " |")
    if reasons:
        lines += ["", *(f"{number}. {reason}" for reason, number in reasons.items())]
    return "\n".join(lines)


def _cell(row: Row | None, reasons: dict[str, int]) -> str:
    if row is None:
        return ""
    if row.status == OK:
        return f"{float(row.max_error):.1g}"
    return f"no ({reasons.setdefault(row.reason, len(reasons) + 1)})"
