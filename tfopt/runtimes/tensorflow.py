"""TensorFlow itself: the SavedModel as it came, frozen, compiled with XLA, or in half precision."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Sequence
from typing import Any

from tfopt import gpu_function, half_graph, saved_model
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.gpu_function import GpuFunction
from tfopt.graph import SIGNATURE_KEY
from tfopt.measure import suitability
from tfopt.runtimes.base import Arrays, Conversion, Layer, Runtime, Session, precision
from tfopt.signature import Signature
from tfopt.variant import Value

FOLDER = "saved_model"
HALF_OPTIONS: dict[str, tuple[Value, ...]] = {
    "sensitive_ops": ("float32", "half"),
    "xla": (False, True),
}
# Operations that only hand on what is there.
NOTHING_TO_DO = frozenset(
    ["NoOp", "Const", "HostConst", "_Arg", "_Retval", "_HostSend", "_HostRecv", "Identity",
     "IdentityN", "VarHandleOp", "ReadVariableOp", "Placeholder", "Enter", "Exit", "Merge",
     "Switch", "NextIteration", "LoopCond"]
)  # fmt: skip


class TensorFlowSession(Session):
    """A signature call: tensors made from the arrays, outputs read back.

    On a GPU, where cuda-bindings is installed, `tfopt.gpu_function` does it with less overhead.
    """

    def __init__(self, artifact: Artifact, num_threads: int | None):
        super().__init__(artifact)
        import tensorflow as tf

        if num_threads is not None:
            _set_threads(num_threads)
        self._loaded = saved_model.load(artifact.folder / FOLDER)
        self._function = self._loaded.signatures[artifact.signature.key]
        self._constant = tf.constant
        self._on_gpu = GpuFunction(self._function) if gpu_function.missing() is None else None

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        constant = self._constant
        try:
            if self._on_gpu is not None:
                return self._on_gpu(inputs)
            outputs = self._function(**{name: constant(value) for name, value in inputs.items()})
        except Exception as error:
            self.check_inputs(inputs, error)
            raise
        return {name: value.numpy() for name, value in outputs.items()}

    def device_seconds(self, inputs: Arrays, num_runs: int) -> list[float] | None:
        """By the clock: TensorFlow does not let its stream be seen, for events to be put into.

        Returns:
          Means of some runs each, that are started one after another.
        """
        if self._on_gpu is None:
            return None
        try:
            return self._on_gpu.seconds_without_copies(inputs, num_runs)
        except Exception as error:
            self.check_inputs(inputs, error)
            raise

    def close(self) -> None:  # noqa: D102
        if self._on_gpu is not None:
            self._on_gpu.close()
        del self._function, self._on_gpu, self._loaded


class TensorFlow(Runtime):
    """Runs SavedModels; the baseline of every search that starts from one."""

    name = "tensorflow"
    packages = ("tensorflow", "keras")
    library = "tensorflow"
    shares_threads = True

    def missing(self) -> str | None:  # noqa: D102
        return None

    def remarks(self) -> list[str]:  # noqa: D102
        return gpu_function.remarks()

    def load(self, artifact: Artifact, num_threads: int | None) -> Session:  # noqa: D102
        return TensorFlowSession(artifact, num_threads)

    def layers(  # noqa: D102
        self, artifact: Artifact, batches: Sequence[Arrays], num_threads: int | None
    ) -> list[Layer]:
        import tensorflow as tf

        if ("xla", True) in artifact.variant.options:
            return []  # one operation
        # Only sessions of TensorFlow 1 tell the time of each operation.
        folder = artifact.folder / FOLDER
        options = tf.compat.v1.RunOptions(trace_level=tf.compat.v1.RunOptions.FULL_TRACE)
        found: dict[str, Layer] = {}
        config = tf.compat.v1.ConfigProto()
        if num_threads is not None:
            config = tf.compat.v1.ConfigProto(
                intra_op_parallelism_threads=num_threads,
                inter_op_parallelism_threads=num_threads,
                use_per_session_threads=True,
            )
        with tf.compat.v1.Session(graph=tf.Graph(), config=config) as session:
            loaded = tf.compat.v1.saved_model.load(
                session, saved_model.tags_of(folder), str(folder)
            )
            signature = loaded.signature_def[artifact.signature.key]
            outputs = [value.name for value in signature.outputs.values()]
            for index, batch in enumerate((batches[0], *batches)):
                feed = {signature.inputs[name].name: value for name, value in batch.items()}
                trace = tf.compat.v1.RunMetadata()
                session.run(outputs, feed, options=options, run_metadata=trace)
                if index:
                    _add_layers(found, trace.step_stats, len(batches))
        if tf.config.list_logical_devices("GPU"):  # the times are those of launching
            return [dataclasses.replace(layer, time_ms=None) for layer in found.values()]
        return list(found.values())

    @precision(
        "float32",
        options={"frozen": (False, True), "xla": (False, True)},
        tried=({}, {"frozen": True}, {"xla": True}),
        is_unchanged=True,
    )
    def float32(self, conversion: Conversion, frozen: bool, xla: bool) -> None:
        """The numbers as they are; `frozen` folds variables, `xla` compiles the frozen graph.

        XLA compiles anew for each input shape, which costs seconds at the first call; on a CPU it
        pays for small models and loses on convolutions with large inputs.
        """
        if frozen or xla:
            conversion.source.unchanged_graph().save(conversion.folder / FOLDER, jit_compile=xla)
            conversion.signature = _own_key(conversion)
        else:
            shutil.copytree(conversion.source.path, conversion.folder / FOLDER)
            conversion.signature = conversion.source.signature

    @precision(
        "bfloat16",
        options=HALF_OPTIONS,
        tried=({}, {"sensitive_ops": "half"}),
        suitability=lambda: suitability.of_tensorflow("bfloat16"),
    )
    def bfloat16(self, conversion: Conversion, sensitive_ops: str, xla: bool) -> None:
        """Matrix products and convolutions in bfloat16, saved into the graph.

        Inputs and outputs stay float32, and so do softmax, reductions and the statistics of
        normalisation; `sensitive_ops=half` leaves those to TensorFlow's lists, which cast less and
        round more. With AVX512-BF16 or AMX typically 1.5 to 1.7 times faster on convolutional
        networks. See `tfopt.half_graph`.
        """
        _save_half(conversion, "bfloat16", sensitive_ops, xla)

    @precision(
        "float16",
        options=HALF_OPTIONS,
        tried=({}, {"xla": True}),
        suitability=lambda: suitability.of_tensorflow("float16"),
    )
    def float16(self, conversion: Conversion, sensitive_ops: str, xla: bool) -> None:
        """Matrix products and convolutions in float16, saved into the graph; for GPUs.

        As `bfloat16`; besides, operations whose values on real examples come near the largest of
        float16 (65504) stay float32. With Tensor Cores two to three times faster on convolutional
        networks, `xla` included; CPUs cast to float32 and back.
        """
        _save_half(conversion, "float16", sensitive_ops, xla)


def _add_layers(found: dict[str, Layer], step_stats: Any, num_runs: int) -> None:
    """Adds the times of one traced run; loops run an operation several times."""
    import tensorflow as tf

    for device in step_stats.dev_stats:
        for node in device.node_stats:
            match = re.search(r" = (\w+)\(", node.timeline_label)
            if match is None or match[1] in NOTHING_TO_DO:
                continue
            dtype = ""
            if node.output:
                dtype = tf.dtypes.as_dtype(node.output[0].tensor_description.dtype).name
            op = re.sub("^_(Mkl)?(Native)?", "", match[1])  # such as _MklNativeFusedConv2D
            before = found.get(node.node_name, Layer(node.node_name, op, dtype, 0.0))
            spent_ms = (node.op_end_rel_nanos - node.op_start_rel_nanos) / num_runs / 1e6
            found[node.node_name] = dataclasses.replace(
                before, time_ms=(before.time_ms or 0.0) + spent_ms
            )


def _save_half(conversion: Conversion, dtype: str, sensitive_ops: str, xla: bool) -> None:
    graph = conversion.source.frozen_graph().rewrite(half_graph.BEFORE)
    large: list[str] = []
    if dtype == "float16" and conversion.calibration is not None:
        large = half_graph.beyond_float16(graph, conversion.calibration())
    rewritten = half_graph.to_half(graph, dtype, float32_nodes=large)
    if sensitive_ops == "half":
        kept, rewritten = rewritten, half_graph.to_half(graph, dtype, (), large)
        if half_graph.num_half(kept, dtype) == half_graph.num_half(rewritten, dtype):
            raise ConversionError(
                f"No sensitive operation of this model can run in {dtype}, so this is "
                f"{dtype}@tensorflow."
            )
    if not (num_ops := half_graph.num_half(rewritten, dtype)):
        raise ConversionError(f"TensorFlow found no operation that it would run in {dtype}.")
    conversion.notes.append(f"{num_ops} operations run in {dtype}.")
    if large:
        conversion.notes.append(half_graph.note_on_large(large))
    rewritten.save(conversion.folder / FOLDER, jit_compile=xla)
    conversion.signature = _own_key(conversion)


def _own_key(conversion: Conversion) -> Signature:
    return dataclasses.replace(conversion.source.signature, key=SIGNATURE_KEY)


def _set_threads(num_threads: int) -> None:
    import tensorflow as tf

    threading = tf.config.threading
    now = threading.get_intra_op_parallelism_threads(), threading.get_inter_op_parallelism_threads()
    if now == (num_threads, num_threads):
        return
    try:
        threading.set_intra_op_parallelism_threads(num_threads)
        threading.set_inter_op_parallelism_threads(num_threads)
    except RuntimeError as error:
        raise InputError(
            f"TensorFlow runs already in this process with other threads than {num_threads}; load "
            "with num_threads=None, or before TensorFlow is used."
        ) from error


RUNTIME = TensorFlow()
