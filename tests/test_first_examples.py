"""Inputs of the first examples, of every form that data may have."""

import numpy as np
import pandas as pd
import pytest

from tfopt.errors import InputError
from tfopt.first_examples import first_examples

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
OTHER = X[:, :2] * 2
Y = [0, 1, 2, 0, 1, 2]
FRAME = pd.DataFrame({"age": [30, 40, 50], "owner": [True, False, True], "income": [1.5, 2.5, 3.5]})
ROWS = np.array([[30, 1, 1.5], [40, 0, 2.5]])


class Loader:
    def __init__(self, *batches):
        self._batches = batches

    def __len__(self):
        return len(self._batches)

    def __getitem__(self, index):
        return self._batches[index]


def check(found, expected):
    if isinstance(expected, dict):
        assert sorted(found) == sorted(expected)
        for name in expected:
            check(found[name], expected[name])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            check(one, other)
    else:
        assert found.dtype.kind in "biufO"
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ((X, Y), X[:2]),
        ((X.tolist(), Y), X[:2]),
        ((pd.Series(list(X)), Y), X[:2]),
        ((FRAME, Y), ROWS),
        (FRAME, ROWS),
        ((np.array(X.tolist(), object), Y), X[:2]),
        (((X, Y), (X[::-1], Y)), X[:-3:-1]),
        ({"x": X, "y": Y}, X[:2]),
        ({"x": X, "rate": 0.5, "y": Y}, {"x": X[:2], "rate": np.float64(0.5)}),
        ({"x": {"a": X, "b": OTHER}, "y": Y}, {"a": X[:2], "b": OTHER[:2]}),
        (([X, OTHER], Y), [X[:2], OTHER[:2]]),
        ([X, OTHER], [X[:2], OTHER[:2]]),
        (list(zip(X, Y, strict=True)), X[0]),
        (X.tolist(), X[0]),
        ([["a", "b"], ["c", "d"]], np.array(["a", "b"], object)),
        ((["one text", "another"], Y), np.array(["one text", "another"], object)),
        (lambda: iter([(X[:4], Y[:4])]), X[:4]),
        (Loader([X[:4], np.array(Y[:4])]), X[:4]),
        (Loader(({"a": X[:4], "b": OTHER[:4]}, Y[:4])), {"a": X[:4], "b": OTHER[:4]}),
    ],
)
def test_are_those_of_the_data(data, expected):
    check(first_examples(data), expected)


@pytest.mark.parametrize(
    ("data", "num_inputs", "expected"),
    [
        (((X, OTHER), (np.array(Y), np.array(Y))), 2, [X[:2], OTHER[:2]]),
        ([X, np.array(Y)], 1, X[:2]),
        ([X, OTHER], 2, [X[:2], OTHER[:2]]),
    ],
)
def test_number_of_inputs_decides(data, num_inputs, expected):
    check(first_examples(data, num_inputs), expected)


@pytest.mark.parametrize("data", [None, 5, [], {}, Loader(), iter([(X, Y)])])
def test_none(data):
    assert first_examples(data) is None


def test_a_function_with_arguments_is_refused():
    with pytest.raises(InputError, match="cannot be called without arguments"):
        first_examples(lambda path: X)
