"""Students that a search distils and tries like the model."""

import json

import numpy as np
import pytest

import tfopt
from tfopt import runtimes
from tfopt.artifact import Artifact
from tfopt.errors import InputError
from tfopt.search import students
from tfopt.search.candidates import plan
from tfopt.variant import Variant

STUDENT = "teacher(width=0.5)"
QUICK = {
    "variants": ["int8@litert", "dynamic_range@litert"], "num_threads": 1, "quiet": True,
    "max_timing_s": 0.3, "distill_epochs": 4, "distill": [STUDENT, "nowhere.keras"],
}  # fmt: skip


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A trained model of handwritten digits, and its data in two parts."""
    import keras
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("digits")
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32)
    keras.utils.set_random_seed(0)
    new = keras.layers
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1), name="image"),
            new.Rescaling(1 / 16),
            new.Conv2D(16, 3, activation="relu"),
            new.Flatten(),
            new.Dense(10, name="logits"),
        ]
    )
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", entropy, jit_compile=False)
    model.fit(images[:1200], labels[:1200], epochs=8, verbose=0)
    model.save(folder / "model.keras")
    np.savez(
        folder / "data.npz",
        image_train=images[:1200], y_train=labels[:1200],
        image_test=images[1200:], y_test=labels[1200:],
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def searched(digits, tmp_path_factory):
    return tfopt.optimize(
        digits / "model.keras",
        digits / "data.npz",
        tfopt.Budget(max_accuracy_drop=0.2),
        tmp_path_factory.mktemp("searched") / "out",
        **QUICK,
    )


def rows(result):
    return result.table.set_index("variant")


def test_students_are_rows_with_their_lineage(searched):
    table = rows(searched)
    for precision in ("int8", "dynamic_range"):
        row = table.loc[f"{precision}(student=width0.5)@litert"]
        assert row.status == "ok" and row.parent == "student width0.5"
        assert "The student is teacher(width=0.5), distilled from model" in row.reason
        assert row.size_bytes < table.loc[f"{precision}@litert"].size_bytes
        assert row.accuracy > 0.7 and row.accuracy_drop_high < 0.2
    first = table.loc["float32(student=width0.5)@tensorflow"]
    assert first.status == "ok" and first.agreement < 1
    artifact = Artifact.open(searched.output_dir / "artifacts" / "int8-student=width0.5@litert")
    assert artifact.variant == Variant("int8", "litert", student="width0.5")
    assert "distilled from model" in artifact.notes[0]


def test_a_student_that_cannot_be_made_is_one_row(searched):
    found = rows(searched).filter(like="nowhere", axis=0)
    assert list(found.index) == ["float32(student=nowhere)@tensorflow"]
    assert found.status.item() == "failed"
    assert "it does not exist" in found.reason.item()


def test_accuracy_is_what_numpy_counts(searched, digits):
    import keras

    student = keras.models.load_model(searched.output_dir / "students/width0.5/student.keras")
    with np.load(digits / "data.npz") as data:
        predicted = student.predict(data["image_test"], verbose=0).argmax(-1)
        expected = (predicted == data["y_test"]).mean()
    row = rows(searched).loc["float32(student=width0.5)@tensorflow"]
    assert row.accuracy == pytest.approx(expected)
    # 8 of 16 filters: a kernel of 3 × 3 with bias, and the weights of 6 × 6 × 8 values.
    assert student.count_params() == (9 * 8 + 8) + (288 * 10 + 10)


def test_the_choice_can_be_a_student(searched):
    chosen = searched.best.variant
    with searched.load() as session:
        outputs = session.run({"image": np.zeros((1, 8, 8, 1), np.float32)})
    assert next(iter(outputs.values())).shape == (1, 10)
    assert ("The student is" in searched.summary) == bool(chosen.student)
    comparison = tfopt.Comparison.from_files([searched.output_dir])
    assert list(comparison.table.variant) == list(searched.table.variant)


def test_an_interrupted_search_goes_on_with_its_student(searched, digits, tmp_path):
    import shutil

    folder = tmp_path / "out"
    shutil.copytree(searched.output_dir, folder)
    # As a kill after training leaves it: the student is there and its record is not.
    lines = (folder / "ledger.jsonl").read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if json.loads(line).get("step") == "distill")
    (folder / "ledger.jsonl").write_text("".join(lines[:end]))
    before = (folder / "students/width0.5/student/history.csv").read_text()
    result = tfopt.optimize(
        digits / "model.keras", digits / "data.npz", tfopt.Budget(max_accuracy_drop=0.2), folder,
        resume=True, **QUICK,
    )  # fmt: skip
    assert (folder / "students/width0.5/student/history.csv").read_text() == before
    old, new = rows(searched), rows(result)
    assert set(old.index) == set(new.index)
    name = "int8(student=width0.5)@litert"
    assert new.loc[name].accuracy == pytest.approx(old.loc[name].accuracy)


@pytest.mark.parametrize(
    "text, name",
    [
        ("teacher(width=0.5)", "width0.5"),
        ("teacher(depth=0.5,width=0.25)", "depth0.5-width0.25"),
        ("teacher", "teacher"),
        ("MobileNetV2(alpha=0.5)", "MobileNetV2-alpha0.5"),
        ("models/small net.keras", "small-net"),
        ("package.module:make_student", "make_student"),
    ],
)
def test_names(text, name):
    assert students.name_of(text) == name
    variant = Variant("int8", "openvino", (("activations", "bfloat16"),), name)
    assert Variant.parse(str(variant)) == variant
    assert str(variant) == f"int8(activations=bfloat16,student={name})@openvino"


def test_parents_are_of_the_same_student():
    variant = Variant("int8", "openvino", (("activations", "bfloat16"),), "half")
    assert runtimes.get("openvino").parent(variant) == Variant("int8", "openvino", student="half")
    planned = plan("saved_model", ["int8@litert"])
    assert all(variant.student == "half" for variant in planned.of_student("half"))


def test_refusals(digits, tmp_path):
    with pytest.raises(InputError, match="give each student once"):
        students.names(["a/small.keras", "b/small.keras"])
    with pytest.raises(InputError, match="name students with `distill`"):
        plan("saved_model", ["int8(student=half)@litert"])
    with pytest.raises(InputError, match="have no training part"):
        students.check_data({"x": np.zeros(3), "y": np.zeros(3)})
    with pytest.raises(InputError, match="cannot teach"):
        students.teacher_file(tmp_path / "model.onnx", tmp_path)
