"""Exit statuses and messages of the command line."""

import json
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

from tfopt import commands
from tfopt.commands._flags import as_flags

TEXT = """tests/commands/test_commands.py needs a file with some text."""


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a SavedModel until it is read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"")
    return folder


@pytest.fixture
def optimize(refused, model, tmp_path):
    """Returns a function that calls optimize with usual flags and the given ones; it must refuse.

    All the usual flags are of the form that is checked before anything is loaded.
    """

    def run(*arguments, output_dir=tmp_path / "out"):
        usual = [f"--model={model}", "--data=data.npz", f"--output_dir={output_dir}"]
        return refused("optimize", *usual, *arguments)

    return run


# The command line itself.


def test_help_is_done(call):
    for arguments in (["--help"], ["-h"], ["help"]):
        status, out, err = call(*arguments)
        assert status == commands.DONE
        assert err == ""
        for name in commands.command_names():
            assert f"  {name} " in out


@pytest.mark.parametrize("name", commands.command_names())
def test_help_of_a_command_is_done(name, call):
    status, out, err = call(name, "--help")
    assert status == commands.DONE
    assert err == ""
    assert "Flags:" in out


def test_nothing_is_wrong_input_with_help(call):
    status, out, _ = call()
    assert status == commands.WRONG_INPUT
    assert "Usage" in out


def test_version(call):
    import tfopt

    assert call("--version") == (commands.DONE, f"{tfopt.__version__}\n", "")


def test_unknown_command_lists_the_commands(refused):
    message = refused("optimise")
    assert "'optimise'" in message
    for name in commands.command_names():
        assert name in message


@pytest.mark.parametrize("name", commands.command_names())
def test_unknown_flag_lists_the_flags(name, refused):
    message = refused(name, "--nonsense=1")
    assert "nonsense" in message
    assert "the flags are: " in message
    assert "--files" not in message


def test_flag_of_a_wrong_type(refused):
    assert "--batch_size" in refused("optimize", "--batch_size=many")


def test_argument_without_a_flag(refused):
    assert "'model.keras'" in refused("optimize", "model.keras")


def test_interrupted(call, model, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tfopt.search.optimize.optimize", interrupt)
    status, _, err = call("optimize", f"--model={model}", "--data=d.npz", "--output_dir=o")
    assert status == commands.INTERRUPTED
    assert "Traceback" not in err


# optimize: what can be refused before the model is loaded.


def test_missing_flags_are_named(refused):
    message = refused("optimize", "--data=data.npz")
    assert "--model" in message
    assert "--output_dir" in message
    assert "--data" not in message


def test_model_that_does_not_exist(refused):
    message = refused("optimize", "--model=nowhere", "--data=d.npz", "--output_dir=o")
    assert "nowhere" in message
    assert ".keras" in message


def test_folder_that_is_no_model(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused("optimize", "--model=empty", "--data=d.npz", "--output_dir=o")
    assert "saved_model.pb" in message
    assert not (tmp_path / "o").exists()


def test_file_that_is_no_model(refused, tmp_path):
    (tmp_path / "weights.txt").write_text(TEXT)
    message = refused("optimize", "--model=weights.txt", "--data=d.npz", "--output_dir=o")
    assert ".txt" in message
    assert "SavedModel" in message


def test_output_folder_that_is_not_empty(optimize, tmp_path):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / "mine.txt").write_text(TEXT)
    message = optimize(output_dir=folder)
    assert "name another --output_dir" in message
    (folder / "ledger.jsonl").touch()
    message = optimize(output_dir=folder)
    assert "--resume" in message
    assert "--overwrite" in message
    assert "`" not in message


def test_overwrite_leaves_a_foreign_folder_alone(optimize, tmp_path):
    folder = tmp_path / "full"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "mine.txt").write_text(TEXT)
    assert "not written by tfopt" in optimize("--overwrite", output_dir=folder)
    assert (folder / "data" / "mine.txt").read_text() == TEXT


def test_resume_with_nothing_there(optimize, tmp_path):
    assert "Nothing to resume" in optimize("--resume")
    assert not (tmp_path / "out").exists()


def test_resume_and_overwrite_exclude_each_other(optimize):
    message = optimize("--resume", "--overwrite")
    assert "--resume" in message
    assert "--overwrite" in message


def test_output_folder_that_cannot_be_made(optimize, tmp_path):
    (tmp_path / "file").write_text(TEXT)
    assert "cannot be written" in optimize(output_dir=tmp_path / "file" / "out")


def test_output_folder_that_is_a_file(optimize, tmp_path):
    (tmp_path / "file").write_text(TEXT)
    assert "is a file" in optimize(output_dir=tmp_path / "file")
    assert (tmp_path / "file").read_text() == TEXT


@pytest.mark.parametrize(
    ("variants", "expected"),
    [
        ("int8", "precision(option=value,…)@runtime"),
        ("int7@litert", "dynamic_range"),
        ("int8@tflite", "litert, onnxruntime"),
        ("int8(speed=1)@litert", "inputs, outputs"),
        ("int8(per_channel=7)@onnxruntime", "True, False"),
        ("int8(per_channel)@onnxruntime", "Not an option"),
        ("int8(per_channel=True,per_channel=False)@onnxruntime", "twice"),
        ("int8(@litert", "Unbalanced"),
        ("nonsense*@litert", "Nothing matches"),
    ],
)
def test_wrong_variant(variants, expected, optimize, tmp_path):
    assert expected in optimize(f"--variants={variants}")
    assert not (tmp_path / "out").exists()


def test_unknown_metric(optimize):
    message = optimize("--metric=top3")
    assert "'top3'" in message
    assert "top1, top5" in message


def test_metric_function_that_does_not_exist(optimize):
    assert "nowhere:score" in optimize("--metric=nowhere:score")


@pytest.mark.parametrize(
    "flag",
    [
        "--max_accuracy_drop=-0.01",
        "--max_accuracy_drop=nan",
        "--max_latency_ms=-1",
        "--max_size_bytes=-1",
        "--max_memory_bytes=-1",
    ],
)
def test_budget_that_makes_no_sense(flag, optimize, tmp_path):
    name = flag.removeprefix("--").partition("=")[0]
    message = optimize(flag)
    assert name in message
    assert "at least 0" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--batch_size=0", "--num_threads=-1", "--num_calibration=0"])
def test_numbers_below_one(flag, optimize):
    assert "at least 1" in optimize(flag)


# The other commands.


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("benchmark", ("--artifacts", "--data", "--output")),
        ("convert", ("--model", "--variant", "--output_dir")),
        ("inspect", ("--model",)),
    ],
)
def test_missing_flags_of_other_commands(name, flags, refused):
    message = refused(name)
    assert all(flag in message for flag in flags)


def test_inspect_of_nothing(refused):
    assert "does not exist" in refused("inspect", "--model=nowhere.keras")


def test_convert_to_a_pattern(refused, model):
    message = refused("convert", f"--model={model}", "--variant=*@litert", "--output_dir=out")
    assert "name one" in message


def test_convert_into_a_folder_that_is_there(refused, model, tmp_path):
    (tmp_path / "out").mkdir()
    message = refused("convert", f"--model={model}", "--variant=int8@litert", "--output_dir=out")
    assert "exists already" in message


def test_convert_under_a_file(refused, model, tmp_path):
    (tmp_path / "file").write_text(TEXT)
    message = refused("convert", f"--model={model}", "--variant=int8@litert", "--output_dir=file/x")
    assert "cannot be written" in message


def write_artifact(folder):
    folder.mkdir()
    features = {"name": "features", "shape": [None, 1], "dtype": "float32"}
    value = {
        "format": 1,
        "variant": "float32@litert",
        "parent": None,
        "source_sha256": "0",
        "signature": {"key": "serving_default", "inputs": [features], "outputs": []},
        "size_bytes": 0,
        "compressed_bytes": 0,
        "versions": {},
        "notes": [],
        "measured_on": None,
    }
    (folder / "artifact.json").write_text(json.dumps(value))


def test_benchmark_of_no_artifact(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    message = refused("benchmark", "--artifacts=empty", "--data=d.npz", "--output=o.json")
    assert "artifact.json" in message


def test_benchmark_of_a_damaged_artifact(refused, tmp_path):
    write_artifact(tmp_path / "a")
    (tmp_path / "a" / "artifact.json").write_text("{}")
    assert "damaged" in refused("benchmark", "--artifacts=a", "--data=d.npz", "--output=o.json")


def test_benchmark_of_one_artifact_twice(refused, tmp_path):
    write_artifact(tmp_path / "a")
    assert "twice" in refused("benchmark", "--artifacts=a,a", "--data=d.npz", "--output=o.json")


def test_benchmark_without_data(refused, tmp_path):
    write_artifact(tmp_path / "a")
    message = refused("benchmark", "--artifacts=a", "--data=nowhere.npz", "--output=o.json")
    assert "nowhere.npz" in message


def test_benchmark_overwrites_nothing(refused, tmp_path):
    (tmp_path / "o.json").write_text(TEXT)
    message = refused("benchmark", "--artifacts=a", "--data=d.npz", "--output=o.json")
    assert "exists already" in message
    assert (tmp_path / "o.json").read_text() == TEXT


def test_benchmark_output_that_cannot_be_written(refused, tmp_path):
    write_artifact(tmp_path / "a")
    (tmp_path / "file").write_text(TEXT)
    np.savez(tmp_path / "d.npz", x=np.zeros((1, 1), np.float32))
    message = refused("benchmark", "--artifacts=a", "--data=d.npz", "--output=file/o.json")
    assert "file" in message


def test_benchmark_with_a_list_that_holds_no_numbers(refused, tmp_path):
    write_artifact(tmp_path / "a")
    np.savez(tmp_path / "d.npz", x=np.zeros((1, 1), np.float32))
    flags = ("--artifacts=a", "--data=d.npz", "--output=o.json", "--concurrency=1,two")
    assert "--concurrency is 1,two; expected whole numbers" in refused("benchmark", *flags)


def test_runtimes(call):
    status, out, err = call("runtimes")
    assert (status, err) == (commands.DONE, "")
    assert "litert: ai-edge-litert" in out
    assert "int8" in out


def test_module_can_be_run():
    result = subprocess.run(
        [sys.executable, "-m", "tfopt", "nope"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == commands.WRONG_INPUT
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("give `resume=True`.", "give --resume."),
        ("give `resume=False`.", "give --noresume."),
        ("`mixed=data` or another `output_dir`.", "--mixed=data or another --output_dir."),
        ("`import_modules=ops` is missing.", "--import_module=ops is missing."),
        ("`tfopt convert` wrote `loss`.", "`tfopt convert` wrote `loss`."),
    ],
)
def test_spelling_of_arguments(message, expected):
    values = flags.FlagValues()
    for name in ("resume", "overwrite"):
        flags.DEFINE_bool(name, False, "", flag_values=values)
    for name in ("mixed", "output_dir", "import_module"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    assert as_flags(message, values) == expected
