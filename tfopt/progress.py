"""What a long search is doing, how long it still takes, and the best so far."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO

BAR_WIDTH = 20
COUNT_S = 5.0
CLEAR_LINE = "\r\x1b[K"


class Progress:
    """Prints one line when a variant is finished; a terminal also gets a bar below the lines.

    Args:
      is_quiet: print nothing.
      stream: where to; standard error by default, so that results can be piped.
    """

    def __init__(self, is_quiet: bool = False, stream: TextIO | None = None):
        self._is_quiet = is_quiet
        self._stream = stream or sys.stderr
        self._has_bar = not is_quiet and self._stream.isatty()
        self._total = self._done = self._num_new = 0
        self._begin = time.monotonic()
        self._current = self._best = ""

    def say(self, text: str) -> None:
        """Prints a line."""
        if not self._is_quiet:
            clear = CLEAR_LINE if self._has_bar else ""
            print(f"{clear}{text}", file=self._stream, flush=True)
            self._draw()

    def counter(self, what: str) -> Callable[[int], None]:
        """A function that takes a growing number of things and prints it every few seconds."""
        last = time.monotonic()

        def show(count: int) -> None:
            nonlocal last
            if time.monotonic() - last >= COUNT_S:
                last = time.monotonic()
                self.say(f"{count} {what} so far …")

        return show

    def start(self, total: int) -> None:
        """Sets how many variants are to be tried from now on."""
        self._total, self._done, self._num_new = total, 0, 0
        self._begin = time.monotonic()

    def doing(self, what: str) -> None:
        """Shows in the bar what is being done now."""
        self._current = what
        self._draw()

    def finish(self, what: str, best: str = "", is_new: bool = True) -> None:
        """Counts a variant and prints it with the time that is left.

        Args:
          what: about the variant.
          best: the best so far.
          is_new: False for what an earlier run had finished: it says nothing about time.
        """
        self._done += 1
        self._num_new += is_new
        self._best = best or self._best
        self._current = ""
        left = self._total - self._done
        self.say(f"[{self._done}/{self._total}] {what} ({self._time_left() if left else 'done'})")

    def close(self) -> None:
        """Removes the bar."""
        if self._has_bar:
            print(CLEAR_LINE, end="", file=self._stream, flush=True)
            self._has_bar = False

    def _time_left(self) -> str:
        if not self._num_new:
            return f"{self._total - self._done} left"
        each = (time.monotonic() - self._begin) / self._num_new
        return f"about {duration((self._total - self._done) * each)} left"

    def _draw(self) -> None:
        if not (self._has_bar and self._total):
            return
        filled = BAR_WIDTH * self._done // self._total
        parts = [f"{self._done}/{self._total}", self._current, self._time_left()]
        parts += [f"best so far: {self._best}" if self._best else ""]
        text = f"{'█' * filled}{'░' * (BAR_WIDTH - filled)} {' · '.join(filter(None, parts))}"
        columns = shutil.get_terminal_size().columns
        print(f"{CLEAR_LINE}{text[: columns - 1]}", end="", file=self._stream, flush=True)


def duration(seconds: float) -> str:
    """A time a person reads: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
