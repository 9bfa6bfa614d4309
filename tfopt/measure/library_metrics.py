"""Metrics of Keras and scikit-learn by name, with the outputs as each of them expects them.

`keras:NAME(option=value)` is a class of `keras.metrics`, `sklearn:NAME(option=value)` a function of
`sklearn.metrics`. The option `output` overrides what they get: `scores` (the outputs as they are),
`argmax` (class numbers) or `threshold` (0 or 1, above 0.5).
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from tfopt.errors import InputError
from tfopt.measure.metric_names import spell
from tfopt.measure.metrics import Metric

FORMS = ("scores", "argmax", "threshold")
# By scikit-learn's convention, the name gives the direction.
SKLEARN_ERRORS = ("_error", "_loss", "_deviance")
SKLEARN_ENDINGS = ("_score", "_corrcoef", *SKLEARN_ERRORS)
SKLEARN_SHARES = ("hamming_loss", "zero_one_loss")  # errors of 0 to 1
KERAS_BASES = ("Metric", "Mean", "Sum", "MeanMetricWrapper")
KERAS_ERRORS = (
    "Error", "Hinge", "Crossentropy", "Divergence", "Poisson", "FalseNegatives", "FalsePositives"
)  # fmt: skip


def find(library: str, name: str, options: dict[str, Any]) -> Metric:
    """A metric of `keras` or `sklearn`.

    Raises:
      InputError: when there is none of that name, or it does not take these options; lists the
        valid names.
    """
    options = dict(options)
    form = options.pop("output", None)
    if form is not None and form not in FORMS:
        raise InputError(
            f"Metric {library}:{name}: output is {form!r}; expected {', '.join(FORMS)}."
        )
    found = _keras(name, options, form) if library == "keras" else _sklearn(name, options, form)
    given = options if form is None else {**options, "output": form}
    return found(spell(f"{library}:{name}", given))


def name_of(metric: Any) -> str:
    """How a Keras metric that was passed as an object is spelled.

    Raises:
      InputError: when it is not one of Keras's own.
    """
    kind = type(metric)
    if kind.__name__ not in _keras_classes() or _module_of(kind) not in ("keras", "tf_keras"):
        raise InputError(
            f"metric is a {kind.__name__}, no metric of Keras's own; give a function of outputs "
            "and labels that returns a number for each example, or one for all."
        )
    config = metric.get_config()
    defaults = {
        parameter.name: parameter.default
        for parameter in inspect.signature(kind).parameters.values()
    }
    return spell(
        f"keras:{kind.__name__}",
        {
            key: value
            for key, value in config.items()
            if key in defaults and key not in ("name", "dtype") and value != defaults[key]
        },
    )


def _module_of(kind: type) -> str:
    return kind.__module__.partition(".")[0]


# scikit-learn.


def _sklearn(name: str, options: dict[str, Any], form: str | None) -> Callable[[str], Metric]:
    try:
        library = importlib.import_module("sklearn.metrics")
    except ImportError as error:
        raise InputError(
            f"`metric=sklearn:{name}` needs scikit-learn ({error}); pip install scikit-learn."
        ) from error
    valid = {
        key: function
        for key, function in vars(library).items()
        if inspect.isfunction(function)
        and key.endswith(SKLEARN_ENDINGS)
        and _is_comparison(function)
    }
    _check_name("sklearn", name, valid)
    function = valid[name]
    parameters = list(inspect.signature(function).parameters)
    _check_options(f"sklearn:{name}", options, parameters[2:])
    if form is None:
        form = _sklearn_form(function, parameters[1])
    score = functools.partial(_sklearn_score, function, options, form)
    is_error = name.endswith(SKLEARN_ERRORS)
    is_unbounded = is_error and name not in SKLEARN_SHARES
    return lambda text: Metric(text, score, not is_error, "set", is_unbounded=is_unbounded)


def _is_comparison(function: Callable[..., Any]) -> bool:
    if not inspect.isfunction(function):
        return False
    parameters = list(inspect.signature(function).parameters)
    return len(parameters) > 1 and parameters[0] in ("y_true", "labels_true", "y1")


def _sklearn_form(function: Callable[..., Any], parameter: str) -> str:
    """What a function gets: it names its second argument after that."""
    is_regression = "_regression" in function.__module__
    is_score = parameter not in ("y_pred", "labels_pred", "y2") or function.__name__ == "log_loss"
    return "scores" if is_regression or is_score else "classes"


def _sklearn_score(
    function: Callable[..., Any],
    options: dict[str, Any],
    form: str,
    outputs: np.ndarray,
    labels: np.ndarray,
) -> float:
    outputs, labels = _plain(outputs), _plain(labels)
    if outputs.size == labels.size:
        labels = labels.reshape(outputs.shape)
    outputs, labels = _as_form(outputs, labels, form)
    if form == "scores" and function.__module__.endswith("_ranking") and outputs.ndim == 2:
        if outputs.shape[1] == 2 and labels.size == len(labels):
            outputs = outputs[:, 1] - outputs[:, 0]  # ranks as the probability of class 1
    elif form != "scores" and "_regression" not in function.__module__ and outputs.ndim > 2:
        outputs, labels = outputs.reshape(-1), labels.reshape(-1)  # pixels and tokens
    if outputs.ndim == 2 and outputs.shape[1] == 1:
        outputs = outputs[:, 0]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    value = function(labels, outputs, **options)
    if np.ndim(value):
        raise InputError(
            f"Metric sklearn:{function.__name__} returns {np.size(value)} numbers; choose options "
            "such as average=macro that give one."
        )
    return float(value)


# Keras.


@functools.cache
def _keras_classes() -> dict[str, Any]:
    library = importlib.import_module("keras").metrics
    return {
        name: kind
        for name, kind in vars(library).items()
        if inspect.isclass(kind) and issubclass(kind, library.Metric) and name not in KERAS_BASES
    }


def _keras(name: str, options: dict[str, Any], form: str | None) -> Callable[[str], Metric]:
    valid = _keras_classes()
    _check_name("keras", name, valid)
    _check_options(f"keras:{name}", options, list(inspect.signature(valid[name]).parameters))
    try:
        made = valid[name](**options)
    except Exception as error:  # Keras raises errors of many kinds for wrong arguments
        reason = str(error).splitlines()[0]
        raise InputError(f"`metric=keras:{name}` cannot be made: {reason}") from error
    direction = getattr(made, "_direction", None)  # of Keras 3
    is_error = direction == "down" or (direction is None and name.endswith(KERAS_ERRORS))
    if form is None:
        form = (
            "classes" if name == "Accuracy" or getattr(made, "sparse_y_pred", False) else "scores"
        )
    function = getattr(made, "_fn", None)
    if function is not None:  # a mean of numbers that every example has
        arguments = getattr(made, "_fn_kwargs", {})
        bound = functools.partial(function, **arguments)
        score: Any = functools.partial(_keras_scores, bound, form)
    else:
        score = functools.partial(_keras_score, made, form)
    level = "set" if function is None else "example"
    return lambda text: Metric(text, score, not is_error, level, is_unbounded=is_error)


def _keras_scores(
    function: Callable[..., Any], form: str, outputs: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    outputs, labels = _for_keras(outputs, labels, form)
    name = getattr(function.func, "__name__", "") if hasattr(function, "func") else ""
    if not name.startswith("sparse") and outputs.size != labels.size:
        raise InputError(
            f"Keras's {name} compares labels of the outputs' own shape {outputs.shape} and got "
            f"{labels.shape}; for class numbers choose a metric whose name begins with Sparse."
        )
    values = np.asarray(_numpy(function(labels, outputs)), np.float64)
    return values.reshape(len(outputs), -1).mean(1)


def _keras_score(metric: Any, form: str, outputs: np.ndarray, labels: np.ndarray) -> float:
    outputs, labels = _for_keras(outputs, labels, form)
    metric.reset_state()
    metric.update_state(labels, outputs)
    return float(np.asarray(_numpy(metric.result())).mean())


def _for_keras(outputs: np.ndarray, labels: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    outputs, labels = _plain(outputs), _plain(labels)
    if outputs.size == labels.size:
        labels = labels.reshape(outputs.shape)  # (n,) beside (n, 1) would be broadcast
    return _as_form(outputs, labels, form)


def _numpy(value: Any) -> Any:
    return value.numpy() if hasattr(value, "numpy") else value


# Both.


def _as_form(outputs: np.ndarray, labels: np.ndarray, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Outputs as scores, class numbers, or 0 and 1; `classes` decides by the shapes.

    Labels of one class number a position lose a last dimension of 1 beside class numbers.
    """
    if form == "scores" or outputs.dtype.kind in "iub":
        return outputs, labels
    width = outputs.shape[-1] if outputs.ndim > 1 else 1
    is_same = outputs.shape == labels.shape
    if form == "classes":
        is_one_hot = is_same and width > 1 and bool((labels.sum(-1) == 1).all())
        form = "argmax" if width > 1 and (not is_same or is_one_hot) else "threshold"
    if form == "threshold":
        return (outputs > 0.5).astype(np.int64), labels
    predicted = outputs.argmax(-1)
    if is_same:
        labels = labels.argmax(-1)
    elif labels.size == predicted.size:
        labels = labels.reshape(predicted.shape)
    return predicted, labels


def _plain(values: np.ndarray) -> np.ndarray:
    """Both libraries know neither bfloat16 nor NumPy's float16 in all places."""
    is_small = values.dtype.kind == "V" or values.dtype == np.float16
    return values.astype(np.float32) if is_small else values


def _check_name(library: str, name: str, valid: dict[str, Any]) -> None:
    if name not in valid:
        raise InputError(
            f"Unknown metric {library}:{name}; those of {library} are {', '.join(sorted(valid))}."
        )


def _check_options(name: str, options: dict[str, Any], valid: list[str]) -> None:
    valid = [option for option in valid if option not in ("name", "dtype", "kwargs", "args")]
    unknown = [option for option in options if option not in valid]
    if unknown:
        raise InputError(
            f"Metric {name} has no option {unknown[0]!r}; its options are "
            f"{', '.join([*valid, 'output'])}."
        )
