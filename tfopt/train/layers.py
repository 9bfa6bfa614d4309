"""Layers of Keras 3 and tf_keras models by path, and which of them a pattern means.

A path is made of names, from the outermost layer inside the model inwards: `block3/conv1`. The
model's own name is no part of it. A layer that is in several places has the first one's path.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tfopt.errors import InputError

POLICIES = ("float32", "mixed_bfloat16", "mixed_float16")

Layer = Any  # of either framework, whose types are not known before one is imported
Pattern = str | type


def framework_of(model: object) -> Any:
    """The package, `keras` or `tf_keras`, that a model is of.

    Raises:
      InputError: when it is of neither.
    """
    for name in ("keras", "tf_keras"):
        if is_model_of(model, name):
            return importlib.import_module(name)
    raise InputError(
        f"{type(model).__name__} is no Keras model; expected a model of Keras 3 or tf_keras, as "
        "keras.models.load_model returns it."
    )


def check_built(model: Layer) -> None:
    """Checks that a model has its variables.

    Raises:
      InputError: when it does not.
    """
    if not model.built:
        raise InputError(
            f"Model {model.name!r} is not built: its input shapes are unknown; call it on data "
            "once, or build it inside `with tfopt.precision(…)`."
        )


@dataclasses.dataclass(frozen=True)
class Place:
    """A layer and where it is; `parent` is None for a root that is no model."""

    path: str
    layer: Layer
    parent: Layer | None


def walk(*roots: Layer) -> Iterator[Place]:
    """Yields everything inside the roots, outer layers first, each layer once.

    A root that is no model is yielded, too, under its name.
    """
    seen: set[int] = set()
    for root in roots:
        if is_model(root):
            yield from _inside(root, "", seen)
        elif id(root) not in seen:
            seen.add(id(root))
            yield Place(root.name, root, None)
            yield from _inside(root, f"{root.name}/", seen)


def _inside(parent: Layer, prefix: str, seen: set[int]) -> Iterator[Place]:
    for layer in children(parent):
        if id(layer) not in seen:
            seen.add(id(layer))
            yield Place(f"{prefix}{layer.name}", layer, parent)
            yield from _inside(layer, f"{prefix}{layer.name}/", seen)


def is_model(value: object) -> bool:
    """Whether something is a model of either framework, without importing one."""
    return is_model_of(value, "keras") or is_model_of(value, "tf_keras")


def is_model_of(value: object, framework: str) -> bool:
    """Whether something is a model of `keras` or of `tf_keras`."""
    return _descends(value, "Model", framework)


def is_layer_of(value: object, framework: str) -> bool:
    """Whether something is a layer of `keras` or of `tf_keras`; models are layers, too."""
    return _descends(value, "Layer", framework)


def _descends(value: object, name: str, framework: str) -> bool:
    return any(
        base.__name__ == name and base.__module__.partition(".")[0] == framework
        for base in type(value).__mro__
    )


def children(layer: Layer) -> list[Layer]:
    """The layers directly inside one, without those that stand for inputs."""
    if is_model(layer):
        found = layer.layers
    else:
        found = layer._flatten_layers(recursive=False, include_self=False)
    return [child for child in found if type(child).__name__ != "InputLayer"]


def output_layers(model: Layer) -> list[Layer]:
    """The innermost layers that the outputs of a functional or sequential model come from.

    Operations that are no layers are passed over. Of a subclassed model they are unknown: none.
    """
    found = []
    for tensor in getattr(model, "outputs", None) or ():
        found += _sources(tensor)
    if not found and type(model).__name__ == "Sequential" and model.layers:
        last = model.layers[-1]  # not built yet
        return output_layers(last) if is_model(last) else [last]
    return found


def layer_behind(tensor: Any) -> Layer | None:
    """The innermost layer that a symbolic tensor comes from; None if it is no layer's alone."""
    history = getattr(tensor, "_keras_history", None)
    made_by = getattr(history, "operation", None) or getattr(history, "layer", None)
    if made_by is None or not hasattr(made_by, "dtype_policy"):
        return None
    if not is_model(made_by):
        return made_by
    inner = list(getattr(made_by, "outputs", None) or ())
    return layer_behind(inner[0]) if len(inner) == 1 else None


def inputs_of(layer: Layer) -> list[Layer]:
    """The layers whose outputs a layer was last called on, as far as they are known."""
    nodes = getattr(layer, "_inbound_nodes", None)
    tensors = [] if not nodes else _tensors(nodes[-1])
    return [source for tensor in tensors for source in _sources(tensor)]


def consumers_of(layer: Layer) -> list[Any]:
    """The layers and operations that take a layer's outputs, as far as they are known."""
    nodes = getattr(layer, "_outbound_nodes", None) or ()
    return [getattr(node, "operation", None) or getattr(node, "layer", None) for node in nodes]


def _sources(tensor: Any) -> list[Layer]:
    history = getattr(tensor, "_keras_history", None)
    made_by = getattr(history, "operation", None) or getattr(history, "layer", None)
    if made_by is None:
        return []
    if is_model(made_by):
        return output_layers(made_by)
    return [made_by] if hasattr(made_by, "dtype_policy") else inputs_of(made_by)


def _tensors(node: Any) -> list[Any]:
    tensors = getattr(node, "input_tensors", ())
    return list(tensors) if isinstance(tensors, (list, tuple)) else [tensors]


def policy_name(layer: Layer) -> str:
    """The name of a layer's policy, such as `float32` or `mixed_bfloat16`."""
    return str(layer.dtype_policy.name)


def set_policy(layer: Layer, policy: str) -> None:
    """Gives a layer that was made under a mixed policy another one, built or not."""
    if is_layer_of(layer, "keras"):
        layer.dtype_policy = policy
    else:
        layer._set_dtype_policy(policy)


def settle_model(model: Layer) -> None:
    """Gives a model the policy of its layers, which decides on loss scaling at `compile`.

    `mixed_float16` if any of them computes in float16, else that of the lowest precision.
    """
    found = {policy_name(place.layer) for place in walk(model)}
    lowest = next((name for name in POLICIES[::-1] if name in found), "float32")
    set_policy(model, lowest)


@contextlib.contextmanager
def listening(keras: Any, hear: Callable[[Layer, bool], None]) -> Iterator[None]:
    """Calls `hear` with each layer that is made inside, and whether a policy was given to it."""
    base = keras.layers.Layer
    init = base.__init__

    @functools.wraps(init)
    def listening_init(layer: Layer, /, *args: Any, **kwargs: Any) -> None:
        init(layer, *args, **kwargs)
        hear(layer, kwargs.get("dtype") is not None)

    # Keras looks at the signature when it makes a layer.
    listening_init.__signature__ = inspect.signature(init)  # type: ignore[attr-defined]
    base.__init__ = listening_init
    try:
        yield
    finally:
        base.__init__ = init


@contextlib.contextmanager
def global_policy(keras: Any, policy: str) -> Iterator[None]:
    """Layers of a framework that are made inside have this policy."""
    is_keras_3 = keras.__name__ == "keras"
    before = keras.config.dtype_policy() if is_keras_3 else keras.mixed_precision.global_policy()
    set_global_policy(keras, policy)
    try:
        yield
    finally:
        set_global_policy(keras, before)


def set_global_policy(keras: Any, policy: Any) -> None:
    """Sets the policy of layers of a framework that are made from now on."""
    if keras.__name__ == "keras":
        keras.config.set_dtype_policy(policy)
    else:
        keras.mixed_precision.set_global_policy(policy)


class Patterns:
    """Names, paths, regular expressions of both, or classes of layers.

    A string has to match a layer's whole name or its whole path. What is inside a layer that
    matches, matches too.

    Raises:
      InputError: when one is neither a regular expression nor a class.
    """

    def __init__(self, patterns: Sequence[Pattern]):
        if isinstance(patterns, (str, type)):
            patterns = [patterns]
        self._patterns = list(patterns)
        for pattern in self._patterns:
            if not isinstance(pattern, (str, type)):
                raise InputError(
                    f"Got {pattern!r} as a layer to keep; expected a name, a regular expression "
                    "or a class of layers."
                )
            try:
                re.compile(pattern if isinstance(pattern, str) else "")
            except re.error as error:
                raise InputError(
                    f"{pattern!r} is no regular expression ({error}); escape special characters "
                    "with a backslash."
                ) from None

    def find(self, places: Sequence[Place], is_strict: bool = False) -> set[int]:
        """The layers that are meant themselves, by `id`.

        Args:
          places: where to look.
          is_strict: whether each pattern has to mean something, and a plain name only one layer.

        Raises:
          InputError: with near names, or with the paths of all layers that are meant.
        """
        found: set[int] = set()
        for pattern in self._patterns:
            meant = _meant(pattern, places)
            if is_strict and not meant:
                raise InputError(_no_match(pattern, places))
            is_plain = isinstance(pattern, str) and not re.search(r"[^\w/]", pattern)
            if is_strict and is_plain and len(meant) > 1:
                paths = ", ".join(place.path for place in meant)
                raise InputError(
                    f"{pattern!r} means {len(meant)} layers ({paths}); name the one by its path, "
                    f"or all of them as '(.*/)?{pattern}'."
                )
            found |= {id(place.layer) for place in meant}
        return found


def _meant(pattern: Pattern, places: Sequence[Place]) -> list[Place]:
    if isinstance(pattern, type):
        return [place for place in places if isinstance(place.layer, pattern)]
    exact = [place for place in places if place.path == pattern]
    return exact or [
        place
        for place in places
        if re.fullmatch(pattern, place.path) or re.fullmatch(pattern, place.layer.name)
    ]


def _no_match(pattern: Pattern, places: Sequence[Place]) -> str:
    if isinstance(pattern, type):
        classes = sorted({type(place.layer).__name__ for place in places})
        return (
            f"No layer is a {pattern.__module__}.{pattern.__name__}; the classes of this model "
            f"are {', '.join(classes)}."
        )
    names = {place.path for place in places} | {place.layer.name for place in places}
    near = difflib.get_close_matches(pattern, sorted(names), n=3, cutoff=0.4)
    hint = f"near names are {', '.join(near)}" if near else "model.summary() lists the names"
    return f"No layer matches {pattern!r}; {hint}."
