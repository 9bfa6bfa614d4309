"""Commands called as the shell calls them, in this process."""

import sys

import pytest

from tfopt import commands


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Returns a function that runs a command in an empty folder: status, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def run(*arguments):
        status = commands.main(list(map(str, arguments)))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def refused(call):
    """Returns a function that runs a command, checks that it was refused, gives the message."""

    def run(*arguments):
        status, out, err = call(*arguments)
        assert status == commands.WRONG_INPUT, err
        assert out == ""
        assert len(err.strip().splitlines()) == 1, err
        assert err.strip().endswith(".")
        return err

    return run
