import itertools
import tempfile

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfopt import dataset
from tfopt.dataset import bounds
from tfopt.errors import InputError
from tfopt.signature import Signature, TensorSpec

ONE = Signature(
    "s", (TensorSpec("x", (None, 3), "float32"),), (TensorSpec("out", (None, 2), "float32"),)
)
TWO = Signature(
    "s",
    (TensorSpec("left", (None, 3), "float32"), TensorSpec("right", (None, 2), "float32")),
    (TensorSpec("out", (None, 2), "float32"),),
)
COUNT = 24
LEFT = np.arange(COUNT * 3, dtype=np.float32).reshape(COUNT, 3)
RIGHT = np.arange(COUNT * 2, dtype=np.float32).reshape(COUNT, 2) / 4
LABELS = np.arange(COUNT)


def rows(data, signature, folder):
    """Inputs by label, of calibration and evaluation."""
    written = dataset.write(data, signature, folder)
    found = {}
    for examples in filter(None, (written.calibration, written.evaluation)):
        for inputs, labels, _ in examples.batches(signature, 1):
            found[labels.item()] = {name: array[0] for name, array in inputs.items()}
    return found


class Loader:
    """Yields lists of arrays, as PyTorch's DataLoader does; its length may be unknown."""

    def __init__(self, batches, length):
        self._batches, self._length = batches, length

    def __iter__(self):
        return iter(self._batches)

    def __len__(self):
        if self._length is None:
            raise TypeError("object of type 'IterableDataset' has no len()")
        return self._length


def batches_of(*columns, size=5):
    return [[column[i : i + size] for column in columns] for i in range(0, COUNT, size)]


class TestOneInput:
    @pytest.mark.parametrize(
        "data",
        [
            (LEFT.tolist(), LABELS.tolist()),
            [LEFT, LABELS],
            (pd.DataFrame(LEFT, columns=list("abc")), pd.Series(LABELS, index=LABELS[::-1])),
            ([LEFT], [LABELS]),
            {"x": pd.DataFrame(LEFT), "y": pd.Series(LABELS)},
            {"x": LEFT.tolist(), "y": LABELS.tolist()},
            ({"x": LEFT.astype(np.float64)}, LABELS),
            (LEFT.astype(np.int64), LABELS[:, None]),
            (LEFT[..., None], LABELS, np.ones(COUNT)),
            Loader(batches_of(LEFT, LABELS), 5),
            Loader(batches_of(LEFT, LABELS), None),
            [(x, y) for x, y in zip(LEFT, LABELS, strict=True)],
            [{"x": x, "y": y} for x, y in zip(LEFT.tolist(), LABELS.tolist(), strict=True)],
            lambda: ((x, y) for x, y in zip(LEFT, LABELS, strict=True)),
            lambda: (LEFT, LABELS),
            (((LEFT[:10], LABELS[:10]), (LEFT[10:], LABELS[10:]))),
        ],
    )
    def test_is_read(self, data, tmp_path):
        found = rows(data, ONE, tmp_path)
        assert sorted(found) == list(range(COUNT))
        for label, inputs in found.items():
            np.testing.assert_array_equal(inputs["x"], LEFT[label])

    def test_lists_of_examples_without_labels(self, tmp_path):
        for place, data in enumerate((list(LEFT), LEFT.tolist())):
            written = dataset.write(data, ONE, tmp_path / str(place))
            assert written.num_evaluation + written.num_calibration == COUNT
            assert not written.has_labels

    def test_h5py_data_sets(self, tmp_path):
        import h5py

        with h5py.File(tmp_path / "data.h5", "w") as file:
            file["x"], file["y"] = LEFT, LABELS
            found = rows({"x": file["x"], "y": file["y"]}, ONE, tmp_path / "out")
        assert sorted(found) == list(range(COUNT))
        np.testing.assert_array_equal(found[7]["x"], LEFT[7])

    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=6))
    def test_batches_of_any_size(self, sizes):
        """Empty ones are passed over, and those of one example are no examples of one value."""
        count = sum(sizes)
        stops = np.cumsum(sizes)
        data = [(LEFT[b - n : b], LABELS[b - n : b]) for n, b in zip(sizes, stops, strict=True)]
        with tempfile.TemporaryDirectory() as folder:
            if not count:
                with pytest.raises(InputError, match="holds no examples"):
                    rows(lambda: iter(data), ONE, folder)
                return
            assert sorted(rows(lambda: iter(data), ONE, folder)) == list(range(count))


class TestSeveralInputs:
    @pytest.mark.parametrize(
        "data",
        [
            ([LEFT, RIGHT], LABELS),
            ((LEFT.tolist(), RIGHT.tolist()), LABELS.tolist()),
            ([RIGHT, LEFT], LABELS),  # only one order fits the shapes
            ({"right": pd.DataFrame(RIGHT), "left": LEFT}, pd.Series(LABELS)),
            {"x": [LEFT, RIGHT], "y": LABELS},
            Loader([[[a, b], c] for a, b, c in batches_of(LEFT, RIGHT, LABELS)], 5),
            Loader([[{"x": [a, b]}, c] for a, b, c in batches_of(LEFT, RIGHT, LABELS)], 5),
            lambda: (((a, b), c) for a, b, c in zip(LEFT, RIGHT, LABELS, strict=True)),
        ],
    )  # fmt: skip
    def test_are_read(self, data, tmp_path):
        found = rows(data, TWO, tmp_path)
        assert sorted(found) == list(range(COUNT))
        for label, inputs in found.items():
            np.testing.assert_array_equal(inputs["left"], LEFT[label])
            np.testing.assert_array_equal(inputs["right"], RIGHT[label])

    def test_frame_by_columns(self, tmp_path):
        signature = Signature(
            "s", tuple(TensorSpec(name, (None, 1), "float32") for name in "abc"), ONE.outputs
        )
        frame = pd.DataFrame(LEFT, columns=list("cab"))
        for place, x in enumerate((frame, {name: frame[name] for name in "abc"})):
            found = rows((x, LABELS), signature, tmp_path / str(place))
            for label, inputs in found.items():
                assert [inputs[name].item() for name in "cab"] == LEFT[label].tolist()
        with pytest.raises(InputError, match="columns c, a, b, d; the model's inputs are a, b, c"):
            rows((frame.assign(d=1), LABELS), signature, tmp_path / "more")

    @pytest.mark.parametrize(
        ("x", "message"),
        [
            (LEFT, "single ndarray; the model has several inputs"),
            ([LEFT, RIGHT, LEFT], "list of 3 and the model has 2 inputs"),
            ({"left": LEFT}, "arrays left; the model's inputs are left, right"),
        ],
    )
    def test_refused(self, x, message, tmp_path):
        with pytest.raises(InputError, match=message):
            dataset.write((x, LABELS), TWO, tmp_path)

    def test_a_list_in_an_unknown_order_is_refused(self, tmp_path):
        inputs = tuple(TensorSpec(name, (None, 3), "float32") for name in ("left", "right"))
        with pytest.raises(InputError, match="in which order the model takes left, right is not"):
            dataset.write(([LEFT, LEFT], LABELS), Signature("s", inputs, ()), tmp_path)


class TestWithoutEnd:
    def test_repeated_data_set_is_refused_at_once(self, tmp_path):
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((LEFT, LABELS)).repeat().batch(4).prefetch(1)
        with pytest.raises(InputError, match=r"never ends; leave out repeat\(\), or add take"):
            dataset.write(data, ONE, tmp_path)
        assert sorted(rows(data.take(6), ONE, tmp_path)) == list(range(COUNT))

    def test_keras_data_set_without_end_is_refused_at_once(self, tmp_path):
        import keras

        class Endless(keras.utils.PyDataset):
            num_batches = None

            def __getitem__(self, index):
                raise AssertionError("it was asked for a batch")

        with pytest.raises(InputError, match="The Endless never ends"):
            dataset.write(Endless(), ONE, tmp_path)

    def test_keras_data_set_with_a_number_of_batches_only(self, tmp_path):
        import keras

        class Counted(keras.utils.PyDataset):
            num_batches = 4

            def __getitem__(self, index):
                return LEFT[index * 6 : index * 6 + 6], LABELS[index * 6 : index * 6 + 6]

        assert sorted(rows(Counted(), ONE, tmp_path)) == list(range(COUNT))

    @pytest.mark.parametrize("limit", ["MAX_EXAMPLES", "MAX_BYTES"])
    @pytest.mark.parametrize("kind", ["generator", "loader", "tf.data"])
    def test_streams_are_refused_at_a_bound(self, kind, limit, tmp_path, monkeypatch):
        import tensorflow as tf

        monkeypatch.setattr(bounds, limit, 100)
        endless = itertools.repeat((LEFT, LABELS))
        data = {
            "generator": lambda: endless,
            "loader": Loader(endless, None),
            # What a filter leaves is unknown.
            "tf.data": tf.data.Dataset.from_tensors((LEFT, LABELS))
            .repeat()
            .filter(lambda *_: True),
        }[kind]  # fmt: skip
        counts = []
        with pytest.raises(InputError, match=r"goes on after .* may never end; limit"):
            dataset.write(data, ONE, tmp_path, progress=counts.append)
        assert all(count <= 100 for count in counts)
        assert list(tmp_path.rglob("*.bin")) == []  # nothing stays on the disk
        with pytest.raises(InputError, match="may never end"):
            dataset.in_memory(data, ONE)

    def test_data_of_known_length_has_no_bound(self, tmp_path, monkeypatch):
        monkeypatch.setattr(bounds, "MAX_EXAMPLES", 10)
        for place, data in enumerate(((LEFT, LABELS), Loader(batches_of(LEFT, LABELS), 5))):
            assert len(rows(data, ONE, tmp_path / str(place))) == COUNT

    def test_full_disk(self, tmp_path, monkeypatch):
        monkeypatch.setattr(bounds, "FREE_BYTES", 1 << 60)
        usage = bounds.shutil.disk_usage(tmp_path)._replace(free=10, total=1000)
        monkeypatch.setattr(bounds.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(InputError, match="nearly full and has no room for the data"):
            dataset.write((LEFT, LABELS), ONE, tmp_path)


class TestTexts:
    def test_function_with_arguments(self, tmp_path):
        def load(path):
            return LEFT

        with pytest.raises(InputError, match="load, which cannot be called without arguments"):
            dataset.write(load, ONE, tmp_path)


class TestNonFinite:
    def test_is_counted_and_not_calibrated_on(self, tmp_path):
        x = LEFT.copy()
        x[[2, 3, 5], [0, 1, 2]] = np.nan
        x[5, 0], x[9, 1] = -np.inf, np.inf
        written = dataset.write((x, LABELS), ONE, tmp_path, num_calibration=6, seed=3)
        chosen = set(np.random.default_rng(3).choice(COUNT, 6, replace=False).tolist())
        left_out = chosen & {2, 3, 5, 9}
        assert left_out  # or the seed proves nothing
        assert written.num_calibration == 6 - len(left_out)
        for inputs, _, _ in written.calibration.batches(ONE, 1):
            assert np.isfinite(inputs["x"]).all()
        # Accuracy is measured on them all the same, calibration aside.
        kept = [int(y[0]) for _, y, _ in written.evaluation.batches(ONE, 1)]
        assert sorted(kept) == sorted(set(range(COUNT)) - (chosen - left_out))
        assert written.notes[0] == (
            "Input 'x' has 3 NaN and 2 infinite values, in 4 of 24 examples."
        )
        assert f"leaves out {len(left_out)} examples" in written.notes[1]
        assert len(written.notes) == 2

    def test_labels_are_refused(self, tmp_path):
        y = LABELS.astype(np.float32)
        y[11] = np.nan
        with pytest.raises(InputError, match="labels are NaN or infinite, first for example 11"):
            dataset.write((LEFT, y), ONE, tmp_path)


class TestWeights:
    @pytest.mark.parametrize(
        ("weights", "note"),
        [
            (np.ones(COUNT), None),
            (np.full(COUNT, 0.5), None),
            (np.arange(COUNT) + 1, "every example counts the same."),
            (np.minimum(np.arange(COUNT), 3), "also the 1 of 24 whose weight is 0."),
            (np.eye(COUNT)[:, :2], "the 46 of 48 positions that they mark as padding"),
        ],
    )
    def test_are_noted_where_they_matter(self, weights, note, tmp_path):
        written = dataset.write((LEFT, LABELS, weights), ONE, tmp_path)
        assert len(written.notes) == (note is not None)
        assert all(note in text for text in written.notes)

    def test_are_numbers(self, tmp_path):
        with pytest.raises(InputError, match="Sample weights are not finite numbers"):
            dataset.write((LEFT, LABELS, np.full(COUNT, np.nan)), ONE, tmp_path)
