"""The model that comes in: load any source once, freeze it once.

Every runtime converts from the same frozen graph, so that differences between variants are
differences between runtimes and not between exporters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfopt.errors import ConversionError, InputError, first_line
from tfopt.graph import SIGNATURE_KEY, FrozenGraph, missing_signature
from tfopt.logs import only_errors
from tfopt.signature import Signature
from tfopt.train import copies
from tfopt.train.layers import is_model_of

FORMATS = "a SavedModel folder, .keras, .h5, .tflite or .onnx"

RISKY_OPS = {
    "WriteFile": "can write files",
    "ReadFile": "can read files",
    "PyFunc": "calls Python",
    "EagerPyFunc": "calls Python",
    "PyFuncStateless": "calls Python",
    "TRTEngineOp": "holds TensorRT engines",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is ready for conversion.

    Attributes:
      name: what the table calls it.
      kind: `saved_model`, `tflite` or `onnx`; Keras models have become SavedModels.
      path: the model as it came, or as its framework exports it.
      frozen: SavedModel of the frozen graph; None for .tflite and .onnx, and when freezing failed.
      signature: inputs and outputs of the chosen signature.
      sha256: hash of the model's files (of weights and configuration for a live model).
      import_modules: modules with custom ops, imported before the model is loaded.
      notes: what a user should know about it, one sentence each.
      origin: of a student: what it was distilled from, in a sentence.
    """

    name: str
    kind: str
    path: Path
    frozen: Path | None
    signature: Signature
    sha256: str
    import_modules: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    origin: str | None = None

    @property
    def frozen_folder(self) -> Path:
        """The SavedModel of the frozen graph.

        Raises:
          ConversionError: when the model could not be frozen; says why.
        """
        if self.frozen is None:
            raise ConversionError(self.notes[-1])
        return self.frozen

    def frozen_graph(self) -> FrozenGraph:
        """The frozen graph, read from disk.

        Raises:
          ConversionError: when the model could not be frozen; says why.
        """
        return FrozenGraph.from_saved_model(self.frozen_folder)


def check_path(path: str | Path) -> Path:
    """Checks that a path looks like a model, without loading anything.

    Raises:
      InputError: when it does not exist or is no model.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"No model at {path}: it does not exist; expected {FORMATS}.")
    if _kind(path) is None:
        what = "a folder without saved_model.pb" if path.is_dir() else f"a {path.suffix} file"
        if (path / "artifact.json").is_file():
            what = "a tfopt artifact, which is converted already"
        raise InputError(f"{path} is no model: it is {what}; expected {FORMATS}.")
    return path


def _kind(path: Path) -> str | None:
    if path.is_dir():
        has_graph = any((path / f"saved_model.{end}").is_file() for end in ("pb", "pbtxt"))
        return "saved_model" if has_graph else None
    return {".keras": "keras", ".h5": "keras", ".tflite": "tflite", ".onnx": "onnx"}.get(
        path.suffix.lower()
    )


def hash_files(path: Path) -> str:
    """SHA-256 over the names and contents of a model's files."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def prepare(
    path: str | Path,
    folder: str | Path,
    *,
    signature: str = SIGNATURE_KEY,
    custom_objects: str | None = None,
    import_modules: Sequence[str] = (),
    name: str | None = None,
    sha256: str | None = None,
) -> Source:
    """Loads a model file or folder, freezes it, and leaves what converters need in `folder`.

    Args:
      path: a SavedModel folder, .keras, .h5, .tflite or .onnx.
      folder: gets `saved_model/` (from Keras files) and `frozen/`; must not be there yet.
      signature: which signature of a SavedModel.
      custom_objects: a module whose public classes and functions Keras may need to load the file.
      import_modules: modules that register TensorFlow custom ops.
      name: what the table calls the model; by default the file's name.
      sha256: the hash, if it was computed from a live model.

    Raises:
      InputError: when the model cannot be loaded as it is.
    """
    path, folder = check_path(path).absolute(), Path(folder).absolute()
    folder.mkdir(parents=True)
    for module in import_modules:
        _import(module, "--import_module")
    kind = _kind(path)
    notes: list[str] = []
    frozen: Path | None = None
    sha256 = sha256 or hash_files(path)
    name = name or path.stem
    if kind in ("tflite", "onnx"):
        from tfopt import runtimes

        runtime = runtimes.get("litert" if kind == "tflite" else "onnxruntime")
        model_signature = runtime.read_signature(path)
    else:
        if kind == "keras":
            path = _export_keras_file(path, folder / "saved_model", custom_objects)
        else:
            notes += _warn_about_ops(path)
            if signature not in list_signatures(path):
                raise missing_signature(path, signature, list_signatures(path))
        try:
            graph = FrozenGraph.from_saved_model(path, signature)
            model_signature = graph.signature
            frozen = folder / "frozen"
            dataclasses.replace(
                graph, signature=dataclasses.replace(model_signature, key=SIGNATURE_KEY)
            ).save(frozen)
        except ConversionError as error:
            model_signature = _read_signature(path, signature)
            notes.append(str(error))
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{path} cannot be loaded: {first_line(error)}; export the model again, or name "
                "its custom ops with --import_module."
            ) from error
    kind = "saved_model" if kind == "keras" else str(kind)
    if not model_signature.inputs:
        raise InputError(f"Signature {model_signature.key!r} of {path} has no inputs to run it on.")
    source = Source(
        name, kind, path, frozen, model_signature, sha256, tuple(import_modules), tuple(notes)
    )
    value = dataclasses.asdict(source) | {"path": str(path), "signature": str(model_signature)}
    value["frozen"] = None if frozen is None else str(frozen)
    (folder / "source.json").write_text(json.dumps(value, indent=2) + "\n")
    return source


def list_signatures(folder: Path) -> list[str]:
    """The signatures of a SavedModel, read from its file without loading the model."""
    keys = {
        key
        for graph in _parse(folder).meta_graphs
        if "serve" in graph.meta_info_def.tags
        for key in graph.signature_def
    }
    return sorted(key for key in keys if not key.startswith("__saved_model"))


def count_ops(folder: Path) -> Counter[str]:
    """How often each op stands in a SavedModel, its function library included.

    Loading a SavedModel runs its initializers, so that this reads the file only.
    """
    counts: Counter[str] = Counter()
    for meta_graph in _parse(folder).meta_graphs:
        counts.update(node.op for node in meta_graph.graph_def.node)
        for function in meta_graph.graph_def.library.function:
            counts.update(node.op for node in function.node_def)
    return counts


def _parse(folder: Path) -> Any:
    from google.protobuf import text_format
    from google.protobuf.message import DecodeError
    from tensorflow.core.protobuf import saved_model_pb2

    message = saved_model_pb2.SavedModel()
    try:
        if (folder / "saved_model.pb").is_file():
            message.ParseFromString((folder / "saved_model.pb").read_bytes())
        else:
            text_format.Parse((folder / "saved_model.pbtxt").read_text(), message)
    except (DecodeError, text_format.ParseError) as error:
        raise InputError(
            f"{folder} is no SavedModel: its saved_model file is damaged; export it again."
        ) from error
    return message


def _warn_about_ops(folder: Path) -> list[str]:
    ops = count_ops(folder)
    return [f"Op {op} {what}." for op, what in RISKY_OPS.items() if ops[op]]


def _read_signature(folder: Path, key: str) -> Signature:
    import tensorflow as tf

    from tfopt.graph import describe_function

    loaded = tf.saved_model.load(str(folder))
    return describe_function(loaded.signatures[key], key)


def _import(module: str, flag: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{flag}={module} cannot be imported ({error}); run in the folder that holds it, or "
            "put that on PYTHONPATH."
        ) from error


def _export_keras_file(path: Path, folder: Path, custom_objects: str | None) -> Path:
    export(load_keras_file(path, custom_objects, compile=False), folder)
    return folder


def load_keras_file(
    path: Path,
    custom_objects: str | None = None,
    *,
    compile: bool = True,
    frameworks: Sequence[str] = ("keras", "tf_keras"),
) -> Any:
    """Loads a .keras or .h5 file with Keras 3, or with tf_keras where only that can.

    Args:
      path: of the file.
      custom_objects: `package.module` with the classes and functions that it needs.
      compile: whether the model is to be compiled if it was when it was saved.
      frameworks: to try, in order.

    Raises:
      InputError: when none of them can load it.
    """
    objects = {}
    if custom_objects:
        module = _import(custom_objects, "--custom_objects")
        objects = {
            key: value
            for key, value in vars(module).items()
            if not key.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value))
        }
    failures = []
    for framework in frameworks:
        try:
            keras = importlib.import_module(framework)
            return keras.models.load_model(path, custom_objects=objects, compile=compile)
        except Exception as error:
            failures.append(f"{framework}: {first_line(error)}")
    raise InputError(
        f"{path} cannot be loaded ({'; '.join(failures)}); custom layers come from "
        "--custom_objects=package.module."
    )


def export(model: Any, folder: Path) -> None:
    """Writes a live model as a SavedModel whose first signature is `serving_default`.

    A Keras model that computes in half precision is written in float32, since converters refuse or
    slow down graphs with casts: precisions are chosen for each variant.

    Args:
      model: a built Keras 3 (TensorFlow backend) or tf_keras model, a `tf.function` with an
        input signature, or a concrete function.
      folder: where to; it must not be there yet.

    Raises:
      InputError: when the model is of another kind or not built.
    """
    if is_model_of(model, "keras") and not model.built:
        raise InputError(
            f"Model {model.name!r} is not built: its input shapes are unknown; call it on data "
            "once or give it an Input."
        )
    with only_errors("absl", "tensorflow"):
        _export(model, folder)


def _export(model: Any, folder: Path) -> None:
    import tensorflow as tf

    if is_model_of(model, "keras"):
        with copies.in_float32(model):
            model.export(str(folder), format="tf_saved_model", verbose=False)
    elif is_model_of(model, "tf_keras"):
        with copies.in_float32(model):
            tf.saved_model.save(model, str(folder))
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
        module = tf.Module()
        module.variables_used = list(concrete.graph.variables)
        module.serve = model
        tf.saved_model.save(module, str(folder), signatures={SIGNATURE_KEY: concrete})
    else:
        raise InputError(
            f"{type(model).__name__} is no model: expected a path to {FORMATS}, a Keras model, "
            "or a tf.function with an input signature."
        )


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
