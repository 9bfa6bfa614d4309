"""SavedModels on disk: which MetaGraph is served, its signatures and operations, and loading it."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tfopt.errors import ConversionError, InputError

SERVE = "serve"

RISKY_OPS = {
    "WriteFile": "can write files",
    "ReadFile": "can read files",
    "PyFunc": "calls Python",
    "EagerPyFunc": "calls Python",
    "PyFuncStateless": "calls Python",
    "TRTEngineOp": "holds TensorRT engines",
}

_COMPOSITES = {"RAGGED_TENSOR_SPEC": "ragged", "SPARSE_TENSOR_SPEC": "sparse"}


def tags_of(folder: str | Path) -> list[str]:
    """The tags of the MetaGraph that is served: {serve}, or else the fewest that contain it.

    Raises:
      InputError: when no MetaGraph is tagged `serve`.
    """
    return sorted(_served(Path(folder)).meta_info_def.tags)


def load(folder: str | Path) -> Any:
    """`tf.saved_model.load` of the MetaGraph that is served.

    Raises:
      InputError: when no MetaGraph is tagged `serve`.
    """
    import tensorflow as tf

    return tf.saved_model.load(os.fspath(folder), tags=tags_of(folder))


def save_options() -> Any:
    """Options for `tf.saved_model.save` of a graph that only runs forward.

    Custom gradients, such as those of swish, capture tensors that an exported or frozen graph has
    lost; saving them fails.
    """
    import tensorflow as tf

    return tf.saved_model.SaveOptions(experimental_custom_gradients=False)


def list_signatures(folder: Path) -> list[str]:
    """The signatures of a SavedModel, read from its file without loading the model."""
    return sorted(
        key for key in _served(folder).signature_def if not key.startswith("__saved_model")
    )


def count_ops(folder: Path) -> Counter[str]:
    """How often each op stands in the served graph, its function library included.

    Loading a SavedModel runs its initializers, so that this reads the file only.
    """
    graph_def = _served(folder).graph_def
    counts = Counter(node.op for node in graph_def.node)
    for function in graph_def.library.function:
        counts.update(node.op for node in function.node_def)
    return counts


def is_session_based(folder: Path) -> bool:
    """Whether TensorFlow reads it as a session of TensorFlow 1 does, without Python objects.

    It does so where there are none, and where there are several MetaGraphs.
    """
    return len(_parse(folder).meta_graphs) > 1 or not _served(folder).HasField("object_graph_def")


def check_inputs(folder: Path, key: str) -> None:
    """Checks that no input of a signature is a ragged or sparse tensor.

    TensorFlow splits such an input `f` into its parts `f`, `f_1`, …, which look like dense inputs.

    Raises:
      InputError: names the input and its kind.
    """
    from tensorflow.core.protobuf import struct_pb2

    meta_graph = _served(folder)
    names = set(meta_graph.signature_def[key].inputs)
    parts = sorted(name for name in names if f"{name}_1" in names)
    for function in meta_graph.object_graph_def.concrete_functions.values() if parts else ():
        for kind in _composites_in(function.canonicalized_input_signature):
            known = struct_pb2.TypeSpecProto.TypeSpecClass.Name(kind)
            raise composite_error("Input", parts[0], _COMPOSITES.get(known, known.lower()))


def composite_error(what: str, name: str, kind: str) -> InputError:
    """The error for an input or output that is no dense tensor.

    Args:
      what: `Input` or `Output`.
      name: in the signature.
      kind: such as `ragged`, or the name of a class.
    """
    if kind.endswith(("Spec", "Tensor")):
        kind = kind.removesuffix("Spec").removesuffix("Tensor").lower()
    verb = "pass" if what == "Input" else "return"
    method = {"ragged": " (to_tensor)", "sparse": " (tf.sparse.to_dense)"}.get(kind, "")
    return InputError(
        f"{what} {name!r} is a {kind} tensor, which other runtimes do not have; export a signature "
        f"that takes and returns dense tensors only: {verb} it padded to a fixed length{method}, "
        "or leave it out."
    )


def warn_about_ops(folder: Path) -> list[str]:
    """A sentence for each kind of operation that can do more than compute."""
    ops = count_ops(folder)
    return [f"Op {op} {what}." for op, what in RISKY_OPS.items() if ops[op]]


def check_tables(graph_def: Any) -> None:
    """Checks that a graph has no lookup tables, which cannot become constants.

    Raises:
      ConversionError: counts the lookups and says what that means.
    """
    nodes = [*graph_def.node, *(n for f in graph_def.library.function for n in f.node_def)]
    lookups = [node.name for node in nodes if node.op.startswith("LookupTableFind")]
    tables = [node.name for node in nodes if "HashTable" in node.op]
    if lookups or tables:
        names = sorted({_layer_of(name) for name in lookups or tables})
        raise ConversionError(
            f"The model cannot be frozen: it looks values up in tables ({', '.join(names[:3])}), "
            "which are no constants, so it runs on TensorFlow as saved only; export a signature "
            "that takes the numbers behind the tables and leaves the lookups outside."
        )


def check_changes_nothing(graph_def: Any, ops: str = "Assign|Rng") -> None:
    """Checks that a graph changes no variable when it runs, since constants do not change.

    Args:
      graph_def: the graph.
      ops: how operations that do begin, as a regular expression.

    Raises:
      ConversionError: names the layers.
    """
    nodes = [*graph_def.node, *(n for f in graph_def.library.function for n in f.node_def)]
    names = sorted({_layer_of(node.name) for node in nodes if re.match(ops, node.op)})
    if names:
        raise ConversionError(
            f"The model cannot be frozen: {', '.join(names[:3])} would change variables when it "
            "runs (as batch normalization with training=True and random generators do), so it runs "
            "on TensorFlow as saved only; export it with training=False, or leave that layer out."
        )


def _layer_of(name: str) -> str:
    """The layer that a lookup belongs to, by the name of its node, or else its table."""
    scopes = [part for part in name.split("/") if not part.endswith("PartitionedCall")]
    inner = [part for part in scopes[:-1] if not part.endswith("_Lookup")]
    return (inner or scopes)[-1]


def _composites_in(value: Any) -> list[int]:
    kind = value.WhichOneof("kind")
    if kind == "type_spec_value":
        known = value.type_spec_value.type_spec_class
        names = value.type_spec_value.DESCRIPTOR.enum_types_by_name["TypeSpecClass"]
        return [known] if names.values_by_number[known].name in _COMPOSITES else []
    if kind in ("list_value", "tuple_value", "named_tuple_value"):
        found = getattr(value, kind).values
        inside = [getattr(item, "value", item) for item in found]
    elif kind == "dict_value":
        inside = list(value.dict_value.fields.values())
    else:
        return []
    return [found for item in inside for found in _composites_in(item)]


def _served(folder: Path) -> Any:
    graphs = [g for g in _parse(folder).meta_graphs if SERVE in g.meta_info_def.tags]
    if not graphs:
        found = [sorted(g.meta_info_def.tags) for g in _parse(folder).meta_graphs]
        raise InputError(
            f"{folder} has no graph with the tag 'serve'; its tags are "
            f"{', '.join(map(str, found)) or 'none'}; export it for serving."
        )
    return min(graphs, key=lambda graph: len(graph.meta_info_def.tags))


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
    except (DecodeError, text_format.ParseError, UnicodeDecodeError, OSError) as error:
        raise InputError(
            f"{folder} is no SavedModel: its saved_model file is damaged; export it again."
        ) from error
    return message
