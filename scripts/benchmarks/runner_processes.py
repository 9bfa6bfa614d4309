"""One process for each thing that is timed; all stay alive and all but one are idle.

Runtimes keep pools of threads that spin for a while after each call. In one process, the pools of
the runtime before slow down the runtime that is timed, by up to a half: so each gets a process and
is asked for a block of calls, which begins with calls that are not counted and ends when the
threads sleep.
"""

import importlib
import itertools
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

import tfopt
from tfopt.measure import latency

_MIN_WARM_UP_CALLS = 10

Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Any]


class RunnerError(RuntimeError):
    """A runner cannot be loaded or does not run; the message says why."""


def open_by_hand(runtime: str, folder: pathlib.Path, name: str, num_threads: int) -> Run:
    """Opens what a script in `handwritten/` converted."""
    module = importlib.import_module(f"handwritten.with_{runtime}")
    return module.open_runner(folder, name, num_threads)


def open_by_tfopt(folder: pathlib.Path, num_threads: int) -> Run:
    """Opens an artifact of tfopt; the whole of `session.run` is timed."""
    return tfopt.load(folder, num_threads).run


class RunnerProcess:
    """A process with one loaded runner, waiting for requests.

    Args:
      log: file that gets everything the process prints.
      examples: inputs of one inference each, used in turn.
      open_runner: a function of a module; called in the process.
      *args: its arguments.

    Raises:
      RunnerError: when the runner cannot be loaded.
    """

    def __init__(
        self,
        log: pathlib.Path,
        examples: Sequence[Arrays],
        open_runner: Callable[..., Run],
        *args: object,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, log, examples, open_runner, args), daemon=True
        )
        self._process.start()
        theirs.close()
        self._receive()

    def warm_up(self, at_least_s: float) -> float:
        """Calls for so long, and at least ten times; returns seconds of one call."""
        return self._call("warm_up", at_least_s)

    def time_block(self, settle_s: float, num_calls: int) -> list[float]:
        """Times so many calls after uncounted calls for `settle_s`; returns seconds of each."""
        return self._call("time_block", settle_s, num_calls)

    def first_outputs(self, examples: Sequence[Arrays]) -> np.ndarray:
        """Returns the first output for each of the examples."""
        return self._call("first_outputs", examples)

    def close(self) -> None:
        """Ends the process."""
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _call(self, method: str, *args: object) -> Any:
        self._connection.send((method, args))
        return self._receive()

    def _receive(self) -> Any:
        try:
            is_error, value = self._connection.recv()
        except EOFError:
            self._process.join(timeout=10)
            raise RunnerError(f"its process ended with {self._process.exitcode}") from None
        if is_error:
            raise RunnerError(value)
        return value


class _Server:
    """Answers the requests; its methods are those of `RunnerProcess`."""

    def __init__(self, run: Run, examples: Sequence[Arrays]) -> None:
        self._run = run
        self._next = itertools.cycle(examples).__next__

    def _timed_call(self) -> float:
        example, run = self._next(), self._run
        begin = time.perf_counter()
        run(example)
        return time.perf_counter() - begin

    def warm_up(self, at_least_s: float) -> float:
        end = time.perf_counter() + at_least_s
        times: list[float] = []
        while len(times) < _MIN_WARM_UP_CALLS or time.perf_counter() < end:
            times.append(self._timed_call())
        latency.rest()
        return float(np.median(times[len(times) // 2 :]))

    def time_block(self, settle_s: float, num_calls: int) -> list[float]:
        end = time.perf_counter() + settle_s
        self._timed_call()
        while time.perf_counter() < end:
            self._timed_call()
        times = [self._timed_call() for _ in range(num_calls)]
        latency.rest()
        return times

    def first_outputs(self, examples: Sequence[Arrays]) -> np.ndarray:
        return np.concatenate([_first(self._run(example)) for example in examples])


def _first(outputs: Any) -> np.ndarray:
    return np.array(outputs[0] if isinstance(outputs, list) else next(iter(outputs.values())))


def _serve(
    connection: Connection,
    log: pathlib.Path,
    examples: Sequence[Arrays],
    open_runner: Callable[..., Run],
    args: Sequence[object],
) -> None:
    redirect_output(log)
    server = None
    while True:
        try:
            if server is None:
                server, value = _Server(open_runner(*args), examples), None
            else:
                method, method_args = connection.recv()
                value = getattr(server, method)(*method_args)
            answer = (False, value)
        except EOFError:
            return
        except Exception as error:  # whatever a runtime raises becomes the runner's reason
            answer = (True, f"{type(error).__name__}: {str(error).strip()[:300]}")
        connection.send(answer)
        if server is None:
            return


def redirect_output(log: pathlib.Path) -> None:
    """Sends what this process and its libraries print to the end of a file."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
