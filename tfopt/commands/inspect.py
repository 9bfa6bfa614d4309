"""Say what is in a model: signatures, size, layers, ops, dtypes, parameters, duplicated weights."""

from __future__ import annotations

from absl import flags

from tfopt.commands import _flags


def define_flags(values: flags.FlagValues) -> None:
    """Declares the flags."""
    _flags.define_model(values)


def run(values: flags.FlagValues) -> int:
    """Runs the command."""
    _flags.require(values, "model")
    from tfopt.inspection import inspect

    print(inspect(values.model, **_flags.source_options(values)))
    return 0
