"""Functional and sequential models made again, with other sizes of layers or without some."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tfopt.errors import InputError, first_line
from tfopt.logs import only_errors
from tfopt.train import copies
from tfopt.train.layers import Layer, framework_of, is_model, settle_model, walk

_BUILD_SHAPES = ("query_shape", "key_shape", "value_shape")  # of attention of tf_keras

Tensor = Any  # symbolic, of either framework


@dataclasses.dataclass(frozen=True)
class Node:
    """A call of a layer or an operation inside a model.

    Attributes:
      layer: that is called; operations of Keras 3 need not be layers.
      inputs: tensors among its arguments.
      outputs: what it makes.
      args: all arguments by position.
      kwargs: all arguments by name.
    """

    layer: Layer
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    args: Any
    kwargs: dict[str, Any]


Change = Callable[[Node, dict[str, Any], tuple[Tensor, ...]], None]
"""Changes the configuration of a node's layer in place, given its new inputs."""


def graph_of(model: Layer) -> Any | None:
    """The functional model that a model is or has inside; None for a layer without a graph."""
    if not is_model(model):
        return None
    found = getattr(model, "_functional", None) or model
    return found if getattr(found, "_nodes_by_depth", None) else None


def nodes_of(model: Layer) -> list[Node]:
    """The calls inside a model with a graph, without its inputs, each after those it needs."""
    by_depth = graph_of(model)._nodes_by_depth  # type: ignore[union-attr]
    nodes = [_node(node) for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
    return [node for node in nodes if type(node.layer).__name__ != "InputLayer"]


def _node(node: Any) -> Node:
    import tensorflow as tf

    if hasattr(node, "operation"):
        args, kwargs = node.arguments.args, node.arguments.kwargs
        return Node(node.operation, tuple(node.input_tensors), tuple(node.outputs), args, kwargs)
    outputs = tuple(tf.nest.flatten(node.outputs))
    return Node(node.layer, tuple(node.keras_inputs), outputs, node.call_args, node.call_kwargs)


def rebuilt(
    model: Layer,
    *,
    change: Change | None = None,
    bypassed: Mapping[int, Tensor] | None = None,
    before: Callable[[Tensor], Tensor] | None = None,
) -> Layer:
    """Makes a model again, with new weights; sequential models become functional.

    What preprocessing layers have learned is kept. Layers may be trained, also if those of the
    model were frozen, and `training=False` with which it calls layers is left out.

    Args:
      model: functional or sequential, of Keras 3 or tf_keras.
      change: changes the configurations of layers.
      bypassed: tensors of the model that take the place of others, by the others' `id`.
      before: makes what the model gets of each of its inputs.

    Raises:
      InputError: when a layer cannot be made or called again, with its name.
    """
    keras = framework_of(model)
    run = _Run(keras, change, bypassed or {})
    with keras.utils.custom_object_scope(copies.custom_objects(model)):
        new = run.make(model, before=before)
    run.copy_states()
    for place in walk(new):  # one by one: Keras 3 hands down only what changes a model's own flag
        place.layer.trainable = True
    settle_model(new)
    return new


class _Run:
    def __init__(self, keras: Any, change: Change | None, bypassed: Mapping[int, Tensor]):
        self._keras, self._change, self._bypassed = keras, change, bypassed
        self._made: dict[int, tuple[Layer, Layer]] = {}  # old and new

    def make(
        self,
        model: Layer,
        shapes: list[Any] | None = None,
        before: Callable[[Tensor], Tensor] | None = None,
    ) -> Layer:
        import tensorflow as tf

        graph: Any = graph_of(model)
        old = tf.nest.flatten(graph.input)
        # Shapes of masks come after those of what they are for.
        new = [
            self._input(tensor, None if shapes is None else shapes[index])
            for index, tensor in enumerate(old)
        ]
        values = {
            id(tensor): made if before is None else before(made)
            for tensor, made in zip(old, new, strict=True)
        }
        for node in self._needed(model):
            self._call(node, values)
        outputs = tf.nest.map_structure(lambda tensor: self._value(tensor, values), graph.output)
        inputs = tf.nest.pack_sequence_as(graph.input, new)
        return self._keras.Model(inputs, outputs, name=model.name)

    def copy_states(self) -> None:
        """Copies the weights of preprocessing layers, such as means of Normalization."""
        for old, new in self._made.values():
            if hasattr(new, "adapt") and old.get_weights():
                new.set_weights(old.get_weights())
                new.finalize_state()

    def _input(self, tensor: Tensor, shape: Any) -> Tensor:
        layer = tensor._keras_history[0]
        config = dict(layer.get_config())
        if shape is not None:
            key = "batch_shape" if "batch_shape" in config else "batch_input_shape"
            config[key] = tuple(shape)
        return type(layer).from_config(config).output

    def _needed(self, model: Layer) -> Iterator[Node]:
        import tensorflow as tf

        graph: Any = graph_of(model)
        wanted = {id(self._origin(tensor)) for tensor in tf.nest.flatten(graph.output)}
        found = []
        for node in reversed(nodes_of(model)):
            if any(id(tensor) in wanted for tensor in node.outputs):
                found.append(node)
                wanted |= {id(self._origin(tensor)) for tensor in node.inputs}
        return reversed(found)

    def _origin(self, tensor: Tensor) -> Tensor:
        while id(tensor) in self._bypassed:
            tensor = self._bypassed[id(tensor)]
        return tensor

    def _value(self, tensor: Tensor, values: Mapping[int, Tensor]) -> Tensor:
        return values.get(id(self._origin(tensor)), tensor)  # an argument need not be a tensor

    def _call(self, node: Node, values: dict[int, Tensor]) -> None:
        import tensorflow as tf

        args, kwargs = tf.nest.map_structure(
            lambda value: self._value(value, values), (node.args, dict(node.kwargs))
        )
        if kwargs.get("training") is False:
            del kwargs["training"]  # of a frozen part
        inputs = tuple(self._value(tensor, values) for tensor in node.inputs)
        try:
            layer = self._layer(node, inputs)
            made = tf.nest.flatten(layer(*args, **kwargs))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"layer {node.layer.name!r} ({type(node.layer).__name__}) cannot be made again: "
                f"{first_line(error)}"
            ) from error
        values.update(zip(map(id, node.outputs), made, strict=True))

    def _layer(self, node: Node, inputs: tuple[Tensor, ...]) -> Layer:
        if id(node.layer) not in self._made:
            if graph_of(node.layer) is not None:
                new = self.make(node.layer, [tensor.shape for tensor in inputs])
            else:
                new = self._from_configuration(node, inputs)
            self._made[id(node.layer)] = node.layer, new
        return self._made[id(node.layer)][1]

    def _from_configuration(self, node: Node, inputs: tuple[Tensor, ...]) -> Layer:
        serialized = self._keras.saving.serialize_keras_object(node.layer)
        _forget_builds(serialized)
        if self._change is not None:
            self._change(node, serialized["config"], inputs)
        with only_errors("tensorflow"):  # says that attention of tf_keras is not built yet
            new = self._keras.saving.deserialize_keras_object(serialized, safe_mode=False)
        copies._copy_vocabulary(node.layer, new)
        return new


def _forget_builds(value: Any) -> None:
    """Takes out shapes with which layers would be built before they are called."""
    if isinstance(value, dict):
        value.pop("build_config", None)
        value |= {key: None for key in _BUILD_SHAPES if key in value}
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (dict, list, tuple)):
            _forget_builds(item)
