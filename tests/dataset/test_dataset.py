import itertools
import json
import math
import subprocess
import sys
import tempfile
import textwrap
import zipfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tfopt import dataset
from tfopt.dataset import streams
from tfopt.errors import InputError
from tfopt.examples import LABELS, Examples, ExampleWriter
from tfopt.signature import Signature, TensorSpec

COUNT = 40


def signature_of(**inputs):
    specs = tuple(TensorSpec(name, shape, dtype) for name, (shape, dtype) in sorted(inputs.items()))
    return Signature("serving_default", specs, (TensorSpec("scores", (None, 2), "float32"),))


IMAGE = signature_of(image=((None, 3), "float32"))
IDS = signature_of(ids=((None, 1), "float32"))


def images(count=COUNT, offset=0):
    """Images that are all different, and labels that say which is which."""
    labels = np.arange(offset, offset + count)
    return (labels[:, None] + np.array([0.0, 0.25, 0.5])).astype(np.float32), labels


def read(examples, signature=IMAGE):
    """Inputs and labels of all examples, one by one, in the order of the files."""
    if examples is None:
        return []
    return [
        ({name: array[0] for name, array in inputs.items()}, None if y is None else y[0])
        for inputs, y, _ in examples.batches(signature, 1)
    ]


def labels_of(examples, signature=IMAGE):
    return [int(label) for _, label in read(examples, signature)]


def assert_holds_images(found, expected=range(COUNT)):
    """Every example is there once, with its own label, and calibration stands apart."""
    evaluation, calibration = read(found.evaluation), read(found.calibration)
    for inputs, label in (*evaluation, *calibration):
        assert inputs["image"].dtype == np.float32
        np.testing.assert_array_equal(inputs["image"], images(1, int(label))[0][0])
    labels = [int(label) for _, label in evaluation], [int(label) for _, label in calibration]
    assert sorted(labels[0] + labels[1]) == list(expected)
    assert labels[0] == sorted(labels[0])
    assert found.num_evaluation == len(labels[0])
    assert found.num_calibration == len(labels[1])
    assert found.has_labels


# Forms of data. Each function returns the same images as something that `dataset.write` takes.


def as_npz(folder, save=np.savez):
    x, y = images()
    save(folder / "data.npz", x=x, y=y)
    return str(folder / "data.npz")


def as_compressed_npz(folder):
    return Path(as_npz(folder, np.savez_compressed))


def as_npz_by_name(folder):
    x, y = images()
    np.savez(folder / "data.npz", image=x, y=y)
    return folder / "data.npz"


def as_arrays(folder):
    x, y = images()
    return {"x": x, "y": y}


def as_tuple(folder):
    return images()


def as_list_with_weights(folder):
    return [*images(), np.ones(COUNT)]


def as_names_and_labels(folder):
    x, y = images()
    return {"image": x}, y


def as_tensors(folder):
    import tensorflow as tf

    x, y = images()
    return tf.constant(x), tf.constant(y)


def as_module_of_arrays(folder):
    (folder / "some_arrays.py").write_text(
        f"import numpy as np\ndef load():\n    return dict(np.load({as_npz(folder)!r}))\n"
    )
    return "some_arrays:load"


ARRAYS = [
    as_npz,
    as_compressed_npz,
    as_npz_by_name,
    as_arrays,
    as_tuple,
    as_list_with_weights,
    as_names_and_labels,
    as_tensors,
    as_module_of_arrays,
]


def as_tf_data(folder):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(images())


def as_tf_data_in_batches(folder):
    return as_tf_data(folder).batch(7)


def as_tf_data_of_dicts(folder):
    import tensorflow as tf

    x, y = images()
    return tf.data.Dataset.from_tensor_slices(({"image": x}, y)).batch(16)


def as_py_dataset(folder):
    import keras

    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return math.ceil(COUNT / 6)

        def __getitem__(self, index):
            x, y = images()
            return x[6 * index : 6 * index + 6], y[6 * index : 6 * index + 6]

    return Batches()


def as_generator_of_dicts(folder):
    def examples():
        for x, y in zip(*images(), strict=True):
            yield {"image": x, "y": y}

    return examples


def as_generator_of_tuples(folder):
    def examples():
        for x, y in zip(*images(), strict=True):
            yield x, y, 1.0  # with a sample weight

    return examples


def as_generator_of_x(folder):
    def examples():
        x, y = images()
        for start in range(0, COUNT, 3):
            yield {"x": x[start : start + 3], "y": y[start : start + 3]}

    return examples


def as_running_generator(folder):
    return as_generator_of_tuples(folder)()


def as_module_of_generator(folder):
    (folder / "some_generator.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        f"    file = np.load({as_npz(folder)!r})\n"
        "    yield from zip(file['x'], file['y'])\n"
    )
    return "some_generator:load"


STREAMS = [
    as_tf_data,
    as_tf_data_in_batches,
    as_tf_data_of_dicts,
    as_py_dataset,
    as_generator_of_dicts,
    as_generator_of_tuples,
    as_generator_of_x,
    as_running_generator,
    as_module_of_generator,
]


class TestForms:
    @pytest.mark.parametrize("form", ARRAYS, ids=lambda form: form.__name__)
    def test_arrays(self, form, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        found = dataset.write(form(tmp_path), IMAGE, tmp_path / "out", num_calibration=8)
        assert_holds_images(found)
        assert found.num_calibration == 8
        # Whatever the form, the examples and the split are the same.
        assert found.sha256 == dataset.write(
            images(), IMAGE, tmp_path / "again", num_calibration=8
        ).sha256  # fmt: skip

    @pytest.mark.parametrize("form", STREAMS, ids=lambda form: form.__name__)
    def test_streams(self, form, tmp_path, monkeypatch):
        monkeypatch.syspath_prepend(tmp_path)
        found = dataset.write(form(tmp_path), IMAGE, tmp_path / "out")
        assert_holds_images(found)
        assert 0 < found.num_calibration < COUNT / 2
        assert found.sha256 == dataset.write(
            as_generator_of_tuples(tmp_path), IMAGE, tmp_path / "again"
        ).sha256  # fmt: skip

    @pytest.mark.parametrize("form", [np.savez, np.savez_compressed, dict])
    def test_train_and_test(self, form, tmp_path):
        (x_train, y_train), (x_test, y_test) = images(30), images(10, offset=30)
        arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
        if form is not dict:
            form(tmp_path / "data.npz", **arrays)
            arrays = tmp_path / "data.npz"
        found = dataset.write(arrays, IMAGE, tmp_path / "out", num_calibration=12)
        assert_holds_images(found, sorted(labels_of(found.calibration) + list(range(30, 40))))
        assert labels_of(found.evaluation) == list(range(30, 40))
        assert set(labels_of(found.calibration)) < set(range(30))
        assert found.num_calibration == 12
        assert "12 of 30 training examples" in found.split

    @pytest.mark.parametrize("labels", [np.asarray, list])
    def test_pair_of_pairs_is_train_and_test(self, labels, tmp_path):
        pairs = tuple((x, labels(y)) for x, y in (images(30), images(10, offset=30)))
        found = dataset.write(pairs, IMAGE, tmp_path / "out", num_calibration=50)
        assert labels_of(found.evaluation) == list(range(30, 40))
        assert sorted(labels_of(found.calibration)) == list(range(30))

    def test_test_without_train_is_split(self, tmp_path):
        x, y = images()
        found = dataset.write({"image_test": x, "y_test": y}, IMAGE, tmp_path / "out")
        assert_holds_images(found)
        assert found.num_calibration == COUNT // 4

    def test_several_inputs(self, tmp_path):
        signature = signature_of(a=((None, 1), "int32"), b=((None,), "float32"))
        a, b = np.arange(8, dtype=np.int32)[:, None], np.arange(8, dtype=np.float32) / 2
        np.savez(tmp_path / "data.npz", a=a, b=b, y=np.arange(8))
        by_file = dataset.write(tmp_path / "data.npz", signature, tmp_path / "one")

        def examples():
            for index in range(8):
                yield {"b": b[index], "a": a[index]}, index

        by_stream = dataset.write(examples, signature, tmp_path / "two")
        for found in (by_file, by_stream):
            rows = read(found.evaluation, signature) + read(found.calibration, signature)
            assert len(rows) == 8
            for inputs, label in rows:
                assert (inputs["a"], inputs["b"]) == (label, label / 2)

    def test_input_called_y_is_no_label(self, tmp_path):
        signature = signature_of(x=((None,), "float32"), y=((None,), "float32"))
        arrays = {"x": np.arange(4, dtype=np.float32), "y": np.arange(4, dtype=np.float32) * 3}
        found = dataset.write(arrays, signature, tmp_path / "out", num_calibration=1)
        assert not found.has_labels
        for inputs, label in read(found.evaluation, signature):
            assert inputs["y"] == 3 * inputs["x"]
            assert label is None

    def test_input_whose_name_ends_in_test(self, tmp_path):
        signature = signature_of(ab_test=((None,), "float32"))
        found = dataset.write(
            {"ab_test": np.arange(8, dtype=np.float32)}, signature, tmp_path / "out"
        )
        assert found.num_evaluation == 6

    @pytest.mark.parametrize("as_stream", [False, True])
    def test_strings(self, as_stream, tmp_path):
        texts = ["", "a", "häß", "\0b", "long " * 9]
        raw = [text.encode() for text in texts]
        signature = signature_of(text=((None,), "string"))
        data = {"text": np.array(raw, object), "y": np.arange(5)}
        if as_stream:
            import tensorflow as tf

            data = tf.data.Dataset.from_tensor_slices((tf.constant(raw), np.arange(5)))
        found = dataset.write(data, signature, tmp_path / "out", num_calibration=1)
        rows = read(found.evaluation, signature) + read(found.calibration, signature)
        assert sorted(int(label) for _, label in rows) == [0, 1, 2, 3, 4]
        for inputs, label in rows:
            assert inputs["text"] == raw[int(label)]

    def test_strings_from_npz(self, tmp_path):
        signature = signature_of(text=((None, 2), "string"))
        np.savez(tmp_path / "data.npz", text=np.array([["a", "häß"], ["", "b"]] * 4))
        found = dataset.write(tmp_path / "data.npz", signature, tmp_path / "out")
        inputs, _ = read(found.evaluation, signature)[0]
        assert list(inputs["text"]) in ([b"a", "häß".encode()], [b"", b"b"])

    def test_without_labels(self, tmp_path):
        found = dataset.write({"x": images()[0]}, IMAGE, tmp_path / "out")
        assert not found.has_labels
        assert not found.evaluation.has_labels
        assert all(label is None for _, label in read(found.evaluation))

    def test_description_is_on_disk(self, tmp_path):
        found = dataset.write(images(), IMAGE, tmp_path / "out")
        written = json.loads((tmp_path / "out" / "dataset.json").read_text())
        assert written == found.describe()
        assert written["num_evaluation"] == found.num_evaluation == 30
        assert written["sha256"] == found.sha256

    def test_progress_counts_up_to_the_end(self, tmp_path):
        counts = []
        found = dataset.write(
            as_generator_of_tuples(tmp_path), IMAGE, tmp_path / "out", progress=counts.append
        )
        assert counts == sorted(counts)
        assert counts[-1] == found.num_evaluation


def write_ids(count, folder, as_stream, **options):
    column = np.arange(count, dtype=np.float32)[:, None]
    data = {"x": column, "y": np.arange(count)}
    if as_stream:

        def data():
            return zip(column, range(count), strict=True)

    return dataset.write(data, IDS, folder, **options)


class TestSplit:
    @settings(deadline=None, max_examples=60)
    @given(st.integers(1, 120), st.integers(0, 2**31), st.integers(1, 40), st.booleans())
    @example(1, 13, 5, True)
    def test_parts_never_overlap_and_cover_everything(self, count, seed, wanted, as_stream):
        with tempfile.TemporaryDirectory() as name:
            found = write_ids(count, Path(name), as_stream, seed=seed, num_calibration=wanted)
            evaluation = labels_of(found.evaluation, IDS)
            calibration = labels_of(Examples(Path(name, "calibration")), IDS)
        assert sorted(evaluation + calibration) == list(range(count))
        assert evaluation == sorted(evaluation)
        assert len(evaluation) == found.num_evaluation > 0
        if not as_stream:
            assert len(calibration) == found.num_calibration == min(wanted, count // 4)
        else:
            assert found.num_calibration == min(wanted, len(calibration))

    @pytest.mark.parametrize("seed", range(60))
    def test_a_single_example_is_evaluated(self, seed, tmp_path):
        found = write_ids(1, tmp_path, True, seed=seed)
        assert (found.num_evaluation, found.num_calibration) == (1, 0)
        assert found.calibration is None

    @pytest.mark.parametrize("as_stream", [False, True])
    def test_seed_decides(self, as_stream, tmp_path):
        first, again, other = (
            write_ids(200, tmp_path / name, as_stream, seed=seed)
            for name, seed in (("a", 1), ("b", 1), ("c", 2))
        )
        assert labels_of(first.calibration, IDS) == labels_of(again.calibration, IDS)
        assert labels_of(first.calibration, IDS) != labels_of(other.calibration, IDS)
        assert first.sha256 == again.sha256 != other.sha256
        assert "seed 1" in first.split

    def test_of_a_stream_is_by_position(self, tmp_path):
        # The same positions are chosen however long the stream is and however it is cut.
        short = write_ids(300, tmp_path / "a", True, seed=3)
        long = write_ids(2000, tmp_path / "b", True, seed=3)
        chosen = labels_of(Examples(tmp_path / "b" / "calibration"), IDS)
        expected = [label for label in chosen if label < 300]
        assert labels_of(Examples(tmp_path / "a" / "calibration"), IDS) == expected
        assert short.split == long.split
        # A tenth; four standard deviations of a binomial count to each side.
        assert abs(len(chosen) - 200) < 4 * math.sqrt(2000 * 0.1 * 0.9)

    def test_calibration_batches_keep_to_the_number(self, tmp_path):
        found = write_ids(2000, tmp_path, True, num_calibration=50)
        read_batches = dataset.calibration_batches(found, IDS, 8)
        for _ in range(2):  # it starts anew each time
            batches = list(read_batches())
            assert [len(batch["ids"]) for batch in batches] == [8] * 7
        ids = {int(i) for batch in batches for i in batch["ids"][:, 0]}
        assert len(ids) == 50
        assert not ids & set(labels_of(found.evaluation, IDS))

    def test_shapes_of_all_examples_without_their_values(self, tmp_path):
        """Lengths of evaluation count, too: an engine must take them."""
        signature = Signature("s", (TensorSpec("ids", (None, None), "int32"),), ())
        rows = [np.zeros(n, np.int32) for n in [3] * 30 + [5] * 9 + [7]]
        found = dataset.write(
            [{"ids": row} for row in rows], signature, tmp_path, num_calibration=10
        )
        seen = [batch["ids"] for batch in dataset.batch_shapes(found, signature, 4)]
        assert {array.shape for array in seen} == {(4, 3), (4, 5), (4, 7)}
        assert {array.dtype for array in seen} == {np.dtype(np.int32)}
        assert 8 <= sum(array.shape == (4, 3) for array in seen) <= 9
        assert all(array.strides == (0, 0) for array in seen)

    def test_calibration_batches_without_examples(self, tmp_path):
        assert dataset.calibration_batches(None, IDS, 8) is None
        assert dataset.calibration_batches(write_ids(3, tmp_path, False), IDS, 8) is None

    def test_some_batches_are_spread_over_all(self, tmp_path):
        found = write_ids(100, tmp_path, False, num_calibration=1)
        batches = dataset.some_batches(found, IDS, 4, 3)
        ids = [int(i) for batch in batches for i in batch["ids"][:, 0]]
        kept = labels_of(found.evaluation, IDS)
        assert ids == [kept[index * len(kept) // 12] for index in range(12)]


# Casts.

DTYPES = [
    "bool", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "float16", "float32",
    "float64",
]  # fmt: skip


def number(value):
    """A NumPy scalar as an exact number, or None for NaN."""
    value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else value
    return Fraction(value)


def can_hold(dtype, value):
    """Whether a dtype has this value; floats may round it, as Keras does, but not to infinity."""
    kind = np.dtype(dtype).kind
    if kind == "b":
        return value in (0, 1)
    if kind in "iu":
        limits = np.iinfo(dtype)
        return value is not None and not isinstance(value, float) and (
            value.denominator == 1 and int(limits.min) <= value <= int(limits.max)
        )  # fmt: skip
    if value is None or isinstance(value, float):
        return True
    try:
        as_float = float(value)  # correctly rounded from a Fraction
    except OverflowError:
        return False
    with np.errstate(over="ignore"):
        return math.isfinite(np.dtype(dtype).type(as_float))


def is_nearest(found, value):
    """Whether a NumPy scalar is as near to an exact number as its dtype allows."""
    exact = number(found)
    if found.dtype.kind != "f" or not isinstance(value, Fraction):
        return exact == value
    return abs(exact - value) <= Fraction(float(np.spacing(np.abs(found)))) / 2


@st.composite
def columns(draw):
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    elements = hnp.from_dtype(dtype)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        elements |= st.sampled_from([limits.min, limits.max, limits.max - 1, 0, 1])
        elements |= st.integers(max(-300, limits.min), min(300, limits.max))
    elif dtype.kind == "f":
        elements |= st.integers(-300, 300).map(float)
        if dtype != np.float16:
            elements |= st.sampled_from([2.0**31, 2.0**32, 2.0**63, 2.0**64, -(2.0**63)])
    return draw(hnp.arrays(dtype, st.integers(1, 4), elements=elements))


class TestCasts:
    @settings(deadline=None, max_examples=400)
    @given(columns(), st.sampled_from(DTYPES))
    @example(np.array([-1], np.int8), "uint8")
    @example(np.array([200], np.uint8), "int8")
    @example(np.array([-1], np.int64), "uint64")
    @example(np.array([2**53 + 1]), "float64")
    @example(np.array([2**64 - 1], np.uint64), "float32")
    @example(np.array([2.0**32], np.float32), "uint32")
    @example(np.array([1.5, math.nan], np.float64), "float32")
    @example(np.array([math.nan], np.float64), "int32")
    @example(np.array([0.0, 1.0]), "bool")
    def test_are_those_of_keras_or_refused(self, column, dtype):
        signature = signature_of(image=((None,), dtype))
        data = {"x": column, "y": np.arange(len(column))}
        keeps = all(can_hold(dtype, number(value)) for value in column)
        with tempfile.TemporaryDirectory() as name:
            if not keeps:
                with pytest.raises(InputError) as caught:
                    dataset.write(data, signature, name)
                message = str(caught.value)
                assert f"'image' is {column.dtype}" in message
                assert f"takes {dtype}" in message
                return
            found = dataset.write(data, signature, name)
            rows = read(found.evaluation, signature) + read(found.calibration, signature)
        column = column[[label for _, label in rows]]
        for (inputs, _), value in zip(rows, column, strict=True):
            assert is_nearest(inputs["image"], number(value))
        assert all(inputs["image"].dtype == dtype for inputs, _ in rows)
        note = f"image was cast from {column.dtype} to {dtype}."
        casts = [text for text in found.notes if "was cast" in text]
        assert casts == ([] if column.dtype == dtype else [note])

    def test_small_dtypes_stay_small_on_disk(self, tmp_path):
        column = np.arange(100, dtype=np.uint8).reshape(-1, 1)
        found = dataset.write({"x": column}, IDS, tmp_path, num_calibration=1)
        assert (tmp_path / "evaluation" / "0.bin").stat().st_size == found.num_evaluation == 99
        assert found.notes == ("ids was cast from uint8 to float32.",)

    def test_byte_order(self, tmp_path):
        found = dataset.write({"x": np.arange(4, dtype=">f4")[:, None]}, IDS, tmp_path)
        assert [inputs["ids"].item() for inputs, _ in read(found.evaluation, IDS)] == sorted(
            {0.0, 1.0, 2.0, 3.0} - {i["ids"].item() for i, _ in read(found.calibration, IDS)}
        )

    def test_text_is_no_number(self, tmp_path):
        with pytest.raises(InputError, match="'ids' is <U1; the model takes float32"):
            dataset.write({"x": np.array([["a"]])}, IDS, tmp_path)
        signature = signature_of(text=((None,), "string"))
        with pytest.raises(InputError, match="'text' is float64; the model takes string"):
            dataset.write({"x": np.zeros(3)}, signature, tmp_path)

    def test_note_of_a_stream_is_given_once(self, tmp_path):
        found = dataset.write(lambda: iter([[1], [2], [3]]), IDS, tmp_path)
        assert found.notes == ("ids was cast from int64 to float32.",)


class TestRefused:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"picture": np.zeros((2, 3))}, "arrays picture; the model's inputs are image; .* 'x'"),
            ({}, "arrays none; the model's inputs are image"),
            ({"x_train": np.zeros((2, 3))}, "arrays x_train; the model's inputs are image"),
            (
                {"x_train": np.zeros((2, 3)), "picture_test": np.zeros((2, 3))},
                "name the arrays after them or 'x' with _test",
            ),
            ({"x": np.zeros((2, 4))}, r"'image' has examples of shape \(4,\); the model takes "
             r"\(3\); reshape"),
            ({"x": np.zeros((2, 3, 2))}, r"examples of shape \(3, 2\); the model takes \(3\)"),
            ({"x": np.zeros(3)}, r"examples of shape \(\); the model takes \(3\)"),
            ({"x": np.float32(3)}, "'image' holds a single number.*one row an example"),
            (
                {"x": np.zeros((3, 3)), "y": np.array(1)},
                "'labels' holds a single number.*one row an example",
            ),
            ({"x": np.zeros((3, 3)), "y": np.zeros(2)}, "unequal numbers of examples.*3.*2"),
            ({"x": np.zeros((0, 3))}, "holds no examples; at least one"),
            (lambda: iter(()), "holds no examples"),
            ({"x": [[1.0, 2.0], [3.0]]}, "'image' is a list that is no array"),
            ({"x": object()}, "'image' holds object"),
            (7, "int is no data set; expected a path to an .npz file, arrays"),
            (lambda: 7, "int is no data set"),
            (lambda: iter([{"picture": np.zeros(3)}]), "yields picture; the model's inputs are "
             "image; use their names"),
            (
                lambda: iter([(np.zeros((2, 3)), np.zeros(3))]),
                "columns of unequal lengths.*image 2.*labels 3",
            ),
            (lambda: iter([np.zeros(5)]), r"examples of shape \(5,\); the model takes \(3\)"),
            (lambda: iter([[[1.0], [2.0, 3.0]]]), "'image' is a list that is no array"),
        ],
    )  # fmt: skip
    def test_arrays_and_elements(self, data, message, tmp_path):
        with pytest.raises(InputError, match=f"(?i){message}"):
            dataset.write(data, IMAGE, tmp_path / "out")

    def test_wrong_in_the_middle_of_a_stream(self, tmp_path):
        def examples():
            yield from np.zeros((5, 3), np.float32)
            yield np.zeros(4, np.float32)

        with pytest.raises(InputError, match=r"examples of shape \(4,\)"):
            dataset.write(examples, IMAGE, tmp_path)

    @pytest.mark.parametrize(
        ("first", "second", "message"),
        [
            ((np.uint8(1), 1), (np.float32(0.5), 1), "'ids'.*uint8.*float32"),
            ((1, 1), (1, 0.5), "'labels'.*int64.*float64"),
            ((1, 1), 1, "labels"),
            (1, (1, 1), "labels"),
        ],
    )
    def test_a_stream_that_changes(self, first, second, message, tmp_path):
        """Bytes of another dtype, or labels of some only, would be read as something else."""
        signature = signature_of(ids=((None,), "float32"))
        with pytest.raises(InputError, match=message):
            dataset.write(lambda: iter([first] * 5 + [second]), signature, tmp_path)

    def test_several_inputs_need_names(self, tmp_path):
        signature = signature_of(a=((None, 1), "int32"), b=((None,), "float32"))
        with pytest.raises(InputError, match=r"several inputs \(a, b\); pass a dict"):
            dataset.write(lambda: iter([np.zeros(1)]), signature, tmp_path)
        with pytest.raises(InputError, match="inputs are a, b; name the arrays after them"):
            dataset.write({"x": np.zeros(1)}, signature, tmp_path)

    def test_no_file(self, tmp_path):
        with pytest.raises(InputError, match=r"No data at .*data.npz.*expected an .npz file"):
            dataset.write(tmp_path / "data.npz", IMAGE, tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("data.npz", "is no .npz file.*numpy.savez"),
            ("data", "is no .npz file.*numpy.savez"),
            ("data.csv", "is a .csv file.*pandas.read_csv"),
            ("data.tfrecord", "is a .tfrecord file.*TFRecordDataset"),
        ],
    )
    def test_no_npz(self, name, message, tmp_path):
        (tmp_path / name).write_text("a,b\n1,2\n")
        with pytest.raises(InputError, match=message):
            dataset.write(tmp_path / name, IMAGE, tmp_path / "out")

    def test_a_folder(self, tmp_path):
        with pytest.raises(InputError, match=r"is a folder.*expected is an .npz file"):
            dataset.write(tmp_path, IMAGE, tmp_path / "out")

    @pytest.mark.parametrize(
        ("array", "what"),
        [
            (np.array([{}, {}]), "holds Python objects"),
            (np.asfortranarray(np.zeros((4, 3))), "is stored by columns"),
        ],
    )
    def test_members_that_cannot_be_streamed(self, array, what, tmp_path):
        np.savez(tmp_path / "data.npz", x=array)
        with pytest.raises(InputError, match=f"^x.npy in .*{what}.*ascontiguousarray") as caught:
            dataset.write(tmp_path / "data.npz", IMAGE, tmp_path / "out")
        assert "no .npz file" not in str(caught.value)

    def test_members_that_are_not_used_do_not_matter(self, tmp_path):
        x, y = images()
        other = {"notes": np.array([{}]), "scale": np.float32(2), "by_column": np.ones((2, 3)).T}
        np.savez(tmp_path / "data.npz", x=x, y=y, **other)
        assert_holds_images(dataset.write(tmp_path / "data.npz", IMAGE, tmp_path / "out"))

    @pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
    def test_damaged_npz(self, save, tmp_path):
        path = tmp_path / "data.npz"
        values = np.random.default_rng(0).normal(size=(500, 3))
        save(path, x=values)
        with zipfile.ZipFile(path) as archive:
            start = archive.getinfo("x.npy").header_offset + 3000
        content = bytearray(path.read_bytes())
        content[start : start + 200] = bytes(200)
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"x.npy in .*data.npz is damaged.*write it again"):
            dataset.write(path, signature_of(image=((None, 3), "float64")), tmp_path / "out")

    def test_npz_that_ends_early(self, tmp_path):
        path = tmp_path / "data.npz"
        np.save(tmp_path / "x.npy", np.zeros((500, 3), np.float32))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", (tmp_path / "x.npy").read_bytes()[:-50])
        with pytest.raises(InputError, match=r"ends inside x.npy; write it again"):
            dataset.write(path, IMAGE, tmp_path / "out")

    @pytest.mark.parametrize("text", ["no_such_module:load", "json:no_such_function"])
    def test_no_function(self, text, tmp_path):
        with pytest.raises(InputError, match=rf"`data={text}` names no function \(.*no_such"):
            dataset.write(text, IMAGE, tmp_path)


class TestBatches:
    @settings(deadline=None)
    @given(st.integers(1, 40), st.integers(1, 9), st.none() | st.integers(1, 50))
    def test_agree_with_indexing(self, count, batch_size, limit):
        column = np.arange(count, dtype=np.float32)[:, None]
        chosen = list(range(count))
        if limit is not None and limit < count:
            chosen = [math.floor(index * count / limit) for index in range(limit)]
            assert len(set(chosen)) == limit
        with tempfile.TemporaryDirectory() as name:
            with ExampleWriter(Path(name)) as writer:
                writer.append({"ids": column, LABELS: np.arange(count)})
            batches = list(Examples(name).batches(IDS, batch_size, limit))
        assert len(batches) == math.ceil(len(chosen) / batch_size)
        for index, (inputs, labels, num_real) in enumerate(batches):
            rows = chosen[index * batch_size : (index + 1) * batch_size]
            padded = rows + rows[-1:] * (batch_size - len(rows))
            assert inputs["ids"].shape == (batch_size, 1)
            np.testing.assert_array_equal(inputs["ids"][:, 0], padded)
            np.testing.assert_array_equal(labels, rows)
            assert num_real == len(rows)

    @settings(deadline=None)
    @given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.integers(1, 4))
    def test_ragged_examples_share_no_batch_with_other_shapes(self, lengths, batch_size):
        signature = signature_of(sequence=((None, None, 2), "float32"))
        rows = [np.full((length, 2), index, np.float32) for index, length in enumerate(lengths)]
        runs = [(length, len(list(group))) for length, group in itertools.groupby(lengths)]
        expected = [
            (length, min(batch_size, count - start))
            for length, count in runs
            for start in range(0, count, batch_size)
        ]
        with tempfile.TemporaryDirectory() as name:
            with ExampleWriter(Path(name)) as writer:
                for index, row in enumerate(rows):
                    writer.append({"sequence": row[None], LABELS: np.array([index])})
            batches = list(Examples(name).batches(signature, batch_size))
        assert [(b["sequence"].shape[1], n) for b, _, n in batches] == expected
        seen = 0
        for inputs, labels, num_real in batches:
            assert len(inputs["sequence"]) == batch_size
            for row, label in zip(inputs["sequence"], labels, strict=False):
                assert label == seen
                np.testing.assert_array_equal(row, rows[seen])
                seen += 1
            assert len(labels) == num_real
        assert seen == len(rows)

    def test_ragged_stream(self, tmp_path):
        signature = signature_of(sequence=((None, None, 2), "float32"))

        def examples():
            for index in range(50):
                yield np.full((1 + index % 7, 2), index, np.uint8), index

        found = dataset.write(examples, signature, tmp_path)
        rows = read(found.evaluation, signature) + read(found.calibration, signature)
        assert sorted(int(label) for _, label in rows) == list(range(50))
        for inputs, label in rows:
            assert inputs["sequence"].shape == (1 + label % 7, 2)
            assert (inputs["sequence"] == label).all()

    def test_ragged_labels(self, tmp_path):
        """Boxes, say: as many as there are things in the image."""

        def examples():
            for index in range(12):
                yield np.full(3, index, np.float32), np.arange(index % 3, dtype=np.float32)

        found = dataset.write(examples, IMAGE, tmp_path)
        for inputs, labels, num_real in found.evaluation.batches(IMAGE, 4):
            for image, label in zip(inputs["image"][:num_real], labels, strict=True):
                np.testing.assert_array_equal(label, np.arange(image[0] % 3))

    def test_scalar_beside_a_batch(self, tmp_path):
        """Examples with another scalar cannot share a run of the model."""
        signature = signature_of(image=((None, 3), "float32"), scale=((), "float32"))
        scales = np.repeat(np.array([2, 5, 7], np.float32), [4, 1, 3])
        arrays = {"image": images(8)[0], "scale": scales, "y": np.arange(8)}
        found = dataset.write({f"{k}_test": v for k, v in arrays.items()}
                              | {f"{k}_train": v[:0] for k, v in arrays.items()},
                              signature, tmp_path / "one")  # fmt: skip
        batches = list(found.evaluation.batches(signature, 3))
        assert [n for _, _, n in batches] == [3, 1, 1, 3]
        for inputs, labels, _ in batches:
            assert inputs["scale"].shape == ()
            assert inputs["scale"].dtype == np.float32
            assert inputs["image"].shape == (3, 3)
            assert {float(inputs["scale"])} == set(scales[labels])

        def examples():
            for index in range(8):
                yield {"image": arrays["image"][index], "scale": scales[index]}, index

        by_stream = dataset.write(examples, signature, tmp_path / "two")
        for inputs, label, _ in by_stream.evaluation.batches(signature, 1):
            assert inputs["scale"] == scales[label[0]]

    def test_text_beside_a_batch(self, tmp_path):
        signature = signature_of(image=((None, 3), "float32"), task=((), "string"))
        tasks = ["a", "a", "a", "b", "b"]
        with ExampleWriter(tmp_path) as writer:
            writer.append({"image": images(5)[0], "task": np.array(tasks)})
        batches = Examples(tmp_path).batches(signature, 2)
        assert [(b["task"].item(), n) for b, _, n in batches] == [(b"a", 2), (b"a", 1), (b"b", 2)]

    @pytest.mark.parametrize("dtype", ["float32", "string"])
    def test_scalars_only(self, dtype, tmp_path):
        signature = signature_of(value=((), dtype))
        values = np.arange(5).astype(dtype if dtype != "string" else "S1")
        found = dataset.write(
            {"value_test": values, "y_test": np.arange(5), "value_train": values[:0],
             "y_train": np.arange(0)}, signature, tmp_path
        )  # fmt: skip
        batches = list(found.evaluation.batches(signature, 4))
        assert len(batches) == 5
        for index, (inputs, labels, num_real) in enumerate(batches):
            assert np.shape(inputs["value"]) == ()
            assert inputs["value"] == values[index]
            assert (labels.tolist(), num_real) == ([index], 1)

    def test_bfloat16(self, tmp_path):
        """Outputs of mixed-precision models are kept as a reference in their own dtype."""
        import ml_dtypes

        rows = np.arange(6, dtype=np.float32).reshape(3, 2).astype(ml_dtypes.bfloat16)
        with ExampleWriter(tmp_path) as writer:
            writer.append({"scores": rows})
        found = Examples(tmp_path).read("scores", 0, 3)
        assert found[0].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(np.stack(found).astype(np.float32), rows.astype(np.float32))


class TestHash:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.booleans())
    def test_does_not_depend_on_how_a_stream_is_cut(self, sizes, is_ragged):
        count = sum(sizes)
        starts = np.cumsum([0, *sizes])
        signature = signature_of(sequence=((None, None), "float32"))
        width = [1 + (i % 2) * is_ragged for i in range(len(sizes))]

        def cut():
            for start, size, w in zip(starts, sizes, width, strict=False):
                yield np.tile(np.arange(start, start + size, dtype=np.float32)[:, None], w)

        def one_by_one():
            for batch in cut():
                yield from batch

        with tempfile.TemporaryDirectory() as name:
            first = dataset.write(cut, signature, Path(name, "a"))
            second = dataset.write(one_by_one, signature, Path(name, "b"))
        assert first.num_evaluation + first.num_calibration == count
        assert first == dataset.dataclasses.replace(second, folder=first.folder)

    @pytest.mark.parametrize("chunk_bytes", [1, 100, 500])
    @pytest.mark.parametrize("form", [as_npz, as_compressed_npz, as_arrays])
    def test_does_not_depend_on_chunks(self, form, chunk_bytes, tmp_path, monkeypatch):
        expected = dataset.write(images(), IMAGE, tmp_path / "a").sha256
        monkeypatch.setattr(streams, "CHUNK_BYTES", chunk_bytes)
        found = dataset.write(form(tmp_path), IMAGE, tmp_path / "b")
        assert_holds_images(found)
        assert found.sha256 == expected

    def test_depends_on_everything_else(self, tmp_path):
        x, y = images()
        other_x, other_y = x.copy(), y.copy()
        other_x[17, 2] += 1
        other_y[17] += 1
        hashes = [
            dataset.write(data, IMAGE, tmp_path / str(index), **options).sha256
            for index, (data, options) in enumerate([
                ((x, y), {}), ((other_x, y), {}), ((x, other_y), {}), ({"x": x}, {}),
                ((x, y.astype(np.int32)), {}), ((x[:-1], y[:-1]), {}), ((x[::-1], y[::-1]), {}),
                ((x, y), {"seed": 1}), ((x, y), {"num_calibration": 3}),
            ])
        ]  # fmt: skip
        assert len(set(hashes)) == len(hashes)

    def test_depends_on_where_ragged_examples_end(self, tmp_path):
        signature = signature_of(sequence=((None, None), "float32"))
        hashes = {
            dataset.write(
                lambda cut=cut: iter(np.split(np.arange(6, dtype=np.float32), cut)),
                signature,
                tmp_path / str(cut),
            ).sha256
            for cut in ([2], [4])
        }
        assert len(hashes) == 2


STREAM = """
    import sys
    from pathlib import Path
    import numpy as np
    from tfopt import dataset
    from tfopt.measure import environment
    from tfopt.signature import Signature, TensorSpec

    kind, count, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    signature = Signature("s", (TensorSpec("image", (None, 32, 32, 3), "float32"),), ())

    def examples():
        for index in range(count):
            yield np.full((32, 32, 3), index, np.float32), index

    found = dataset.write(
        examples if kind == "generator" else folder / f"{count}.npz", signature, folder / "out"
    )
    num_read = sum(num_real for _, _, num_real in found.evaluation.batches(signature, 32))
    assert num_read == found.num_evaluation > 0.7 * count
    print(environment.peak_resident_bytes())
"""


class TestMemory:
    @pytest.mark.parametrize("kind", ["generator", "npz"])
    def test_stays_the_same_with_ten_times_the_examples(self, kind, tmp_path):
        peaks = []
        for count in (2_000, 20_000):
            if kind == "npz":
                image = np.zeros((count, 32, 32, 3), np.float32)
                np.savez_compressed(tmp_path / f"{count}.npz", x=image, y=np.arange(count))
                del image
            ended = subprocess.run(
                [sys.executable, "-c", textwrap.dedent(STREAM), kind, str(count), tmp_path],
                stdout=subprocess.PIPE,
                check=True,
            )
            peaks.append(int(ended.stdout))
        assert peaks[1] < 1.2 * peaks[0]
        assert peaks[1] < 20_000 * 32 * 32 * 3 * 4  # less than the data itself


def test_sample_weights_are_left_out_and_said(tmp_path):
    signature = Signature("serving_default", (TensorSpec("image", (None, 2), "float32"),), ())

    def weighted():
        for index in range(40):
            yield np.full(2, index, np.float32), np.int64(index % 3), np.float32(index % 4)

    written = dataset.write(weighted, signature, tmp_path / "data")
    assert written.notes == (
        "Sample weights are not used: every example counts the same, also the 10 of 40 whose "
        "weight is 0.",
    )
    labels = written.evaluation.read(LABELS, 0, written.num_evaluation)
    images = written.evaluation.read("image", 0, written.num_evaluation)
    assert [int(label) for label in labels] == [int(image[0]) % 3 for image in images]

    def of_two_outputs():
        yield np.zeros(2, np.float32), {"a": 1, "b": 2}

    with pytest.raises(InputError, match="labels for a, b; the model has one output"):
        dataset.write(of_two_outputs, signature, tmp_path / "other")
