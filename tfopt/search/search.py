"""The stages of a search, one after the other; each finished step is in the ledger."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tfopt import dataset as datasets
from tfopt import runtimes
from tfopt import source as sources
from tfopt.artifact import Artifact
from tfopt.compare.comparison import Comparison
from tfopt.errors import ConversionError, InputError, ResultError
from tfopt.isolation import Worker
from tfopt.measure import accuracy, environment, latency, statistics
from tfopt.search import results, steps
from tfopt.search.budget import Budget
from tfopt.search.candidates import plan
from tfopt.search.ledger import Ledger
from tfopt.search.options import Options
from tfopt.search.progress import Progress, duration
from tfopt.search.run import Run
from tfopt.source import Source
from tfopt.variant import Variant

NUM_FINALISTS = 4
FINAL_MARGIN = 0.9  # a finalist could be this close to the leader


class _Clock:
    """The seconds of a step, without those that its worker took to start."""

    def __init__(self, worker: Worker):
        self._worker = worker
        self.seconds = 0.0

    def __enter__(self) -> _Clock:
        self._begin = time.perf_counter() - self._worker.startup_s
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._worker.startup_s - self._begin


class Search:
    """Runs a search in an output folder.

    Two workers: one converts, the other has the baseline loaded, evaluates and times. A third kind
    lives for one cold start each.

    Args:
      folder: the output folder.
      options: of the search.
      progress: gets a line a variant.
    """

    def __init__(self, folder: Path, options: Options, progress: Progress):
        self.folder, self.options, self.progress = folder, options, progress
        self._new_worker: Callable[..., Worker] = lambda name, *preload: Worker(
            folder / "logs" / f"{name}.log", options.limits, options.import_modules, preload
        )
        self.converter = self._new_worker("convert", "tensorflow")
        self.measurer = self._new_worker("measure", "tfopt.search.steps")

    def run(self, model: Any, data: Any, budget: Budget) -> tuple[Artifact | None, Comparison]:
        """Searches from wherever the ledger stands; returns what is in `best/` and the table."""
        begin = time.monotonic()
        try:
            with self.converter, self.measurer:
                run = self._prepare(model, data, budget)
                self._pilot(run)
                for variant in run.plan.candidates:
                    self._try(run, variant)
                    results.write(run)
                finalists = self._final(run)
            comparison = results.write(run, finalists[0] if finalists else None)
            best = None
            if finalists:
                best = self._ship(run, Variant.parse(finalists[0]))
        except KeyboardInterrupt:
            self.progress.say(
                f"Interrupted; everything finished is in {self.folder}, go on with --resume."
            )
            raise
        finally:
            shutil.rmtree(self.folder / "data", ignore_errors=True)
        self.progress.say(f"Searched for {duration(time.monotonic() - begin)}.")
        return best, comparison

    # Preparing.

    def _prepare(self, model: Any, data: Any, budget: Budget) -> Run:
        """Source, data, plan and ledger; checks that a resumed run is the same run."""
        options = self.options
        shutil.rmtree(self.folder / "best", ignore_errors=True)
        self.progress.say("Reading the model …")
        source = self._prepare_source(model)
        fixed = source.signature.batch_size
        if fixed not in (None, options.batch_size):
            raise InputError(
                f"The model takes batches of {fixed} only and --batch_size is "
                f"{options.batch_size}; set it to {fixed}."
            )
        self.progress.say("Reading the data …")
        shutil.rmtree(self.folder / "data", ignore_errors=True)
        dataset = datasets.write(
            data,
            source.signature,
            self.folder / "data",
            seed=options.seed,
            num_calibration=options.num_calibration,
        )
        for note in (*source.notes, *dataset.notes):
            self.progress.say(f"Note: {note}")
        output_name = _choose_output(source, options.output_name, dataset.has_labels)
        metric = options.metric or _choose_metric(source, dataset, output_name)
        self.progress.say(f"Metric: {metric}.")
        num_threads = options.num_threads or environment.num_cores()
        identity = {
            "source": source.sha256,
            "data": dataset.sha256,
            **{k: v for k, v in dataclasses.asdict(options).items() if k != "limits"},
            "metric": metric,
            "output_name": output_name,
            "num_threads": num_threads,
            **dataclasses.asdict(budget),
            "cpu": environment.cpu_model(),
            "versions": environment.versions(),
        }
        return Run(
            folder=self.folder,
            source=source,
            dataset=dataset,
            plan=plan(source.kind, options.variants),
            ledger=Ledger(self.folder, identity),
            budget=budget,
            metric=metric,
            output_name=output_name,
            batch_size=options.batch_size,
            num_threads=num_threads,
            seed=options.seed,
        )

    def _prepare_source(self, model: Any) -> Source:
        """Loads and freezes the model in a worker; a live one is exported here first."""
        folder = self.folder / "source"
        shutil.rmtree(folder, ignore_errors=True)
        prepare = functools.partial(
            self.converter.call,
            "tfopt.source:prepare",
            signature=self.options.signature,
            custom_objects=self.options.custom_objects,
            import_modules=self.options.import_modules,
        )
        try:
            if isinstance(model, Path):
                return prepare(model, folder)
            exported = self.folder / "source_export"
            shutil.rmtree(exported, ignore_errors=True)
            sources.export(model, exported)
            source = prepare(
                exported,
                folder,
                name=getattr(model, "name", None) or "model",
                sha256=sources.hash_live(model),
            )
            exported.rename(folder / "saved_model")
            return dataclasses.replace(source, path=folder / "saved_model")
        except ConversionError as error:
            raise InputError(f"The model cannot be loaded: {error}") from error

    # Converting and measuring.

    def _pilot(self, run: Run) -> None:
        """Runs the unchanged model in every way its own runtime has; the fastest is the baseline.

        Raises:
          ResultError: when the model does not run as it was saved.
        """
        self.progress.start(len(run.plan.baselines) + len(run.plan.candidates))
        for variant in run.plan.baselines:
            if variant == run.as_saved and run.ledger.get("measure", variant) is not None:
                # The reference's outputs go with the data, so that a resumed run makes them anew.
                self._call_measure(run, variant, None)
            self._convert(run, variant)
            self._measure(run, variant, None)
            if variant == run.as_saved and (reason := run.failure(variant)):
                raise ResultError(f"The model itself does not run on this data: {reason}")
        running = [v for v in run.plan.baselines if run.failure(v) is None]
        if run.ledger.get("pilot") is None:
            self._time_pilot(run, running)
        for variant in run.plan.baselines:
            if variant in running:
                self._cold_start(run, variant)
            self._report(run, variant)
        results.write(run)

    def _time_pilot(self, run: Run, running: Sequence[Variant]) -> None:
        with _Clock(self.measurer) as clock:
            timings = self._time_together(run, [str(variant) for variant in running], run.seed)
        self._keep(run, "pilot", timings)
        medians = {
            name: timing.summary()["median_ms"] or math.inf for name, timing in timings.items()
        }
        baseline = min(medians, key=lambda name: medians[name])
        rows = {name: _figures(run, timings[baseline], timings[name]) for name in timings}
        run.ledger.add("pilot", baseline=baseline, rows=rows, seconds=clock.seconds)

    def _try(self, run: Run, variant: Variant) -> None:
        """Converts, evaluates and times one candidate."""
        self._convert(run, variant)
        self._measure(run, variant, run.baseline)
        if run.failure(variant) is None:
            self._cold_start(run, variant)
        self._report(run, variant)

    def _report(self, run: Run, variant: Variant) -> None:
        reason, timed = run.failure(variant), run.timed(variant)
        if timed is None:
            self.progress.finish(f"{variant}: failed, {reason}")
            return
        text = f"{variant}: {timed['median_ms']:.3g} ms, {timed['speedup']:.2f} × the baseline"
        if variant == run.baseline:
            text = f"{variant}: {timed['median_ms']:.3g} ms, the baseline"
        self.progress.finish(text)

    def _convert(self, run: Run, variant: Variant) -> None:
        """Converts a variant and what it starts from, unless that was done or failed."""
        for step in (*steps.parents_of(variant), variant):
            if run.failure(step) is None and run.ledger.get("convert", step) is None:
                self._convert_one(run, step)

    def _convert_one(self, run: Run, variant: Variant) -> None:
        folder = run.artifact_folder(variant)
        parent = runtimes.get(variant.runtime).parent(variant)
        reason = None
        with _Clock(self.converter) as clock:
            if not folder.exists():  # a kill can come between the folder and its line
                try:
                    self.converter.call(
                        "tfopt.search.steps:convert",
                        run.source,
                        variant,
                        folder,
                        None if parent is None else run.artifact_folder(parent),
                        run.dataset,
                        run.batch_size,
                    )
                except ConversionError as error:
                    reason = str(error)
        run.ledger.add("convert", variant, reason=reason, seconds=clock.seconds)

    def _measure(self, run: Run, variant: Variant, baseline: Variant | None) -> None:
        """Evaluates a variant, and times it where there is a baseline, unless that was done."""
        if run.failure(variant) is not None or run.ledger.get("measure", variant) is not None:
            return
        values: dict[str, Any] = {"reason": None}
        with _Clock(self.measurer) as clock:
            try:
                timings = self._call_measure(run, variant, baseline)
                if timings:
                    self._keep(run, variant.slug, timings)
                    values |= _figures(run, timings["baseline"], timings["candidate"])
            except ConversionError as error:
                values["reason"] = str(error)
        run.ledger.add("measure", variant, **values, seconds=clock.seconds)

    def _call_measure(
        self, run: Run, variant: Variant, baseline: Variant | None
    ) -> dict[str, latency.Timing]:
        return self.measurer.call(
            "tfopt.search.steps:measure",
            run.artifact_folder(variant),
            None if baseline is None else run.artifact_folder(baseline),
            run.dataset,
            metric=run.metric,
            output_name=run.output_name,
            batch_size=run.batch_size,
            num_threads=run.num_threads,
            seed=run.seed,
            reference_folder=run.reference_folder,
            evaluation_file=run.evaluation_file(variant),
        )

    def _time_together(
        self, run: Run, names: Sequence[str], seed: int
    ) -> dict[str, latency.Timing]:
        return self.measurer.call(
            "tfopt.search.steps:time_together",
            {name: run.artifact_folder(Variant.parse(name)) for name in names},
            run.dataset,
            batch_size=run.batch_size,
            num_threads=run.num_threads,
            seed=seed,
        )

    def _keep(self, run: Run, name: str, timings: dict[str, latency.Timing]) -> None:
        """Writes raw times to disk."""
        path = run.timing_file(name)
        path.parent.mkdir(exist_ok=True)
        value = {
            "environment": environment.describe(),
            "batch_size": run.batch_size,
            "num_threads": run.num_threads,
            "timings": {key: timing.to_json() for key, timing in timings.items()},
        }
        path.write_text(json.dumps(value))

    def _cold_start(self, run: Run, variant: Variant) -> None:
        """Measures load time and memory in a new process, unless that was done."""
        if run.ledger.get("cold_start", variant) is not None:
            return
        values: dict[str, Any] = {}
        with self._new_worker("cold_start") as worker, _Clock(worker) as clock:
            try:
                cold = worker.call(
                    "tfopt.measure.cold_start:measure",
                    run.artifact_folder(variant),
                    run.dataset,
                    run.batch_size,
                    run.num_threads,
                )
                values["cold_start_ms"] = cold.cold_start_ms
                values["peak_memory_bytes"] = cold.peak_memory_bytes or None
            except ConversionError as error:
                values["note"] = f"The cold start was not measured: {error}"
        run.ledger.add("cold_start", variant, **values, seconds=clock.seconds)

    # Choosing.

    def _final(self, run: Run) -> list[str]:
        """Times the leaders in one run; returns their names, the fastest first.

        Each candidate was timed at another moment, so that the best of many is partly luck.
        """
        record = run.ledger.get("final")
        if record is not None:
            return record["order"]
        tried = (*run.plan.baselines, *run.plan.candidates)
        inside = [values for values in (results.row(run, variant) for variant in tried)
                  if values["status"] == "ok"]  # fmt: skip
        inside.sort(key=lambda values: values["speedup"], reverse=True)
        order = [
            values["variant"]
            for values in inside[:NUM_FINALISTS]
            if values["speedup_high"] > FINAL_MARGIN * inside[0]["speedup_low"]
        ]
        with _Clock(self.measurer) as clock:
            if len(order) > 1:
                self.progress.say(f"Final run, side by side: {', '.join(order)} …")
                timings = self._time_together(run, order, run.seed + 1)
                self._keep(run, "final", timings)
                order.sort(key=lambda name: timings[name].summary()["median_ms"] or math.inf)
        run.ledger.add("final", order=order, seconds=clock.seconds)
        return order

    def _ship(self, run: Run, chosen: Variant) -> Artifact:
        """Copies the chosen artifact to `best/`."""
        timed = run.timed(chosen)
        return Artifact.open(run.artifact_folder(chosen)).copy_to(
            self.folder / "best",
            measured_on={
                "cpu": environment.cpu_model(),
                "versions": runtimes.get(chosen.runtime).versions(),
                "num_threads": run.num_threads,
                "median_ms": None if timed is None else timed["median_ms"],
            },
        )


def _figures(run: Run, baseline: latency.Timing, candidate: latency.Timing) -> dict[str, Any]:
    """What the table says of a timing."""
    ratio = latency.speedup(baseline, candidate, run.seed)
    return {
        **candidate.summary(),
        "speedup": ratio.estimate,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "verdict": statistics.verdict(ratio),
        "steal_share": candidate.steal_share,
    }


def _choose_output(source: Source, wanted: str | None, has_labels: bool) -> str:
    """The output that the metric looks at."""
    names = source.signature.output_names
    if wanted is not None and wanted not in names:
        raise InputError(f"No output {wanted!r}; the model's outputs are: {', '.join(names)}.")
    if wanted is None and len(names) > 1 and has_labels:
        raise InputError(
            f"The model has outputs {', '.join(names)}; say which one the labels belong to with "
            "--output_name."
        )
    return wanted or names[0]


def _choose_metric(source: Source, dataset: datasets.Dataset, output_name: str) -> str:
    """The metric that fits the labels."""
    spec = next(spec for spec in source.signature.outputs if spec.name == output_name)
    _, labels, _ = next(dataset.evaluation.batches(source.signature, 64))
    return accuracy.choose_metric(spec.shape, labels)
