import ctypes
import threading

import numpy as np
import pytest
import tensorflow as tf

from tests import goldens
from tfopt import cuda, gpu_function, runtimes, source
from tfopt.errors import InputError
from tfopt.gpu_function import GpuFunction, may_keep_inputs
from tfopt.measure import environment
from tfopt.search import steps

HAS_GPU = gpu_function.missing() is None
with_gpu = pytest.mark.skipif(not HAS_GPU, reason="no GPU, or its driver cannot be called")
ARRAYS = [
    np.arange(24, dtype="float32").reshape(2, 3, 4),
    np.arange(24, dtype="float32").reshape(4, 6).T,  # not contiguous
    np.arange(6, dtype="float64").reshape(2, 3).astype("float16"),
    np.array([[-(2**40), 2**40]], "int64"),
    np.arange(256, dtype="uint8"),
    np.arange(-128, 128, dtype="int8"),
    np.array(2.5, "float64"),
    np.arange(4, dtype="int32"),  # stays on the host
    np.zeros((0, 3), "float32"),
    np.array([True, False]),
    np.array([b"a", b"bc"], object),
]


class HostStream:
    """In the place of a stream: what is queued is done by the time of `synchronize`."""

    def __init__(self):
        self.is_closed = False

    def synchronize(self):
        assert not self.is_closed

    def close(self):
        self.is_closed = True


@pytest.fixture
def driver_of_the_host(monkeypatch):
    """Copies as the driver makes them, within the memory of the host; returns their sizes."""
    if tf.config.list_logical_devices("GPU"):
        pytest.skip("tensors lie on the GPU, where the host cannot write")
    sizes = []

    def copy_to_gpu(address, array, stream):
        assert array.flags.c_contiguous and not stream.is_closed
        ctypes.memmove(address, array.ctypes.data, array.nbytes)
        sizes.append(array.nbytes)

    def copy_to_host(array, address, stream):
        assert array.flags.c_contiguous and not stream.is_closed
        ctypes.memmove(array.ctypes.data, address, array.nbytes)
        sizes.append(array.nbytes)

    monkeypatch.setattr(cuda, "Stream", HostStream)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "copy_to_gpu", copy_to_gpu)
    monkeypatch.setattr(cuda, "copy_to_host", copy_to_host)
    return sizes


class Echo(tf.Module):
    """A function that gives back what it gets, and if asked what it got before."""

    def __init__(self, keeps=False):
        super().__init__()
        self.before, self.keeps = tf.Variable(0.0), keeps

    @tf.function(autograph=False)
    def __call__(self, x):
        outputs = {"x": tf.identity(x), "one": tf.constant(1)}
        if self.keeps:
            outputs["before"] = self.before.read_value()
            self.before.assign(tf.reduce_sum(x))
        return outputs


@pytest.fixture
def load(tmp_path):
    """Saves a module, loads it and returns its signature."""

    def save_and_load(module, spec):
        signature = module.__call__.get_concrete_function(spec)
        tf.saved_model.save(module, str(tmp_path), signatures=signature)
        loaded = tf.saved_model.load(str(tmp_path))
        signature = loaded.signatures["serving_default"]
        signature.loaded = loaded  # its variables live as long
        return signature

    return save_and_load


def spec_of(array):
    return tf.TensorSpec(array.shape, tf.constant(array).dtype, name="x")


def check(function, array):
    found = function({"x": array})
    np.testing.assert_array_equal(found["x"], array)
    assert found["x"].dtype == array.dtype and found["x"].shape == array.shape
    assert found["one"] == 1


class TestGpuFunction:
    @pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
    def test_there_and_back(self, driver_of_the_host, load, array):
        check(GpuFunction(load(Echo(), spec_of(array)), "CPU:0"), array)
        is_copied = array.dtype in gpu_function.DTYPES and array.size > 0
        assert driver_of_the_host == ([array.nbytes] * 2 if is_copied else [])

    def test_shapes_and_values_that_change(self, driver_of_the_host, load):
        signature = load(Echo(), tf.TensorSpec([None, 2], tf.float32, name="x"))
        function = GpuFunction(signature, "CPU:0")
        before = []
        for size in (3, 3, 1, 4, 3):
            array = np.random.default_rng(len(before)).normal(size=(size, 2)).astype("float32")
            before.append((array, function({"x": array})["x"]))
        for array, found in before:  # what came out earlier is not overwritten
            np.testing.assert_array_equal(found, array)

    @pytest.mark.parametrize("keeps", [False, True])
    def test_memory_is_used_again_unless_the_function_may_hold_it(
        self, driver_of_the_host, load, monkeypatch, keeps
    ):
        array = np.ones(3, "float32")
        function = GpuFunction(load(Echo(keeps), spec_of(array)), "CPU:0")
        made = []
        empty = tf.raw_ops.Empty
        monkeypatch.setattr(tf.raw_ops, "Empty", lambda **args: made.append(1) or empty(**args))
        for factor in (1, 2, 3):
            found = function({"x": factor * array})
            np.testing.assert_array_equal(found["x"], factor * array)
        assert len(made) == (3 if keeps else 1)
        if keeps:
            assert found["before"] == 6

    def test_what_is_elsewhere_is_read_by_tensorflow(self, driver_of_the_host, load):
        array = np.arange(4, dtype="float32")
        function = GpuFunction(load(Echo(), spec_of(array)), "GPU:7")
        check(function, array)  # its outputs are on the processor
        assert driver_of_the_host == [array.nbytes]

    def test_threads_take_turns(self, driver_of_the_host, load):
        signature = load(Echo(), tf.TensorSpec([1000], tf.float32, name="x"))
        function = GpuFunction(signature, "CPU:0")
        wrong = []

        def run(number):
            array = np.full(1000, number, "float32")
            for _ in range(50):
                if not np.array_equal(function({"x": array})["x"], array):
                    wrong.append(number)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_times_without_copies(self, driver_of_the_host, load):
        array = np.ones(100, "float32")
        function = GpuFunction(load(Echo(), spec_of(array)), "CPU:0")
        times = function.seconds_without_copies({"x": array}, 25)
        assert len(times) == 3
        assert min(times) > 0
        assert driver_of_the_host == [array.nbytes]

    @with_gpu
    @pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype}{array.shape}")
    def test_on_a_gpu(self, load, array):
        function = GpuFunction(load(Echo(), spec_of(array)))
        check(function, array)
        check(function, array)
        function.close()


class TestRemarks:
    def test_gpu_without_the_package(self, monkeypatch):
        monkeypatch.setattr(environment, "gpus", lambda: (environment.Gpu("NVIDIA H100", "580.1"),))
        monkeypatch.setattr(cuda, "missing", lambda: "cuda-bindings is not installed; pip …")
        for runtime in ("tensorflow", "tf_trt"):
            assert "cuda-bindings is not installed" in runtimes.get(runtime).remarks()[-1]
        monkeypatch.setattr(cuda, "missing", lambda: None)
        assert gpu_function.remarks() == []

    def test_nothing_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(environment, "gpus", tuple)
        monkeypatch.setattr(cuda, "missing", lambda: "cuda-bindings is not installed; pip …")
        assert runtimes.get("tensorflow").remarks() == []


class TestMissing:
    def test_gpu_that_is_not_the_first(self, monkeypatch):
        monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [kind])
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["first", "second"])
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["second"])
        monkeypatch.setattr(cuda, "missing", lambda: None)
        assert "another GPU" in gpu_function.missing()
        monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["first", "second"])
        assert gpu_function.missing() is None


class TestMayKeepInputs:
    def test_functions_without_state(self):
        weights = tf.Variable([[1.0, 2.0]])

        @tf.function
        def inner(x):
            return tf.while_loop(lambda y: tf.reduce_sum(y) < 9, lambda y: (y + 1,), (x,))[0]

        @tf.function(input_signature=[tf.TensorSpec([None, 2], tf.float32)])
        def outer(x):
            return inner(x * weights)

        assert not may_keep_inputs(outer.get_concrete_function().graph)

    def test_assignment_in_a_function_that_is_called(self):
        state = tf.Variable([[1.0, 2.0]])

        @tf.function
        def inner(x):
            state.assign(x)
            return x

        @tf.function(input_signature=[tf.TensorSpec([1, 2], tf.float32)])
        def outer(x):
            return inner(x)

        assert may_keep_inputs(outer.get_concrete_function().graph)

    def test_queue(self):
        queue = tf.queue.FIFOQueue(3, [tf.float32])

        @tf.function(input_signature=[tf.TensorSpec([2], tf.float32)])
        def outer(x):
            queue.enqueue(x)
            return x

        assert may_keep_inputs(outer.get_concrete_function().graph)

    @pytest.mark.parametrize("name", ["conv", "transformer", "two_inputs", "module"])
    def test_golden_models_do_not(self, name, tmp_path):
        goldens.export(goldens.GOLDENS[name], tmp_path / "saved_model")
        loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
        assert not may_keep_inputs(loaded.signatures["serving_default"].graph)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_function")
    goldens.export(goldens.GOLDENS["two_inputs"], folder / "saved_model")
    prepared = source.prepare(folder / "saved_model", folder / "source")
    (variant,) = runtimes.expand(["float32@tensorflow"])
    return steps.convert(prepared, variant, folder / "artifact", None, None, 1)


class TestSession:
    def test_copies_are_tensorflows_or_the_drivers(self, artifact, driver_of_the_host, monkeypatch):
        assert gpu_function.missing() == "TensorFlow sees no GPU."
        inputs = goldens.GOLDENS["two_inputs"].examples(2, 0)
        with runtimes.load(artifact, None) as session:
            expected = session.run(inputs)
        assert driver_of_the_host == []
        monkeypatch.setattr(gpu_function, "missing", lambda: None)
        with runtimes.load(artifact, None) as session:
            found = session.run(inputs)
        assert driver_of_the_host == [value.nbytes for value in inputs.values()]
        assert expected.keys() == found.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value)

    def test_wrong_inputs_get_their_sentence(self, artifact, driver_of_the_host, monkeypatch):
        monkeypatch.setattr(gpu_function, "missing", lambda: None)
        with runtimes.load(artifact, None) as session:
            for inputs in ({}, {"image": [[1.0]]}, {"image": None}):
                with pytest.raises(InputError):
                    session.run(inputs)
                with pytest.raises(InputError):
                    session.device_seconds(inputs, 1)
