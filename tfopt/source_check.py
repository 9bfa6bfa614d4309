"""Does the graph that everything is converted from compute what the model computes?

Keras models are compared with their own `predict` on real examples. Graphs that came without a
Keras model are run twice, since nothing can be compared with a model whose outputs are random.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import live, saved_model
from tfopt.dataset import Dataset
from tfopt.errors import MAX_REASON, InputError, first_line
from tfopt.isolation import Worker
from tfopt.keras_files import load_keras_file
from tfopt.signature import Signature
from tfopt.source import Source
from tfopt.train import copies
from tfopt.train.compiling import overrider
from tfopt.train.layers import is_model, is_model_of

NUM_EXAMPLES = 64
BATCH_SIZE = 16
NUM_ALONE = 4
MAX_BYTES = 64 << 20  # of outputs that are kept
MAX_ERROR = 1e-3
"""Of an output's spread; rounding in float32 stays below 1e-4 also in deep networks."""
MAX_SHARE = 0.05  # of whole numbers that may differ: close calls of an argmax inside

Arrays = dict[str, np.ndarray]


def is_keras(model: Any) -> bool:
    """Whether a model is Keras's: a live one, or the path of its file."""
    if isinstance(model, Path):
        return model.suffix.lower() in (".keras", ".h5")
    return is_model(model)


def check_model(
    worker: Worker,
    model: Any,
    source: Source,
    data: Dataset,
    *,
    example: Any = None,
    custom_objects: str | None = None,
    trust_model: bool = False,
) -> tuple[str, ...]:
    """Checks what a model became; a Keras file is loaded in a worker, a live model is run here.

    Args:
      worker: runs the graph.
      model: as it came: a path or a live model.
      source: what it became.
      data: gives the examples.
      example: as `load_keras_file` takes it.
      custom_objects: likewise.
      trust_model: likewise.

    Returns:
      What a user should know about the model, one sentence each.

    Raises:
      InputError: as `check` and `predictions`.
      ConversionError: when the graph does not run.
    """
    if source.kind != "saved_model":
        return ()
    expected: list[Arrays] = []
    if is_keras(model) and isinstance(model, Path):
        expected = worker.call(
            "tfopt.source_check:predictions_of_file",
            model.absolute(), data, source.signature, custom_objects, trust_model, example,
        )  # fmt: skip
    elif is_keras(model):
        expected = predictions(model, data, source.signature)
    notes = worker.call("tfopt.source_check:check", source, data, expected)
    if is_model(model) and overrider(model, "predict_step") is not None:
        notes += (
            f"Model {model.name!r} has a predict_step of its own, which is not part of the graph: "
            "variants return what the model returns when it is called.",
        )
    return notes


def predictions(model: Any, data: Dataset, signature: Signature) -> list[Arrays]:
    """What a Keras model's `predict` returns for up to 64 examples, batch by batch.

    It computes in float32 and without XLA, as the exported graph does. A `predict_step` of the
    model's own is passed over, since what is exported is what the model returns when it is called.

    Args:
      model: of either Keras; it stays as it is.
      data: gives the examples.
      signature: of the exported model; its names are those of the arrays.

    Raises:
      InputError: when the model does not run on the data.
    """
    structure = live.named_inputs(model)
    run = model.predict_on_batch
    if overrider(model, "predict_step") is not None:
        run = functools.partial(model, training=False)
    found: list[Arrays] = []
    with copies.in_float32(model), _without_xla(model):
        for inputs, count in _batches(data, signature, found):
            try:
                made = run(_packed(structure, inputs))
            except Exception as error:  # layers of the user's raise whatever they raise
                raise InputError(
                    f"Model {model.name!r} cannot run on the data: "
                    f"{first_line(error)[:MAX_REASON]}; give data as predict takes them."
                ) from error
            found.append(_first_rows(_named(model, made, signature), count))
    return found


def predictions_of_file(
    path: Path,
    data: Dataset,
    signature: Signature,
    custom_objects: str | None = None,
    trust_model: bool = False,
    example: Any = None,
) -> list[Arrays]:
    """As `predictions`, of a Keras file; arguments as `load_keras_file`."""
    model = load_keras_file(
        path, custom_objects, compile=False, trust_model=trust_model, example=example
    )
    if live.needs_call(model):
        live.call_once(model, example)
    return predictions(model, data, signature)


def check(source: Source, data: Dataset, expected: Sequence[Arrays] = ()) -> tuple[str, ...]:
    """Checks that a SavedModel gives the same outputs twice, and those that are expected.

    Args:
      source: of a model of TensorFlow or Keras.
      data: gives the examples.
      expected: what `predictions` returned; empty where there is no Keras model.

    Returns:
      A note where an example's outputs depend on the others of its batch; else nothing.

    Raises:
      InputError: names the output and how far it is off.
    """
    import tensorflow as tf

    loaded = saved_model.load(source.path)
    function = loaded.signatures[source.signature.key]

    def run(inputs: Arrays) -> Arrays:
        outputs = function(**{name: tf.constant(value) for name, value in inputs.items()})
        return {name: value.numpy() for name, value in outputs.items()}

    first: list[Arrays] = []
    second: list[Arrays] = []
    change: str | None = None
    for number, (inputs, count) in enumerate(_batches(data, source.signature, first)):
        for made in (first, second):
            made.append(_first_rows(run(inputs), count))
        if number == 0:
            change = _change_alone(run, inputs, source.signature, count)
    if (found := _largest_difference(second, first)) is not None:
        raise InputError(
            f"Two runs of {source.name} on the same inputs differ: {found}; something in it is "
            "random or keeps a state, also in inference (such as dropout with training=True), so "
            "that nothing can be compared with it; leave that out of the model."
        )
    if expected and (found := _largest_difference(first, expected)) is not None:
        raise InputError(
            f"The graph exported from {source.name} does not compute what its predict computes: "
            f"{found}; export the model yourself (model.export) and give the folder."
        )
    if change is None:
        return ()
    return (
        "Outputs depend on which examples share a batch (such as batch normalization with "
        f"training=True): of examples that run alone, {change}.",
    )


def _first_rows(outputs: Arrays, count: int) -> Arrays:
    """Outputs without the rows that fill a batch."""
    return {name: value[:count] if value.ndim else value for name, value in outputs.items()}


def _change_alone(
    run: Callable[[Arrays], Arrays], inputs: Arrays, signature: Signature, count: int
) -> str | None:
    """What changes when the first examples of a batch run alone, in words, or None."""
    import tensorflow as tf

    is_batched = all(spec.shape and spec.shape[0] is None for spec in signature.inputs)
    if not is_batched or count < 2:
        return None
    together, size = run(inputs), len(next(iter(inputs.values())))
    rows = range(min(count, NUM_ALONE))
    try:
        alone = [run({name: value[i : i + 1] for name, value in inputs.items()}) for i in rows]
    except tf.errors.OpError:  # it takes no batches of one
        return None
    names = [
        name
        for name, value in together.items()
        if value.shape[:1] == (size,) and all(each[name].shape[:1] == (1,) for each in alone)
    ]
    return _largest_difference(
        [{name: each[name] for name in names} for each in alone],
        [{name: together[name][i : i + 1] for name in names} for i in rows],
    )


def _batches(
    data: Dataset, signature: Signature, made: Sequence[Arrays]
) -> Iterator[tuple[Arrays, int]]:
    """Inputs of up to 64 examples, until enough outputs were made of them."""
    size = signature.batch_size or BATCH_SIZE
    for inputs, _, count in data.evaluation.batches(signature, size, limit=NUM_EXAMPLES):
        yield inputs, count
        if sum(array.nbytes for arrays in made for array in arrays.values()) > MAX_BYTES:
            return


def _packed(structure: Any, inputs: Arrays) -> Any:
    """Inputs by name in a model's own structure."""
    import tensorflow as tf

    if len(inputs) == 1 and not isinstance(structure, (Mapping, list, tuple)):
        return next(iter(inputs.values()))
    return tf.nest.map_structure(lambda name: inputs[name], structure)


def _named(model: Any, made: Any, signature: Signature) -> Arrays:
    """Outputs by their names in the signature, which Keras gives by key or place."""
    import tensorflow as tf

    flat = [np.asarray(value) for value in tf.nest.flatten(made)]
    names: Sequence[str] = [f"output_{index}" for index in range(len(flat))]
    if is_model_of(model, "tf_keras"):
        names = model.output_names or [f"output_{index + 1}" for index in range(len(flat))]
    elif isinstance(made, Mapping):
        names = sorted(made)
    if sorted(names) != sorted(signature.output_names):
        raise InputError(
            f"Model {model.name!r} returns {', '.join(names)} from predict and "
            f"{', '.join(signature.output_names)} when it is called; export what is to be "
            "optimized yourself (model.export) and give the folder."
        )
    return dict(zip(names, flat, strict=True))


@contextlib.contextmanager
def _without_xla(model: Any) -> Iterator[None]:
    """Inside, a model predicts without XLA, which computes some layers otherwise."""
    before = {
        name: getattr(model, name)
        for name in ("_jit_compile", "predict_function")
        if hasattr(model, name)
    }
    model._jit_compile = False
    model.predict_function = None
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model, name, value)


def _largest_difference(got: Sequence[Arrays], expected: Sequence[Arrays]) -> str | None:
    """The output that differs most beyond rounding, in words, or None."""
    worst, told = 1.0, None
    for name in expected[0]:
        pairs = [(one[name], other[name]) for one, other in zip(got, expected, strict=False)]
        excess, words = _difference(pairs)
        if excess > worst:
            worst, told = excess, f"output {name!r} {words}"
    return told


def _difference(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[float, str]:
    """How far arrays are apart, as a multiple of what rounding explains, and in words."""
    for one, other in pairs:
        if one.shape != other.shape:
            return np.inf, f"has shape {one.shape} instead of {other.shape}"
    if not all(np.issubdtype(other.dtype, np.inexact) for _, other in pairs):
        share = float(np.mean(np.concatenate([(one != other).ravel() for one, other in pairs])))
        return share / MAX_SHARE, f"differs in {share:.1%} of its values"
    one, other = (
        np.concatenate([array.ravel() for array in arrays]).astype(np.float64)
        for arrays in zip(*pairs, strict=True)
    )
    if not np.array_equal(np.isfinite(one), np.isfinite(other)):
        share = float(np.mean(np.isfinite(one) != np.isfinite(other)))
        return np.inf, f"is finite elsewhere in {share:.1%} of its values"
    is_finite = np.isfinite(other)
    one, other = one[is_finite], other[is_finite]
    if not other.size:
        return 0.0, ""
    # A constant output has no spread, but rounding all the same.
    scale = max(float(other.std()), 1e-2 * float(np.abs(other).max()), 1e-30)
    error = float(np.sqrt(np.mean(np.square(one - other)))) / scale
    return error / MAX_ERROR, f"is off by {error:.2g} of its spread"
