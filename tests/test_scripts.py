"""Every script answers --help when it is started by its path, and every command has a launcher."""

import ast
import importlib.machinery
import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tfopt import commands

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
EXTRAS = {"train_digits.py"}  # scripts that launch no command
LAUNCHERS = sorted(path for path in SCRIPTS.glob("*.py") if path.name not in EXTRAS)
SHELL = [*sorted(SCRIPTS.glob("**/*.sh")), ROOT / ".ci" / "run"]


def relative(path):
    return str(path.relative_to(ROOT))


def command_of(launcher):
    """The command that a launcher names in its call of main."""
    for node in ast.walk(ast.parse(launcher.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "main":
            return node.args[0].elts[0].value
    raise AssertionError(f"{launcher} calls no main")


def all_python_scripts():
    # A module that scripts import and nobody starts has no main block.
    return [
        path
        for path in sorted(SCRIPTS.glob("**/*.py"))
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("script", all_python_scripts(), ids=relative)
def test_script_answers_help(script, tmp_path):
    result = subprocess.run(
        [sys.executable, str(script), "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONSAFEPATH": ""},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "--" in result.stdout
    assert "Traceback" not in result.stderr


def test_every_python_file_is_started_or_imported():
    started = set(all_python_scripts())
    sources = {path: path.read_text(encoding="utf-8") for path in SCRIPTS.glob("**/*.py")}
    for path in sources.keys() - started:
        users = [p for p, text in sources.items() if f"import {path.stem}" in text]
        assert users, f"{relative(path)} has no main block and no script imports it"


def test_extras_are_there():
    assert {path.name for path in SCRIPTS.glob("*.py")} >= EXTRAS


def test_every_command_has_one_launcher():
    assert sorted(map(command_of, LAUNCHERS)) == commands.command_names()


@pytest.mark.parametrize("launcher", LAUNCHERS, ids=relative)
def test_launcher_says_what_its_command_says(launcher):
    by_path = subprocess.run(
        [sys.executable, str(launcher), "--help"], capture_output=True, text=True, check=True
    )
    by_command = subprocess.run(
        [sys.executable, "-m", "tfopt", command_of(launcher), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert by_path.stdout == by_command.stdout


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("**/*.py")), ids=relative)
def test_script_shadows_no_module(script):
    # The folder of a script started by its path comes first on sys.path. This process's own path
    # is no measure: onnxruntime.transformers puts its folder there.
    assert script.stem not in sys.stdlib_module_names
    found = importlib.machinery.PathFinder.find_spec(script.stem, site.getsitepackages())
    assert found is None, f"{relative(script)} hides {found.origin}"


@pytest.mark.parametrize("script", SHELL, ids=relative)
def test_shell_script_parses(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", [path for path in SHELL if path.name != "venv.sh"], ids=relative)
def test_shell_script_can_be_started(script):
    assert os.access(script, os.X_OK)
    lines = script.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines


def test_missing_python_is_one_sentence():
    result = subprocess.run(
        ["bash", "-c", "set -euo pipefail; source scripts/venv.sh; find_python 2.7"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": ""},
        check=False,
    )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("No Python of these versions is here: 2.7;")
