"""How many requests a model answers, and how long each waits when many come at once.

Two kinds of load, because they hide different things (Schroeder, Wierman & Harchol-Balter 2006,
"Open versus closed: a cautionary tale"): in a closed loop a fixed number of clients each wait for
their answer before they ask again, so that a slow server is asked less; it tells the most that can
be answered. In an open loop requests come when they come, at random moments (Poisson, as in the
server scenario of MLPerf: Reddi et al. 2020), and each waits from the moment at which it was due,
so that a pause delays and counts for all that came meanwhile ("coordinated omission").

Each client or server has a session of its own, and threads are shared out among them.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.measure import statistics
from tfopt.runtimes.base import Arrays, Session

WARM_UP_RUNS = 5
MAX_BACKLOG_S = 5.0


@dataclasses.dataclass(frozen=True)
class Load:
    """One run under load.

    Attributes:
      concurrency: clients (closed loop) or sessions that serve (open loop).
      arrival_rate_per_s: requests that were due each second; None for a closed loop.
      batch_size: examples in each request.
      seconds: how long requests were sent.
      latencies_s: of each request, from when it was due to its answer.
      num_unanswered: requests that were still waiting 5 s after the last one was due; they are
        in no latency, so that with any of them percentiles are too low.
    """

    concurrency: int
    arrival_rate_per_s: float | None
    batch_size: int
    seconds: float
    latencies_s: list[float]
    num_unanswered: int = 0

    def summary(self) -> dict[str, Any]:
        """Figures of a table row; None where too few requests carry one."""

        def milliseconds(q: int) -> float | None:
            if self.num_unanswered:
                return None
            value = statistics.percentile(self.latencies_s, q) if self.latencies_s else None
            return None if value is None else value * 1e3

        return {
            "concurrency": self.concurrency,
            "arrival_rate_per_s": self.arrival_rate_per_s,
            "batch_size": self.batch_size,
            "throughput_per_s": len(self.latencies_s) * self.batch_size / self.seconds,
            "median_ms": milliseconds(50),
            "p90_ms": milliseconds(90),
            "p99_ms": milliseconds(99),
            "num_unanswered": self.num_unanswered,
        }


def closed_loop(sessions: Sequence[Session], batches: Sequence[Arrays], seconds: float) -> Load:
    """Every client asks again as soon as it has its answer.

    Args:
      sessions: one for each client; they run in threads of this process.
      batches: inputs, taken in turn.
      seconds: how long.
    """
    _check(sessions, batches, seconds)
    _warm_up(sessions, batches)
    found: list[list[float]] = [[] for _ in sessions]
    start = threading.Barrier(len(sessions))
    ends = [0.0] * len(sessions)

    def ask(index: int) -> None:
        inputs, run = itertools.cycle(batches), sessions[index].run
        start.wait()
        now = time.perf_counter()
        end = now + seconds
        while now < end:
            begin = now
            run(next(inputs))
            now = time.perf_counter()
            found[index].append(now - begin)
        ends[index] = now - end

    _run_all([lambda index=index: ask(index) for index in range(len(sessions))])
    # The last answers come a little after the end: that time was worked, too.
    worked = seconds + float(np.mean(ends))
    return Load(len(sessions), None, _size(batches), worked, list(itertools.chain(*found)))


def open_loop(
    sessions: Sequence[Session],
    batches: Sequence[Arrays],
    rate_per_s: float,
    seconds: float,
    seed: int = 0,
) -> Load:
    """Requests are due at random moments, so many a second on average; sessions take them in turn.

    Args:
      sessions: that serve; they run in threads of this process.
      batches: inputs, taken in turn.
      rate_per_s: requests due each second.
      seconds: how long they come.
      seed: of the moments.
    """
    _check(sessions, batches, seconds)
    if not rate_per_s > 0:
        raise InputError(f"The arrival rate is {rate_per_s}; expected a number above 0.")
    _warm_up(sessions, batches)
    gaps = np.random.default_rng(seed).exponential(
        1 / rate_per_s, max(1, round(rate_per_s * seconds))
    )
    due = np.cumsum(gaps)
    waiting: queue.SimpleQueue[tuple[float, Arrays] | None] = queue.SimpleQueue()
    found: list[list[float]] = [[] for _ in sessions]
    is_over = threading.Event()

    def serve(index: int) -> None:
        run = sessions[index].run
        while (request := waiting.get()) is not None:
            if is_over.is_set():
                continue  # drained, not answered
            moment, inputs = request
            run(inputs)
            found[index].append(time.perf_counter() - moment)

    def send() -> None:
        begin = time.perf_counter()
        for moment, inputs in zip(begin + due, itertools.cycle(batches), strict=False):
            while (left := moment - time.perf_counter()) > 0:
                # Sleeping is exact to about 0.1 ms; the rest is waited for awake.
                time.sleep(left - 2e-4 if left > 4e-4 else 0)
            waiting.put((moment, inputs))
        give_up = time.perf_counter() + MAX_BACKLOG_S
        while not waiting.empty() and time.perf_counter() < give_up:
            time.sleep(0.001)
        is_over.set()
        for _ in sessions:
            waiting.put(None)

    _run_all([send, *(lambda index=index: serve(index) for index in range(len(sessions)))])
    latencies = list(itertools.chain(*found))
    return Load(
        len(sessions), float(rate_per_s), _size(batches), float(due[-1]), latencies,
        len(due) - len(latencies),
    )  # fmt: skip


def _check(sessions: Sequence[Session], batches: Sequence[Arrays], seconds: float) -> None:
    if not sessions or not batches:
        raise InputError("A load needs at least one session and one batch of inputs.")
    if not seconds > 0:
        raise InputError(f"The load lasts {seconds} s; expected a number above 0.")


def _warm_up(sessions: Sequence[Session], batches: Sequence[Arrays]) -> None:
    for session, _ in itertools.product(sessions, range(WARM_UP_RUNS)):
        for batch in batches:
            session.run(batch)


def _size(batches: Sequence[Arrays]) -> int:
    shape = np.shape(next(iter(batches[0].values())))
    return shape[0] if shape else 1


def _run_all(functions: Sequence[Any]) -> None:
    """Runs functions in threads and raises the first error of any of them."""
    errors: list[BaseException] = []

    def guarded(function: Any) -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,), daemon=True) for f in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.1)
            if errors:
                raise errors[0]
    if errors:
        raise errors[0]
