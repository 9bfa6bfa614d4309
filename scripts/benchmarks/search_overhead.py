"""What a search costs beyond the work that it organizes: time and memory.

Targets: the whole search takes at most 1.3 times the sum of its conversions, evaluations and
timings, with the start of worker processes counted as overhead; and the peak memory of all its
processes together is at most 2.5 times that of the hungriest converter alone.

The search, `tfopt optimize` in a subprocess, runs twice: reading the memory of all processes ten
times a second costs a quarter of a core, so the first run is for time and the second for memory.

Time. The whole is the wall time of the first run, from starting Python to the end of the process.
The work is the sum of `seconds` in results.json: convert, measure (checking outputs, accuracy,
timing against the baseline), cold_start, pilot and final. tfopt's own clock for these leaves out
`Worker.startup_s`, the start of a worker process together with the modules that it imports in
advance, so all of that is overhead. What a step imports later by itself is in the step: tf2onnx,
nncf, each runtime at its first use, and so TensorFlow in the measuring worker. Not in the work:
preparing source and data, conversions of a parent that is itself no row of the table, and writing
results.
"With bare cold starts" counts of each cold start only `cold_start_ms`, loading and the first
inference, so that imports of runtimes in those processes are overhead, too. The target is judged
by the first figure.

Memory. Every 0.1 s the proportional set sizes of all processes of the search are summed (see
`machine.MemorySampler`). The converter's own peak is that of the worker process alone (with its
children), in which `tfopt convert` prepares the source and converts it and what it starts from;
the largest of --conversions counts.

    python scripts/benchmarks/search_overhead.py --model=mobilenet_v2 \
        --work_dir=/tmp/search_overhead --output=search_overhead.json
"""

import json
import os
import pathlib
import shutil
import subprocess
import sysconfig
import time
from typing import Any

import example_models
import machine
import reporting
from absl import flags

_MODEL = flags.DEFINE_string(
    "model", None, "SavedModel folder, .keras file, mobilenet_v2 or resnet50.", required=True
)
_DATA = flags.DEFINE_string("data", None, "npz as `tfopt optimize` takes it.")
_WORK_DIR = flags.DEFINE_string("work_dir", None, "New folder.", required=True)
_VARIANTS = flags.DEFINE_string("variants", None, "Passed to the search; default: its default.")
_MAX_ACCURACY_DROP = flags.DEFINE_float("max_accuracy_drop", 1.0, "Passed to the search.")
_CONVERSIONS = flags.DEFINE_list(
    "conversions",
    ["int8@litert", "int8@onnxruntime", "int8@openvino"],
    "Variants whose converters are measured alone.",
)
_SAMPLE_S = flags.DEFINE_float("sample_s", 0.1, "Seconds between samples of memory.")
_OUTPUT = reporting.define_output()

_MAX_TIME_RATIO = 1.3
_MAX_MEMORY_RATIO = 2.5
_TFOPT = str(pathlib.Path(sysconfig.get_path("scripts"), "tfopt"))


def _run(arguments: list[str], log: pathlib.Path) -> dict[str, Any]:
    """Runs a command of tfopt without watching it; returns its wall time."""
    meter, begin = machine.StealMeter(), time.perf_counter()
    _wait(_start(arguments, log), arguments, log)
    return {"wall_s": time.perf_counter() - begin, "steal": meter.share()}


def _run_sampled(arguments: list[str], log: pathlib.Path, with_root: bool) -> dict[str, Any]:
    """Runs a command of tfopt; returns its peak memory."""
    process = _start(arguments, log)
    sampler = machine.MemorySampler(process.pid, with_root, _SAMPLE_S.value)
    sampler.start()
    try:
        _wait(process, arguments, log)
    finally:
        sampler.stop()
    return {
        "peak_bytes": sampler.peak_bytes,
        "peak_resident_bytes": sampler.peak_resident_bytes,
        "processes_at_peak": sampler.processes_at_peak,
        "num_samples": sampler.num_samples,
        "sampler_cpu_s": sampler.cpu_s,
    }


def _start(arguments: list[str], log: pathlib.Path) -> subprocess.Popen[bytes]:
    print(f"tfopt {' '.join(arguments)}", flush=True)
    with log.open("wb") as file:
        return subprocess.Popen(
            [_TFOPT, *arguments], stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )


def _wait(process: subprocess.Popen[bytes], arguments: list[str], log: pathlib.Path) -> None:
    try:
        status = process.wait()
    finally:
        process.kill()
    if status:
        raise RuntimeError(f"tfopt {arguments[0]} ended with {status}; its output is in {log}.")


def _time(output_dir: pathlib.Path, wall_s: float) -> dict[str, Any]:
    results = json.loads((output_dir / "results.json").read_text())
    work = results["seconds"]
    bare = sum(row.get("cold_start_ms") or 0.0 for row in results["rows"]) / 1e3
    return {
        "wall_s": wall_s,
        "work_s": work,
        "bare_cold_start_s": bare,
        "ratio": wall_s / sum(work.values()),
        "ratio_with_bare_cold_starts": wall_s / sum({**work, "cold_start": bare}.values()),
        "num_measured": sum(row.get("median_ms") is not None for row in results["rows"]),
        "num_failed": sum(row["status"] == "failed" for row in results["rows"]),
    }


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.0f}"


def main(_: list[str]) -> None:
    """Searches, converts and prints."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    work = pathlib.Path(_WORK_DIR.value).absolute()
    output_dir, sampled, alone = work / "optimized", work / "optimized_sampled", work / "alone"
    for folder in (output_dir, sampled):
        if folder.exists():
            raise ValueError(f"{folder} exists already; name another --work_dir.")
    work.mkdir(parents=True, exist_ok=True)
    model, data = example_models.prepare(_MODEL.value, _DATA.value, work)
    common = [f"--model={model}", f"--data={data}"]
    options = [f"--max_accuracy_drop={_MAX_ACCURACY_DROP.value}"]
    if _VARIANTS.value:
        options.append(f"--variants={_VARIANTS.value}")
    search = _run(
        ["optimize", *common, f"--output_dir={output_dir}", *options], work / "optimize.log"
    )
    seconds = _time(output_dir, search["wall_s"])
    search |= _run_sampled(
        ["optimize", *common, f"--output_dir={sampled}", *options],
        work / "optimize_sampled.log",
        with_root=True,
    )
    converters = {}
    for variant in _CONVERSIONS.value:
        shutil.rmtree(alone, ignore_errors=True)
        converters[variant] = _run_sampled(
            ["convert", *common, f"--variant={variant}", f"--output_dir={alone}"],
            work / f"convert_{variant}.log",
            with_root=False,
        )
    largest = max(converters, key=lambda variant: converters[variant]["peak_bytes"])
    memory_ratio = search["peak_bytes"] / converters[largest]["peak_bytes"]

    rows = [("time", "seconds")]
    rows += [(f"work: {name}", f"{value:.1f}") for name, value in seconds["work_s"].items()]
    rows += [
        ("work, together", f"{sum(seconds['work_s'].values()):.1f}"),
        ("bare cold starts", f"{seconds['bare_cold_start_s']:.1f}"),
        ("the whole search", f"{seconds['wall_s']:.1f}"),
    ]
    print(f"\n{reporting.format_table(rows)}\n")
    rows = [("peak memory", "PSS MB", "RSS MB", "processes")]
    for name, run in {"the search": search, **converters}.items():
        sizes = (run["peak_bytes"], run["peak_resident_bytes"])
        rows.append((name, *map(_megabytes, sizes), len(run["processes_at_peak"])))
    print(f"{reporting.format_table(rows)}\n")
    is_time_met = seconds["ratio"] <= _MAX_TIME_RATIO
    is_memory_met = memory_ratio <= _MAX_MEMORY_RATIO
    bare = seconds["ratio_with_bare_cold_starts"]
    steal = "unknown" if search["steal"] is None else f"{search['steal']:.0%}"
    print(
        f"Time: the search took {seconds['ratio']:.2f} times its work; target {_MAX_TIME_RATIO}: "
        f"{reporting.met(is_time_met)}. (With bare cold starts: {bare:.2f}; steal {steal}.)\n"
        f"Memory: the search held {memory_ratio:.2f} times what {largest} held; target "
        f"{_MAX_MEMORY_RATIO}: {reporting.met(is_memory_met)}."
    )
    reporting.save(
        _OUTPUT.value,
        {
            "benchmark": "search_overhead",
            "model": _MODEL.value,
            "time": {**seconds, "target": _MAX_TIME_RATIO, "is_met": is_time_met},
            "memory": {
                "largest_converter": largest,
                "ratio": memory_ratio,
                "target": _MAX_MEMORY_RATIO,
                "is_met": is_memory_met,
            },
            "search": search,
            "converters": converters,
        },
    )


if __name__ == "__main__":
    reporting.run_app(main)
