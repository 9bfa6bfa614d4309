"""Say which runtimes can be used here, with their precisions, and why others cannot."""

from __future__ import annotations

from absl import flags


def define_flags(values: flags.FlagValues) -> None:
    """Declares no flags."""
    del values


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    from tfopt import runtimes

    del values
    for runtime in runtimes.all_runtimes():
        reason = runtime.missing()
        versions = ", ".join(f"{name} {version}" for name, version in runtime.versions().items())
        print(f"{runtime.name}: {f'not available, {reason}' if reason else versions}")
        for remark in runtime.remarks() if reason is None else ():
            print(f"  {remark}")
        for precision in runtime.precisions.values():
            options = "; ".join(f"{name}: {values}" for name, values in precision.options.items())
            notes = [options] if options else []
            if precision.suitability and reason is None:
                found = precision.suitability()
                notes.append(found.reason if found.suits else f"left out here: {found.reason}")
            print(f"  {precision.name}{': ' if notes else ''}{' — '.join(notes)}")
    return 0
