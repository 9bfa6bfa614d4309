"""Flags that several commands share."""

from __future__ import annotations

import re
from typing import Any

from absl import flags

from tfopt.errors import InputError

_ARGUMENT = re.compile(r"`(\w+)(?:=([^`]+))?`")


def as_flags(message: str, values: flags.FlagValues) -> str:
    """Spells the arguments in a message of the library as flags.

    The library writes `name` or `name=value` in backquotes, which becomes `--name`,
    `--name=value`, or `--noname` for False. Names that are no flags stay as they are.
    """

    def spell(found: re.Match[str]) -> str:
        name, value = found.groups()
        name = next((flag for flag in (name, name.removesuffix("s")) if flag in values), None)
        if name is None:
            return found[0]
        if value in ("True", "False"):
            return f"--{'' if value == 'True' else 'no'}{name}"
        return f"--{name}" if value is None else f"--{name}={value}"

    return _ARGUMENT.sub(spell, message)


def define_model(values: flags.FlagValues) -> None:
    """The model that comes in."""
    flags.DEFINE_string(
        "model", None, "SavedModel folder, .keras, .h5, .tflite or .onnx.", flag_values=values
    )
    flags.DEFINE_string(
        "signature", "serving_default", "Signature of the SavedModel.", flag_values=values
    )
    flags.DEFINE_string(
        "custom_objects",
        None,
        "package.module with the Keras layers and functions that the file needs.",
        flag_values=values,
    )
    define_trust(values)
    flags.DEFINE_list(
        "import_module", [], "Modules that register TensorFlow custom ops.", flag_values=values
    )


def define_trust(values: flags.FlagValues) -> None:
    """Whether Keras files may run code."""
    flags.DEFINE_bool(
        "trust_model",
        False,
        "Run Python code that is stored in Keras files, as of Lambda layers.",
        flag_values=values,
    )


def define_data(values: flags.FlagValues) -> None:
    """The examples."""
    flags.DEFINE_string(
        "data",
        None,
        "FILE.npz with arrays named as the model's inputs (or x) and labels y, each optionally as "
        "…_train and …_test; or package.module:function that returns a data set.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "num_calibration", 256, "Examples to calibrate quantizers with.", flag_values=values
    )


def define_measurement(values: flags.FlagValues) -> None:
    """How to time."""
    flags.DEFINE_integer("batch_size", 1, "Examples in each timed run.", flag_values=values)
    flags.DEFINE_integer(
        "num_threads", None, "Threads of every runtime; default: all cores.", flag_values=values
    )
    flags.DEFINE_float(
        "max_timing_s",
        4.0,
        "Seconds after which a timing ends, however wide its interval.",
        flag_values=values,
    )
    flags.DEFINE_float(
        "interval_width",
        0.02,
        "Width of a speed-up's 95 % interval, as a share of it, at which a timing ends.",
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 0, "Of the split and of the order of runs.", flag_values=values)


def define_limits(values: flags.FlagValues) -> None:
    """What one conversion or measurement may use."""
    flags.DEFINE_float(
        "step_timeout_s",
        1800.0,
        "Seconds after which a conversion or measurement is stopped and counts as failed.",
        flag_values=values,
    )
    flags.DEFINE_integer(
        "memory_limit_bytes",
        None,
        "Memory that a conversion or measurement may hold; default: 80 % of the machine's.",
        flag_values=values,
    )


def define_shapes(values: flags.FlagValues) -> None:
    """The shapes of TensorRT engines."""
    for end, what in (("min", "Smallest"), ("opt", "Best"), ("max", "Largest")):
        flags.DEFINE_string(
            f"{end}_shapes",
            None,
            f"{what} shapes of TensorRT engines, such as image:1x224x224x3; default: of the data.",
            flag_values=values,
        )


def define_engine(values: flags.FlagValues) -> None:
    """What belongs to TensorRT engines besides the variant's options."""
    define_shapes(values)
    flags.DEFINE_list(
        "float32_layers",
        [],
        "Layers that TensorRT keeps in float32, by name or pattern, such as '*/Softmax'.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "engine_cache",
        None,
        "Folder that keeps TensorRT engines and kernel timings; default: ~/.cache/tfopt/tensorrt.",
        flag_values=values,
    )


def require(values: flags.FlagValues, *names: str) -> None:
    """Checks that flags were given.

    Raises:
      InputError: names the ones that are missing.
    """
    missing = [f"--{name}" for name in names if values[name].value in (None, [])]
    if missing:
        raise InputError(f"Missing {', '.join(missing)}; tfopt COMMAND --help says what it takes.")


def numbers(values: flags.FlagValues, name: str, kind: type[int] | type[float]) -> tuple[Any, ...]:
    """The numbers of a list flag.

    Raises:
      InputError: when one is none.
    """
    texts = values[name].value or []
    try:
        return tuple(kind(text) for text in texts)
    except ValueError as error:
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(
            f"--{name} is {','.join(texts)}; expected {what}, such as 1,2,4."
        ) from error


def source_options(values: flags.FlagValues) -> dict[str, Any]:
    """Keyword arguments of library functions that load a model."""
    return {
        "signature": values.signature,
        "custom_objects": values.custom_objects,
        "trust_model": values.trust_model,
        "import_modules": tuple(values.import_module),
    }


def engine(values: flags.FlagValues) -> Any:
    """The options that `define_engine` or `define_shapes` declares; None when nothing was said.

    Raises:
      InputError: when some of the three shapes are missing, or one is malformed.
    """
    from pathlib import Path

    from tfopt.trt.profiles import Profile
    from tfopt.trt.spec import EngineOptions

    names = ("min_shapes", "opt_shapes", "max_shapes")
    given = [values[name].value or "" for name in names]
    if any(given) and not all(given):
        missing = ", ".join(f"--{n}" for n, text in zip(names, given, strict=True) if not text)
        raise InputError(f"Missing {missing}; the three shapes come together.")
    profile = Profile.parse(*given) if all(given) else None
    layers, cache = (
        values[name].value if name in values else None
        for name in ("float32_layers", "engine_cache")
    )
    if profile is None and not layers and cache is None:
        return None
    return EngineOptions(profile, tuple(layers or ()), None if cache is None else Path(cache))


def limits(values: flags.FlagValues) -> Any:
    """The limits that `define_limits` declares."""
    from tfopt.isolation import Limits

    return Limits(values.step_timeout_s, values.memory_limit_bytes)
