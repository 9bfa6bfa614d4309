"""Running an engine with TensorRT's Python API: host arrays in, host arrays out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from tfopt import cuda
from tfopt.artifact import Artifact
from tfopt.errors import ConversionError, InputError
from tfopt.runtimes.base import Arrays, Session
from tfopt.trt import bindings
from tfopt.trt.target import Record

ENGINE = "model.engine"
NUM_WARM_UPS = 3


class EngineSession(Session):
    """An execution context with buffers on the GPU, as large as the largest shapes that came."""

    def __init__(self, artifact: Artifact):
        super().__init__(artifact)
        trt = bindings.load()
        self._profile = Record.open(artifact.folder).profile
        self._logger = bindings.the_logger()
        self._logger.messages.clear()
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(
            (artifact.folder / ENGINE).read_bytes()
        )
        if self._engine is None:
            raise ConversionError(
                f"The engine in {artifact.folder} cannot be loaded: {self._logger.reason()}"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise cuda.OutOfMemoryError(
                "The GPU has no memory for the engine's activations; free some, or use smaller "
                "batches."
            )
        # The engine tells what is in it; that markers are put at each layer would cost time.
        self._context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        self._stream = cuda.Stream()
        self._buffers: dict[str, cuda.Buffer] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype] = {}
        self._is_input: dict[str, bool] = {}
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            self._dtypes[name] = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            mode = self._engine.get_tensor_mode(name)
            self._is_input[name] = mode == trt.TensorIOMode.INPUT
        # TensorRT before 10 has no int64: it takes and gives int32 in its place.
        self._given = {spec.name: np.dtype(spec.dtype) for spec in self.signature.inputs}
        self._wanted = {spec.name: np.dtype(spec.dtype) for spec in self.signature.outputs}

    def run(self, inputs: Arrays) -> Arrays:  # noqa: D102
        held = self._start(inputs)
        outputs = {}
        for name, shape in self._output_shapes().items():
            outputs[name] = np.empty(shape, self._dtypes[name])
            self._buffers[name].copy_to(outputs[name], self._stream)
        self._stream.synchronize()
        del held  # the copies to the GPU read it until here
        return {
            name: value if value.dtype == self._wanted[name] else value.astype(self._wanted[name])
            for name, value in outputs.items()
        }

    def device_seconds(self, inputs: Arrays, num_runs: int) -> list[float] | None:  # noqa: D102
        held = self._start(inputs)
        self._stream.synchronize()
        del held
        for _ in range(NUM_WARM_UPS):
            self._execute()
        return cuda.seconds_of_runs(self._execute, num_runs, self._stream)

    def layer_times_ms(self, batches: Sequence[Arrays]) -> dict[str, float]:
        """Milliseconds of each layer in one run on average, by TensorRT's profiler.

        Args:
          batches: inputs; the first is run once more before, uncounted.
        """
        trt = bindings.load()

        class Profiler(trt.IProfiler):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)
                self.times_ms: dict[str, float] = defaultdict(float)

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.times_ms[layer_name] += ms

        self.run(batches[0])
        profiler: Any = Profiler()
        self._context.profiler = profiler
        for batch in batches:
            self.run(batch)
        return {name: ms / len(batches) for name, ms in profiler.times_ms.items()}

    def close(self) -> None:  # noqa: D102
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()
        self._stream.close()
        del self._context, self._engine, self._runtime

    def _start(self, inputs: Arrays) -> list[np.ndarray]:
        """Queues the copies of the inputs and the run; returns what must live until both ended."""
        held = []
        try:
            shapes = {name: tuple(inputs[name].shape) for name in self.signature.input_names}
            if shapes != {name: self._shapes.get(name) for name in shapes} or (
                len(inputs) != len(shapes)
            ):
                self._take_shapes(inputs)
            for name, dtype in self._dtypes.items():
                if not self._is_input[name]:
                    continue
                value = inputs[name]
                if value.dtype != self._given[name]:
                    raise TypeError(f"{name} is {value.dtype}")
                held.append(np.ascontiguousarray(value, dtype))
                if value.dtype.kind == "i" and value.dtype != dtype and np.any(held[-1] != value):
                    raise InputError(
                        f"Input {name} holds numbers beyond {dtype}, which this TensorRT computes "
                        "in; give smaller ones, or use TensorRT 10."
                    )
                self._buffers[name].copy_from(held[-1], self._stream)
        except (KeyError, TypeError, AttributeError) as error:
            self.check_inputs(inputs, error)
            raise
        self._execute()
        return held

    def _execute(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise ConversionError(f"The engine does not run: {self._logger.reason()}")

    def _take_shapes(self, inputs: Arrays) -> None:
        """Tells the context new shapes, and makes room for what comes out.

        Raises:
          InputError: when they lie outside the profile.
        """
        if set(inputs) != set(self._profile.inputs):
            raise KeyError("names")
        if (outside := self._profile.outside(inputs)) is not None:
            raise InputError(outside)
        self._shapes.clear()
        for name, value in inputs.items():
            if name in self._dtypes and not self._context.set_input_shape(name, value.shape):
                raise ConversionError(f"The engine refuses the shape: {self._logger.reason()}")
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        for name, dtype in self._dtypes.items():
            shape = shapes.get(name) if self._is_input[name] else self._output_shape(name)
            self._make_room(name, int(np.prod(shape or (), dtype=np.int64)) * dtype.itemsize)
        self._shapes = shapes

    def _make_room(self, name: str, num_bytes: int) -> None:
        if (found := self._buffers.get(name)) is None or found.num_bytes < num_bytes:
            if found is not None:
                self._buffers.pop(name).close()
            self._buffers[name] = cuda.Buffer(num_bytes)
            self._context.set_tensor_address(name, self._buffers[name].address)

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            name: self._output_shape(name)
            for name, is_input in self._is_input.items()
            if not is_input
        }

    def _output_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if -1 in shape:
            raise ConversionError(
                f"The shape of output {name} depends on values, which this session has no room "
                "for; run the model with onnxruntime."
            )
        return shape
