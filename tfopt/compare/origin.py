"""Where results come from, and which of them one table may hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tfopt.errors import InputError

MIXED = {
    "machines": "their times cannot be compared",
    "batch_sizes": "the times of one inference mean different things",
    "baselines": "their speed-ups are over different things",
}
Results = tuple[Iterable[Mapping[str, Any]], Mapping[str, Any]]  # rows and details


def machine_of(details: Mapping[str, Any]) -> str:
    """Processor and number of cores, as recorded with results."""
    environment = details.get("environment", {})
    cores = environment.get("num_cores")
    return str(environment.get("cpu", "unknown")) + (f", {cores} cores" if cores else "")


def baseline_of(details: Mapping[str, Any]) -> str:
    """The artifact that speed-ups are over: its variant, its source, and what it ran on."""
    artifact = details.get("baseline_artifact")
    if artifact is None:
        return str(details.get("baseline", "unknown"))
    versions = ", ".join(f"{name} {version}" for name, version in artifact["versions"].items())
    return f"{artifact['variant']} of {artifact['source_sha256'][:12]} on {versions}"


def check_mixed(found: Collection[Results], mixed: Collection[str] = ()) -> None:
    """Refuses results that one table would mislead with, unless that was asked for.

    Args:
      found: rows and details of each file. Rows may name their own `machine` and `baseline`, as
        those of merged results do.
      mixed: what may differ, out of `MIXED`.

    Raises:
      InputError: names what differs.
    """
    unknown = sorted(set(mixed) - set(MIXED))
    if unknown:
        raise InputError(f"{', '.join(unknown)} cannot be mixed; what can is: {', '.join(MIXED)}.")
    machines: set[str] = set()
    sizes: set[str] = set()
    baselines: dict[str, set[str]] = {}
    for rows, details in found:
        machine, baseline = machine_of(details), baseline_of(details)
        for row in rows:
            if row.get("median_ms") is None:
                continue
            machines.add(row.get("machine", machine))
            sizes.add(f"{row.get('batch_size')} with {row.get('num_threads')} threads")
            baselines.setdefault(row["model"], set()).add(row.get("baseline", baseline))
    groups = [("machines", machines), ("batch_sizes", sizes)]
    groups += [("baselines", values) for values in baselines.values()]
    for what, values in groups:
        if len(values) > 1 and what not in mixed:
            raise InputError(
                f"The results have different {what.replace('_', ' ')} "
                f"({'; '.join(sorted(values))}), so that {MIXED[what]}; compare like with like, or "
                f"ask for it with `mixed={what}`."
            )
