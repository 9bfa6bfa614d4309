"""A frozen TensorFlow graph: variables folded into constants, one copy of each weight.

Freezing first avoids traps of the converters: Keras 3 exports hold every weight twice, and
SavedModels whose variables are read lazily cannot be calibrated by LiteRT or read by OpenVINO.
A GraphDef is limited to 2 GB.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfopt import saved_model
from tfopt.errors import ConversionError, InputError, first_line
from tfopt.logs import only_errors
from tfopt.signature import Signature, TensorSpec

SIGNATURE_KEY = "serving_default"
"""The key under which tfopt saves every SavedModel of its own."""

# Grappler optimizers, in order.
FOLD_CONSTANTS = ("pruning", "constfold", "constfold")

_CALLS = ("PartitionedCall", "StatefulPartitionedCall")
_KEEPS_CALLS = ("_noinline", "_XlaMustCompile")  # attributes of functions and of calls

# Which input of an op is the shape of a list's elements.
_ELEMENT_SHAPE_INPUT = {
    "EmptyTensorList": 0,
    "TensorListReserve": 0,
    "TensorListFromTensor": 1,
    "TensorListStack": 1,
    "TensorListGetItem": 2,
}


def describe_function(function: Any, key: str) -> Signature:
    """The signature of a TensorFlow concrete signature function.

    Raises:
      InputError: when an input or output is no dense tensor.
    """
    import tensorflow as tf

    inputs = function.structured_input_signature[1]
    outputs = function.structured_outputs

    def spec(what: str, name: str, tensor: Any) -> TensorSpec:
        if not isinstance(tensor, (tf.TensorSpec, tf.Tensor)):
            raise saved_model.composite_error(what, name, type(tensor).__name__)
        shape = None if tensor.shape.rank is None else tuple(tensor.shape.as_list())
        return TensorSpec(name, shape, tensor.dtype.name)

    return Signature(
        key,
        tuple(spec("Input", name, inputs[name]) for name in sorted(inputs)),
        tuple(spec("Output", name, outputs[name]) for name in sorted(outputs)),
    )


@dataclasses.dataclass(frozen=True)
class FrozenGraph:
    """A graph without variables.

    Attributes:
      graph_def: a `tf.compat.v1.GraphDef`.
      signature: its inputs and outputs.
      input_tensors: tensor names such as `image:0`, in the order of `signature.inputs`.
      output_tensors: likewise for the outputs.
    """

    graph_def: Any
    signature: Signature
    input_tensors: tuple[str, ...]
    output_tensors: tuple[str, ...]

    @classmethod
    def from_saved_model(cls, folder: str | Path, key: str = SIGNATURE_KEY) -> FrozenGraph:
        """Loads a SavedModel and folds its variables into constants.

        Raises:
          InputError: when the SavedModel has no such signature, or one with tensors that are not
            dense.
          ConversionError: when it holds state that is no variable, such as lookup tables.
        """
        import tensorflow as tf
        from tensorflow.python.framework.convert_to_constants import (
            convert_variables_to_constants_v2,
        )

        folder = Path(folder)
        loaded = saved_model.load(folder)
        if key not in loaded.signatures:
            raise missing_signature(folder, key, list(loaded.signatures))
        function = loaded.signatures[key]
        signature = describe_function(function, key)
        saved_model.check_inputs(folder, key)
        if saved_model.is_session_based(folder):
            return _frozen_in_session(folder, signature)
        try:
            frozen = convert_variables_to_constants_v2(
                function, lower_control_flow=False, aggressive_inlining=True
            )
        except (ValueError, tf.errors.OpError) as error:
            unfrozen = function.graph.as_graph_def()
            saved_model.check_tables(unfrozen)
            saved_model.check_changes_nothing(unfrozen)
            raise ConversionError(f"The model cannot be frozen: {first_line(error)}") from error
        graph_def = frozen.graph.as_graph_def()
        if (num_others := len(frozen.inputs) - len(signature.inputs)) > 0:
            saved_model.check_tables(graph_def)
            raise ConversionError(
                f"The model cannot be frozen: it holds {num_others} resources that are no "
                "variables, so it runs on TensorFlow as saved only."
            )
        saved_model.check_changes_nothing(graph_def, "Rng")
        return cls(
            graph_def,
            signature,
            tuple(tensor.name for tensor in frozen.inputs),
            tuple(tensor.name for tensor in frozen.outputs),
        )

    @property
    def has_loops(self) -> bool:
        """Whether the graph holds while loops."""
        functions = self.graph_def.library.function
        nodes = [*self.graph_def.node, *(node for f in functions for node in f.node_def)]
        return any(node.op in ("While", "StatelessWhile") for node in nodes)

    def inlined(self) -> FrozenGraph:
        """The same graph with the bodies of called functions in the place of the calls.

        Freezing inlines what it may, but not functions marked `_noinline` or `jit_compile=True`,
        such as the grouped convolutions of Keras 3. Bodies of loops and branches stay functions.
        """
        graph_def = copy_graph_def(self.graph_def)
        functions = graph_def.library.function
        nodes = [*graph_def.node, *(node for f in functions for node in f.node_def)]
        calls = [node for node in nodes if node.op in _CALLS]
        if not calls:
            return self
        for item in (*calls, *functions):
            for name in _KEEPS_CALLS:
                item.attr.pop(name, None)
        return dataclasses.replace(self, graph_def=graph_def).rewrite(["function"])

    def with_batch_size(self, batch_size: int, keeps_ranges: bool = False) -> FrozenGraph:
        """The same graph for one batch size, shapes that follow from it folded to constants.

        LiteRT needs this for loops over tensor lists (Keras LSTM and GRU).

        Args:
          batch_size: the first dimension of every input that leaves it free.
          keeps_ranges: whether operations that only tell the ranges of weights stay; else they
            are computed, too.
        """
        graph_def = copy_graph_def(self.graph_def)
        inputs = {name.split(":")[0] for name in self.input_tensors}
        for node in graph_def.node:
            node.attr.pop("_output_shapes", None)
            dims = node.attr["shape"].shape.dim if node.name in inputs else ()
            if dims and dims[0].size == -1:
                dims[0].size = batch_size
        _fix_list_elements(graph_def, batch_size)
        fixed = dataclasses.replace(
            self, graph_def=graph_def, signature=self.signature.with_batch_size(batch_size)
        )
        return fixed.rewrite(FOLD_CONSTANTS, keeps_ranges=keeps_ranges)

    def rewrite(
        self,
        optimizers: Sequence[str],
        devices: Sequence[Any] | None = None,
        preserved: Sequence[str] = (),
        keeps_ranges: bool = False,
    ) -> FrozenGraph:
        """Runs grappler optimizers over the graph, in the given order and nothing else.

        Args:
          optimizers: their names.
          devices: what they optimize for, as `NamedDevice` messages, which need not be there; None
            is this machine.
          preserved: names of nodes that must stay as they are.
          keeps_ranges: whether quantization that is emulated on constants is not folded.
        """
        import tensorflow as tf
        from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
        from tensorflow.python.grappler import cluster, tf_optimizer

        graph = tf.Graph()
        with graph.as_default():
            tf.import_graph_def(self.graph_def, name="")
            meta_graph = tf.compat.v1.train.export_meta_graph(graph=graph)
        entry = meta_graph.signature_def[SIGNATURE_KEY]
        # Grappler leaves alone what a signature fetches.
        fetched = (*self.output_tensors, *(f"{name}:0" for name in preserved))
        for infos, names in ((entry.inputs, self.input_tensors), (entry.outputs, fetched)):
            for name in names:
                tensor = graph.get_tensor_by_name(name)
                infos[name].name = name
                infos[name].dtype = tensor.dtype.as_datatype_enum
                infos[name].tensor_shape.CopyFrom(tensor.shape.as_proto())
        config = config_pb2.ConfigProto()
        options = config.graph_options.rewrite_options
        options.min_graph_nodes = -1
        options.meta_optimizer_iterations = rewriter_config_pb2.RewriterConfig.ONE
        options.optimizers.extend(optimizers)
        options.experimental_disable_folding_quantization_emulation = keeps_ranges
        for name in optimizers:
            if name.startswith("auto_mixed_precision"):
                setattr(options, name, rewriter_config_pb2.RewriterConfig.ON)
        on = None if devices is None else cluster.Cluster(devices=list(devices))
        return dataclasses.replace(
            self,
            graph_def=rename_functions(tf_optimizer.OptimizeGraph(config, meta_graph, cluster=on)),
        )

    def save(self, folder: str | Path, jit_compile: bool = False) -> None:
        """Writes a SavedModel with the one signature `serving_default`.

        Args:
          folder: where to; it must not be there yet.
          jit_compile: compile with XLA at the first call of each input shape; this is saved with
            the function, so that every TensorFlow program that loads it gets it.
        """
        import tensorflow as tf

        names = self.signature.output_names
        # XLA refuses placeholders, also those that nothing reads.
        graph_def = copy_graph_def(self.graph_def)
        placeholders = {name.split(":")[0] for name in self.input_tensors}
        used = {tensor for node in graph_def.node for tensor in node.input}
        for index in reversed(range(len(graph_def.node))):
            if graph_def.node[index].name in placeholders:
                del graph_def.node[index]

        def call(*tensors: Any) -> dict[str, Any]:
            inputs = dict(zip(self.input_tensors, tensors, strict=True))
            outputs = tf.graph_util.import_graph_def(
                graph_def,
                input_map={k: v for k, v in inputs.items() if used & {k, k.removesuffix(":0")}},
                return_elements=list(self.output_tensors),
                name="",
            )
            return dict(zip(names, outputs, strict=True))

        # An explicit False would override an enclosing jit_compile; None leaves it alone.
        traced = tf.function(
            call,
            input_signature=[
                tf.TensorSpec(spec.shape, spec.dtype, name=spec.name)
                for spec in self.signature.inputs
            ],
            autograph=False,
            jit_compile=True if jit_compile else None,
        )
        module = tf.Module()
        module.serve = traced
        with only_errors("absl", "tensorflow"):
            tf.saved_model.save(
                module,
                str(folder),
                signatures={SIGNATURE_KEY: traced},
                options=saved_model.save_options(),
            )


def _frozen_in_session(folder: Path, signature: Signature) -> FrozenGraph:
    """Freezes what a session of TensorFlow 1 saved.

    Only what the outputs are computed from is taken, so that tables and training operations
    beside it do no harm.

    Raises:
      ConversionError: when lookup tables are among it.
    """
    import tensorflow as tf

    v1 = tf.compat.v1
    with (
        only_errors("tensorflow"),
        tf.Graph().as_default() as graph,
        v1.Session(graph=graph) as session,
    ):
        meta_graph = v1.saved_model.load(session, saved_model.tags_of(folder), str(folder))
        entry = meta_graph.signature_def[signature.key]
        inputs = tuple(entry.inputs[name].name for name in signature.input_names)
        outputs = tuple(entry.outputs[name].name for name in signature.output_names)
        wanted = sorted({name.split(":")[0] for name in outputs})
        used = v1.graph_util.extract_sub_graph(graph.as_graph_def(), wanted)
        saved_model.check_tables(used)
        try:
            graph_def = v1.graph_util.convert_variables_to_constants(session, used, wanted)
        except (ValueError, tf.errors.OpError) as error:
            raise ConversionError(f"The model cannot be frozen: {first_line(error)}") from error
        known = {node.name for node in graph_def.node}
        for name in {name.split(":")[0] for name in inputs} - known:  # which no output needs
            graph_def.node.add().CopyFrom(graph.get_operation_by_name(name).node_def)
    return FrozenGraph(graph_def, signature, inputs, outputs)


def missing_signature(folder: str | Path, key: str, found: Sequence[str]) -> InputError:
    """The error for a SavedModel without the wanted signature."""
    names = ", ".join(sorted(found)) or "none"
    return InputError(
        f"{folder} has no signature {key!r}; it has: {names}; choose one with `signature`."
    )


def copy_graph_def(graph_def: Any) -> Any:
    """A copy to change."""
    copy = type(graph_def)()
    copy.CopyFrom(graph_def)
    return copy


def _fix_list_elements(graph_def: Any, batch_size: int) -> None:
    """Puts the batch size into constant element shapes of tensor lists.

    Keras traces the elements of an LSTM's or GRU's output list as (batch, units), with a free
    batch, and nothing infers them anew.
    """
    import tensorflow as tf

    for nodes in (graph_def.node, *(f.node_def for f in graph_def.library.function)):
        constants = {node.name: node for node in nodes if node.op == "Const"}
        for node in nodes:
            if node.op not in _ELEMENT_SHAPE_INPUT:
                continue
            constant = constants.get(node.input[_ELEMENT_SHAPE_INPUT[node.op]].split(":")[0])
            if constant is None:
                continue
            shape = tf.make_ndarray(constant.attr["value"].tensor).copy()
            if shape.ndim == 1 and len(shape) > 1 and shape[0] == -1:
                shape[0] = batch_size
                constant.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(shape))


_num_rewrites = 0


def rename_functions(graph_def: Any) -> Any:
    """Gives the functions of a rewritten graph new names.

    TensorFlow keeps functions by name in one table for the process and refuses a second body
    under a name that it knows.
    """
    global _num_rewrites
    _num_rewrites += 1
    old = {function.signature.name for function in graph_def.library.function}
    new = {name: f"{name}__rewritten_{_num_rewrites}" for name in old}

    def rename(node: Any) -> None:
        node.op = new.get(node.op, node.op)
        for value in node.attr.values():
            for item in [value.func, *value.list.func] if value.WhichOneof("value") else ():
                if item.name in new:
                    item.name = new[item.name]

    for node in graph_def.node:
        rename(node)
    for function in graph_def.library.function:
        function.signature.name = new[function.signature.name]
        for node in function.node_def:
            rename(node)
    for gradient in graph_def.library.gradient:
        gradient.function_name = new.get(gradient.function_name, gradient.function_name)
        gradient.gradient_func = new.get(gradient.gradient_func, gradient.gradient_func)
    return graph_def
