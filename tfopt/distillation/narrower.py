"""Widths of layers: which may change, and to what."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from tfopt.distillation.rebuilding import Node, Tensor, graph_of, nodes_of
from tfopt.train.layers import Layer

DIVISOR = 8

_WIDTHS = ("filters", "units", "output_dim")  # of what a layer makes
_INNER_WIDTHS = ("key_dim", "value_dim", "head_dim")  # of what stays inside
_TAKEN_WIDTHS = ("projection_dim",)  # of what a layer takes
_SHAPED = ("EinsumDense", "MultiHeadAttention", "GroupQueryAttention")  # by their output_shape
_TARGETS = ("target_shape", "newshape")  # of Reshape, the layer and the operation


def narrowed(size: int, width: float) -> int:
    """A width times a factor of at most 1.

    16 and more become multiples of 8 that are at most a tenth below the exact product, as in
    MobileNet (`_make_divisible` in the code of arXiv 1801.04381), but never more than they were;
    less than 16 become the next whole number, at least 1.
    """
    exact = size * width
    if size < 2 * DIVISOR:
        return max(1, math.floor(exact + 0.5))
    rounded = max(DIVISOR, int(exact + DIVISOR / 2) // DIVISOR * DIVISOR)
    if rounded < 0.9 * exact:
        rounded += DIVISOR
    return min(size, rounded)


class Narrowing:
    """Makes the layers of a model narrower, as `rebuilt` calls it.

    What the model takes and returns keeps its width, and so does everything that is added to or
    multiplied with it. Groups of convolutions and of GroupNormalization keep the number of their
    channels as far as it divides the new one.

    Args:
      model: with a graph.
      width: factor, above 0 and at most 1.

    Attributes:
      num_narrowed: layers that have become narrower.
    """

    def __init__(self, model: Layer, width: float):
        self._width, self._ties = width, _Ties(model)
        self.num_narrowed = 0

    def __call__(self, node: Node, config: dict[str, Any], inputs: tuple[Tensor, ...]) -> None:
        """Changes the configuration of a node's layer in place, given its new inputs."""
        before = repr(config)
        is_free = not self._ties.is_fixed(node.outputs[0])
        self._scale(config, type(node.layer).__name__, is_free)
        self.num_narrowed += before != repr(config)
        if not inputs:
            return
        old, new = _width(node.inputs[0]), _width(inputs[0])
        if old is None or new is None or old == new:
            return
        _regroup(config, old, new)
        for key in _TARGETS:
            if isinstance(config.get(key), (list, tuple)):
                config[key] = _retargeted(config[key], old, new)

    def _scale(self, config: Any, class_name: str, is_free: bool) -> None:
        keys = _INNER_WIDTHS + (_WIDTHS + _TAKEN_WIDTHS if is_free else ())
        for key, value in _sizes(config, class_name):
            if key in keys and value[key]:
                value[key] = narrowed(value[key], self._width)
            elif key == "output_shape" and is_free and _makes_last(value):
                shape = value[key]
                shape = [shape] if isinstance(shape, int) else list(shape)
                value[key] = (*shape[:-1], narrowed(shape[-1], self._width))


class _Ties:
    """Which tensors have to keep their width: a union of those whose widths are equal by need."""

    def __init__(self, model: Layer):
        import tensorflow as tf

        self._parents: dict[int, int] = {}
        self._relations: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self._seen: set[int] = set()
        self._collect(model)
        graph: Any = graph_of(model)
        ends = tf.nest.flatten([graph.input, graph.output])
        self._fixed = {self._find(id(tensor)) for tensor in ends}
        while self._spread_all():
            pass

    def is_fixed(self, tensor: Tensor) -> bool:
        return self._find(id(tensor)) in self._fixed

    def _collect(self, model: Layer) -> None:
        import tensorflow as tf

        self._seen.add(id(model))
        for node in nodes_of(model):
            graph = graph_of(node.layer)
            if graph is not None:
                if id(node.layer) not in self._seen:
                    self._collect(node.layer)
                for inner, outer in ((graph.input, node.inputs), (graph.output, node.outputs)):
                    # Masks come after what they are for.
                    for tensor, other in zip(tf.nest.flatten(inner), outer, strict=False):
                        self._join(id(tensor), id(other))
            elif is_maker(node.layer):
                for tensor in node.outputs:
                    self._join(id(node.layer), id(tensor))
            else:
                for tensor in node.outputs:
                    self._pass(node.inputs, tensor)

    def _pass(self, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        alike = [tensor for tensor in inputs if _width(tensor) == _width(output)]
        for tensor in alike:
            self._join(id(tensor), id(output))
        if not alike:
            self._relations.append((inputs, output))

    def _spread_all(self) -> bool:
        """Whether anything has become fixed."""
        count = len(self._fixed)
        for inputs, output in self._relations:
            self._spread(inputs, output)
        return len(self._fixed) > count

    def _spread(self, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """What is made of fixed widths is fixed, and a fixed one cannot be made of others."""
        some = [output] if all(map(self.is_fixed, inputs)) else []
        some += inputs if self.is_fixed(output) else []
        self._fixed |= {self._find(id(tensor)) for tensor in some}

    def _find(self, key: int) -> int:
        while (parent := self._parents.get(key, key)) != key:
            key = parent
        return key

    def _join(self, one: int, other: int) -> None:
        one, other = self._find(one), self._find(other)
        if one != other:
            self._parents[one] = other


def is_maker(layer: Layer) -> bool:
    """Whether a layer's own configuration says how wide what it makes is."""
    config = layer.get_config() if hasattr(layer, "get_config") else {}
    return any(
        key in _WIDTHS or (key == "output_shape" and _makes_last(value))
        for key, value in _sizes(config, type(layer).__name__)
    )


def _sizes(config: Any, class_name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the keys of widths and the dictionaries that hold them, of layers inside, too."""
    if isinstance(config, (list, tuple)):
        for item in config:
            yield from _sizes(item, class_name)
    elif isinstance(config, dict):
        class_name = config.get("class_name") or class_name
        for key, value in config.items():
            is_size = key in _WIDTHS + _INNER_WIDTHS + _TAKEN_WIDTHS and isinstance(value, int)
            if is_size or (key == "output_shape" and class_name in _SHAPED and value):
                yield key, config
            else:
                yield from _sizes(value, class_name)


def _makes_last(config: dict[str, Any]) -> bool:
    """Whether the last axis of an `output_shape` is made by a kernel."""
    inputs, _, rest = config.get("equation", "").partition(",")
    return not rest or rest[-1] not in inputs


def _width(tensor: Tensor) -> int | None:
    shape = tuple(tensor.shape)
    return shape[-1] if len(shape) > 1 else None


def _regroup(config: dict[str, Any], old: int, new: int) -> None:
    groups = config.get("groups")
    if not isinstance(groups, int) or groups <= 1:
        return
    whole = math.gcd(new, config.get("filters", new))
    limit = max(1, groups * new // old)
    config["groups"] = max(count for count in range(1, limit + 1) if whole % count == 0)


def _retargeted(shape: Any, old: int, new: int) -> tuple[int, ...]:
    """A shape whose last axis that can be is scaled from `old` to `new`."""
    found = list(shape)
    for axis in reversed(range(len(found))):
        size = found[axis]
        if size is not None and size > 0 and size * new % old == 0:
            found[axis] = size * new // old
            break
    return tuple(found)
