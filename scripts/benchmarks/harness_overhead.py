"""What the harness adds to each timed call, beyond what the session itself costs.

Target: under 2 µs. The session does nothing, so that all that is measured is the harness: once as
the time that a call of the timer takes longer than a bare `session.run`, and once as the time that
it writes down for a call that takes none. Both loops take turns, in random order.

    python scripts/benchmarks/harness_overhead.py --output=harness_overhead.json
"""

import pathlib
import random
import time

import numpy as np
import reporting
from absl import flags

import tfopt
from tfopt.artifact import Artifact
from tfopt.measure import latency
from tfopt.runtimes.base import Arrays
from tfopt.signature import Signature

_ROUNDS = flags.DEFINE_integer("rounds", 40, "Of both loops.", lower_bound=10)
_OUTPUT = reporting.define_output()

_CALLS = 20_000
_TARGET_US = 2.0


class Idle(tfopt.Session):
    """Gives back what it gets."""

    def run(self, inputs: Arrays) -> Arrays:
        """Does nothing."""
        return inputs

    def close(self) -> None:
        """Does nothing."""


def main(_: list[str]) -> None:
    """Times and prints."""
    signature = Signature("serving_default", (), ())
    variant = tfopt.Variant("float32", "litert")
    session = Idle(Artifact(pathlib.Path(), variant, None, "", signature, 0, 0, {}))
    batches = [{"x": np.zeros(1, np.float32)} for _ in range(4)]
    timer = latency.SessionTimer(session, batches)
    recorded: list[float] = []

    def bare() -> None:
        batch = batches[0]
        for _ in range(_CALLS):
            session.run(batch)

    def timed() -> None:
        recorded.extend(timer.call() for _ in range(_CALLS))

    loops = {"bare": bare, "timed": timed}
    us: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(_ROUNDS.value):
        for name in random.sample(list(loops), len(loops)):
            begin = time.perf_counter()
            loops[name]()
            us[name].append((time.perf_counter() - begin) / _CALLS * 1e6)
    low, added, high = np.quantile(np.subtract(us["timed"], us["bare"]), [0.025, 0.5, 0.975])
    written_us = float(np.median(recorded)) * 1e6
    is_met = bool(high < _TARGET_US and written_us < _TARGET_US)
    print(
        f"A call of the timer takes {added:.2f} µs longer than the session ({low:.2f} to "
        f"{high:.2f} in 95 % of the rounds); it writes down {written_us:.2f} µs for a session that "
        f"does nothing.\nTarget {_TARGET_US} µs: {reporting.met(is_met)}."
    )
    reporting.save(
        _OUTPUT.value,
        {"benchmark": "harness_overhead", "added_us": [low, added, high],
         "written_us": written_us, "is_met": is_met},
    )  # fmt: skip


if __name__ == "__main__":
    reporting.run_app(main)
