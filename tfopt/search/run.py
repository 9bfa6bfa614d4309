"""What a search works on and where its files lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tfopt.artifact import Artifact
from tfopt.dataset import Dataset
from tfopt.measure.metrics import AGREEMENT
from tfopt.search import steps
from tfopt.search.budget import Budget
from tfopt.search.candidates import Plan
from tfopt.search.ledger import Ledger
from tfopt.source import Source
from tfopt.variant import Variant


@dataclasses.dataclass(frozen=True)
class Run:
    """A search in its output folder; everything that it found so far is in the ledger.

    Attributes:
      folder: the output folder.
      source: the model.
      dataset: the examples.
      plan: what is tried.
      ledger: finished steps.
      budget: the limits.
      scored: the metric of each output that has labels; None where the labels decide.
      output_name: the only output that is asked about; None is all of them.
      batch_size: of the timings.
      num_threads: of every runtime.
      seed: of the order of timings.
      command: what does the same from a shell, if that is possible.
      students: sources of the students that were distilled from the model, by name.
    """

    folder: Path
    source: Source
    dataset: Dataset
    plan: Plan
    ledger: Ledger
    budget: Budget
    scored: dict[str, str | None]
    output_name: str | None
    batch_size: int
    num_threads: int
    seed: int
    command: str | None = None
    students: dict[str, Source] = dataclasses.field(default_factory=dict)

    @property
    def candidates(self) -> tuple[Variant, ...]:
        """What is tried besides the unchanged model; of a student that failed one variant."""
        found = list(self.plan.candidates)
        for record in self.ledger.records():
            if record["step"] == "distill":
                variants = self.plan.of_student(record["variant"])
                found += variants if record["reason"] is None else variants[:1]
        return tuple(found)

    @property
    def variants(self) -> tuple[Variant, ...]:
        """All rows of the table, in order."""
        return self.plan.baselines + self.candidates + tuple(self.plan.skipped)

    def source_of(self, variant: Variant) -> Source:
        """What a variant is converted from: the model, or a student of it."""
        return self.students[variant.student] if variant.student else self.source

    @property
    def metrics(self) -> dict[str, str]:
        """The metric of each output that has labels, as soon as the model as saved was run."""
        record = self.ledger.get("metrics")
        return {} if record is None else record["metrics"]

    @property
    def metric(self) -> str:
        """The metrics in words, as `--metric` takes them."""
        names = list(self.metrics.values())
        if len(names) > 1:
            return ",".join(f"{output}={name}" for output, name in self.metrics.items())
        return names[0] if names else AGREEMENT

    @property
    def as_saved(self) -> Variant:
        """The model as it came: the reference of accuracy."""
        return self.plan.baselines[0]

    @property
    def baseline(self) -> Variant | None:
        """The fastest unchanged way of running the model, once the pilot found it."""
        record = self.ledger.get("pilot")
        return None if record is None else Variant.parse(record["baseline"])

    @property
    def reference_folder(self) -> Path:
        """The outputs of the model as saved."""
        return self.folder / "data" / "reference"

    def artifact_folder(self, variant: Variant) -> Path:
        """Where a variant's files lie."""
        return self.folder / "artifacts" / variant.slug

    def open(self, variant: Variant) -> Artifact:
        """A converted variant."""
        return Artifact.open(self.artifact_folder(variant))

    def evaluation_file(self, variant: Variant) -> Path:
        """Where a variant's scores lie."""
        return self.folder / "evaluations" / f"{variant.slug}.npz"

    def is_evaluated(self, variant: Variant) -> bool:
        """Whether a variant's scores are those of this search."""
        record = self.ledger.get("measure", variant)
        return record is not None and record["reason"] is None

    def diagnosis_file(self, variant: Variant) -> Path:
        """Where it lies what was found inside a variant."""
        return self.folder / "diagnoses" / f"{variant.slug}.json"

    def timing_file(self, name: str) -> Path:
        """Where the raw times of a timed run lie."""
        return self.folder / "timings" / f"{name}.json"

    def failure(self, variant: Variant) -> str | None:
        """Why a variant failed, or None."""
        record = self.ledger.get("distill", variant.student) if variant.student else None
        if record is not None and record["reason"] is not None:
            return f"There is no such student: {record['reason']}"
        for step in (*steps.parents_of(variant), variant):
            record = self.ledger.get("convert", step)
            if record is not None and record["reason"] is not None:
                start = "" if step == variant else f"It starts from {step}: "
                return start + record["reason"]
        record = self.ledger.get("measure", variant)
        return None if record is None else record["reason"]

    def timed(self, variant: Variant) -> dict[str, Any] | None:
        """The figures of a variant's last timing, or None."""
        for step in ("final", "pilot"):
            record = (self.ledger.get(step) or {"rows": {}})["rows"].get(str(variant))
            if record is not None:
                return record
        record = self.ledger.get("measure", variant)
        return record if record is not None and "median_ms" in record else None
