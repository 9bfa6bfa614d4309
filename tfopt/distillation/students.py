"""The model that is to learn: a file, a function, a smaller teacher, or a name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tfopt import source
from tfopt.distillation.applications import application
from tfopt.distillation.narrower import Narrowing
from tfopt.distillation.rebuilding import graph_of, rebuilt
from tfopt.distillation.shallower import left_out
from tfopt.errors import InputError, first_line
from tfopt.keras_files import load_keras_file
from tfopt.train.layers import Layer, is_model
from tfopt.variant import Value, Variant

KERAS_FILES = (".keras", ".h5")

OTHERS = (
    "a name of keras.applications, a .keras or .h5 file, or a function (package.module:"
    "function) as the student"
)


def make_student(
    spec: Any,
    teacher: Any = None,
    *,
    input_shape: Sequence[int | None] | None = None,
    num_classes: int | None = None,
    framework: str = "keras",
    custom_objects: str | None = None,
    trust_model: bool = False,
) -> Layer:
    """Makes or loads a student, uncompiled if it comes from a file, the teacher or a name.

        make_student("teacher(depth=0.5,width=0.5)", teacher)
        make_student("MobileNetV2(alpha=0.5)", teacher)

    Args:
      spec: one of
        a `.keras` or `.h5` file, with the weights in it;
        `package.module:function`, or a function, that returns a built Keras model;
        a built model of Keras 3 or tf_keras, which is returned itself;
        `teacher(width=0.5)`, `teacher(depth=0.5)`, both, or `teacher`: the teacher's architecture,
        narrower (see `Narrowing`) or shallower (see `left_out`), with new weights;
        a name of `keras.applications` with options, as in `MobileNetV2(alpha=0.5)`: an untrained
        model that gives logits and takes the teacher's inputs, or one with `weights=imagenet` (see
        `application`).
      teacher: a Keras model or its file; what inputs and outputs have to be like is taken from it.
      input_shape: of an example, for a name; by default the teacher's.
      num_classes: for a name; by default the teacher's.
      framework: `keras` or `tf_keras`, for a name.
      custom_objects: `package.module` with layers and functions that a file needs.
      trust_model: whether Python code that is stored in a file may run.

    Raises:
      InputError: when there is no such student, or it cannot be made.
    """
    if is_model(spec):
        return _checked(spec, "The student")
    if callable(spec):
        return _called(spec, f"The student {getattr(spec, '__name__', spec)!r}")
    if not isinstance(spec, (str, Path)):
        raise InputError(
            f"The student is a {type(spec).__name__}; expected a path, a name, a function or a "
            "Keras model."
        )
    text = str(spec).strip()
    if isinstance(spec, Path) or _is_path(text):
        return _loaded(Path(text), custom_objects, trust_model, "student")
    if ":" in text:
        return _called(_function(text), f"Student {text}")
    name, options = _parsed(text)
    if isinstance(teacher, (str, Path)):
        is_keras = Path(teacher).suffix.lower() in KERAS_FILES
        if is_keras or name == "teacher":
            teacher = _loaded(Path(teacher), custom_objects, trust_model, "teacher")
    if name == "teacher":
        return _smaller(text, options, teacher)
    return _named(text, name, options, teacher, input_shape, num_classes, framework)


def smaller(model: Layer, *, width: float = 1.0, depth: float = 1.0) -> Layer:
    """The architecture of a model with new weights, narrower and shallower.

    Args:
      model: functional or sequential, of Keras 3 or tf_keras.
      width: factor of filters, units and the like, above 0 and at most 1.
      depth: factor of the number of blocks, above 0 and at most 1.

    Raises:
      InputError: when nothing can become narrower or be left out, or the model cannot be built.
    """
    for name, factor in (("width", width), ("depth", depth)):
        if isinstance(factor, (bool, str)) or not 0 < factor <= 1:
            raise InputError(
                f"The {name} of a student is {factor}; expected a number above 0 and at most 1, "
                "such as 0.5."
            )
    if graph_of(model) is None:
        raise InputError(
            f"Model {model.name!r} is a subclass of keras.Model or not built, so that its layers "
            f"cannot be put together anew; give {OTHERS}."
        )
    try:
        bypassed = left_out(model, depth) if depth < 1 else {}
        narrowing = Narrowing(model, width)
        made = rebuilt(model, change=narrowing if width < 1 else None, bypassed=bypassed)
    except Exception as error:
        raise InputError(
            f"Model {model.name!r} cannot be made smaller: {first_line(error)}; give {OTHERS}."
        ) from error
    if depth < 1 and not bypassed:
        raise InputError(
            f"Model {model.name!r} has no residual blocks and no repeated layers of which a depth "
            f"of {depth} would leave out any; give a lower depth, or {OTHERS}."
        )
    if width < 1 and not narrowing.num_narrowed:
        raise InputError(
            f"Model {model.name!r} has no layer that a width of {width} would make narrower "
            "without changing its inputs or outputs; give a lower width, or "
            f"{OTHERS}."
        )
    _check_outputs(made, model)
    return made


def _smaller(text: str, options: dict[str, Value], teacher: Any) -> Layer:
    if not is_model(teacher):
        came = "there is none" if teacher is None else f"the teacher is a {type(teacher).__name__}"
        raise InputError(
            f"Student {text!r} needs a Keras model as the teacher, and {came}; give {OTHERS}."
        )
    unknown = sorted(set(options) - {"width", "depth"})
    if unknown:
        raise InputError(
            f"Student {text!r} has no option {unknown[0]!r}; expected width, depth or both, as in "
            "teacher(depth=0.5,width=0.5)."
        )
    return smaller(teacher, **options)  # type: ignore[arg-type]


def _named(
    text: str,
    name: str,
    options: dict[str, Value],
    teacher: Any,
    input_shape: Sequence[int | None] | None,
    num_classes: int | None,
    framework: str,
) -> Layer:
    model = teacher if is_model(teacher) else None
    if input_shape is None:
        input_shape = _only_shape(model, "inputs", text)
    if num_classes is None:
        shape = _only_shape(model, "outputs", text)
        if len(shape) != 1 or shape[0] is None:
            raise InputError(
                f"Student {text!r} makes logits of shape (classes,) for an example, and the "
                f"teacher {shape}; give a file or a function as the student."
            )
        num_classes = shape[0]
    return application(
        name,
        options,
        input_shape=input_shape,
        num_classes=num_classes,
        framework=framework,
        teacher=model,
    )


def _only_shape(model: Layer | None, ends: str, text: str) -> tuple[int | None, ...]:
    """The shape of an example of the only input or output."""
    tensors = getattr(model, ends, None) or []
    if len(tensors) != 1:
        came = f"{len(tensors)} {ends}" if tensors else f"no known {ends}"
        argument = "input_shape" if ends == "inputs" else "num_classes"
        raise InputError(
            f"Student {text!r} has one of the {ends} and the teacher has {came}; give "
            f"{argument}, or a file or a function as the student."
        )
    return tuple(tensors[0].shape)[1:]


def _is_path(text: str) -> bool:
    path = Path(text)
    is_file = path.suffix.lower() in (*KERAS_FILES, ".tflite", ".onnx")
    return is_file or "/" in text or path.exists()


def _loaded(path: Path, custom_objects: str | None, trust_model: bool, role: str) -> Layer:
    if source.check_path(path).suffix.lower() not in KERAS_FILES:
        raise InputError(
            f"{path} cannot be a {role} that is made or trained with Keras: it is no .keras or "
            ".h5 file; give one of these."
        )
    return load_keras_file(path, custom_objects, compile=False, trust_model=trust_model)


def _function(text: str) -> Callable[[], Any]:
    module, _, name = text.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"Student {text} names no function ({error}); expected package.module:function, "
            "importable from here."
        ) from error
    return lambda: found() if callable(found) and not is_model(found) else found


def _called(function: Callable[[], Any], what: str) -> Layer:
    try:
        made = function()
    except Exception as error:
        raise InputError(
            f"{what} failed with {type(error).__name__} ({first_line(error)}); expected a function "
            "that takes nothing and returns a built Keras model."
        ) from error
    return _checked(made, what)


def _checked(model: Any, what: str) -> Layer:
    if not is_model(model):
        raise InputError(
            f"{what} gives a {type(model).__name__}; expected a built model of Keras 3 or tf_keras."
        )
    if not model.built:
        raise InputError(
            f"{what} is model {model.name!r} without input shapes; call it on data once or give it "
            "an Input."
        )
    return model


def _check_outputs(made: Layer, model: Layer) -> None:
    new, old = ([tuple(tensor.shape) for tensor in each.outputs] for each in (made, model))
    if new != old:
        raise InputError(
            f"Model {model.name!r} would give outputs of shapes {new} instead of {old} when it is "
            f"made smaller; give {OTHERS}."
        )


def _parsed(text: str) -> tuple[str, dict[str, Value]]:
    try:
        found = Variant.parse(f"{text}@student")  # spelled as a precision with its options
    except InputError:
        raise InputError(
            f"No student {text!r}: expected teacher(width=0.5), a name of keras.applications such "
            "as MobileNetV2(alpha=0.5), a .keras or .h5 file, or package.module:function."
        ) from None
    return found.precision, dict(found.options)
