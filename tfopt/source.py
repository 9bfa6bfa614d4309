"""The model that comes in: load any source once, freeze it once.

Every runtime converts from the same frozen graph, so that differences between variants are
differences between runtimes and not between exporters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfopt import keras_names, live, saved_model
from tfopt.errors import MAX_REASON, ConversionError, InputError, first_line
from tfopt.float32_graph import computes_in, to_float32
from tfopt.graph import SIGNATURE_KEY, FrozenGraph, describe_function, missing_signature
from tfopt.keras_files import import_module, load_keras_file
from tfopt.signature import Signature

FORMATS = "a SavedModel folder, .keras, .h5, .tflite or .onnx"


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that is ready for conversion.

    Attributes:
      name: what the table calls it.
      kind: `saved_model`, `tflite` or `onnx`; Keras models have become SavedModels.
      path: the model as it came, or as its framework exports it.
      frozen: SavedModel of the frozen graph in float32, which converters start from; None for
        .tflite and .onnx, and when freezing failed.
      signature: inputs and outputs of the chosen signature.
      sha256: hash of the model's files (of weights and configuration for a live model).
      import_modules: modules with custom ops, imported before the model is loaded.
      notes: what a user should know about it, one sentence each.
      origin: of a student: what it was distilled from, in a sentence.
      not_frozen: why there is no frozen graph of a SavedModel, in a sentence.
      frozen_unchanged: the frozen graph in its own dtypes, where that is another one than `frozen`.
      computes_in: `float64`, `float16` or `bfloat16` where some operations of the model as it came
        compute in it (the coarsest), else `float32`. A variant of a model in half precision differs
        from it by the rounding of half precision, and is the more exact of the two.
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
    not_frozen: str | None = None
    frozen_unchanged: Path | None = None
    computes_in: str = "float32"

    @property
    def frozen_folder(self) -> Path:
        """The SavedModel of the frozen graph in float32.

        Raises:
          ConversionError: when the model could not be frozen; says why.
        """
        if self.frozen is None:
            raise ConversionError(self.not_frozen or f"A .{self.kind} file has no frozen graph.")
        return self.frozen

    def frozen_graph(self) -> FrozenGraph:
        """The frozen graph in float32, read from disk.

        Raises:
          ConversionError: when the model could not be frozen; says why.
        """
        return FrozenGraph.from_saved_model(self.frozen_folder)

    def unchanged_graph(self) -> FrozenGraph:
        """The frozen graph with the dtypes that the model has, read from disk.

        Raises:
          ConversionError: when the model could not be frozen; says why.
        """
        return FrozenGraph.from_saved_model(self.frozen_unchanged or self.frozen_folder)


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
    trust_model: bool = False,
    example: Any = None,
    name: str | None = None,
    sha256: str | None = None,
) -> Source:
    """Loads a model file or folder, freezes it, and leaves what converters need in `folder`.

    Args:
      path: a SavedModel folder, .keras, .h5, .tflite or .onnx.
      folder: gets `saved_model/` (from Keras files) and `frozen/`; must not be there yet.
      signature: which signature of a SavedModel or .tflite file.
      custom_objects: a module whose public classes and functions Keras may need to load the file.
      import_modules: modules that register TensorFlow custom ops.
      trust_model: whether Python code that is stored in a Keras file may run.
      example: inputs of a few examples; a Keras model that was never called is called on them.
      name: what the table calls the model; by default the file's name.
      sha256: the hash, if it was computed from a live model.

    Raises:
      InputError: when the model cannot be loaded as it is.
    """
    path, folder = check_path(path).absolute(), Path(folder).absolute()
    folder.mkdir(parents=True)
    for module in import_modules:
        import_module(module, "import_modules")
    kind = _kind(path)
    notes: list[str] = []
    frozen: Path | None = None
    not_frozen: str | None = None
    unchanged: Path | None = None
    computed = "float32"
    sha256 = sha256 or hash_files(path)
    name = name or path.stem
    if kind in ("tflite", "onnx"):
        from tfopt import runtimes

        runtime = runtimes.get("litert" if kind == "tflite" else "onnxruntime")
        model_signature = runtime.read_signature(path, signature)
    else:
        if kind == "keras":
            model = load_keras_file(
                path, custom_objects, compile=False, trust_model=trust_model, example=example
            )
            path = folder / "saved_model"
            live.export(model, path, example)
        else:
            notes += saved_model.warn_about_ops(path)
            if signature not in (known := saved_model.list_signatures(path)):
                raise missing_signature(path, signature, known)
        try:
            graph = FrozenGraph.from_saved_model(path, signature)
            model_signature = graph.signature
            frozen = folder / "frozen"
            graph = dataclasses.replace(
                graph, signature=dataclasses.replace(model_signature, key=SIGNATURE_KEY)
            )
            if (computed := computes_in(graph)) != "float32":
                graph, unchanged, note = _in_float32(graph, computed, folder)
                notes.append(note)
            graph.save(frozen)
        except ConversionError as error:
            model_signature = _read_signature(path, signature)
            not_frozen = str(error)
            notes.append(not_frozen)
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"{path} cannot be loaded: {first_line(error)[:MAX_REASON]}; export the model "
                "again, or name the modules of its custom ops with `import_modules`."
            ) from error
    kind = "saved_model" if kind == "keras" else str(kind)
    if not model_signature.inputs:
        raise InputError(f"Signature {model_signature.key!r} of {path} has no inputs to run it on.")
    source = Source(
        name, kind, path, frozen, keras_names.read(path, model_signature), sha256,
        tuple(import_modules), tuple(notes), not_frozen=not_frozen, frozen_unchanged=unchanged,
        computes_in=computed,
    )  # fmt: skip
    value = dataclasses.asdict(source) | {"path": str(path), "signature": str(model_signature)}
    for field in ("frozen", "frozen_unchanged"):
        value[field] = None if value[field] is None else str(value[field])
    (folder / "source.json").write_text(json.dumps(value, indent=2) + "\n")
    return source


def _in_float32(
    graph: FrozenGraph, computed: str, folder: Path
) -> tuple[FrozenGraph, Path | None, str]:
    """The graph in float32, where the unchanged one was saved, and what a user should know."""
    try:
        in_float32 = to_float32(graph)
    except ConversionError as error:
        return graph, None, f"The model computes in {computed}. {error}"
    graph.save(folder / "frozen_unchanged")
    note = (
        f"The model computes in {computed}; variants start from it in float32, except "
        "float32@tensorflow, which runs it as it is."
    )
    return in_float32, folder / "frozen_unchanged", note


def _read_signature(folder: Path, key: str) -> Signature:
    loaded = saved_model.load(folder)
    return describe_function(loaded.signatures[key], key)
