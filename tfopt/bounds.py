"""Where reading stops when data does not: a number of examples, bytes, and room on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from tfopt.casting import Chunk
from tfopt.errors import InputError

MAX_EXAMPLES = 50_000  # as many as the largest common evaluation set, ImageNet's, has
MAX_BYTES = 8 << 30
FREE_BYTES = 1 << 30  # left on the disk, or a twentieth of a small one


class Bound:
    """Cuts a stream of chunks.

    Args:
      max_examples: of a stream that may never end.
      max_bytes: likewise.
      is_endless: whether the stream may never end; others are read to their end.
      folder: where the examples go, whose disk is not to be filled; None for memory.

    Attributes:
      note: why reading stopped before the end, or None.

    Raises:
      InputError: when `max_examples` is not positive.
    """

    def __init__(
        self,
        max_examples: int = MAX_EXAMPLES,
        *,
        max_bytes: int = MAX_BYTES,
        is_endless: bool,
        folder: Path | None = None,
    ):
        if max_examples < 1:
            raise InputError(f"max_examples is {max_examples}; expected at least 1.")
        self._max_examples, self._max_bytes = max_examples, max_bytes
        self._is_endless, self._folder = is_endless, folder
        self.note: str | None = None

    def __call__(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks until a bound is reached.

        Raises:
          InputError: when the disk has no room for examples whose number is known.
        """
        count = num_bytes = 0
        for chunk in chunks:
            size = sum(array.nbytes for array in chunk.values())
            if self._is_full(size):
                if not (self._is_endless and count):
                    raise InputError(
                        f"The disk of {self._folder} has less than 1 GiB left for the data; free "
                        "some, or choose another output folder."
                    )
                self._stop(count, "since the disk is nearly full")
                return
            length = len(next(iter(chunk.values())))
            left = self._max_examples - count if self._is_endless else length
            if not left or (self._is_endless and count and num_bytes + size > self._max_bytes):
                reason = f"since they take {num_bytes / 1e9:.1f} GB" if left else ""
                self._stop(count, reason)
                return
            if left < length:
                yield {name: array[:left] for name, array in chunk.items()}
                self._stop(count + left, "")
                return
            yield chunk
            count, num_bytes = count + length, num_bytes + size

    def _stop(self, count: int, reason: str) -> None:
        advice = "" if reason else "; max_examples sets how many are read"
        self.note = (
            f"Reading the data stopped after {count} examples{reason and ', ' + reason}; "
            f"there are more{advice}."
        )

    def _is_full(self, size: int) -> bool:
        if self._folder is None:
            return False
        disk = shutil.disk_usage(self._folder)
        return disk.free < size + min(FREE_BYTES, disk.total // 20)
