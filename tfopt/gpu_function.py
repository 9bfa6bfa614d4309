"""Runs signatures on a GPU with host arrays, which CUDA's driver copies.

`tf.constant` copies an array on the host, copies it again into memory that the GPU can read, and
learns that it arrived from a thread that asks every few microseconds; `numpy()` of an output does
the same. Where a model takes a millisecond that is a third of the time, and of large batches it is
most of it. Here the driver copies from the array itself, to where the array before it lay.

TensorFlow gives the addresses of its tensors through DLPack
(https://dmlc.github.io/dlpack/latest/c_api.html), and waits for the GPU before it does.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from typing import Any

import numpy as np

from tfopt import cuda
from tfopt.measure import environment
from tfopt.signature_call import SignatureCall

# What TensorFlow can allocate on a GPU and DLPack can name; int32 it keeps on the host.
DTYPES = frozenset(map(np.dtype, ("float16", "float32", "float64", "int8", "uint8", "int64")))
_NAMES = frozenset(dtype.name for dtype in DTYPES)
_NUM_QUEUED = 10
# Stateful to TensorFlow, though they keep nothing of what they are given.
_KEEP_NOTHING = frozenset(
    ["Case", "If", "ReadVariableOp", "ResourceGather", "StatefulPartitionedCall", "TRTEngineOp",
     "VarHandleOp", "While"]
)  # fmt: skip


def missing() -> str | None:
    """Why functions cannot be called this way here; None when they can."""
    import tensorflow as tf

    if not tf.config.list_logical_devices("GPU"):
        return "TensorFlow sees no GPU."
    config = tf.config
    if config.get_visible_devices("GPU")[:1] != config.list_physical_devices("GPU")[:1]:
        return "TensorFlow was told to use another GPU than CUDA's first."
    return cuda.missing()


def remarks() -> list[str]:
    """What a user with a GPU should know of it."""
    if not environment.gpus() or (reason := cuda.missing()) is None:
        return []
    return [
        "Inputs and outputs are copied by TensorFlow itself, which takes longer than by CUDA's "
        f"driver, and times without copies are not taken: {reason}"
    ]


def may_keep_inputs(graph: Any) -> bool:
    """Whether what a function is given could be in use after a call, as in a variable.

    Args:
      graph: of the function.
    """
    proto = graph.as_graph_def()
    ops = {node.op for node in proto.node}
    ops |= {node.op for called in proto.library.function for node in called.node_def}
    ops -= {called.signature.name for called in proto.library.function}
    return any(_is_stateful(op) for op in ops - _KEEP_NOTHING)


class GpuFunction:
    """A signature on TensorFlow's first GPU; one call at a time, others wait.

    Args:
      signature: of a loaded SavedModel, which must stay alive.
      device: where its inputs are put.
    """

    def __init__(self, signature: Any, device: str = "GPU:0"):
        import tensorflow as tf

        self._tf = tf
        self._call = SignatureCall(signature)
        self._device = device
        self._is_reused = not may_keep_inputs(signature.graph)
        self._kept: dict[str, tuple[Any, Any]] = {}
        self._lock = threading.Lock()
        self._stream = cuda.Stream()

    def __call__(self, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Copies arrays to the GPU, calls the signature and copies its outputs back."""
        with self._lock:
            return self._arrays(self._call(self._tensors(arrays)))

    def seconds_without_copies(self, arrays: dict[str, np.ndarray], num_runs: int) -> list[float]:
        """Times calls whose inputs lie on the GPU already and whose outputs stay there.

        Args:
          arrays: the inputs.
          num_runs: how often at least.

        Returns:
          Seconds of a call, each the mean of ten that are started one after another.
        """
        times = []
        with self._lock:
            tensors = self._tensors(arrays)
            for _ in range(1 + math.ceil(num_runs / _NUM_QUEUED)):
                self._tf.test.experimental.sync_devices()
                begin = time.perf_counter()
                for _ in range(_NUM_QUEUED):
                    self._call(tensors)
                self._tf.test.experimental.sync_devices()
                times.append((time.perf_counter() - begin) / _NUM_QUEUED)
        return times[1:]

    def close(self) -> None:
        """Releases what it holds of the GPU."""
        with self._lock:
            self._kept.clear()
            self._stream.close()

    def _tensors(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """Tensors for the next call only; arrays under other names make none."""
        return {
            name: self._tensor(name, arrays[name]) if name in self._call.input_names else None
            for name in arrays
        }

    def _tensor(self, name: str, value: np.ndarray) -> Any:
        """A tensor with the numbers of an array, for the next call only."""
        if value.dtype not in DTYPES or not value.size:
            return self._tf.constant(value)
        value = np.asarray(value, order="C")
        key = (value.shape, value.dtype)
        kept_key, tensor = self._kept.get(name, (None, None))
        if kept_key != key:
            self._kept.pop(name, None)
            tensor = None  # its memory is free for the next one
            with self._tf.device(self._device):
                tensor = self._tf.raw_ops.Empty(shape=value.shape, dtype=value.dtype)
            if self._is_reused:
                self._kept[name] = key, tensor
        # Whatever the GPU still does with the tensor has ended when its address is there.
        address = _Address(tensor)
        cuda.copy_to_gpu(address.value, value, self._stream)
        self._stream.synchronize()
        return tensor

    def _arrays(self, tensors: dict[str, Any]) -> dict[str, np.ndarray]:
        """The numbers of tensors, wherever those lie."""
        cuda.synchronize()  # Python's lock is free meanwhile, as it is not in `to_dlpack`
        found, held = {}, []
        for name, tensor in tensors.items():
            if not self._is_copied_by_driver(tensor):
                found[name] = tensor.numpy()
                continue
            held.append(address := _Address(tensor))
            found[name] = np.empty(tensor.shape, tensor.dtype.as_numpy_dtype)
            cuda.copy_to_host(found[name], address.value, self._stream)
        self._stream.synchronize()
        return found

    def _is_copied_by_driver(self, tensor: Any) -> bool:
        return (
            tensor.dtype.name in _NAMES
            and math.prod(tensor.shape) > 0
            and tensor.backing_device.endswith(self._device)
        )


class _DLTensor(ctypes.Structure):
    """The head of what a DLPack capsule holds, as dlpack.h lays it out."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Address:
    """Where the numbers of a tensor begin; they stay there as long as this object."""

    def __init__(self, tensor: Any):
        import tensorflow as tf

        self._capsule = tf.experimental.dlpack.to_dlpack(tensor)
        found = _DLTensor.from_address(_get_pointer(self._capsule, b"dltensor"))
        self.value = found.data + found.byte_offset


# Not by the attributes of ctypes.pythonapi's own function, which other packages set, too.
_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _is_stateful(op: str) -> bool:
    from tensorflow.python.framework import op_def_registry

    found = op_def_registry.get(op)
    return found is None or found.is_stateful
