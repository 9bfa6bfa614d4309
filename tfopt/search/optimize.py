"""The main job: from a model to the fastest version inside the budget, with the proof."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tfopt import dataset as datasets
from tfopt import runtimes
from tfopt import source as sources
from tfopt.artifact import Artifact
from tfopt.compare.comparison import Comparison
from tfopt.errors import ConversionError, InputError, ResultError
from tfopt.graph import SIGNATURE_KEY
from tfopt.isolation import Limits, Worker
from tfopt.measure import accuracy, environment, latency, statistics
from tfopt.measure.accuracy import Evaluation
from tfopt.search import steps
from tfopt.search.budget import Budget
from tfopt.search.candidates import Plan, plan
from tfopt.search.ledger import FILE_NAME as LEDGER
from tfopt.search.ledger import Ledger
from tfopt.search.progress import Progress, duration
from tfopt.source import Source
from tfopt.variant import Variant

if TYPE_CHECKING:
    import pandas as pd

    from tfopt.runtimes.base import Session

NUM_FINALISTS = 4
CONTENTS = (
    "artifacts", "best", "data", "evaluations", "logs", "source", "timings", LEDGER,
    "results.csv", "results.json", "report.html",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything besides model, data and budget that shapes a search.

    Attributes:
      variants: variants and patterns to try; None is everything that suits this machine.
      metric: a name or `package.module:function`; None chooses by the labels.
      output_name: the output that is scored, where the model has several.
      batch_size: of the timing.
      num_threads: of every runtime; None is every core that this process may use.
      seed: of the split and of the order of timings.
      signature: of a SavedModel.
      custom_objects: module with the Keras layers and functions that the file needs.
      import_modules: modules that register TensorFlow custom ops.
      num_calibration: examples to calibrate with.
      limits: for each conversion and each measurement.
    """

    variants: tuple[str, ...] | None = None
    metric: str | None = None
    output_name: str | None = None
    batch_size: int = 1
    num_threads: int | None = None
    seed: int = 0
    signature: str = SIGNATURE_KEY
    custom_objects: str | None = None
    import_modules: tuple[str, ...] = ()
    num_calibration: int = datasets.NUM_CALIBRATION
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        for name in ("batch_size", "num_threads", "num_calibration"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"{name} is {value!r}; expected a whole number of at least 1.")
        if self.variants is not None:
            runtimes.expand(self.variants)
        if self.metric is not None:
            accuracy.find_metric(self.metric)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
      output_dir: holds `best/`, `results.csv`, `results.json` and `report.html`.
      best: the artifact to ship, in `best/`; None when nothing meets the limits.
      comparison: the table and everything behind it.
      summary: what was chosen and why, in a few sentences.
    """

    output_dir: Path
    best: Artifact | None
    comparison: Comparison
    summary: str

    @property
    def table(self) -> pd.DataFrame:
        """One row a variant, failures included; columns as in `results.csv`."""
        return self.comparison.table

    def load(self) -> Session:
        """A session of the best version.

        Raises:
          ResultError: when nothing met the limits.
        """
        if self.best is None:
            raise ResultError(self.summary)
        return runtimes.load(self.best)


def optimize(
    model: Any,
    data: Any,
    budget: Budget | None = None,
    output_dir: str | Path = "optimized",
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Result:
    """Finds the fastest version of a model that stays inside a budget on this machine.

    Every variant is converted in a child process, run over the evaluation examples, and timed
    against the fastest unchanged way of running the model, interleaved in one process. A variant
    that fails is a row with its reason. Finished steps are on disk: an interrupted search goes on
    with `resume=True`.

    Args:
      model: path to a SavedModel folder, .keras, .h5, .tflite or .onnx; or a built Keras 3 or
        tf_keras model, or a tf.function with an input signature.
      data: see `tfopt.dataset.write`; labels are needed for a metric, without them variants are
        compared with the baseline's own outputs.
      budget: limits; by default at most one point of accuracy.
      output_dir: empty or new.
      resume: go on with an output folder of the same source, data and options.
      overwrite: delete what an earlier search left in the output folder.
      quiet: print no progress.
      **options: fields of `Options`.

    Raises:
      InputError: for a wrong model, data, option or output folder.
      ResultError: when the model itself does not run.
    """
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(Options)})
    if unknown:
        valid = ", ".join(field.name for field in dataclasses.fields(Options))
        raise InputError(f"Unknown option {', '.join(unknown)}; the options are: {valid}.")
    for name in ("variants", "import_modules"):
        if options.get(name) is not None:
            options[name] = tuple(options[name])
    chosen = Options(**options)
    if isinstance(model, (str, Path)):
        model = sources.check_path(model)
    folder = claim_folder(Path(output_dir), resume, overwrite)
    return _Search(model, data, budget or Budget(), folder, chosen, Progress(quiet)).run()


def claim_folder(folder: Path, resume: bool, overwrite: bool) -> Path:
    """Makes the output folder, and empties it if that was asked for.

    Raises:
      InputError: when it holds something and neither was asked for, holds what tfopt did not
        write, or cannot be written.
    """
    folder = folder.absolute()
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one.")
    try:
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file; --output_dir must be a folder.")
        is_full = folder.exists() and any(folder.iterdir())
        if resume and not (folder / LEDGER).is_file():
            raise InputError(f"Nothing to resume in {folder}: it holds no {LEDGER}.")
        if is_full and overwrite:
            if not (folder / LEDGER).is_file():
                raise InputError(
                    f"{folder} was not written by tfopt, so --overwrite leaves it alone; name "
                    "another --output_dir."
                )
            for name in CONTENTS:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        elif is_full and not resume:
            raise InputError(
                f"{folder} is not empty; give --resume to go on with it, --overwrite to start "
                "again, or another --output_dir."
            )
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-{time.monotonic_ns()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); name another --output_dir."
        ) from error
    return folder


class _Search:
    """One run of `optimize`; each method is one stage."""

    def __init__(
        self, model: Any, data: Any, budget: Budget, folder: Path, options: Options,
        progress: Progress,
    ):  # fmt: skip
        self.model, self.data, self.budget = model, data, budget
        self.folder, self.options, self.progress = folder, options, progress
        self.num_threads = options.num_threads or environment.num_cores()
        worker = functools.partial(
            Worker, limits=options.limits, import_modules=options.import_modules
        )
        self.converter = worker(folder / "logs" / "convert.log")
        self.measurer = worker(folder / "logs" / "measure.log")
        self.failures: dict[Variant, str] = {}
        self.baseline: Variant | None = None

    def run(self) -> Result:
        begin = time.monotonic()
        try:
            with self.converter, self.measurer:
                self._open()
                self._pilot()
                for variant in self.plan.candidates:
                    self._try(variant)
                    self._write_results(None)
                finalists = self._final()
        except KeyboardInterrupt:
            self.progress.say(
                f"Interrupted; everything finished is in {self.folder}, go on with --resume."
            )
            raise
        result = self._choose(finalists)
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        self.progress.say(f"Searched for {duration(time.monotonic() - begin)}.")
        return result

    # Preparing.

    def _open(self) -> None:
        """Source, data, plan and ledger; checks that a resumed run is the same run."""
        self.progress.say("Reading the model …")
        self.source = self._prepare_source()
        self._check_batch_size()
        self.progress.say("Reading the data …")
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        self.dataset = datasets.write(
            self.data,
            self.source.signature,
            self.folder / "data",
            seed=self.options.seed,
            num_calibration=self.options.num_calibration,
        )
        for note in (*self.source.notes, *self.dataset.notes):
            self.progress.say(f"Note: {note}")
        self.output_name = self._choose_output()
        self.metric = self.options.metric or self._choose_metric()
        self.plan: Plan = plan(self.source.kind, self.options.variants)
        self.ledger = Ledger(self.folder, self._identity())
        shutil.rmtree(self.folder / "best", ignore_errors=True)

    def _identity(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.options)
        del options["limits"]
        return {
            "source": self.source.sha256,
            "data": self.dataset.sha256,
            **options,
            "metric": self.metric,
            "output_name": self.output_name,
            "num_threads": self.num_threads,
            **dataclasses.asdict(self.budget),
            "cpu": environment.cpu_model(),
            "versions": environment.versions(),
        }

    def _prepare_source(self) -> Source:
        folder = self.folder / "source"
        shutil.rmtree(folder, ignore_errors=True)
        common = {
            "signature": self.options.signature,
            "custom_objects": self.options.custom_objects,
            "import_modules": self.options.import_modules,
        }
        if isinstance(self.model, Path):
            path = self.model
        else:
            live = self.folder / "source_export"
            shutil.rmtree(live, ignore_errors=True)
            sources.export(self.model, live)
            path = live
            common["sha256"] = sources.hash_live(self.model)
            common["name"] = getattr(self.model, "name", None) or "model"
        try:
            source = self.converter.call("tfopt.source:prepare", path, folder, **common)
        except ConversionError as error:
            raise InputError(f"The model cannot be loaded: {error}") from error
        if path != self.model:
            path.rename(folder / "saved_model")
            source = dataclasses.replace(source, path=folder / "saved_model")
        return source

    def _check_batch_size(self) -> None:
        fixed = self.source.signature.batch_size
        if fixed not in (None, self.options.batch_size):
            raise InputError(
                f"The model takes batches of {fixed} only and --batch_size is "
                f"{self.options.batch_size}; set it to {fixed}."
            )

    def _choose_output(self) -> str:
        names = self.source.signature.output_names
        wanted = self.options.output_name
        if wanted is not None and wanted not in names:
            raise InputError(f"No output {wanted!r}; the model's outputs are: {', '.join(names)}.")
        if wanted is None and len(names) > 1 and self.dataset.has_labels:
            raise InputError(
                f"The model has outputs {', '.join(names)}; say which one the labels belong to "
                "with --output_name."
            )
        return wanted or names[0]

    def _choose_metric(self) -> str:
        spec = next(s for s in self.source.signature.outputs if s.name == self.output_name)
        batches = self.dataset.evaluation.batches(self.source.signature, 64)
        _, labels, _ = next(batches)
        metric = accuracy.choose_metric(spec.shape, labels)
        self.progress.say(f"Metric: {metric} (choose another with --metric).")
        return metric

    # Converting and measuring.

    def artifact_folder(self, variant: Variant) -> Path:
        return self.folder / "artifacts" / variant.slug

    def _convert(self, variant: Variant) -> None:
        """Converts a variant and what it starts from, unless that was done.

        Raises:
          ConversionError: when it cannot be converted.
        """
        chain = steps.parents_of(variant)
        for parent, child in itertools.pairwise([None, *chain, variant]):
            assert child is not None
            record = self.ledger.get("convert", child)
            if record is None:
                record = self._convert_one(child, parent)
            if record["reason"] is not None:
                start = "" if child == variant else f"It starts from {child}: "
                raise ConversionError(start + record["reason"])

    def _convert_one(self, variant: Variant, parent: Variant | None) -> dict[str, Any]:
        folder = self.artifact_folder(variant)
        begin = time.perf_counter()
        reason = None
        if not folder.exists():
            try:
                self.converter.call(
                    "tfopt.search.steps:convert",
                    self.source,
                    variant,
                    folder,
                    None if parent is None else self.artifact_folder(parent),
                    self.dataset,
                    self.options.batch_size,
                )
            except ConversionError as error:
                reason = str(error)
        seconds = time.perf_counter() - begin
        return self.ledger.add("convert", variant, reason=reason, seconds=seconds)

    def _measure(self, variant: Variant, baseline: Variant | None) -> dict[str, Any]:
        record = self.ledger.get("measure", variant)
        if record is not None:
            return record
        begin = time.perf_counter()
        values: dict[str, Any] = {"reason": None}
        try:
            timings = self.measurer.call(
                "tfopt.search.steps:measure",
                self.artifact_folder(variant),
                None if baseline is None else self.artifact_folder(baseline),
                self.dataset,
                metric=self.metric,
                output_name=self.output_name,
                batch_size=self.options.batch_size,
                num_threads=self.num_threads,
                seed=self.options.seed,
                reference_folder=self.folder / "data" / "reference",
                evaluation_file=self._evaluation_file(variant),
            )
            if timings:
                values |= self._keep_timings(str(variant), timings, "baseline", "candidate")
        except ConversionError as error:
            values["reason"] = str(error)
        values["seconds"] = time.perf_counter() - begin
        return self.ledger.add("measure", variant, **values)

    def _evaluation_file(self, variant: Variant) -> Path:
        return self.folder / "evaluations" / f"{variant.slug}.npz"

    def _keep_timings(
        self, name: str, timings: dict[str, latency.Timing], baseline: str, candidate: str
    ) -> dict[str, Any]:
        """Writes raw times to disk and returns what the table says of them."""
        path = self.folder / "timings" / f"{name.replace('/', '_')}.json"
        path.parent.mkdir(exist_ok=True)
        value = {
            "environment": environment.describe(),
            "batch_size": self.options.batch_size,
            "num_threads": self.num_threads,
            "timings": {key: timing.to_json() for key, timing in timings.items()},
        }
        path.write_text(json.dumps(value))
        ratio = latency.speedup(timings[baseline], timings[candidate], self.options.seed)
        return {
            **timings[candidate].summary(),
            "speedup": ratio.estimate,
            "speedup_low": ratio.low,
            "speedup_high": ratio.high,
            "verdict": statistics.verdict(ratio),
        }

    def _cold_start(self, variant: Variant) -> dict[str, Any]:
        record = self.ledger.get("cold_start", variant)
        if record is not None:
            return record
        begin = time.perf_counter()
        values: dict[str, Any] = {}
        with Worker(
            self.folder / "logs" / "cold_start.log",
            self.options.limits,
            self.options.import_modules,
        ) as worker:
            try:
                cold = worker.call(
                    "tfopt.measure.cold_start:measure",
                    self.artifact_folder(variant),
                    self.dataset,
                    self.options.batch_size,
                    self.num_threads,
                )
                values = {
                    "cold_start_ms": cold.cold_start_ms,
                    "peak_memory_bytes": cold.peak_memory_bytes or None,
                }
            except ConversionError as error:
                values = {"note": f"The cold start was not measured: {error}"}
        values["seconds"] = time.perf_counter() - begin
        return self.ledger.add("cold_start", variant, **values)

    def _pilot(self) -> None:
        """Runs the unchanged model in every way its own runtime has; the fastest is the baseline.

        Raises:
          ResultError: when the model does not run as it was saved.
        """
        baselines = self.plan.baselines
        as_saved = baselines[0]
        self.progress.start(len(baselines) + len(self.plan.candidates))
        # The reference's outputs are not kept after a search, so a resumed one makes them again.
        self._make_reference(as_saved)
        running = [as_saved]
        for variant in baselines[1:]:
            try:
                self._convert(variant)
            except ConversionError as error:
                self._fail(variant, str(error))
                continue
            record = self._measure(variant, None)
            if record["reason"] is not None:
                self._fail(variant, record["reason"])
            else:
                running.append(variant)
        record = self.ledger.get("pilot") or self._time_pilot(running)
        self.baseline = Variant.parse(record["baseline"])
        for variant in running:
            self._cold_start(variant)
            self.progress.finish(
                f"{variant}: {record['rows'][str(variant)]['median_ms']:.3g} ms"
                + (", the baseline" if variant == self.baseline else "")
            )
        self._write_results(None)

    def _make_reference(self, as_saved: Variant) -> None:
        try:
            self._convert(as_saved)
            record = self.ledger.get("measure", as_saved)
            if record is None:
                record = self._measure(as_saved, None)
            else:
                self.measurer.call(
                    "tfopt.search.steps:measure",
                    self.artifact_folder(as_saved), None, self.dataset,
                    metric=self.metric, output_name=self.output_name,
                    batch_size=self.options.batch_size, num_threads=self.num_threads,
                    seed=self.options.seed,
                    reference_folder=self.folder / "data" / "reference",
                    evaluation_file=self._evaluation_file(as_saved),
                )  # fmt: skip
            if record["reason"] is not None:
                raise ConversionError(record["reason"])
        except ConversionError as error:
            raise ResultError(f"The model itself does not run on this data: {error}") from error

    def _time_pilot(self, running: Sequence[Variant]) -> dict[str, Any]:
        timings = self.measurer.call(
            "tfopt.search.steps:time_together",
            {str(variant): self.artifact_folder(variant) for variant in running},
            self.dataset,
            batch_size=self.options.batch_size,
            num_threads=self.num_threads,
            seed=self.options.seed,
        )
        medians = {name: timing.summary()["median_ms"] for name, timing in timings.items()}
        baseline = min(medians, key=lambda name: medians[name] or math.inf)
        rows = {name: self._keep_timings("pilot", timings, baseline, name) for name in timings}
        return self.ledger.add("pilot", baseline=baseline, rows=rows)

    def _try(self, variant: Variant) -> None:
        """Converts, evaluates and times one candidate."""
        try:
            self._convert(variant)
            record = self._measure(variant, self.baseline)
            if record["reason"] is not None:
                raise ConversionError(record["reason"])
        except ConversionError as error:
            self._fail(variant, str(error))
            return
        self._cold_start(variant)
        self.progress.finish(
            f"{variant}: {record['median_ms']:.3g} ms, {record['speedup']:.2f} × the baseline"
        )

    def _fail(self, variant: Variant, reason: str) -> None:
        self.failures[variant] = reason
        self.progress.finish(f"{variant}: failed, {reason}")

    # Choosing.

    def _row(self, variant: Variant) -> dict[str, Any]:
        """The columns of one variant, from what is on disk."""
        row: dict[str, Any] = {
            "model": self.source.name,
            "variant": str(variant),
            "batch_size": self.options.batch_size,
            "num_threads": self.num_threads,
            "chosen": False,
        }
        if variant in self.plan.skipped:
            return row | {"status": "skipped", "reason": self.plan.skipped[variant]}
        folder = self.artifact_folder(variant)
        if folder.exists():
            artifact = Artifact.open(folder)
            row |= {
                "parent": str(artifact.parent or "source"),
                "size_bytes": artifact.size_bytes,
                "compressed_bytes": artifact.compressed_bytes,
            }
        if variant in self.failures:
            return row | {"status": "failed", "reason": self.failures[variant]}
        pilot = self.ledger.get("pilot") or {"rows": {}}
        timed = pilot["rows"].get(str(variant)) or self.ledger.get("measure", variant)
        cold = self.ledger.get("cold_start", variant) or {}
        if timed is None or "median_ms" not in timed:
            return row | {"status": "skipped", "reason": "Not reached yet."}
        for name in (
            "median_ms", "p90_ms", "p99_ms", "speedup", "speedup_low", "speedup_high", "verdict",
        ):  # fmt: skip
            row[name] = timed[name]
        row["throughput_per_s"] = self.options.batch_size / timed["median_ms"] * 1e3
        row["cold_start_ms"] = cold.get("cold_start_ms")
        row["peak_memory_bytes"] = cold.get("peak_memory_bytes")
        drop, num_examples = self._add_accuracy(row, variant)
        reason = self.budget.violation(row, drop, num_examples)
        notes = [*artifact.notes, *([cold["note"]] if "note" in cold else [])]
        return row | {
            "status": "over_budget" if reason else "ok",
            "reason": reason or " ".join(notes),
        }

    def _add_accuracy(
        self, row: dict[str, Any], variant: Variant
    ) -> tuple[statistics.Interval | None, int]:
        evaluation = _open_evaluation(self._evaluation_file(variant))
        row["accuracy"] = evaluation.accuracy
        as_saved = self.plan.baselines[0]
        if variant == as_saved:
            return None, 0
        row["agreement"] = _mean(evaluation.agreement)
        row["max_abs_error"] = evaluation.max_abs_error
        drop = _accuracy_drop(self._evaluation_file(as_saved), self._evaluation_file(variant))
        row["accuracy_drop"] = drop.estimate
        row["accuracy_drop_high"] = drop.high if math.isfinite(drop.high) else None
        # The unchanged model is a legal answer whatever its rounding does to a close call.
        num_examples = max(
            len(evaluation.scores), len(evaluation.labels), len(evaluation.agreement)
        )
        return (None if variant in self.plan.baselines else drop), num_examples

    def _final(self) -> list[str]:
        """Times the leaders and the baseline in one run; returns them, the fastest first.

        Each candidate was timed at another moment, so that the best of many is partly luck.
        """
        record = self.ledger.get("final")
        if record is not None:
            return record["order"]
        rows = [self._row(variant) for variant in (*self.plan.baselines, *self.plan.candidates)]
        inside = sorted(
            (row for row in rows if row["status"] == "ok"),
            key=lambda row: row["speedup"],
            reverse=True,
        )
        leaders = [
            row["variant"]
            for row in inside[:NUM_FINALISTS]
            if row["speedup_high"] > 0.9 * inside[0]["speedup_low"]
        ]
        if len(leaders) < 2:
            return self.ledger.add("final", order=leaders)["order"]
        self.progress.say(f"Final: {', '.join(leaders)} in one run …")
        timings = self.measurer.call(
            "tfopt.search.steps:time_together",
            {name: self.artifact_folder(Variant.parse(name)) for name in leaders},
            self.dataset,
            batch_size=self.options.batch_size,
            num_threads=self.num_threads,
            seed=self.options.seed + 1,
        )
        self._keep_timings("final", timings, leaders[0], leaders[1])
        order = sorted(leaders, key=lambda name: timings[name].summary()["median_ms"] or math.inf)
        return self.ledger.add("final", order=order)["order"]

    def _choose(self, finalists: list[str]) -> Result:
        chosen = finalists[0] if finalists else None
        comparison = self._write_results(chosen)
        rows = {row["variant"]: row for row in comparison.rows}
        if chosen is None:
            return Result(self.folder, None, comparison, comparison.summary)
        best = Artifact.open(self.artifact_folder(Variant.parse(chosen))).copy_to(
            self.folder / "best",
            measured_on={
                "cpu": environment.cpu_model(),
                "versions": runtimes.get(Variant.parse(chosen).runtime).versions(),
                "num_threads": self.num_threads,
                "median_ms": rows[chosen]["median_ms"],
            },
        )
        return Result(self.folder, best, comparison, comparison.summary)

    def _write_results(self, chosen: str | None) -> Comparison:
        rows = [self._row(variant) for variant in self.plan.variants]
        for row in rows:
            row["chosen"] = row["variant"] == chosen
        details = {
            "model": self.source.name,
            "signature": str(self.source.signature),
            "source_sha256": self.source.sha256,
            "source_notes": list(self.source.notes),
            "metric": self.metric,
            "output_name": self.output_name,
            "baseline": str(self.baseline),
            "as_saved": str(self.plan.baselines[0]),
            "chosen": chosen,
            "budget": dataclasses.asdict(self.budget),
            "data": self.dataset.describe(),
            "environment": environment.describe(),
            "seconds": self._seconds(),
        }
        details["summary"] = _summarize(rows, details, self.budget)
        comparison = Comparison(tuple(rows), details)
        comparison.save(self.folder)
        return comparison

    def _seconds(self) -> dict[str, float]:
        """Where the time went, over all runs of this folder."""
        total: dict[str, float] = {}
        for variant in (*self.plan.baselines, *self.plan.candidates):
            for step in ("convert", "measure", "cold_start"):
                record = self.ledger.get(step, variant)
                total[step] = total.get(step, 0.0) + (record or {}).get("seconds", 0.0)
        return total


@functools.cache
def _open_evaluation(path: Path) -> Evaluation:
    return Evaluation.open(path)


@functools.cache
def _accuracy_drop(baseline: Path, candidate: Path) -> statistics.Interval:
    return accuracy.accuracy_drop(_open_evaluation(baseline), _open_evaluation(candidate))


def _mean(values: Any) -> float | None:
    mean = float(values.mean()) if len(values) else math.nan
    return None if math.isnan(mean) else mean


def _summarize(rows: Sequence[dict[str, Any]], details: dict[str, Any], budget: Budget) -> str:
    """What was chosen and why, in a few sentences."""
    by_name = {row["variant"]: row for row in rows}
    measured = [row for row in rows if row.get("median_ms") is not None]
    as_saved = by_name[details["as_saved"]]
    chosen = by_name.get(details["chosen"])
    if chosen is None:
        accurate = [
            row for row in measured
            if row["status"] == "ok" or "accuracy drop" not in (row["reason"] or "")
        ]  # fmt: skip
        if not accurate:
            return "Nothing was measured yet."
        if any(row["status"] == "ok" for row in rows):
            return f"{len(measured)} of {len(rows)} variants are measured; none is chosen yet."
        nearest = min(accurate, key=budget.excess)
        return (
            f"Nothing meets the limits. {nearest['variant']} is nearest: {nearest['reason']} "
            "Raise the limit, or make the model smaller."
        )
    parts = [
        f"{chosen['variant']} is the fastest of {len(measured)} measured variants inside the "
        f"budget: {chosen['median_ms']:.3g} ms at batch size {chosen['batch_size']} with "
        f"{chosen['num_threads']} threads."
    ]
    if chosen is not as_saved:
        parts.append(
            f"That is {as_saved['median_ms'] / chosen['median_ms']:.1f} times as fast as the model "
            f"as saved, and {chosen['speedup']:.2f} times (95 % interval "
            f"{chosen['speedup_low']:.2f} to {chosen['speedup_high']:.2f}) as fast as the "
            f"baseline {details['baseline']}, the fastest unchanged way of running it."
        )
    if chosen.get("accuracy_drop") is not None:
        what = (
            f"{details['metric']} is {chosen['accuracy']:.4g} against {as_saved['accuracy']:.4g}"
            if chosen.get("accuracy") is not None
            else f"Measured against the model's own outputs, {details['metric']} "
            f"is {1 - chosen['accuracy_drop']:.4g}"
        )
        high = chosen.get("accuracy_drop_high")
        bound = f" (the drop is at most {high:.4g}, 95 % bound)" if high is not None else ""
        parts.append(f"{what}{bound}.")
    return " ".join(parts)
