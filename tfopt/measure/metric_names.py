"""Metrics by name: text that parses back, functions, Keras metrics, one for each output.

`top1`, `mean_iou(ignore=255)`, `keras:MeanIoU(num_classes=21)`, `sklearn:f1_score(average=macro)`,
`package.module:function`, and `classes=top1,boxes=mae` for a model with several outputs.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from tfopt import main_module
from tfopt.errors import InputError
from tfopt.measure.metrics import METRICS, Metric

FORMS = "keras:NAME(option=value), sklearn:NAME(option=value) or package.module:function"

_KEYWORDS = {"True", "False", "None"}
_IS_VALID: dict[str, tuple[Callable[[Any], bool], str]] = {
    "threshold": (lambda v: isinstance(v, (int, float)), "a number"),
    "ignore": (lambda v: isinstance(v, int), "a class number"),
    "num_classes": (lambda v: isinstance(v, int) and v > 1, "a whole number of at least 2"),
    "quantiles": (
        lambda v: isinstance(v, (list, tuple)) and bool(v) and all(0 < q < 1 for q in v),
        "numbers between 0 and 1, such as [0.1,0.5,0.9]",
    ),
}


def find_metric(name: str) -> Metric:
    """A metric by its name.

    A function gets the outputs (an array, or a dict when the model has several) and the labels; it
    returns one number an example, or one number for the whole set. Its attribute
    `higher_is_better` (default True) gives the direction.

    Raises:
      InputError: when there is none; lists the valid names.
    """
    head, options = parse(name)
    if head in METRICS:
        return _with_options(METRICS[head], options)
    module, colon, function = head.partition(":")
    if not colon:
        raise InputError(
            f"Unknown metric {head!r}; the metrics are {', '.join(METRICS)}, or {FORMS}."
        )
    if module in ("keras", "sklearn"):
        from tfopt.measure import library_metrics

        return library_metrics.find(module, function, options)
    if options:
        raise InputError(f"`metric={name}`: functions of your own take no options.")
    try:
        is_script = module == main_module.NAME
        found = main_module.find(function) if is_script else _find(module, function)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"`metric={name}` cannot be found ({error}); it must be importable from here."
            f"{main_module.note_on_missing(function)}"
        ) from error
    if not callable(found):
        kind = type(found).__name__
        raise InputError(f"`metric={name}` is a {kind}; expected a function of outputs and labels.")
    return _own(name, found)


def name_of(given: Any) -> str | None:
    """The name of what `metric=` got: text, a function, a Keras metric, or a dict by output.

    Functions that other processes cannot import, such as those of the script itself and lambdas,
    are sent to them as parts of `__main__`; see `tfopt.main_module`.

    Raises:
      InputError: for anything else, and for unknown names.
    """
    if given is None:
        return None
    if isinstance(given, str):
        for name in split(given).values():
            if name.startswith("keras:"):
                parse(name)  # Keras is left to the processes that have it anyway
            elif name.startswith(f"{main_module.NAME}:"):
                name_of(find_metric(name).score)
            else:
                find_metric(name)
        return given
    if isinstance(given, Mapping):
        if not given:
            raise InputError("metric is an empty dict; expected a metric for each output.")
        return ",".join(f"{output}={name_of(value)}" for output, value in given.items())
    if hasattr(given, "update_state") and hasattr(given, "result"):
        from tfopt.measure import library_metrics

        return library_metrics.name_of(given)
    if not callable(given) or isinstance(given, type):
        raise InputError(
            f"metric is {given!r}; expected a name ({', '.join(METRICS)}, {FORMS}), a function of "
            "outputs and labels, a Keras metric, or a dict with one of these for each output."
        )
    module = getattr(given, "__module__", None) or type(given).__module__
    function = getattr(given, "__qualname__", None) or type(given).__qualname__
    library = module.partition(".")[0]
    if library == "sklearn":  # takes labels first; its name shows which way is better
        return name_of(f"sklearn:{function}")
    if library in ("keras", "tf_keras"):
        raise InputError(
            f"metric is Keras's {function}, which takes labels first and may be an error; give the "
            "metric by name, such as keras:MeanSquaredError, or a function of outputs and labels."
        )
    if module != main_module.NAME and _is_importable(module, function, given):
        return f"{module}:{function}"
    return f"{main_module.NAME}:{main_module.share(function, given)}"


def check(name: str) -> None:
    """Raises what `find_metric` does; for processes that have Keras."""
    find_metric(name)


def is_function(name: str) -> bool:
    """Whether a name is that of a function of the user's own."""
    return ":" in name and not name.startswith(("keras:", "sklearn:"))


def fingerprint(name: str | None) -> str | None:
    """Changes when the code of a function of the user's own does; None for other metrics."""
    own = [] if name is None else [part for part in split(name).values() if is_function(part)]
    if not own:
        return None
    codes = [_code(find_metric(part).score) for part in own]
    return hashlib.sha256(repr(codes).encode()).hexdigest()[:16]


def split(text: str) -> dict[str | None, str]:
    """`cls=top1,box=mae` by output; a single name for every output has the key None.

    Raises:
      InputError: when an output is named twice or has no metric.
    """
    parts = _split_outside(text, ",")
    pairs = [_split_outside(part, "=") for part in parts]
    if all(len(pair) == 1 for pair in pairs) and len(pairs) == 1:
        return {None: text.strip()}
    found: dict[str | None, str] = {}
    for part, pair in zip(parts, pairs, strict=True):
        if len(pair) != 2 or not all(pair):
            raise InputError(
                f"`metric={text}`: {part!r} is no output=metric; expected one metric, or one for "
                "each output, such as classes=top1,boxes=mae."
            )
        if pair[0] in found:
            raise InputError(f"`metric={text}` names the output {pair[0]!r} twice; name it once.")
        found[pair[0]] = pair[1]
    return found


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """`name(option=value,…)` to the name and its options; values are literals or bare words.

    Raises:
      InputError: for another form.
    """
    name, parenthesis, rest = text.strip().partition("(")
    if not parenthesis:
        return name, {}
    message = (
        f"`metric={text}`: expected name(option=value,…), such as sklearn:f1_score(average=macro)."
    )
    try:
        call = ast.parse(f"_({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or not isinstance(call.func, ast.Name):
            raise InputError(message)
        options = {}
        for item in call.keywords:
            if item.arg is None:
                raise InputError(message)
            value = item.value
            options[item.arg] = value.id if isinstance(value, ast.Name) else ast.literal_eval(value)
    except (SyntaxError, ValueError) as error:
        raise InputError(message) from error
    return name, options


def spell(name: str, options: Mapping[str, Any]) -> str:
    """The text that `parse` reads back; options are sorted."""

    def plain(given: Any) -> Any:
        return given.tolist() if hasattr(given, "tolist") else given  # of NumPy

    def value(given: Any) -> str:
        given = plain(given)
        if isinstance(given, str) and given.isidentifier() and given not in _KEYWORDS:
            return given
        if isinstance(given, (list, tuple)):
            return f"[{','.join(repr(plain(item)) for item in given)}]"
        return repr(given)

    inside = ",".join(f"{key}={value(options[key])}" for key in sorted(options))
    return f"{name}({inside})" if options else name


def _with_options(found: Metric, options: dict[str, Any]) -> Metric:
    parameters = list(inspect.signature(found.score).parameters.values())[2:]
    valid = [parameter.name for parameter in parameters]
    for name, value in options.items():
        if name not in valid:
            takes = f"its options are {', '.join(valid)}" if valid else "it has no options"
            raise InputError(f"Metric {found.name} has no option {name!r}; {takes}.")
        is_valid, what = _IS_VALID[name]
        if isinstance(value, bool) or not is_valid(value):
            raise InputError(f"Metric {found.name}: {name} is {value!r}; expected {what}.")
    needed = [p.name for p in parameters if p.default is p.empty and p.name not in options]
    if needed:
        what = _IS_VALID[needed[0]][1]
        raise InputError(
            f"Metric {found.name} needs {needed[0]}: {what}; write {found.name}({needed[0]}=…)."
        )
    if not options:
        return found
    bound: dict[str, Any] = {
        field: functools.partial(getattr(found, field), **options)
        for field in ("score", "recall")
        if getattr(found, field) is not None
    }
    return dataclasses.replace(found, name=spell(found.name, options), **bound)


def _own(name: str, function: Callable[..., Any]) -> Metric:
    is_higher = bool(getattr(function, "higher_is_better", True))
    return Metric(name, function, is_higher, "custom", is_unbounded=not is_higher)


def _find(module: str, function: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in function.split("."):
        found = getattr(found, part)
    return found


def _is_importable(module: str, function: str, given: Any) -> bool:
    if getattr(sys.modules.get(module), "__file__", None) is None:
        return False
    try:
        return _find(module, function) is given
    except AttributeError:
        return False


def _code(function: Any) -> Any:
    """What a function does, as far as Python tells: its code, constants and defaults."""
    if isinstance(function, functools.partial):
        return _code(function.func), repr(function.args), repr(sorted(function.keywords.items()))
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    if code is None:
        return type(function).__qualname__

    def describe(part: Any) -> Any:
        constants = [describe(c) if hasattr(c, "co_code") else repr(c) for c in part.co_consts]
        return part.co_code, part.co_names, constants

    return describe(code), repr(getattr(function, "__defaults__", None))


def _split_outside(text: str, separator: str) -> list[str]:
    """Splits outside brackets and quotes."""
    parts, depth, start, quote, is_escaped = [], 0, 0, "", False
    for index, character in enumerate(text):
        if quote:
            if character == quote and not is_escaped:
                quote = ""
            is_escaped = character == "\\" and not is_escaped
        elif character in "\"'":
            quote = character
        elif character == separator and depth == 0:
            parts.append(text[start:index].strip())
            start = index + 1
        else:
            depth += (character in "([{") - (character in ")]}")
    return [*parts, text[start:].strip()]
