"""The steps of a search, each a function that a worker process calls."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from tfopt import runtimes
from tfopt.artifact import Artifact, measure_files
from tfopt.dataset import Dataset, calibration_batches, some_batches
from tfopt.errors import ConversionError, InputError
from tfopt.examples import Examples
from tfopt.measure import accuracy, latency
from tfopt.runtimes.base import Conversion, Session
from tfopt.source import Source
from tfopt.variant import Variant

EVALUATION_BATCH_SIZE = 32
NUM_TIMED_BATCHES = 8


def convert(
    source: Source,
    variant: Variant,
    folder: Path,
    parent_folder: Path | None,
    data: Dataset | None,
    batch_size: int,
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
        notes=[],
        signature=signature,
    )
    try:
        runtime.convert(variant, conversion)
        if not list(unfinished.iterdir()):
            raise ConversionError("The converter wrote nothing.")
        size_bytes, compressed_bytes = measure_files(unfinished)
        artifact = Artifact(
            unfinished, variant, runtime.parent(variant), source.sha256, conversion.signature,
            size_bytes, compressed_bytes, runtime.versions(), tuple(conversion.notes),
        )  # fmt: skip
        artifact.save()
        if data is not None and not runtime.precision_of(variant).is_unchanged:
            _check_runs(artifact, data)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return dataclasses.replace(artifact, folder=folder)


def _check_runs(artifact: Artifact, data: Dataset) -> None:
    """Runs an artifact once: some converters write files that no kernel can execute.

    Raises:
      ConversionError: with the runtime's reason.
    """
    batch = some_batches(data, artifact.signature, artifact.signature.batch_size or 1, 1)[0]
    try:
        with runtimes.load(artifact, None) as session:
            session.run(batch)
    except InputError:
        raise
    except Exception as error:  # runtimes raise errors of their own kinds
        lines = [line.strip() for line in str(error).splitlines()]
        telling = [
            line
            for line in lines
            if line and not line.startswith("<") and not line.endswith("error:")
            and "defined at" not in line
        ]  # fmt: skip
        reason = (telling or [type(error).__name__])[0]
        raise ConversionError(f"It was converted but does not run: {reason[:300]}") from error


_kept: dict[tuple[Path, int], Session] = {}


def _baseline(folder: Path, num_threads: int) -> Session:
    """The baseline's session; it stays open between calls."""
    if (folder, num_threads) not in _kept:
        for session in _kept.values():
            session.close()
        _kept.clear()
        _kept[folder, num_threads] = runtimes.load(Artifact.open(folder), num_threads)
    return _kept[folder, num_threads]


def measure(
    folder: Path,
    baseline_folder: Path | None,
    data: Dataset,
    *,
    metric: str,
    output_name: str,
    batch_size: int,
    num_threads: int,
    seed: int,
    reference_folder: Path,
    evaluation_file: Path,
) -> dict[str, latency.Timing]:
    """Evaluates an artifact and times it against the baseline.

    Args:
      folder: the artifact's.
      baseline_folder: what it is timed against; None to evaluate only.
      data: the examples.
      metric: name of the metric.
      output_name: the output that it looks at.
      batch_size: of the timing.
      num_threads: of every runtime.
      seed: of the order of blocks.
      reference_folder: the reference's outputs; written by the first call, read by the others.
      evaluation_file: gets the scores.

    Returns:
      Raw times of `baseline` and `candidate`; empty without a baseline.
    """
    artifact = Artifact.open(folder)
    is_reference = not (reference_folder / "index.json").exists()
    declared = runtimes.precision_of(artifact.variant)
    with runtimes.load(artifact, num_threads) as session:
        accuracy.evaluate(
            session,
            data.evaluation,
            metric_name=metric,
            output_name=output_name,
            batch_size=batch_size
            if declared.is_batch_dependent
            else max(batch_size, EVALUATION_BATCH_SIZE),
            reference=None if is_reference else Examples(reference_folder),
            write_reference=reference_folder if is_reference else None,
        ).save(evaluation_file)
        if baseline_folder is None:
            return {}
        return latency.time_sessions(
            {"baseline": _baseline(baseline_folder, num_threads), "candidate": session},
            some_batches(data, session.signature, batch_size, NUM_TIMED_BATCHES),
            seed=seed,
        )


def time_together(
    folders: Mapping[str, Path], data: Dataset, *, batch_size: int, num_threads: int, seed: int
) -> dict[str, latency.Timing]:
    """Times several artifacts in one interleaved run; the first is the one to compare with."""
    sessions: dict[str, Session] = {}
    try:
        for name, folder in folders.items():
            sessions[name] = runtimes.load(Artifact.open(folder), num_threads)
        signature = next(iter(sessions.values())).signature
        return latency.time_sessions(
            sessions,
            some_batches(data, signature, batch_size, NUM_TIMED_BATCHES),
            seed=seed,
            max_s=2.0 * len(sessions),
        )
    finally:
        for session in sessions.values():
            session.close()


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
