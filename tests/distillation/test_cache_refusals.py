import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

from tests.distillation.test_cache import (
    NUM,
    WEIGHTS,
    X,
    Y,
    ask,
    by_hand,
    epoch_of,
    filled,
    flip,
    make,
    rng,
)
from tfopt.distillation import cache_files
from tfopt.errors import InputError, ResultError


class TestRefusals:
    def refuse(self, pattern, *args, **options):
        with pytest.raises(InputError, match=pattern) as error:
            filled(*args, **options)
        assert "\n" not in str(error.value)
        assert str(error.value).endswith(".")

    def test_another_teacher(self, tmp_path):
        filled(tmp_path, identity={"teachers": [{"name": "a", "sha256": "1"}]})
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        self.refuse(
            r'from another teacher: teachers\[0\].sha256 is "1" in it and "2" now; name another '
            "folder, or delete this one",
            tmp_path, identity={"teachers": [{"name": "a", "sha256": "2"}]},
        )  # fmt: skip
        self.refuse("another teacher: teachers is .* now", tmp_path, identity={"teachers": []})
        assert files == {path: path.read_bytes() for path in files}

    def test_other_data(self, tmp_path):
        filled(tmp_path)
        self.refuse("other data: it has 45 examples and 44 are given", tmp_path, X[1:])
        other = X.copy()
        other[-1, -1, -1, -1] += 1e-6
        self.refuse("other data: as many examples, with other values", tmp_path, other)
        self.refuse("another form", tmp_path, X.astype(np.float64))
        self.refuse("another form", tmp_path, X.reshape(NUM, 90))
        self.refuse("another form", tmp_path, {"x": X})

    def test_other_data_sets(self, tmp_path):
        data = tf.data.Dataset.from_tensor_slices((X, Y))
        filled(tmp_path, data.batch(7))
        assert make(tmp_path, data.shuffle(NUM).batch(10)).is_complete
        self.refuse("it has 45 examples and 42", tmp_path, data.batch(7, drop_remainder=True))
        other = tf.data.Dataset.from_tensor_slices((X, Y[::-1])).batch(7)
        self.refuse("with other values", tmp_path, other)
        random = data.map(lambda x, y: (x + tf.random.normal(()), y)).batch(7)
        self.refuse("as a view", tmp_path, random)

    def test_labels_count_where_a_view_sees_them(self, tmp_path):
        filled(tmp_path, (X, Y), view=flip)
        self.refuse("other data", tmp_path, (X, Y[::-1]), view=flip)
        assert make(tmp_path, (X, Y, WEIGHTS), view=flip).is_complete

    def test_other_views(self, tmp_path):
        filled(tmp_path / "view", view=flip)
        self.refuse("made with batch_size 8 and 9 is given; give 8, name another",
                    tmp_path / "view", view=flip, batch_size=9)  # fmt: skip
        self.refuse("made with seed 0 and 1", tmp_path / "view", view=flip, seed=1)
        self.refuse("made with a view and none is given", tmp_path / "view")
        filled(tmp_path / "none")
        self.refuse("made without a view and one is given", tmp_path / "none", view=flip)

        def other(images, labels, seed):
            return flip(images, labels, seed + 1)

        self.refuse("a preprocessing or the view has changed", tmp_path / "view", view=other)

    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    def test_another_preprocessing(self, dtype, tmp_path):
        def scaled(scale, noise=0.0):
            return lambda x: (tf.cast(ask(x * scale)["teachers"][0]["logits"] + noise, dtype), x)

        filled(tmp_path, X, scaled(1.0))
        deviation = float(np.std(by_hand(X[:8])["logits"]))
        # Rounding of half precision moves targets, and does not count.
        moved = rng.normal(size=(8, 4)).astype(np.float32) * deviation
        assert make(tmp_path, X, scaled(1.0, 0.02 * moved)).is_complete
        self.refuse(r"Target '0' of the first 8 examples moved by 0.1[\d]* of its deviation .* a "
                    "preprocessing or the view has changed; name another folder",
                    tmp_path, X, scaled(1.0, 0.12 * moved))  # fmt: skip
        self.refuse("preprocessing", tmp_path, X, scaled(1.2))

    def test_outputs_with_an_offset(self, tmp_path):
        """A large constant hides no difference, and its own rounding is none."""
        values = (1e5 + np.arange(NUM)).astype(np.float32)

        def ask_so(shift):
            return lambda x: tf.reduce_sum(x, (1, 2, 3)) * 0 + values[: len(x)] + shift

        filled(tmp_path, X, ask_so(0.0), batch_size=NUM)
        assert make(tmp_path, X, ask_so(0.02), batch_size=NUM).is_complete
        self.refuse("has changed", tmp_path, X, ask_so(3.0), batch_size=NUM)

    def test_one_example_and_constants(self, tmp_path):
        constant = [0.0]

        def ask_so(x):
            return x[:, 0, 0, 0] * 0 + constant[0]

        filled(tmp_path, X[:1], ask_so)
        assert make(tmp_path, X[:1], ask_so).is_complete
        constant[0] = 1e-3
        self.refuse("has changed", tmp_path, X[:1], ask_so)

    def test_other_whole_numbers(self, tmp_path):
        filled(tmp_path, (X, Y), lambda x: tf.argmax(x[:, 0, 0], -1))
        self.refuse("has changed", tmp_path, (X, Y), lambda x: tf.argmin(x[:, 0, 0], -1))

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_values_that_are_not_finite(self, value, tmp_path):
        x = X.copy()
        x[20] = value
        self.refuse(
            r"Target 'teachers.0.logits' is not finite in 12.5% of its values for examples 16 to "
            "23; look at the preprocessing",
            tmp_path, x,
        )  # fmt: skip
        assert json.loads((tmp_path / "cache.json").read_text())["num_done"] == 16

    @pytest.mark.parametrize(
        ("answer", "pattern"),
        [
            (
                lambda x: x[1:],
                r"The target has shape \(7, 6, 5, 3\) for 8 examples; expected a row",
            ),
            (lambda x: {"a": tf.reduce_sum(x)}, r"Target 'a' has shape \(\) for 8 examples"),
            (lambda x: x[:, :0], r"has shape \(8, 0, 5, 3\)"),
            (lambda x: tf.as_string(x), "has dtype object; expected numbers"),
            (lambda x: (), "return nothing"),
            (
                lambda x: x[: len(x)] if len(x) == 8 else x[:, 0],
                r"columns\[0\].shape was \[6, 5, 3\]",
            ),
            (lambda x: x if len(x) == 8 else {"a": x}, r'targets was 0 and is {"a": 0}'),
        ],
        ids=["rows", "scalar", "no values", "texts", "nothing", "shapes", "structure"],
    )
    def test_targets_that_cannot_be_kept(self, answer, pattern, tmp_path):
        self.refuse(pattern, tmp_path, X, answer)

    @pytest.mark.parametrize(
        ("data", "pattern"),
        [
            ((X, Y[1:]), "arrays of 44 and 45 examples"),
            (X[:0], "no examples"),
            ((X, Y, WEIGHTS, Y), "a tuple of 4 parts"),
            ((None, Y), "expected x"),
            (np.array(["a", "b"]), "dtype <U1"),
            (iter([X]), "dtype object"),
            ((X, 3), "single number"),
            (X[:, :0], r"shape \(45, 0, 5, 3\)"),
        ],
        ids=["lengths", "empty", "parts", "no inputs", "texts", "iterator", "scalar", "no values"],
    )
    def test_arrays_that_do_not_fit(self, data, pattern, tmp_path):
        self.refuse(pattern, tmp_path, data)

    def test_data_sets_that_do_not_fit(self, tmp_path):
        data = tf.data.Dataset.from_tensor_slices((X, Y))
        self.refuse("never ends", tmp_path, data.batch(8).repeat())
        self.refuse(r"batch\(\)", tmp_path, data)
        self.refuse("no examples", tmp_path, data.take(0).batch(8))
        ragged = tf.data.Dataset.from_tensors(tf.ragged.constant([[1.0], [1.0, 2.0]]))
        self.refuse("yields RaggedTensorSpec.* pad what is ragged", tmp_path, ragged)
        texts = tf.data.Dataset.from_tensors(tf.constant(["a", "b"]))
        self.refuse("expected tensors of numbers: encode texts", tmp_path, texts)
        differing = tf.data.Dataset.from_generator(
            lambda: iter([X, X[:, :1]]), output_signature=tf.TensorSpec((None, None, 5, 3))
        )
        self.refuse(
            r"examples that differ: \[0\].shape\[0\] is 6 first and 1 later", tmp_path, differing
        )
        # Nothing of these is left behind.
        filled(tmp_path, data.batch(8))

    def test_views_that_do_not_fit(self, tmp_path):
        # Other numbers each time, also where another test has set a seed for all.
        generator = tf.random.Generator.from_non_deterministic_state()

        def random(images, labels, seed):
            return images + generator.uniform(()), labels

        def random_python(images, labels, seed):
            return images + np.random.default_rng().uniform(), labels

        for number, view in enumerate((random, random_python)):
            self.refuse("same seed again; draw random numbers with tf.random.stateless",
                        tmp_path / str(number), view=view)  # fmt: skip
        self.refuse("makes 4 examples of 8", tmp_path / "2", view=lambda x, y, seed: (x[::2], y))

    def test_arguments(self, tmp_path):
        self.refuse("batch_size is 0", tmp_path, batch_size=0)
        self.refuse("num_views is 0", tmp_path, num_views=0, view=flip)
        self.refuse("2 views are asked for and there is no view", tmp_path, num_views=2)
        assert not list(tmp_path.iterdir())

    def test_folders(self, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")
        self.refuse("is no cache of what teachers say; name another folder", tmp_path)
        self.refuse("mine.txt is a file", tmp_path / "mine.txt")
        assert (tmp_path / "mine.txt").read_text() == "mine"
        with pytest.raises(ResultError, match="cannot be written"):
            make(Path("/proc/cache"))

    def test_reading_before_filling(self, tmp_path):
        cache = make(tmp_path)
        assert not cache.is_complete
        with pytest.raises(InputError, match=r"holds 0 of 45 targets; call fill\(\) first"):
            cache.dataset()

    def test_damage(self, tmp_path):
        filled(tmp_path, tf.data.Dataset.from_tensor_slices(X).batch(8))
        for name in ("targets/1.bin", "data/0.bin"):
            content = (tmp_path / name).read_bytes()
            (tmp_path / name).write_bytes(content[:-1])
            with pytest.raises(InputError, match=f"{name} is damaged: .* the 45 rows"):
                make(tmp_path, tf.data.Dataset.from_tensor_slices(X).batch(8))
            (tmp_path / name).write_bytes(content)
        (tmp_path / "cache.json").write_text("{")
        with pytest.raises(InputError, match=r"cache.json is damaged"):
            make(tmp_path)

    def test_another_version(self, tmp_path, monkeypatch):
        filled(tmp_path)
        monkeypatch.setattr(cache_files, "FORMAT", 2)
        self.refuse("another version of tfopt", tmp_path)

    def test_two_that_write(self, tmp_path):
        cache = make(tmp_path)

        def ask_there(inputs):
            self.refuse("Another process writes the cache", tmp_path)
            return ask(inputs)

        make(tmp_path, X, ask_there).fill()
        cache.fill()  # finds all done
        assert len(epoch_of(cache)) == 6

    def test_full_disk(self, tmp_path, monkeypatch):
        def full(self, arrays):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(cache_files.RowWriter, "append", full)
        with pytest.raises(ResultError, match=r"No space left on device\); make room"):
            filled(tmp_path)
        monkeypatch.undo()
        filled(tmp_path)
