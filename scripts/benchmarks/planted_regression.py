"""Whether `tfopt compare --fail_if_slower=0.05` catches a planted tenth, and cries at nothing.

Target: exit status 3 in 20 of 20 tries when the new result does a tenth more work, and in none of
20 when it does the same.

A result is the time of `int8@litert` over that of `float32@litert`, taken in turns as a search
does, and saved as `tfopt benchmark` saves it. The work of the variant is its session called 20
times inside one timed call, before and after; the planted regression calls it 22 times. Every
try measures an old result and a new one of each kind, and gives two files at a time to the
command.

Each result takes twelve seconds: how many times as fast one model is as another drifts by more
than a percent from one run to the next on shared machines, which no interval of one run knows of.

    python scripts/benchmarks/planted_regression.py --output=planted_regression.json

It takes about 15 minutes.
"""

import contextlib
import io
import os
import pathlib
import tempfile
from collections.abc import Sequence

import example_models
import numpy as np
import repeated
import reporting
from absl import flags

import tfopt
from tfopt import commands
from tfopt.measure import environment, latency
from tfopt.search import results

_TRIES = flags.DEFINE_integer("tries", 20, "With and without the regression.", lower_bound=1)
_INTERVAL_WIDTH = flags.DEFINE_float("interval_width", 0.01, "Ends a result before its time.")
_MAX_TIMING_S = flags.DEFINE_float("max_timing_s", 2 * latency.MAX_S, "Of one result.")
_OUTPUT = reporting.define_output()

_CALLS, _SLOWER = 20, 22
_TOLERATED = 0.05


def _write(
    path: pathlib.Path,
    sessions: Sequence[tfopt.Session],
    batches: list[dict[str, np.ndarray]],
    num_calls: int,
    seed: int,
) -> list[float]:
    """Times the variant against the baseline, writes a result file and returns the speed-up."""
    baseline, candidate = sessions
    sides = {
        "float32@litert": latency.SessionTimer(repeated.Repeated(baseline, _CALLS), batches),
        "int8@litert": latency.SessionTimer(repeated.Repeated(candidate, num_calls), batches),
    }
    timings = latency.time_interleaved(
        sides,
        seed=seed,
        max_s=_MAX_TIMING_S.value,
        interval_width=_INTERVAL_WIDTH.value,
        num_threads=1,
    )
    rows = [
        {
            "model": "small", "variant": name, "status": "ok", "batch_size": 1, "num_threads": 1,
            **results.timed(timings["float32@litert"], timing),
        }
        for name, timing in timings.items()
    ]  # fmt: skip
    details = {
        "baseline": "float32@litert",
        "baseline_artifact": baseline.artifact.identity(),
        "environment": environment.describe(),
    }
    tfopt.Comparison(tuple(rows), details).save_json(path)
    speedup = latency.speedup(*timings.values())
    return [speedup.low, speedup.estimate, speedup.high]


def main(_: list[str]) -> None:
    """Converts, times, compares and prints."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    counts = {"the same work": 0, "a tenth more": 0}
    tries = []
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = pathlib.Path(name)
        model, npz = folder / "saved_model", folder / "data.npz"
        example_models.in_child(example_models.make_small, model, npz)
        with np.load(npz) as data:
            batches = [{"image": image[None]} for image in data["image"][:4]]
        sessions = []
        for variant in ("float32@litert", "int8@litert"):
            tfopt.convert(model, variant, folder / variant, str(npz))
            sessions.append(stack.enter_context(tfopt.load(folder / variant, num_threads=1)))
        for seed in range(_TRIES.value):
            old = folder / f"old-{seed}.json"
            before = _write(old, sessions, batches, _CALLS, 3 * seed)
            for index, (what, num_calls) in enumerate(zip(counts, (_CALLS, _SLOWER), strict=True)):
                new = folder / f"new-{seed}-{num_calls}.json"
                after = _write(new, sessions, batches, num_calls, 3 * seed + 1 + index)
                with contextlib.redirect_stdout(io.StringIO()):
                    status = commands.main([
                        "compare", str(new), f"--against={old}", f"--fail_if_slower={_TOLERATED}",
                    ])  # fmt: skip
                is_called = status == commands.REGRESSION
                counts[what] += is_called
                tries.append({"work": what, "is_called": is_called, "speedups": [before, after]})
            print(f"{seed + 1} of {_TRIES.value}: {counts}", flush=True)
    is_met = list(counts.values()) == [0, _TRIES.value]
    rows = [("new result does", "called a regression", "of"), *(
        (what, count, _TRIES.value) for what, count in counts.items()
    )]  # fmt: skip
    print(f"\n{reporting.format_table(rows)}\n\nTarget: {reporting.met(is_met)}.")
    reporting.save(
        _OUTPUT.value,
        {"benchmark": "planted_regression", "tries": _TRIES.value, "counts": counts,
         "is_met": is_met, "found": tries},
    )  # fmt: skip


if __name__ == "__main__":
    reporting.run_app(main)
