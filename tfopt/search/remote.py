"""Artifacts that run in worker processes, which take turns when they are timed."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from tfopt.dataset import Dataset
from tfopt.isolation import Worker
from tfopt.search.steps import ColdStart


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

    def evaluate(
        self, metric: str, output_name: str, reference_folder: Path, evaluation_file: Path
    ) -> None:
        """See `steps.evaluate`."""
        self._worker.call(
            "tfopt.search.steps:evaluate",
            self._folder,
            self._data,
            metric=metric,
            output_name=output_name,
            batch_size=self._batch_size,
            reference_folder=reference_folder,
            evaluation_file=evaluation_file,
        )

    def close(self) -> None:
        """Closes the session in the worker."""
        self._worker.call("tfopt.search.steps:close_session", self._folder)
