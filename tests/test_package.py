"""What importing tfopt costs and what it promises."""

import importlib.metadata
import inspect
import subprocess
import sys

import pytest

import tfopt

HEAVY = ("tensorflow", "pandas", "numpy", "keras", "onnx", "onnxruntime", "openvino")


def loaded_modules(code):
    """The heavy modules that are loaded after `code`, in a fresh interpreter."""
    code += "\nimport sys\nprint('loaded:', *sorted(set(sys.modules) & set(sys.argv[1:])))"
    result = subprocess.run(
        [sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True
    )
    return result.stdout.splitlines()[-1].removeprefix("loaded:").split()


def test_import_is_light():
    assert loaded_modules("import tfopt") == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["optimize", "--help"], ["nonsense"]]
)
def test_command_line_is_light(arguments):
    assert loaded_modules(f"from tfopt.commands import main\nmain({arguments})") == []


def test_errors_are_light():
    assert loaded_modules("from tfopt import InputError, ResultError, ConversionError") == []


def test_version_is_the_distribution_s():
    assert tfopt.__version__ == importlib.metadata.version("tfopt")


@pytest.mark.parametrize("name", tfopt.__all__)
def test_public_names_resolve_and_are_documented(name):
    value = getattr(tfopt, name)
    assert inspect.getdoc(value)
    assert name in dir(tfopt)
    if not inspect.isclass(value):
        return
    for key, member in vars(value).items():
        is_own = inspect.isfunction(member) or isinstance(member, property | classmethod)
        if not key.startswith("_") and is_own:
            assert inspect.getdoc(getattr(value, key)), f"{name}.{key} has no docstring"


def test_public_names_are_sorted_and_all_there():
    assert tfopt.__all__ == sorted(tfopt.__all__)
    assert set(tfopt.__all__) == set(tfopt._HOMES)


def test_unknown_name():
    with pytest.raises(AttributeError, match="nonsense"):
        _ = tfopt.nonsense
