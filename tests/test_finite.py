import numpy as np

from tfopt import finite

X = np.arange(12, dtype=np.float32).reshape(4, 3)


def holed(rows, value=np.nan):
    x = X.copy()
    x[rows, 1] = value
    return x


class TestNote:
    def test_names_inputs_and_counts_examples(self):
        batches = [
            {"a": holed([0, 2]), "b": X, "ids": np.arange(4)},
            {"a": holed([3], -np.inf), "b": X, "ids": np.arange(4)},
        ]
        (note,) = finite.note(batches)
        assert note.startswith("Input 'a' holds NaN or infinity in 3 of 8 calibration examples")

    def test_none_on_finite_examples(self):
        assert finite.note([{"a": X, "words": np.array([["a"]] * 4, object)}]) == []
        assert finite.note([]) == []


class TestUsable:
    def test_finite_examples_take_the_place_of_others(self):
        (batch,) = finite.usable([{"a": holed([0, 2]), "b": X}])
        np.testing.assert_array_equal(batch["a"], X[[1, 1, 1, 3]])
        np.testing.assert_array_equal(batch["b"], X[[1, 1, 1, 3]])

    def test_batches_without_any_are_left_out(self):
        found = list(finite.usable([{"a": holed([0, 1, 2, 3], np.inf)}, {"a": X}]))
        assert len(found) == 1
        np.testing.assert_array_equal(found[0]["a"], X)

    def test_examples_with_finite_outputs_stay(self):
        def run(batch):
            return [np.where(np.isposinf(batch["a"]), np.float32(0), batch["a"]), X.mean()]

        x = holed([0], np.inf)
        x[2] = np.nan
        (batch,) = finite.usable([{"a": x}], run)
        np.testing.assert_array_equal(batch["a"], x[[0, 1, 0, 3]])

    def test_runs_nothing_for_finite_examples(self):
        def run(batch):
            raise AssertionError(batch)

        assert len(list(finite.usable([{"a": X}], run))) == 1
