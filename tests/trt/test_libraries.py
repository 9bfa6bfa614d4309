import ctypes.util
import shutil
import subprocess

import pytest

from tfopt.trt import libraries


# NvInferVersion.h of each: 1000 × major + 100 × minor + patch, ten times as wide since TensorRT 10.
@pytest.mark.parametrize(
    ("number", "version"),
    [(8601, (8, 6, 1)), (8205, (8, 2, 5)), (100001, (10, 0, 1)), (101303, (10, 13, 3)),
     (110400, (11, 4, 0))],
)  # fmt: skip
def test_versions_are_read_as_tensorrt_writes_them(number, version):
    assert libraries.decode(number) == version


@pytest.mark.parametrize(
    ("linked", "loaded", "runs"),
    [
        ((8, 6, 1), (8, 6, 1), True),
        ((8, 6, 1), (8, 6, 0), True),
        ((8, 6, 1), (8, 5, 3), False),
        ((8, 4, 3), (8, 6, 1), True),
        ((8, 6, 1), (10, 0, 1), False),
        ((8, 6, 1), (7, 6, 1), False),
    ],
)
def test_which_versions_take_each_others_place(linked, loaded, runs):
    assert libraries.runs_together(linked, loaded) == runs


def test_a_missing_library_is_named():
    found = libraries.find("libnvinfer.so.0.0.0")
    assert found.version is None
    assert "libnvinfer.so.0.0.0" in found.reason


def test_another_library_is_none():
    found = libraries.find(ctypes.util.find_library("c"))
    assert found.version is None
    assert "getInferLibVersion" in found.reason


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
def test_the_library_says_its_version(tmp_path):
    source, library = tmp_path / "nvinfer.c", tmp_path / "libnvinfer.so"
    source.write_text("int getInferLibVersion(void) { return 8601; }\n")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    assert libraries.find(str(library)) == libraries.Library((8, 6, 1))
