"""Does every known architecture come through every runtime as the model that Keras computes?

One network of each family of keras.applications, and tiny configurations of KerasHub's backbones
where KerasHub is installed (`pip install keras-hub==0.32.*`), with random weights. Each goes in
float32 through every runtime that is installed here, is run on four examples at once and on one
alone, and is compared with Keras's own `predict`. Families are found by looking into the packages,
so that new ones are tried, too.

    python scripts/benchmarks/every_architecture.py --output=every_architecture.csv

It takes about an hour on two cores and at most 8 GB of memory. Started again with the same file it
goes on with what is missing there. Exit status 1 when a network fails or differs.

The error is the largest absolute one in units of the spread: the root mean square of the outputs'
deviation from their mean over the examples. A network whose outputs hardly depend on its inputs
would prove nothing, and is reported as such.
"""

import csv
import dataclasses
import importlib.util
import math
import os
import pathlib
import shutil
import sys
import tempfile
import time

import architectures
import reporting
from absl import flags
from architecture_grid import MAX_ERROR, MIN_VARIATION, Difference, Made
from architectures import Architecture

from tfopt import runtimes
from tfopt.errors import ConversionError
from tfopt.isolation import Limits, Worker
from tfopt.variant import Variant

_OUTPUT = flags.DEFINE_string(
    "output", None, "A .csv file; what stands there already is not tried again.", required=True
)
_ALL = flags.DEFINE_bool("all", False, "Every member of each family of keras.applications.")
_ONLY = flags.DEFINE_list("only", [], "Families or members; by default all.")
_LIST = flags.DEFINE_bool("list", False, "Print what would be tried, and end.")
_TIMEOUT_S = flags.DEFINE_float("step_timeout_s", 900.0, "For one conversion or run.")
_MEMORY_BYTES = 8 << 30
_OK, _WRONG, _FAILED, _FLAT = "ok", "wrong", "failed", "flat"


@dataclasses.dataclass(frozen=True)
class Row:
    """One network on one runtime; a figure that was not measured is empty.

    Attributes:
      suite: the package that the network comes from.
      family: of the network.
      member: of the family.
      variant: of tfopt.
      status: ok, wrong (differs by more than rounding), failed, or flat (outputs that hardly
        depend on the inputs).
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


def main(_: list[str]) -> None:
    """Tries what is not in the file yet, and prints the table."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    chosen = _chosen()
    if _LIST.value:
        print("\n".join(map(str, chosen)))
        return
    output = pathlib.Path(_OUTPUT.value)
    done = _read(output)
    missing = [one for one in chosen if (one.suite, one.member) not in done]
    begin = time.monotonic()
    for place, architecture in enumerate(missing):
        left = ""
        if place:
            left = f", about {(time.monotonic() - begin) / place * (len(missing) - place) / 60:.0f} minutes left"
        print(f"{place + 1} of {len(missing)}: {architecture}{left}", flush=True)
        rows = _try(architecture)
        _append(output, rows)
        done[architecture.suite, architecture.member] = rows
        for row in rows:
            print(f"  {row.variant}: {row.status} {row.max_error} {row.reason}", flush=True)
    rows = [row for one in chosen for row in done[one.suite, one.member]]
    print(f"\n{markdown(rows)}")
    sys.exit(any(row.status != _OK for row in rows))


def _chosen() -> list[Architecture]:
    found = architectures.applications(_ALL.value)
    if importlib.util.find_spec("keras_hub") is None:
        print("KerasHub is not installed; its backbones are left out.")
    else:
        found += architectures.hub_backbones()
    wanted = set(_ONLY.value)
    unknown = wanted - {name for one in found for name in (one.family, one.member)}
    if unknown:
        raise flags.IllegalFlagValueError(
            f"--only={','.join(sorted(unknown))} is no family and no member; --list prints them."
        )
    return [one for one in found if not wanted or wanted & {one.family, one.member}]


def variants() -> list[Variant]:
    """float32 on the runtimes that are installed, in each way that a search tries."""
    return [
        variant
        for variant in runtimes.tried_variants()
        if variant.precision == "float32" and runtimes.get(variant.runtime).missing() is None
    ]


def _try(architecture: Architecture) -> list[Row]:
    common = (architecture.suite, architecture.family, architecture.member)
    work = pathlib.Path(tempfile.mkdtemp(prefix="tfopt-"))
    rows = []
    try:
        limits = Limits(_TIMEOUT_S.value, _MEMORY_BYTES)
        with Worker(work / "log", limits, keeps_log=False) as worker:
            try:
                made: Made = worker.call("architecture_grid:make", architecture, work / "made")
            except Exception as error:
                return [Row(*common, "", _FAILED, reason=str(error))]
            facts = {
                "variation": f"{made.variation:.3g}",
                "num_parameters": str(made.num_parameters),
                "inputs": made.inputs,
            }
            for variant in variants():
                folder = work / variant.slug
                try:
                    worker.call(
                        "tfopt.search.steps:convert", made.source, variant, folder, None, None, 1
                    )
                    found: Difference = worker.call(
                        "architecture_grid:compare", folder, work / "made"
                    )
                except ConversionError as error:
                    row = Row(*common, str(variant), _FAILED, reason=str(error), **facts)
                else:
                    row = _judged(Row(*common, str(variant), _OK, **facts), made, found)
                rows.append(row)
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return rows


def _judged(row: Row, made: Made, found: Difference) -> Row:
    if found.problem:
        return dataclasses.replace(row, status=_WRONG, reason=found.problem)
    row = dataclasses.replace(
        row, max_error=f"{found.max_error:.2g}", sqnr_db=f"{found.sqnr_db:.1f}"
    )
    if not found.max_error <= MAX_ERROR:
        reason = f"The error is {found.max_error:.2g} of the spread, more than {MAX_ERROR:g}."
        return dataclasses.replace(row, status=_WRONG, reason=reason)
    if not made.variation >= MIN_VARIATION:
        reason = f"The outputs vary by {made.variation:.2g} of their size only."
        return dataclasses.replace(row, status=_FLAT, reason=reason)
    return row


def _read(path: pathlib.Path) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for values in csv.DictReader(file):
                row = Row(**values)
                found.setdefault((row.suite, row.member), []).append(row)
    return found


def _append(path: pathlib.Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    names = [field.name for field in dataclasses.fields(Row)]
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        if is_new:
            writer.writeheader()
        writer.writerows(map(dataclasses.asdict, rows))


def markdown(rows: list[Row]) -> str:
    """A table with a line for each network and a column for each variant."""
    columns = list(dict.fromkeys(row.variant for row in rows if row.variant))
    lines = [
        "| Network | " + " | ".join(f"`{column}`" for column in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    by_member: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_member.setdefault(row.member, {})[row.variant] = row
    for member, found in by_member.items():
        cells = [_cell(found.get(column, found.get(""))) for column in columns]
        lines.append(f"| {member} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    figure = "" if row.max_error in ("", "nan") else f"{float(row.max_error):.1g}"
    figure = "0" if figure and math.isclose(float(figure), 0) else figure
    return figure if row.status == _OK else f"{row.status} {figure}".strip()


if __name__ == "__main__":
    reporting.run_app(main)
