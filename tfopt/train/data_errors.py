"""Errors of Keras and TensorFlow that data can be blamed for, as sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tfopt.errors import InputError, first_line


@contextlib.contextmanager
def told(subject: str) -> Iterator[None]:
    """Turns what Keras and TensorFlow raise about data into an `InputError`.

    Errors of callbacks pass as they are.

    Args:
      subject: what is trained, as the sentence begins.
    """
    import tensorflow as tf

    try:
        yield
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, tf.errors.InvalidArgumentError) as error:
        if _is_of_callback(error):
            raise
        raise InputError(f"{subject} cannot be trained on these data: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """The line that names the cause; errors inside a graph come with a whole trace."""
    before, found, _ = str(error).partition("[[{{node")
    lines = [line.strip() for line in before.splitlines() if line.strip()]
    return lines[-1] if found and lines else first_line(error)


def _is_of_callback(error: BaseException) -> bool:
    """Whether an error was raised by a hook of a callback."""
    trace = error.__traceback__
    while trace is not None:
        name, owner = trace.tb_frame.f_code.co_name, trace.tb_frame.f_locals.get("self")
        is_hook = name.startswith("on_") and hasattr(owner, "set_model")
        if is_hook and not hasattr(owner, "callbacks"):  # a list of callbacks only passes it on
            return True
        trace = trace.tb_next
    return False
