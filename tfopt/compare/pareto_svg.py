"""The plot of the report, as SVG that needs no script: hover or tab to a point, follow it."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tfopt.compare.text import (
    LOGARITHMIC_FROM,
    MEASURED,
    figure,
    interval,
    plain,
    quality_of,
)

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 44, 50
NUM_COLORS = 6
TIP_WIDTH, TIP_LINE = 290, 17


def draw(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Speed-up against accuracy (agreement, where nothing has an accuracy), or None without any.

    Each point is a link to the row of the table (`#row-INDEX`).
    """
    quality = quality_of(rows)
    points = [
        (index, row)
        for index, row in enumerate(rows)
        if row["status"] in MEASURED
        and (plain(row.get("speedup")) or 0) > 0
        and plain(row.get(quality)) is not None
    ]
    if not points:
        return None
    ends = [end for _, row in points for end in (row["speedup"], *_ends(row))]
    x, x_ticks = _scale(ends, LEFT, WIDTH - RIGHT, True)
    y, y_ticks = _scale([row[quality] for _, row in points], HEIGHT - BOTTOM, TOP, False)
    runtimes = sorted({_runtime(row) for _, row in points})
    colors = {name: f"r{index % NUM_COLORS}" for index, name in enumerate(runtimes)}
    parts = [_axes(x, x_ticks, y, y_ticks, quality), _front(points, quality, x, y)]
    parts += [_legend(colors)]
    parts += [_point(index, row, quality, x, y, colors) for index, row in points]
    label = f"Speed-up against {quality} of {len(points)} variants"
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="group" aria-label="{label}">\n'
        + "\n".join(filter(None, parts))
        + "\n</svg>"
    )


def _runtime(row: Mapping[str, Any]) -> str:
    return row["variant"].rpartition("@")[2]


def _ends(row: Mapping[str, Any]) -> tuple[float, ...]:
    """Both ends of the speed-up's interval, or nothing."""
    low, high = plain(row.get("speedup_low")), plain(row.get("speedup_high"))
    return (low, high) if low and high else ()


def _scale(
    values: Sequence[float], start: float, end: float, may_be_log: bool
) -> tuple[Callable[[float], float], list[float]]:
    """A function from values to pixels, and values to mark."""
    low, high = min(values), max(values)
    if may_be_log and high / low > LOGARITHMIC_FROM:
        margin = (high / low) ** 0.05
        a, b = math.log(low / margin), math.log(high * margin)
        powers = range(math.floor(a / math.log(10)), math.ceil(b / math.log(10)) + 1)
        marks = [m * 10.0**power for power in powers for m in (1, 2, 5)]
        ticks = [mark for mark in marks if a <= math.log(mark) <= b]
        return lambda value: start + (math.log(value) - a) / (b - a) * (end - start), ticks
    margin = (high - low) * 0.06 or abs(high) * 0.01 or 1.0
    first, last = low - margin, high + margin
    step = 10 ** math.floor(math.log10((last - first) / 4))
    step *= next(m for m in (1, 2, 5, 10) if (last - first) / (m * step) <= 6)
    ticks = [index * step for index in range(math.ceil(first / step), math.floor(last / step) + 1)]
    return lambda value: start + (value - first) / (last - first) * (end - start), ticks


def _axes(
    x: Callable[[float], float],
    x_ticks: Sequence[float],
    y: Callable[[float], float],
    y_ticks: Sequence[float],
    quality: str,
) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = []
    for tick in y_ticks:
        lines += [
            f'<path class="axis" d="M{LEFT} {y(tick):.1f}H{right}"/>',
            f'<text class="dim" x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">',
            f"{tick:.6g}</text>",
        ]
    for tick in x_ticks:
        lines += [
            f'<path class="axis" d="M{x(tick):.1f} {TOP}V{bottom}"/>',
            f'<text class="dim" x="{x(tick):.1f}" y="{bottom + 18}" text-anchor="middle">',
            f"{tick:.6g}</text>",
        ]
    lines.append(
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        "times as fast as the baseline</text>"
    )
    lines.append(f'<text x="4" y="{TOP - 12}">{quality}</text>')
    return "\n".join(lines)


def _front(
    points: Sequence[tuple[int, Mapping[str, Any]]],
    quality: str,
    x: Callable[[float], float],
    y: Callable[[float], float],
) -> str:
    """A line through what nothing beats in both."""
    best, path = -math.inf, ""
    for _, row in sorted(points, key=lambda point: (-point[1]["speedup"], -point[1][quality])):
        if row[quality] > best:
            here = (f"{x(row['speedup']):.1f}", f"{y(row[quality]):.1f}")
            path += f"V{here[1]}H{here[0]}" if path else f"M{here[0]} {here[1]}"
            best = row[quality]
    return f'<path class="front" d="{path}"/>'


def _legend(colors: Mapping[str, str]) -> str:
    found, left = [], LEFT
    for name, style in colors.items():
        found.append(
            f'<g class="{style}"><circle class="dot" cx="{left}" cy="12" r="5"/></g>'
            f'<text x="{left + 10}" y="16">{html.escape(name)}</text>'
        )
        left += 34 + 7 * len(name)
    return "".join(found)


def _point(
    index: int,
    row: Mapping[str, Any],
    quality: str,
    x: Callable[[float], float],
    y: Callable[[float], float],
    colors: Mapping[str, str],
) -> str:
    place_x, place_y = x(row["speedup"]), y(row[quality])
    lines = [
        row["variant"] + (" (chosen)" if row.get("chosen") else ""),
        f"{interval(row) or figure(row['speedup'], '.2f')} times as fast",
        f"{figure(row.get('median_ms'), '.3g')} ms, {quality} {figure(row[quality], '.4f')}",
    ]
    if row["status"] == "over_budget":
        lines.append("over the budget")
    bar = ""
    if ends := [x(value) for value in _ends(row)]:
        bar = f'<path class="bar" d="M{ends[0]:.1f} {place_y:.1f}H{ends[1]:.1f}"/>'
    height = TIP_LINE * len(lines) + 8
    left = min(max(place_x + 10, LEFT), WIDTH - TIP_WIDTH)
    top = place_y + 10 if place_y + 10 + height < HEIGHT else place_y - 10 - height
    texts = "".join(
        f'<text x="{left + 8:.1f}" y="{top + TIP_LINE * (i + 1):.1f}">{html.escape(line)}</text>'
        for i, line in enumerate(lines)
    )
    tip = (
        f'<g class="tip"><rect x="{left:.1f}" y="{top:.1f}" width="{TIP_WIDTH}" '
        f'height="{height}" rx="4"/>{texts}</g>'
    )
    style = f"{colors[_runtime(row)]} {row['status']}{' chosen' if row.get('chosen') else ''}"
    return (
        f'<a href="#row-{index}" class="{style}" aria-label="{html.escape(", ".join(lines))}">'
        f'{bar}<circle class="dot" cx="{place_x:.1f}" cy="{place_y:.1f}" r="5"/>{tip}</a>'
    )
