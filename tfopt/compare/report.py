"""`report.html`: one file without network that says what was chosen and why.

The page is complete as it is written; its script sorts and filters the table.
"""

from __future__ import annotations

import html
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tfopt.compare import pareto_svg
from tfopt.compare.text import figure, interval, plain, reasons, size
from tfopt.measure.diagnosis import short_name

if TYPE_CHECKING:
    from tfopt.compare.comparison import Comparison


class _Column(NamedTuple):
    title: str
    name: str  # of the figure that it is sorted by
    form: str = ""  # of a number; "size" for bytes

    @property
    def is_number(self) -> bool:
        return bool(self.form)

    def show(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.name)
        if self.form == "interval":
            return interval(row)
        if self.form == "size":
            return size(plain(value))
        if self.form:
            return figure(value, self.form)
        text = str(value or "")
        return text.replace("_", " ") if self.name in ("status", "verdict") else text


_COLUMNS = (
    _Column("variant", "variant"),
    _Column("status", "status"),
    _Column("median ms", "median_ms", ".3f"),
    _Column("speed-up (95 %)", "speedup", "interval"),
    _Column("verdict", "verdict"),
    _Column("accuracy", "accuracy", ".4f"),
    _Column("drop", "accuracy_drop", ".4f"),
    _Column("drop at most", "accuracy_drop_high", ".4f"),
    _Column("agreement", "agreement", ".4f"),
    _Column("size", "size_bytes", "size"),
    _Column("memory", "peak_memory_bytes", "size"),
    _Column("cold start ms", "cold_start_ms", ".0f"),
    _Column("reason or notes", "reason"),
)
# Of one variant, beyond what the table has.
_MORE = (
    _Column("converted from", "parent"),
    _Column("p90 ms", "p90_ms", ".3f"),
    _Column("p99 ms", "p99_ms", ".3f"),
    _Column("ms without copies", "device_ms", ".3f"),
    _Column("memory of the GPU", "gpu_memory_bytes", "size"),
    _Column("examples a second", "throughput_per_s", ".4g"),
    _Column("size after deflate", "compressed_bytes", "size"),
    _Column("largest error of an output", "max_abs_error", ".2g"),
)
COPIES = (
    "The median contains the copies to the GPU and back; the time without copies has the waits of "
    "the GPU for the next launch in it."
)
_STATUSES = ("ok", "over_budget", "wrong", "failed", "skipped")


def to_html(comparison: Comparison) -> str:
    """The report of a comparison."""
    details, rows = comparison.details, comparison.rows
    title = _escape(f"tfopt: {details.get('model', 'comparison')}")
    plot = pareto_svg.draw(rows)
    command = details.get("command")
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="summary">{_escape(comparison.summary)}</p>' if comparison.summary else "",
        f'<h2>Speed and quality</h2>\n<figure class="plot">{plot}</figure>' if plot else "",
        f"<h2>All variants</h2>\n{_controls(rows)}\n{_table(rows)}",
        f'<h2>Each variant</h2>\n<div class="variants">{_articles(rows)}</div>' if rows else "",
        f"<h2>How it was measured</h2>\n{_facts(details, rows)}",
        f"<h2>Do it again</h2>\n<pre><code>{_escape(command)}</code></pre>" if command else "",
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
{chr(10).join(filter(None, parts))}
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return importlib.resources.files("tfopt.compare").joinpath(name).read_text(encoding="utf-8")


def _controls(rows: tuple[dict[str, Any], ...]) -> str:
    """Search and checkboxes; the script shows them."""
    there = [status for status in _STATUSES if any(row["status"] == status for row in rows)]
    others = sorted({row["status"] for row in rows} - set(there))
    boxes = "\n".join(
        f'<label><input type="checkbox" name="status" value="{_escape(status)}" checked> '
        f"{_escape(status.replace('_', ' '))}</label>"
        for status in [*there, *others]
    )
    return f"""<div class="controls" hidden>
<label>Filter <input type="search" id="search" placeholder="litert int8"></label>
{boxes}
<output id="count"></output>
</div>"""


def _table(rows: tuple[dict[str, Any], ...]) -> str:
    heads = "".join(
        f'<th scope="col" aria-sort="none" data-kind="{"number" if column.is_number else "text"}" '
        f'data-first="{"descending" if column.name == "speedup" else "ascending"}"'
        f"{_class(column)}><button>{column.title}</button></th>"
        for column in _COLUMNS
    )
    shared = reasons(rows)
    lines = "\n".join(_row(index, row, shared) for index, row in enumerate(rows))
    return f"""<div class="scroll" tabindex="0" role="region" aria-label="All variants">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{lines}
</tbody>
</table>
</div>"""


def _class(column: _Column, row: Mapping[str, Any] | None = None) -> str:
    """The class of a cell: statuses and verdicts have colours."""
    name = column.name
    if row is not None and name in ("status", "verdict"):
        name = str(row.get(name) or "")
    elif name != "reason":
        return ""
    return f' class="{_escape(name)}"' if name else ""


def _row(index: int, row: Mapping[str, Any], shared: Mapping[str, Sequence[str]]) -> str:
    cells = []
    for column in _COLUMNS:
        value = plain(row.get(column.name))
        shown = _escape(column.show(row))
        if column.name == "variant":
            shown = f'<a href="#variant-{index}">{shown}</a>'
        if column.name == "reason" and value in shared and shared[value][0] != row["variant"]:
            shown = f"the same as {_escape(shared[value][0])}"
        sort = "" if value is None else _escape(value)
        cells.append(f'<td{_class(column, row)} data-value="{sort}">{shown}</td>')
    chosen = ' class="chosen"' if row.get("chosen") else ""
    return (
        f'<tr id="row-{index}" data-status="{_escape(row["status"])}"{chosen}>{"".join(cells)}</tr>'
    )


def _articles(rows: tuple[dict[str, Any], ...]) -> str:
    return "\n".join(_article(index, row) for index, row in enumerate(rows))


def _article(index: int, row: Mapping[str, Any]) -> str:
    """Everything that is known of one variant."""
    shown = [column for column in (*_COLUMNS[1:-1], *_MORE) if column.show(row)]
    figures = "\n".join(
        f"<dt>{column.title}</dt><dd{_class(column, row)}>{_escape(column.show(row))}</dd>"
        for column in shown
    )
    notes = list(row.get("notes") or ())
    if row.get("reason") and row["reason"] not in (" ".join(notes), *notes):
        notes.insert(0, row["reason"])
    notes += _quality(row)
    listed = "".join(f"<li>{_escape(note)}</li>" for note in notes)
    chosen = " (chosen)" if row.get("chosen") else ""
    return f"""<article id="variant-{index}">
<h3><a href="#row-{index}">{_escape(row["variant"])}</a>{chosen}</h3>
<dl>
{figures}
</dl>
{f"<ul>{listed}</ul>" if listed else ""}
{_diagnosis(row)}
</article>"""


def _diagnosis(row: Mapping[str, Any]) -> str:
    """What was seen inside a variant."""
    sentences = row.get("diagnosis") or ()
    if not sentences:
        return ""
    listed = "".join(f"<li>{_escape(sentence)}</li>" for sentence in sentences)
    lines = "\n".join(
        f'<tr><td title="{_escape(layer["name"])}">{_escape(short_name(layer["name"]))}</td>'
        f"<td>{layer['share']:.0%}</td><td>{layer['time_ms']:.2g}</td>"
        f"<td>{_escape(layer['op'])}</td><td>{_escape(layer['dtype'])}</td></tr>"
        for layer in row.get("layers") or ()
    )
    heads = "".join(
        f'<th scope="col">{name}</th>' for name in ("layer", "share", "ms", "operation", "dtype")
    )
    table = f"""<details>
<summary>The slowest layers, by the runtime's profiler</summary>
<div class="scroll"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{lines}
</tbody>
</table></div>
</details>"""
    return f"<h4>Inside</h4>\n<ul>{listed}</ul>\n{table if lines else ''}"


def _quality(row: Mapping[str, Any]) -> list[str]:
    """Sentences about how the outputs differ from those of the model as saved."""
    sentences = []
    if (test := row.get("mcnemar")) and test["num_lost"] + test["num_gained"]:
        sentences.append(
            f"Against the model as saved, {test['num_lost']} right answers became wrong and "
            f"{test['num_gained']} wrong ones right (McNemar's test: p = {test['p_value']:.2g})."
        )
    for name, found in (row.get("fidelity") or {}).items():
        if found["max_abs_error"] == 0 and found["sqnr_db"] is None:
            sentences.append(f"Output {name} is the same to the last bit.")
        elif found["sqnr_db"] is not None and found["mean_abs_error"] is not None:
            sentences.append(
                f"Output {name} differs by {found['mean_abs_error']:.2g} on average and "
                f"{found['max_abs_error']:.2g} at most; the signal is {found['sqnr_db']:.0f} dB "
                "above the noise."
            )
    return sentences


def _facts(details: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    environment = details.get("environment", {})
    has_device_times = any(plain(row.get("device_ms")) is not None for row in rows)
    facts = {
        "Signature": details.get("signature"),
        "Metric": details.get("metric"),
        "Baseline": details.get("baseline"),
        "Budget": _pairs(details.get("budget")),
        "Data": _pairs(details.get("data")),
        "Files": ", ".join(details.get("files", ())),
        "Machine": _pairs(
            {k: v for k, v in environment.items() if k not in ("versions", "gpu_state")}
        ),
        "GPU": _pairs(environment.get("gpu_state")),
        "Copies": COPIES if has_device_times else None,
        "Versions": _pairs(environment.get("versions")),
    }
    lines = "\n".join(
        f"<dt>{name}</dt><dd>{_escape(value)}</dd>" for name, value in facts.items() if value
    )
    return f'<dl class="facts">\n{lines}\n</dl>'


def _pairs(values: Mapping[str, Any] | None) -> str:
    texts = {
        name.replace("_", " "): ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in (values or {}).items()
        if value not in (None, [], "")
    }
    return "; ".join(f"{name}: {value}" for name, value in texts.items())


def _escape(value: object) -> str:
    return html.escape(str(value))
