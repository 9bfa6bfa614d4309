"""Load time, first inference and memory of an artifact in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import time
from pathlib import Path

from tfopt import dataset, runtimes
from tfopt.artifact import Artifact
from tfopt.measure import environment

NUM_RUNS = 3


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """What a new process pays before its first answer.

    Attributes:
      import_ms: importing the runtime's library.
      load_ms: from the artifact on disk to a session.
      first_run_ms: the first inference, which compiles where the runtime compiles late.
      peak_memory_bytes: the most memory that the process held, Python and libraries included.
    """

    import_ms: float
    load_ms: float
    first_run_ms: float
    peak_memory_bytes: int

    @property
    def cold_start_ms(self) -> float:
        """Load and first inference; the import is not counted."""
        return self.load_ms + self.first_run_ms


def measure(folder: Path, data: dataset.Dataset, batch_size: int, num_threads: int) -> ColdStart:
    """Loads and runs an artifact; call it once in a fresh process.

    Args:
      folder: the artifact's.
      data: gives the inputs.
      batch_size: examples in each inference.
      num_threads: threads inside the runtime.
    """
    artifact = Artifact.open(folder)
    batch = dataset.some_batches(data, artifact.signature, batch_size, 1)[0]
    clock = time.perf_counter
    times = [clock()]
    importlib.import_module(runtimes.get(artifact.variant.runtime).library)
    times.append(clock())
    with runtimes.load(artifact, num_threads) as session:
        times.append(clock())
        session.run(batch)
        times.append(clock())
        for _ in range(NUM_RUNS - 1):
            session.run(batch)
    import_ms, load_ms, first_run_ms = (
        (after - before) * 1e3 for before, after in itertools.pairwise(times)
    )
    return ColdStart(import_ms, load_ms, first_run_ms, environment.peak_resident_bytes())
