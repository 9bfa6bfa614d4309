"""The only clock: candidates and baseline timed side by side in one process.

Blocks of calls alternate in random order, so that a machine that becomes slower for a second does
so for all of them; after each change of model the first calls are kept apart, since worker threads
of the previous runtime may still spin and caches are cold. Raw values are kept: statistics are
derived later.

Learned from pyperf (raw values and warm-ups are kept) and MLPerf LoadGen (how many values carry a
percentile).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfopt.measure import environment, statistics
from tfopt.runtimes.base import Arrays, Session

MIN_BLOCK_S = 0.02
MIN_BLOCK_CALLS = 4
SETTLE_S = 0.003
MIN_BLOCKS = 10
MAX_BLOCKS = 80
STABLE = 0.05
MAX_WARM_UP_S = 20.0


@dataclasses.dataclass(frozen=True)
class Timing:
    """Raw times of one model, in seconds.

    Attributes:
      warm_up_s: the calls before the model was stable; the first contains compilation.
      settle_s: the first calls of each block after a change of model; in no statistic.
      blocks_s: one list for each block; block i of every model of a run was taken at one time.
      steal_share: of the processor time that a hypervisor gave to others during the run, 0…1.
    """

    warm_up_s: list[float]
    settle_s: list[list[float]]
    blocks_s: list[list[float]]
    steal_share: float = 0.0

    @property
    def values_s(self) -> list[float]:
        """All counted times."""
        return list(itertools.chain.from_iterable(self.blocks_s))

    def summary(self) -> dict[str, float | None]:
        """Median and percentiles in milliseconds; None where the sample does not carry one."""
        values = self.values_s

        def milliseconds(q: int) -> float | None:
            value = statistics.percentile(values, q)
            return None if value is None else value * 1e3

        return {
            "median_ms": milliseconds(50),
            "p90_ms": milliseconds(90),
            "p99_ms": milliseconds(99),
        }

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Timing:
        """Reads what `to_json` wrote."""
        return cls(**value)


def time_sessions(
    sessions: Mapping[str, Session],
    batches: Sequence[Arrays],
    *,
    seed: int = 0,
    max_s: float = 4.0,
    interval_width: float = 0.03,
) -> dict[str, Timing]:
    """Times sessions on real inputs, interleaved.

    Args:
      sessions: by name; the first is what the others are compared with.
      batches: inputs, used in turn.
      seed: of the order.
      max_s: stop after this many seconds, though not before ten blocks each.
      interval_width: stop when the 95 % interval of each ratio to the first session is narrower.

    Returns:
      The raw times of each session.
    """
    calls = {name: _caller(session, batches) for name, session in sessions.items()}
    warm_up = {name: _warm_up(call) for name, call in calls.items()}
    per_block = {
        name: max(MIN_BLOCK_CALLS, round(MIN_BLOCK_S / max(min(times[-3:]), 1e-7)))
        for name, times in warm_up.items()
    }
    order, shuffle = list(calls), random.Random(seed).shuffle
    settle: dict[str, list[list[float]]] = {name: [] for name in calls}
    blocks: dict[str, list[list[float]]] = {name: [] for name in calls}
    begin, cpu_before = time.perf_counter(), environment.cpu_times()
    for index in range(MAX_BLOCKS):
        shuffle(order)
        for name in order:
            settled, times = _block(calls[name], per_block[name])
            settle[name].append(settled)
            blocks[name].append(times)
        if index + 1 >= MIN_BLOCKS:
            if time.perf_counter() - begin > max_s:
                break
            if (index + 1) % 5 == 0 and _is_narrow(blocks, interval_width):
                break
    total, steal = (
        after - before for before, after in zip(cpu_before, environment.cpu_times(), strict=True)
    )
    share = steal / total if total else 0.0
    return {name: Timing(warm_up[name], settle[name], blocks[name], share) for name in calls}


def speedup(baseline: Timing, candidate: Timing, seed: int = 0) -> statistics.Interval:
    """How many times faster the candidate is, with its 95 % interval; taken in one run."""
    return _ratio(baseline.blocks_s, candidate.blocks_s, seed)


def _ratio(
    baseline: list[list[float]], candidate: list[list[float]], seed: int = 0
) -> statistics.Interval:
    return statistics.median_ratio(
        [np.array(block) for block in baseline], [np.array(block) for block in candidate], seed=seed
    )


def _caller(session: Session, batches: Sequence[Arrays]) -> Callable[[], float]:
    run, inputs, clock = session.run, itertools.cycle(batches), time.perf_counter

    def call() -> float:
        batch = next(inputs)
        begin = clock()
        run(batch)
        return clock() - begin

    call.num_batches = len(batches)  # type: ignore[attr-defined]
    return call


def _warm_up(call: Callable[[], float]) -> list[float]:
    """Calls until the median of one window is within 5 % of the window before."""
    times: list[float] = []
    # Every batch once: XLA compiles for each new shape.
    window = max(5, call.num_batches)  # type: ignore[attr-defined]
    begin = time.perf_counter()
    while time.perf_counter() - begin < MAX_WARM_UP_S:
        times += [call() for _ in range(window)]
        if len(times) >= 3 * window and time.perf_counter() - begin > 0.1:
            last, before = (
                statistics.percentile(part, 50)
                for part in (times[-window:], times[-2 * window : -window])
            )
            if last is not None and before is not None and abs(last - before) <= STABLE * before:
                break
    return times


def _block(call: Callable[[], float], count: int) -> tuple[list[float], list[float]]:
    settled: list[float] = []
    while not settled or sum(settled) < SETTLE_S:
        settled.append(call())
    return settled, [call() for _ in range(count)]


def _is_narrow(blocks: Mapping[str, list[list[float]]], width: float) -> bool:
    baseline, *others = blocks.values()
    for other in others:
        ratio = _ratio(baseline, other)
        if ratio.high - ratio.low > width * ratio.estimate:
            return False
    return True
