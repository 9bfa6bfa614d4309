"""The state of the GPU while something is timed, as `nvidia-smi` tells it.

Each question starts that program, which takes 30 to 100 ms: ask between timings, never within one.
What it prints is described in `nvidia-smi --help-query-gpu` and `--help-query-compute-apps`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 20
SLOWER = 0.9  # of the clock before: what is below is worth a note
CONTEXT_BYTES = 100 << 20  # a process that computes on a GPU holds more than this
# nvml.h: nvmlClocksEventReasons, in the order of their bits.
REASONS = (
    "gpu_idle", "applications_clocks_setting", "sw_power_cap", "hw_slowdown", "sync_boost",
    "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown",
    "display_clock_setting",
)  # fmt: skip
# A GPU at its power limit is as fast as it ever is under that load; these are for an emergency.
SLOWDOWNS = frozenset(name for name in REASONS if name.endswith("_slowdown"))


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # "[N/A]", "[Not Supported]", "[Unknown Error]" and the like
        return None


def _whole(text: str) -> int | None:
    value = _number(text)
    return None if value is None else round(value)


def _bytes(text: str) -> int | None:
    value = _number(text)  # of MiB
    return None if value is None else round(value * (1 << 20))


def _share(text: str) -> float | None:
    value = _number(text)  # of percent
    return None if value is None else value / 100


def _switch(text: str) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(text)


def _reasons(text: str) -> list[str] | None:
    try:
        bits = int(text, 16)
    except ValueError:
        return None
    return [name for index, name in enumerate(REASONS) if bits >> index & 1]


_FIELDS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "sm_clock_mhz": ("clocks.current.sm", _whole),
    "max_sm_clock_mhz": ("clocks.max.sm", _whole),
    "memory_clock_mhz": ("clocks.current.memory", _whole),
    "max_memory_clock_mhz": ("clocks.max.memory", _whole),
    "busy_share": ("utilization.gpu", _share),
    "memory_used_bytes": ("memory.used", _bytes),
    "memory_total_bytes": ("memory.total", _bytes),
    "temperature_c": ("temperature.gpu", _whole),
    "power_w": ("power.draw", _number),
    "power_limit_w": ("power.limit", _number),
    "is_persistent": ("persistence_mode", _switch),
    "is_ecc_on": ("ecc.mode.current", _switch),
    "is_mig_on": ("mig.mode.current", _switch),
}
# The second is the name up to driver 530; a later one may drop it.
_REASON_FIELDS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")


def ask(query: str, fields: Sequence[str], gpu: str | None = None) -> list[list[str]]:
    """What `nvidia-smi` answers, one list of values a line, numbers without their units.

    Args:
      query: `gpu` or `compute-apps`.
      fields: the values that are wanted.
      gpu: its number or UUID; None is every one.

    Returns:
      Nothing without the program, when it fails, and for lines that are no answer.
    """
    if (program := shutil.which("nvidia-smi")) is None:
        return []
    command = [program, f"--query-{query}={','.join(fields)}", "--format=csv,noheader,nounits"]
    command += [] if gpu is None else [f"--id={gpu}"]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = ended.stdout.splitlines() if ended.returncode == 0 else []
    rows = [[value.strip() for value in line.split(",")] for line in lines]
    return [row for row in rows if len(row) == len(fields)]


def state() -> dict[str, Any] | None:
    """What the GPU that sessions run on does now; None without one.

    It is the first of those that CUDA_VISIBLE_DEVICES leaves visible. CUDA numbers unlike GPUs by
    their speed and `nvidia-smi` by their slots: with CUDA_DEVICE_ORDER=PCI_BUS_ID the two agree.

    Returns:
      Values that can be written as JSON, None where the GPU does not tell: `sm_clock_mhz` and
      `memory_clock_mhz` with the highest of each (`max_…`); `busy_share`, of the last second or
      less, 0…1; `memory_used_bytes` and `memory_total_bytes`; `temperature_c`; `power_w` and
      `power_limit_w`; `is_persistent`, `is_ecc_on`, `is_mig_on`; `clock_reasons`, what keeps the
      clocks from being higher, out of `REASONS`; `num_other_processes`, those that hold the GPU
      and are neither this process nor started by it, None where a container hides them.
    """
    names = [name for name, _ in _FIELDS.values()]
    for reasons in _REASON_FIELDS:
        if rows := _ask_visible("gpu", [*names, reasons]):
            break
    else:
        return None
    *texts, bits = rows[0]
    found = {key: read(text) for (key, (_, read)), text in zip(_FIELDS.items(), texts, strict=True)}
    found["clock_reasons"] = _reasons(bits)
    processes = [_whole(pid) for pid, _ in _processes()]
    found["num_other_processes"] = _num_others([pid for pid in processes if pid is not None])
    if not processes and (found["memory_used_bytes"] or 0) > CONTEXT_BYTES:
        found["num_other_processes"] = None
    return found


def used_bytes() -> int | None:
    """Memory of the GPU that is in use, by whomever; None without a GPU."""
    rows = _ask_visible("gpu", ["memory.used"])
    return _bytes(rows[0][0]) if rows else None


def held_bytes(used_before: int | None) -> int | None:
    """Memory of the GPU that this process holds, CUDA's own included; None when it holds none.

    Where `nvidia-smi` does not know the process, since a container numbers it otherwise, it is
    what more is in use than before, so that a process that came or went since then counts, too.

    Args:
      used_before: `used_bytes` before this process turned to the GPU.
    """
    for pid, held in _processes():
        if pid == str(os.getpid()) and (value := _bytes(held)) is not None:
            return value
    now = used_bytes()
    if now is None or used_before is None or now <= used_before:
        return None
    return now - used_before


def notes_on(before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
    """Sentences about what makes times that were taken between two states doubtful."""
    if before is None or after is None:
        return []
    notes = []
    if others := max(found["num_other_processes"] or 0 for found in (before, after)):
        who = "Another process" if others == 1 else f"{others} other processes"
        notes.append(f"{who} held the GPU while it was timed.")
    reasons = {name for found in (before, after) for name in found["clock_reasons"] or ()}
    if slowdowns := sorted(reasons & SLOWDOWNS):
        notes.append(f"The GPU slowed itself down while it was timed ({', '.join(slowdowns)}).")
    first, last = before["sm_clock_mhz"], after["sm_clock_mhz"]
    is_idle = "gpu_idle" in (after["clock_reasons"] or ())  # clocks of a GPU at rest are low
    if first and last and last < SLOWER * first and not is_idle:
        notes.append(f"The GPU's clock fell from {first} to {last} MHz while it was timed.")
    return notes


def _ask_visible(query: str, fields: Sequence[str]) -> list[list[str]]:
    """What `ask` finds for the GPU that sessions run on."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if first in ("", "-1"):
        return []
    return ask(query, fields, None if first.startswith("MIG-") else first)  # parts have no state


def _processes() -> list[list[str]]:
    """Number and MiB of each process that computes on the GPU."""
    return _ask_visible("compute-apps", ["pid", "used_memory"])


def _num_others(pids: Collection[int]) -> int | None:
    """How many are neither this process nor started by it; None when one is not of this system."""
    if not all(Path(f"/proc/{pid}").exists() for pid in pids):
        return None
    return sum(os.getpid() not in _line_of(pid) for pid in pids)


def _line_of(pid: int) -> list[int]:
    """A process, the one that started it, and so on."""
    line = []
    while pid and pid not in line:
        line.append(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[1])
        except OSError:  # it ended
            break
    return line
