"""Refuses data that does not end before it fills the disk or the memory."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from tfopt.dataset.casting import Chunk
from tfopt.errors import InputError

MAX_EXAMPLES = 50_000  # as many as the largest common evaluation set, ImageNet's, has
MAX_BYTES = 4 << 30
FREE_BYTES = 1 << 30  # left on the disk, or a twentieth of a small one


def bounded(
    chunks: Iterator[Chunk], *, has_end: bool = True, folder: Path | None = None
) -> Iterator[Chunk]:
    """The chunks as they are.

    A stream that may never end is not cut short: one that repeats itself would bring the same
    examples again, for calibration and for evaluation.

    Args:
      chunks: of examples.
      has_end: whether the stream is known to end.
      folder: where the examples go, whose disk is not to be filled; None for memory.

    Raises:
      InputError: when a stream that may never end has more than `MAX_EXAMPLES` examples or
        `MAX_BYTES`, or the disk has no room.
    """
    count = num_bytes = 0
    for chunk in chunks:
        count += len(next(iter(chunk.values())))
        num_bytes += sum(array.nbytes for array in chunk.values())
        if not has_end and (count > MAX_EXAMPLES or num_bytes > MAX_BYTES):
            raise InputError(
                f"The data goes on after {count} examples ({num_bytes / 1e9:.1f} GB) and may never "
                "end; limit it with itertools.islice or take, or pass arrays, a PyDataset or a "
                "tf.data.Dataset whose length is known (tf.data.experimental.assert_cardinality)."
            )
        if folder is not None:
            disk = shutil.disk_usage(folder)
            if disk.free < min(FREE_BYTES, disk.total // 20):
                raise InputError(
                    f"The disk of {folder} is nearly full and has no room for the data; free some "
                    "space, or choose another output folder."
                )
        yield chunk
