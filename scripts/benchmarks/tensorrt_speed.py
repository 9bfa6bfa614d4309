"""How fast TensorRT's variants run a network on a GPU, beside TensorFlow, XLA and ONNX Runtime.

Targets, measured once by hand on an H200 for ResNet50: at batch 1 XLA 2.2, TF-TRT float16 7.0 and
int8 8.0 times TensorFlow; at batch 64 int8 no slower than float16.

Every variant is made by tfopt from the same SavedModel, and timed by `tfopt.benchmark` in turns
with all others, each runtime in a process of its own (each set of engines, too): from host arrays
to host arrays, copies included, and without copies beside it. Weights are random; int8 is
calibrated on random smooth images, which is enough for speed. An engine takes one to four minutes
to build, so a run takes about ten minutes; what is in --work_dir is not made again, and the table
is written after every conversion. Give a GPU to one run at a time: building, too, is timing.

    python scripts/benchmarks/tensorrt_speed.py --model=resnet50 --batch_size=1 \
        --work_dir=/tmp/resnet50_1 --output=resnet50_1.json

ONNX Runtime needs the package onnxruntime-gpu with its libraries of CUDA and cuDNN, which may be of
another version than TensorFlow's: the two never share a process.
"""

import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import example_models
import numpy as np
import reporting
from absl import flags

import tfopt
from tfopt import dataset, runtimes
from tfopt.artifact import Artifact
from tfopt.isolation import Worker
from tfopt.search import steps
from tfopt.trt.target import RECORD, Record

_MODEL = flags.DEFINE_enum("model", "resnet50", sorted(example_models.NAMES), "The network.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 1, "Images in a batch.", lower_bound=1)
_VARIANTS = flags.DEFINE_list(
    "variants",
    [
        "float32@tensorflow", "float32(xla=True)@tensorflow", "float32@tf_trt", "float16@tf_trt",
        "int8@tf_trt", "float32@onnxruntime", "float16@onnxruntime",
    ],
    "What is timed; the first is what the others are compared with.",
)  # fmt: skip
_WORK_DIR = flags.DEFINE_string("work_dir", None, "Keeps models and engines.", required=True)
_MAX_TIMING_S = flags.DEFINE_float("max_timing_s", 6.0, "For each variant.")
_OUTPUT = reporting.define_output()

_TARGETS = {
    ("resnet50", 1): {
        "float32(xla=True)@tensorflow": 2.2,
        "float16@tf_trt": 7.0,
        "int8@tf_trt": 8.0,
    }
}
_NUM_COPIES = 6  # of the 48 images, so that there are batches of 64 for calibration and timing


def main(_: list[str]) -> None:
    """Converts, times and prints."""
    work = pathlib.Path(_WORK_DIR.value)
    saved_model, npz = example_models.prepare(_MODEL.value, None, work)
    images = np.load(npz)["x"]
    data = {"x": np.concatenate([images] * _NUM_COPIES)}
    rows: list[dict[str, Any]] = []
    for row in _convert_all(saved_model, data, work):
        rows.append(row)
        _print(rows)
    artifacts = [row["folder"] for row in rows if row["reason"] is None]
    comparison = tfopt.benchmark(
        artifacts,
        data,
        batch_size=_BATCH_SIZE.value,
        max_timing_s=_MAX_TIMING_S.value,
        interval_width=0.01,
    )
    timed = {row["reason"].split()[0]: row for row in comparison.rows}
    for row in rows:
        found = timed.get(row["folder"], {})
        row |= {
            key: found.get(key)
            for key in ("speedup", "speedup_low", "speedup_high", "median_ms", "device_ms",
                        "gpu_memory_bytes")
        }  # fmt: skip
        row["target"] = _judge(row, rows)
    _print(rows)
    reporting.save(
        _OUTPUT.value,
        {
            "benchmark": "tensorrt_speed",
            "model": _MODEL.value,
            "batch_size": _BATCH_SIZE.value,
            "is_met": all("MISSED" not in row["target"] for row in rows),
            "rows": rows,
            "gpu_before": comparison.details["gpu_before"],
            "gpu_after": comparison.details["gpu_after"],
        },
    )


def _convert_all(
    saved_model: pathlib.Path, data: dict[str, np.ndarray], work: pathlib.Path
) -> Iterator[dict[str, Any]]:
    """Makes the variants that do not lie in the work folder; gives what the table says of each."""
    with Worker(work / "convert.log") as worker, tempfile.TemporaryDirectory(dir=work) as name:
        source = worker.call("tfopt.source:prepare", saved_model, pathlib.Path(name, "source"))
        examples = dataset.write(
            data, source.signature, pathlib.Path(name, "data"), num_calibration=128
        )

        def convert(variant: tfopt.Variant) -> dict[str, Any]:
            runtime, folder = runtimes.get(variant.runtime), _folder(variant, work)
            row: dict[str, Any] = {
                "variant": str(variant), "folder": str(folder), "reason": runtime.missing()
            }  # fmt: skip
            begin = time.perf_counter()
            if not folder.exists() and row["reason"] is None:
                parents = steps.parents_of(variant)
                for parent in parents:
                    convert(parent)
                is_calibrated = runtimes.precision_of(variant).is_calibrated
                try:
                    worker.call(
                        "tfopt.search.steps:convert",
                        source,
                        variant,
                        folder,
                        _folder(parents[-1], work) if parents else None,
                        examples if is_calibrated else None,
                        _BATCH_SIZE.value,
                    )
                except (tfopt.ConversionError, tfopt.InputError) as error:
                    row["reason"] = str(error)
            if row["reason"] is not None:
                return row
            artifact = Artifact.open(folder)
            row |= {
                "convert_s": time.perf_counter() - begin,
                "size_bytes": artifact.size_bytes,
                "versions": artifact.versions,
                "notes": list(artifact.notes),
            }
            if (folder / RECORD).exists():
                row |= dict(Record.open(folder).details)
            return row

        for text in _VARIANTS.value:
            yield convert(runtimes.expand([text])[0])


def _folder(variant: tfopt.Variant, work: pathlib.Path) -> pathlib.Path:
    return work / f"{variant.slug}-{_BATCH_SIZE.value}"


def _judge(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The target of a row and whether it is met."""
    target = _TARGETS.get((_MODEL.value, _BATCH_SIZE.value), {}).get(row["variant"])
    if target is not None:
        speedup = row["speedup"]
        return f"{target} {reporting.met(speedup is not None and speedup >= target)}"
    if row["variant"] == "int8@tf_trt" and _BATCH_SIZE.value > 1:
        other = next((r for r in rows if r["variant"] == "float16@tf_trt"), {})
        if other.get("speedup_low") and row["speedup"]:
            is_met = row["speedup_high"] >= other["speedup_low"]
            return f"no slower than float16 {reporting.met(is_met)}"
    return ""


def _print(rows: list[dict[str, Any]]) -> None:
    def text(row: dict[str, Any], name: str, form: str) -> str:
        value = row.get(name)
        return "" if value is None else format(value, form)

    table = [("variant", "times", "low", "high", "ms", "GPU ms", "build s", "engines", "target")]
    table += [
        (
            row["variant"],
            text(row, "speedup", ".3f"),
            text(row, "speedup_low", ".3f"),
            text(row, "speedup_high", ".3f"),
            text(row, "median_ms", ".3f"),
            text(row, "device_ms", ".3f"),
            text(row, "build_seconds", ".0f"),
            text(row, "num_engines", "d"),
            row.get("target") or (row["reason"] or "")[:120],
        )
        for row in rows
    ]
    print(
        f"\n{_MODEL.value}, batch {_BATCH_SIZE.value}\n{reporting.format_table(table)}", flush=True
    )


if __name__ == "__main__":
    reporting.run_app(main)
