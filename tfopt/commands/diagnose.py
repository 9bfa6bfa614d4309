"""Say what makes an artifact slow or inaccurate, and how long each of its layers takes."""

from __future__ import annotations

from absl import flags

from tfopt.commands import _flags

NUM_LAYERS = 20


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    flags.DEFINE_string("artifact", None, "Folder of the artifact.", flag_values=values)
    flags.DEFINE_string("data", None, "As tfopt optimize takes it.", flag_values=values)
    flags.DEFINE_string(
        "reference",
        None,
        "Folder of the float32 artifact of the same runtime, to see what quantization cuts off.",
        flag_values=values,
    )
    flags.DEFINE_integer("batch_size", 1, "Examples in each inference.", flag_values=values)
    flags.DEFINE_integer(
        "num_threads", None, "Threads of the runtime; default: all cores.", flag_values=values
    )
    flags.DEFINE_list("import_module", [], "Modules with custom ops.", flag_values=values)
    _flags.define_limits(values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "artifact", "data")
    from tfopt.api import diagnose
    from tfopt.compare.text import table_to_text

    found = diagnose(
        values.artifact,
        values.data,
        values.reference,
        batch_size=values.batch_size,
        num_threads=values.num_threads,
        import_modules=tuple(values.import_module),
        limits=_flags.limits(values),
    )
    print("\n".join(found.sentences) or "Nothing remarkable was found.")
    table = found.table
    if table.time_ms.notna().any():
        table = table.sort_values("time_ms", ascending=False)
        print(f"\nThe slowest of {len(table)} operations, by the runtime's profiler:\n")
        print(table_to_text(table.head(NUM_LAYERS)[["name", "op", "dtype", "time_ms"]]))
    return 0
