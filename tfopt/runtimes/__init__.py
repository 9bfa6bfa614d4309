"""The registry of runtimes: every module in this package that defines `RUNTIME`."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Iterable
from typing import TYPE_CHECKING

from tfopt.errors import InputError
from tfopt.variant import Variant

if TYPE_CHECKING:
    from tfopt.artifact import Artifact
    from tfopt.runtimes.base import Precision, Runtime, Session


@functools.cache
def names() -> tuple[str, ...]:
    """Names of all runtimes, installed or not."""
    return tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


@functools.cache
def get(name: str) -> Runtime:
    """The runtime of that name.

    Raises:
      InputError: when there is none; lists the valid names.
    """
    if name not in names():
        raise InputError(f"Unknown runtime {name!r}; the runtimes are: {', '.join(names())}.")
    return importlib.import_module(f"{__name__}.{name}").RUNTIME


def all_runtimes() -> list[Runtime]:
    """All runtimes, installed or not."""
    return [get(name) for name in names()]


def precision_of(variant: Variant) -> Precision:
    """The declaration behind a variant."""
    return get(variant.runtime).precision_of(variant)


def tried_variants() -> list[Variant]:
    """Every variant that a search considers by itself, on all runtimes."""
    return [
        Variant(precision.name, runtime.name, tuple(options.items()))
        for runtime in all_runtimes()
        for precision in runtime.precisions.values()
        for options in precision.tried
    ]


def expand(texts: Iterable[str]) -> list[Variant]:
    """Turns variants and patterns into variants, in order and without repeats.

    Args:
      texts: for example `int8@litert`, `int8(per_channel=False)@onnxruntime`, `*@litert`, `int8@*`.

    Raises:
      InputError: when one is malformed, unknown, or a pattern that matches nothing.
    """
    found: dict[Variant, None] = {}
    for text in texts:
        if "*" not in text:
            variant = Variant.parse(text)
            if variant.student:
                raise InputError(
                    f"{variant} is of a student, which a search distils itself; name students "
                    "with `distill`, and variants without."
                )
            found[get(variant.runtime).canonical(variant)] = None
            continue
        precision, at, runtime = text.partition("@")
        matches = [
            variant
            for variant in tried_variants()
            if fnmatch.fnmatchcase(variant.precision, precision)
            and fnmatch.fnmatchcase(variant.runtime, runtime if at else "*")
        ]
        if not matches:
            precisions = sorted({v.precision for v in tried_variants()})
            raise InputError(
                f"Nothing matches {text!r}; precisions are {', '.join(precisions)} and runtimes "
                f"are {', '.join(names())}."
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def load(artifact: Artifact, num_threads: int | None = None) -> Session:
    """Opens an artifact with its runtime.

    Raises:
      InputError: when the runtime is not installed (says what to install), or this processor
        would compute something else.
    """
    from tfopt.measure import environment

    runtime = get(artifact.variant.runtime)
    if reason := runtime.missing():
        raise InputError(f"{artifact.folder} needs {runtime.name}: {reason}")
    if "vnni" in artifact.needs and not environment.has_vnni():
        raise InputError(
            f"{artifact.folder} was converted for processors with VNNI or AMX, and this one has "
            "neither: its 8-bit weights would saturate here; convert the model on this machine."
        )
    return runtime.load(artifact, num_threads)
