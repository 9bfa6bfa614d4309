"""Plain lines about a long search, with an estimate of what is left."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    """Prints one line when a variant is finished.

    Args:
      is_quiet: print nothing.
      stream: where to; standard error by default, so that results can be piped.
    """

    def __init__(self, is_quiet: bool = False, stream: TextIO | None = None):
        self._is_quiet = is_quiet
        self._stream = stream or sys.stderr
        self._total = 0
        self._done = 0
        self._begin = time.monotonic()

    def say(self, text: str) -> None:
        """Prints a line."""
        if not self._is_quiet:
            print(text, file=self._stream, flush=True)

    def start(self, total: int) -> None:
        """Sets how many variants are to be tried from now on."""
        self._total, self._done, self._begin = total, 0, time.monotonic()

    def finish(self, what: str) -> None:
        """Counts a variant and prints it with the time that is left."""
        self._done += 1
        left = self._total - self._done
        each = (time.monotonic() - self._begin) / self._done
        rest = f"about {duration(left * each)} left" if left else "done"
        self.say(f"[{self._done}/{self._total}] {what} ({rest})")


def duration(seconds: float) -> str:
    """A time a person reads: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
