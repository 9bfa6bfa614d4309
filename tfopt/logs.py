"""Holding back what other libraries print about their own insides."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Inside, the named loggers (the root logger is "") let errors through and nothing else."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def copied_stderr() -> Iterator[list[str]]:
    """What the process and its libraries write to standard error inside, kept as lines.

    It goes to standard error as well: at once where that is a file, else at the end.

    Yields:
      A list that has the lines after the block.
    """
    lines: list[str] = []
    sys.stderr.flush()
    if stat.S_ISREG(os.fstat(2).st_mode):  # a worker's log: it keeps what an abort leaves
        begin = os.fstat(2).st_size
        try:
            yield lines
        finally:
            sys.stderr.flush()
            with Path("/proc/self/fd/2").open("rb") as log:
                log.seek(begin)
                lines += log.read().decode(errors="replace").splitlines()
        return
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stderr.flush()
            os.dup2(before, 2)
            file.seek(0)
            text = file.read()
            with os.fdopen(before, "wb") as stream:
                stream.write(text)
            lines += text.decode(errors="replace").splitlines()
