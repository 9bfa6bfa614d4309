"""Does every known architecture come through every runtime as the model that Keras computes?

One network of each family of keras.applications at 96 pixels, and tiny configurations of KerasHub's
image and text backbones where KerasHub is installed (`pip install keras-hub==0.32.*`), with random
weights. Each goes in float32 through every runtime that is installed here, is run on 16 examples at
once and on one alone, and is compared with Keras's own `predict`. Families are found by looking
into the packages, so that new ones are tried, too.

    python scripts/benchmarks/every_architecture.py --output=every_architecture.csv

It takes about an hour on two cores. A network that takes more than 8 GiB counts as failed. Started
again with the same file it goes on with what is missing there. Exit status 1 when something failed
or differs.

The error is the largest absolute one in units of the spread: the root mean square of the outputs'
deviation from their mean over the examples. A network whose outputs hardly depend on its inputs
would prove nothing, and is reported as flat.
"""

import importlib.util
import os
import pathlib
import sys
import tempfile
import time

import architecture_grid
import architecture_rows
import architectures
import reporting
from absl import flags
from architectures import Architecture

from tfopt.errors import ConversionError, InputError
from tfopt.isolation import Limits, Worker

_OUTPUT = flags.DEFINE_string(
    "output", None, "A .csv file; what stands there already is not tried again.", required=True
)
_ALL = flags.DEFINE_bool("all", False, "Every member of each family of keras.applications.")
_ONLY = flags.DEFINE_list(
    "only", [], "Suites, families or members; by default all but the suite stand_ins."
)
_TIMEOUT_S = flags.DEFINE_float("step_timeout_s", 900.0, "For one conversion or run.")
_MEMORY_BYTES = 8 << 30


def main(_: list[str]) -> None:
    """Tries what is not in the file yet, and prints the table."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    chosen = _chosen()
    output = pathlib.Path(_OUTPUT.value)
    variants = list(map(str, architecture_grid.variants()))
    done = {(row.suite, row.member, row.variant) for row in architecture_rows.read(output)}
    missing = {}
    for one in chosen:
        left = [name for name in variants if (one.suite, one.member, name) not in done]
        if left and (one.suite, one.member, "") not in done:
            missing[one] = left
    begin = time.monotonic()
    for place, (one, left) in enumerate(missing.items()):
        seconds = (time.monotonic() - begin) / place * (len(missing) - place) if place else 0
        estimate = f", about {seconds / 60:.0f} minutes left" if place else ""
        print(f"{place + 1} of {len(missing)}: {one}{estimate}", flush=True)
        _try(one, left, output)
    wanted = {(one.suite, one.member) for one in chosen}
    rows = [row for row in architecture_rows.read(output) if (row.suite, row.member) in wanted]
    print(f"\n{architecture_rows.markdown(rows)}")
    sys.exit(any(row.status != architecture_rows.OK for row in rows))


def _chosen() -> list[Architecture]:
    found = architectures.applications(_ALL.value)
    if importlib.util.find_spec("keras_hub") is None:
        print("KerasHub is not installed; its backbones are left out.")
    else:
        import hub_backbones

        found += architectures.hub_backbones()
        if left_out := hub_backbones.left_out():
            print(f"Backbones without a configuration here: {', '.join(left_out)}.")
    wanted = set(_ONLY.value)
    if not wanted:
        return found
    found += architectures.stand_ins()
    names = {one: {one.suite, one.family, one.member} for one in found}
    if unknown := wanted.difference(*names.values()):
        known = ", ".join(sorted(set().union(*names.values())))
        raise SystemExit(f"--only names {', '.join(sorted(unknown))}; expected some of {known}.")
    return [one for one in found if wanted & names[one]]


def _try(one: Architecture, variants: list[str], output: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory(prefix="tfopt-") as work:
        folder = pathlib.Path(work)
        limits = Limits(_TIMEOUT_S.value, _MEMORY_BYTES)
        with Worker(folder / "log", limits, keeps_log=False) as worker:
            try:
                made = worker.call("architecture_grid:make", one, folder / "made")
            except (ConversionError, InputError) as error:
                _add(output, architecture_rows.failed(one, "", str(error)))
                return
            for variant in variants:
                try:
                    found = worker.call(
                        "architecture_grid:convert_and_compare",
                        made.source,
                        variant,
                        folder / "made",
                    )
                except (ConversionError, InputError) as error:
                    row = architecture_rows.failed(one, variant, str(error))
                else:
                    row = architecture_rows.judge(one, variant, made, found)
                _add(output, row)


def _add(output: pathlib.Path, row: architecture_rows.Row) -> None:
    architecture_rows.append(output, row)
    print(f"  {row.variant}: {row.status} {row.max_error} {row.reason}", flush=True)


if __name__ == "__main__":
    reporting.run_app(main)
