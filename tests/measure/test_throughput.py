import time
from pathlib import Path

import numpy as np
import pytest

from tfopt.artifact import Artifact
from tfopt.errors import InputError
from tfopt.measure import throughput
from tfopt.measure.throughput import Load
from tfopt.runtimes.base import Session
from tfopt.signature import Signature, TensorSpec
from tfopt.variant import Variant

SIGNATURE = Signature("serving_default", (TensorSpec("x", (None,), "float32"),), ())
BATCHES = [{"x": np.full(2, index, np.float32)} for index in range(3)]


class Sleeping(Session):
    """A session that takes a known time and leaves the processor to others."""

    def __init__(self, seconds, fail_after=None):
        super().__init__(Artifact(Path(), Variant("float32", "x"), None, "", SIGNATURE, 0, 0, {}))
        self._seconds, self._fail_after = seconds, fail_after
        self.calls = []

    def run(self, inputs):
        self.calls.append(float(inputs["x"][0]))
        if self._fail_after is not None and len(self.calls) > self._fail_after:
            raise ZeroDivisionError("no kernel")
        time.sleep(self._seconds)
        return {}

    def close(self):
        pass


class TestClosedLoop:
    def test_clients_do_not_wait_for_each_other(self):
        one = throughput.closed_loop([Sleeping(0.005)], BATCHES, 0.3).summary()
        four = throughput.closed_loop([Sleeping(0.005) for _ in range(4)], BATCHES, 0.3).summary()
        assert (one["concurrency"], four["concurrency"]) == (1, 4)
        assert one["throughput_per_s"] <= 2 / 0.005  # two examples each 5 ms, and the sleep's own
        assert four["throughput_per_s"] > 2 * one["throughput_per_s"]
        assert one["median_ms"] >= 5
        assert one["arrival_rate_per_s"] is None

    def test_throughput_is_the_inverse_of_the_latency(self):
        load = throughput.closed_loop([Sleeping(0.002)], BATCHES, 0.3)
        expected = 2 / np.mean(load.latencies_s)
        assert load.summary()["throughput_per_s"] == pytest.approx(expected, rel=0.05)
        assert load.num_unanswered == 0

    def test_inputs_are_used_in_turn(self):
        session = Sleeping(0.001)
        load = throughput.closed_loop([session], BATCHES, 0.05)
        counted = session.calls[throughput.WARM_UP_RUNS * len(BATCHES) :]
        assert counted == [index % 3 for index in range(len(load.latencies_s))]


class TestOpenLoop:
    def test_answers_what_comes_when_there_is_room(self):
        sessions = [Sleeping(0.002) for _ in range(4)]
        load = throughput.open_loop(sessions, BATCHES, 100, 0.6)
        assert len(load.latencies_s) == 60
        assert load.num_unanswered == 0
        found = load.summary()
        assert found["median_ms"] >= 2
        assert found["arrival_rate_per_s"] == 100
        assert found["throughput_per_s"] == pytest.approx(2 * 60 / load.seconds)

    def test_waiting_counts(self):
        """At 1.5 times what one session can answer, the queue grows and so do latencies.

        A closed loop of the same session sees 5 ms each time: that is what it hides.
        """
        session = Sleeping(0.005)
        load = throughput.open_loop([session], BATCHES, 1.5 / 0.005, 0.4)
        assert len(load.latencies_s) == 120
        first, last = np.median(load.latencies_s[:20]), np.median(load.latencies_s[-20:])
        assert last > 0.1 > 5 * first / 5 > 0
        closed = throughput.closed_loop([session], BATCHES, 0.2)
        assert np.median(closed.latencies_s) < 0.05

    def test_gives_up_on_what_is_never_answered(self, monkeypatch):
        monkeypatch.setattr(throughput, "MAX_BACKLOG_S", 0.05)
        load = throughput.open_loop([Sleeping(0.05)], BATCHES, 200, 0.3)
        assert 0 < len(load.latencies_s) < 20
        assert len(load.latencies_s) + load.num_unanswered == 60
        assert load.summary()["median_ms"] is None  # the slowest are missing
        assert load.summary()["throughput_per_s"] > 0

    def test_moments_are_those_of_the_seed(self):
        def seconds(seed):
            return throughput.open_loop([Sleeping(0)], BATCHES, 500, 0.05, seed).seconds

        assert seconds(1) == seconds(1) != seconds(2)


class TestErrors:
    @pytest.mark.parametrize(
        "load",
        [
            lambda s: throughput.closed_loop(s, BATCHES, 5),
            lambda s: throughput.open_loop(s, BATCHES, 50, 5),
        ],
    )
    def test_of_a_session_come_through_at_once(self, load):
        begin = time.perf_counter()
        with pytest.raises(ZeroDivisionError, match="no kernel"):
            load([Sleeping(0.001), Sleeping(0.001, fail_after=20)])
        assert time.perf_counter() - begin < 4

    def test_of_the_user(self):
        with pytest.raises(InputError, match="at least one session"):
            throughput.closed_loop([], BATCHES, 1)
        with pytest.raises(InputError, match="lasts 0 s"):
            throughput.closed_loop([Sleeping(0)], BATCHES, 0)
        with pytest.raises(InputError, match="arrival rate is 0"):
            throughput.open_loop([Sleeping(0)], BATCHES, 0, 1)


def test_percentiles_need_enough_requests():
    found = Load(1, None, 1, 1.0, [0.001] * 63).summary()
    assert (found["median_ms"], found["p90_ms"], found["p99_ms"]) == (1, None, None)
    assert Load(1, None, 1, 1.0, [0.001] * 662).summary()["p99_ms"] == pytest.approx(1)
