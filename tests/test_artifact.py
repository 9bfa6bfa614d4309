import json
import tempfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfopt.artifact import FILE_NAME, Artifact, measure_files
from tfopt.errors import InputError
from tfopt.signature import Signature, TensorSpec
from tfopt.variant import Variant


def artifact_in(folder, **changes):
    values = {
        "folder": folder,
        "variant": Variant.parse("int8(calibration=entropy,per_channel=False)@onnxruntime"),
        "parent": Variant.parse("float32@onnxruntime"),
        "source_sha256": "ab" * 32,
        "signature": Signature(
            "serving_default",
            (TensorSpec("image", (None, 3), "float32"),),
            (TensorSpec("scores", None, "float32"),),
        ),
        "size_bytes": 123,
        "compressed_bytes": 45,
        "versions": {"onnxruntime": "1.2.3"},
        "notes": ("2 of 3 layers stayed float32: „größer“.",),
        "measured_on": {"cpu": "x", "num_threads": 2, "median_ms": 0.5},
    }
    return Artifact(**{**values, **changes})


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "artifact"
    (folder / "variables").mkdir(parents=True)
    (folder / "model.onnx").write_bytes(b"weights" * 100)
    (folder / "variables" / "0.bin").write_bytes(b"")
    artifact = artifact_in(folder)
    artifact.save()
    return artifact


class TestFile:
    def test_round_trip(self, saved):
        assert Artifact.open(saved.folder) == saved
        assert Artifact.open(str(saved.folder)) == saved

    def test_round_trip_without_what_may_be_missing(self, tmp_path):
        artifact = artifact_in(tmp_path, parent=None, notes=(), measured_on=None)
        artifact.save()
        assert Artifact.open(tmp_path) == artifact

    @pytest.mark.parametrize("folder", [".", "no_such_folder"])
    def test_no_artifact(self, folder, tmp_path):
        with pytest.raises(InputError, match=rf"No artifact in .*{FILE_NAME} is missing.*convert"):
            Artifact.open(tmp_path / folder)

    @pytest.mark.parametrize(
        "content",
        ["", "{", "[]", "7", '"text"', "null", '{"variant": "int8@litert"}', "\udcff"],
    )
    def test_damaged(self, content, saved):
        path = saved.folder / FILE_NAME
        path.write_bytes(content.encode(errors="surrogateescape"))
        with pytest.raises(InputError, match=rf"{FILE_NAME} is damaged \(.*convert .* again"):
            Artifact.open(saved.folder)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("variant", "int8"),
            ("variant", 7),
            ("parent", "x"),
            ("signature", None),
            ("signature", {"key": "x"}),
            ("signature", {"key": "x", "inputs": [7], "outputs": []}),
            ("notes", 7),
        ],
    )
    def test_damaged_values(self, key, value, saved):
        path = saved.folder / FILE_NAME
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
        with pytest.raises(InputError, match=r"is damaged"):
            Artifact.open(saved.folder)

    @given(st.data())
    def test_cut_off_anywhere_is_damaged(self, data):
        with tempfile.TemporaryDirectory() as name:
            artifact_in(Path(name)).save()
            path = Path(name, FILE_NAME)
            content = path.read_bytes()
            length = data.draw(st.integers(0, len(content) - 3))  # "}" and the last line's end
            path.write_bytes(content[:length])
            with pytest.raises(InputError, match=r"is damaged"):
                Artifact.open(name)


class TestCopy:
    def test_takes_all_files_and_changes(self, saved, tmp_path):
        copy = saved.copy_to(tmp_path / "best", measured_on={"cpu": "y"})
        assert copy.folder == tmp_path / "best"
        assert Artifact.open(copy.folder) == copy
        assert copy.measured_on == {"cpu": "y"}
        assert copy.variant == saved.variant
        files = {p.relative_to(saved.folder) for p in saved.folder.rglob("*")}
        assert {p.relative_to(copy.folder) for p in copy.folder.rglob("*")} == files
        assert (copy.folder / "model.onnx").read_bytes() == b"weights" * 100
        assert Artifact.open(saved.folder) == saved

    @pytest.mark.parametrize("is_file", [False, True])
    def test_refuses_to_overwrite(self, is_file, saved, tmp_path):
        there = tmp_path / "best"
        there.write_text("mine") if is_file else there.mkdir()
        with pytest.raises(InputError, match=r"best exists already; nothing was overwritten"):
            saved.copy_to(there)
        assert there.read_text() == "mine" if is_file else not list(there.iterdir())


names = st.sampled_from(["a.bin", "b/a.bin", "b/c/d", "model.onnx", FILE_NAME, f"b/{FILE_NAME}"])
contents = st.binary(max_size=300) | st.integers(0, 5000).map(lambda n: b"ab" * n)


class TestMeasureFiles:
    @settings(deadline=None)
    @given(st.dictionaries(names, contents))
    def test_agrees_with_zlib(self, files):
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            found = measure_files(Path(folder))
        counted = [v for name, v in files.items() if not name.endswith(FILE_NAME)]
        assert found == (
            sum(map(len, counted)),
            sum(len(zlib.compress(content, 6)) for content in counted),
        )

    def test_of_files_larger_than_a_block(self, tmp_path):
        content = b"".join(bytes([i % 251]) * 37 for i in range(90_000))
        assert len(content) > 3 << 20
        (tmp_path / "model").write_bytes(content)
        assert measure_files(tmp_path) == (len(content), len(zlib.compress(content, 6)))
