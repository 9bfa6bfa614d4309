"""A random order of any number of examples, of which any part can be computed alone."""

from __future__ import annotations

import hashlib
import math

import numpy as np

NUM_ROUNDS = 8


def permuted(positions: np.ndarray, count: int, seed: int, turn: int) -> np.ndarray:
    """Which example stands at each position of a random order of all.

    A Feistel network with modular additions on pairs of numbers below √count, walked on while it
    falls beyond `count`. Unlike a permutation in memory it costs nothing for the examples that are
    not asked for, and unlike NumPy's generators it is the same in every version.

    Args:
      positions: from 0 to below `count`.
      count: of all examples.
      seed: of all orders.
      turn: which order.
    """
    text = f"order {seed} {turn}".encode()
    keys = np.frombuffer(hashlib.blake2b(text, digest_size=8 * NUM_ROUNDS).digest(), "<u8")
    num_left = math.isqrt(count - 1) + 1
    num_right = -(-count // num_left)
    sizes = np.uint64(num_left), np.uint64(num_right)
    found = positions.astype(np.uint64)
    outside = np.arange(len(found))
    while len(outside):
        left, right = np.divmod(found[outside], sizes[1])
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            left = (left + _mixed(right + first) % sizes[0]) % sizes[0]
            right = (right + _mixed(left + second) % sizes[1]) % sizes[1]
        found[outside] = left * sizes[1] + right
        outside = outside[found[outside] >= count]
    return found.astype(np.int64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every bit of a number depends on all its bits."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)
