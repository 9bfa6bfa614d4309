"""Rows, summary and files of a search, derived from what its steps left on disk."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfopt.compare.comparison import Comparison
from tfopt.compare.text import plain
from tfopt.measure import accuracy, environment, gate, latency, scores, statistics
from tfopt.measure.accuracy import Drop, Evaluation
from tfopt.measure.diagnosis import Diagnosis
from tfopt.measure.scores import Scores
from tfopt.search.budget import Budget
from tfopt.search.reestimation import Gain
from tfopt.search.run import Run
from tfopt.variant import Variant

TIMED = (
    "median_ms", "median_low_ms", "median_high_ms", "p90_ms", "p99_ms", "speedup", "speedup_low",
    "speedup_high", "verdict", "timing",
)  # fmt: skip
HIGH_STEAL = 0.1
MAX_CLASSES = 200  # whose recall is listed
NUM_LAYERS = 10  # that the report shows of a variant


def row(run: Run, variant: Variant) -> dict[str, Any]:
    """The columns of one variant, as far as its steps are finished."""
    values: dict[str, Any] = {
        "model": run.source.name,
        "variant": str(variant),
        "batch_size": run.batch_size,
        "num_threads": run.num_threads,
        "chosen": False,
    }
    if variant in run.plan.skipped:
        return values | {"status": "skipped", "reason": run.plan.skipped[variant]}
    notes: list[str] = []
    if run.artifact_folder(variant).exists():
        artifact = run.open(variant)
        notes += artifact.notes
        values |= {
            "parent": str(artifact.parent or _root(variant)),
            "size_bytes": artifact.size_bytes,
            "compressed_bytes": artifact.compressed_bytes,
        }
    if (reason := run.failure(variant)) is not None:
        return values | {"status": "failed", "reason": reason}
    if run.is_evaluated(variant) and (reason := wrong(run, variant)) is not None:
        _add_diagnosis(run, values, variant)
        _add_accuracy(run, values, variant)
        return values | {"status": "wrong", "reason": reason, "notes": notes}
    timed, cold = run.timed(variant), run.ledger.get("cold_start", variant) or {}
    if timed is None:
        return values | {"status": "skipped", "reason": "The search has not come to it yet."}
    values |= {name: timed[name] for name in TIMED}
    values["device_ms"] = timed.get("device_ms")  # a search may go on with earlier records
    values["throughput_per_s"] = run.batch_size / timed["median_ms"] * 1e3
    values["cold_start_ms"] = cold.get("cold_start_ms")
    values["peak_memory_bytes"] = cold.get("peak_memory_bytes")
    values["gpu_memory_bytes"] = cold.get("gpu_memory_bytes")
    if timed["steal_share"] > HIGH_STEAL:
        notes.append(
            f"A hypervisor took {timed['steal_share']:.0%} of the processor while it was timed."
        )
    notes += timed.get("notes", [])
    notes += [cold["note"]] if "note" in cold else []
    _add_diagnosis(run, values, variant)
    drops = _add_accuracy(run, values, variant)
    notes += values["accuracy_notes"]
    reason = run.budget.violation(values, drops)
    return values | {
        "status": "over_budget" if reason else "ok",
        "reason": reason or " ".join(notes),
        "notes": notes,
    }


def wrong(run: Run, variant: Variant) -> str | None:
    """Why an evaluated variant is not the model any more, in one sentence, or None."""
    if variant == run.as_saved:
        return None
    fidelity = _open_evaluation(run.evaluation_file(variant)).fidelity
    if variant.student:  # another model by intention
        return gate.what_is_wrong(fidelity, None)
    limit = gate.limit_db(
        variant.precision, run.source.computes_in, has_tf32=bool(environment.gpus())
    )
    chosen = run.budget.min_sqnr_db
    return gate.what_is_wrong(fidelity, limit if chosen is None else chosen)


def _root(variant: Variant) -> str:
    """What a variant without a parent was converted from."""
    return f"student {variant.student}" if variant.student else "source"


def clearly_worse(run: Run) -> list[Variant]:
    """Variants that lost accuracy beyond doubt (95 %), the fastest first."""
    speedups = {}
    for variant in run.plan.candidates:  # not of students, whose statistics are new
        timed = run.timed(variant)
        if timed is None or run.failure(variant) is not None:
            continue
        drops = _accuracy_drops(run.evaluation_file(run.as_saved), run.evaluation_file(variant))
        if any(drop.interval.low > 0 for drop in drops):
            speedups[variant] = timed["speedup"]
    return sorted(speedups, key=lambda variant: speedups[variant], reverse=True)


def timed(baseline: latency.Timing, candidate: latency.Timing) -> dict[str, Any]:
    """The figures of a candidate that was timed in turns with the baseline."""
    ratio = latency.speedup(baseline, candidate)
    return {
        **candidate.summary(),
        "speedup": ratio.estimate,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "verdict": statistics.verdict(ratio),
    }


def doubts(run: Run) -> list[str]:
    """Why metrics and labels may not belong together, by the model as saved."""
    found = _open_evaluation(run.evaluation_file(run.as_saved)).scores
    sentences = {name: scores.doubt(of_output) for name, of_output in found.items()}
    return [
        sentence if len(found) == 1 else f"Output {name!r}: {sentence}"
        for name, sentence in sentences.items()
        if sentence is not None
    ]


def _add_accuracy(run: Run, values: dict[str, Any], variant: Variant) -> list[Drop] | None:
    """Adds the figures of accuracy; returns the drops that the budget limits."""
    evaluation = _open_evaluation(run.evaluation_file(variant))
    values["metrics"] = {
        name: {
            "metric": found.metric,
            "accuracy": found.value,
            "recall": scores.recall(found) if len(found.found) <= MAX_CLASSES else {},
        }
        for name, found in evaluation.scores.items()
    }
    values["accuracy"] = next(iter(evaluation.values.values()), None)
    values["accuracy_notes"] = []
    if variant == run.as_saved:
        values["accuracy_notes"] = doubts(run)
        return None
    found = evaluation.fidelity.values()
    agreements = [item.agreement for item in found if not math.isnan(item.agreement)]
    errors = [item.max_abs_error for item in found if not math.isnan(item.max_abs_error)]
    values["agreement"] = min(agreements, default=None)
    values["max_abs_error"] = max(errors, default=None)
    values["fidelity"] = {
        name: {key: plain(value) for key, value in dataclasses.asdict(found).items()}
        for name, found in evaluation.fidelity.items()
    }
    reference = _open_evaluation(run.evaluation_file(run.as_saved))
    if not evaluation.scores:
        values["question"] = accuracy.question(evaluation)
    drops = _accuracy_drops(run.evaluation_file(run.as_saved), run.evaluation_file(variant))
    for drop in drops:
        if (name := drop.output or next(iter(evaluation.scores), "")) in values["metrics"]:
            values["metrics"][name] |= {
                "accuracy_drop": drop.interval.estimate,
                "accuracy_drop_high": plain(drop.interval.high),
                "unit": drop.unit,
            }
            note = scores.recall_note(reference.scores[name], evaluation.scores[name])
            of = f"Output {name!r}: " if drop.output else ""
            values["accuracy_notes"] += [] if note is None else [of + note]
    worst = drops[0]
    name = worst.output or next(iter(evaluation.scores), "")
    if worst.output:
        values["accuracy"] = evaluation.values[name]
        values["accuracy_notes"].insert(
            0, f"The accuracy is {worst.metric} of output {name!r}, which lost most."
        )
    if name in evaluation.scores:
        _add_mcnemar(values, reference.scores[name], evaluation.scores[name])
    values["accuracy_drop"] = worst.interval.estimate
    values["accuracy_drop_high"] = plain(worst.interval.high)
    # The unchanged model is a legal answer whatever its rounding does to a close call.
    limited = None if variant in run.plan.baselines else drops
    values["is_accurate"] = run.budget.lost(limited) is None
    return limited


def _add_mcnemar(values: dict[str, Any], reference: Scores, found: Scores) -> None:
    before, after = scores.answers(reference), scores.answers(found)
    if before is not None and after is not None:
        values["mcnemar"] = {
            "num_lost": int((before & ~after).sum()),
            "num_gained": int((~before & after).sum()),
            "p_value": statistics.mcnemar(before, after),
        }


def _add_diagnosis(run: Run, values: dict[str, Any], variant: Variant) -> None:
    record = run.ledger.get("diagnose", variant)
    if record is None:
        return
    if record["note"] is not None:
        values["diagnosis"] = [record["note"]]
        return
    found = Diagnosis.open(run.diagnosis_file(variant))
    values |= {"diagnosis": list(found.sentences), "layers": found.slowest(NUM_LAYERS)}


def _open_evaluation(path: Path) -> Evaluation:
    return _opened(path, path.stat().st_mtime_ns)


def _accuracy_drops(baseline: Path, candidate: Path) -> list[Drop]:
    return _drops(baseline, candidate, baseline.stat().st_mtime_ns, candidate.stat().st_mtime_ns)


# Another search may write other evaluations under the same names.
@functools.lru_cache(maxsize=256)
def _opened(path: Path, changed_ns: int) -> Evaluation:
    del changed_ns
    return Evaluation.open(path)


@functools.lru_cache(maxsize=1024)
def _drops(baseline: Path, candidate: Path, *changed_ns: int) -> list[Drop]:
    del changed_ns
    return accuracy.accuracy_drops(_open_evaluation(baseline), _open_evaluation(candidate))


def write(run: Run, chosen: str | None = None) -> Comparison:
    """Writes `results.csv`, `results.json` and `report.html` and returns what is in them."""
    rows = [row(run, variant) for variant in run.variants]
    for values in rows:
        values["chosen"] = values["variant"] == chosen
    details: dict[str, Any] = {
        "model": run.source.name,
        "signature": str(run.source.signature),
        "source_sha256": run.source.sha256,
        "source_notes": list(run.source.notes),
        "metric": run.metric,
        "output_name": run.output_name,
        "as_saved": str(run.as_saved),
        "baseline": str(run.baseline),
        "baseline_artifact": None if run.baseline is None else run.open(run.baseline).identity(),
        "finalists": (run.ledger.get("final") or {"order": []})["order"],
        "chosen": chosen,
        "budget": dataclasses.asdict(run.budget),
        "data": run.dataset.describe(),
        "environment": environment.describe(),
        "command": run.command,
        "students": {name: source.origin for name, source in run.students.items()},
        "seconds": _seconds(run),
    }
    gain = (run.ledger.get("reestimate") or {"gain": None})["gain"]
    offers = [] if gain is None else [Gain(**gain).offer()]
    details["summary"] = " ".join([_summarize(rows, details, run.budget), *offers])
    comparison = Comparison(tuple(rows), details, run.folder)
    comparison.save(run.folder)
    return comparison


def _seconds(run: Run) -> dict[str, float]:
    """Where the time went, over all runs of this folder; without the start of workers."""
    total: dict[str, float] = {}
    for record in run.ledger.records():
        total[record["step"]] = total.get(record["step"], 0.0) + record.get("seconds", 0.0)
    return total


def _summarize(rows: Sequence[dict[str, Any]], details: dict[str, Any], budget: Budget) -> str:
    """What was chosen and why, in a few sentences."""
    by_name = {values["variant"]: values for values in rows}
    measured = [values for values in rows if values.get("median_ms") is not None]
    as_saved, chosen = by_name[details["as_saved"]], by_name.get(details["chosen"])
    if chosen is None:
        return _summarize_nothing(rows, measured, budget)
    is_faster = chosen["variant"] != details["baseline"]
    parts = [
        f"{chosen['variant']} is the fastest of {len(measured)} measured variants inside the "
        "budget:"
        if is_faster
        else f"Nothing inside the budget is proven faster than {chosen['variant']}, the unchanged "
        "model:"
    ]
    parts.append(
        f"{chosen['median_ms']:.3g} ms at batch size {chosen['batch_size']} with "
        f"{chosen['num_threads']} threads."
    )
    if chosen.get("device_ms") is not None:
        parts.append(
            "That contains the copies to the GPU and back; without them the GPU takes "
            f"{chosen['device_ms']:.3g} ms."
        )
    student = Variant.parse(chosen["variant"]).student
    if student:
        parts.append(details["students"][student])
    others = [name for name in details["finalists"] if name != chosen["variant"]]
    if others:
        how = "It was the fastest in a final run" if is_faster else "It was timed in a final run"
        parts.append(f"{how} side by side with {', '.join(others)}.")
    if chosen is not as_saved and not is_faster:
        speedup = chosen["speedup"] / as_saved["speedup"]
        parts.append(f"It is {speedup:.1f} times as fast as the model as saved.")
    elif chosen is not as_saved:
        parts.append(
            f"It is {chosen['speedup'] / as_saved['speedup']:.1f} times as fast as the model "
            f"as saved, and {chosen['speedup']:.2f} times (95 % interval "
            f"{chosen['speedup_low']:.2f} to {chosen['speedup_high']:.2f}) as fast as the "
            f"baseline {details['baseline']}, the fastest unchanged way of running it."
        )
    if is_faster and chosen.get("accuracy_drop") is not None:
        parts += _summarize_accuracy(chosen, as_saved)
    return " ".join(parts)


def _summarize_accuracy(chosen: dict[str, Any], as_saved: dict[str, Any]) -> list[str]:
    """What the chosen variant loses, a sentence for each metric."""

    def bounded(what: str, high: float | None) -> str:
        bound = "" if high is None else f" (the drop is at most {high:.4g}, 95 % bound)"
        return f"{what}{bound}."

    if not chosen["metrics"]:
        what = f"Against the model's own outputs, {chosen['question']} is "
        return [bounded(f"{what}{chosen['accuracy_drop']:.4g}", chosen["accuracy_drop_high"])]
    sentences = []
    for name, found in chosen["metrics"].items():
        of = f" of output {name!r}" if len(chosen["metrics"]) > 1 else ""
        before = as_saved["metrics"][name]["accuracy"]
        what = f"{found['metric']}{of} is {found['accuracy']:.4g} against {before:.4g}"
        sentences.append(bounded(what, found["accuracy_drop_high"]))
    return sentences


def _summarize_nothing(
    rows: Sequence[dict[str, Any]], measured: Sequence[dict[str, Any]], budget: Budget
) -> str:
    if not measured:
        return "Nothing was measured yet."
    if any(values["status"] == "ok" for values in rows):
        return f"{len(measured)} of {len(rows)} variants are measured; none is chosen yet."
    accurate = [values for values in measured if values.get("is_accurate", True)]
    nearest = min(accurate, key=budget.excess)
    return (
        f"Nothing meets the limits. {nearest['variant']} is nearest: {nearest['reason']} "
        "Raise the limit, or make the model smaller."
    )
