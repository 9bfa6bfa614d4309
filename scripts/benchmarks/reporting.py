"""What every benchmark prints and writes."""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags

from tfopt.measure import environment


def define_output() -> flags.FlagHolder[str]:
    """Defines --output, a new file for the results."""
    holder = flags.DEFINE_string("output", None, "New .json file for the results.", required=True)
    flags.register_validator(
        "output",
        lambda path: path is None or not pathlib.Path(path).exists(),
        message="--output exists already; nothing was overwritten, name another file.",
    )
    return holder


def format_table(rows: Sequence[Sequence[object]]) -> str:
    """Returns rows, the first of them the header, as text; all but the first column right."""
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in texts
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def save(path: str, values: dict[str, Any]) -> None:
    """Writes the results with a description of the machine."""
    file = pathlib.Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    values = {**values, "environment": environment.describe()}
    file.write_text(json.dumps(values, indent=1) + "\n")
    print(f"\nThe results are in {path}.")


def met(is_met: bool) -> str:
    """Returns the word for a target."""
    return "met" if is_met else "MISSED"


def run_app(main: Callable) -> None:
    """Runs absl's app; --help ends with 0."""
    try:
        app.run(main)
    except SystemExit as end:
        is_help = any(argument in ("--help", "-h", "--helpfull") for argument in sys.argv[1:])
        sys.exit(0 if is_help else end.code)
