"""The three ways in which tfopt says no."""

from __future__ import annotations


class InputError(ValueError):
    """A flag, model or data set is wrong; commands end with status 2.

    The message is one sentence: what came, what was expected, how to fix it.
    """


class ConversionError(RuntimeError):
    """A runtime cannot take this model; the variant becomes a row with this reason."""


class ResultError(RuntimeError):
    """The result that was asked for could not be produced; commands end with status 1."""
