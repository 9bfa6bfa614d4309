"""The only clock: candidates and baseline timed side by side.

Blocks of calls alternate in random order, so that a machine that becomes slower for a second does
so for all of them. Some runtimes keep their threads spinning after a call (ONNX Runtime's for
about 50 ms), which slows down whatever runs next: so models of different runtimes are timed in
processes of their own that take turns (`tfopt.search.remote`), a turn ends only when the threads
sleep, and the first calls of each block are kept apart. Cores are not equally fast, least of all
in virtual machines: where a model uses only some of them, all models use the same ones in a round.
Raw values are kept: statistics are derived later.

Learned from pyperf (raw values and warm-ups are kept) and MLPerf LoadGen (how many values carry a
percentile).
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tfopt.errors import InputError
from tfopt.measure import environment, statistics
from tfopt.runtimes.base import Arrays

BLOCK_S = 0.04  # about as long as the scheduler takes to spread threads over the cores again
MAX_BLOCK_CALLS = 200
WINDOW = 4
MIN_WARM_UP_S = 0.1
MIN_BLOCKS = 10
MAX_BLOCKS = 1000  # the interval looks at each pair of them
STABLE = 0.05
MAX_WARM_UP_S = 20.0
REST_STEP_S = 0.001
MAX_REST_S = 0.3
MAX_S = 6.0
INTERVAL_WIDTH = 0.02
CONFIDENCE = 0.97  # of each look at the ratio, for 0.95 of the last one


@dataclasses.dataclass(frozen=True)
class Timing:
    """Raw times of one model, in seconds.

    Attributes:
      warm_up_s: the calls before the model was stable; the first contains compilation.
      num_settling: how many calls came before those of each block, after a change of model; they
        are in no statistic.
      blocks_s: one list for each block; block i of every model of a run was taken at one time.
      steal_share: of the processor time that a hypervisor gave to others during the run, 0…1.
    """

    warm_up_s: list[float]
    num_settling: list[int]
    blocks_s: list[list[float]]
    steal_share: float = 0.0

    @property
    def values_s(self) -> list[float]:
        """All counted times."""
        return list(itertools.chain.from_iterable(self.blocks_s))

    @property
    def median_s(self) -> float:
        """Median of all counted times."""
        return float(np.median(self.values_s))

    def summary(self) -> dict[str, float | None]:
        """Median and percentiles in milliseconds; None where the sample does not carry one.

        `median_low_ms` and `median_high_ms` are bounds of the typical time of this run.
        """
        values = self.values_s
        found = {f"p{q}_ms": statistics.percentile(values, q) for q in (50, 90, 99)}
        found["median_ms"] = found.pop("p50_ms")
        found |= {"median_low_ms": None, "median_high_ms": None}
        if len(self.blocks_s) >= MIN_BLOCKS:
            typical = statistics.typical_time(self.blocks_s)
            found |= {"median_low_ms": typical.low, "median_high_ms": typical.high}
        return {name: None if value is None else value * 1e3 for name, value in found.items()}

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Timing:
        """Reads what `to_json` wrote."""
        return cls(**value)


def rest() -> None:
    """Returns when the threads of this process sleep, or after 0.3 s."""
    end = time.perf_counter() + MAX_REST_S
    while environment.other_threads_run() and time.perf_counter() < end:
        time.sleep(REST_STEP_S)


class Timer(Protocol):
    """Something whose calls can be timed, here or in another process."""

    def warm_up(self) -> list[float]:
        """Calls until it is stable; returns the seconds of each call, once threads sleep."""

    def block(
        self, count: int, settle_s: float, cores: Collection[int] | None
    ) -> tuple[int, list[float]]:
        """Calls for so long to settle, then `count` times, on these cores only or on any.

        Returns:
          How many calls it took to settle, and the seconds of the others. The threads that it used
          sleep by then, so that they disturb nobody else's turn.
        """


class Runnable(Protocol):
    """A session, or something else that runs."""

    @property
    def run(self) -> Callable[[Arrays], Any]:
        """Runs on one batch of inputs and returns when the outputs are there."""


class SessionTimer:
    """Times a session of this process, with real inputs in turn."""

    def __init__(self, session: Runnable, batches: Sequence[Arrays]):
        self.use(session)
        self._num_batches = len(batches)
        self._batches = itertools.cycle(batches)

    def use(self, session: Runnable) -> None:
        """Goes on with another session of the same model, and with the next inputs."""
        self._run = session.run

    def call(self) -> float:
        """Runs the next batch and returns the seconds until its outputs were host arrays."""
        batch = next(self._batches)
        begin = time.perf_counter()
        self._run(batch)
        return time.perf_counter() - begin

    def warm_up(self) -> list[float]:
        """Every batch once, then until the median of a window is within 5 % of the one before."""
        times = [self.call() for _ in range(self._num_batches)]
        num_first = len(times)
        begin = time.perf_counter()
        while time.perf_counter() - begin < MAX_WARM_UP_S:
            times += [self.call() for _ in range(WINDOW)]
            if len(times) - num_first < 2 * WINDOW or time.perf_counter() - begin < MIN_WARM_UP_S:
                continue
            last = float(np.median(times[-WINDOW:]))
            before = float(np.median(times[-2 * WINDOW : -WINDOW]))
            if abs(last - before) <= STABLE * before:
                break
        rest()
        return times

    def block(
        self, count: int, settle_s: float, cores: Collection[int] | None = None
    ) -> tuple[int, list[float]]:
        """At least one call and `settle_s`, then `count` calls, then `rest`."""
        with environment.only_on(cores):
            end, num_settling = time.perf_counter() + settle_s, 0
            while not num_settling or time.perf_counter() < end:
                self.call()
                num_settling += 1
            times = [round(self.call(), 9) for _ in range(count)]  # the clock counts nanoseconds
            rest()
        return num_settling, times


def check_limits(max_s: float, interval_width: float) -> None:
    """Checks when a timing is to end.

    Raises:
      InputError: when a number is negative or none.
    """
    for name, value in (("max_timing_s", max_s), ("interval_width", interval_width)):
        if not value >= 0:
            raise InputError(f"{name} is {value}; expected 0 or more.")


def time_interleaved(
    timers: Mapping[str, Timer],
    *,
    seed: int = 0,
    max_s: float = MAX_S,
    interval_width: float = INTERVAL_WIDTH,
    block_s: float = BLOCK_S,
    num_threads: int | None = None,
) -> dict[str, Timing]:
    """Times models in alternating blocks.

    Args:
      timers: by name; the first is what the others are compared with.
      seed: of the order.
      max_s: stop after this many seconds, though not before ten blocks each.
      interval_width: stop when the interval of each ratio to the first, as `speedup` gives it, is
        narrower than this share of it.
      block_s: seconds of a block, about, and of the uncounted calls before it.
      num_threads: that the models compute with. If there are more cores, each round uses as many
        of them, those that were least busy since the last one. Blocks are a quarter as long then
        and the uncounted calls a sixteenth, since threads need not spread over the cores first.

    Returns:
      The raw times of each model.
    """
    picker, settle_s = _CorePicker(num_threads, seed), block_s
    if picker.is_choosing:
        block_s, settle_s = block_s / 4, block_s / 16
    warm_up = {name: timer.warm_up() for name, timer in timers.items()}
    per_block = {
        name: max(1, min(MAX_BLOCK_CALLS, round(block_s / max(np.median(times[-WINDOW:]), 1e-7))))
        for name, times in warm_up.items()
    }
    order, shuffle = list(timers), random.Random(seed).shuffle
    settling: dict[str, list[int]] = {name: [] for name in timers}
    blocks: dict[str, list[list[float]]] = {name: [] for name in timers}
    begin, cpu_before = time.perf_counter(), environment.cpu_times()
    num_at_next_look = MIN_BLOCKS
    for num_blocks in range(1, MAX_BLOCKS + 1):
        shuffle(order)
        cores = picker.pick()
        for name in order:
            num_settling, times = timers[name].block(per_block[name], settle_s, cores)
            settling[name].append(num_settling)
            blocks[name].append(times)
        if num_blocks >= MIN_BLOCKS and time.perf_counter() - begin > max_s:
            break
        if num_blocks >= num_at_next_look:
            if _is_narrow(blocks, interval_width):
                break
            num_at_next_look = max(num_blocks + 5, int(1.1 * num_blocks))
    total, steal = (
        after - before for before, after in zip(cpu_before, environment.cpu_times(), strict=True)
    )
    share = steal / total if total else 0.0
    return {name: Timing(warm_up[name], settling[name], blocks[name], share) for name in timers}


def speedup(baseline: Timing, candidate: Timing) -> statistics.Interval:
    """How many times faster the candidate is, with its 95 % interval; taken in one run.

    A timing that ends as soon as the interval is narrow ends by preference where the rounds agree
    by chance: in simulations 95 % intervals then held the truth in 93 to 95 % of the runs. That it
    comes right in the limit is shown by Chow & Robbins 1965, "On the asymptotic theory of
    fixed-width sequential confidence intervals for the mean"; for the few rounds that a timing
    has, intervals of 97 % make up for it.
    """
    return statistics.paired_ratio(baseline.blocks_s, candidate.blocks_s, CONFIDENCE)


class _CorePicker:
    """Chooses cores for one round after the other."""

    def __init__(self, num_threads: int | None, seed: int):
        self._cores, self._rng = environment.cores(), random.Random(seed)
        self._count = num_threads or len(self._cores)
        self._busy_before = environment.busy_times()

    @property
    def is_choosing(self) -> bool:
        """Whether there are more cores than threads."""
        return environment.CAN_CHOOSE_CORES and self._count < len(self._cores)

    def pick(self) -> list[int] | None:
        """The cores that were least busy since the last call; None where all are needed."""
        if not self.is_choosing:
            return None
        busy, before = environment.busy_times(), self._busy_before
        self._busy_before = busy
        self._rng.shuffle(self._cores)
        self._cores.sort(key=lambda core: busy.get(core, 0) - before.get(core, 0))
        # Threads of one physical core slow each other down: take one of each core first.
        num_taken: dict[str, int] = {}
        turns = {}
        for core in self._cores:
            physical = environment.physical_core(core)
            turns[core] = num_taken[physical] = num_taken.get(physical, 0) + 1
        return sorted(self._cores, key=turns.__getitem__)[: self._count]


def _is_narrow(blocks: Mapping[str, list[list[float]]], width: float) -> bool:
    baseline, *others = blocks.values()
    for other in others:
        ratio = statistics.paired_ratio(baseline, other, CONFIDENCE)
        if ratio.high - ratio.low > width * ratio.estimate:
            return False
    return True
