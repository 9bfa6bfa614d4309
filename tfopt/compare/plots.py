"""Plots of a comparison with matplotlib; each draws into an Axes and returns it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tfopt.compare.text import LOGARITHMIC_FROM, MEASURED, quality_of
from tfopt.errors import InputError
from tfopt.measure import statistics

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from tfopt.compare.comparison import Comparison

# Okabe & Ito 2008, "Color Universal Design": told apart by colour-blind people, too.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_LABELS = {
    "speedup": "times as fast as the baseline",
    "median_ms": "median of one inference (ms)",
    "size_bytes": "size (bytes)",
    "compressed_bytes": "size after deflate (bytes)",
    "device_ms": "time without copies (ms)",
    "peak_memory_bytes": "peak memory of a process (bytes)",
    "gpu_memory_bytes": "memory of the GPU (bytes)",
    "cold_start_ms": "load and first inference (ms)",
    "throughput_per_s": "examples a second",
    "agreement": "agreement with the model as saved",
}


def pareto(comparison: Comparison, ax: Axes | None = None) -> Axes:
    """Speed-up (with its 95 % interval) against accuracy, with the Pareto front as a line.

    Rows over the budget are hollow. Accuracy is drawn with its one-sided 95 % bound downwards;
    where nothing has an accuracy, it is the agreement with the model as saved.

    Raises:
      InputError: when no row has both figures, or matplotlib is missing.
    """
    ax = _axes(ax)
    quality = quality_of(comparison.rows)
    table = _measured(comparison, "speedup", quality)
    for style, name, group in _by_runtime(table):
        for status, face in zip(MEASURED, (style["color"], "none"), strict=True):
            part = group[group.status == status]
            if part.empty:
                continue
            speed_bars = [part.speedup - part.speedup_low, part.speedup_high - part.speedup]
            down = (part.accuracy_drop_high - part.accuracy_drop).clip(lower=0).fillna(0)
            quality_bars = [down, 0 * down] if quality == "accuracy" else None
            ax.errorbar(
                part.speedup, part[quality], xerr=[bar.clip(lower=0) for bar in speed_bars],
                yerr=quality_bars, linestyle="none", markerfacecolor=face, elinewidth=0.8,
                label=name if status == "ok" else f"{name}, over budget", **style,
            )  # fmt: skip
    front = comparison.pareto(("speedup", quality))
    ax.step(front.speedup, front[quality], where="post", color="0.6", linewidth=1, zorder=0)
    _scale(ax, "x", table.speedup)
    _annotate(ax, front, "speedup", quality)
    ax.set(xlabel=_LABELS["speedup"], ylabel=_LABELS.get(quality, quality))
    ax.set_title("Speed and quality; the line joins what nothing beats in both", fontsize="medium")
    ax.legend(fontsize="small")
    return ax


def latency(
    comparison: Comparison, variants: Sequence[str] | None = None, ax: Axes | None = None
) -> Axes:
    """How the times of each variant are spread: every call that counts, as a violin of
    the quickest 99 %.

    The dot is the median; the short lines are p90 and p99 where there were enough calls for them.

    Args:
      comparison: of one run, with its raw times.
      variants: which ones, in this order; by default all, the fastest on top.
      ax: where to draw.

    Raises:
      InputError: when there are no raw times, a variant is unknown, or matplotlib is missing.
    """
    timings = comparison.timings()
    chosen = variants or sorted(timings, key=lambda name: timings[name].median_s)
    unknown = [name for name in chosen if name not in timings]
    if unknown:
        raise InputError(f"No raw times of {', '.join(unknown)}; there are: {', '.join(timings)}.")
    ax = _axes(ax, height=1 + 0.32 * len(chosen))
    values = [[value * 1e3 for value in timings[name].values_s] for name in chosen]
    places = range(len(chosen), 0, -1)
    # The last few calls would stretch the body over the whole axis.
    bodies = [np.sort(times)[: max(2, round(0.99 * len(times)))] for times in values]
    parts = ax.violinplot(bodies, places, orientation="horizontal", widths=0.8, showextrema=False)
    for body in parts["bodies"]:  # type: ignore[attr-defined]
        body.set(facecolor=_COLORS[0], alpha=0.35)
    for place, times in zip(places, values, strict=True):
        ax.plot([float(np.median(times))], [place], "o", color=_COLORS[0], markersize=4)
        for q in (90, 99):
            if (found := statistics.percentile(times, q)) is not None:
                ax.plot([found, found], [place - 0.25, place + 0.25], color="0.3", linewidth=1)
    ax.set_yticks(list(places), chosen)
    _scale(ax, "x", [value for times in values for value in times])
    ax.set(xlabel="time of one inference (ms)")
    ax.set_title("Every call; median, p90 and p99 are marked", fontsize="medium")
    return ax


def tradeoff(
    comparison: Comparison,
    x: str = "size_bytes",
    y: str = "speedup",
    ax: Axes | None = None,
) -> Axes:
    """Any figure against another, one colour and marker a runtime.

    Raises:
      InputError: when a column is unknown, no row has both figures, or matplotlib is missing.
    """
    comparison.pareto((x,), (y,))  # checks the names
    ax = _axes(ax)
    table = _measured(comparison, x, y)
    for style, name, group in _by_runtime(table):
        ax.plot(group[x], group[y], linestyle="none", label=name, **style)
    _scale(ax, "x", table[x])
    _scale(ax, "y", table[y])
    _annotate(ax, table[table.chosen == True], x, y)  # noqa: E712 - None is neither
    ax.set(xlabel=_LABELS.get(x, x), ylabel=_LABELS.get(y, y))
    ax.legend(fontsize="small")
    return ax


def _axes(ax: Axes | None, height: float = 5) -> Axes:
    if ax is not None:
        return ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise InputError(
            "Plots need matplotlib, which is not installed; run: pip install matplotlib"
        ) from error
    return pyplot.subplots(figsize=(8, height), layout="constrained")[1]


def _measured(comparison: Comparison, *names: str) -> pd.DataFrame:
    table = comparison.table
    table = table[table.status.isin(MEASURED)].dropna(subset=list(names))
    if table.empty:
        raise InputError(f"No row has {' and '.join(names)}, so that there is nothing to plot.")
    return table


def _by_runtime(table: pd.DataFrame) -> list[tuple[dict[str, Any], str, pd.DataFrame]]:
    """A style, a name and rows for each runtime, always in the same order."""
    runtimes = table.variant.str.rpartition("@")[2]
    return [
        (
            {"color": _COLORS[i % len(_COLORS)], "marker": _MARKERS[i % len(_MARKERS)]},
            name,
            table[runtimes == name],
        )
        for i, name in enumerate(sorted(runtimes.unique()))
    ]


def _annotate(ax: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    for row in table.to_dict("records"):
        place = ax.transAxes.inverted().transform(ax.transData.transform((row[x], row[y])))
        is_right = place[0] > 0.6
        ax.annotate(
            row["variant"], (row[x], row[y]), xytext=(-6 if is_right else 6, 5),
            textcoords="offset points", ha="right" if is_right else "left", fontsize="x-small",
        )  # fmt: skip


def _scale(ax: Axes, axis: str, values: Any) -> None:
    """A logarithmic axis where values differ by more than a person sees on a linear one."""
    low, high = min(values), max(values)
    if low > 0 and high / low > LOGARITHMIC_FROM:
        ax.set(**{f"{axis}scale": "log"})
