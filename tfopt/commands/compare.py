"""Show results of several searches or benchmarks in one table, and find what became slower.

For example: tfopt compare before/results.json after/results.json --baseline=float32@litert
In CI: tfopt compare new.json --against=old.json --fail_if_slower=0.05
Exit status 3 when a variant is slower by more than that, as far as the intervals tell: it is the
speed-ups over the same baseline, timed in turns with it, that are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from tfopt.errors import InputError

TAKES_FILES = True
TOLERATED = 0.05


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    flags.DEFINE_string(
        "baseline", None, "Variant whose median the others are divided into.", flag_values=values
    )
    flags.DEFINE_string("against", None, "Results from before.", flag_values=values)
    flags.DEFINE_float(
        "fail_if_slower",
        None,
        "Share of the speed that may be lost before the exit status is 3; needs --against.",
        flag_values=values,
    )
    flags.DEFINE_bool(
        "absolute",
        False,
        "With --against, compare median times instead of speed-ups; on the same machine only.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "mixed",
        [],
        "What may differ between the results: machines, batch_sizes, baselines.",
        flag_values=values,
    )
    flags.DEFINE_bool("markdown", False, "Print tables for GitHub.", flag_values=values)
    flags.DEFINE_string(
        "tensorboard", None, "Log folder to write the results into, too.", flag_values=values
    )


def run(values: flags.FlagValues, files: Sequence[str] = ()) -> int:
    """Runs the command."""
    for name in ("fail_if_slower", "absolute"):
        if values[name].value not in (None, False) and values.against is None:
            raise InputError(f"--{name} needs results to compare with; give --against=FILE.json.")
    from tfopt.commands import DONE, REGRESSION
    from tfopt.compare.comparison import Comparison
    from tfopt.compare.text import table_to_text

    comparison = Comparison.from_files(files, values.mixed)
    runs = comparison.to_tensorboard(values.tensorboard) if values.tensorboard else []
    print(comparison.to_markdown() if values.markdown else comparison.to_text())
    if runs:
        print(f"\n{len(runs)} runs are in {values.tensorboard}, for tensorboard --logdir.")
    if values.baseline is not None:
        table = comparison.relative_to(values.baseline)
        shown = table[table.ratio.notna()][["model", "variant", "median_ms", "ratio"]]
        print(f"\nTimes as fast as {values.baseline}:")
        shown = shown.sort_values("ratio", ascending=False)
        print(table_to_text(shown, values.markdown))
    if values.against is None:
        return DONE
    before = Comparison.from_files([values.against], values.mixed)
    tolerated = TOLERATED if values.fail_if_slower is None else values.fail_if_slower
    found = comparison.regressions(before, tolerated, values.absolute, values.mixed)
    what = "median times" if values.absolute else "speed-ups over the same baseline"
    print(f"\nAgainst {values.against}, by {what}:")
    columns = ["variant", "before", "after", "ratio", "ratio_low", "ratio_high", "verdict"]
    print(table_to_text(found[columns], values.markdown))
    notes = found[found.reason != ""]
    for row in notes.itertuples():
        print(f"  {row.variant}: {row.reason}")
    has_regressed = (found.verdict == "regression").any()
    return REGRESSION if has_regressed and values.fail_if_slower is not None else DONE
