"""Traits of known families come through every runtime in float32 as Keras computes them.

The stand-ins, and what compares, belong to `scripts/benchmarks/every_architecture.py`, which tries
the families themselves.
"""

import csv
import dataclasses
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tfopt import runtimes
from tfopt.search import steps
from tfopt.variant import Variant

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

import architecture_grid
import architecture_rows
import architectures

STAND_INS = {one.member: one for one in architectures.stand_ins()}
LEFT_OUT = set(filter(None, os.environ.get("TFOPT_TEST_WITHOUT", "").split(",")))
# The conformance tests try the other two ways of TensorFlow.
RUNTIMES = {
    "litert": "float32@litert",
    "onnxruntime": "float32@onnxruntime",
    "openvino": "float32@openvino",
    "tensorflow": "float32(xla=True)@tensorflow",
}
LIMIT = 2e-5  # of the spread; seen: 5e-6


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Makes a stand-in once; returns what was made and its folder."""
    kept = {}

    def make(name):
        if name not in kept:
            folder = tmp_path_factory.mktemp(name) / "made"
            kept[name] = architecture_grid.make(STAND_INS[name], folder), folder
        return kept[name]

    return make


def test_every_runtime_of_processors_is_tried():
    tried = {name for name in runtimes.names() if not runtimes.get(name).has_engines}
    assert tried == set(RUNTIMES)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name", STAND_INS)
def test_stand_in_is_what_keras_computes(name, runtime, made):
    if runtime in LEFT_OUT:
        pytest.skip(f"TFOPT_TEST_WITHOUT names {runtime}.")
    ready, folder = made(name)
    assert ready.variation > architecture_rows.MIN_VARIATION
    found = architecture_grid.convert_and_compare(ready.source, RUNTIMES[runtime], folder)
    assert not found.problem
    assert found.max_error < LIMIT


@pytest.fixture(scope="module")
def artifact(made, tmp_path_factory):
    ready, folder = made("concatenation")
    target = tmp_path_factory.mktemp("compare") / "artifact"
    variant = Variant.parse(RUNTIMES["litert"])
    return steps.convert(ready.source, variant, target, None, None, 1).folder, folder


class TestCompare:
    """What is not what Keras computes is found."""

    @pytest.fixture
    def folder(self, artifact, tmp_path):
        """The inputs and outputs of Keras, where a test may change them."""
        for name in ("inputs.npz", "reference.npz", "alone.npz"):
            (tmp_path / name).write_bytes((artifact[1] / name).read_bytes())
        return tmp_path

    def changed(self, folder, change):
        with np.load(folder / "reference.npz") as file:
            np.savez(folder / "changed.npz", **{name: change(file[name]) for name in file.files})
        (folder / "changed.npz").replace(folder / "reference.npz")

    def test_error_is_relative_to_the_spread(self, artifact, folder):
        with np.load(folder / "reference.npz") as file:
            (reference,) = file.values()
        spread = np.sqrt(np.mean((reference - reference.mean(axis=0)) ** 2))

        def shift_one(values):
            values[3, 2] += 0.25 * spread
            return values

        self.changed(folder, shift_one)
        found = architecture_grid.compare(artifact[0], folder)
        assert found.max_error == pytest.approx(0.25, rel=0.02)
        power = 10 ** (-found.sqnr_db / 10) * reference.size  # of one error among all values
        assert power == pytest.approx(0.25**2, rel=0.05)

    @pytest.mark.parametrize(
        "change",
        [lambda values: values[:, :-1], lambda values: values.astype(np.float64)],
        ids=["shape", "dtype"],
    )
    def test_other_outputs_are_a_problem(self, artifact, folder, change):
        self.changed(folder, change)
        assert "Keras has" in architecture_grid.compare(artifact[0], folder).problem


class TestRows:
    ONE = architectures.Architecture("suite", "family", "Member")

    def row(self, max_error, variation=0.5, problem=""):
        made = architecture_grid.Made(None, 1000, "image (8, 8, 3)", variation)
        found = architecture_grid.Difference(max_error, 60.0, problem)
        return architecture_rows.judge(self.ONE, "float32@litert", made, found)

    @pytest.mark.parametrize(
        ("max_error", "variation", "problem", "status"),
        [
            (1e-5, 0.5, "", "ok"),
            (2e-3, 0.5, "", "wrong"),
            (np.nan, 0.5, "", "wrong"),
            (np.nan, 0.5, "no outputs", "wrong"),
            (1e-5, 1e-3, "", "flat"),
            (1e-5, np.nan, "", "flat"),
            (2e-3, 1e-3, "", "wrong"),
        ],
    )
    def test_status(self, max_error, variation, problem, status):
        assert self.row(max_error, variation, problem).status == status

    def test_rows_are_added_and_read_again(self, tmp_path):
        file = tmp_path / "new" / "rows.csv"
        rows = [
            self.row(1e-5),
            architecture_rows.failed(
                self.ONE, "float32@openvino", 'A comma, a "quote"\nand a line.'
            ),
        ]
        assert architecture_rows.read(file) == []
        for row in rows:
            architecture_rows.append(file, row)
        assert architecture_rows.read(file) == rows
        with file.open(newline="", encoding="utf-8") as lines:
            header = next(csv.reader(lines))
        assert header == [field.name for field in dataclasses.fields(architecture_rows.Row)]

    def test_table_has_a_line_for_each_network(self):
        broken = architectures.Architecture("suite", "broken", "Broken")
        other = architectures.Architecture("suite", "other", "Other")
        rows = [
            self.row(1.23e-5),
            architecture_rows.failed(self.ONE, "float32@openvino", "Because."),
            architecture_rows.failed(broken, "", "It cannot be made."),
            architecture_rows.failed(other, "float32@openvino", "Because."),
        ]
        assert architecture_rows.markdown(rows).splitlines() == [
            "| Network | `float32@litert` | `float32@openvino` |",
            "|---|---|---|",
            "| Member | 1e-05 | no (1) |",
            "| Broken | no (2) | no (2) |",
            "| Other |  | no (1) |",
            "",
            "1. Because.",
            "2. It cannot be made.",
        ]
