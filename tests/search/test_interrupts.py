import os
import signal
import threading

import pytest

from tfopt.search import interrupts


class Interrupted:
    """Gets a SIGINT in its finalizer, where Python drops exceptions."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_is_raised_when_asked():
    with interrupts.remembered() as ask:
        ask()
        thing = Interrupted()
        del thing
        with pytest.raises(KeyboardInterrupt):
            ask()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_raised_at_once():
    with pytest.raises(KeyboardInterrupt), interrupts.remembered():
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_caller_stays():
    calls = []
    signal.signal(signal.SIGINT, lambda *_: calls.append("caller's"))
    try:
        with interrupts.remembered() as ask:
            os.kill(os.getpid(), signal.SIGINT)
            ask()
        assert calls == ["caller's"]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_get_nothing_to_remember():
    seen = []

    def run():
        with interrupts.remembered() as ask:
            seen.append(ask())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [None]
