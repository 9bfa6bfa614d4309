"""What became slower between two results, as far as their intervals tell.

Each result has speed-ups over a baseline that was timed in turns with the variant, so that the
speed of the machine on that day is divided out. Both results must have the same baseline: then
the quotient of a variant's two speed-ups is how much faster it became. Its interval comes from
the two intervals on the logarithmic scale, as those of two independent estimates (Altman & Bland
2003, "Interaction revisited: the difference between two estimates", BMJ 326:219).

A variant has regressed when the one-sided 95 % upper bound of that quotient lies below what is
tolerated. Then a machine of changing mood is blamed on the code in far fewer than 5 % of cases,
since it has to look slower than the tolerated loss and not only slower.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from tfopt.compare import origin
from tfopt.compare.text import plain
from tfopt.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from tfopt.compare.comparison import Comparison

KEY = ("model", "variant", "batch_size", "num_threads")
# Intervals in results are two-sided 95 %; bounds here are one-sided 95 %.
_ONE_SIDED = NormalDist().inv_cdf(0.95) / NormalDist().inv_cdf(0.975)


def find_regressions(
    after: Comparison,
    before: Comparison,
    slower: float = 0.05,
    absolute: bool = False,
    mixed: Collection[str] = (),
) -> pd.DataFrame:
    """See `Comparison.regressions`."""
    import pandas as pd

    if not 0 <= slower < 1:
        raise InputError(f"The tolerated loss of speed is {slower}; expected 0 or more, below 1.")
    found = [(item.rows, item.details) for item in (before, after)]
    if absolute:
        origin.check_mixed(found, {*mixed, "baselines"} - {"machines"})
    else:
        origin.check_mixed(found, mixed)
    old, new = _by_key(before), _by_key(after)
    rows = []
    for key, row in new.items():
        if key not in old:
            continue
        is_measured = plain(old[key].get("median_ms")) is not None
        values = dict(zip(KEY, key, strict=True))
        if is_measured and row["status"] in ("failed", "wrong"):
            reason = f"It was measured before and is {row['status']} now: {row.get('reason')}"
            rows.append({**values, "verdict": "regression", "reason": reason})
        elif is_measured and plain(row.get("median_ms")) is not None:
            rows.append({**values, **_compare(old[key], row, slower, absolute)})
    if not rows:
        raise InputError(
            "No variant was measured in both results, so that nothing can be compared; measure "
            "the same variants of the same model."
        )
    columns = [*KEY[:3], "before", "after", "ratio", "ratio_low", "ratio_high", "verdict", "reason"]
    return pd.DataFrame([{name: row.get(name) for name in columns} for row in rows])


def _by_key(comparison: Comparison) -> dict[tuple[Any, ...], dict[str, Any]]:
    keys = [tuple(row.get(name) for name in KEY) for row in comparison.rows]
    for key, count in Counter(keys).items():
        if count > 1:
            raise InputError(
                f"{key[1]} of {key[0]} stands {count} times in the results, so that it is not "
                "clear which one to compare; give results in which it stands once."
            )
    return dict(zip(keys, comparison.rows, strict=True))


def _compare(
    old: Mapping[str, Any], new: Mapping[str, Any], slower: float, absolute: bool
) -> dict[str, Any]:
    before, after = (_log_speed(row, absolute) for row in (old, new))
    names = ("median_ms", "median_ms") if absolute else ("speedup", "speedup")
    values = {"before": old.get(names[0]), "after": new.get(names[1])}
    if before is None or after is None:
        return {**values, "verdict": "not_comparable", "reason": "An interval is missing."}
    ratio = after[0] - before[0]
    down = _ONE_SIDED * math.hypot(after[0] - after[1], before[2] - before[0])
    up = _ONE_SIDED * math.hypot(after[2] - after[0], before[0] - before[1])
    estimate, low, high = (math.exp(value) for value in (ratio, ratio - down, ratio + up))
    values |= {"ratio": estimate, "ratio_low": low, "ratio_high": high}
    allowed = 1 - slower
    text = f"{estimate:.3f} times as fast as before"
    if high < allowed:
        reason = f"It is {text}, at most {high:.3f}; {allowed:.3g} is tolerated."
        return {**values, "verdict": "regression", "reason": reason}
    if estimate < allowed:
        reason = f"It seems {text} but may be {high:.3f}; measure longer to tell."
        return {**values, "verdict": "maybe", "reason": reason}
    return {**values, "verdict": "ok", "reason": ""}


def _log_speed(row: Mapping[str, Any], absolute: bool) -> tuple[float, float, float] | None:
    """Logarithms of speed, with its lower and upper bound."""
    names = ("median_ms", "median_high_ms", "median_low_ms") if absolute else (
        "speedup", "speedup_low", "speedup_high",
    )  # fmt: skip
    values = [plain(row.get(name)) for name in names]
    if any(value is None or value <= 0 for value in values):
        return None
    sign = -1 if absolute else 1
    estimate, low, high = (sign * math.log(value) for value in values)
    return estimate, low, high
