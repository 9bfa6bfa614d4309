"""Time artifacts side by side in one interleaved run; the first is the baseline."""

from __future__ import annotations

from pathlib import Path

from absl import flags

from tfopt.commands import _flags
from tfopt.errors import InputError


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    _flags.define_measurement(values)
    _flags.define_limits(values)
    flags.DEFINE_list("artifacts", [], "Folders of artifacts.", flag_values=values)
    flags.DEFINE_string("data", None, "As tfopt optimize takes it.", flag_values=values)
    flags.DEFINE_string("output", None, "New .json file for the results.", flag_values=values)
    flags.DEFINE_list(
        "concurrency",
        [],
        "Also put each artifact under load: requests at a time, such as 1,2,4.",
        flag_values=values,
    )
    flags.DEFINE_list(
        "arrival_rates",
        [],
        "Under load, also requests that arrive at random, so many a second (open loop).",
        flag_values=values,
    )
    flags.DEFINE_list(
        "load_batch_sizes", [], "Examples in each request under load.", flag_values=values
    )
    flags.DEFINE_float("load_s", 3.0, "Seconds of each load.", flag_values=values)
    flags.DEFINE_list("import_module", [], "Modules with custom ops.", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "artifacts", "data", "output")
    output = Path(values.output)
    if output.exists():
        raise InputError(f"{output} exists already; nothing was overwritten, name another.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.touch()
        output.unlink()
    except OSError as error:
        raise InputError(f"{output} cannot be written ({error.strerror}).") from error
    from tfopt.api import benchmark

    comparison = benchmark(
        values.artifacts,
        values.data,
        batch_size=values.batch_size,
        num_threads=values.num_threads,
        seed=values.seed,
        max_timing_s=values.max_timing_s,
        interval_width=values.interval_width,
        concurrency=_flags.numbers(values, "concurrency", int),
        arrival_rates_per_s=_flags.numbers(values, "arrival_rates", float),
        load_batch_sizes=_flags.numbers(values, "load_batch_sizes", int),
        load_s=values.load_s,
        import_modules=tuple(values.import_module),
        limits=_flags.limits(values),
    )
    comparison.save_json(output)
    print(comparison.to_text())
    if len(comparison.loads):
        from tfopt.compare.text import table_to_text

        print(f"\n{table_to_text(comparison.loads.drop(columns='artifact'))}")
    print(f"\n{comparison.summary} The results are in {output}.")
    return 0
