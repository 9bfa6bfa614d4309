"""Holding back what other libraries print about their own insides."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator


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

    It comes to standard error at the end, so that a log keeps it.

    Yields:
      A list that has the lines after the block.
    """
    lines: list[str] = []
    with tempfile.TemporaryFile() as file:
        sys.stderr.flush()
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
