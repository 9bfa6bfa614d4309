"""Which layers gain most by half precision, casts between layers included."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

INPUT = -1  # of the model, as the producer of a tensor; it is float32
_NUM_PRICES = 40
_NO_ERROR = 1e-9


@dataclasses.dataclass(frozen=True)
class Unit:
    """A layer that computes either in float32 or in half precision.

    Attributes:
      float32_s: seconds in float32.
      half_s: seconds in half precision; infinite for one that stays in float32.
      error: of the outputs of the model when this layer alone computes in half precision.
    """

    float32_s: float
    half_s: float
    error: float = 0.0


class Edge(NamedTuple):
    """A tensor between two layers, by their indices, and the seconds that casting it takes."""

    producer: int
    consumer: int
    cast_s: float


def assign(units: Sequence[Unit], edges: Sequence[Edge], max_error: float) -> set[int]:
    """The indices of the layers that are to compute in half precision.

    The least sum of the times of all layers and of the casts where neighbours differ is a minimum
    cut of the graph of the layers (Boykov, Veksler & Zabih 2001, "Fast Approximate Energy
    Minimization via Graph Cuts", section 5: with two labels it is exact). Errors of single layers
    add up as powers do, as if they were independent. Where they come to more than is allowed, a
    price for error is added to the time (Lagrangian relaxation, Everett 1963): each price's answer
    is the fastest of those with no more error than it has, yet an allowance that lies between the
    answers of two prices gets the smaller of them.
    """
    units = [
        unit if math.isfinite(unit.error) else dataclasses.replace(unit, half_s=math.inf, error=0.0)
        for unit in units
    ]
    half = _fastest(units, edges, 0.0)
    if error_of(units, half) <= max(max_error, _NO_ERROR):
        return half
    found: set[int] = set()
    low, high = 0.0, 1.0
    # At this price even the smallest error costs more than everything can gain.
    total_s = sum(unit.float32_s for unit in units) + sum(edge.cast_s for edge in edges)
    least = min(
        (units[index].error for index in half if units[index].error > _NO_ERROR), default=1.0
    )
    dearest = 2 * total_s / least**2
    for _ in range(_NUM_PRICES):
        middle = (low + high) / 2
        # Errors differ by orders of magnitude: prices are tried evenly in their logarithms.
        price = dearest * 1e-12 ** (1 - middle)
        half = _fastest(units, edges, price)
        if error_of(units, half) <= max_error:
            found, high = half, middle
        else:
            low = middle
    return found


def error_of(units: Sequence[Unit], half: set[int]) -> float:
    """The error of all layers together, if they are independent."""
    return math.sqrt(sum(units[index].error ** 2 for index in half))


def seconds_of(units: Sequence[Unit], edges: Sequence[Edge], half: set[int]) -> float:
    """The seconds of all layers and casts."""
    layers = sum(
        unit.half_s if index in half else unit.float32_s for index, unit in enumerate(units)
    )
    return layers + sum(
        edge.cast_s for edge in edges if (edge.producer in half) != (edge.consumer in half)
    )


def _fastest(units: Sequence[Unit], edges: Sequence[Edge], price: float) -> set[int]:
    """The set with the least time, when each squared error costs this many seconds.

    The nodes reached from the source are float32, the others half precision.
    """
    source, sink = len(units), len(units) + 1
    capacity: dict[int, dict[int, float]] = collections.defaultdict(dict)

    def add(start: int, end: int, amount: float) -> None:
        capacity[start][end] = capacity[start].get(end, 0.0) + amount
        capacity[end].setdefault(start, 0.0)

    for edge in edges:
        producer = source if edge.producer == INPUT else edge.producer
        add(producer, edge.consumer, edge.cast_s)
        if producer != source:
            add(edge.consumer, producer, edge.cast_s)
    for index, unit in enumerate(units):
        # What both have in common is paid in any case: only the difference decides.
        difference = unit.half_s + price * unit.error**2 - unit.float32_s
        if difference > 0:
            add(source, index, difference)
        else:
            add(index, sink, -difference)
    while path := _augmenting_path(capacity, source, sink):
        flow = min(capacity[start][end] for start, end in path)
        for start, end in path:
            capacity[start][end] -= flow
            capacity[end][start] += flow
    reached = set(_search(capacity, source))
    return {index for index in range(len(units)) if index not in reached}


def _augmenting_path(
    capacity: Mapping[int, Mapping[int, float]], source: int, sink: int
) -> list[tuple[int, int]]:
    """The shortest path that can take more, as pairs of nodes; empty if there is none."""
    before = _search(capacity, source)
    if sink not in before:
        return []
    path, node = [], sink
    while node != source:
        path.append((before[node], node))
        node = before[node]
    return path


def _search(capacity: Mapping[int, Mapping[int, float]], source: int) -> dict[int, int]:
    """Every node that can be reached, with the one before it."""
    before, ahead = {source: source}, collections.deque([source])
    while ahead:
        node = ahead.popleft()
        for other, amount in capacity.get(node, {}).items():
            if amount > 0 and other not in before:
                before[other] = node
                ahead.append(other)
    return before
