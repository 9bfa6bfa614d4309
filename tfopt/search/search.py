"""The stages of a search, one after the other; each finished step is in the ledger."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tfopt import runtimes
from tfopt.artifact import Artifact
from tfopt.compare.comparison import Comparison
from tfopt.errors import ConversionError, InputError, ResultError
from tfopt.measure import accuracy, environment
from tfopt.measure.accuracy import Evaluation
from tfopt.progress import Progress, duration
from tfopt.search import finalists, interrupts, reestimation, results, steps, students
from tfopt.search.budget import Budget
from tfopt.search.options import Options
from tfopt.search.preparing import prepare
from tfopt.search.remote import RemoteSession, Timed
from tfopt.search.run import Run
from tfopt.search.timing import figures, time_sessions
from tfopt.search.workers import Workers, open_in
from tfopt.train.layers import is_model
from tfopt.variant import Variant


class Search:
    """Runs a search in an output folder.

    Args:
      folder: the output folder.
      options: of the search.
      progress: gets a line a variant.
      is_tensorflow: whether the model is TensorFlow's or Keras's.
      command: what does the same from a shell, for the report.
    """

    def __init__(
        self,
        folder: Path,
        options: Options,
        progress: Progress,
        is_tensorflow: bool = True,
        command: str | None = None,
    ):
        self.folder, self.options, self.progress = folder, options, progress
        self.command = command
        self.workers = Workers(folder, options, is_tensorflow)
        self._best_speedup = 0.0
        self._reasons: dict[str, Variant] = {}  # who had each first
        self._raise_interrupt: Callable[[], None] = lambda: None

    @contextlib.contextmanager
    def _clock(self) -> Iterator[dict[str, float]]:
        """Fills in the `seconds` of a step, without those that workers took to start."""

        def now() -> float:
            return time.perf_counter() - self.workers.startup_s

        seconds: dict[str, float] = {}
        self._raise_interrupt()
        begin = now()
        yield seconds
        seconds["seconds"] = now() - begin

    def run(self, model: Any, data: Any, budget: Budget) -> tuple[Artifact | None, Comparison]:
        """Searches from wherever the ledger stands; returns what is in `best/` and the table."""
        begin = time.monotonic()
        try:
            with interrupts.remembered() as self._raise_interrupt:
                best, comparison = self._stages(model, data, budget)
        except KeyboardInterrupt:
            self.progress.say(
                f"Interrupted; everything finished is in {self.folder}; run it again with resume "
                "to go on."
            )
            raise
        finally:
            self.progress.close()
            shutil.rmtree(self.folder / "data", ignore_errors=True)
        self.progress.say(f"Searched for {duration(time.monotonic() - begin)}.")
        return best, comparison

    def _stages(self, model: Any, data: Any, budget: Budget) -> tuple[Artifact | None, Comparison]:
        with self.workers:
            run = prepare(
                self.folder, model, data, budget,
                self.options, self.workers.converter, self.progress, self.command,
            )  # fmt: skip
            self._pilot(run)
            for variant in run.plan.candidates:
                self._try(run, variant)
                results.write(run)
            for text in self.options.distill:
                self._distill(run, model, data, text)
            self._reestimate(run, model)
            self.workers.converter.close()
            self._cold_starts(run)
            order = self._final(run)
        comparison = results.write(run, order[0] if order else None)
        self._raise_interrupt()
        if not order:
            return None, comparison
        return self._ship(run, Variant.parse(order[0])), comparison

    # Converting and measuring.

    def _pilot(self, run: Run) -> None:
        """Runs the unchanged model in every way its own runtime has; the fastest is the baseline.

        Raises:
          ResultError: when the model does not run as it was saved.
        """
        self.progress.start(len(run.plan.baselines) + len(run.plan.candidates))
        is_new = run.ledger.get("pilot") is None
        for variant in run.plan.baselines:
            self._convert(run, variant)
            self._measure(run, variant)
            if variant == run.as_saved and (reason := run.failure(variant)):
                raise ResultError(f"The model itself does not run on this data: {reason}")
            if variant == run.as_saved and is_new:
                for doubt in results.doubts(run):
                    self.progress.say(f"Warning: {doubt}")
        if is_new:
            with self._clock() as clock:
                timed = self._time_pilot(run)
                medians = {name: timing.median_s for name, timing in timed.timings.items()}
                baseline = min(medians, key=medians.__getitem__)
                rows = {name: figures(timed, baseline, name, "pilot") for name in medians}
            run.ledger.add("pilot", baseline=baseline, rows=rows, **clock)
        for variant in run.plan.baselines:
            self._diagnose(run, variant)
            self._report(run, variant, is_new)
        results.write(run)

    def _time_pilot(self, run: Run) -> Timed:
        """Times all that run side by side; when that fails, without the last of them."""
        running = [
            variant
            for variant in run.plan.baselines
            if run.failure(variant) is None and results.wrong(run, variant) is None
        ]
        try:
            with self.workers.opened(run, running) as sessions:
                return time_sessions(run, self.options, "pilot", sessions)
        except ConversionError as error:
            *others, last = running
            if not others:
                raise ResultError(f"The model itself cannot be timed: {error}") from error
            reason = f"It could not be timed beside the other unchanged ways: {error}"
            run.ledger.add("measure", last, reason=reason)
        return self._time_pilot(run)

    def _try(self, run: Run, variant: Variant) -> None:
        """Converts, evaluates and times one candidate."""
        is_new = run.failure(variant) is None and run.ledger.get("measure", variant) is None
        self._convert(run, variant)
        self._measure(run, variant)
        self._diagnose(run, variant)
        self._report(run, variant, is_new)

    def _finish_without_time(
        self, variant: Variant, status: str, reason: str, is_new: bool
    ) -> None:
        first = self._reasons.setdefault(reason, variant)
        why = reason if first == variant else f"for the same reason as {first}"
        self.progress.finish(f"{variant}: {status}, {why}", is_new=is_new)

    def _report(self, run: Run, variant: Variant, is_new: bool) -> None:
        if (reason := run.failure(variant)) is not None:
            self._finish_without_time(variant, "failed", reason, is_new)
            return
        if (reason := results.wrong(run, variant)) is not None:
            self._finish_without_time(variant, "wrong", reason, is_new)
            return
        timed = run.timed(variant)
        assert timed is not None
        text = f"{timed['speedup']:.2f} × the baseline"
        if variant == run.baseline:
            text = "the baseline"
        best = ""
        if results.row(run, variant)["status"] == "ok" and timed["speedup"] > self._best_speedup:
            self._best_speedup = timed["speedup"]
            best = f"{variant}, {timed['speedup']:.2f} ×"
        self.progress.finish(f"{variant}: {timed['median_ms']:.3g} ms, {text}", best, is_new)

    def _convert(self, run: Run, variant: Variant) -> None:
        """Converts a variant and what it starts from, unless that was done or failed."""
        for step in (*steps.parents_of(variant), variant):
            if run.failure(step) is None and run.ledger.get("convert", step) is None:
                self._convert_one(run, step)

    def _convert_one(self, run: Run, variant: Variant) -> None:
        folder = run.artifact_folder(variant)
        parent = runtimes.get(variant.runtime).parent(variant)
        reason = None
        self.progress.doing(f"converting {variant}")
        with self._clock() as clock:
            if not folder.exists():  # a kill can come between the folder and its line
                try:
                    self.workers.converter.call(
                        "tfopt.search.steps:convert",
                        run.source_of(variant),
                        variant,
                        folder,
                        None if parent is None else run.artifact_folder(parent),
                        run.dataset,
                        run.batch_size,
                    )
                except ConversionError as error:
                    reason = str(error)
        run.ledger.add("convert", variant, reason=reason, **clock)

    def _measure(self, run: Run, variant: Variant) -> None:
        """Evaluates a variant and times it against the baseline, unless that was done.

        The unchanged variants are evaluated only; the pilot times them all together.
        """
        if run.failure(variant) is not None:
            return
        is_done = run.ledger.get("measure", variant) is not None
        # The reference's outputs go with the data, so that a resumed run makes them anew.
        if is_done and variant != run.as_saved:
            return
        values: dict[str, Any] = {"reason": None}
        cold_start: steps.ColdStart | None = None
        self.progress.doing(f"measuring {variant}")
        with self._clock() as clock:
            try:
                together = [variant]
                if variant not in run.plan.baselines and run.baseline is not None:
                    together = [run.baseline, variant]
                with self.workers.opened(run, together) as sessions:
                    session = sessions[str(variant)]
                    if session.cold_start.is_first:
                        cold_start = session.cold_start
                    if variant == run.as_saved:
                        self._choose_metrics(run, session)
                    session.evaluate(
                        run.metrics,
                        run.output_name,
                        run.reference_folder,
                        run.evaluation_file(variant),
                    )
                    if len(sessions) > 1 and results.wrong(run, variant) is None:
                        timed = time_sessions(run, self.options, variant.slug, sessions)
                        baseline, name = sessions
                        values |= figures(timed, baseline, name, variant.slug)
            except ConversionError as error:
                values["reason"] = str(error)
            except InputError as error:  # such as shapes that engines were not built for
                if variant in run.plan.baselines:
                    raise
                values["reason"] = str(error)
        if is_done:
            return
        run.ledger.add("measure", variant, **values, **clock)
        if cold_start is not None and values["reason"] is None:
            _add_cold_start(run, variant, cold_start, seconds=0.0)

    def _choose_metrics(self, run: Run, session: RemoteSession) -> None:
        """Settles the metric of each output by the model as saved, unless that was done."""
        if run.ledger.get("metrics") is not None:
            return
        open_questions = [name for name, metric in run.scored.items() if metric is None]
        chosen = session.choose_metrics(open_questions) if open_questions else {}
        metrics = {name: metric or chosen[name] for name, metric in run.scored.items()}
        run.ledger.add("metrics", metrics=metrics)
        self.progress.say(f"Metric: {run.metric}.")

    def _diagnose(self, run: Run, variant: Variant) -> None:
        """Looks for what makes a variant slow or inaccurate, unless that was done."""
        if run.failure(variant) is not None or run.ledger.get("diagnose", variant) is not None:
            return
        reference_folder = None
        runtime = runtimes.get(variant.runtime)
        reference = Variant("float32", variant.runtime, student=variant.student)
        if runtime.precision_of(variant).is_calibrated and "float32" in runtime.precisions:
            self._convert(run, reference)
            if run.failure(reference) is None:
                reference_folder = run.artifact_folder(reference)
        self.progress.doing(f"looking into {variant}")
        note = None
        with self._clock() as clock:
            try:
                found = self.workers.converter.call(
                    "tfopt.search.steps:diagnose",
                    run.artifact_folder(variant),
                    run.dataset,
                    batch_size=run.batch_size,
                    num_threads=run.num_threads,
                    reference_folder=reference_folder,
                )
                found.save(run.diagnosis_file(variant))
            except ConversionError as error:
                note = f"What happens inside could not be seen: {error}"
        run.ledger.add("diagnose", variant, note=note, **clock)

    def _distill(self, run: Run, model: Any, data: Any, text: str) -> None:
        """Distils a student from the model, unless that was done, and tries what is made of it."""
        name = students.name_of(text)
        folder = self.folder / "students" / name
        if (record := run.ledger.get("distill", name)) is None:
            reason = None
            self.progress.say(f"Distilling student {name} ({text}) …")
            with self._clock() as clock, self.workers.training() as worker:
                try:
                    options = students.Training(
                        text,
                        self.options.distill_epochs,
                        self.options.distill_alpha,
                        self.options.distill_temperature,
                        self.options.distill_batch_size,
                        run.seed,
                        self.options.custom_objects,
                        self._trusts(model),
                    )
                    examples = students.check_data(data)
                    teacher = students.teacher_file(model, self.folder / "students")
                    with students.told(self.progress, folder, self.options.distill_epochs):
                        worker.call(
                            "tfopt.search.students:train",
                            teacher, run.source, examples, folder, options,
                        )  # fmt: skip
                except (ConversionError, InputError) as error:
                    reason = str(error)
            record = run.ledger.add("distill", name, reason=reason, **clock)
        variants = run.plan.of_student(name)
        if record["reason"] is not None:
            self.progress.say(f"Student {name} failed: {record['reason']}")
            results.write(run)
            return
        shutil.rmtree(folder / "source", ignore_errors=True)
        origin = students.origin(text, run.source.name, self.options.distill_epochs)
        run.students[name] = self.workers.converter.call(
            "tfopt.search.students:prepare",
            folder, run.source, name, origin, self.options.custom_objects, self._trusts(model),
        )  # fmt: skip
        self.progress.start(len(variants))
        for variant in variants:
            self._try(run, variant)
            results.write(run)

    def _trusts(self, model: Any) -> bool:
        """Whether files of the model may hold Python code: what this process saved may."""
        return self.options.trust_model or not isinstance(model, Path)

    def _reestimate(self, run: Run, model: Any) -> None:
        """Tries whether new statistics of batch normalisation win accuracy back."""
        if not (_is_keras(model) and run.dataset.has_labels and run.dataset.num_calibration):
            return
        if run.ledger.get("reestimate") is not None:
            return
        # Of each precision that computes statistics of its own, the fastest that needs it.
        tried = {"float32": run.as_saved}
        for variant in results.clearly_worse(run):
            if variant.precision in reestimation.POLICIES:
                tried.setdefault(variant.precision, variant)
        self.progress.doing("estimating statistics of batch normalisation")
        gain, notes = None, []
        with self._clock() as clock:
            for precision, variant in tried.items():
                try:
                    found = self._gain(run, model, precision, variant)
                except (ConversionError, InputError) as error:
                    notes.append(f"Statistics of batch normalisation were not tried: {error}")
                    self.progress.say(f"Note: {notes[-1]}")
                    continue
                if gain is None or (found is not None and found.low > gain.low):
                    gain = found
        values = None if gain is None else dataclasses.asdict(gain)
        run.ledger.add("reestimate", gain=values, notes=notes, **clock)

    def _gain(
        self, run: Run, model: Any, precision: str, variant: Variant
    ) -> reestimation.Gain | None:
        """What a variant of the model with new statistics has won, if it has."""
        folder = self.folder / "source" / "reestimated" / precision
        shutil.rmtree(folder, ignore_errors=True)
        arguments = (
            model, run.source, run.dataset, precision, folder,
            self.options.custom_objects, self.options.trust_model,
        )  # fmt: skip
        if isinstance(model, Path):
            name = "tfopt.search.reestimation:reestimate"
            found = self.workers.converter.call(name, *arguments)
        else:
            found = reestimation.reestimate(*arguments)
        if found is None:
            return None
        parent = None
        for step in (*steps.parents_of(variant), variant):
            made = folder / step.slug
            self.workers.converter.call(
                "tfopt.search.steps:convert",
                found.source, step, made, parent, run.dataset, run.batch_size,
            )  # fmt: skip
            parent = made
        file = run.folder / "evaluations" / f"{variant.slug}.reestimated.npz"
        with self.workers.measuring(variant) as worker:
            session = open_in(worker, run, made)
            session.evaluate(run.metrics, run.output_name, run.reference_folder, file)
        shutil.rmtree(folder)
        before, after = Evaluation.open(run.evaluation_file(variant)), Evaluation.open(file)
        if not after.scores:
            return None
        won = accuracy.accuracy_drops(after, before)[0]
        if not won.interval.low > 0:
            return None
        output = won.output or next(iter(after.scores))
        return reestimation.Gain(
            str(variant), found.layer, found.shift, before.values[output], after.values[output],
            won.interval.low, won.interval.high, won.metric,
        )  # fmt: skip

    def _cold_starts(self, run: Run) -> None:
        """Starts those that were not the first in their process once more, in a new one.

        This comes last and without the converter, so that few large processes live at a time.
        """
        for variant in (*run.plan.baselines, *run.candidates):
            if run.timed(variant) is None or run.ledger.get("cold_start", variant):
                continue
            self.progress.say(f"Cold start of {variant} …")
            with self._clock() as clock, self.workers.measuring(variant) as worker:
                try:
                    cold_start = open_in(worker, run, run.artifact_folder(variant)).cold_start
                except ConversionError as error:
                    note = f"The cold start was not measured: {error}"
                    run.ledger.add("cold_start", variant, note=note)
                    continue
            _add_cold_start(run, variant, cold_start, **clock)

    # Choosing.

    def _final(self, run: Run) -> list[str]:
        """Times the leaders in one run; returns their names, the fastest first.

        The figures of this run replace the earlier ones.
        """
        record = run.ledger.get("final")
        if record is not None:
            return record["order"]
        tried = (*run.plan.baselines, *run.candidates)
        earlier = [results.row(run, variant) for variant in tried]
        order = finalists.choose(earlier, str(run.baseline))
        rows: dict[str, Any] = {}
        with self._clock() as clock:
            if len(order) > 1:
                self.progress.say(f"Final run, side by side: {', '.join(order)} …")
                assert run.baseline is not None
                together = list(dict.fromkeys([run.baseline, *map(Variant.parse, order)]))
                try:
                    with self.workers.opened(run, together) as sessions:
                        timed = time_sessions(run, self.options, "final", sessions, is_final=True)
                    rows = {
                        name: figures(timed, str(run.baseline), name, "final") for name in sessions
                    }
                except ConversionError as error:
                    self.progress.say(f"The final run failed, the earlier times count: {error}")
                known = rows or {values["variant"]: values for values in earlier}
                order = finalists.rank(order, known, str(run.baseline))
        run.ledger.add("final", order=order, rows=rows, **clock)
        return order

    def _ship(self, run: Run, chosen: Variant) -> Artifact:
        """Copies the chosen artifact to `best/`."""
        timed = run.timed(chosen)
        return run.open(chosen).copy_to(
            self.folder / "best",
            measured_on={
                "cpu": environment.cpu_model(),
                "versions": runtimes.get(chosen.runtime).versions(),
                "num_threads": run.num_threads,
                "median_ms": None if timed is None else timed["median_ms"],
            },
        )


def _is_keras(model: Any) -> bool:
    if isinstance(model, Path):
        return model.suffix.lower() in (".keras", ".h5")
    return is_model(model)


def _add_cold_start(
    run: Run, variant: Variant, cold_start: steps.ColdStart, seconds: float
) -> None:
    run.ledger.add(
        "cold_start",
        variant,
        cold_start_ms=cold_start.cold_start_ms,
        peak_memory_bytes=cold_start.peak_memory_bytes or None,
        gpu_memory_bytes=cold_start.gpu_memory_bytes,
        seconds=seconds,
    )
