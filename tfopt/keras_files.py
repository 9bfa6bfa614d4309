"""Keras files: loading them with either Keras, or saying in one sentence why that is impossible."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfopt import main_module
from tfopt.errors import MAX_REASON, InputError, first_line

_CONFIG_DUMP = re.compile(r"\s*(Full object config:|config=\{|using config=|\n\nconfig=).*", re.S)
_CLASS = re.compile(
    r"<class '[\w.<>]*?(\w+)'> could not be deserialized|Error when deserializing class '(\w+)'"
    r"|Could not locate (?:class|function) '([\w>]+)'|Unknown (?:layer|object|\w+): '?(\w+)'?"
)


def load_keras_file(
    path: Path,
    custom_objects: str | None = None,
    *,
    compile: bool = True,
    trust_model: bool = False,
    frameworks: Sequence[str] = ("keras", "tf_keras"),
    example: Any = None,
) -> Any:
    """Loads a .keras or .h5 file with Keras 3, or with tf_keras where only that can.

    Classes and functions that the file needs are looked for in `custom_objects` and in the script
    or notebook itself (`__main__`).

    Args:
      path: of the file.
      custom_objects: `package.module` with the classes and functions that it needs.
      compile: whether the model is to be compiled if it was when it was saved.
      trust_model: whether Python code that is stored in the file, as of Lambda layers, may run.
      frameworks: to try, in order.
      example: inputs of a few examples; layers that cannot be built without are built on them.

    Raises:
      InputError: when none of them can load it.
    """
    config, version = _read_config(path)
    if config is None and _holds_weights_only(path):
        raise InputError(
            f"{path} holds weights without their model; load them into it (model.load_weights), "
            "and give that model, or save the whole with model.save."
        )
    if not trust_model and (name := _find_code(config)) is not None:
        raise InputError(
            f"{path} holds Python code in layer {name!r} (a Lambda), which runs when the model is "
            "loaded; if you trust the file, load it with `trust_model=True`."
        )
    objects = _objects(custom_objects, None if trust_model else json.dumps(config))
    failures: dict[str, str] = {}
    for framework in frameworks:
        try:
            keras = importlib.import_module(framework)
            with _names_for_lambdas(keras, objects) if trust_model else contextlib.nullcontext():
                return _load(keras, path, config, objects, compile, trust_model, example)
        except Exception as error:
            failures[framework] = reason(error)
    written_by = {"3": "keras", "2": "tf_keras"}.get(version.partition(".")[0])
    told = {written_by: failures[written_by]} if written_by in failures else failures
    causes = "; ".join(f"{name}: {text}" for name, text in told.items())
    raise InputError(
        f"{path} cannot be loaded ({causes}); custom layers come from "
        f"`custom_objects=package.module`.{main_module.note_on_missing(causes)}"
    )


def reason(error: BaseException) -> str:
    """Why Keras could not load a file: the class and the innermost cause, without configurations.

    Keras wraps an error once for each layer around it, each time with the whole configuration.
    """
    text = str(error)
    classes = [next(filter(None, match.groups())) for match in _CLASS.finditer(text)]
    cause = _CONFIG_DUMP.sub("", text.split("Exception encountered:")[-1].strip())
    line = first_line(Exception(cause)) if cause else type(error).__name__
    line = re.sub(r"\.? (Make sure|Please ensure|If they are already).*", "", line)
    if classes and classes[-1] not in line:
        line = f"class {classes[-1]}: {line}"
    return line if len(line) <= MAX_REASON else f"{line[: MAX_REASON - 1]}…"


def _load(
    keras: Any,
    path: Path,
    config: Any,
    objects: Mapping[str, Any],
    compile: bool,
    trust_model: bool,
    example: Any,
) -> Any:
    try:
        return keras.models.load_model(
            path, custom_objects=objects, compile=compile, safe_mode=not trust_model
        )
    except ValueError as error:
        is_unbuilt = "never built" in str(error) or "could not be loaded" in str(error)
        if example is None or not is_unbuilt or path.suffix.lower() != ".keras":
            raise
        from tfopt import live

        # Layers without known shapes: their weights are read once they are called.
        model = keras.saving.deserialize_keras_object(
            {key: value for key, value in config.items() if key != "compile_config"},
            custom_objects=objects,
            safe_mode=not trust_model,
        )
        live.call_once(model, example)
        model.load_weights(path)
        return model


def _objects(custom_objects: str | None, config: str | None) -> dict[str, Any]:
    """Classes and functions by the names under which Keras may ask for them.

    Args:
      custom_objects: module that holds some of them.
      config: in which those of the script must be mentioned; None takes all.
    """
    found = main_module.definitions(config)
    if custom_objects:
        module = import_module(custom_objects, "custom_objects")
        found |= {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        }
    return found


def import_module(module: str, argument: str) -> Any:
    """Imports a module that an argument names.

    Raises:
      InputError: when it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever the user's module raises
        raise InputError(
            f"`{argument}={module}` cannot be imported ({first_line(error)}); run in the folder "
            "that holds it, or put that on PYTHONPATH."
        ) from error


@contextlib.contextmanager
def _names_for_lambdas(keras: Any, objects: Mapping[str, Any]) -> Iterator[None]:
    """Gives lambdas of Keras 3 files the names that they usually refer to.

    Keras 3 stores a lambda without its module and gives it the names of a module of Keras.
    """
    import numpy
    import tensorflow

    if keras.__name__ == "keras":
        from keras.src.utils import python_utils

        # For good, since lambdas look their names up when they are called.
        usual = {"tf": tensorflow, "keras": keras, "np": numpy, "K": keras.backend}
        for name, value in {**usual, **objects}.items():
            vars(python_utils).setdefault(name, value)
    yield


def _read_config(path: Path) -> tuple[Any, str]:
    """The configuration in a file and the version of the Keras that wrote it, as far as known."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                metadata = json.loads(archive.read("metadata.json"))
                return json.loads(archive.read("config.json")), metadata.get("keras_version", "")
        import h5py

        with h5py.File(path) as file:
            text, version = file.attrs.get("model_config"), file.attrs.get("keras_version", "")
            return None if text is None else json.loads(text), str(version)
    except Exception:  # the frameworks say what is wrong with it
        return None, ""


def _holds_weights_only(path: Path) -> bool:
    """Whether a file was written by `save_weights`."""
    import h5py

    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path) as file:
        return "model_config" not in file.attrs and bool(len(file))


def _find_code(config: Any, layer: str = "?") -> str | None:
    """The name of a layer whose configuration holds compiled Python code, or None."""
    if isinstance(config, Mapping):
        inner = config.get("config")
        if isinstance(inner, Mapping) and "name" in inner:
            layer = str(inner["name"])
        is_code = config.get("class_name") == "__lambda__" or "lambda" in (
            config.get("function_type"), config.get("output_shape_type")
        )  # fmt: skip
        if is_code:
            return layer
        config = list(config.values())
    if isinstance(config, list):
        return next(filter(None, (_find_code(item, layer) for item in config)), None)
    return None
