"""Freeing the copies of a graph that tf2onnx leaves behind."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def copies_collected() -> Iterator[None]:
    """Frees tf2onnx's copies of the graph before each of its optimizers.

    tf2onnx copies the graph with all weights before each optimizer, 24 times for a ResNet50V2.
    Copies hold reference cycles, and Python's collector counts objects and not bytes, so that it
    leaves them: this model (98 MB) took 7.4 GiB, and takes 2.4. Everything older is frozen
    meanwhile, so that a collection takes hundredths of a second.
    """
    from tf2onnx import optimizer

    before = dict(optimizer._optimizers)
    gc.collect()  # loading a frozen graph leaves nine times its size
    gc.freeze()
    try:
        optimizer._optimizers.update({name: _collecting(make) for name, make in before.items()})
        yield
    finally:
        optimizer._optimizers.update(before)
        gc.unfreeze()
        gc.collect()


def _collecting(make: Callable[[], Any]) -> Callable[[], Any]:
    def collect_and_make() -> Any:
        gc.collect()
        return make()

    return collect_and_make
