"""A variant's outputs beside those of the model as saved, batch by batch."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path

import numpy as np

from tfopt.examples import Arrays, Examples
from tfopt.measure import limits
from tfopt.measure.fidelity import (
    NEARLY_ALL_TRIMMED_SHARE,
    TRIMMED_SHARE,
    Compared,
    Fidelity,
    decibels,
    least_found,
    trimmed,
)
from tfopt.measure.outputs import (
    Detections,
    Kind,
    Match,
    Output,
    find_detections,
    infer,
    is_one_answer,
    lost,
)

OUTPUTS_FILE = "outputs.json"
SAMPLE_EXAMPLES = 64  # that the kind of an output is inferred from
SAMPLE_BYTES = 64 << 20


class Sample:
    """The first outputs of the model as saved, from which it is inferred what they are."""

    def __init__(self) -> None:
        self._examples: dict[str, list[np.ndarray]] = {}
        self._bytes = 0

    def add(self, outputs: Arrays) -> None:
        """Adds outputs by name, (examples, …)."""
        for name, value in outputs.items():
            kept = self._examples.setdefault(name, [])
            for example in value[: SAMPLE_EXAMPLES - len(kept)]:
                if self._bytes < SAMPLE_BYTES or len(kept) < 2:
                    kept.append(np.array(example))
                    self._bytes += example.nbytes if hasattr(example, "nbytes") else 0

    def save(self, folder: Path, whole: set[str], class_scores: Collection[str] = ()) -> None:
        """Writes what the outputs are into the folder of the reference.

        Args:
          folder: where to.
          whole: outputs without a batch dimension.
          class_scores: outputs that are known to hold them, since they are scored by class.
        """
        found = [self._infer(name, name in whole) for name in self._examples]
        found = [
            dataclasses.replace(output, kind=Kind.CLASS_SCORES)
            if output.name in class_scores and output.kind is not Kind.NUMBERS
            else output
            for output in found
        ]
        detections = find_detections(self._examples)
        value = {
            "outputs": [output.to_json() for output in found],
            "detections": None if detections is None else dataclasses.asdict(detections),
        }
        (folder / OUTPUTS_FILE).write_text(json.dumps(value))

    def _infer(self, name: str, is_whole: bool) -> Output:
        examples = self._examples[name]
        if len({example.shape for example in examples}) > 1:  # such as boxes, a number an image
            rank = examples[0].ndim
            if rank < 1 or len({example.shape[1:] for example in examples}) > 1:
                examples = [example.reshape(-1) for example in examples]
            return infer(name, np.concatenate(examples), is_whole)
        return infer(name, np.stack(examples), is_whole)


@dataclasses.dataclass(frozen=True)
class Reference:
    """The outputs of the model as saved, on disk.

    Attributes:
      examples: the outputs themselves, as far as they were kept.
      outputs: what they are, by name.
      detections: which of them are a detector's; None for other models.
    """

    examples: Examples
    outputs: dict[str, Output]
    detections: Detections | None

    @classmethod
    def open(cls, folder: Path) -> Reference:
        """Reads what was written of the model as saved."""
        value = json.loads((folder / OUTPUTS_FILE).read_text())
        outputs = [Output.from_json(item) for item in value["outputs"]]
        found = value["detections"]
        return cls(
            Examples(folder),
            {output.name: output for output in outputs},
            None if found is None else Detections(**found),
        )

    @property
    def whole(self) -> set[str]:
        """Outputs without a batch dimension."""
        return {name for name, output in self.outputs.items() if output.is_whole}


DETECTIONS = "detections"
"""The name under which the outputs of a detector are compared together."""


class Comparer:
    """Compares outputs with the reference's, as long as those were kept.

    Attributes:
      lost: of each output, and of `DETECTIONS`, what was lost of each example's answer; see
        `tfopt.measure.outputs.lost`.
    """

    def __init__(self, reference: Reference):
        self._reference = reference
        self._start = 0
        self._compared = {name: Compared(output) for name, output in reference.outputs.items()}
        self._lost: dict[str, list[np.ndarray]] = {name: [] for name in reference.outputs}
        if reference.detections is not None:
            self._lost[DETECTIONS] = []
        self._graded: set[str] = {DETECTIONS}
        self._matches: list[Match] = []

    @property
    def detected(self) -> tuple[str, ...]:
        """Names of a detector's outputs, which `DETECTIONS` stands for."""
        found = self._reference.detections
        return () if found is None else found.names

    @property
    def lost(self) -> dict[str, np.ndarray]:
        """See the class; booleans where an example has a single answer."""
        found = {
            name: np.concatenate(parts) if parts else np.zeros(0)
            for name, parts in self._lost.items()
        }
        return {
            name: share if name in self._graded else share.astype(bool)
            for name, share in found.items()
        }

    def fidelity(self) -> dict[str, Fidelity]:
        """Of each output."""
        found = {name: compared.fidelity() for name, compared in self._compared.items()}
        decisions = (Kind.CLASS_SCORES, Kind.PROBABILITIES, Kind.NUMBERS, Kind.TEXT)
        for name, share in self.lost.items():
            if name == DETECTIONS:
                number, found_again = self._worst_class()
                found[name] = Fidelity(
                    DETECTIONS,
                    len(share),
                    lost_number=number,
                    found_again=found_again,
                    agreement=1 - float(share.mean()),
                )
            elif self._reference.outputs[name].kind in decisions and len(share):
                found[name] = dataclasses.replace(found[name], agreement=1 - float(share.mean()))
        detections = self._reference.detections
        for name in self.detected:
            noise = np.zeros(0)
            if detections is not None and name in (detections.boxes, detections.scores):
                kind = "boxes" if name == detections.boxes else "scores"
                noise = np.concatenate([noise, *(getattr(m, kind) for m in self._matches)])
            found[name] = dataclasses.replace(
                found[name],
                is_detected=True,
                sqnr_db=decibels(len(noise), float(noise.sum())),
                relative_db=decibels(len(noise), float(noise.sum())),
                trimmed_sqnr_db=decibels(len(noise), trimmed(noise, TRIMMED_SHARE)),
                nearly_all_sqnr_db=decibels(len(noise), trimmed(noise, NEARLY_ALL_TRIMMED_SHARE)),
                usual_sqnr_db=math.inf,
                channel=-1,
                channel_db=math.inf,
            )
        return found

    def _worst_class(self) -> tuple[float, float]:
        """The class whose boxes are found again least, and how often they are."""
        expected: Counter[float] = Counter()
        found: Counter[float] = Counter()
        for match in self._matches:
            expected.update(match.classes.tolist())
            found.update(match.classes[match.is_found].tolist())
        return least_found(expected, found)

    def add(self, outputs: Arrays) -> None:
        """Compares the next examples; outputs by name, (examples, …).

        Outputs that the reference does not have are left out.
        """
        examples = self._reference.examples
        count = len(next(iter(outputs.values())))
        stop = min(self._start + count, examples.num_examples)
        if stop <= self._start:
            return
        expected = {
            name: examples.read(name, self._start, stop) for name in self._reference.outputs
        }
        for name, rows in expected.items():
            output, compared = self._reference.outputs[name], self._compared[name]
            if name not in outputs:
                compared.add_missing(len(rows))
                self._lost[name].append(np.ones(len(rows)))
                continue
            value = outputs[name][: stop - self._start]
            has_rows = len(value) == len(rows)
            fits = np.array([has_rows and row.shape == value.shape[1:] for row in rows])
            if not fits.all():
                others = [row.shape for row, is_fit in zip(rows, fits, strict=True) if not is_fit]
                compared.add_other_shapes(value.shape[1:], others)
            share = np.ones(len(rows))
            if fits.any():
                kept = value[fits]
                of = np.stack([row for row, is_fit in zip(rows, fits, strict=True) if is_fit])
                compared.add(kept, of)
                if not is_one_answer(output, of):
                    self._graded.add(name)
                share[fits] = lost(output, _finite_or(kept, of, output.mask), of)
            self._lost[name].append(share)
        detections = self._reference.detections
        if detections is not None and set(detections.names) <= set(outputs):
            matches = [
                detections.match(
                    {name: outputs[name][index] for name in detections.names},
                    {name: expected[name][index] for name in detections.names},
                )
                for index in range(stop - self._start)
            ]
            self._matches += matches
            self._lost[DETECTIONS].append(np.array([match.lost for match in matches]))
        self._start = stop


def _finite_or(value: np.ndarray, reference: np.ndarray, mask: float) -> np.ndarray:
    """Values with zeros where they are not finite but the reference is a number."""
    if value.dtype.kind not in "fV":
        return value
    wide = value.astype(np.float64)
    is_broken = ~np.isfinite(wide) & ~limits.is_limit(reference.astype(np.float64), mask)
    return np.where(is_broken, 0.0, wide) if is_broken.any() else value
