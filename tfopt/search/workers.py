"""The processes of a search: what runs where."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from tfopt import runtimes
from tfopt.isolation import Limits, Worker
from tfopt.search.options import Options
from tfopt.search.remote import RemoteSession
from tfopt.search.run import Run
from tfopt.variant import Variant


class Workers:
    """One worker converts, another holds the baseline and everything else that runs on TensorFlow.

    Each other candidate is evaluated and timed in a worker of its own.

    Args:
      folder: the output folder; logs lie in it.
      options: of the search.
      is_tensorflow: whether the model is TensorFlow's or Keras's.

    Attributes:
      converter: converts, and looks into what it made.
      baseline: holds the baseline.
    """

    def __init__(self, folder: Path, options: Options, is_tensorflow: bool):
        self._folder, self._options = folder, options
        self._all: list[Worker] = []
        # Keras and TensorFlow models need TensorFlow in both; the other formats may not.
        preload = ("tensorflow",) if is_tensorflow else ()
        self.converter = self._new("convert", preload)
        self.baseline = self._new("baseline", preload, keeps_state=True)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        try:
            self.baseline.close(kill=error is not None)
        finally:
            self.converter.close(kill=error is not None)

    @property
    def startup_s(self) -> float:
        """Seconds that starting processes took so far."""
        return sum(worker.startup_s for worker in self._all)

    def training(self) -> Worker:
        """A new worker that may take as long as training takes."""
        limits = dataclasses.replace(self._options.limits, timeout_s=float("inf"))
        return self._new("distill", ("tensorflow",), limits)

    def measuring(self, variant: Variant) -> Worker:
        """A new worker for one variant."""
        library = runtimes.get(variant.runtime).library
        return self._new("measure", (library,), keeps_state=True)

    def shares_baseline(self, run: Run, variant: Variant) -> bool:
        """Whether a variant runs in the baseline's process."""
        runtime = runtimes.get(variant.runtime)
        return variant in run.plan.baselines or (
            runtime.shares_threads and variant.runtime == run.as_saved.runtime
        )

    @contextlib.contextmanager
    def opened(self, run: Run, variants: Sequence[Variant]) -> Iterator[dict[str, RemoteSession]]:
        """Opens variants where they are measured, and closes all but the baseline."""
        with contextlib.ExitStack() as stack:
            sessions: dict[str, RemoteSession] = {}
            for variant in variants:
                is_shared = self.shares_baseline(run, variant)
                worker = self.baseline
                if not is_shared:
                    worker = stack.enter_context(self.measuring(variant))
                session = open_in(worker, run, run.artifact_folder(variant))
                sessions[str(variant)] = session
                if is_shared and variant != run.baseline:
                    stack.callback(session.close)
            yield sessions

    def _new(
        self,
        name: str,
        preload: Sequence[str],
        limits: Limits | None = None,
        keeps_state: bool = False,
    ) -> Worker:
        options = self._options
        worker = Worker(
            self._folder / "logs" / f"{name}.log",
            limits or options.limits,
            options.import_modules,
            preload,
            keeps_state,
        )
        self._all.append(worker)
        return worker


def open_in(worker: Worker, run: Run, folder: Path) -> RemoteSession:
    """Opens an artifact of a search in a worker."""
    return RemoteSession(worker, folder, run.dataset, run.batch_size, run.num_threads)
