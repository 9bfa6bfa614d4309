"""What a search has done, one line of JSON a finished step, on disk before the next begins."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfopt.errors import InputError

FILE_NAME = "ledger.jsonl"


class Ledger:
    """An append-only record of finished steps.

    Args:
      folder: the output folder.
      identity: what must be the same for the run to continue: source, data, flags.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        self.path = folder / FILE_NAME
        self._steps: dict[tuple[str, str], dict[str, Any]] = {}
        identity = json.loads(json.dumps(identity))
        if not self.path.exists():
            self._append({"step": "run", "identity": identity})
            return
        first, *others = read_lines(self.path)
        check_same(first["identity"], identity)
        for record in others:
            self._steps[record["step"], record.get("variant", "")] = record
        # A line that was cut off by a kill is completed by nothing: start on a new one.
        if not self.path.read_bytes().endswith(b"\n"):
            self.path.write_text("".join(json.dumps(r) + "\n" for r in (first, *others)))

    def get(self, step: str, variant: object = "") -> dict[str, Any] | None:
        """The record of a finished step, or None."""
        return self._steps.get((step, str(variant)))

    def records(self) -> list[dict[str, Any]]:
        """All finished steps."""
        return list(self._steps.values())

    def add(self, step: str, variant: object = "", **values: Any) -> dict[str, Any]:
        """Records a finished step; it is on disk when this returns."""
        record = {"step": step, "variant": str(variant), **values}
        self._append(record)
        self._steps[step, str(variant)] = record
        return record

    def _append(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete records.

    Raises:
      InputError: when the file is no ledger.
    """
    records = []
    lines = path.read_text().split("\n")
    for number, line in enumerate(lines):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines) - 1:
                break  # cut off in the middle of a write
            raise InputError(
                f"{path} is damaged in line {number + 1}; start again with `overwrite=True`."
            ) from error
    if not records or not isinstance(records[0], dict) or "identity" not in records[0]:
        raise InputError(f"{path} is no ledger of tfopt; start again with `overwrite=True`.")
    return records


def check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Checks that a run continues with what it began with.

    Raises:
      InputError: names everything that differs.
    """
    names = sorted({*before, *now})
    differing = [
        f"{name} was {_short(before.get(name))} and is {_short(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise InputError(
            f"`resume=True` needs the same source, data and arguments: {'; '.join(differing)}; use "
            "another `output_dir` or `overwrite=True`."
        )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:28]}…{text[-28:]}"
