"""What layers inside a Keras model make, and the logits under its probabilities, from one run."""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from tfopt.distillation.heads import by_name
from tfopt.errors import InputError
from tfopt.train.layers import Layer, framework_of, layer_behind, walk

NUM_NEAR = 3


class TappedModel:
    """A model of Keras 3 or tf_keras that gives features of some layers beside its outputs.

    A run is one run, also in a `tf.function`, under XLA, in mixed precision and in the threads of
    several replicas; gradients go through features as through outputs. The model itself stays as
    it was.

    Args:
      model: functional, sequential or subclassed.
      names: paths of layers, as in `block3/conv1`, or names that only one layer has.

    Raises:
      InputError: when there is no such layer, or several.
    """

    def __init__(self, model: Layer, names: Sequence[str]):
        framework_of(model)
        self._model = model
        self._layers = {name: find_layer(model, name) for name in names}
        self._lock, self._num_running = threading.Lock(), 0
        self._own_calls: dict[str, Any] = {}
        self._made = threading.local()

    def __call__(self, inputs: Any, training: bool = False) -> tuple[Any, dict[str, Any]]:
        """Runs the model.

        Args:
          inputs: as the model takes them.
          training: whether dropout and normalisation behave as in training.

        Returns:
          The model's outputs, and the output of each tapped layer by its name.

        Raises:
          InputError: when a tapped layer runs not once, or makes not one tensor.
        """
        with self._listening():
            made = self._made.of_run = {name: [] for name in self._layers}
            outputs = self._model(inputs, training=training)
        return outputs, {name: _only(name, found) for name, found in made.items()}

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        # Replicas of a strategy take turns in threads, in the middle of a model.
        with self._lock:
            if not self._num_running:
                for name, layer in self._layers.items():
                    self._listen(name, layer)
            self._num_running += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_running -= 1
                if not self._num_running:
                    for name, layer in reversed(self._layers.items()):
                        self._stop_listening(name, layer)

    def _listen(self, name: str, layer: Layer) -> None:
        call = layer.call
        self._own_calls[name] = vars(layer).get("call")

        def recording_call(*args: Any, **kwargs: Any) -> Any:
            outputs = call(*args, **kwargs)
            self._made.of_run[name].append(outputs)
            return outputs

        layer.call = recording_call

    def _stop_listening(self, name: str, layer: Layer) -> None:
        if self._own_calls[name] is None:
            del layer.call
        else:
            layer.call = self._own_calls[name]


def find_layer(model: Layer, name: str) -> Layer:
    """The layer of a path or of a name.

    Raises:
      InputError: when there is no such layer, or several have that name.
    """
    places = list(walk(model))
    found = [place for place in places if place.path == name]
    found = found or [place for place in places if place.layer.name == name]
    if len(found) == 1:
        return found[0].layer
    if found:
        paths = ", ".join(place.path for place in found[:NUM_NEAR])
        raise InputError(
            f"{len(found)} layers of model {model.name!r} are called {name!r}; expected a path "
            f"such as {paths}."
        )
    near = difflib.get_close_matches(name, [place.path for place in places], NUM_NEAR, 0.3)
    known = near or [place.path for place in places[:NUM_NEAR]]
    raise InputError(
        f"Model {model.name!r} has no layer {name!r}; expected the path of one, such as "
        f"{', '.join(known)}."
    )


def logits_under(outputs: Any) -> Any | None:
    """The logits that a model made these probabilities of; None where it does not tell.

    Softmax and sigmoid of both Kerases leave them with the tensor, for their own cross-entropy,
    while the model runs.

    Args:
      outputs: tensor that a model has just returned.
    """
    return getattr(outputs, "_keras_logits", None)


def activations_of(model: Layer) -> dict[str, str]:
    """What makes the outputs of a functional or sequential model, as far as their layers tell.

    Returns:
      `softmax`, `sigmoid` or `linear` by the name of the output, for those that are known.
    """
    structure = getattr(model, "_outputs_struct", None)  # Keras 3
    if structure is None:
        structure = getattr(model, "_nested_outputs", None)  # tf_keras
    if structure is None and type(model).__name__ == "Sequential":
        structure = model.outputs
    if structure is None:
        return {}
    names = getattr(model, "output_names", None)
    found = {}
    for name, tensor in by_name(structure, names).items():
        layer = layer_behind(tensor)
        is_computed = type(layer).__name__.startswith(("Dense", "EinsumDense", "Conv"))
        activation = getattr(getattr(layer, "activation", None), "__name__", None)
        if type(layer).__name__ == "Softmax":
            activation = "softmax"
        elif not is_computed and type(layer).__name__ != "Activation":
            activation = None
        if activation in ("softmax", "sigmoid") or (activation == "linear" and is_computed):
            found[name] = activation
    return found


def _only(name: str, found: Sequence[Any]) -> Any:
    if len(found) != 1:
        raise InputError(
            f"Layer {name!r} runs {len(found)} times in a run of its model; expected a layer that "
            "runs once."
        )
    (outputs,) = found
    if isinstance(outputs, (list, tuple, dict)):
        raise InputError(
            f"Layer {name!r} makes {len(outputs)} tensors; expected a layer that makes one."
        )
    return outputs
