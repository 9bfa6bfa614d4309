"""The three ways in which tfopt says no, and what is kept of the errors of other libraries."""

from __future__ import annotations

import re

MAX_REASON = 300
"""Characters that are kept of another library's message."""


class InputError(ValueError):
    """A flag, model or data set is wrong; commands end with status 2.

    The message is one sentence: what came, what was expected, how to fix it. Arguments stand in
    backquotes (`resume=True`), which commands print as flags (--resume).
    """


class ConversionError(RuntimeError):
    """A runtime cannot take this model; the variant becomes a row with this reason."""


class ResultError(RuntimeError):
    """The result that was asked for could not be produced; commands end with status 1."""


_UNTELLING = re.compile(
    r"^<[^:]*$|error:$|defined at|^in user code:$|most recent call last"
    r"|^Exception encountered when calling|^(Error when deserializing .* )?(using )?config="
    # Of OpenVINO, where in its source an error was raised and caught.
    r"|^Exception from \S+:\d+:$|^Check '.*' failed at \S+:\d+:$|^FrontEnd API failed with "
    r"|^Model wasn't fully converted|^\S+ with a message:$|^Summary:$"
    # Of MLIR, which function it was in.
    r"|^(failed while converting: )?'\w+': ?$"
)
_PLACE = re.compile(r"^(loc\(.*?\): |<unknown>:\d+: |error: |-- )+")
_STYLE = re.compile(r"\x1b\[[0-9;]*m")  # Keras prints in bold


def first_line(error: BaseException) -> str:
    """The first line of an error's message that tells something, or the error's type.

    TensorFlow begins with "Graph execution error:" and with where nodes were defined, Python line
    by Python line; Keras with which layer was called, or with the whole configuration of one;
    OpenVINO with lines of its source.
    """
    lines = [_PLACE.sub("", line.strip()) for line in _STYLE.sub("", str(error)).splitlines()]
    telling, is_code = [], False
    for line in lines:
        is_frame = line.startswith('File "')
        if line and not (is_frame or is_code or _UNTELLING.search(line)):
            telling.append(line)
        is_code = is_frame  # or nothing, where the source is not there
    line = next(iter([*telling, *filter(None, lines)]), type(error).__name__)
    return line.removeprefix("Exception encountered: ")
