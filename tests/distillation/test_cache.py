import importlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.models import FRAMEWORKS
from tfopt.distillation import cache_files
from tfopt.distillation.cache import cached
from tfopt.distillation.permutation import permuted
from tfopt.progress import Progress

each = pytest.mark.parametrize("framework", FRAMEWORKS)

NUM = 45
rng = np.random.default_rng(0)
X = rng.normal(size=(NUM, 6, 5, 3)).astype(np.float32)
Y = np.arange(NUM)
WEIGHTS = rng.uniform(size=NUM).astype(np.float32)
KERNEL = rng.normal(size=(90, 4)).astype(np.float32)


def by_hand(x):
    """The reference of `ask`."""
    flat = np.asarray(x, np.float64).reshape(len(x), -1)
    return {"logits": flat @ KERNEL[: flat.shape[1]], "mean": flat.mean(1)}


def ask(inputs):
    flat = tf.reshape(tf.cast(inputs, tf.float32), (len(inputs), -1))
    logits = flat @ KERNEL[: flat.shape[1]]
    return {"teachers": [{"logits": logits}, {"mean": tf.reduce_mean(flat, 1)}]}


class Asked:
    """A teacher that keeps what it saw."""

    def __init__(self):
        self.inputs = []

    def __call__(self, inputs):
        self.inputs.append(np.asarray(inputs))
        return ask(inputs)


def flip(images, labels, seed):
    """Crops, flips and mixes; two seeds, so that all of it is random by itself."""
    seeds = tf.random.split(seed, 2) if hasattr(tf.random, "split") else [seed, seed + 1]
    images = tf.image.stateless_random_crop(images, (tf.shape(images)[0], 4, 4, 3), seeds[0])
    images = tf.image.stateless_random_flip_left_right(images, seeds[1])
    share = tf.random.stateless_uniform((), seeds[0])
    images = share * images + (1 - share) * images[::-1]
    if labels is None:
        return images, None
    labels = tf.cast(labels, tf.float32)
    return images, share * labels + (1 - share) * labels[::-1]


def make(folder, data=X, teacher=ask, **options):
    options = {"identity": {"teachers": ["a"]}, "batch_size": 8, **options}
    return cached(data, teacher, folder, **options)


def filled(folder, *args, **options):
    found = make(folder, *args, **options)
    found.fill()
    assert found.is_complete
    return found


def streamed():
    return tf.data.Dataset.from_tensor_slices((X, Y)).batch(3)


def epoch_of(cache, epoch=0):
    cache.epoch = epoch
    return list(cache.dataset())


def joined(batches, get):
    return np.concatenate([np.asarray(get(batch)) for batch in batches])


def inputs_of(batch):
    return batch[0]["inputs"]


class TestOrder:
    @settings(deadline=None, max_examples=200)
    @given(st.integers(1, 3000), st.integers(0, 2**63), st.integers(0, 10**6))
    def test_is_a_permutation(self, count, seed, turn):
        order = permuted(np.arange(count), count, seed, turn)
        np.testing.assert_array_equal(np.sort(order), np.arange(count))
        np.testing.assert_array_equal(order, permuted(np.arange(count), count, seed, turn))
        some = np.arange(count // 3, count // 2 + 1)
        np.testing.assert_array_equal(permuted(some, count, seed, turn), order[some])
        if count > 30:
            assert (order != permuted(np.arange(count), count, seed, turn + 1)).any()
            assert (order != permuted(np.arange(count), count, seed + 1, turn)).any()

    @pytest.mark.parametrize("count", [2, 3, 7, 40, 1000])
    def test_every_example_is_as_likely_at_every_place(self, count):
        """By chi-square against the uniform distribution, and so is the distance of neighbours."""
        num_orders = 400 * count if count < 100 else 5 * count
        size = min(count, 8)
        found = np.array([permuted(np.arange(size), count, 3, turn) for turn in range(num_orders)])
        columns = [found[:, place] for place in range(size)]
        columns += [(found[:, 1] - found[:, 0]) % count] if size > 2 else []
        for place, column in enumerate(columns):
            low = 1 if place == size else 0
            counts = np.bincount(column, minlength=count)[low:]
            expected = num_orders / len(counts)
            freedom = len(counts) - 1
            chi_square = ((counts - expected) ** 2 / expected).sum()
            assert chi_square < freedom + 6 * np.sqrt(2 * freedom) + 6

    def test_is_that_of_earlier_versions(self):
        # Targets of views lie in this order on people's disks.
        assert permuted(np.arange(6), 10, 1, 2).tolist() == ORDER
        large = permuted(np.arange(3), 10**12, 1, 2)
        assert large.tolist() == LARGE_ORDER

    @settings(deadline=None, max_examples=5)
    @given(st.integers(1, 60), st.integers(0, 2**31), st.integers(0, 1000))
    def test_each_example_once_in_an_epoch(self, batch_size, seed, epoch):
        folder = Path(self.folder)
        cache = filled(folder, (X, Y), batch_size=batch_size, seed=seed)
        assert cache.num_batches == len(cache.dataset()) == -(-NUM // batch_size)
        batches = epoch_of(cache, epoch)
        assert [len(batch[1]) for batch in batches[:-1]] == [batch_size] * (len(batches) - 1)
        labels = joined(batches, lambda batch: batch[1])
        np.testing.assert_array_equal(np.sort(labels), Y)
        np.testing.assert_array_equal(labels, joined(epoch_of(cache, epoch), lambda b: b[1]))
        assert (labels != joined(epoch_of(cache, epoch + 1), lambda b: b[1])).any()

    @pytest.fixture(autouse=True)
    def _folder(self, tmp_path_factory):
        TestOrder.folder = tmp_path_factory.mktemp("order") / "cache"


ORDER = [5, 7, 4, 1, 0, 6]
LARGE_ORDER = [368757762750, 715296248808, 532797833214]


class TestTargets:
    @pytest.mark.parametrize(
        "data",
        [
            X,
            (X,),
            (X, Y),
            (X, Y.astype(np.float32)),
            (X, np.eye(NUM, dtype=np.float32), WEIGHTS),
            (X, {"a": Y.astype(np.int32), "b": (WEIGHTS,)}),
            (X, None, WEIGHTS),
            (tf.constant(X), Y),
            ((X * 20 + 100).astype(np.uint8), Y),
        ],
        ids=["x", "(x,)", "int", "float", "weights", "dict", "no labels", "tensor", "uint8"],
    )
    @pytest.mark.parametrize("is_streamed", [False, True])
    def test_are_those_of_the_inputs(self, data, is_streamed, tmp_path):
        given_ = data
        if is_streamed:
            if isinstance(data, tuple) and len(data) > 1 and data[1] is None:
                pytest.skip("tf.data holds no None")
            given_ = tf.data.Dataset.from_tensor_slices(data).batch(7)
        parts = (*(data if isinstance(data, tuple) else (data,)), None, None)[:3]
        cache = filled(tmp_path, given_)
        assert (cache.num_examples, cache.num_batches) == (NUM, 6)
        rows = permuted(np.arange(NUM), NUM, 0, 2)
        batches = epoch_of(cache, 2)
        length = max(place for place in range(3) if parts[place] is not None) + 1
        assert all(len(batch) == length for batch in batches)
        x = joined(batches, inputs_of)
        np.testing.assert_array_equal(x, np.asarray(parts[0])[rows])
        assert x.dtype == np.asarray(parts[0]).dtype
        expected = by_hand(x)
        said = [batch[0]["targets"]["teachers"] for batch in batches]
        np.testing.assert_allclose(
            joined(said, lambda one: one[0]["logits"]), expected["logits"], rtol=1e-4, atol=1e-4
        )
        np.testing.assert_allclose(
            joined(said, lambda one: one[1]["mean"]), expected["mean"], rtol=1e-4, atol=1e-5
        )
        if isinstance(parts[1], dict):
            np.testing.assert_array_equal(joined(batches, lambda b: b[1]["a"]), parts[1]["a"][rows])
            b = joined(batches, lambda batch: batch[1]["b"][0])
            np.testing.assert_array_equal(b, WEIGHTS[rows])
        elif parts[1] is not None:
            labels = joined(batches, lambda batch: batch[1])
            np.testing.assert_array_equal(labels, parts[1][rows])
            assert labels.dtype == parts[1].dtype
        elif length > 1:
            assert all(batch[1] is None for batch in batches)
        if parts[2] is not None:
            np.testing.assert_array_equal(joined(batches, lambda b: b[2]), WEIGHTS[rows])

    def test_shapes_are_known(self, tmp_path):
        spec = filled(tmp_path, (X, Y, WEIGHTS)).dataset().element_spec
        shapes = [tuple(leaf.shape) for leaf in tf.nest.flatten(spec)]
        assert shapes == [(None, 6, 5, 3), (None, 4), (None,), (None,), (None,)]

    @pytest.mark.parametrize("is_streamed", [False, True])
    def test_inputs_of_several_arrays(self, is_streamed, tmp_path):
        inputs = {"image": X, "others": (Y, WEIGHTS)}

        def ask_all(given_):
            return tf.cast(given_["others"][0], tf.float32) * given_["others"][1]

        data = (inputs, Y)
        if is_streamed:
            data = tf.data.Dataset.from_tensor_slices(data).batch(10)
        batches = epoch_of(filled(tmp_path, data, ask_all))
        for x, labels in batches:
            np.testing.assert_array_equal(x["inputs"]["image"], X[labels])
            np.testing.assert_array_equal(x["inputs"]["others"][0], labels)
            expected = labels.numpy() * WEIGHTS[labels]
            np.testing.assert_allclose(x["targets"], expected, rtol=1e-6)

    @pytest.mark.parametrize(
        ("dtype", "kept"),
        [
            ("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float32"),
            ("float64", "float32"), ("int64", "int64"), ("bool", "bool"),
        ],
    )  # fmt: skip
    def test_keep_their_dtypes(self, dtype, kept, tmp_path):
        def ask_so(inputs):
            return tf.cast(inputs[:, 0, 0] * 3, dtype)

        filled(tmp_path, (X, Y), ask_so)
        for x, labels in epoch_of(make(tmp_path, (X, Y), ask_so)):
            assert x["targets"].dtype == tf.as_dtype(kept)
            expected = tf.cast(ask_so(tf.constant(X[labels])), kept)
            np.testing.assert_array_equal(x["targets"], expected)

    def test_bfloat16_inputs(self, tmp_path):
        x = tf.cast(X, tf.bfloat16)
        for data in (x, tf.data.Dataset.from_tensor_slices(x).batch(4)):
            shutil.rmtree(tmp_path)
            for ((batch),) in epoch_of(filled(tmp_path, data)):
                assert batch["inputs"].dtype == tf.bfloat16

    def test_batches_of_any_size_from_one_cache(self, tmp_path):
        teacher = Asked()
        filled(tmp_path, (X, Y), teacher)
        assert [len(x) for x in teacher.inputs] == [8] * 5 + [5]
        np.testing.assert_array_equal(np.concatenate(teacher.inputs), X)
        teacher.inputs.clear()
        cache = make(tmp_path, (X, Y[::-1], WEIGHTS), teacher, batch_size=20, seed=3)
        assert cache.is_complete  # labels, weights and the seed are not what teachers saw
        cache.fill()
        assert [len(x) for x in teacher.inputs] == [20]  # the first ones again, to compare
        batches = epoch_of(cache)
        assert [len(batch[1]) for batch in batches] == [20, 20, 5]
        labels = joined(batches, lambda batch: batch[1])
        np.testing.assert_array_equal(joined(batches, inputs_of), X[NUM - 1 - labels])

    def test_epoch_is_read_when_a_pass_begins(self, tmp_path):
        cache = filled(tmp_path, (X, Y))
        dataset = cache.dataset()
        iterator = iter(dataset)
        cache.epoch = 5
        first = next(iterator)
        cache.epoch = 6
        labels = joined([first, *iterator], lambda batch: batch[1])
        np.testing.assert_array_equal(labels, permuted(np.arange(NUM), NUM, 0, 5))
        labels = joined(dataset, lambda batch: batch[1])
        np.testing.assert_array_equal(labels, permuted(np.arange(NUM), NUM, 0, 6))

    def test_progress(self, tmp_path):
        stream = io.StringIO()
        data = tf.data.Dataset.from_tensor_slices(X).batch(8)
        make(tmp_path, data, progress=Progress(stream=stream)).fill(Progress(stream=stream))
        lines = stream.getvalue().splitlines()
        assert lines[0] == f"Copying the data set to {tmp_path / 'data'}."
        assert lines[1].startswith("[1/6] 8 of 45 examples asked about (about ")
        assert lines[-1] == "[6/6] 45 of 45 examples asked about (done)"
        stream = io.StringIO()
        make(tmp_path, data, batch_size=1, progress=Progress(stream=stream)).fill(
            Progress(stream=stream)
        )
        assert not stream.getvalue()


class TestViews:
    @pytest.mark.parametrize("is_streamed", [False, True])
    @pytest.mark.parametrize("labels", [Y, Y.astype(np.float32), None])
    def test_come_again_bit_by_bit(self, labels, is_streamed, tmp_path):
        data = X if labels is None else (X, labels)
        if is_streamed:
            data = tf.data.Dataset.from_tensor_slices(data).batch(7)
        teacher = Asked()
        cache = make(tmp_path, data, teacher, view=flip, num_views=3)
        cache.fill()
        seen = np.concatenate(teacher.inputs)
        assert seen.shape == (3 * NUM, 4, 4, 3)
        again = make(tmp_path, data, view=flip, num_views=3)
        for epoch in range(7):
            batches = epoch_of(again, epoch)
            x = joined(batches, inputs_of)
            part = slice(epoch % 3 * NUM, epoch % 3 * NUM + NUM)
            assert x.tobytes() == seen[part].tobytes()
            said = joined(batches, lambda b: b[0]["targets"]["teachers"][0]["logits"])
            np.testing.assert_allclose(said, by_hand(x)["logits"], rtol=1e-4, atol=1e-4)
        views = np.split(seen, 3)
        assert not any((views[one] == views[one - 1]).all() for one in range(3))

    def test_are_those_of_the_order_and_seed(self, tmp_path):
        """Against the view run by hand, and labels with it."""
        seeds = []

        def watched(images, labels, seed):
            return images + tf.cast(seed[0], tf.float32), tf.stack(
                [labels, labels * 0 + tf.cast(seed[1], tf.int64)], 1
            )

        cache = filled(tmp_path, (X, Y), lambda x: x, view=watched, num_views=2)
        for epoch in range(3):
            rows = permuted(np.arange(NUM), NUM, 0, epoch % 2)
            for place, (x, labels) in enumerate(epoch_of(cache, epoch)):
                expected = rows[8 * place : 8 * place + 8]
                np.testing.assert_array_equal(labels[:, 0], expected)
                seed = np.asarray(x["inputs"])[0, 0, 0, 0] - X[expected][0, 0, 0, 0]
                np.testing.assert_array_equal(x["inputs"], x["targets"])
                seeds.append((epoch % 2, place, round(float(seed) / 1e4), int(labels[0, 1])))
        assert len(set(seeds)) == 12  # the third epoch repeats the first
        assert len({seed[3] for seed in seeds}) == 12

    def test_more_can_be_added(self, tmp_path):
        filled(tmp_path / "two", view=flip, num_views=2)
        teacher = Asked()
        more = filled(tmp_path / "two", X, teacher, view=flip, num_views=3)
        assert sum(map(len, teacher.inputs)) == 8 + NUM
        all_ = filled(tmp_path / "three", view=flip, num_views=3)
        for epoch in range(3):
            for one, other in zip(epoch_of(more, epoch), epoch_of(all_, epoch), strict=True):
                for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
                    np.testing.assert_array_equal(a, b)
        assert make(tmp_path / "two", view=flip, num_views=1).is_complete

    def test_lists_of_a_view(self, tmp_path):
        cache = filled(
            tmp_path, (X, Y), lambda x: x[1], view=lambda x, y, seed: ([x, x[:, 0]], [y, y])
        )
        ((x, labels), *_) = epoch_of(cache)
        assert isinstance(labels, tuple)
        np.testing.assert_array_equal(x["inputs"][1], X[labels[1]][:, 0])


class TestResuming:
    def test_after_an_error(self, tmp_path):
        seen = []

        def failing(inputs):
            if sum(seen) >= 24:
                raise KeyboardInterrupt
            seen.append(len(inputs))
            return ask(inputs)

        with pytest.raises(KeyboardInterrupt):
            make(tmp_path, (X, Y), failing).fill()
        teacher = Asked()
        stream = io.StringIO()
        cache = make(tmp_path, (X, Y), teacher, batch_size=10)
        cache.fill(Progress(stream=stream))
        assert [len(x) for x in teacher.inputs] == [10, 10, 10, 1]  # the first to compare
        assert stream.getvalue().startswith("24 of 45 examples asked about in an earlier run.")
        for x, labels in epoch_of(cache):
            logits = x["targets"]["teachers"][0]["logits"]
            np.testing.assert_allclose(logits, by_hand(X[labels])["logits"], rtol=1e-4, atol=1e-4)

    def test_after_kills(self, tmp_path):
        """In the middle of the data or of the targets, each time with half a row on disk."""
        script = """
import os, signal, sys
import tensorflow as tf
import tests.distillation.test_cache as t
from tfopt.distillation import cache_files
folder, moment = sys.argv[1], int(sys.argv[2])
num_writes = 0
def append(self, arrays):
    global num_writes
    for file, array in zip(self._files, arrays):
        content = cache_files.bytes_of(array).tobytes()
        file.write(content[:-3])
        num_writes += 1
        if num_writes == moment:
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        file.write(content[-3:])
cache_files.RowWriter.append = append
cache_files.RECORD_EVERY_S = 0.0
t.filled(folder, t.streamed(), batch_size=4, view=t.flip, num_views=3)
"""
        done = []
        for moment in (11, 77):
            command = [sys.executable, "-c", script, tmp_path / "a", str(moment)]
            assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
            done.append(json.loads((tmp_path / "a/cache.json").read_text())["num_done"])
        # Of two columns each: data take 30 writes, the targets of a batch two.
        assert done == [0, 89]
        found = filled(tmp_path / "a", streamed(), batch_size=4, view=flip, num_views=3)
        whole = filled(tmp_path / "b", streamed(), batch_size=4, view=flip, num_views=3)
        for epoch in range(3):
            for one, other in zip(epoch_of(found, epoch), epoch_of(whole, epoch), strict=True):
                for a, b in zip(tf.nest.flatten(one), tf.nest.flatten(other), strict=True):
                    np.testing.assert_array_equal(a, b)

    def test_a_record_never_runs_ahead(self, tmp_path, monkeypatch):
        """When it is replaced, the rows it tells of are synced, and it is itself."""
        monkeypatch.setattr(cache_files, "RECORD_EVERY_S", 0.0)
        events = []
        sync, write = os.fsync, cache_files.write_record

        def noted(number):
            events.append(Path(f"/proc/self/fd/{number}").readlink())
            sync(number)

        monkeypatch.setattr(os, "fsync", noted)

        def written(folder, record):
            rows = [path for path in events if path.suffix == ".bin"]
            if record["num_done"]:
                assert {path.name for path in rows} == {"0.bin", "1.bin"}
                for place, size in enumerate((16, 4)):
                    file = folder / f"targets/{place}.bin"
                    assert file.stat().st_size >= record["num_done"] * size
            events.clear()
            write(folder, record)
            assert [path.name for path in events] == ["cache.json.new", folder.name]
            events.clear()

        monkeypatch.setattr(cache_files, "write_record", written)
        filled(tmp_path)


MEMORY = """
import sys
import numpy as np, tensorflow as tf
from tfopt.distillation.cache import cached

num = int(sys.argv[1])
def some():
    for begin in range(0, num, 500):
        yield np.full((500, 32, 32, 3), begin % 251, np.uint8), np.arange(begin, begin + 500)
signature = (tf.TensorSpec((None, 32, 32, 3), tf.uint8), tf.TensorSpec((None,), tf.int64))
data = tf.data.Dataset.from_generator(some, output_signature=signature)
def ask(x):
    return tf.ones((len(x), 4000)) * tf.cast(x[:, 0, 0, :1], tf.float32)
cache = cached(data, ask, sys.argv[2], identity={}, batch_size=100)
cache.fill()
for epoch in range(2):
    cache.epoch = epoch
    for batch in cache.dataset():
        pass
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) / 1024)
"""


def test_memory_does_not_grow(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEMORY, str(num), str(tmp_path / str(num))],
            stdout=subprocess.PIPE, text=True,
        )
        for num in (500, 10_000)
    ]  # fmt: skip
    peaks = [float(process.communicate()[0]) for process in processes]
    # The larger cache has 173 MiB more on disk. Peaks differ by some batches,
    # which the allocator keeps: up to 66 MiB were seen.
    assert peaks[1] - peaks[0] < 110


FIT = """
import sys
import numpy as np, tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import {framework} as keras
import tests.distillation.test_cache as t

class Student(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = keras.layers.Dense(4)

    def call(self, batch):
        return self.dense(tf.reshape(batch["inputs"], (-1, 90)))

    def train_step(self, data):
        x, y, weights = keras.utils.unpack_x_y_sample_weight(data)
        logits = x["targets"]["teachers"][0]["logits"]
        def see(labels, logits):
            seen.append((labels.numpy(), logits.numpy()))
        tf.py_function(see, [y, logits], [])
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((self(x) - logits) ** 2)
        variables = self.trainable_variables
        self.optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
        return {{"loss": loss}}

class Epochs(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        seen.clear()
        cache.epoch = epoch + 3

    def on_epoch_end(self, epoch, logs=None):
        labels = np.concatenate([one[0] for one in seen])
        logits = np.concatenate([one[1] for one in seen])
        np.testing.assert_array_equal(np.sort(labels), t.Y)
        expected = t.by_hand(t.X[labels])["logits"]
        np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
        order = t.permuted(np.arange(t.NUM), t.NUM, 0, epoch + 3)
        assert set(labels[:8]) == set(order[:8])
        sizes.append([len(one[0]) for one in seen])

seen, sizes = [], []
cache = t.filled(sys.argv[1], (t.X, t.Y))
one = Student()
one.compile(keras.optimizers.SGD(1e-2))
history = one.fit(cache.dataset(), epochs=3, verbose=0, callbacks=[Epochs()], shuffle=False)
assert sizes == [[8] * 5 + [5]] * 3, sizes
assert np.isfinite(history.history["loss"]).all()
sizes.clear()
with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    two = Student()
    two.compile(keras.optimizers.SGD(1e-2))
two.fit(cache.dataset(), epochs=3, verbose=0, callbacks=[Epochs()], shuffle=False)
assert sizes == [[4] * 10 + [3, 2]] * 3, sizes
print("done")
"""


@each
def test_fit_on_one_and_two_devices(framework, tmp_path):
    importlib.import_module(framework)
    script = FIT.format(framework=framework)
    found = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "cache")], capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert found.stdout.endswith("done\n")
