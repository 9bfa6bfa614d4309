"""Nested tuples and dictionaries of arrays, written down as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any


def take_apart(value: Any) -> tuple[Any, list[Any]]:
    """A structure with numbers instead of its leaves, and these.

    Lists count as tuples, which become lists in JSON; None stays.
    """
    leaves: list[Any] = []
    return _take_apart(value, leaves), leaves


def _take_apart(value: Any, leaves: list[Any]) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {str(name): _take_apart(value[name], leaves) for name in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_take_apart(item, leaves) for item in value]
    leaves.append(value)
    return len(leaves) - 1


def put_together(template: Any, leaves: Sequence[Any]) -> Any:
    """The structure of a template, with tuples for its lists."""
    if isinstance(template, dict):
        return {name: put_together(item, leaves) for name, item in template.items()}
    if isinstance(template, list):
        return tuple(put_together(item, leaves) for item in template)
    return None if template is None else leaves[template]


def names(template: Any, path: str = "") -> list[str]:
    """Where each leaf is, such as `logits.0`; nothing for a leaf alone."""
    if template is None:
        return []
    if isinstance(template, int):
        return [path]
    items = template.items() if isinstance(template, dict) else enumerate(template)
    inner = [names(item, f"{path}.{name}" if path else str(name)) for name, item in items]
    return [name for found in inner for name in found]


def difference(kept: Any, now: Any, path: str = "") -> tuple[str, str, str]:
    """The first place where two structures of JSON differ, and what is there in each."""
    if isinstance(kept, dict) and isinstance(now, dict):
        for name in {**kept, **now}:
            if name not in kept or name not in now or kept[name] != now[name]:
                inner = f"{path}.{name}" if path else str(name)
                return difference(kept.get(name), now.get(name), inner)
    if isinstance(kept, list) and isinstance(now, list) and len(kept) == len(now):
        for place, (old, new) in enumerate(zip(kept, now, strict=True)):
            if old != new:
                return difference(old, new, f"{path}[{place}]")
    return path, _short(kept), _short(now)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
