"""What `tfopt optimize` says once model and data are read: the smallest golden."""

import numpy as np
import pytest

from tests import goldens
from tfopt import commands


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """The SavedModel of the smallest golden."""
    path = tmp_path_factory.mktemp("model") / "dense"
    goldens.export(goldens.GOLDENS["dense"], path)
    return path


def features(count=8, width=16, dtype="float32"):
    return np.random.default_rng(0).normal(size=(count, width)).astype(dtype)


@pytest.fixture
def refused_late(call, dense, tmp_path):
    """Returns a function that optimizes the golden with some data and checks the refusal."""

    def run(*arguments, model=dense, **arrays):
        np.savez(tmp_path / "data.npz", **arrays)
        flags = [f"--model={model}", "--data=data.npz", "--output_dir=out", "--quiet"]
        status, out, err = call("optimize", *flags, "--variants=float32@litert", *arguments)
        assert status == commands.WRONG_INPUT, err
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert err.strip().endswith(".")
        return err

    return run


def test_signature_that_is_not_there(refused_late):
    message = refused_late("--signature=predict", x=features())
    assert "predict" in message
    assert "serving_default" in message


def test_data_of_another_name(refused_late):
    message = refused_late(pixels=features())
    assert "pixels" in message
    assert "features" in message


def test_data_of_another_shape(refused_late):
    message = refused_late(x=features(width=7))
    assert "(7,)" in message
    assert "(16)" in message


def test_data_of_another_dtype(refused_late):
    message = refused_late(x=features(dtype="complex64"))
    assert "complex64" in message
    assert "float32" in message


def test_data_of_words(refused_late):
    message = refused_late(x=np.full((8, 16), "word"))
    assert "float32" in message


def test_arrays_of_unequal_length(refused_late):
    assert "unequal" in refused_late(x=features(8), y=np.zeros(7, int))


def test_no_labels_for_a_metric(refused_late):
    message = refused_late("--metric=top1", x=features())
    assert "'top1'" in message
    assert "labels" in message


def test_no_examples(refused_late):
    assert "no examples" in refused_late(x=features(0))


def test_data_that_does_not_exist(call, dense):
    status, _, err = call(
        "optimize", f"--model={dense}", "--data=nowhere.npz", "--output_dir=out", "--quiet"
    )
    assert status == commands.WRONG_INPUT
    assert "nowhere.npz" in err


def test_data_that_is_no_npz(call, dense, tmp_path):
    (tmp_path / "data.npz").write_text("no archive")
    status, _, err = call(
        "optimize", f"--model={dense}", "--data=data.npz", "--output_dir=out", "--quiet"
    )
    assert status == commands.WRONG_INPUT
    assert "no .npz file" in err


def copy_damaged(dense, folder, name):
    """A copy of a SavedModel with one file cut in half."""
    import shutil

    shutil.copytree(dense, folder)
    [file] = folder.glob(name)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return folder


def test_truncated_variables(refused_late, dense, tmp_path):
    model = copy_damaged(dense, tmp_path / "cut", "variables/variables.data*")
    assert "cut" in refused_late(model=model, x=features())


def test_truncated_graph(refused_late, dense, tmp_path):
    model = copy_damaged(dense, tmp_path / "cut", "saved_model.pb")
    assert "cut" in refused_late(model=model, x=features())


def test_variables_that_are_missing(refused_late, dense, tmp_path):
    import shutil

    shutil.copytree(dense, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "variables")
    assert "cut" in refused_late(model=tmp_path / "cut", x=features())


def test_a_mistake_can_be_corrected_in_the_same_folder(call, refused_late, dense, tmp_path):
    refused_late(pixels=features())
    np.savez(tmp_path / "data.npz", x=features())
    status, out, err = call(
        "optimize", f"--model={dense}", "--data=data.npz", "--output_dir=out", "--overwrite",
        "--quiet", "--variants=float32@litert", "--max_accuracy_drop=1", "--max_timing_s=0.1",
    )  # fmt: skip
    assert status == commands.DONE, err
    assert "* float32@litert" in out or "* float32" in out


def test_nothing_meets_the_limits(call, dense, tmp_path):
    np.savez(tmp_path / "data.npz", x=features())
    status, out, _ = call(
        "optimize", f"--model={dense}", "--data=data.npz", "--output_dir=out", "--quiet",
        "--variants=float32@litert", "--max_size_bytes=1", "--max_timing_s=0.1",
    )  # fmt: skip
    assert status == commands.NO_RESULT
    assert "Nothing meets the limits" in out
