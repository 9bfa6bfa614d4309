import importlib
import math

import numpy as np
import pytest

import tfopt
from tests.train.models import FRAMEWORKS, IMAGES, conv, policies
from tfopt.train import layer_times, profile
from tfopt.train.assignment import INPUT

FLOATING = ["stem", "block3/conv1", "block3/norm", "block3/relu", "add", "hidden"]
STAYING = ["average", "logits", "probabilities"]


@pytest.fixture(scope="module", autouse=True)
def _short_timings():
    """Long enough for what these tests look at."""
    patch = pytest.MonkeyPatch()
    patch.setattr(layer_times, "MAX_S", 0.2)
    patch.setattr(profile, "STEP_MAX_S", 1.0)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def profiles():
    """Of the same model of both frameworks, in inference."""
    return {
        framework: tfopt.profile_precision(
            conv(framework), IMAGES, "mixed_bfloat16", for_training=False, quiet=True
        )
        for framework in FRAMEWORKS
    }


def error_by_hand(model, half):
    """Of a copy in which all layers but some are named to stay in float32."""
    others = [path for path in FLOATING if path not in half]
    copy = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=others)
    expected, found = (np.asarray(m(IMAGES[:16]), np.float64) for m in (model, copy))
    return math.sqrt(np.mean((found - expected) ** 2) / np.var(expected))


@pytest.mark.parametrize("framework", FRAMEWORKS)
class TestTable:
    def test_layers_and_reasons(self, profiles, framework):
        table = profiles[framework].table.set_index("layer")
        assert sorted(table.index) == sorted(FLOATING + STAYING)
        for path in STAYING:
            assert table.dtype[path] == "float32"
            assert table.reason[path].startswith("stays: ")
        assert table.time_share.sum() == pytest.approx(1)
        measured = table.loc[FLOATING]
        assert (measured.speedup_low <= measured.speedup).all()
        assert (measured.speedup <= measured.speedup_high).all()
        assert table.loc[STAYING].speedup.isna().all()

    def test_errors_by_hand(self, profiles, framework):
        table = profiles[framework].table.set_index("layer")
        model = conv(framework)
        for path in FLOATING:
            assert table.error[path] == pytest.approx(error_by_hand(model, [path]), rel=1e-3)
        assert table.loc[STAYING].error.isna().all()

    def test_the_profile_is_what_set_precision_makes(self, profiles, framework):
        found = profiles[framework]
        model = conv(framework)
        copy = tfopt.set_precision(model, found.policy, found.keep_float32)
        chosen = found.table.set_index("layer").dtype
        for path, policy in policies(copy).items():
            assert policy.removeprefix("mixed_") == chosen[path]
        half = [path for path in FLOATING if chosen[path] != "float32"]
        expected = error_by_hand(model, half) if half else 0
        assert found.error == pytest.approx(expected, rel=1e-3)

    def test_text(self, profiles, framework):
        text = str(profiles[framework])
        assert "block3/conv1" in text
        assert "times as fast as float32" in text


def with_slow_layers(keras):
    """A model with a layer that is slow in float32 and one that is slow in half precision."""

    class Slow(keras.layers.Layer):
        """Multiplies matrices for nothing in one of the dtypes."""

        def __init__(self, slow_in, **kwargs):
            super().__init__(**kwargs)
            self.slow_in = slow_in

        def call(self, inputs):
            import tensorflow as tf

            if (self.slow_in == "float32") != (self.compute_dtype == "float32"):
                return inputs * 1
            work = tf.ones([400, 400]) * tf.cast(inputs[0, 0], "float32")
            for _ in range(20):
                work = tf.tanh(tf.matmul(work, work))
            return inputs + tf.cast(0 * work[0, 0], inputs.dtype)

        def get_config(self):
            return {**super().get_config(), "slow_in": self.slow_in}

    inputs = keras.Input((8,))
    x = keras.layers.Dense(8, name="first")(inputs)
    x = Slow("float32", name="gains")(x)
    x = Slow("half", name="loses")(x)
    x = keras.layers.Dense(8, name="second")(x)
    return keras.Model(inputs, keras.layers.Dense(2, name="out")(x))


@pytest.mark.parametrize("framework, for_training", [("keras", True), ("tf_keras", False)])
def test_a_layer_that_loses_stays_and_one_that_gains_does_not(framework, for_training):
    model = with_slow_layers(importlib.import_module(framework))
    before = model.get_weights()
    data = np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)
    found = tfopt.profile_precision(
        model, data, "mixed_bfloat16", for_training=for_training, quiet=True
    )
    table = found.table.set_index("layer")
    assert table.dtype["gains"] == "bfloat16"
    assert table.reason["gains"] == "gains"
    assert table.dtype["loses"] == "float32"
    assert table.reason["loses"] == "loses time"
    assert "loses" in found.keep_float32
    assert "gains" not in found.keep_float32
    assert found.policy == "mixed_bfloat16"
    assert found.speedup.low > 1.2
    assert found.global_speedup.high < found.speedup.low
    assert table.time_share["gains"] > 0.8
    for value, weight in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, weight)
    assert set(policies(model).values()) == {"float32"}


def test_the_error_is_kept():
    max_error = 0.002
    found = tfopt.profile_precision(
        conv("keras"), IMAGES, "mixed_bfloat16", max_error=max_error, for_training=False, quiet=True
    )
    assert found.error <= max_error
    assert found.global_speedup is None


def test_values_beyond_the_range_stay(capsys):
    keras = importlib.import_module("keras")
    inputs = keras.Input((4,))
    x = keras.layers.Rescaling(1e6, name="large")(inputs)
    x = keras.layers.Rescaling(1e-6, name="small")(x)
    model = keras.Model(inputs, keras.layers.Dense(2, name="out")(x))
    found = tfopt.profile_precision(model, np.ones((8, 4)), "mixed_float16", for_training=False)
    table = found.table.set_index("layer")
    assert table.error["large"] == math.inf
    assert table.dtype["large"] == "float32"
    printed = capsys.readouterr().err
    assert "[1/3] large: " in printed
    assert "out: stays in float32" in printed


def test_calls_and_where_their_inputs_come_from():
    import tensorflow as tf

    keras = importlib.import_module("keras")
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = keras.layers.Dense(4, name="shared")
    x, y = shared(a), shared(b)
    z = keras.layers.Add(name="sum")([x, y])
    out = keras.layers.Dense(1, name="out")(keras.ops.relu(z))
    model = keras.Model([a, b], out)
    layers = [model.get_layer(name) for name in ("shared", "sum", "out")]
    calls = layer_times.record_calls(model, layers, [tf.ones((2, 4)), tf.zeros((2, 4))], False)
    assert [len(found) for found in calls] == [2, 1, 1]
    assert [call.sources for call in calls[0]] == [[(INPUT, 8)], [(INPUT, 8)]]
    assert calls[1][0].sources == [(0, 8), (0, 8)]
    assert calls[2][0].sources == [(1, 8)]  # through an operation that is no layer
    assert "call" not in vars(shared)


def test_attention_and_recurrence():
    keras = importlib.import_module("keras")
    tokens = keras.Input((6,), dtype="int32")
    x = keras.layers.Embedding(20, 8, name="words")(tokens)
    x = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
    x = keras.layers.LSTM(8, name="memory")(x)
    model = keras.Model(tokens, keras.layers.Dense(3, name="out")(x))
    found = tfopt.profile_precision(
        model, np.arange(24).reshape(4, 6) % 20, "mixed_bfloat16", quiet=True
    )
    table = found.table.set_index("layer")
    assert list(table.index) == ["words", "attention", "memory", "out"]
    assert table.error[["words", "attention", "memory"]].between(1e-5, 0.1).all()
    assert table.speedup[["words", "attention", "memory"]].notna().all()


def test_relative_error_by_hand():
    reference = [np.array([0.0, 2.0]), np.array([1.0, 1.0])]
    assert profile.relative_error(reference, reference) == 0
    off = [np.array([0.5, 2.0]), np.array([1.0, 1.0])]
    assert profile.relative_error(reference, off) == pytest.approx(math.sqrt(0.125 / 1))
    off = [np.array([0.5, 2.0]), np.array([1.0, 4.0])]  # of a constant, relative to its power
    assert profile.relative_error(reference, off) == pytest.approx(math.sqrt(4.5 / 1))
    assert profile.relative_error(reference, [np.array([0, math.nan]), reference[1]]) == math.inf


@pytest.mark.parametrize(
    "options, message",
    [
        ({"policy": "half"}, "expected one of"),
        ({"policy": "float32"}, "to compare with it"),
        ({"max_error": -1}, "max_error is -1"),
        ({"keep_float32": ["stemm"]}, "near names are stem"),
        ({"data": []}, "no data"),
    ],
)
def test_wrong_arguments(options, message):
    given = {"data": IMAGES, "policy": "mixed_bfloat16", "quiet": True} | options
    with pytest.raises(tfopt.InputError, match=message):
        tfopt.profile_precision(conv("keras"), **given)


def test_without_half_precision_none_is_profiled(monkeypatch):
    advice = tfopt.PrecisionAdvice("float32", "a processor", "it has no bfloat16 instructions.")
    monkeypatch.setattr(profile, "recommend_precision", lambda: advice)
    with pytest.raises(tfopt.InputError, match="Name a policy"):
        tfopt.profile_precision(conv("keras"), IMAGES, quiet=True)
