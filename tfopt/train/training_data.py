"""What a model is trained on, and the loss that fits its labels."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import dataset as datasets
from tfopt import keras_names, live
from tfopt.dataset.streams import is_bounded, open_text
from tfopt.errors import InputError
from tfopt.examples import is_input_column, is_label_column, is_weight_column, output_of
from tfopt.signature import Signature, TensorSpec
from tfopt.train.batches import leaves
from tfopt.train.layers import Layer, framework_of, output_layers

SPARSE = "sparse_categorical_crossentropy"
NUM_BATCHES = 8  # whose labels are looked at


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Arguments of `fit`.

    Attributes:
      train: `x`, `y` and perhaps `sample_weight`, arrays (`x` alone where labels may be missing);
        or `x`, which yields batches.
      validation: what `validation_data` takes, or None.
      notes: what was cast and where reading stopped, one sentence each.
    """

    train: dict[str, Any]
    validation: Any
    notes: tuple[str, ...] = ()

    @property
    def is_batched(self) -> bool:
        """Whether batches are made already."""
        return _yields_batches(self.train["x"])

    def some(self) -> tuple[Any, np.ndarray | Mapping[str, Any]]:
        """Inputs of a few examples, and labels of many.

        Raises:
          InputError: when the data yield no labels.
        """
        if not self.is_batched:
            return _first(self.train["x"]), self.train["y"]
        batches = list(itertools.islice(self.train["x"], NUM_BATCHES))
        if not batches:
            raise InputError("The data yield no batch; at least one is needed to train on.")
        if not all(isinstance(batch, tuple) and len(batch) > 1 for batch in batches):
            raise InputError("The data yield no labels; yield (x, y).")
        labels = [batch[1] for batch in batches]
        if isinstance(labels[0], (Mapping, list, tuple)):
            return _first(batches[0][0]), {"several": labels}
        return _first(batches[0][0]), np.concatenate([np.asarray(part) for part in labels])


def _first(inputs: Any) -> Any:
    """Two examples of inputs of any structure."""
    if isinstance(inputs, Mapping):
        return {name: _first(value) for name, value in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return [_first(value) for value in inputs]
    return inputs[:2]


def read(
    data: Any,
    model: Layer,
    needs_labels: bool = True,
    progress: Callable[[int], None] | None = None,
) -> TrainingData:
    """Reads arrays into memory, and leaves data sets that yield batches as they are.

    Args:
      data: as `fine_tune` takes them.
      model: which the inputs are for.
      needs_labels: whether arrays without labels are refused.
      progress: called with the number of examples so far.

    Raises:
      InputError: when there are none, they do not fit the model, have no labels, or never end.
    """
    if isinstance(data, (str, Path)):
        data = open_text(str(data))
    if isinstance(data, tuple) and len(data) == 2 and all(map(_yields_batches, data)):
        return TrainingData({"x": _ending(data[0])}, _ending(data[1]))
    if _yields_batches(data):
        return TrainingData({"x": _ending(data)}, None)
    train, test, notes = datasets.in_memory(data, _signature(model), progress)
    arguments = _arguments(train, model)
    if "y" not in arguments:
        if needs_labels:
            raise InputError("The data have no labels; name them y, or y_train and y_test.")
        return TrainingData({"x": arguments["x"]}, None, notes)
    held_out = {} if test is None else _arguments(test, model)
    validation = tuple(held_out.values()) if "y" in held_out else None
    return TrainingData(arguments, validation, notes)


def _yields_batches(data: Any) -> bool:
    """Whether something is a data set of TensorFlow or Keras."""
    names = {found.__name__ for found in type(data).__mro__}
    return bool(names & {"DatasetV2", "PyDataset", "Sequence"})


def _ending(data: Any) -> Any:
    is_bounded(data)  # raises where it is known not to end
    return data


def _arguments(chunk: Mapping[str, np.ndarray], model: Layer) -> dict[str, Any]:
    """What `fit` takes: `x`, `y` and `sample_weight`, the latter two where they are there.

    Keras 3 takes a dictionary of labels only for a model that returns one.
    """
    outputs = [port.key for port in keras_names.outputs_of(model)]
    is_dict = isinstance(getattr(model, "output", None), Mapping)
    inputs = {name: array for name, array in chunk.items() if is_input_column(name)}
    found: dict[str, Any] = {"x": inputs if len(inputs) > 1 else next(iter(inputs.values()))}
    for name, is_one in (("y", is_label_column), ("sample_weight", is_weight_column)):
        by_output = {output_of(column): chunk[column] for column in chunk if is_one(column)}
        if None in by_output:
            found[name] = by_output[None]
        elif by_output and not is_dict and by_output.keys() == set(outputs):
            found[name] = [by_output[output] for output in outputs]
        elif by_output:
            found[name] = by_output
    return found


def _ports(model: Layer, tensors: Any) -> list[keras_names.Port]:
    return keras_names.inputs_of(live.named_inputs(model)) if tensors else []


def _signature(model: Layer) -> Signature:
    """Inputs and outputs by the names that `fit` takes, in the order of the model."""
    tensors = getattr(model, "inputs", None) or ()  # a subclass may have none
    inputs = [
        TensorSpec(port.key, tuple(tensor.shape), np.dtype(_dtype(tensor)).name, place,
                   (port.layer,))
        for place, (port, tensor) in enumerate(
            zip(_ports(model, tensors), tensors, strict=True)
        )
    ]  # fmt: skip
    outputs = [
        TensorSpec(port.key, None, "float32", place, (port.layer,))
        for place, port in enumerate(keras_names.outputs_of(model))
    ]
    return Signature("fit", tuple(inputs) or (TensorSpec("x", None, "float32"),), tuple(outputs))


def _dtype(tensor: Any) -> Any:
    return getattr(tensor.dtype, "as_numpy_dtype", tensor.dtype)


def choose_loss(model: Layer, data: TrainingData) -> dict[str, Any]:
    """The loss and the metrics that fit labels and outputs, as `compile` takes them.

    Numbers of classes get sparse categorical cross-entropy; 0 and 1 for one output or for several
    sigmoids binary cross-entropy; shares of classes (such as one-hot labels) categorical
    cross-entropy, each with accuracy. Everything else gets the mean square error.

    Raises:
      InputError: when the model has several outputs, whose weights only the user knows, or labels
        have another shape.
    """
    losses = framework_of(model).losses
    inputs, labels = data.some()
    found = leaves(model(inputs, training=False))
    if isinstance(labels, Mapping) or len(found) > 1:
        raise InputError(
            f"Model {model.name!r} has several outputs and is not compiled; compile it with a loss "
            "for each and save it again."
        )
    outputs = np.asarray(found[0], np.float64)
    num_outputs, activation = outputs.shape[-1], _activation(model, outputs)
    from_logits = activation == "linear"
    is_flat = labels.ndim == outputs.ndim - 1 or (labels.shape[1:-1], labels.shape[-1]) == (
        outputs.shape[1:-1], 1
    )  # fmt: skip
    if not is_flat and labels.shape[1:] != outputs.shape[1:]:
        raise InputError(
            f"Labels of one example have shape {labels.shape[1:]} and outputs "
            f"{outputs.shape[1:]}; expected the same, or a whole number for each class."
        )
    metrics = ["accuracy"]
    if is_flat and num_outputs > 1:
        if not np.array_equal(labels, np.round(labels)):
            raise InputError(
                f"The model has {num_outputs} outputs, and labels such as {labels.flat[0]} are no "
                "whole numbers of classes."
            )
        return {
            "loss": losses.SparseCategoricalCrossentropy(from_logits=from_logits),
            "metrics": metrics,
        }
    is_yes_or_no = np.isin(labels, (0, 1)).all()
    if is_yes_or_no and (activation == "sigmoid" or (num_outputs == 1 and from_logits)):
        return {"loss": losses.BinaryCrossentropy(from_logits=from_logits), "metrics": metrics}
    if num_outputs > 1 and activation in ("softmax", "linear") and _are_shares(labels):
        return {
            "loss": losses.CategoricalCrossentropy(from_logits=from_logits), "metrics": metrics
        }  # fmt: skip
    return {"loss": losses.MeanSquaredError()}


def _are_shares(values: np.ndarray) -> bool:
    return bool((values >= 0).all() and np.allclose(values.sum(-1), 1, atol=1e-3))


def _activation(model: Layer, outputs: np.ndarray) -> str:
    """The last activation; by the outputs where the last layer does not tell."""
    for head in output_layers(model)[:1]:
        if hasattr(head, "activation"):
            return getattr(head.activation, "__name__", "other")
    if outputs.shape[-1] > 1 and _are_shares(outputs):
        return "softmax"
    return "sigmoid" if ((outputs >= 0) & (outputs <= 1)).all() else "linear"


def check_labels(model: Layer, data: TrainingData, loss: Any) -> None:
    """Checks that numbers of classes are those of the outputs.

    Args:
      model: that is trained.
      data: that it is trained on.
      loss: as `compile` takes it.

    Raises:
      InputError: when some are below 0 or beyond.
    """
    name = getattr(loss, "name", None) or getattr(loss, "__name__", loss)
    if name != SPARSE or data.is_batched:
        return
    labels = data.train["y"]
    labels = labels[labels != getattr(loss, "ignore_class", None)]
    if not labels.size:
        return
    num_classes = leaves(model(data.some()[0], training=False))[0].shape[-1]
    low, high = labels.min(), labels.max()
    if low < 0 or high >= num_classes:
        raise InputError(
            f"Labels go from {low} to {high} and the model has {num_classes} outputs; expected 0 "
            f"to {num_classes - 1}."
        )
