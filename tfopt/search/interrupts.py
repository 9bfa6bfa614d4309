"""An interrupt that cannot get lost."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def remembered() -> Iterator[Callable[[], None]]:
    """Remembers SIGINT within the context; yields a function that raises it once more.

    Python drops a KeyboardInterrupt that is raised in a finalizer or a callback of C code and only
    prints it (documentation of `sys.unraisablehook`), and libraries catch it while they are
    imported. A long run asks between its steps, so that it ends at the next one at the latest.

    Nothing is remembered outside the main thread, which alone gets signals, and where the caller
    has a handler of its own: the caller decides then.

    Yields:
      A function that raises KeyboardInterrupt if a SIGINT has come.
    """
    is_ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    has_come = False

    def handle(number: int, frame: object) -> None:
        nonlocal has_come
        has_come = True
        raise KeyboardInterrupt

    def ask() -> None:
        if has_come:
            raise KeyboardInterrupt

    if is_ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield ask
    finally:
        if is_ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
