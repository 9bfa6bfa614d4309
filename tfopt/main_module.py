"""Classes and functions of the user's script or notebook, for worker processes.

A worker cannot import them: `__main__` is another module there, and running the script again
would do all of its work again. Their code is sent instead, pickled by value (cloudpickle), each
by itself, so that one that cannot be sent does no harm to the others. Nothing is unpickled before
it is asked for.
"""

from __future__ import annotations

import inspect
import io
import pickle
import sys
import types
from collections.abc import Mapping
from typing import Any

MAX_BYTES = 4 << 20  # of one definition with all that it refers to
MAX_TOTAL_BYTES = 32 << 20

NAME = "__main__"

_unsent: dict[str, str] = {}  # in a worker: why a definition did not come
_shared: dict[str, Any] = {}  # by `share`


class _TooLargeError(Exception):
    pass


class _Limited(io.BytesIO):
    def write(self, content: Any, /) -> int:
        if self.tell() + len(content) > MAX_BYTES:
            raise _TooLargeError
        return super().write(content)


def share(name: str, value: Any) -> str:
    """Sends an object to workers that start from now on, as if `__main__` defined it.

    Args:
      name: what to call it.
      value: a function or another object, such as a lambda, that has no name of its own there.

    Returns:
      The name that `find` knows it by: with a number where another object has the name.
    """
    known, number = name, 1
    while known in (found := _own()) and found[known] is not value:
        number += 1
        known = f"{name}_{number}"
    if known not in found:
        _shared[known] = value
    return known


def find(name: str) -> Any:
    """An object of `__main__`, or of the process that started this worker.

    Raises:
      AttributeError: when there is none of this name.
    """
    if name in _shared:
        return _shared[name]
    module: Any = sys.modules[NAME]
    if isinstance(module, _Received):
        return getattr(module, name)
    for part in name.split("."):
        module = getattr(module, part)
    return module


def definitions(text: str | None = None) -> dict[str, Any]:
    """Classes and functions of `__main__`, by name and by the names that Keras registered.

    Args:
      text: in which a name must occur; None takes all.
    """
    module = sys.modules.get(NAME)
    names = module.names() if isinstance(module, _Received) else (own := _own()).keys()
    wanted = [name for name in names if text is None or name.rpartition(">")[2] in text]
    if isinstance(module, _Received):
        received = {name: getattr(module, name, None) for name in wanted}
        return {name: value for name, value in received.items() if value is not None}
    return {name: own[name] for name in wanted}


def pack() -> tuple[dict[str, bytes], dict[str, str]]:
    """Definitions of `__main__` for `install`, and why some of them are missing, by name."""
    if not (found := definitions()):
        return {}, {}
    import cloudpickle

    from tfopt.train.layers import is_model

    class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
        def persistent_id(self, value: Any) -> None:
            if is_model(value):
                raise TypeError(f"it refers to the model {value.name!r}")

    packed: dict[str, bytes] = {}
    missing: dict[str, str] = {}
    total = 0
    for name, value in found.items():
        content = _Limited()
        try:
            Pickler(content, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
        except _TooLargeError:
            missing[name] = f"it refers to more than {MAX_BYTES >> 20} MiB of data"
            continue
        except Exception as error:  # whatever the objects that it refers to raise
            missing[name] = str(error).partition("\n")[0][:200] or type(error).__name__
            continue
        total += content.tell()
        if total > MAX_TOTAL_BYTES:
            missing[name] = "the script's definitions are too large together"
            continue
        packed[name] = content.getvalue()
    return packed, missing


def install(packed: Mapping[str, bytes], missing: Mapping[str, str]) -> None:
    """Makes the definitions of another process those of `__main__` here."""
    _unsent.clear()
    _unsent.update(missing)
    sys.modules[NAME] = _Received(packed)


def note_on_missing(text: str) -> str:
    """Why a definition that a message is about did not reach this process, in a sentence."""
    for name, why in _unsent.items():
        if name.rpartition(">")[2] in text:
            return f" {name} of the script could not be sent to this process: {why}."
    return ""


class _Received(types.ModuleType):
    """`__main__` of another process; definitions are unpickled when they are first used."""

    def __init__(self, packed: Mapping[str, bytes]):
        super().__init__(NAME)
        self._packed = dict(packed)

    def __getattr__(self, name: str) -> Any:
        packed = vars(self).get("_packed", {})
        if name not in packed:
            raise AttributeError(f"module {NAME!r} has no attribute {name!r}")
        content = packed.pop(name)
        try:
            value = pickle.loads(content)
        except Exception as error:
            _unsent[name] = str(error).partition("\n")[0][:200] or type(error).__name__
            raise AttributeError(f"{name} of the script cannot be used here: {error}") from error
        setattr(self, name, value)
        return value

    def names(self) -> list[str]:
        """Of all definitions, unpickled or not."""
        unpickled = [
            name
            for name, value in vars(self).items()
            if inspect.isclass(value) or inspect.isfunction(value)
        ]
        return [*unpickled, *self._packed]


def _own() -> dict[str, Any]:
    module = sys.modules.get(NAME)
    found = {
        name: value
        for name, value in list(vars(module).items() if module else ())
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == NAME
    }
    for framework in ("keras", "tf_keras"):
        if framework not in sys.modules:
            continue
        registered = sys.modules[framework].utils.get_custom_objects()
        found |= {
            name: value
            for name, value in registered.items()
            if getattr(value, "__module__", None) == NAME
        }
    return found | _shared
