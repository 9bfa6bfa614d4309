"""How often the harness calls a model faster or slower than itself.

Target: of 200 comparisons, at most 16 are called different (a true 5 % test passes that in 98 of
100 runs), with a median width of the interval of at most 0.04 of the ratio, since a harness that
never sees a difference would pass, too. On each of LiteRT, ONNX Runtime and TensorFlow, with the
other cores idle and with one of them loaded.

A comparison is what `tfopt.benchmark` does for an artifact and a copy of it: a new process loads
both, since they have the same runtime, and times them in turns. With TensorFlow, whose import
takes seconds, the process stays and both are loaded anew. The model is a small
convolutional network with random weights, or --model. Inference has one thread, so that a loaded
core need not be shared. Each comparison is a line in --work_dir; a second run goes on there.

    python scripts/benchmarks/same_model.py --work_dir=/tmp/same_model --output=same_model.json

All of it takes about an hour and a half; --comparisons=20 gives a first look.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import shutil
import time

import example_models
import numpy as np
import reporting
from absl import flags

import tfopt
from tfopt import dataset as datasets
from tfopt.isolation import Worker
from tfopt.measure import latency, statistics
from tfopt.search.remote import RemoteSession

_WORK_DIR = flags.DEFINE_string("work_dir", None, "Keeps what was measured.", required=True)
_MODEL = flags.DEFINE_string("model", None, "Model of your own instead; with --data.")
_DATA = flags.DEFINE_string("data", None, "npz as `tfopt optimize` takes it.")
_COMPARISONS = flags.DEFINE_integer("comparisons", 200, "For each case.", lower_bound=1)
_RUNTIMES = flags.DEFINE_list("runtimes", ["litert", "onnxruntime", "tensorflow"], "Which ones.")
_LOADS = flags.DEFINE_list("loads", ["idle", "loaded"], "What the other core does.")
_MAX_TIMING_S = flags.DEFINE_float("max_timing_s", latency.MAX_S, "Of one comparison.")
_OUTPUT = reporting.define_output()

_SHARE = 0.08  # 16 of 200
_WIDTH = 0.04


def _keep_busy(core: int, parent: int) -> None:
    os.sched_setaffinity(0, {core})
    while os.getppid() == parent:  # also when the parent was killed
        for _ in range(100_000):
            pass


@contextlib.contextmanager
def _load(kind: str):
    """Keeps the last core busy, if that is asked for."""
    if kind == "idle":
        yield
        return
    core = max(os.sched_getaffinity(0))
    process = multiprocessing.get_context("spawn").Process(
        target=_keep_busy, args=(core, os.getpid()), daemon=True
    )
    process.start()
    time.sleep(1)
    try:
        yield
    finally:
        process.kill()
        process.join()


def _compare(
    runtime: str,
    artifact: pathlib.Path,
    copy: pathlib.Path,
    data: datasets.Dataset,
    seed: int,
    shared: Worker | None,
) -> statistics.Interval:
    """Times an artifact and its copy as `tfopt.benchmark` does."""
    log = artifact.parent / f"{runtime}.log"
    with contextlib.ExitStack() as stack:
        worker = shared or stack.enter_context(Worker(log, keeps_state=True))
        sessions = {
            str(folder): RemoteSession(worker, folder, data, 1, 1) for folder in (artifact, copy)
        }
        timings = latency.time_interleaved(
            sessions, seed=seed, max_s=_MAX_TIMING_S.value, num_threads=1
        )
        for session in sessions.values():
            session.close()
    return latency.speedup(*timings.values())


def _measure(
    runtime: str, load: str, artifact: pathlib.Path, data: datasets.Dataset, record: pathlib.Path
) -> list[dict[str, float]]:
    """Returns an interval for each comparison; those that are in the record already are kept."""
    lines = record.read_text().splitlines() if record.exists() else []
    found = [json.loads(line) for line in lines]
    copy = artifact.with_name(f"{artifact.name}-copy")
    if not copy.exists():
        shutil.copytree(artifact, copy)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_load(load))
        shared = None
        if runtime == "tensorflow":
            log = artifact.parent / f"{runtime}.log"
            shared = stack.enter_context(Worker(log, keeps_state=True))
        file = stack.enter_context(record.open("a"))
        for seed in range(len(found), _COMPARISONS.value):
            interval = _compare(runtime, artifact, copy, data, seed, shared)
            found.append({"low": interval.low, "ratio": interval.estimate, "high": interval.high})
            file.write(json.dumps(found[-1]) + "\n")
            file.flush()
            if (seed + 1) % 10 == 0:
                print(f"{runtime}, {load}: {seed + 1} of {_COMPARISONS.value}", flush=True)
    return found[: _COMPARISONS.value]


def main(_: list[str]) -> None:
    """Converts, compares and prints."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    work = pathlib.Path(_WORK_DIR.value).absolute()
    work.mkdir(parents=True, exist_ok=True)
    if _MODEL.value is None:
        model, npz = work / "saved_model", str(work / "data.npz")
        if not pathlib.Path(npz).exists():
            example_models.in_child(example_models.make_small, model, pathlib.Path(npz))
    else:
        model, npz = pathlib.Path(_MODEL.value), _DATA.value
    rows = [("runtime", "other core", "different", "of", "median width", "target")]
    results, all_met = [], True
    for runtime in _RUNTIMES.value:
        artifact = work / runtime
        if not artifact.exists():
            tfopt.convert(model, f"float32@{runtime}", artifact)
        signature = tfopt.Artifact.open(artifact).signature
        data = datasets.write(npz, signature, work / f"{runtime}-data")
        for load in _LOADS.value:
            found = _measure(runtime, load, artifact, data, work / f"{runtime}-{load}.jsonl")
            num_different = sum(not item["low"] <= 1 <= item["high"] for item in found)
            width = float(np.median([(f["high"] - f["low"]) / f["ratio"] for f in found]))
            is_met = num_different <= _SHARE * len(found) and width <= _WIDTH
            all_met &= is_met
            rows.append(
                (runtime, load, num_different, len(found), f"{width:.4f}", reporting.met(is_met))
            )
            results.append({
                "runtime": runtime, "load": load, "num_different": num_different,
                "num_comparisons": len(found), "median_width": width, "intervals": found,
            })  # fmt: skip
    print(f"\n{reporting.format_table(rows)}")
    reporting.save(_OUTPUT.value, {"benchmark": "same_model", "is_met": all_met, "cases": results})


if __name__ == "__main__":
    reporting.run_app(main)
