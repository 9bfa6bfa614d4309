"""Which variants are timed once more, side by side, before one is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NUM_CLOSE = 6
NUM_QUICKEST = 2
MARGIN = 0.9  # a finalist could be this close to the leader


def choose(rows: Iterable[Mapping[str, Any]], baseline: str) -> list[str]:
    """Names of the finalists among rows of the table, the leader first.

    Each row was timed at another moment, so that the best of many is partly luck: whatever could
    be about as fast as the leader takes part. A machine that became slower for the baseline alone
    flatters whatever was timed then, so the quickest by their own times do, too. The baseline
    takes part if it is inside the limits, since what is no faster is not chosen.
    """
    inside = [values for values in rows if values["status"] == "ok"]
    inside.sort(key=lambda values: values["speedup"], reverse=True)
    close = [
        values["variant"]
        for values in inside[:NUM_CLOSE]
        if values["speedup_high"] > MARGIN * inside[0]["speedup_low"]
    ]
    quick = sorted(inside, key=lambda values: values["median_ms"])[:NUM_QUICKEST]
    unchanged = [values["variant"] for values in inside if values["variant"] == baseline]
    return list(dict.fromkeys([*close, *(values["variant"] for values in quick), *unchanged]))


def rank(names: Iterable[str], rows: Mapping[str, Mapping[str, Any]], baseline: str) -> list[str]:
    """Finalists by speed, the one to choose first.

    The unchanged model comes before everything that is not proven faster.
    """
    order = sorted(names, key=lambda name: rows[name]["speedup"], reverse=True)
    if baseline in order:
        proven = [name for name in order if rows[name]["speedup_low"] > 1]
        others = [name for name in order if name not in proven and name != baseline]
        order = [*proven, baseline, *others]
    return order
