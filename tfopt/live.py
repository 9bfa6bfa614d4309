"""Live models: writing them as SavedModels that compute what `predict` does, and hashing them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import keras_names, saved_model
from tfopt.errors import MAX_REASON, InputError, first_line
from tfopt.graph import SIGNATURE_KEY
from tfopt.logs import only_errors
from tfopt.train import copies
from tfopt.train.layers import is_model, is_model_of


def export(model: Any, folder: Path, example: Any = None) -> None:
    """Writes a live model as a SavedModel whose first signature is `serving_default`.

    A Keras model is traced in inference (`training=False`), so that augmentation and noise are
    off, and is written in float32 if it computes in half precision, since converters refuse or
    slow down graphs with casts: precisions are chosen for each variant. Inputs and outputs have
    the names that `model.export` gives; the inputs of a subclassed model that takes a dictionary
    have its keys.

    Args:
      model: a Keras 3 (TensorFlow backend) or tf_keras model, a `tf.function` with an input
        signature, or a concrete function.
      folder: where to; it must not be there yet.
      example: inputs of a few examples; a Keras model that was never called is called on them.

    Raises:
      InputError: when the model is of another kind, was never called, or cannot be exported.
    """
    if is_model(model):
        if needs_call(model):
            call_once(model, example)
        _check_keras_inputs(model)
        _check_keeps_no_state(model)
    with only_errors("absl", "tensorflow"):
        try:
            _export(model, folder)
        except InputError:
            raise
        except (TypeError, ValueError) as error:
            name = getattr(model, "name", None) or type(model).__name__
            line = first_line(error)
            if "non-Tensor value" in str(error):
                line = f"it returns something that is no tensor ({line})"
            raise InputError(
                f"Model {name!r} cannot be exported: {line[:MAX_REASON]}; it must take one tensor, "
                "or a list or dictionary of tensors, and return the like."
            ) from error
    if is_model(model):
        keras_names.write(folder, named_inputs(model), model)


def call_once(model: Any, example: Any) -> None:
    """Calls a Keras model on a few examples, so that it knows its inputs and has its variables.

    Args:
      model: of either Keras.
      example: an array, or a dictionary or list of arrays, with one row an example.

    Raises:
      InputError: when there are no examples, or the model does not take them.
    """
    if example is None:
        raise InputError(
            f"Model {model.name!r} was never called, so its inputs are unknown; give data to call "
            "it on, or call it once and save it with model.export."
        )
    if (reason := failure_on(model, example)) is not None:
        raise InputError(
            f"Model {model.name!r} was never called, and it cannot be called on the data: "
            f"{reason}; give data with the model's inputs, or call it once and save it with "
            "model.export."
        )


def failure_on(model: Any, example: Any) -> str | None:
    """Why a Keras model cannot be called on some examples; None if it can.

    Args:
      model: of either Keras.
      example: an array, or a dictionary or list of arrays, with one row an example or without.
    """
    ways = [example]
    if isinstance(example, Mapping):
        arrays = list(example.values())
        ways = [dict(example), arrays] if len(arrays) > 1 else [arrays[0], dict(example)]
    failures = []
    for arguments in ways:
        for way in (arguments, _rows(arguments)):
            try:
                model(way, training=False)
                return None
            except Exception as error:  # layers of the user's raise whatever they raise
                failures.append(first_line(error))
    return failures[0][:MAX_REASON]


def named_inputs(model: Any) -> Any:
    """The structure of a Keras model's argument, with the signature's names as its leaves."""
    import tensorflow as tf

    if is_model_of(model, "keras"):
        structure = _keras_signature(model)
        structure = structure[0] if len(structure) == 1 else structure
        return tf.nest.map_structure(lambda spec: spec.name, structure)
    if getattr(model, "inputs", None):
        names = iter(model.input_names)
        return tf.nest.map_structure(lambda _: next(names), model.input)
    positional, _ = model.save_spec()
    return tf.nest.map_structure(lambda spec: spec.name.partition(":")[0], positional[0])


def hash_live(model: Any) -> str:
    """SHA-256 over a live model's weights and configuration; equal in every process."""
    digest = hashlib.sha256()
    if hasattr(model, "to_json"):
        try:
            digest.update(model.to_json().encode())
        except (NotImplementedError, TypeError, ValueError):
            digest.update(type(model).__qualname__.encode())  # a subclassed model without config
    weights = getattr(model, "weights", None)
    if weights is None:
        concrete = (
            model.get_concrete_function() if hasattr(model, "get_concrete_function") else model
        )
        weights = concrete.graph.variables
        digest.update(",".join(node.op for node in concrete.graph.as_graph_def().node).encode())
    for weight in weights:
        digest.update(weight.numpy().tobytes())
    return digest.hexdigest()


def _export(model: Any, folder: Path) -> None:
    import tensorflow as tf

    options = saved_model.save_options()
    if is_model_of(model, "keras"):
        import keras

        archive = keras.export.ExportArchive()
        archive.track(model)

        # As model.export does, which leaves `training` to the defaults of the layers.
        def serve(*args: Any) -> Any:
            return model(*args, training=False)

        with copies.in_float32(model):
            archive.add_endpoint("serve", serve, _keras_signature(model))
            archive.write_out(str(folder), options=options, verbose=False)
    elif is_model_of(model, "tf_keras"):
        with copies.in_float32(model):
            tf.saved_model.save(model, str(folder), options=options)
    elif callable(getattr(model, "get_concrete_function", None)) or hasattr(
        model, "captured_inputs"
    ):
        try:
            concrete = (
                model.get_concrete_function() if hasattr(model, "get_concrete_function") else model
            )
        except (TypeError, ValueError) as error:
            raise InputError(
                "The tf.function has no input signature; decorate it with "
                "tf.function(input_signature=[…]) or pass get_concrete_function(…)."
            ) from error
        for spec in tf.nest.flatten(concrete.structured_input_signature):
            if not isinstance(spec, tf.TensorSpec):
                kind = type(spec).__name__
                raise saved_model.composite_error("Input", getattr(spec, "name", None) or "0", kind)
        module = tf.Module()
        module.variables_used = list(concrete.graph.variables)
        module.serve = model
        tf.saved_model.save(
            module, str(folder), signatures={SIGNATURE_KEY: concrete}, options=options
        )
    else:
        raise InputError(
            f"{type(model).__name__} is no model: expected the path of one, a Keras model, or a "
            "tf.function with an input signature."
        )


def needs_call(model: Any) -> bool:
    """Whether a Keras model has to be called on data before it can be exported."""
    if not model.built:
        return True
    if is_model_of(model, "tf_keras"):
        return not getattr(model, "inputs", None) and model.save_spec() is None
    is_described = hasattr(model, "_inputs_struct") or bool(getattr(model, "inputs", None))
    return not is_described and not model._called


def _keras_signature(model: Any) -> list[Any]:
    """What `model.export` takes as the input signature of a Keras 3 model, all of it named."""
    import tensorflow as tf
    from keras.src.export.export_utils import get_input_signature, make_tf_tensor_spec

    positional = []
    for index, structure in enumerate(get_input_signature(model)):
        specs = tf.nest.map_structure(make_tf_tensor_spec, structure)
        if isinstance(specs, Mapping) and not any(spec.name for spec in specs.values()):
            named = [str(key) for key in sorted(specs)]
        else:
            # As tf.function names the tensors of its arguments.
            count = len(tf.nest.flatten(specs))
            named = [f"args_{index}" + (f"_{leaf}" if leaf else "") for leaf in range(count)]
        flat = [
            tf.TensorSpec(spec.shape, spec.dtype, spec.name or name)
            for spec, name in zip(tf.nest.flatten(specs), named, strict=True)
        ]
        positional.append(tf.nest.pack_sequence_as(specs, flat))
    return positional


def _check_keras_inputs(model: Any) -> None:
    """Checks that no input of a functional model is sparse or ragged.

    Raises:
      InputError: names the input.
    """
    for tensor in getattr(model, "inputs", None) or ():
        kind = getattr(getattr(tensor, "type_spec", None), "value_type", None)
        for name in ("sparse", "ragged"):
            is_kind = kind is not None and kind.__name__.lower().startswith(name)
            if getattr(tensor, name, False) is True or is_kind:
                raise saved_model.composite_error("Input", tensor.name, name)


def _check_keeps_no_state(model: Any) -> None:
    """Checks that no recurrent layer goes on where the last call ended.

    Raises:
      InputError: names the layer.
    """
    for layer in model._flatten_layers():
        resets = hasattr(layer, "reset_state") or hasattr(layer, "reset_states")
        if not is_model(layer) and resets and getattr(layer, "stateful", False):
            raise InputError(
                f"Layer {layer.name!r} of model {model.name!r} keeps its state from call to call "
                "(stateful=True), so that no two runs agree; build the model with stateful=False, "
                "or export one that takes and returns the state."
            )


def _rows(example: Any) -> Any:
    """An example as a batch of one: a stream may yield examples and not batches."""
    import tensorflow as tf

    return tf.nest.map_structure(lambda value: np.asarray(value)[None], example)
