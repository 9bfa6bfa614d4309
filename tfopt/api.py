"""Converting, loading and timing single artifacts; `tfopt.optimize` does all of it for many."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfopt import dataset as datasets
from tfopt import live, runtimes, source_check
from tfopt import source as sources
from tfopt.artifact import Artifact
from tfopt.compare.comparison import Comparison
from tfopt.dataset.streams import open_text
from tfopt.errors import ConversionError, InputError, ResultError
from tfopt.first_examples import first_examples
from tfopt.graph import SIGNATURE_KEY
from tfopt.isolation import Limits, Worker
from tfopt.measure import environment, latency
from tfopt.measure.diagnosis import Diagnosis
from tfopt.runtimes.base import Session
from tfopt.search import steps
from tfopt.search.remote import RemoteSession, time_side_by_side
from tfopt.trt.spec import EngineOptions
from tfopt.variant import Variant


def load(folder: str | Path, num_threads: int | None = None) -> Session:
    """Opens an artifact, such as `OUTPUT_DIR/best`.

    Args:
      folder: that `tfopt.optimize` or `tfopt.convert` wrote.
      num_threads: threads inside the runtime; by default as many as it was measured with.

    Returns:
      A session; `session.run({name: array})` returns `{name: array}`.

    Raises:
      InputError: when the folder holds no artifact, or its runtime is not installed.

    Warns:
      UserWarning: when CPU or versions are not those that it was measured on.
    """
    artifact = Artifact.open(folder)
    measured = artifact.measured_on
    if measured is not None:
        now = {
            "CPU": environment.cpu_model(),
            **runtimes.get(artifact.variant.runtime).versions(),
        }
        before = {"CPU": measured["cpu"], **measured["versions"]}
        changed = [
            f"{name} {before[name]} then, {now.get(name, 'none')} now"
            for name in before
            if before[name] != now.get(name)
        ]
        if changed:
            warnings.warn(
                f"{artifact.variant} was chosen elsewhere: {'; '.join(changed)}. Its speed and "
                "outputs may differ; run tfopt.optimize here.",
                stacklevel=2,
            )
        if num_threads is None and artifact.variant.runtime != "tensorflow":
            num_threads = measured["num_threads"]
    return runtimes.load(artifact, num_threads)


def convert(
    model: Any,
    variant: str | Variant,
    output_dir: str | Path,
    data: Any = None,
    *,
    batch_size: int = 1,
    seed: int = 0,
    signature: str = SIGNATURE_KEY,
    custom_objects: str | None = None,
    import_modules: Sequence[str] = (),
    trust_model: bool = False,
    num_calibration: int = datasets.NUM_CALIBRATION,
    engine: EngineOptions | None = None,
    limits: Limits | None = None,
) -> Artifact:
    """Converts a model to one variant, in a child process.

    Args:
      model: as `tfopt.optimize` takes it.
      variant: for example `int8@litert`.
      output_dir: the artifact's folder; must not be there yet.
      data: examples to calibrate with, where the precision needs them.
      batch_size: for runtimes that need a fixed one.
      seed: of the choice of calibration examples.
      signature: of a SavedModel.
      custom_objects: module with the Keras layers and functions that the file needs.
      import_modules: modules that register TensorFlow custom ops.
      trust_model: whether Python code that is stored in a Keras file (a Lambda layer) may run.
      num_calibration: examples to calibrate with.
      engine: shapes, layers in float32 and cache of TensorRT engines.
      limits: on time and memory.

    Raises:
      InputError: for a wrong model, variant, data, folder, or shapes.
      ResultError: when the model cannot be converted; says why.
    """
    output_dir = _new_folder(output_dir)
    if isinstance(variant, str):
        expanded = runtimes.expand([variant])
        if len(expanded) != 1:
            raise InputError(f"{variant} stands for {len(expanded)} variants; name one.")
        variant = expanded[0]
    runtime = runtimes.get(variant.runtime)
    variant = runtime.canonical(variant)
    if reason := runtime.missing():
        raise InputError(f"{variant} cannot be made here: {reason}")
    if engine is not None and not runtime.has_engines:
        raise InputError(
            f"{variant} has no TensorRT engines that shapes or layers could be named for; leave "
            "them out, or convert for tf_trt or tensorrt."
        )
    work = _work_beside(output_dir)
    try:
        with Worker(work / "convert.log", limits, import_modules, keeps_log=False) as worker:
            common: dict[str, Any] = {
                "signature": signature,
                "custom_objects": custom_objects,
                "import_modules": tuple(import_modules),
                "trust_model": trust_model,
            }
            if isinstance(model, (str, Path)):
                path = model = sources.check_path(model)
            if isinstance(data, (str, Path)):
                data = open_text(str(data))
            if data is not None and source_check.is_keras(model):
                common["example"] = first_examples(data)
            if not isinstance(model, Path):
                path = work / "live"
                live.export(model, path, common.get("example"))
                common["sha256"] = live.hash_live(model)
                common["name"] = getattr(model, "name", None) or "model"
            source = worker.call("tfopt.source:prepare", path, work / "source", **common)
            dataset = None
            if data is not None:
                dataset = datasets.write(
                    data, source.signature, work / "data",
                    seed=seed, num_calibration=num_calibration,
                )  # fmt: skip
                source_check.check_model(
                    worker, model, source, dataset,
                    example=common.get("example"),
                    custom_objects=custom_objects,
                    trust_model=trust_model,
                )  # fmt: skip
            folders: dict[Variant, Path] = {}
            for step in (*steps.parents_of(variant), variant):
                parent = runtimes.get(step.runtime).parent(step)
                is_calibrated = runtimes.get(step.runtime).precision_of(step).is_calibrated
                folders[step] = work / "artifacts" / step.slug
                worker.call(
                    "tfopt.search.steps:convert",
                    source,
                    step,
                    folders[step],
                    None if parent is None else folders[parent],
                    dataset,
                    batch_size,
                    engine,
                    dataset.notes if dataset is not None and is_calibrated else (),
                )
        folders[variant].rename(output_dir)
        return Artifact.open(output_dir)
    except ConversionError as error:
        raise ResultError(f"{variant} could not be made: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def rebuild(
    artifact: str | Path,
    output_dir: str | Path,
    *,
    import_modules: Sequence[str] = (),
    limits: Limits | None = None,
) -> Artifact:
    """Builds the TensorRT engines of an artifact anew for this machine, in a child process.

    Engines belong to one GPU model and one version of TensorRT. What they are built from, ranges
    of int8 included, is in the artifact; neither the model nor data are needed.

    Args:
      artifact: folder that `tfopt.convert` or `tfopt.optimize` wrote, here or elsewhere.
      output_dir: the new artifact's folder; must not be there yet.
      import_modules: modules that register TensorFlow custom ops.
      limits: on time and memory.

    Raises:
      InputError: when the folder holds no artifact with engines, its runtime is missing here, or
        the new folder cannot be written.
      ResultError: when the engines cannot be built here; says why.
    """
    opened, output_dir = Artifact.open(artifact), _new_folder(output_dir)
    runtime = runtimes.get(opened.variant.runtime)
    if not runtime.has_engines:
        raise InputError(
            f"{opened.folder} is {opened.variant}, which runs on any machine as it is; only "
            "TensorRT engines are built anew."
        )
    if reason := runtime.missing():
        raise InputError(f"{opened.variant} cannot be built here: {reason}")
    folder = opened.folder.absolute()
    if output_dir.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{output_dir} lies inside the artifact {folder}; name a folder beside it."
        )
    work = _work_beside(output_dir)
    try:
        with Worker(work / "rebuild.log", limits, import_modules, keeps_log=False) as worker:
            worker.call("tfopt.search.steps:rebuild", folder, work / "rebuilt")
        (work / "rebuilt").rename(output_dir)
        return Artifact.open(output_dir)
    except ConversionError as error:
        raise ResultError(f"{opened.variant} could not be built anew: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def diagnose(
    artifact: str | Path,
    data: Any,
    reference: str | Path | None = None,
    *,
    batch_size: int = 1,
    num_threads: int | None = None,
    seed: int = 0,
    import_modules: Sequence[str] = (),
    limits: Limits | None = None,
) -> Diagnosis:
    """Says what makes an artifact slow or inaccurate, in a child process.

    Args:
      artifact: folder that `tfopt.convert` or `tfopt.optimize` wrote.
      data: gives the inputs; see `tfopt.dataset.write`.
      reference: the float32 artifact of the same runtime; with it, activations that quantization
        cuts off and channels that it kills are found.
      batch_size: examples in each inference.
      num_threads: of the runtime; None is every core that this process may use.
      seed: of the choice of examples.
      import_modules: modules that register TensorFlow custom ops.
      limits: on time and memory.

    Returns:
      Sentences, and the layers with their times where the runtime has a profiler: ONNX Runtime,
      OpenVINO and TensorFlow without XLA have one, LiteRT has none in Python.

    Raises:
      InputError: when a folder holds no artifact, the reference does not belong to it, or the
        data does not fit.
      ResultError: when the artifact does not run.
    """
    opened = Artifact.open(artifact)
    for name, value in (("batch_size", batch_size), ("num_threads", num_threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; expected a whole number of at least 1.")
    if reason := runtimes.get(opened.variant.runtime).missing():
        raise InputError(f"{opened.folder} cannot be run here: {reason}")
    folder = opened.folder.absolute()
    other = None
    if reference is not None:
        before = Artifact.open(reference)
        wanted = ("float32", opened.variant.runtime, opened.source_sha256)
        if (before.variant.precision, before.variant.runtime, before.source_sha256) != wanted:
            raise InputError(
                f"The reference is {before.variant} of {before.source_sha256[:12]}; expected "
                f"float32@{opened.variant.runtime} of {opened.source_sha256[:12]}, the model that "
                f"{opened.variant} was made from."
            )
        ports, wanted_ports = (
            [
                (spec.name, spec.dtype)
                for spec in (*found.signature.inputs, *found.signature.outputs)
            ]
            for found in (before, opened)
        )
        if ports != wanted_ports:
            raise InputError(
                f"The reference has {before.signature}; expected {opened.signature}, the signature "
                "that the artifact was made from."
            )
        other = before.folder.absolute()
    with tempfile.TemporaryDirectory(prefix="tfopt-") as name:
        dataset = datasets.write(data, opened.signature, Path(name, "data"), seed=seed)
        try:
            with Worker(
                Path(name, "diagnose.log"), limits, import_modules, keeps_log=False
            ) as worker:
                return worker.call(
                    "tfopt.search.steps:diagnose",
                    folder,
                    dataset,
                    batch_size=batch_size,
                    num_threads=num_threads or environment.num_cores(),
                    reference_folder=other,
                )
        except ConversionError as error:
            raise ResultError(f"{opened.variant} cannot be looked into: {error}") from error


def benchmark(
    artifacts: Sequence[str | Path],
    data: Any,
    *,
    batch_size: int = 1,
    num_threads: int | None = None,
    seed: int = 0,
    max_timing_s: float = latency.MAX_S,
    interval_width: float = latency.INTERVAL_WIDTH,
    concurrency: Sequence[int] = (),
    arrival_rates_per_s: Sequence[float] = (),
    load_batch_sizes: Sequence[int] = (),
    load_s: float = 3.0,
    import_modules: Sequence[str] = (),
    limits: Limits | None = None,
) -> Comparison:
    """Times artifacts side by side in one interleaved run; the first is the baseline.

    Args:
      artifacts: folders that `tfopt.convert` or `tfopt.optimize` wrote.
      data: gives the inputs; see `tfopt.dataset.write`.
      batch_size: examples in each inference.
      num_threads: of every runtime; None is every core that this process may use.
      seed: of the order.
      max_timing_s: seconds for each artifact after the first, however wide the interval is.
      interval_width: the timing ends when the 95 % interval of each speed-up is narrower than
        this share of it.
      concurrency: also put each artifact under the load of so many requests at a time; see
        `tfopt.measure.throughput`. The figures are in `Comparison.loads`.
      arrival_rates_per_s: with these rates of requests (open loop), besides clients that ask
        again as soon as they are answered (closed loop).
      load_batch_sizes: examples in each request under load; by default `batch_size`.
      load_s: seconds of each load.
      import_modules: modules that register TensorFlow custom ops.
      limits: on time and memory.

    Raises:
      InputError: when a folder holds no artifact or the data does not fit.
      ResultError: when an artifact does not run.
    """
    if not artifacts:
        raise InputError("No artifacts to time; give at least one folder.")
    latency.check_limits(max_timing_s, interval_width)
    opened = [Artifact.open(folder) for folder in artifacts]
    names = [str(artifact.folder) for artifact in opened]
    if len(set(names)) != len(names):
        raise InputError("An artifact stands twice in the list; name each once.")
    inputs = {tuple((s.name, s.dtype) for s in artifact.signature.inputs) for artifact in opened}
    if len(inputs) > 1:
        raise InputError(
            "The artifacts take different inputs, so that one data set cannot feed all."
        )
    num_threads = num_threads or environment.num_cores()
    if not all(isinstance(n, int) and n > 0 for n in (*concurrency, *load_batch_sizes)):
        raise InputError(
            f"concurrency is {list(concurrency)} and load_batch_sizes {list(load_batch_sizes)}; "
            "expected whole numbers of at least 1."
        )
    if arrival_rates_per_s and not concurrency:
        raise InputError("Arrival rates need to know how many serve; give concurrency, too.")
    with tempfile.TemporaryDirectory(prefix="tfopt-") as name:
        dataset = datasets.write(data, opened[0].signature, Path(name, "data"), seed=seed)
        try:
            # One process for each runtime: different ones disturb each other in one, and the same
            # one is up to 2 % faster in some processes than in others.
            with contextlib.ExitStack() as stack:
                workers: dict[str, Worker] = {}
                limits = limits or Limits()
                homes = [_home(artifact) for artifact in opened]
                sessions = {}
                for artifact, home in zip(opened, homes, strict=True):
                    if home not in workers:
                        memory = limits.memory_bytes
                        of_all = dataclasses.replace(
                            limits, memory_bytes=memory and memory * homes.count(home)
                        )
                        log = Path(name, "measure.log")
                        workers[home] = stack.enter_context(
                            Worker(log, of_all, import_modules, keeps_state=True, keeps_log=False)
                        )
                    sessions[str(artifact.folder)] = RemoteSession(
                        workers[home],
                        artifact.folder.absolute(),
                        dataset,
                        batch_size,
                        num_threads,
                    )
                timed = time_side_by_side(
                    sessions,
                    seed=seed,
                    max_s=max_timing_s * max(1, len(sessions) - 1),
                    interval_width=interval_width,
                    num_threads=num_threads,
                )
            loads = []
            for artifact in opened:
                folder = artifact.folder.absolute()
                with Worker(
                    Path(name, "load.log"), limits, import_modules, keeps_log=False
                ) as worker:
                    for size, clients, rate in itertools.product(
                        load_batch_sizes or (batch_size,), concurrency, (None, *arrival_rates_per_s)
                    ):
                        load = worker.call(
                            "tfopt.search.steps:measure_load",
                            folder,
                            dataset,
                            batch_size=size,
                            concurrency=clients,
                            arrival_rate_per_s=rate,
                            seconds=load_s,
                            num_threads=num_threads,
                            seed=seed,
                        )
                        about = {"variant": str(artifact.variant), "artifact": str(artifact.folder)}
                        times = [round(value, 7) for value in load.latencies_s]
                        loads.append({**about, **load.summary(), "latencies_s": times})
        except ConversionError as error:
            raise ResultError(f"The artifacts could not be timed: {error}") from error
        description = dataset.describe()
    rows = []
    for artifact, name in zip(opened, names, strict=True):
        figures = timed.figures(names[0], name)
        is_alone = homes.count(_home(artifact)) == 1
        rows.append(
            {
                "model": artifact.source_sha256[:12],
                "variant": str(artifact.variant),
                "parent": str(artifact.parent or "source"),
                "batch_size": batch_size,
                "num_threads": num_threads,
                "status": "ok",
                "chosen": False,
                **figures,
                "throughput_per_s": batch_size / figures["median_ms"] * 1e3,
                "size_bytes": artifact.size_bytes,
                "compressed_bytes": artifact.compressed_bytes,
                # Of a process with several models it is not known which holds what.
                "gpu_memory_bytes": sessions[name].cold_start.gpu_memory_bytes
                if is_alone
                else None,
                "reason": " ".join([name, *timed.notes[name]]),
                "notes": timed.notes[name],
                "timing": {"file": None, "key": name},
            }
        )
    summary = [f"Speed-ups are against {opened[0].variant}, interleaved in one run."]
    if timed.device_s:
        summary.append("median_ms contains the copies to the GPU and back, device_ms does not.")
    details = {
        "model": "benchmark",
        "baseline": str(opened[0].variant),
        "baseline_artifact": opened[0].identity(),
        "data": description,
        "environment": environment.describe(),
        "loads": loads,
        **timed.to_json(),
        "summary": " ".join(summary),
    }
    return Comparison(tuple(rows), details)


def _home(artifact: Artifact) -> str:
    """Which process an artifact is timed in, together with others of that process.

    Engines have one each: those of TF-TRT go by names that several models share.
    """
    runtime = runtimes.get(artifact.variant.runtime)
    return str(artifact.folder) if runtime.has_engines else runtime.name


def _new_folder(output_dir: str | Path) -> Path:
    """The absolute path of a folder that is not there yet.

    Raises:
      InputError: when it is.
    """
    folder = Path(output_dir).absolute()
    if folder.exists():
        raise InputError(f"{folder} exists already; nothing was overwritten, name another.")
    return folder


def _work_beside(output_dir: Path) -> Path:
    """A new folder on the same disk, from which the result is moved when it is whole.

    Raises:
      InputError: when nothing can be written there.
    """
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{output_dir.name}.", dir=output_dir.parent))
    except OSError as error:
        raise InputError(f"{output_dir} cannot be written ({error.strerror}).") from error
