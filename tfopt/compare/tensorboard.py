"""Results for TensorBoard: a run for each row, with hyperparameters and scalars.

Read as models: TensorBoard's own guide to its HParams dashboard
(https://www.tensorflow.org/tensorboard/hyperparameter_tuning_with_hparams).
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfopt.compare.text import plain
from tfopt.errors import InputError
from tfopt.variant import Variant

if TYPE_CHECKING:
    from tfopt.compare.comparison import Comparison

METRICS = (
    "speedup", "speedup_low", "speedup_high", "median_ms", "p90_ms", "p99_ms", "device_ms",
    "cold_start_ms", "throughput_per_s", "size_bytes", "compressed_bytes", "peak_memory_bytes",
    "gpu_memory_bytes", "accuracy",
    "accuracy_drop", "accuracy_drop_high", "agreement", "max_abs_error",
)  # fmt: skip
_FROM_ROW = ("model", "batch_size", "num_threads", "parent", "status", "machine", "baseline")


def write(comparison: Comparison, folder: str | Path) -> list[Path]:
    """Writes the measured rows into folders that `tensorboard --logdir` reads.

    Each row becomes the run `MODEL/VARIANT`, with what it is as hyperparameters and its figures
    as scalars at step 0. Where rows share that name, the batch size is added, or the number of
    the row. Figures that were not measured are left out.

    Args:
      comparison: the results.
      folder: log folder, which may hold other runs.

    Returns:
      The folders of the runs.

    Raises:
      InputError: when TensorBoard is not installed, when nothing was measured, when the folder
        cannot be written, or when a run is there already, since a second point would be drawn
        beside the first.
    """
    if importlib.util.find_spec("tensorboard") is None:
        raise InputError("tensorboard is not installed; pip install 'tfopt[tensorboard]'.")
    import tensorflow as tf
    from tensorboard.plugins.hparams import api

    rows = [row for row in comparison.rows if plain(row.get("median_ms")) is not None]
    if not rows:
        raise InputError("The results hold no measured row, so there is nothing to show.")
    runs = _name_runs(rows)
    paths = [Path(folder, name) for name in runs]
    if there := [path for path in paths if path.exists()]:
        raise InputError(f"{there[0]} exists already; nothing was written, name another folder.")
    try:
        for path in paths:
            path.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror}).") from error
    described = [_hyperparameters(row) for row in rows]
    names = [name for name in METRICS if any(_is_figure(row.get(name)) for row in rows)]
    writer = tf.summary.create_file_writer(str(folder), filename_suffix=".tfopt")
    with writer.as_default():
        api.hparams_config(
            hparams=[api.HParam(name) for name in dict.fromkeys(k for d in described for k in d)],
            metrics=[api.Metric(name, display_name=name.replace("_", " ")) for name in names],
        )
    writer.close()
    for path, name, row, values in zip(paths, runs, rows, described, strict=True):
        writer = tf.summary.create_file_writer(str(path))
        with writer.as_default():
            api.hparams(values, trial_id=name)
            for metric in names:
                if _is_figure(row.get(metric)):
                    tf.summary.scalar(metric, row[metric], step=0)
        writer.close()
    return paths


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _hyperparameters(row: Mapping[str, Any]) -> dict[str, str | int]:
    variant = Variant.parse(row["variant"])
    options = ",".join(f"{name}={value}" for name, value in variant.options)
    found = {"precision": variant.precision, "runtime": variant.runtime, "options": options}
    more = {name: row[name] for name in _FROM_ROW if row.get(name) is not None}
    return {**found, **more, "chosen": str(bool(row.get("chosen"))).lower()}


def _name_runs(rows: list[dict[str, Any]]) -> list[str]:
    """Names of runs, all different: longer where they would not be."""
    short = [f"{row['model']}/{Variant.parse(row['variant']).slug}" for row in rows]
    if len(set(short)) == len(short):
        return short
    sizes = [f"{name}/batch_{row.get('batch_size')}" for name, row in zip(short, rows, strict=True)]
    if len(set(sizes)) == len(sizes):
        return sizes
    return [f"{name}/row_{index}" for index, name in enumerate(short)]
