"""Students by a name of `keras.applications`."""

from __future__ import annotations

import difflib
import importlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tfopt.distillation.rebuilding import Tensor, graph_of, nodes_of, rebuilt
from tfopt.errors import InputError, first_line
from tfopt.train.layers import Layer
from tfopt.variant import Value

NUM_NEAR = 3

_SET_HERE = (
    "include_top", "input_tensor", "input_shape", "pooling", "classes", "classifier_activation",
)  # fmt: skip
_PREPROCESSING = ("Rescaling", "Normalization")


def application(
    name: str,
    options: Mapping[str, Value],
    *,
    input_shape: Sequence[int | None],
    num_classes: int,
    framework: str,
    teacher: Layer | None = None,
) -> Layer:
    """Builds a model of `keras.applications` that gives logits.

    Without weights it takes the values that the teacher takes: the Rescaling and Normalization with
    which the teacher begins come in place of its own, if the teacher has any and is functional or
    sequential. With `include_preprocessing=True` it keeps its own, for pixels of 0 to 255. With
    `weights=imagenet`, or those of a file without top, it takes pixels of 0 to 255, too, which go
    through `preprocess_input` of the application inside the model, and its top is an average and a
    dense layer.

    Args:
      name: of a function that builds a model, such as `MobileNetV2`.
      options: of that function, such as `alpha`.
      input_shape: (height, width, channels).
      num_classes: logits.
      framework: `keras` or `tf_keras`.
      teacher: whose preprocessing is copied.

    Raises:
      InputError: when there is no such name or option, or the shape does not fit.
    """
    keras = importlib.import_module(framework)
    build = _find(keras, name)
    _check_options(name, build, options)
    if len(input_shape) != 3:
        raise InputError(
            f"{name} takes images of shape (height, width, channels), not examples of shape "
            f"{tuple(input_shape)}; give a file or a function as the student."
        )
    given = {key: None if value == "None" else value for key, value in options.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "This model usually expects")
            if given.get("weights") is not None:
                return _pretrained(keras, build, given, tuple(input_shape), num_classes)
            return _untrained(keras, build, given, tuple(input_shape), num_classes, teacher)
    except Exception as error:
        raise InputError(
            f"{name} cannot be built for examples of shape {tuple(input_shape)} and {num_classes} "
            f"classes ({first_line(error)}); give another name of {framework}.applications, a file "
            "or a function as the student."
        ) from error


def names(keras: Any) -> list[str]:
    """The functions of `keras.applications` that build a model."""
    return sorted(
        name
        for name, value in vars(keras.applications).items()
        if inspect.isfunction(value) and "include_top" in inspect.signature(value).parameters
    )


def _find(keras: Any, name: str) -> Callable[..., Layer]:
    known = names(keras)
    if name in known:
        return getattr(keras.applications, name)  # type: ignore[no-any-return]
    by_lower = {each.lower(): each for each in known}
    near = difflib.get_close_matches(name.lower(), list(by_lower), NUM_NEAR, 0.5)
    listed = ", ".join(by_lower[each] for each in near) or ", ".join(known)
    raise InputError(
        f"No student {name!r}: expected teacher(width=0.5), a .keras or .h5 file, "
        f"package.module:function, or a name of {keras.__name__}.applications such as {listed}."
    )


def _check_options(name: str, build: Callable[..., Layer], options: Mapping[str, Value]) -> None:
    parameters = inspect.signature(build).parameters.values()
    known = [each.name for each in parameters if each.kind is not each.VAR_KEYWORD]
    known = [each for each in known if each not in (*_SET_HERE, "name", "model_name")]
    for option in options:
        if option not in known:
            raise InputError(
                f"{name} has no option {option!r} as a student; expected {', '.join(known)}."
            )


def _untrained(
    keras: Any,
    build: Callable[..., Layer],
    options: dict[str, Any],
    shape: tuple[int | None, ...],
    num_classes: int,
    teacher: Layer | None,
) -> Layer:
    is_own = options.get("include_preprocessing") is True
    if "include_preprocessing" in inspect.signature(build).parameters:
        options.setdefault("include_preprocessing", False)
    model = build(
        **options | {"weights": None},
        input_shape=shape,
        classes=num_classes,
        classifier_activation=None,
    )
    if is_own:
        return model
    own = preprocessing(model)
    bypassed = {id(node.outputs[0]): node.inputs[0] for node in own}
    layers = [] if teacher is None else [node.layer for node in preprocessing(teacher)]

    def before(tensor: Tensor) -> Tensor:
        for layer in layers:
            tensor = _copied(keras, layer)(tensor)
        return tensor

    return rebuilt(model, bypassed=bypassed, before=before) if own or layers else model


def _pretrained(
    keras: Any,
    build: Callable[..., Layer],
    options: dict[str, Any],
    shape: tuple[int | None, ...],
    num_classes: int,
) -> Layer:
    image = keras.Input(shape, name="image")
    preprocess = importlib.import_module(build.__module__).preprocess_input
    base = build(
        **options,
        include_top=False,
        pooling="avg",
        input_shape=shape,
        input_tensor=preprocess(image),
    )
    logits = keras.layers.Dense(num_classes, name="logits")(base.output)
    return keras.Model(image, logits, name=base.name)


def preprocessing(model: Layer) -> list[Any]:
    """The calls of Rescaling and Normalization with which a model of one input begins."""
    import tensorflow as tf

    graph = graph_of(model)
    inputs = [] if graph is None else tf.nest.flatten(graph.input)
    if len(inputs) != 1:
        return []
    found: list[Any] = []
    end, nodes = inputs[0], nodes_of(model)
    while True:
        after = [node for node in nodes if any(each is end for each in node.inputs)]
        if len(after) != 1 or type(after[0].layer).__name__ not in _PREPROCESSING:
            return found
        found.append(after[0])
        end = after[0].outputs[0]


def _copied(keras: Any, layer: Layer) -> Layer:
    """A preprocessing layer of either framework, in this one."""
    if type(layer).__name__ == "Rescaling":
        return keras.layers.Rescaling(layer.scale, layer.offset, name=layer.name)
    # It holds them in shapes that broadcast to its inputs, and takes them with its own axes only.
    mean, variance = (np.asarray(value) for value in (layer.mean, layer.variance))
    shape = [mean.shape[axis] for axis in layer.axis]
    mean, variance = mean.reshape(shape), variance.reshape(shape)
    return keras.layers.Normalization(
        axis=layer.axis, mean=mean, variance=variance, invert=layer.invert, name=layer.name
    )
