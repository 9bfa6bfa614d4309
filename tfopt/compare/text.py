"""Figures as people and files have them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """None for NaN and infinity, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def size(value: float | None) -> str:
    """Bytes for people: 317 kB."""
    if value is None:
        return ""
    for unit in ("B", "kB", "MB", "GB"):
        # From 999.5 on, three digits would be 1e+03.
        if value < 999.5 or unit == "GB":
            is_whole = unit == "B" or value >= 999.5
            return f"{value:.0f} {unit}" if is_whole else f"{value:.3g} {unit}"
        value /= 1000
    return ""


def interval(row: Mapping[str, Any]) -> str:
    """The speed-up with its interval for people: 2.31 (2.25–2.38)."""
    values = [plain(row.get(name)) for name in ("speedup", "speedup_low", "speedup_high")]
    return "" if None in values else "{:.2f} ({:.2f}–{:.2f})".format(*values)
