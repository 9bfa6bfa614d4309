"""`report.html`: one file without network that says what was chosen and why."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING, Any

from tfopt.compare.text import interval, size

if TYPE_CHECKING:
    from tfopt.compare.comparison import Comparison

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --good: #1a7f37; --bad: #b42318; --soft: #8882; }
@media (prefers-color-scheme: dark) { :root { --good: #4ac26b; --bad: #ff7b72; } }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; width: 100%; }
th, td { border-bottom: 1px solid var(--line); padding: .35rem .6rem; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child, td.reason, th.reason { text-align: left; }
td.reason { min-width: 18rem; white-space: normal; }
tr.chosen { background: var(--soft); font-weight: 600; }
.ok, .faster { color: var(--good); } .failed, .over_budget, .slower { color: var(--bad); }
dt { font-weight: 600; } dd { margin: 0 0 .5rem 1rem; overflow-wrap: anywhere; }
"""


def to_html(comparison: Comparison) -> str:
    """The report of a comparison."""
    details = comparison.details
    title = f"tfopt: {details.get('model', 'comparison')}"
    rows = "\n".join(_row(row) for row in comparison.rows)
    facts = {
        "Signature": details.get("signature"),
        "Metric": details.get("metric"),
        "Baseline": details.get("baseline"),
        "Budget": _pairs(details.get("budget")),
        "Data": _pairs(details.get("data")),
        "Machine": _pairs({k: v for k, v in details.get("environment", {}).items()
                           if k not in ("versions", "cpu_flags")}),
        "Versions": _pairs(details.get("environment", {}).get("versions")),
    }  # fmt: skip
    facts_html = "\n".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts.items()
        if value
    )
    heads = "".join(
        f'<th scope="col"{" class=reason" if name == "reason or notes" else ""}>{name}</th>'
        for name in (
            "variant",
            "status",
            "median ms",
            "speed-up (95 %)",
            "verdict",
            "accuracy",
            "drop",
            "drop at most",
            "agreement",
            "size",
            "memory",
            "cold start ms",
            "reason or notes",
        )
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(comparison.summary)}</p>
<div class="scroll" tabindex="0" role="region" aria-label="All variants">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>
<h2>How it was measured</h2>
<dl>
{facts_html}
</dl>
</body>
</html>
"""


def _row(row: dict[str, Any]) -> str:
    cells = [
        (row["variant"], ""),
        (row["status"].replace("_", " "), row["status"]),
        (_number(row.get("median_ms"), 3), ""),
        (interval(row), ""),
        ((row.get("verdict") or "").replace("_", " "), row.get("verdict") or ""),
        (_number(row.get("accuracy"), 4), ""),
        (_number(row.get("accuracy_drop"), 4), ""),
        (_number(row.get("accuracy_drop_high"), 4), ""),
        (_number(row.get("agreement"), 4), ""),
        (size(row.get("size_bytes")), ""),
        (size(row.get("peak_memory_bytes")), ""),
        (_number(row.get("cold_start_ms"), 0), ""),
        (row.get("reason") or "", "reason"),
    ]
    chosen = ' class="chosen"' if row.get("chosen") else ""
    return f"<tr{chosen}>" + "".join(
        f'<td class="{html.escape(style)}">{html.escape(str(text))}</td>' if style
        else f"<td>{html.escape(str(text))}</td>"
        for text, style in cells
    ) + "</tr>"  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def _pairs(values: dict[str, Any] | None) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value}"
        for name, value in (values or {}).items()
        if value not in (None, [], "")
    )
