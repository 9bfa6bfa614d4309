import importlib
import warnings

import keras
import numpy as np
import pytest

import tfopt
from tests.goldens import GOLDENS
from tests.train.models import FRAMEWORKS, IMAGES, LABELS, compile_, conv, policies
from tfopt.measure import suitability
from tfopt.train import layers as train_layers

HALVES = ("mixed_bfloat16", "mixed_float16")
DEFAULT_FLOAT32 = {"average", "logits", "probabilities"}


@pytest.fixture(params=FRAMEWORKS)
def framework(request):
    return request.param


@pytest.fixture
def model(framework):
    return conv(framework)


def mixed(model):
    return {path for path, name in policies(model).items() if name != "float32"}


class TestSetPrecision:
    @pytest.mark.parametrize("policy", HALVES)
    def test_computes_in_half_but_for_what_loses_by_it(self, model, policy):
        before, expected = policies(model), model.predict(IMAGES, verbose=0)
        half = tfopt.set_precision(model, policy)
        found = policies(half)
        for path, name in found.items():
            assert name == ("float32" if path in DEFAULT_FLOAT32 else policy), path
        assert "block3/conv1" in found
        outputs = half.predict(IMAGES, verbose=0)
        assert outputs.dtype == np.float32
        np.testing.assert_allclose(outputs, expected, atol=0.01)
        assert not np.array_equal(outputs, expected)  # something was rounded
        np.testing.assert_allclose(outputs.sum(1), 1, atol=1e-6)  # the softmax was not
        assert policies(model) == before
        np.testing.assert_array_equal(model.predict(IMAGES, verbose=0), expected)

    def test_weights_are_float32_and_the_same(self, model):
        half = tfopt.set_precision(model, "mixed_bfloat16")
        for old, new in zip(model.get_weights(), half.get_weights(), strict=True):
            assert new.dtype == np.float32
            np.testing.assert_array_equal(new, old)

    def test_convolutions_really_are_in_half(self, model, framework):
        half = tfopt.set_precision(model, "mixed_bfloat16")
        output = half.get_layer("stem")(IMAGES)
        assert output.dtype == "bfloat16"

    def test_there_and_back(self, model):
        half = tfopt.set_precision(model, "mixed_float16")
        back = tfopt.set_precision(half, "float32")
        assert not mixed(back)
        np.testing.assert_array_equal(
            back.predict(IMAGES, verbose=0), model.predict(IMAGES, verbose=0)
        )

    @pytest.mark.parametrize(
        ("pattern", "kept"),
        [
            ("stem", {"stem"}),
            ("block3", {"block3/conv1", "block3/norm", "block3/relu"}),
            ("block3/conv1", {"block3/conv1"}),
            ("block3/.*", {"block3/conv1", "block3/norm", "block3/relu"}),
            ("conv.", {"block3/conv1"}),
        ],
    )
    def test_keeps_what_a_pattern_means(self, model, pattern, kept):
        plain = mixed(tfopt.set_precision(model, "mixed_bfloat16"))
        half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=[pattern])
        assert mixed(half) == plain - kept

    def test_keeps_classes(self, model, framework):
        conv2d = importlib.import_module(framework).layers.Conv2D
        half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=[conv2d])
        assert not {"stem", "block3/conv1"} & mixed(half)
        assert {"hidden", "block3/norm"} <= mixed(half)

    def test_a_saved_one_is_the_same(self, model, framework, tmp_path):
        half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["hidden"])
        half.save(tmp_path / "model.keras")
        loaded = importlib.import_module(framework).models.load_model(tmp_path / "model.keras")
        assert policies(loaded) == policies(half)
        np.testing.assert_array_equal(
            loaded.predict(IMAGES, verbose=0), half.predict(IMAGES, verbose=0)
        )

    @pytest.mark.parametrize("name", sorted(GOLDENS))
    def test_goldens(self, name):
        golden = GOLDENS[name]
        model = golden.build()
        if not hasattr(model, "get_config"):
            pytest.skip("no Keras model")
        inputs = golden.examples(8, 0)
        feed = inputs if len(inputs) > 1 else next(iter(inputs.values()))
        expected = model(feed)
        outputs = tfopt.set_precision(model, "mixed_bfloat16")(feed)
        flatten = keras.tree.flatten
        for found, wanted in zip(flatten(outputs), flatten(expected), strict=True):
            wanted = np.asarray(wanted)
            assert found.dtype == ("float64" if wanted.dtype == "float64" else "float32")
            np.testing.assert_allclose(
                found, wanted, atol=0.05 * max(1, np.abs(wanted).max()), rtol=0
            )

    def test_attention_takes_care_of_its_own_softmax(self):
        x = keras.Input((6, 8), name="x")
        y = keras.layers.MultiHeadAttention(2, 4, name="attention")(x, x)
        model = keras.Model(x, keras.layers.Dense(1, name="head")(y))
        half = tfopt.set_precision(model, "mixed_bfloat16")
        inside = {path: p for path, p in policies(half).items() if path.startswith("attention")}
        assert len(inside) > 4
        assert set(inside.values()) == {"mixed_bfloat16"}
        half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["attention/query"])
        assert "attention/query" not in mixed(half)
        assert "attention/key" in mixed(half)

    def test_softmax_as_an_activation(self, framework):
        layers = importlib.import_module(framework).layers
        model = importlib.import_module(framework).Sequential(
            [
                layers.Input((4,)),
                layers.Dense(4, activation="softmax", name="gate"),
                layers.Dense(4, name="middle"),
                layers.Dense(2, name="head"),
            ]
        )
        assert mixed(tfopt.set_precision(model, "mixed_bfloat16")) == {"middle"}

    def test_logits_before_an_activation_stay(self, framework):
        layers = importlib.import_module(framework).layers
        model = importlib.import_module(framework).Sequential(
            [
                layers.Input((4,)),
                layers.Dense(4, name="first"),
                layers.Dense(4, name="head"),
                layers.Activation("sigmoid", name="sigmoid"),
            ]
        )
        assert mixed(tfopt.set_precision(model, "mixed_bfloat16")) == {"first"}


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = keras.layers.Dense(8, name="body")
        self.head = keras.layers.Dense(2, name="head")

    def call(self, x):
        return self.head(self.body(x))


def test_subclassed_model():
    keras.utils.set_random_seed(0)
    model = Subclassed()
    x = np.ones((2, 3), np.float32)
    expected = model(x)
    half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["head"])
    assert policies(half) == {"body": "mixed_bfloat16", "head": "float32"}
    np.testing.assert_allclose(half(x), expected, atol=0.02)


class TestCopies:
    """What a copy has to take along, and what it has to leave alone."""

    def test_adapted_normalisation(self, framework):
        layers = importlib.import_module(framework).layers
        norm = layers.Normalization(name="norm")
        values = np.random.default_rng(0).normal(300, 7, size=(64, 3)).astype(np.float32)
        norm.adapt(values)
        model = importlib.import_module(framework).Sequential(
            [layers.Input((3,)), norm, layers.Dense(4, name="body"), layers.Dense(1, name="head")]
        )
        half = tfopt.set_precision(model, "mixed_bfloat16")
        assert mixed(half) == {"body"}
        np.testing.assert_array_equal(half.get_layer("norm")(values), norm(values))

    def test_vocabulary(self):
        lookup = keras.layers.IntegerLookup(name="lookup")
        lookup.adapt(np.array([[7], [9], [9]]))
        model = keras.Sequential(
            [
                keras.Input((1,), dtype="int64"),
                lookup,
                keras.layers.Embedding(4, 2, name="table"),
                keras.layers.Flatten(),
                keras.layers.Dense(1, name="head"),
            ]
        )
        half = tfopt.set_precision(model, "mixed_bfloat16")
        assert half.get_layer("lookup").get_vocabulary() == lookup.get_vocabulary()
        ids = np.array([[7], [9], [1]])
        np.testing.assert_allclose(half(ids), model(ids), atol=0.01)

    def test_layers_without_names_inside_custom_ones(self, framework):
        keras_ = importlib.import_module(framework)

        class Block(keras_.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.attention = keras_.layers.MultiHeadAttention(2, 4)
                self.ffn = keras_.layers.Dense(8)
                self.norm = keras_.layers.LayerNormalization()

            def call(self, x):
                return self.norm(x + self.ffn(x + self.attention(x, x)))

        x = keras_.Input((5, 8), name="x")
        y = Block(name="block")(x)
        y = Block(name="second")(y)
        model = keras_.Model(x, keras_.layers.Dense(1, name="head")(y))
        values = np.random.default_rng(0).normal(size=(4, 5, 8)).astype(np.float32)
        half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["block"])
        found = policies(half)
        for path, policy in found.items():
            is_second = path.startswith("second")
            assert policy == ("mixed_bfloat16" if is_second else "float32"), path
        assert sum(path.startswith("second/") for path in found) >= 3
        np.testing.assert_allclose(half(values), model(values), atol=0.05)

    def test_subclassed_with_lazily_built_layers(self, framework):
        keras_ = importlib.import_module(framework)

        @keras_.saving.register_keras_serializable("tests")
        class Lazy(keras_.Model):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.body = keras_.layers.Dense(8)
                self.head = keras_.layers.Dense(2)

            def call(self, x):
                return self.head(self.body(x))

            def get_config(self):
                return {"name": self.name}

        model = Lazy()
        values = np.ones((2, 3), np.float32)
        expected = model(values)
        half = tfopt.set_precision(model, "mixed_bfloat16")
        assert half(values).dtype == "bfloat16"
        np.testing.assert_allclose(np.asarray(half(values), np.float32), expected, atol=0.03)

    def test_operations_with_a_dtype(self):
        ids = keras.Input((3,), dtype="int32", name="ids")
        weights = keras.ops.cast(keras.ops.not_equal(ids, 0), "float32")
        x = keras.layers.Dense(4, name="body")(weights)
        model = keras.Model(ids, keras.layers.Dense(1, name="head")(x))
        half = tfopt.set_precision(model, "mixed_bfloat16")
        assert mixed(half) == {"body"}
        values = np.array([[0, 1, 2]], np.int32)
        np.testing.assert_allclose(half(values), model(values), atol=0.02)

    def test_a_softmax_between_functions_of_tensorflow(self, framework):
        """Nothing casts for those: the softmax is as under Keras' own policy."""
        import tensorflow as tf

        keras_ = importlib.import_module(framework)
        multiply = keras.ops.matmul if framework == "keras" else tf.matmul

        def build():
            x = keras_.Input((4, 8), name="x")
            v = keras_.layers.Dense(8, name="v")(x)
            scores = keras_.layers.Softmax(name="softmax")(keras_.layers.Dense(4, name="k")(x))
            y = multiply(scores, v)
            return keras_.Model(x, keras_.layers.Dense(2, name="head")(y))

        values = np.ones((2, 4, 8), np.float32)
        half = tfopt.set_precision(build(), "mixed_bfloat16")
        assert half(values).dtype == "float32"
        with tfopt.precision("mixed_bfloat16"):
            made = build()
        assert made(values).dtype == "float32"
        expected = "float32" if framework == "keras" else "mixed_bfloat16"
        assert policies(made)["softmax"] == policies(half)["softmax"] == expected

    def test_a_sequential_model_that_was_built_in_half(self, framework):
        layers = importlib.import_module(framework).layers
        with tfopt.precision("mixed_bfloat16"):
            model = importlib.import_module(framework).Sequential(
                [layers.Dense(8, name="body"), layers.Dense(1, name="head")]
            )
        values = np.full((1, 3), 1.001, np.float32)
        model(values)
        assert mixed(model) == {"body"}
        back = tfopt.set_precision(model, "float32")
        body, head = back.get_layer("body"), back.get_layer("head")
        np.testing.assert_allclose(back(values), head(body(values)), rtol=1e-6)
        hidden = values @ np.asarray(body.kernel) + np.asarray(body.bias)
        np.testing.assert_allclose(body(values), hidden, rtol=1e-5)

    def test_named_inputs_in_any_order(self, framework):
        keras = importlib.import_module(framework)
        inputs = {name: keras.Input((size,), name=name) for name, size in (("b", 3), ("a", 2))}
        merged = keras.layers.concatenate([inputs["b"], inputs["a"]])
        model = keras.Model(inputs, keras.layers.Dense(2)(merged))
        copy = tfopt.set_precision(model, "mixed_bfloat16")
        values = {"a": np.ones((4, 2), np.float32), "b": np.full((4, 3), 2, np.float32)}
        np.testing.assert_allclose(copy(values), model(values), rtol=0.02, atol=0.02)

    def test_images_of_any_size(self, framework):
        keras = importlib.import_module(framework)
        layers = keras.layers
        model = keras.Sequential(
            [
                keras.Input((None, None, 3)),
                layers.Conv2D(4, 3),
                layers.MaxPooling2D(),
                layers.Conv2D(2, 3),
            ]
        )
        copy = tfopt.set_precision(model, "mixed_bfloat16")
        images = np.random.default_rng(0).uniform(size=(1, 12, 12, 3)).astype(np.float32)
        np.testing.assert_allclose(copy(images), model(images), atol=0.05)

    def test_frozen_layers_inside_others_stay_frozen(self, framework):
        keras = importlib.import_module(framework)

        class Block(keras.layers.Layer):
            def __init__(self, **kwargs):
                super().__init__(**kwargs)
                self.first, self.second = keras.layers.Dense(3), keras.layers.Dense(3)

            def build(self, shape):
                self.first.build(shape)
                self.second.build((*shape[:-1], 3))
                super().build(shape)

            def call(self, inputs):
                return self.second(self.first(inputs))

        model = keras.Sequential([keras.Input((3,)), Block(name="block"), keras.layers.Dense(2)])
        model.layers[0].first.trainable = False
        copy = tfopt.set_precision(model, "mixed_bfloat16")
        assert len(copy.trainable_variables) == len(model.trainable_variables) == 4
        assert not copy.layers[0].first.trainable
        assert copy.layers[0].second.trainable


class TestTraining:
    @pytest.mark.parametrize("policy", HALVES)
    def test_loss_is_scaled_when_something_computes_in_float16(self, model, framework, policy):
        compile_(model, framework)
        half = tfopt.set_precision(model, policy)
        assert hasattr(half.optimizer, "inner_optimizer") == (policy == "mixed_float16")
        assert not hasattr(model.optimizer, "inner_optimizer")
        # Compiled anew by the user, it is the same.
        compile_(half, framework)
        assert hasattr(half.optimizer, "inner_optimizer") == (policy == "mixed_float16")

    def test_loss_is_not_scaled_when_nothing_does(self, model, framework):
        compile_(model, framework)
        half = tfopt.set_precision(model, "mixed_float16", keep_float32=[".*"])
        assert not hasattr(half.optimizer, "inner_optimizer")

    @pytest.mark.parametrize("policy", HALVES)
    def test_goes_on_where_it_was(self, model, framework, policy):
        """Float32, then half, then float32: slots, step and weights are carried on."""
        compile_(model, framework)
        model.fit(IMAGES, LABELS, batch_size=16, epochs=3, verbose=0, shuffle=False)
        half = tfopt.set_precision(model, policy)
        inner = getattr(half.optimizer, "inner_optimizer", half.optimizer)
        assert int(inner.iterations) == int(model.optimizer.iterations) == 6
        old, new = (
            [np.asarray(v) for v in (o.variables() if callable(o.variables) else o.variables)]
            for o in (model.optimizer, inner)
        )
        for before, after in zip(old, new, strict=True):
            np.testing.assert_array_equal(after, before)
        half.fit(IMAGES, LABELS, batch_size=16, epochs=1, verbose=0, shuffle=False)
        back = tfopt.set_precision(half, "float32")
        assert not hasattr(back.optimizer, "inner_optimizer")
        assert int(back.optimizer.iterations) == 8
        # As if it had been in float32 all the time, up to rounding.
        model.fit(IMAGES, LABELS, batch_size=16, epochs=1, verbose=0, shuffle=False)
        np.testing.assert_allclose(
            back.evaluate(IMAGES, LABELS, verbose=0),
            model.evaluate(IMAGES, LABELS, verbose=0),
            rtol=0.05,
        )

    def test_loss_scale_is_carried_on(self, model, framework):
        compile_(model, framework)
        half = tfopt.set_precision(model, "mixed_float16")
        half.fit(IMAGES, LABELS, batch_size=16, epochs=1, verbose=0)
        scale = _scale(half.optimizer)
        scale.assign(512.0)
        again = tfopt.set_precision(half, "mixed_float16")
        assert float(_scale(again.optimizer)) == 512.0

    def test_own_losses_come_along(self, model, framework):
        keras_ = importlib.import_module(framework)

        def squares(y_true, y_pred):
            return keras_.losses.mean_squared_error(
                keras_.utils.to_categorical(np.zeros(16), 4), y_pred
            )

        model.compile("sgd", squares, jit_compile=False)
        half = tfopt.set_precision(model, "mixed_bfloat16")
        half.fit(IMAGES, LABELS, batch_size=16, verbose=0)

    def test_losses_of_one_name(self, framework):
        keras_ = importlib.import_module(framework)
        x = keras_.Input((2,), name="x")
        outputs = [keras_.layers.Dense(1, name=name)(x) for name in ("a", "b")]
        model = keras_.Model(x, outputs)

        def constant(value):
            def loss(y_true, y_pred):
                return 0 * y_pred[:, 0] + value

            return loss

        model.compile("sgd", loss={"a": constant(1.0), "b": constant(10.0)}, jit_compile=False)
        values = np.ones((4, 2), np.float32)
        labels = {"a": np.ones((4, 1)), "b": np.ones((4, 1))}
        half = tfopt.set_precision(model, "mixed_bfloat16")
        found = half.evaluate(values, labels, verbose=0)
        np.testing.assert_allclose(np.ravel(found)[0], 11.0, rtol=1e-5)

    def test_a_changed_learning_rate(self, model, framework):
        compile_(model, framework, optimizer="rmsprop")
        model.optimizer.learning_rate = 0.125
        half = tfopt.set_precision(model, "mixed_float16")
        assert float(np.asarray(half.optimizer.learning_rate)) == 0.125

    def test_legacy_optimizers_of_tf_keras(self):
        tf_keras = importlib.import_module("tf_keras")
        model = compile_(
            conv("tf_keras"), "tf_keras", optimizer=tf_keras.optimizers.legacy.Adam(1e-2)
        )
        model.fit(IMAGES, LABELS, batch_size=16, verbose=0)
        half = tfopt.set_precision(model, "mixed_bfloat16")
        for old, new in zip(model.optimizer.variables(), half.optimizer.variables(), strict=True):
            np.testing.assert_array_equal(np.asarray(new), np.asarray(old))

    def test_a_loaded_file_scales_its_loss(self, model, framework, tmp_path):
        compile_(model, framework)
        half = tfopt.set_precision(model, "mixed_float16")
        half.save(tmp_path / "model.keras")
        loaded = importlib.import_module(framework).models.load_model(tmp_path / "model.keras")
        assert hasattr(loaded.optimizer, "inner_optimizer")

    def test_what_cannot_be_compiled_again(self, framework):
        keras_ = importlib.import_module(framework)

        class Own(keras_.Sequential):
            def compile(self, **kwargs):
                super().compile(**kwargs)

        model = Own([keras_.layers.Input((2,)), keras_.layers.Dense(1, name="head")], name="own")
        model.compile(optimizer="sgd", loss="mse")
        with pytest.warns(UserWarning, match="'own' is not compiled.*compile of its own"):
            tfopt.set_precision(model, "mixed_bfloat16")

    def test_compiled_without_a_loss(self, model):
        model.compile("sgd")
        half = tfopt.set_precision(model, "mixed_float16")
        assert hasattr(half.optimizer, "inner_optimizer")

    def test_statistics_of_batches_keep_moving(self, framework):
        """With momentum 0.999 a step is smaller than bfloat16 tells apart."""
        found = []
        for policy in ("float32", "mixed_bfloat16"):
            model = tfopt.set_precision(conv(framework, momentum=0.999), policy)
            compile_(
                model, framework, optimizer=importlib.import_module(framework).optimizers.SGD(0.0)
            )
            model.fit(IMAGES, LABELS, batch_size=8, epochs=25, verbose=0, shuffle=False)
            norm = model.get_layer("block3").get_layer("norm")
            found.append([np.asarray(norm.moving_mean), np.asarray(norm.moving_variance)])
        assert np.all(found[0][1] < 0.92)  # it came from 1
        for wanted, got in zip(*found, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-3)


def _scale(optimizer):
    if hasattr(optimizer, "dynamic_scale"):
        return optimizer.dynamic_scale
    return optimizer._loss_scale.current_loss_scale


class TestExport:
    @pytest.mark.parametrize(
        ("framework", "variant"),
        [("keras", "float32@litert"), ("tf_keras", "float32@onnxruntime")],
        indirect=["framework"],
    )
    def test_is_in_float32(self, model, variant, tmp_path):
        """Converters refuse graphs in half precision; outputs are those of the float32 model."""
        half = tfopt.set_precision(model, "mixed_bfloat16")
        tfopt.convert(half, variant, tmp_path / "artifact")
        with tfopt.load(tmp_path / "artifact") as session:
            (outputs,) = session.run({"image": IMAGES[:1]}).values()
        np.testing.assert_allclose(outputs, model(IMAGES[:1]), atol=1e-5)
        assert mixed(half) == mixed(tfopt.set_precision(model, "mixed_bfloat16"))
        assert half.get_layer("stem")(IMAGES[:1]).dtype == "bfloat16"


class TestScope:
    @pytest.mark.parametrize("policy", HALVES)
    @pytest.mark.parametrize("keep", [[], ["stem"], ["block3/.*", "hidden"]])
    def test_gives_what_set_precision_gives(self, framework, policy, keep):
        with tfopt.precision(policy, keep_float32=keep):
            made = conv(framework)
        assert policies(made) == policies(tfopt.set_precision(conv(framework), policy, keep))
        outputs = made.predict(IMAGES, verbose=0)
        assert outputs.dtype == np.float32
        np.testing.assert_allclose(outputs, conv(framework).predict(IMAGES, verbose=0), atol=0.01)
        compile_(made, framework)
        assert hasattr(made.optimizer, "inner_optimizer") == (policy == "mixed_float16")
        made.fit(IMAGES, LABELS, batch_size=16, verbose=0)

    def test_training_inside(self, framework):
        with tfopt.precision("mixed_float16", keep_float32=[".*"]):
            model = compile_(conv(framework), framework)
            assert not mixed(model)
            assert not hasattr(model.optimizer, "inner_optimizer")
            model.fit(IMAGES, LABELS, batch_size=16, verbose=0)

    def test_leaves_nothing_behind(self, framework):
        keras_ = importlib.import_module(framework)
        before = keras_.layers.Layer.__init__, keras_.Model.compile, set(vars(keras_.Model))
        with pytest.raises(ZeroDivisionError), tfopt.precision("mixed_bfloat16"):
            assert keras_.layers.Dense(1).compute_dtype == "bfloat16"
            raise ZeroDivisionError
        after = keras_.layers.Layer.__init__, keras_.Model.compile, set(vars(keras_.Model))
        assert after == before
        assert keras_.layers.Dense(1).compute_dtype == "float32"

    def test_layers_with_a_precision_of_their_own_keep_it(self, framework):
        layers = importlib.import_module(framework).layers
        with tfopt.precision("mixed_bfloat16"):
            own = layers.Dense(1, dtype="float32", name="own")
            usual = layers.Dense(1, name="usual")
        assert (own.compute_dtype, usual.compute_dtype) == ("float32", "bfloat16")

    def test_layers_without_an_init_of_their_own(self, framework):
        class Square(importlib.import_module(framework).layers.Layer):
            def call(self, x):
                return x * x

        with tfopt.precision("mixed_bfloat16"):
            square = Square(name="square")
        assert square(np.ones(3, np.float32)).dtype == "bfloat16"

    def test_loading_inside(self, model, framework, tmp_path):
        compile_(model, framework).save(tmp_path / "model.keras")
        with tfopt.precision("mixed_bfloat16"):
            loaded = importlib.import_module(framework).models.load_model(tmp_path / "model.keras")
        assert loaded.optimizer is not None
        loaded.fit(IMAGES, LABELS, batch_size=16, verbose=0)

    def test_a_pattern_that_means_nothing(self, framework):
        with (
            pytest.raises(tfopt.InputError, match=r"No layer matches 'logit'; near.*logits"),
            tfopt.precision("mixed_bfloat16", keep_float32=["logit"]),
        ):
            conv(framework)


@pytest.mark.parametrize("policy", HALVES)
def test_a_machine_that_loses_by_it_is_warned_of(policy, model):
    loses = not suitability.of_tensorflow(policy.removeprefix("mixed_")).suits
    for make in (lambda: tfopt.set_precision(model, policy), lambda: inside(policy)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            make()
        told = [item for item in caught if "not known to be faster" in str(item.message)]
        assert bool(told) == loses
        for item in told:
            assert str(item.message).startswith(policy)
            assert item.filename == __file__


def inside(policy):
    with tfopt.precision(policy):
        pass


class TestMistakes:
    def test_unknown_policy(self, model):
        for call in (lambda: tfopt.set_precision(model, "float16"), lambda: enter("half")):
            with pytest.raises(tfopt.InputError, match="expected one of float32, mixed_bfloat16"):
                call()

    @pytest.mark.parametrize(
        ("keep", "message"),
        [
            (["logit"], r"No layer matches 'logit'; near names are .*logits"),
            (["qqqqqqq"], r"No layer matches 'qqqqqqq'; model\.summary\(\) lists"),
            (["("], r"'\(' is no regular expression"),
            ([3], r"Got 3 as a layer to keep"),
            ([keras.layers.LSTM], r"No layer is a .*LSTM; the classes of this model are .*Conv2D"),
        ],
    )
    def test_patterns(self, model, keep, message):
        with pytest.raises(tfopt.InputError, match=message):
            tfopt.set_precision(model, "mixed_bfloat16", keep_float32=keep)

    def test_a_name_of_two_layers(self):
        x = keras.Input((4,), name="x")
        first = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="d")], name="a")
        second = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="d")], name="b")
        model = keras.Model(x, second(first(x)))
        with pytest.raises(tfopt.InputError, match=r"'d' means 2 layers \(a/d, b/d\)"):
            tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["d"])
        half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["a/d"])
        assert policies(half)["a/d"] == "float32"
        tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["(.*/)?d"])

    def test_a_path_that_is_a_name_elsewhere(self):
        x = keras.Input((4,), name="x")
        inner = keras.Sequential(
            [keras.Input((4,)), keras.layers.Dense(4, name="d"), keras.layers.ReLU()], name="a"
        )
        y = keras.layers.Dense(4, name="d")(inner(x))
        model = keras.Model(x, keras.layers.Dense(1, name="head")(y))
        half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["d"])
        assert (policies(half)["d"], policies(half)["a/d"]) == ("float32", "mixed_bfloat16")

    def test_an_error_that_precision_has_no_part_in(self):
        names = {}
        exec("def gone(x):\n    return missing(x)", names)
        model = keras.Sequential(
            [keras.Input((2,)), keras.layers.Lambda(lambda x: x, name="own"), keras.layers.Dense(1)]
        )
        model.layers[0].function = names["gone"]
        with pytest.raises(tfopt.InputError, match=r"cannot be made again.*'gone'"):
            tfopt.set_precision(model, "mixed_bfloat16")

    def test_no_model(self):
        with pytest.raises(tfopt.InputError, match="dict is no Keras model"):
            tfopt.set_precision({}, "mixed_bfloat16")

    def test_not_built(self, framework):
        keras_ = importlib.import_module(framework)
        model = keras_.Sequential([keras_.layers.Dense(2)], name="fresh")
        with pytest.raises(tfopt.InputError, match=r"'fresh' is not built"):
            tfopt.set_precision(model, "mixed_bfloat16")

    def test_cannot_be_made_again(self, framework):
        keras_ = importlib.import_module(framework)

        class Odd(keras_.Model):
            def __init__(self, size):
                super().__init__(name="odd")
                self.body = keras_.layers.Dense(size)

            def call(self, x):
                return self.body(x)

            def get_config(self):
                raise NotImplementedError("no configuration")

        model = Odd(2)
        model(np.ones((1, 3), np.float32))
        with pytest.raises(tfopt.InputError, match=r"'odd' cannot be made again.*no configuration"):
            tfopt.set_precision(model, "mixed_bfloat16")

    def test_a_layer_that_casts_by_itself(self, framework):
        import tensorflow as tf

        keras_ = importlib.import_module(framework)

        class Stubborn(keras_.layers.Layer):
            def call(self, x):
                return tf.concat([tf.cast(x, tf.float32), x], axis=-1)

            def get_config(self):
                return super().get_config()

        model = keras_.Sequential(
            [
                keras_.layers.Input((3,)),
                Stubborn(name="stubborn"),
                keras_.layers.Dense(1, name="head"),
            ]
        )
        with pytest.raises(
            tfopt.InputError, match=r"'stubborn' \(Stubborn\) cannot compute.*\['stubborn'\]"
        ):
            tfopt.set_precision(model, "mixed_bfloat16")
        half = tfopt.set_precision(model, "mixed_bfloat16", keep_float32=["stubborn"])
        assert half(np.ones((1, 3), np.float32)).dtype == "float32"


def enter(policy):
    with tfopt.precision(policy):
        pass


def test_paths_are_those_of_the_model(framework):
    paths = [place.path for place in train_layers.walk(conv(framework))]
    assert len(paths) == len(set(paths))
    assert {"stem", "block3", "block3/conv1", "logits"} <= set(paths)
