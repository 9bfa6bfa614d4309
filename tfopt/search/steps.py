"""The steps of a search, each a function that a worker process calls."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib
import os
import shutil
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from tfopt import runtimes
from tfopt.artifact import Artifact, measure_files
from tfopt.dataset import (
    Dataset,
    batch_shapes,
    calibration_batches,
    count_calibration_shapes,
    some_batches,
)
from tfopt.errors import ConversionError, InputError, first_line
from tfopt.measure import accuracy, diagnosis, environment, gpu, latency, throughput
from tfopt.measure.comparing import OUTPUTS_FILE, Reference
from tfopt.runtimes.base import Conversion, Runtime, Session
from tfopt.source import Source
from tfopt.trt.spec import EngineOptions
from tfopt.trt.target import Record
from tfopt.variant import Variant

EVALUATION_BATCH_SIZE = 32
NUM_TIMED_BATCHES = 4
NUM_MEMORY_RUNS = 2
NUM_PROFILED = 8  # inferences
NUM_SURVEYED = 32  # examples
MAX_RELOAD_S = 0.5


def convert(
    source: Source,
    variant: Variant,
    folder: Path,
    parent_folder: Path | None,
    data: Dataset | None,
    batch_size: int,
    engine: EngineOptions | None = None,
    notes: Sequence[str] = (),
) -> Artifact:
    """Converts one variant into a folder that appears as a whole or not at all.

    Raises:
      ConversionError: when the runtime cannot take the model.
    """
    runtime = runtimes.get(variant.runtime)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    parent = None if parent_folder is None else Artifact.open(parent_folder)
    signature = source.signature if parent is None else parent.signature
    size = signature.batch_size or batch_size
    conversion = Conversion(
        source=source,
        folder=unfinished,
        parent=parent,
        batch_size=size,
        calibration=calibration_batches(data, signature, size),
        num_calibration=0 if data is None else data.num_calibration,
        notes=[*([] if source.origin is None else [source.origin]), *notes],
        signature=signature,
        engine=engine or EngineOptions(),
        shapes=None if data is None else lambda: batch_shapes(data, signature, size),
        count_shapes=(None if data is None else lambda: count_calibration_shapes(data, signature)),
    )
    try:
        runtime.convert(variant, conversion)
        if (suitability := runtime.suitability(variant)) is not None:
            conversion.notes.append(suitability.reason)
        if not list(unfinished.iterdir()):
            raise ConversionError("The converter wrote nothing.")
        size_bytes, compressed_bytes = measure_files(unfinished)
        artifact = Artifact(
            unfinished, variant, runtime.parent(variant), source.sha256, conversion.signature,
            size_bytes, compressed_bytes, runtime.versions(), tuple(conversion.notes),
            needs=tuple(conversion.needs),
        )  # fmt: skip
        artifact.save()
        is_unchanged = runtime.precision_of(variant).is_unchanged
        if data is not None and not is_unchanged and _can_run_here(runtime):
            _check_runs(artifact, data, size if runtime.has_engines else 1)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return dataclasses.replace(artifact, folder=folder)


def _can_run_here(runtime: Runtime) -> bool:
    """Whether a runtime may be tried in this process, which may hold TensorFlow on a GPU."""
    return not (runtime.has_own_cuda and environment.gpus() and "tensorflow" in sys.modules)


def _check_runs(artifact: Artifact, data: Dataset, batch_size: int) -> None:
    """Runs an artifact once: some converters write files that no kernel can execute.

    Args:
      artifact: what was converted.
      data: gives the inputs.
      batch_size: where the artifact leaves it free.

    Raises:
      ConversionError: with the runtime's reason.
    """
    size = artifact.signature.batch_size or batch_size
    batch = some_batches(data, artifact.signature, size, 1)[0]
    try:
        with runtimes.load(artifact, None) as session:
            session.run(batch)
    except InputError:
        raise
    except Exception as error:  # runtimes raise errors of their own kinds
        reason = first_line(error)[:300]
        raise ConversionError(f"It was converted but does not run: {reason}") from error


def rebuild(artifact_folder: Path, folder: Path) -> Artifact:
    """Builds an artifact's engines anew into a folder that appears as a whole or not at all.

    Raises:
      InputError, ConversionError: as `Runtime.rebuild`.
    """
    artifact = Artifact.open(artifact_folder)
    runtime = runtimes.get(artifact.variant.runtime)
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        of_old_engines = Record.open(artifact.folder).details["notes"]
        lasting = [note for note in artifact.notes if note not in of_old_engines]
        notes = [*lasting, *runtime.rebuild(artifact, unfinished)]
        size_bytes, compressed_bytes = measure_files(unfinished)
        rebuilt = dataclasses.replace(
            artifact,
            folder=unfinished,
            size_bytes=size_bytes,
            compressed_bytes=compressed_bytes,
            versions=runtime.versions(),
            notes=tuple(notes),
            measured_on=None,
        )
        rebuilt.save()
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return dataclasses.replace(rebuilt, folder=folder)


@dataclasses.dataclass(frozen=True)
class ColdStart:
    """What a new process pays before its first answer.

    Attributes:
      load_ms: from the artifact on disk to a session; the runtime's library is imported already.
      first_run_ms: the first inference, which compiles where the runtime compiles late.
      peak_memory_bytes: the most that the process held, Python and libraries included.
      gpu_memory_bytes: what the process held of the GPU afterwards; None when it held nothing.
      is_first: whether the process had opened nothing before, without which this is no cold start.
    """

    load_ms: float
    first_run_ms: float
    peak_memory_bytes: int
    gpu_memory_bytes: int | None = None
    is_first: bool = True

    @property
    def cold_start_ms(self) -> float:
        """Load and first inference."""
        return self.load_ms + self.first_run_ms


@functools.cache
def _gpu_used_at_start() -> int | None:
    """Memory of the GPU that was in use before this process opened anything."""
    return gpu.used_bytes()


class _Opened:
    """An artifact that is open in this process, with the inputs that it is timed on."""

    def __init__(self, folder: Path, data: Dataset, batch_size: int, num_threads: int):
        self._artifact, self._num_threads = Artifact.open(folder), num_threads
        used_at_start = _gpu_used_at_start()
        importlib.import_module(runtimes.get(self._artifact.variant.runtime).library)
        self._batches = some_batches(data, self._artifact.signature, batch_size, NUM_TIMED_BATCHES)
        self._session: Session | None = None
        gc.freeze()  # what the library made is not looked at again when a session is closed
        load_s, first_run_s = self._load()
        # Runtimes that compile for each shape would do so again.
        shapes = {tuple(value.shape for value in batch.values()) for batch in self._batches}
        self._max_reload_s = MAX_RELOAD_S if len(shapes) == 1 else 0.0
        self._timer = latency.SessionTimer(self.session, self._batches)
        for _ in range(NUM_MEMORY_RUNS):
            self.session.run(self._batches[0])
        self.cold_start = ColdStart(
            load_s * 1e3,
            first_run_s * 1e3,
            environment.peak_resident_bytes(),
            gpu.held_bytes(used_at_start),
        )

    @property
    def session(self) -> Session:
        if self._session is None:
            self._load()
            assert self._session is not None
        return self._session

    def _load(self) -> tuple[float, float]:
        """Loads the artifact; returns the seconds of that, and of the first run."""
        times = [time.perf_counter()]
        self._session = runtimes.load(self._artifact, self._num_threads)
        times.append(time.perf_counter())
        self._session.run(self._batches[0])
        times.append(time.perf_counter())
        self._load_s, self._used_s = times[2] - times[0], 0.0
        return times[1] - times[0], times[2] - times[1]

    @contextlib.contextmanager
    def turn(self) -> Iterator[latency.SessionTimer]:
        """A timer; a model that loads quickly is closed when it was used four times as long.

        Where a model lies in memory, and whether it was loaded before or after another, changes
        its speed by up to a percent for as long as it is open. Opened anew time and again, in the
        random order of turns, models of one process change places.
        """
        self._timer.use(self.session)
        begin = time.perf_counter()
        try:
            yield self._timer
        finally:
            self._used_s += time.perf_counter() - begin
            if self._load_s < self._max_reload_s and self._used_s >= 4 * self._load_s:
                self.close()

    def device_seconds(self, num_runs: int) -> list[float] | None:
        return self.session.device_seconds(self._batches[0], num_runs)

    def close(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None
            gc.collect()  # TensorFlow's models hold each other


_open: dict[str, _Opened] = {}
_has_opened = False


def open_session(folder: Path, data: Dataset, *, batch_size: int, num_threads: int) -> ColdStart:
    """Loads an artifact in this process and keeps it open under its folder's name.

    The cold start is what it says only for the first session of a process.
    """
    global _has_opened
    name = str(folder)
    if name not in _open:
        is_first, _has_opened = not _has_opened, True
        opened = _Opened(folder, data, batch_size, num_threads)
        opened.cold_start = dataclasses.replace(opened.cold_start, is_first=is_first)
        _open[name] = opened
    return _open[name].cold_start


def close_session(folder: Path) -> None:
    """Closes a session, if it is open."""
    if (found := _open.pop(str(folder), None)) is not None:
        found.close()


def warm_up(folder: Path) -> list[float]:
    """See `latency.Timer`."""
    with _open[str(folder)].turn() as timer:
        return timer.warm_up()


def time_block(
    folder: Path, count: int, settle_s: float, cores: Collection[int] | None
) -> tuple[int, list[float]]:
    """See `latency.Timer`."""
    with _open[str(folder)].turn() as timer:
        return timer.block(count, settle_s, cores)


def device_seconds(folder: Path, num_runs: int) -> list[float] | None:
    """See `Session.device_seconds`; of an open session, with real inputs."""
    return _open[str(folder)].device_seconds(num_runs)


def measure_load(
    folder: Path,
    data: Dataset,
    *,
    batch_size: int,
    concurrency: int,
    arrival_rate_per_s: float | None,
    seconds: float,
    num_threads: int,
    seed: int,
) -> throughput.Load:
    """Opens as many sessions as there are clients, or servers, and puts them under load.

    The threads are shared out among them, at least one each; TensorFlow's serve the whole process.
    Of artifacts that a process can open only once, all have one session.
    """
    artifact = Artifact.open(folder)
    runtime = runtimes.get(artifact.variant.runtime)
    each = num_threads if runtime.shares_threads else max(1, num_threads // concurrency)
    batches = some_batches(data, artifact.signature, batch_size, NUM_TIMED_BATCHES)
    with contextlib.ExitStack() as stack:
        num_opened = 1 if runtime.opens_once else concurrency
        sessions = [stack.enter_context(runtimes.load(artifact, each)) for _ in range(num_opened)]
        sessions *= concurrency // num_opened
        if arrival_rate_per_s is None:
            return throughput.closed_loop(sessions, batches, seconds)
        return throughput.open_loop(sessions, batches, arrival_rate_per_s, seconds, seed)


def choose_metrics(folder: Path, data: Dataset, output_names: list[str]) -> dict[str, str]:
    """The metrics that fit the labels of an open session; see `accuracy.choose_metrics`."""
    return accuracy.choose_metrics(_open[str(folder)].session, data.evaluation, output_names)


def evaluate(
    folder: Path,
    data: Dataset,
    *,
    metrics: dict[str, str],
    output_name: str | None,
    batch_size: int,
    reference_folder: Path,
    evaluation_file: Path,
) -> None:
    """Runs an open session over the evaluation examples and writes its scores.

    The first session that is evaluated is the reference: its outputs go to `reference_folder`.

    Args:
      folder: of the artifact.
      data: with the examples.
      metrics: by output.
      output_name: the only output that is asked about; None is all of them.
      batch_size: examples in each run, where that changes results.
      reference_folder: the outputs of the model as saved.
      evaluation_file: gets the scores.
    """
    session = _open[str(folder)].session
    is_reference = not (reference_folder / OUTPUTS_FILE).exists()
    declared = runtimes.precision_of(session.artifact.variant)
    accuracy.evaluate(
        session,
        data.evaluation,
        metrics=metrics,
        output_name=output_name,
        batch_size=batch_size
        if declared.is_batch_dependent
        else max(batch_size, EVALUATION_BATCH_SIZE),
        reference=None if is_reference else Reference.open(reference_folder),
        write_reference=reference_folder if is_reference else None,
    ).save(evaluation_file)


def diagnose(
    folder: Path,
    data: Dataset,
    *,
    batch_size: int,
    num_threads: int | None,
    reference_folder: Path | None,
) -> diagnosis.Diagnosis:
    """Looks into an artifact with real inputs; see `diagnosis.diagnose`."""
    artifact = Artifact.open(folder)
    signature = artifact.signature
    size = signature.batch_size or batch_size
    batches = some_batches(data, signature, size, NUM_PROFILED)
    shapes = [[value.shape for value in batch.values()] for batch in batches]
    batches = [batch for batch, shape in zip(batches, shapes, strict=True) if shape == shapes[0]]
    each = signature.batch_size or 1  # every tensor inside is kept: few examples at a time
    examples = [
        inputs
        for inputs, _, count in data.evaluation.batches(signature, each, limit=NUM_SURVEYED)
        if count == each
    ]
    reference = None if reference_folder is None else Artifact.open(reference_folder)
    return diagnosis.diagnose(artifact, batches, examples, num_threads, reference)


def parents_of(variant: Variant) -> list[Variant]:
    """The variants that must be converted first, the earliest first.

    Raises:
      ConversionError: when they form a circle.
    """
    chain: list[Variant] = []
    parent = runtimes.get(variant.runtime).parent(variant)
    while parent is not None:
        if parent in chain or parent == variant:
            raise ConversionError(f"{variant} is its own parent.")
        chain.insert(0, parent)
        parent = runtimes.get(parent.runtime).parent(parent)
    return chain
