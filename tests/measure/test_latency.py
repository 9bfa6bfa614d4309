import hashlib
import itertools
import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tfopt.artifact import Artifact
from tfopt.measure import environment, latency
from tfopt.measure.latency import Timing
from tfopt.runtimes.base import Session
from tfopt.signature import Signature, TensorSpec
from tfopt.variant import Variant

SIGNATURE = Signature("serving_default", (TensorSpec("x", (None,), "float32"),), ())
BATCHES = [{"x": np.full(1, index, np.float32)} for index in range(3)]


class WorkingSession(Session):
    """Does its work and writes down what it was called with, in a log that sessions share."""

    def __init__(self, name, work, log):
        artifact = Artifact(Path(), Variant("float32", "x"), None, "", SIGNATURE, 0, 0, {})
        super().__init__(artifact)
        self._name, self._work, self._log = name, work, log

    def run(self, inputs):
        self._log.append((self._name, int(inputs["x"][0])))
        self._work()
        return {}

    def close(self):
        pass


def sort(times):
    """The same work, done several times."""
    values = np.random.default_rng(0).normal(size=3000)

    def work():
        for _ in range(times):
            np.sort(values)

    return work


def sleep(times):
    return lambda: [time.sleep(0.0005) for _ in range(times)]


def time_work(works, batches=BATCHES, **options):
    """Times works by name; returns the timings and the log of calls."""
    log = []
    timers = {
        name: latency.SessionTimer(WorkingSession(name, work, log), batches)
        for name, work in works.items()
    }
    options = {"max_s": 0.3, "interval_width": 0.2, "block_s": 0.004, **options}
    return latency.time_interleaved(timers, **options), log


def num_calls(timing):
    return len(timing.warm_up_s) + sum(timing.num_settling) + len(timing.values_s)


@pytest.fixture(scope="module")
def three():
    return time_work({"one": sort(1), "two": sort(2), "four": sort(4)})


class TestRatio:
    @pytest.mark.parametrize("kind", [sort, sleep])
    def test_of_the_same_work_done_more_often(self, kind):
        """Loose: the machine is shared, and every call has a cost of its own."""
        timings, _ = time_work({"more": kind(6), "less": kind(2), "again": kind(6)}, max_s=0.5)
        ratio = latency.speedup(timings["more"], timings["less"])
        assert 2 < ratio.estimate < 4.5
        assert ratio.low <= ratio.estimate <= ratio.high
        same = latency.speedup(timings["more"], timings["again"])
        assert 0.6 < same.estimate < 1.6
        back = latency.speedup(timings["less"], timings["more"])
        assert back.estimate == pytest.approx(1 / ratio.estimate)
        assert (back.low, back.high) == pytest.approx((1 / ratio.high, 1 / ratio.low))

    def test_lies_among_those_of_the_rounds(self, three):
        timings, _ = three
        ratio = latency.speedup(timings["four"], timings["one"])
        of_rounds = [
            np.median(four) / np.median(one)
            for four, one in zip(timings["four"].blocks_s, timings["one"].blocks_s, strict=True)
        ]
        assert min(of_rounds) <= ratio.low <= ratio.estimate <= ratio.high <= max(of_rounds)


class TestInterleaving:
    def test_blocks_are_as_many_for_all(self, three):
        timings, _ = three
        assert list(timings) == ["one", "two", "four"]
        counts = {len(timing.blocks_s) for timing in timings.values()}
        assert len(counts) == 1
        assert latency.MIN_BLOCKS <= counts.pop() <= latency.MAX_BLOCKS
        for timing in timings.values():
            assert len(timing.num_settling) == len(timing.blocks_s)
            assert all(timing.num_settling)
            lengths = {len(block) for block in timing.blocks_s}
            assert len(lengths) == 1
            assert 1 <= lengths.pop() <= latency.MAX_BLOCK_CALLS

    def test_every_call_is_kept(self, three):
        timings, log = three
        for name, timing in timings.items():
            assert num_calls(timing) == sum(who == name for who, _ in log)
            assert len(timing.warm_up_s) >= len(BATCHES) + 2 * latency.WINDOW
            assert all(value > 0 for value in timing.warm_up_s + timing.values_s)

    def test_batches_are_used_in_turn(self, three):
        timings, log = three
        for name in timings:
            used = [batch for who, batch in log if who == name]
            assert used == [index % len(BATCHES) for index in range(len(used))]

    def test_one_batch_is_enough(self):
        timings, log = time_work({"one": sort(1)}, BATCHES[:1])
        assert {batch for _, batch in log} == {0}
        assert len(timings["one"].blocks_s) >= latency.MIN_BLOCKS

    def test_warm_up_takes_in_every_batch(self):
        batches = [{"x": np.full(1, index, np.float32)} for index in range(40)]
        timings, _ = time_work({"one": lambda: None}, batches)
        # XLA compiles for each new shape: all of them come first, and then the windows.
        assert len(timings["one"].warm_up_s) >= len(batches) + 2 * latency.WINDOW

    def test_sessions_take_turns_in_a_random_order(self, three):
        """Each block of each session is one run of calls, and no order is the rule."""
        timings, log = three
        num_warm_up = sum(len(timing.warm_up_s) for timing in timings.values())
        turns = iter(name for name, _ in log[num_warm_up:])
        orders = []
        for block in range(len(timings["one"].blocks_s)):
            size_of = {
                name: timing.num_settling[block] + len(timing.blocks_s[block])
                for name, timing in timings.items()
            }
            order = []
            for _ in timings:
                name = next(turns)
                rest = list(itertools.islice(turns, size_of[name] - 1))
                assert set(rest) <= {name}
                order.append(name)
            assert sorted(order) == sorted(timings)
            orders.append(tuple(order))
        assert next(turns, None) is None
        assert len(set(orders)) > 1

    def test_seed_decides_the_order(self):
        def order(seed):
            timings, log = time_work({"a": sort(1), "b": sort(1)}, seed=seed, max_s=0)
            num_warm_up = sum(len(timing.warm_up_s) for timing in timings.values())
            names = [name for name, _ in log[num_warm_up:]]
            return [name for name, _ in itertools.groupby(names)]

        assert order(1) == order(1) != order(2)

    def test_stops_after_the_time_but_not_before_ten_blocks(self):
        timings, _ = time_work({"a": sort(1), "b": sort(1)}, max_s=0, interval_width=0)
        assert len(timings["a"].blocks_s) == latency.MIN_BLOCKS

    def test_stops_when_the_interval_is_narrow(self):
        timings, _ = time_work({"a": sort(1), "b": sort(1)}, max_s=60, interval_width=10)
        assert len(timings["a"].blocks_s) == latency.MIN_BLOCKS

    def test_blocks_are_long_where_calls_are_short(self):
        timings, _ = time_work({"slow": sleep(16), "fast": sleep(1)})
        counts = {name: len(timing.blocks_s[0]) for name, timing in timings.items()}
        assert counts["slow"] == 1 < counts["fast"]
        timings, _ = time_work({"nothing": lambda: None})
        assert len(timings["nothing"].blocks_s[0]) == latency.MAX_BLOCK_CALLS

    def test_timers_may_be_anything(self):
        """Known times, as from another process: they are kept and used as they are."""

        class Known:
            def __init__(self, seconds):
                self._seconds = seconds

            def warm_up(self):
                return [9.0, self._seconds, self._seconds, self._seconds, self._seconds]

            def block(self, count, settle_s, cores):
                assert (settle_s, cores) == (0.004, None)
                return 5, [self._seconds] * count

        timings = latency.time_interleaved(
            {"a": Known(0.002), "b": Known(0.001)}, max_s=0, block_s=0.004
        )
        assert timings["a"].warm_up_s == [9.0, 0.002, 0.002, 0.002, 0.002]
        assert timings["a"].num_settling == [5] * latency.MIN_BLOCKS
        assert timings["a"].blocks_s == [[0.002] * 2] * latency.MIN_BLOCKS
        assert timings["b"].blocks_s == [[0.001] * 4] * latency.MIN_BLOCKS
        ratio = latency.speedup(timings["a"], timings["b"])
        assert (ratio.estimate, ratio.low, ratio.high) == pytest.approx((2, 2, 2))

    @pytest.mark.parametrize("num_threads", [None, 1, 3, 4])
    def test_all_use_the_same_cores_in_a_round(self, num_threads, monkeypatch):
        """The least busy ones, where a model does not use all of them."""
        busy = dict.fromkeys(range(4), 0.0)
        monkeypatch.setattr(environment, "cores", lambda: list(range(4)))
        monkeypatch.setattr(environment, "busy_times", busy.copy)
        rounds = []

        class Watching:
            def warm_up(self):
                return [0.001] * 4

            def block(self, count, settle_s, cores):
                rounds.append((count, settle_s, cores))
                if len(rounds) % 2 == 0:
                    busy[1] += 1  # somebody else's work
                    busy[2] += 0.1
                return 1, [0.001] * count

        latency.time_interleaved(
            {"a": Watching(), "b": Watching()}, max_s=0, block_s=0.04, num_threads=num_threads
        )
        assert rounds[::2] == rounds[1::2]
        for count, settle_s, cores in rounds[2::2]:
            if num_threads in (None, 4):
                assert (count, settle_s, cores) == (40, 0.04, None)
            else:
                assert (count, settle_s) == (10, 0.0025)
                assert len(set(cores)) == num_threads
                assert 1 not in cores
                assert (2 in cores) == (num_threads == 3)
        if num_threads == 1:  # 0 and 3 were equally busy
            assert {cores[0] for _, _, cores in rounds[2:]} == {0, 3}

    def test_a_model_runs_on_the_core_of_its_round(self):
        core = environment.cores()[-1]
        seen = []
        session = WorkingSession("a", lambda: seen.append(environment.cores()), [])
        before = environment.cores()
        latency.SessionTimer(session, BATCHES).block(3, 0, [core])
        assert seen == [[core]] * 4
        assert environment.cores() == before

    def test_a_new_session_goes_on_with_the_next_inputs(self):
        log = []
        timer = latency.SessionTimer(WorkingSession("old", sort(1), log), BATCHES)
        timer.block(1, 0)
        timer.use(WorkingSession("new", sort(1), log))
        timer.block(1, 0)
        assert log == [("old", 0), ("old", 1), ("new", 2), ("new", 0)]

    def test_one_thread_of_each_physical_core_first(self, monkeypatch):
        monkeypatch.setattr(environment, "cores", lambda: list(range(8)))
        monkeypatch.setattr(environment, "busy_times", dict)
        monkeypatch.setattr(environment, "physical_core", lambda core: str(core % 4))
        for seed in range(20):
            picked = latency._CorePicker(4, seed).pick()
            assert {core % 4 for core in picked} == {0, 1, 2, 3}
            assert len(latency._CorePicker(6, seed).pick()) == 6

    def test_errors_of_a_session_come_through(self):
        def fail():
            raise ZeroDivisionError("no kernel")

        with pytest.raises(ZeroDivisionError, match="no kernel"):
            time_work({"a": fail})


times = st.lists(st.floats(1e-9, 100), min_size=1, max_size=5)
timings = st.builds(
    Timing, times, st.lists(st.integers(1, 9), max_size=4), st.lists(times, max_size=4)
)


class TestTiming:
    @given(timings)
    def test_json_round_trip(self, timing):
        assert Timing.from_json(json.loads(json.dumps(timing.to_json()))) == timing

    @given(timings)
    def test_values_are_those_of_the_blocks(self, timing):
        assert timing.values_s == [value for block in timing.blocks_s for value in block]

    def test_real_ones_round_trip(self, three):
        for timing in three[0].values():
            assert Timing.from_json(json.loads(json.dumps(timing.to_json()))) == timing
            assert 0 <= timing.steal_share <= 1

    @pytest.mark.parametrize(
        ("count", "has_p90", "has_p99"),
        [(1, False, False), (63, False, False), (64, True, False), (662, True, True)],
    )
    def test_summary_is_in_milliseconds_and_empty_where_too_few(self, count, has_p90, has_p99):
        values = np.random.default_rng(0).lognormal(size=count)
        # Warm-up and the first calls of a block are in no statistic.
        timing = Timing([1e9], [1], [part.tolist() for part in np.array_split(values, 3)])
        summary = timing.summary()
        assert (summary["median_low_ms"], summary["median_high_ms"]) == (None, None)  # 3 blocks
        assert summary["median_ms"] == pytest.approx(1e3 * np.median(values))
        for name, q, is_there in (("p90_ms", 90, has_p90), ("p99_ms", 99, has_p99)):
            if is_there:
                assert summary[name] == pytest.approx(1e3 * np.percentile(values, q))
            else:
                assert summary[name] is None


def spin_for(seconds):
    """Starts a thread that keeps a core busy without the interpreter, as runtimes' own do."""

    def spin(count):
        hashlib.pbkdf2_hmac("sha256", b"", b"", count)

    begin = time.perf_counter()
    spin(2000)
    count = round(2000 * seconds / (time.perf_counter() - begin))
    thread = threading.Thread(target=spin, args=(count,))
    thread.start()
    return thread


class TestRest:
    @pytest.mark.parametrize("tasks", ["/proc/self/task", "/nowhere"])
    def test_waits_for_threads_that_spin(self, tasks, monkeypatch):
        monkeypatch.setattr(environment, "_TASKS", Path(tasks))
        monkeypatch.setattr(latency, "MAX_REST_S", 5)  # the machine may be busy
        thread = spin_for(0.06)
        latency.rest()
        thread.join(0.02)  # it has its work behind it
        assert not thread.is_alive()

    def test_does_not_wait_for_ever(self, monkeypatch):
        monkeypatch.setattr(latency, "MAX_REST_S", 0.02)
        thread = spin_for(3)
        latency.rest()
        assert thread.is_alive()
        thread.join()

    @pytest.mark.parametrize(
        "turn", [lambda timer: timer.block(1, 0), lambda timer: timer.warm_up()]
    )
    def test_ends_every_turn(self, turn, monkeypatch):
        monkeypatch.setattr(latency, "MAX_REST_S", 5)
        threads = []
        session = WorkingSession("a", lambda: threads.append(spin_for(0.03)), [])
        turn(latency.SessionTimer(session, BATCHES))
        assert threads
        for thread in threads:
            thread.join(0.02)
            assert not thread.is_alive()
