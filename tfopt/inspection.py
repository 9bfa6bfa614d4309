"""What is in a model: signatures, size, layers, ops, dtypes, parameters, duplicated weights."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfopt import live, saved_model
from tfopt import source as sources
from tfopt.errors import ConversionError, InputError
from tfopt.graph import SIGNATURE_KEY
from tfopt.isolation import Worker


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
      path: the model.
      kind: `saved_model`, `tflite` or `onnx`.
      signature: the chosen signature, in words.
      signatures: names of all.
      size_bytes: of all its files.
      num_parameters: values in constants of the frozen graph, each weight counted once.
      duplicated_bytes: bytes that hold a weight a second time.
      ops: how often each op stands in it.
      dtypes: bytes of weights by dtype.
      layers: (name, parameters) of the layers with weights, the largest first.
      notes: what deserves attention, such as ops that write files.
    """

    path: str
    kind: str
    signature: str
    signatures: tuple[str, ...]
    size_bytes: int
    num_parameters: int
    duplicated_bytes: int
    ops: dict[str, int]
    dtypes: dict[str, int]
    layers: tuple[tuple[str, int], ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        from tfopt.compare.text import size

        lines = [
            f"{self.path} ({self.kind}, {size(self.size_bytes)})",
            f"signatures: {', '.join(self.signatures)}",
            f"signature {self.signature}",
            f"parameters: {self.num_parameters:,}",
            f"weights: {', '.join(f'{size(v)} {k}' for k, v in self.dtypes.items()) or 'none'}",
            f"duplicated weights: {size(self.duplicated_bytes)}",
            "ops: " + ", ".join(f"{count} {op}" for op, count in self.ops.items()),
            f"layers with weights: {len(self.layers)}",
            *(f"  {name}: {count:,}" for name, count in self.layers[:20]),
            *([f"  … and {len(self.layers) - 20} smaller"] if len(self.layers) > 20 else []),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)


def inspect(
    model: Any,
    *,
    signature: str = SIGNATURE_KEY,
    custom_objects: str | None = None,
    import_modules: Sequence[str] = (),
    trust_model: bool = False,
) -> Inspection:
    """Describes a model; it is loaded in a child process.

    Args:
      model: as `tfopt.optimize` takes it.
      signature: of a SavedModel.
      custom_objects: module with the Keras layers and functions that the file needs.
      import_modules: modules that register TensorFlow custom ops.
      trust_model: whether Python code that is stored in a Keras file may run.

    Raises:
      InputError: when it is no model or cannot be loaded.
    """
    with tempfile.TemporaryDirectory(prefix="tfopt-") as name:
        common: dict[str, Any] = {}
        if isinstance(model, (str, Path)):
            path = sources.check_path(model)
        else:
            path = Path(name, "live")
            live.export(model, path)
            common["name"] = getattr(model, "name", None) or "model"
        with Worker(
            Path(name, "inspect.log"), import_modules=import_modules, keeps_log=False
        ) as worker:
            try:
                return worker.call(
                    "tfopt.inspection:inspect_path",
                    path,
                    Path(name, "source"),
                    signature=signature,
                    custom_objects=custom_objects,
                    import_modules=tuple(import_modules),
                    trust_model=trust_model,
                    **common,
                )
            except ConversionError as error:
                raise InputError(f"{path} cannot be loaded: {error}") from error


def inspect_path(path: Path, folder: Path, **options: Any) -> Inspection:
    """Describes a model file or folder in this process; arguments as `tfopt.source.prepare`."""
    source = sources.prepare(path, folder, **options)
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    weights, ops = _read_weights(source)
    seen: set[bytes] = set()
    layers: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, content, dtype, count in weights:
        digest = hashlib.sha256(content).digest() + dtype.encode()
        if digest not in seen:
            seen.add(digest)
            layers[name] += count
            dtypes[dtype] += len(content)
    return Inspection(
        path=str(path),
        kind=source.kind,
        signature=str(source.signature),
        signatures=tuple(
            saved_model.list_signatures(source.path)
            if source.kind == "saved_model"
            else [source.signature.key]
        ),
        size_bytes=sum(file.stat().st_size for file in files),
        num_parameters=sum(layers.values()),
        duplicated_bytes=_duplicated_bytes(source),
        ops=dict(ops.most_common()),
        dtypes=dict(dtypes.most_common()),
        layers=tuple(layers.most_common()),
        notes=source.notes,
    )


_Weight = tuple[str, bytes, str, int]  # layer, content, dtype, number of values


def _read_weights(source: sources.Source) -> tuple[list[_Weight], Counter[str]]:
    """Weights and ops of a source; constants of a single value are no weights."""
    if source.kind == "onnx":
        import onnx
        from onnx import numpy_helper

        model = onnx.load(source.path)
        arrays = [
            (tensor.name, numpy_helper.to_array(tensor)) for tensor in model.graph.initializer
        ]
        ops = Counter(node.op_type for node in model.graph.node)
    elif source.kind == "tflite":
        return _read_tflite(source.path)
    elif source.frozen is None:
        return [], saved_model.count_ops(source.path)
    else:
        import tensorflow as tf

        graph_def = source.unchanged_graph().graph_def
        nodes = [*graph_def.node, *(n for f in graph_def.library.function for n in f.node_def)]
        ops = Counter(node.op for node in nodes)
        readers: dict[str, str] = {}
        for node in nodes:
            for name in node.input:
                readers.setdefault(name.lstrip("^").split(":")[0], node.name)
        arrays = [
            (_layer(node.name, readers), tf.make_ndarray(node.attr["value"].tensor))
            for node in nodes
            if node.op == "Const"
        ]
    weights = [
        (name, array.tobytes(), array.dtype.name, array.size)
        for name, array in arrays
        if (array.size > 1 and array.dtype.kind in "fV") or array.dtype.name == "int8"
    ]
    return weights, ops


def _read_tflite(path: Path) -> tuple[list[_Weight], Counter[str]]:
    from tfopt.litert import flatbuffer

    model = flatbuffer.read(path.read_bytes())
    weights: list[_Weight] = []
    ops: Counter[str] = Counter()
    for subgraph in model.subgraphs:
        for operator in subgraph.operators:
            ops[flatbuffer.op_name(model, operator)] += 1
        for tensor in subgraph.tensors:
            data = model.buffers[tensor.buffer].data
            count = 1
            for size in tensor.shape if tensor.shape is not None else ():
                count *= int(size)
            if data is not None and count > 1:
                name, dtype = flatbuffer.text(tensor.name), flatbuffer.type_name(tensor).lower()
                weights.append((name, bytes(data), dtype, count))
    return weights, ops


def _layer(name: str, readers: dict[str, str]) -> str:
    """The layer that a constant of a frozen graph belongs to.

    A frozen variable has no name of its own (`unknown_7`), and neither have the ops that inlining
    puts behind it (`Func/…`); the first op that reads it through those stands in its layer.
    """
    while ("unknown" in name.split("/")[-1] or "Func/" in name) and name in readers:
        name = readers[name]
    parts = [part for part in name.split("/") if not part.endswith("PartitionedCall")]
    return "/".join(parts[:-2]) if len(parts) > 2 else parts[0]


def _duplicated_bytes(source: sources.Source) -> int:
    """Bytes of variables whose content the SavedModel stores a second time."""
    if source.kind != "saved_model":
        return 0
    import tensorflow as tf

    prefix = source.path / "variables" / "variables"
    if not prefix.with_suffix(".index").is_file():
        return 0
    reader = tf.train.load_checkpoint(str(prefix))
    seen: set[bytes] = set()
    duplicated = 0
    for key in reader.get_variable_to_shape_map():
        value = reader.get_tensor(key)
        if not hasattr(value, "nbytes") or value.dtype.kind not in "fV" or value.size <= 1:
            continue
        digest = hashlib.sha256(value.tobytes()).digest()
        duplicated += value.nbytes if digest in seen else 0
        seen.add(digest)
    return duplicated
