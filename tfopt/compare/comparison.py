"""A table of variants, one row each, with everything behind it."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tfopt.compare import report
from tfopt.compare.text import interval, plain, size
from tfopt.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "model", "variant", "parent", "batch_size", "num_threads", "status", "chosen", "median_ms",
    "p90_ms", "p99_ms", "speedup", "speedup_low", "speedup_high", "verdict", "cold_start_ms",
    "throughput_per_s", "size_bytes", "compressed_bytes", "peak_memory_bytes", "accuracy",
    "accuracy_drop", "accuracy_drop_high", "agreement", "max_abs_error", "reason",
)  # fmt: skip
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Rows of measured variants.

    Attributes:
      rows: dictionaries with keys out of `COLUMNS`; a figure that was not measured is missing or
        None, never 0.
      details: source, data, budget, environment, baseline and choice.
    """

    rows: tuple[dict[str, Any], ...]
    details: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_files(cls, paths: Sequence[str | Path]) -> Comparison:
        """Reads one or more `results.json` (or folders that hold one) into one table.

        Raises:
          InputError: when a file is missing, is no result of tfopt, or when the machines differ.
        """
        if not paths:
            raise InputError("No results to compare; give at least one results.json.")
        found = [_read(Path(path)) for path in paths]
        machines = {item.details.get("environment", {}).get("cpu") for item in found}
        if len(machines) > 1:
            names = ", ".join(sorted(map(str, machines)))
            raise InputError(
                f"The results come from different machines ({names}), so that their times cannot "
                "be compared; measure both on one."
            )
        details = found[0].details
        if len(found) > 1:
            details = {
                "files": [str(path) for path in paths],
                "environment": {"cpu": next(iter(machines))},
            }
        return cls(tuple(row for item in found for row in item.rows), details)

    @property
    def table(self) -> pd.DataFrame:
        """A DataFrame with the columns of `results.csv`; figures that are missing are NaN."""
        import pandas as pd

        return pd.DataFrame([{name: row.get(name) for name in COLUMNS} for row in self.rows],
                            columns=list(COLUMNS))  # fmt: skip

    @property
    def summary(self) -> str:
        """What was chosen and why."""
        return self.details.get("summary", "")

    def relative_to(self, variant: str) -> pd.DataFrame:
        """The table with a column `ratio`: the median of `variant` over each row's, by model.

        The medians of one search come from runs at different times: `speedup` is the figure with
        an interval. This is for looking at it from another side.

        Raises:
          InputError: when no model has that variant with a median.
        """
        table = self.table
        reference = table[(table.variant == variant) & table.median_ms.notna()]
        if reference.empty:
            names = ", ".join(table.variant[table.median_ms.notna()].unique())
            raise InputError(f"No measured variant {variant!r}; there are: {names}.")
        by_model = reference.groupby(["model", "batch_size"]).median_ms.median().rename("reference")
        joined = table.join(by_model, on=["model", "batch_size"])
        table["ratio"] = joined.reference / table.median_ms
        return table

    def save(self, folder: str | Path) -> None:
        """Writes `results.csv`, `results.json` and `report.html`; each appears as a whole."""
        folder = Path(folder)
        rows = [[_cell(row.get(name)) for name in COLUMNS] for row in self.rows]
        with _replace(folder / "results.csv") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])
        self.save_json(folder / "results.json")
        with _replace(folder / "report.html") as file:
            file.write(report.to_html(self))

    def save_json(self, path: str | Path) -> None:
        """Writes the one file that `from_files` reads."""
        rows = [{name: plain(value) for name, value in row.items()} for row in self.rows]
        value = {"format": FORMAT, **self.details, "rows": rows}
        with _replace(Path(path)) as file:
            file.write(json.dumps(value, indent=1, allow_nan=False) + "\n")

    def to_text(self) -> str:
        """A table for a terminal: the columns that a choice is made by."""
        lines = [["variant", "status", "median ms", "speed-up", "accuracy", "drop ≤", "size"]]
        for row in self.rows:
            lines.append([
                ("* " if row.get("chosen") else "  ") + row["variant"],
                row["status"],
                _number(row.get("median_ms"), "{:.3f}"),
                interval(row),
                _number(row.get("accuracy"), "{:.4f}"),
                _number(row.get("accuracy_drop_high"), "{:.4f}"),
                size(row.get("size_bytes")),
            ])  # fmt: skip
        widths = [max(len(line[index]) for line in lines) for index in range(len(lines[0]))]
        text = [
            "  ".join(
                cell.ljust(width) if index < 2 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        ]
        text.insert(1, "-" * max(map(len, text)))
        reasons = [
            f"  {row['variant']}: {row['reason']}"
            for row in self.rows
            if row["status"] != "ok" and row.get("reason")
        ]
        return "\n".join([*text, *(["", "Not chosen because:", *reasons] if reasons else [])])


def _read(path: Path) -> Comparison:
    if path.is_dir():
        path = path / "results.json"
    if not path.is_file():
        raise InputError(f"No results at {path}; expected a results.json that tfopt wrote.")
    try:
        value = json.loads(path.read_text())
        rows = tuple({**row} for row in value.pop("rows"))
        if value.pop("format") != FORMAT:
            raise KeyError("format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is no results.json of this version of tfopt.") from error
    return Comparison(rows, value)


class _replace:  # noqa: N801
    """Opens a file that takes its name only once it is complete."""

    def __init__(self, path: Path):
        self._path = path
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}")

    def __enter__(self) -> TextIO:
        self._file = self._unfinished.open("w", encoding="utf-8", newline="")
        return self._file

    def __exit__(self, kind: object, *error: object) -> None:
        self._file.close()
        if kind is None:
            self._unfinished.replace(self._path)
        else:
            self._unfinished.unlink()


def _cell(value: Any) -> Any:
    value = plain(value)
    return "" if value is None else value


def _number(value: float | None, form: str) -> str:
    value = plain(value)
    return "" if value is None else form.format(value)
