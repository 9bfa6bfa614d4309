"""Artifacts that run in worker processes, which take turns when they are timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt.dataset import Dataset
from tfopt.errors import ConversionError, InputError
from tfopt.isolation import Worker
from tfopt.measure import gpu, latency
from tfopt.search import results
from tfopt.search.steps import ColdStart

DEVICE_S = 2.0  # for the times without copies, about, within these numbers of runs
MIN_DEVICE_RUNS = 5
MAX_DEVICE_RUNS = 50


class RemoteSession:
    """An artifact that is open in a worker; a `tfopt.measure.latency.Timer`.

    Args:
      worker: where to open it; it stays open until `close`, or until the worker ends.
      folder: the artifact's.
      data: gives the inputs.
      batch_size: examples in each timed inference.
      num_threads: of the runtime.

    Attributes:
      cold_start: of the artifact, if it is the first that the worker opened.
    """

    def __init__(
        self, worker: Worker, folder: Path, data: Dataset, batch_size: int, num_threads: int
    ):
        self._worker, self._folder, self._data = worker, folder, data
        self._batch_size = batch_size
        self.cold_start: ColdStart = worker.call(
            "tfopt.search.steps:open_session",
            folder,
            data,
            batch_size=batch_size,
            num_threads=num_threads,
        )

    def warm_up(self) -> list[float]:
        """See `latency.Timer`."""
        return self._worker.call("tfopt.search.steps:warm_up", self._folder)

    def block(
        self, count: int, settle_s: float, cores: Collection[int] | None
    ) -> tuple[int, list[float]]:
        """See `latency.Timer`."""
        function = "tfopt.search.steps:time_block"
        return self._worker.call(function, self._folder, count, settle_s, cores)

    def device_seconds(self, num_runs: int) -> list[float] | None:
        """See `Session.device_seconds`."""
        return self._worker.call("tfopt.search.steps:device_seconds", self._folder, num_runs)

    def choose_metrics(self, output_names: list[str]) -> dict[str, str]:
        """See `steps.choose_metrics`."""
        function = "tfopt.search.steps:choose_metrics"
        return self._worker.call(function, self._folder, self._data, output_names)

    def evaluate(
        self,
        metrics: Mapping[str, str],
        output_name: str | None,
        reference_folder: Path,
        evaluation_file: Path,
    ) -> None:
        """See `steps.evaluate`."""
        self._worker.call(
            "tfopt.search.steps:evaluate",
            self._folder,
            self._data,
            metrics=dict(metrics),
            output_name=output_name,
            batch_size=self._batch_size,
            reference_folder=reference_folder,
            evaluation_file=evaluation_file,
        )

    def close(self) -> None:
        """Closes the session in the worker."""
        self._worker.call("tfopt.search.steps:close_session", self._folder)


@dataclasses.dataclass(frozen=True)
class Timed:
    """What a run in which sessions took turns found, by their names.

    Attributes:
      timings: raw times from host arrays to host arrays, so that they contain every copy.
      device_s: raw times without copies, in seconds: inputs lie on the GPU already, outputs stay
        there. Sessions are missing that run elsewhere, or whose runtime does not tell.
      notes: sentences on what makes the times of a session doubtful.
      gpu_before: state of the GPU before the run, see `gpu.state`; None without one.
      gpu_after: and after it.
    """

    timings: dict[str, latency.Timing]
    device_s: dict[str, list[float]]
    notes: dict[str, list[str]]
    gpu_before: dict[str, Any] | None
    gpu_after: dict[str, Any] | None

    def figures(self, baseline: str, name: str) -> dict[str, Any]:
        """The table's figures of a session against those of the baseline."""
        device_s = self.device_s.get(name)
        return {
            **results.timed(self.timings[baseline], self.timings[name]),
            "device_ms": float(np.median(device_s)) * 1e3 if device_s else None,
        }

    def to_json(self) -> dict[str, Any]:
        """All raw values, as a plain dictionary."""
        return {
            "timings": {name: timing.to_json() for name, timing in self.timings.items()},
            "device_seconds": self.device_s,
            "gpu_before": self.gpu_before,
            "gpu_after": self.gpu_after,
        }


def time_side_by_side(sessions: Mapping[str, RemoteSession], **options: Any) -> Timed:
    """Times open sessions in turns, then asks each for its times without copies.

    Args:
      sessions: by name; the first is what the others are compared with.
      **options: of `latency.time_interleaved`.
    """
    before = gpu.state()
    timings = latency.time_interleaved(sessions, **options)
    after = gpu.state()
    device_s: dict[str, list[float]] = {}
    notes: dict[str, list[str]] = {name: [] for name in sessions}
    if before is not None:
        for name, session in sessions.items():
            count = round(DEVICE_S / timings[name].median_s)
            try:
                found = session.device_seconds(max(MIN_DEVICE_RUNS, min(MAX_DEVICE_RUNS, count)))
            except (ConversionError, InputError) as error:
                notes[name].append(f"The time without copies was not measured: {error}")
                continue
            if found:
                device_s[name] = found
            if found or session.cold_start.gpu_memory_bytes:
                notes[name] += gpu.notes_on(before, after)
    return Timed(timings, device_s, notes, before, after)
