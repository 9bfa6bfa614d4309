"""Show results of several searches or benchmarks in one table.

For example: tfopt compare before/results.json after/results.json --baseline=float32@litert
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

TAKES_FILES = True


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    flags.DEFINE_string(
        "baseline", None, "Variant whose median the others are divided into.", flag_values=values
    )


def run(values: flags.FlagValues, files: Sequence[str] = ()) -> int:
    """Runs the command."""
    from tfopt.compare.comparison import Comparison

    comparison = Comparison.from_files(files)
    print(comparison.to_text())
    if values.baseline is not None:
        table = comparison.relative_to(values.baseline)
        shown = table[table.ratio.notna()][["model", "variant", "median_ms", "ratio"]]
        print(f"\nTimes as fast as {values.baseline}:")
        print(shown.sort_values("ratio", ascending=False).to_string(index=False))
    return 0
