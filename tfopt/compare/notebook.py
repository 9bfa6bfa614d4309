"""What a notebook shows of a comparison: its summary, a short table, and reasons."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from tfopt.compare import text

if TYPE_CHECKING:
    from tfopt.compare.comparison import Comparison

_STYLE = {True: ' style="text-align:left"', False: ' style="text-align:right"'}


def to_html(comparison: Comparison) -> str:
    """The comparison as a fragment of HTML, without scripts or style sheets."""
    (head, *lines), num_left = comparison.short_table(), -text.NUM_FIGURES
    parts = []
    if comparison.summary:
        parts.append(f"<p>{html.escape(comparison.summary)}</p>")
    parts.append('<table class="dataframe">')
    parts.append(f"<thead>{_line(head, num_left, 'th')}</thead>\n<tbody>")
    for line, row in zip(lines, comparison.rows, strict=True):
        parts.append(_line(line, num_left, "td", is_bold=bool(row.get("chosen"))))
    parts.append("</tbody></table>")
    if reasons := text.reasons(comparison.rows):
        items = (
            f"<li>{html.escape(', '.join(variants))}: {html.escape(reason)}</li>"
            for reason, variants in reasons.items()
        )
        parts.append(
            f"<details><summary>Why the others were not chosen</summary>\n<ul>{''.join(items)}</ul>"
            "</details>"
        )
    return "\n".join(parts)


def _line(cells: list[str], num_left: int, tag: str, is_bold: bool = False) -> str:
    shown = []
    for index, cell in enumerate(cells):
        content = html.escape(cell.removeprefix("* ").strip())
        content = f"<b>{content}</b>" if is_bold else content
        shown.append(f"<{tag}{_STYLE[index < len(cells) + num_left]}>{content}</{tag}>")
    return f"<tr>{''.join(shown)}</tr>"
