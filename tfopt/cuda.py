"""The few calls of CUDA's driver that sessions on GPUs need: memory, streams and events.

By NVIDIA's package cuda-bindings, which finds the driver's library at run time and works with every
version of the CUDA toolkit (https://nvidia.github.io/cuda-python/cuda-bindings).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, Self

import numpy as np

from tfopt.errors import ConversionError

INSTALL = "pip install cuda-bindings"


@functools.cache
def missing() -> str | None:
    """Why the driver cannot be called, and what to install; None when it can."""
    try:
        driver = _driver()
    except ImportError:
        return f"NVIDIA's package cuda-bindings is not installed; {INSTALL}."
    try:
        error, *_ = driver.cuInit(0)
    except RuntimeError as failure:  # the driver's library cannot be loaded
        return f"CUDA's driver cannot be loaded ({failure})."
    return None if error == driver.CUresult.CUDA_SUCCESS else f"CUDA's driver says {error.name}."


class OutOfMemoryError(ConversionError):
    """The GPU has no more memory of the size that was asked for."""


class Stream:
    """A queue of work on the first visible GPU; a context manager.

    Attributes:
      handle: its address, as other libraries take it.
    """

    def __init__(self) -> None:
        driver = _driver()
        _use_first_gpu()
        self._stream = _call(driver.cuStreamCreate, driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self.handle = int(self._stream)

    def synchronize(self) -> None:
        """Returns when all work is done."""
        _call(_driver().cuStreamSynchronize, self._stream)

    def close(self) -> None:
        """Releases it."""
        _use_first_gpu()  # the thread may be another
        _call(_driver().cuStreamDestroy, self._stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Buffer:
    """Memory of the GPU.

    Attributes:
      address: of its first byte, as other libraries take it.
      num_bytes: its size.
    """

    def __init__(self, num_bytes: int):
        _use_first_gpu()
        self.num_bytes = num_bytes
        self._pointer = _call(_driver().cuMemAlloc, max(1, num_bytes))
        self.address = int(self._pointer)

    def copy_from(self, array: np.ndarray, stream: Stream) -> None:
        """Queues a copy of a contiguous host array into the buffer; keep the array until then."""
        copy_to_gpu(self._pointer, array, stream)

    def copy_to(self, array: np.ndarray, stream: Stream) -> None:
        """Queues a copy of the buffer into a contiguous host array."""
        copy_to_host(array, self._pointer, stream)

    def close(self) -> None:
        """Releases it."""
        _use_first_gpu()
        _call(_driver().cuMemFree, self._pointer)


def copy_to_gpu(address: int, array: np.ndarray, stream: Stream) -> None:
    """Queues a copy of a contiguous host array to an address of the GPU; keep it until then."""
    _use_first_gpu()  # the thread may be another
    _call(_driver().cuMemcpyHtoDAsync, address, array.ctypes.data, array.nbytes, stream.handle)


def copy_to_host(array: np.ndarray, address: int, stream: Stream) -> None:
    """Queues a copy of what lies at an address of the GPU into a contiguous host array."""
    _use_first_gpu()
    _call(_driver().cuMemcpyDtoHAsync, array.ctypes.data, address, array.nbytes, stream.handle)


def synchronize() -> None:
    """Returns when the first visible GPU has done all work of this process."""
    _use_first_gpu()
    _call(_driver().cuCtxSynchronize)


class Event:
    """A point in the work of a stream, with the time at which the GPU came to it."""

    def __init__(self) -> None:
        driver = _driver()
        _use_first_gpu()
        self._event = _call(driver.cuEventCreate, driver.CUevent_flags.CU_EVENT_DEFAULT)

    def record(self, stream: Stream) -> None:
        """Puts it after the work that the stream has now."""
        _call(_driver().cuEventRecord, self._event, stream.handle)

    def seconds_since(self, earlier: Event) -> float:
        """Waits until the GPU has come to it; seconds from the earlier event."""
        driver = _driver()
        _call(driver.cuEventSynchronize, self._event)
        return _call(driver.cuEventElapsedTime, earlier._event, self._event) / 1e3

    def close(self) -> None:
        """Releases it."""
        _call(_driver().cuEventDestroy, self._event)


def seconds_of_runs(run: Callable[[], None], num_runs: int, stream: Stream) -> list[float]:
    """Times work of the GPU: runs are queued and not waited for, with an event after each.

    Args:
      run: queues its work on the stream and returns.
      num_runs: how often.
      stream: it has no other work then.
    """
    events = [Event() for _ in range(num_runs + 1)]
    try:
        events[0].record(stream)
        for event in events[1:]:
            run()
            event.record(stream)
        return [end.seconds_since(begin) for begin, end in itertools.pairwise(events)]
    finally:
        stream.synchronize()
        for event in events:
            event.close()


def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@functools.cache
def _first_context() -> Any:
    driver = _driver()
    _call(driver.cuInit, 0)
    return _call(driver.cuDevicePrimaryCtxRetain, _call(driver.cuDeviceGet, 0))


def _use_first_gpu() -> None:
    """Makes the context that CUDA's runtime uses, too, that of this thread."""
    _call(_driver().cuCtxSetCurrent, _first_context())


def _call(function: Any, *args: Any) -> Any:
    """Calls the driver and returns its one result, if any.

    Raises:
      OutOfMemoryError: when the GPU has no memory left.
      RuntimeError: for any other error of the driver.
    """
    error, *results = function(*args)
    codes = _driver().CUresult
    if error == codes.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemoryError("The GPU has no memory left; free some, or use smaller batches.")
    if error != codes.CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__} failed: {error.name}.")
    return results[0] if results else None
