"""A model of any kind as a teacher: the student's examples in, logits or values out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tfopt import runtimes, saved_model, source
from tfopt.artifact import Artifact
from tfopt.distillation.heads import Heads, by_name
from tfopt.distillation.losses import logits_of
from tfopt.distillation.taps import TappedModel, activations_of, logits_under
from tfopt.errors import InputError, first_line
from tfopt.graph import SIGNATURE_KEY, describe_function, missing_signature
from tfopt.keras_files import load_keras_file
from tfopt.runtimes.base import Session
from tfopt.signature import Signature
from tfopt.train.layers import check_built, is_model

SUM_TOLERANCE = 1e-2  # of probabilities: those of half precision add up to 1 ± 0.004

NUM_CHANNELS = (1, 3, 4)  # of images


@dataclasses.dataclass(frozen=True)
class Taught:
    """What a teacher says about a batch.

    Attributes:
      outputs: one tensor for each of the teacher's outputs, of shape (examples, …), as they are.
      logits: for each output, those that softmax or sigmoid made it of; None where the model does
        not tell.
      features: what the tapped layers made, by name.
      heads: names of the outputs.
    """

    outputs: tuple[Any, ...]
    logits: tuple[Any | None, ...]
    features: dict[str, Any]
    heads: Heads


class Teacher:
    """A trained model that a student learns from.

        Teacher("wide.keras", weight=2.0, preprocessing=lambda images: images / 255.0)

    It runs as in inference and no gradient goes into it. A teacher that is a Keras model or a
    SavedModel is part of the student's compiled training step; a session of another runtime is
    called from it through Python, once a batch, which XLA cannot compile.

    Args:
      model: a Keras 3 or tf_keras model, a `.keras` or `.h5` file, the folder of a SavedModel or of
        a tfopt artifact, or a session that `tfopt.load` returned.
      weight: of this teacher among several, above 0.
      preprocessing: takes the student's inputs, as TensorFlow tensors, and returns the teacher's;
        None gives them as they are. Must not be random: student and teacher see the same.
      input_size: (height, width) in pixels to which images are resized, bilinearly, before
        `preprocessing`; by default what the model itself insists on.
      features: layers of a Keras model to tap, by path.
      signature: which signature of a SavedModel.
      outputs: which of its outputs teaches which of the student's, by the names of the student's;
        needed only where neither names nor shapes tell.

    Attributes:
      name: of the model, for messages.
      outputs: as given.
      is_in_graph: whether it is TensorFlow all through, so that XLA can compile it.

    Raises:
      InputError: when the model cannot be a teacher, or an argument does not fit.
    """

    def __init__(
        self,
        model: Any,
        *,
        weight: float = 1.0,
        preprocessing: Callable[[Any], Any] | None = None,
        input_size: tuple[int, int] | None = None,
        features: Sequence[str] = (),
        signature: str = SIGNATURE_KEY,
        outputs: Mapping[str, str] | None = None,
    ):
        if not 0 < weight < float("inf"):
            raise InputError(
                f"The weight of a teacher is {weight}; expected a number above 0, such as 1."
            )
        self.weight = float(weight)
        self._model = _open(model, features, signature)
        self._features = tuple(features)
        self._preprocessing = preprocessing
        self._size = _image_size(self._model.shape) if input_size is None else input_size
        self.name, self.is_in_graph = self._model.name, self._model.is_in_graph
        self.outputs = dict(outputs or {})

    def tap(self, features: Sequence[str]) -> None:
        """Taps these layers, too.

        Raises:
          InputError: when the model has no such layers.
        """
        names = tuple(dict.fromkeys([*self._features, *features]))
        if names != self._features:
            _check_untapped(self.name, () if self._model.keras is not None else features)
            self._model = _keras(self._model.keras, names)
            self._features = names

    @property
    def keras_model(self) -> Any:
        """The model if it is Keras's, else None."""
        return self._model.keras

    def sha256(self) -> str:
        """Of the files that it came from, or of a live model's weights."""
        return self._model.sha256()

    def __call__(self, inputs: Any) -> Taught:
        """What it says about a batch, also in a `tf.function`.

        Args:
          inputs: the student's: a tensor of shape (examples, …), or a dictionary or tuple of them.
        """
        import tensorflow as tf

        inputs = tf.nest.map_structure(tf.convert_to_tensor, inputs)
        inputs = self._resized(inputs)
        if self._preprocessing is not None:
            inputs = self._preprocessing(inputs)
        made, features = self._model.run(inputs)
        by_head = by_name(made, self._model.layer_names)
        logits = [logits_under(output) for output in by_head.values()]
        return Taught(
            tuple(tf.stop_gradient(output) for output in by_head.values()),
            tuple(None if found is None else tf.stop_gradient(found) for found in logits),
            {name: tf.stop_gradient(found) for name, found in features.items()},
            Heads.of(made, self._model.layer_names),
        )

    def examine(self, inputs: Any) -> tuple[str, ...]:
        """Tells from some examples what made each output: `linear`, `softmax` or `sigmoid`.

        Values from 0 to 1 are taken for probabilities, of softmax if those of an example add up to
        1; an output of which Keras knows that it was made of logits is one of these, too.

        Args:
          inputs: a batch as `__call__` takes it; the more examples, the surer.

        Raises:
          InputError: when the model cannot run on them, or returns values that are not finite.
        """
        try:
            taught = self(inputs)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{self._model.name} cannot run on the student's examples: {first_line(error)}; "
                "give Teacher a preprocessing that makes its inputs of them."
            ) from error
        known = self._model.activations
        found = []
        for name, output in zip(taught.heads.names, taught.outputs, strict=True):
            values = np.asarray(output, np.float32)
            if not np.isfinite(values).all():
                raise InputError(
                    f"Output {name!r} of {self._model.name} is not finite in "
                    f"{1 - np.isfinite(values).mean():.1%} of its values; look at its "
                    "preprocessing and its weights."
                )
            found.append(known.get(name) or activation_of(values))
        return tuple(found)

    def logits(self, taught: Taught, activations: Sequence[str]) -> tuple[Any, ...]:
        """Logits of all outputs, float32.

        They are exact where the model tells them. Elsewhere they are computed from probabilities,
        so that classes below 1e-7 are all alike.

        Args:
          taught: what it said about a batch.
          activations: of its outputs, as `examine` told.
        """
        import tensorflow as tf

        made = []
        for output, logits, activation in zip(
            taught.outputs, taught.logits, activations, strict=True
        ):
            found = tf.cast(output if logits is None else logits, tf.float32)
            is_known = logits is not None or activation == "linear"
            made.append(found if is_known else logits_of(found, activation))
        return tuple(made)

    def _resized(self, inputs: Any) -> Any:
        import tensorflow as tf

        if self._size is None or not tf.is_tensor(inputs) or inputs.shape.rank != 4:
            return inputs
        if tuple(inputs.shape[1:3]) == tuple(self._size):
            return inputs
        return tf.image.resize(inputs, self._size)


@dataclasses.dataclass(frozen=True)
class _Model:
    """A loaded model; `run` returns outputs in their structure, and features by name."""

    name: str
    shape: tuple[int | None, ...] | None  # of its only input
    is_in_graph: bool
    run: Callable[[Any], tuple[Any, dict[str, Any]]]
    sha256: Callable[[], str]
    keras: Any = None  # the model, if it is Keras's
    layer_names: Sequence[str] | None = None  # `output_names`, if it is Keras's
    activations: Mapping[str, str] = dataclasses.field(default_factory=dict)  # if layers tell


def _open(model: Any, features: Sequence[str], signature: str) -> _Model:
    if isinstance(model, (str, Path)):
        path = Path(model)
        if (path / "artifact.json").is_file():
            model = runtimes.load(Artifact.open(path))
        elif source.check_path(path).suffix.lower() in (".keras", ".h5"):
            model = load_keras_file(path, compile=False)
        elif path.is_dir():
            _check_untapped(path.name, features)
            return _saved_model(path, signature)
        else:
            kind = path.suffix[1:].lower()
            runtime = {"tflite": "litert", "onnx": "onnxruntime"}[kind]
            raise InputError(
                f"{path} is a bare .{kind} file; give Teacher the folder that tfopt convert "
                f"--variant=float32@{runtime} makes of it."
            )
    if isinstance(model, Session):
        _check_untapped(model.artifact.folder.name, features)
        return _session(model)
    if is_model(model):
        return _keras(model, features)
    raise InputError(
        f"The teacher is a {type(model).__name__}; expected a Keras model, a path, or a session "
        "that tfopt.load returned."
    )


def _check_untapped(name: str, features: Sequence[str]) -> None:
    if features:
        raise InputError(
            f"{name} has no layers to tap ({', '.join(features)}); expected a Keras model where "
            "features are asked for."
        )


def _keras(model: Any, features: Sequence[str]) -> _Model:
    import tensorflow as tf

    check_built(model)
    tapped = TappedModel(model, features)

    def run(inputs: Any) -> tuple[Any, dict[str, Any]]:
        return tapped(inputs, training=False)

    inputs = tf.nest.flatten(getattr(model, "inputs", None) or [])
    shape = tuple(inputs[0].shape) if len(inputs) == 1 else None
    return _Model(
        f"Model {model.name!r}",
        shape,
        True,
        run,
        lambda: _hash(model),
        model,
        getattr(model, "output_names", None),
        activations_of(model),
    )


def _hash(model: Any) -> str:
    """SHA-256 of a live model's weights; names and configurations change from run to run."""
    digest = hashlib.sha256()
    for weights in model.get_weights():
        digest.update(f"{weights.dtype} {weights.shape} ".encode())
        digest.update(np.ascontiguousarray(weights).tobytes())
    return digest.hexdigest()


def _saved_model(folder: Path, key: str) -> _Model:
    if key not in (known := saved_model.list_signatures(folder)):
        raise missing_signature(folder, key, known)
    loaded = saved_model.load(folder)
    signature = describe_function(loaded.signatures[key], key)

    def run(inputs: Any) -> tuple[Any, dict[str, Any]]:
        # Through `loaded`, which holds the variables.
        return dict(loaded.signatures[key](**_by_name(inputs, signature, folder.name))), {}

    sha256 = functools.partial(source.hash_files, folder)
    return _Model(folder.name, _only_shape(signature), True, run, sha256)


def _session(session: Session) -> _Model:
    import tensorflow as tf

    signature, name = (
        session.signature,
        f"{session.artifact.folder.name} ({session.artifact.variant})",
    )

    def run_here(*arrays: np.ndarray) -> list[np.ndarray]:
        made = _in_batches(session, dict(zip(signature.input_names, arrays, strict=True)))
        return [made[spec.name].astype(spec.dtype, copy=False) for spec in signature.outputs]

    def run(inputs: Any) -> tuple[Any, dict[str, Any]]:
        given = _by_name(inputs, signature, name)
        outputs = tf.numpy_function(
            run_here,
            [given[name] for name in signature.input_names],
            [tf.as_dtype(spec.dtype) for spec in signature.outputs],
            stateful=False,
        )
        outputs = tf.nest.flatten(outputs)  # a single one comes without a list
        for output, spec in zip(outputs, signature.outputs, strict=True):
            if spec.shape is not None:
                output.set_shape((None, *spec.shape[1:]))
        return dict(zip(signature.output_names, outputs, strict=True)), {}

    sha256 = functools.partial(source.hash_files, session.artifact.folder)
    return _Model(name, _only_shape(signature), False, run, sha256)


def _in_batches(session: Session, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs a session that insists on a batch size on examples of any number."""
    size = session.signature.batch_size
    num_examples = len(next(iter(inputs.values())))
    if size is None or size == num_examples:
        return session.run(inputs)
    made = []
    for start in range(0, num_examples, size):
        some = {name: array[start : start + size] for name, array in inputs.items()}
        missing = size - len(next(iter(some.values())))
        if missing:
            some = {
                name: np.concatenate([array, np.repeat(array[-1:], missing, 0)])
                for name, array in some.items()
            }
        made.append(session.run(some))
    return {name: np.concatenate([each[name] for each in made])[:num_examples] for name in made[0]}


def _by_name(inputs: Any, signature: Signature, name: str) -> dict[str, Any]:
    """Inputs as a signature takes them, with its dtypes."""
    import tensorflow as tf

    names = signature.input_names
    if not isinstance(inputs, Mapping):
        values = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
        if len(values) != len(names) or len(values) > 1:
            raise InputError(
                f"{name} takes {len(names)} inputs by name; give Teacher a preprocessing that "
                f"returns a dictionary of {', '.join(names)}."
            )
        inputs = {names[0]: values[0]}
    if set(inputs) != set(names):
        raise InputError(
            f"{name} got inputs {', '.join(inputs)}; expected {', '.join(names)}: give Teacher a "
            "preprocessing that returns a dictionary of these."
        )
    dtypes = {spec.name: spec.dtype for spec in signature.inputs}
    return {
        name: value if value.dtype == tf.string else tf.cast(value, dtypes[name])
        for name, value in inputs.items()
    }


def _only_shape(signature: Signature) -> tuple[int | None, ...] | None:
    return signature.inputs[0].shape if len(signature.inputs) == 1 else None


def _image_size(shape: tuple[int | None, ...] | None) -> tuple[int, int] | None:
    """Height and width that a model of images insists on, if it has channels last."""
    if shape is None or len(shape) != 4 or shape[-1] not in NUM_CHANNELS:
        return None
    height, width = shape[1:3]
    return None if height is None or width is None else (height, width)


def activation_of(values: np.ndarray) -> str:
    """What made outputs of shape (examples, …), by their values: linear, softmax or sigmoid."""
    if values.size == 0 or values.min() < 0 or values.max() > 1:
        return "linear"
    is_one = values.ndim > 1 and values.shape[-1] > 1
    if is_one and np.abs(values.sum(-1) - 1).max() <= SUM_TOLERANCE:
        return "softmax"
    return "sigmoid"
