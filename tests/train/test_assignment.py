"""Against all sets, one by one."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfopt.train.assignment import INPUT, Edge, Unit, assign, error_of, seconds_of

ERRORS = st.just(0.0) | st.floats(1e-6, 1)
SECONDS = st.floats(0.0, 10.0).map(lambda value: round(value, 3))


@st.composite
def problems(draw):
    count = draw(st.integers(1, 7))
    units = [
        Unit(draw(SECONDS), draw(SECONDS | st.just(math.inf)), draw(ERRORS)) for _ in range(count)
    ]
    edges = []
    for consumer in range(count):
        for producer in draw(st.sets(st.integers(INPUT, consumer - 1), max_size=3)):
            edges.append(Edge(producer, consumer, draw(SECONDS)))
    return units, edges


def all_sets(units):
    allowed = [index for index, unit in enumerate(units) if math.isfinite(unit.half_s)]
    for size in range(len(allowed) + 1):
        yield from map(set, itertools.combinations(allowed, size))


@settings(deadline=None)
@given(problems())
def test_without_a_limit_it_is_the_fastest_of_all_sets(problem):
    units, edges = problem
    found = assign(units, edges, math.inf)
    best = min(seconds_of(units, edges, half) for half in all_sets(units))
    assert seconds_of(units, edges, found) == pytest.approx(best, abs=1e-9)


@settings(deadline=None)
@given(problems(), ERRORS)
def test_with_a_limit_nothing_is_faster_with_no_more_error_than_found(problem, max_error):
    units, edges = problem
    found = assign(units, edges, max_error)
    error = error_of(units, found)
    assert error <= max_error
    best = min(
        seconds_of(units, edges, half)
        for half in all_sets(units)
        if error_of(units, half) <= error + 1e-12
    )
    assert seconds_of(units, edges, found) == pytest.approx(best, abs=1e-9)


def test_a_layer_that_loses_less_than_its_casts_stays_between_others():
    units = [Unit(4, 2), Unit(1.0, 1.2), Unit(4, 2)]
    edges = [Edge(INPUT, 0, 0.1), Edge(0, 1, 0.15), Edge(1, 2, 0.15)]
    assert assign(units, edges, math.inf) == {0, 1, 2}
    cheap = [edge._replace(cast_s=0.05) for edge in edges]
    assert assign(units, cheap, math.inf) == {0, 2}


def test_the_layer_with_the_worst_error_for_its_gain_goes_first():
    units = [Unit(4, 2, 0.01), Unit(4, 3.9, 0.05), Unit(4, 1, 0.02)]
    assert assign(units, [], 0.03) == {0, 2}
    assert assign(units, [], 0.021) == {0}
    assert assign(units, [], 0.001) == set()


def test_a_layer_whose_outputs_are_not_finite_stays_in_float32():
    assert assign([Unit(4, 2, math.inf), Unit(4, 2, 0.01)], [], 1.0) == {1}


def test_an_output_that_is_to_stay_is_never_taken():
    units = [Unit(4, 1), Unit(1, math.inf)]
    assert assign(units, [Edge(0, 1, 10.0)], math.inf) == set()


def test_errors_below_what_can_be_measured_are_none():
    assert assign([Unit(1, 0.5, 1e-10), Unit(1, 0.5, 0.0)], [], 0.0) == {0, 1}
