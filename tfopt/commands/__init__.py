"""The command line: each command parses flags, calls the library once and prints.

A command is a module of this package with `define_flags(values)` and `run(values) -> int`; the
first line of its docstring is its summary.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from tfopt.commands._flags import as_flags
from tfopt.errors import InputError, ResultError

DONE, NO_RESULT, WRONG_INPUT, REGRESSION, INTERRUPTED = 0, 1, 2, 3, 130


def command_names() -> list[str]:
    """Names of all commands."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit status.

    Status 0: done; 1: the result could not be produced; 2: wrong flags or input; 3: `compare`
    found a regression; 130: interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("--help", "-h", "help", "--helpfull", "--version"):
        if arguments and arguments[0] == "--version":
            from tfopt import __version__

            print(__version__)
        else:
            print(_overview())
        return DONE if arguments else WRONG_INPUT
    name, *rest = arguments
    if name not in command_names():
        return _refuse(f"Unknown command {name!r}; the commands are: {', '.join(command_names())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    values = flags.FlagValues()
    module.define_flags(values)
    if any(item in ("--help", "-h", "--helpfull") for item in rest):
        print(f"{(module.__doc__ or '').strip()}\n\nFlags:{values.get_help()}")
        return DONE
    try:
        positional = values(["tfopt", *rest], known_only=False)[1:]
        if positional and not getattr(module, "TAKES_FILES", False):
            raise flags.Error(f"unexpected argument {positional[0]!r}")
    except flags.Error as error:
        valid = ", ".join(f"--{name}" for name in sorted(values))
        return _refuse(f"tfopt {name}: {str(error).strip().rstrip('.')}; the flags are: {valid}.")
    sys.path.insert(0, "")  # --data, --metric and the like name modules in the current folder
    try:
        return module.run(values, positional) if positional else module.run(values)
    except InputError as error:
        return _refuse(as_flags(str(error), values))
    except ResultError as error:
        print(f"tfopt {name}: {as_flags(str(error), values)}", file=sys.stderr)
        return NO_RESULT
    except KeyboardInterrupt:
        return INTERRUPTED


def _refuse(message: str) -> int:
    print(message, file=sys.stderr)
    return WRONG_INPUT


def _overview() -> str:
    lines = [
        "tfopt: the fastest version of a TensorFlow or Keras model inside an accuracy budget.",
        "",
        "Usage: tfopt COMMAND --flag=value …    (tfopt COMMAND --help lists its flags)",
        "",
    ]
    names = command_names()
    width = max(map(len, names))
    # Summaries are read, not imported: `--help` stays quick.
    for name in names:
        tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").splitlines()[0]
        lines.append(f"  {name.ljust(width)}  {summary}")
    return "\n".join(lines)
