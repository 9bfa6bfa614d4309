"""Where reading stops when data does not: a number of examples, bytes, and room on the disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from tfopt.dataset.casting import Chunk
from tfopt.errors import InputError

MAX_EXAMPLES = 50_000  # as many as the largest common evaluation set, ImageNet's, has
MAX_BYTES = 4 << 30
FREE_BYTES = 1 << 30  # left on the disk, or a twentieth of a small one
ADVICE = (
    "pass arrays, a PyDataset or a tf.data.Dataset of known length (assert_cardinality) to have all"
)


class Bound:
    """Cuts a stream of chunks.

    Args:
      max_examples: of a stream that may never end.
      max_bytes: likewise.
      is_endless: whether the stream may never end; others are read to their end.
      folder: where the examples go, whose disk is not to be filled; None for memory.

    Attributes:
      note: why reading stopped before the end, or None.

    """

    def __init__(
        self,
        *,
        is_endless: bool,
        max_examples: int = MAX_EXAMPLES,
        max_bytes: int = MAX_BYTES,
        folder: Path | None = None,
    ):
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
                        f"The disk of {self._folder} is nearly full and has no room for the data; "
                        "free some space, or choose another output folder."
                    )
                self._stop(count, " and before the disk is full")
                return
            length = len(next(iter(chunk.values())))
            left = self._max_examples - count if self._is_endless else length
            if not left or (self._is_endless and count and num_bytes + size > self._max_bytes):
                self._stop(count, f" of {num_bytes / 1e9:.1f} GB in all" if left else "")
                return
            if left < length:
                yield {name: array[:left] for name, array in chunk.items()}
                self._stop(count + left, "")
                return
            yield chunk
            count, num_bytes = count + length, num_bytes + size

    def _stop(self, count: int, reason: str) -> None:
        self.note = (
            f"Reading stopped after {count} examples{reason}, since the data may never end; "
            f"{ADVICE}."
        )

    def _is_full(self, size: int) -> bool:
        if self._folder is None:
            return False
        disk = shutil.disk_usage(self._folder)
        return disk.free < size + min(FREE_BYTES, disk.total // 20)
