"""A frozen graph in float32, made from one in float64 or half precision.

Converters take float32: LiteRT has no kernel for the others, ONNX Runtime and OpenVINO compute
float64 slowly and quantize float32 only. Each variant chooses its own precision, so that all of
them start from float32. Inputs and outputs keep their dtype; a cast stands behind each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np

from tfopt.errors import ConversionError, first_line
from tfopt.graph import FrozenGraph, copy_graph_def, rename_functions

OTHER_DTYPES = ("bfloat16", "float16", "float64")
"""What is rewritten to float32, the coarsest first."""

_PASSIVE_OPS = frozenset(["Cast", "Const", "Identity", "IdentityN", "NoOp", "Placeholder"])
_UNREADABLE_OPS = {
    "Bitcast": "Bitcast reads the bits of its numbers",
    "XlaCallModule": "XlaCallModule holds compiled code",
}
_COMPARISONS = frozenset(["Equal", "Greater", "GreaterEqual", "Less", "LessEqual", "NotEqual"])
# What arithmetic on integers, such as sizes and hashes, is made of.
_ARITHMETIC = frozenset(
    ["Abs", "Add", "AddN", "AddV2", "BroadcastTo", "Ceil", "ConcatV2", "Div", "DivNoNan",
     "ExpandDims", "Fill", "Floor", "FloorDiv", "FloorMod", "GatherV2", "Identity", "Max",
     "Maximum", "Min", "Minimum", "Mod", "Mul", "Neg", "Pack", "Pow", "Prod", "RealDiv", "Reshape",
     "Rint", "Round", "SelectV2", "Sign", "Square", "Squeeze", "StridedSlice", "Sub", "Sum", "Tile",
     "Transpose", "TruncateDiv", "TruncateMod"]
)  # fmt: skip


def computes_in(graph: FrozenGraph) -> str:
    """The coarsest dtype that the graph computes in besides float32; float32 where there is none.

    What the graph only casts, stores or hands on does not count.
    """
    enums = _enums()
    found = {
        dtype
        for nodes in _all_nodes(graph.graph_def)
        for node in nodes
        if node.op not in _PASSIVE_OPS
        for dtype in OTHER_DTYPES
        if any(enums[dtype] in _types(value) for value in node.attr.values())
    }
    return next((dtype for dtype in OTHER_DTYPES if dtype in found), "float32")


def to_float32(graph: FrozenGraph) -> FrozenGraph:
    """Rewrites float64 and half precision to float32, loops and branches included.

    Constants beyond the range of float32 become the nearest number in it. Arithmetic on integers
    in float64 whose result is an integer again, or is compared, stays in float64: float32 holds
    every integer up to 2**24 only.

    Args:
      graph: in any precision; its signature stays.

    Raises:
      ConversionError: when an operation depends on the bits of its numbers.
    """
    import tensorflow as tf

    graph_def = copy_graph_def(graph.graph_def)
    for nodes in _all_nodes(graph_def):
        for node in nodes:
            if (reason := _UNREADABLE_OPS.get(node.op)) is not None and any(
                _types(value) & _rewritten() for value in node.attr.values()
            ):
                raise ConversionError(f"It cannot be rewritten to float32: {reason}.")
    kept = _Scope(graph_def.node, is_function=False).rewrite({})
    for function in graph_def.library.function:
        for arg in (*function.signature.input_arg, *function.signature.output_arg):
            arg.type = _renamed_type(arg.type)
            arg.ClearField("experimental_full_type")
        _Scope(function.node_def, is_function=True).rewrite(function.ret)
        _follow_identities(function)
    outputs = [
        name
        if spec.dtype not in OTHER_DTYPES or name.split(":")[0] in kept
        else _append_cast(graph_def, name, tf.float32.as_datatype_enum, _enums()[spec.dtype])
        for name, spec in zip(graph.output_tensors, graph.signature.outputs, strict=True)
    ]
    made = dataclasses.replace(
        graph, graph_def=rename_functions(graph_def), output_tensors=tuple(outputs)
    )
    try:
        with tf.Graph().as_default():
            tf.graph_util.import_graph_def(
                made.graph_def, return_elements=list(made.output_tensors), name=""
            )
    except (ValueError, tf.errors.OpError) as error:
        raise ConversionError(f"It cannot be rewritten to float32: {first_line(error)}") from error
    return made


class _Scope:
    """The nodes of a graph or of a function.

    Args:
      nodes: to rewrite in place.
      is_function: functions name the outputs of nodes, graphs number them.
    """

    def __init__(self, nodes: Any, is_function: bool):
        self._nodes, self._is_function = nodes, is_function
        self._by_name = {node.name: node for node in nodes}
        self._kept: set[str] = set()
        self._narrowed: dict[str, str] = {}  # by the name of the node that stays

    def rewrite(self, returned: MutableMapping[str, str]) -> set[str]:
        """Rewrites the nodes.

        Args:
          returned: the tensors that a function returns; rewritten, too.

        Returns:
          Names of the nodes that stay as they are.
        """
        self._kept = self._integer_arithmetic()
        self._kept |= {node.name for node in self._nodes if node.op == "Placeholder"}
        others = [node for node in self._nodes if node.name not in self._kept]
        for node in others:
            for place, name in enumerate(node.input):
                node.input[place] = self._in_float32(name)
        for key, name in list(returned.items()):
            returned[key] = self._in_float32(name)
        for node in others:
            _rewrite_node(node)
        return self._kept

    def _in_float32(self, name: str) -> str:
        """What the others read for a tensor: float32, too, where its node stays in float64."""
        producer = self._producer(name)
        if producer is None or producer.name not in self._kept:
            return name
        dtype = _dtype_of(producer)
        if dtype not in _rewritten():
            return name
        if producer.name not in self._narrowed:
            self._narrowed[producer.name] = self._add_in_float32(producer, name, dtype)
        return self._narrowed[producer.name]

    def _add_in_float32(self, producer: Any, name: str, dtype: int) -> str:
        if producer.op == "Const":
            node, output = self._nodes.add(), "output"
            node.CopyFrom(producer)
            _rewrite_node(node)
        else:
            node, output = _cast(self._nodes, name, dtype, _float32()), "y"
        node.name = f"{producer.name}/in_float32"
        while node.name in self._by_name:
            node.name += "_"
        self._by_name[node.name] = node
        return f"{node.name}:{output}:0" if self._is_function else node.name

    def _integer_arithmetic(self) -> set[str]:
        """Names of the nodes in float64 that lead from integers to integers, or compare them.

        Inputs of the model may hold integers, since columns of numbers are float64 in pandas; what
        is only compared need not be one.
        """
        origins: dict[str, set[str] | None] = {}

        def origins_of(node: Any) -> set[str] | None:
            """What arithmetic begins with, by op; None where it is something else."""
            if node.name not in origins:
                origins[node.name] = None  # until it is known
                origins[node.name] = {node.op} if self._begins_integers(node) else together(node)
            return origins[node.name]

        def together(node: Any) -> set[str] | None:
            if node.op not in _ARITHMETIC and not _is_sink(node):
                return None
            producers = [self._producer(name) for name in self._float64_inputs(node)]
            found = [None if producer is None else origins_of(producer) for producer in producers]
            return None if None in found else {op for ops in found if ops for op in ops}

        wanted = []
        for node in self._nodes:
            begin = together(node) if _is_sink(node) else None
            is_of_integers = begin is not None and "Cast" in begin and "Placeholder" not in begin
            if is_of_integers or (begin is not None and node.op == "Cast"):
                wanted.append(node)
        kept: set[str] = set()
        while wanted:
            node = wanted.pop()
            if node.name in kept:
                continue
            kept.add(node.name)
            if not self._begins_integers(node):
                wanted += [self._producer(name) for name in self._float64_inputs(node)]
        return kept

    def _begins_integers(self, node: Any) -> bool:
        if node.op == "Cast":
            return _is_integer(node.attr["SrcT"].type, min_bits=32)
        return node.op in ("Const", "Placeholder")

    def _float64_inputs(self, node: Any) -> Iterator[str]:
        """Of arithmetic, the inputs that are float64; sizes, axes and conditions are not."""
        for name in node.input:
            producer = self._producer(name)
            if name.startswith("^"):
                continue
            if producer is None or _dtype_of(producer) in (None, _enums()["float64"]):
                yield name

    def _producer(self, name: str) -> Any:
        """The node that makes a tensor; None for arguments of a function and control inputs."""
        return None if name.startswith("^") else self._by_name.get(name.split(":")[0])


def _rewrite_node(node: Any) -> None:
    if node.op == "Const":
        _rewrite_constant(node)
        return
    node.ClearField("experimental_type")
    for value in node.attr.values():
        _rewrite_value(value)
    if node.op == "Cast" and node.attr["SrcT"].type == node.attr["DstT"].type:
        dtype = node.attr["DstT"].type
        for name in ("SrcT", "DstT", "Truncate"):
            node.attr.pop(name, None)
        node.op = "Identity"
        node.attr["T"].type = dtype


def _follow_identities(function: Any) -> None:
    """Inside functions outputs have names, and those of casts are called otherwise."""
    identities = {node.name for node in function.node_def if node.op == "Identity"}

    def renamed(tensor: str) -> str:
        name, _, output = tensor.partition(":")
        return f"{name}:output:0" if output == "y:0" and name in identities else tensor

    for node in function.node_def:
        for place, tensor in enumerate(node.input):
            node.input[place] = renamed(tensor)
    for key, tensor in function.ret.items():
        function.ret[key] = renamed(tensor)


def _rewrite_value(value: Any) -> None:
    """Rewrites the dtypes in an attribute, those of functions that it names included."""
    kind = value.WhichOneof("value")
    if kind == "type":
        value.type = _renamed_type(value.type)
    elif kind == "list":
        for place, dtype in enumerate(value.list.type):
            value.list.type[place] = _renamed_type(dtype)
        for func in value.list.func:
            for inner in func.attr.values():
                _rewrite_value(inner)
    elif kind == "func":
        for inner in value.func.attr.values():
            _rewrite_value(inner)


def _rewrite_constant(node: Any) -> None:
    import tensorflow as tf

    if node.attr["dtype"].type not in _rewritten():
        return
    node.ClearField("experimental_type")
    array = tf.make_ndarray(node.attr["value"].tensor)
    kind = np.complex64 if array.dtype.kind == "c" else np.float32
    node.attr["dtype"].type = _renamed_type(node.attr["dtype"].type)
    node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(_nearest(array).astype(kind)))


def _nearest(array: np.ndarray) -> np.ndarray:
    """The values, or where float32 cannot hold them the nearest that it can, and never 0 for them.

    Epsilons and masks are such values; as 0 and infinity they would make NaN.
    """
    if array.dtype != np.float64:
        return array
    limits = np.finfo(np.float32)
    large = np.isfinite(array) & (np.abs(array) > limits.max)
    small = (array != 0) & (np.abs(array) < limits.tiny)
    array = np.where(large, np.copysign(float(limits.max), array), array)
    return np.where(small, np.copysign(float(limits.tiny), array), array)


def _append_cast(graph_def: Any, tensor: str, source: int, target: int) -> str:
    names = {node.name for node in graph_def.node}
    node = _cast(graph_def.node, tensor.removesuffix(":0"), source, target)
    node.name = f"{tensor.split(':')[0]}/as_saved"
    while node.name in names:
        node.name += "_"
    return f"{node.name}:0"


def _cast(nodes: Any, tensor: str, source: int, target: int) -> Any:
    node = nodes.add()
    node.op = "Cast"
    node.input.append(tensor)
    node.attr["SrcT"].type, node.attr["DstT"].type = source, target
    return node


def _is_sink(node: Any) -> bool:
    """Whether a node makes something else of float64 that must be exact."""
    float64 = _enums()["float64"]
    if node.op == "Cast":
        return node.attr["SrcT"].type == float64 and _is_integer(node.attr["DstT"].type)
    return node.op in _COMPARISONS and node.attr["T"].type == float64


def _is_integer(dtype: int, min_bits: int = 8) -> bool:
    import tensorflow as tf

    found = tf.dtypes.as_dtype(dtype)
    return found.is_integer and 8 * found.size >= min_bits


def _dtype_of(node: Any) -> int | None:
    """The dtype of a node's outputs, where they have one in common."""
    for name in ("DstT", "dtype", "out_type", "output_type", "T"):
        if name in node.attr:
            return node.attr[name].type
    return None


def _all_nodes(graph_def: Any) -> Iterator[Iterable[Any]]:
    yield graph_def.node
    for function in graph_def.library.function:
        yield function.node_def


def _types(value: Any) -> set[int]:
    """The dtypes in an attribute."""
    kind = value.WhichOneof("value")
    if kind == "type":
        return {value.type}
    return set(value.list.type) if kind == "list" else set()


def _enums() -> dict[str, int]:
    import tensorflow as tf

    return {name: tf.dtypes.as_dtype(name).as_datatype_enum for name in OTHER_DTYPES}


def _float32() -> int:
    import tensorflow as tf

    return tf.float32.as_datatype_enum


def _rewritten() -> set[int]:
    import tensorflow as tf

    return {*_enums().values(), tf.complex128.as_datatype_enum}


def _renamed_type(dtype: int) -> int:
    import tensorflow as tf

    if dtype == tf.complex128.as_datatype_enum:
        return tf.complex64.as_datatype_enum
    return _float32() if dtype in _enums().values() else dtype
