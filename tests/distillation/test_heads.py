"""Which outputs belong together, and what is said where nothing tells."""

import importlib

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given
from hypothesis import strategies as st

import tfopt
from tests.train.models import FRAMEWORKS
from tfopt.distillation import heads, losses
from tfopt.distillation.heads import Heads

each = pytest.mark.parametrize("framework", FRAMEWORKS)

X = np.random.default_rng(0).normal(size=(16, 6)).astype(np.float32)


def of(names, is_ordered=True, shapes=None):
    shapes = shapes or dict.fromkeys(names, (3,))
    return Heads(tuple(names), shapes, is_ordered)


def pair(student, teacher, chosen=None):
    return heads.pair(student, teacher, "wide.keras", chosen)


class TestPairing:
    @given(st.permutations(["age", "sex", "box", "mask"]))
    def test_equal_names_belong_together_in_any_order(self, names):
        found = pair(of(names), of(["age", "sex", "box", "mask"]))
        assert found == {name: name for name in names}

    @given(st.integers(2, 40), st.booleans())
    def test_numbers_are_counted(self, count, is_ordered):
        """A SavedModel gives its outputs as a dictionary, which sorts 10 before 2."""
        theirs = sorted(f"output_{place}" for place in range(count))
        mine = [f"dense_{place + 5}" for place in range(count)]
        found = pair(of(mine), of(theirs, is_ordered=False))
        assert found == {own: f"output_{place}" for place, own in enumerate(mine)}

    def test_shapes_tell_where_names_do_not(self):
        student = of(["a", "b"], False, {"a": (5,), "b": (4,)})
        teacher = of(["x", "y"], False, {"x": (4,), "y": (5,)})
        assert pair(student, teacher) == {"a": "y", "b": "x"}

    def test_what_is_chosen_comes_first(self):
        found = pair(of(["a", "b"], False), of(["x", "y"], False), {"a": "y"})
        assert found == {"a": "y", "b": "x"}

    @pytest.mark.parametrize(
        ("student", "teacher", "chosen", "match"),
        [
            (of(["a", "b"], False), of(["x", "y"], False), None, "Neither names nor shapes match"),
            (of(["a", "b"]), of(["x", "y", "z"]), None, "has 3 outputs and the student 2"),
            (of(["a"]), of(["x"]), {"c": "x"}, "The student has no output 'c'; expected one of a"),
            (of(["a"]), of(["x"]), {"a": "w"}, "has no output 'w'; expected one of x"),
        ],
    )
    def test_what_cannot_be_told_is_asked(self, student, teacher, chosen, match):
        with pytest.raises(tfopt.InputError, match=match) as caught:
            pair(student, teacher, chosen)
        assert "\n" not in str(caught.value)


class TestGiven:
    def test_a_list_is_in_the_order_of_the_names(self):
        assert heads.given([1, None, 3], ["a", "b", "c"], "labels") == {"a": 1, "c": 3}

    @pytest.mark.parametrize(
        ("values", "match"),
        [
            ({"ab": 1}, "no output 'ab', which labels are given for; expected one of "),
            ([1], "labels for 1 outputs and the student has 2"),
            (np.zeros(3), "labels are one array and the student has 2 outputs"),
        ],
    )
    def test_others_are_refused(self, values, match):
        with pytest.raises(tfopt.InputError, match=match):
            heads.given(values, ["a", "b"], "labels")


def softmax(logits):
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def soft(student, teacher, temperature=4.0):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    return temperature**2 * (p * np.log(p / q)).sum(-1).mean()


def two_heads(framework, seed, names=None, is_subclassed=False, structure=dict):
    """A model with classes and a box; the keys are no names of layers unless `names`."""
    keras = importlib.import_module(framework)
    keras.utils.set_random_seed(seed)
    new = keras.layers.Dense

    def packed(category, box):
        return {"category": category, "box": box} if structure is dict else (category, box)

    if is_subclassed:

        class Net(keras.Model):
            def __init__(self):
                super().__init__()
                self.one, self.other = new(5), new(4)

            def call(self, inputs):
                return packed(self.one(inputs), self.other(inputs))

        model = Net()
        model(X[:2])
        return model
    inputs = keras.Input((6,))
    return keras.Model(inputs, packed(new(5)(inputs), new(4)(inputs)))


@each
@pytest.mark.parametrize("student_is_subclassed", [False, True])
@pytest.mark.parametrize("teacher_is_subclassed", [False, True])
@pytest.mark.parametrize("structure", [dict, tuple])
def test_labels_and_losses_go_to_their_heads(
    framework, student_is_subclassed, teacher_is_subclassed, structure
):
    keras = importlib.import_module(framework)
    student = two_heads(framework, 0, is_subclassed=student_is_subclassed, structure=structure)
    teacher = two_heads("keras", 1, is_subclassed=teacher_is_subclassed, structure=structure)
    category = np.arange(16) % 5
    box = np.random.default_rng(1).normal(size=(16, 4)).astype(np.float32)
    entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if structure is dict:
        given, labels = {"category": entropy, "box": "mse"}, {"category": category, "box": box}
    else:
        given, labels = [entropy, "mse"], [category, box]
    z, t = (
        [np.asarray(value, np.float64) for value in (list(o.values()) if structure is dict else o)]
        for o in (student(X), teacher(X))
    )
    keys = list(student(X)) if structure is dict else ["category", "box"]
    c, b = keys.index("category"), keys.index("box")
    expected = soft(z[c], t[c]) + np.square(z[b] - t[b]).mean()
    hard = -np.log(softmax(z[c]))[np.arange(16), category].mean() + np.square(z[b] - box).mean()
    distiller = tfopt.Distiller(student, teacher, alpha=0.5)
    distiller.compile(keras.optimizers.SGD(0.0), given, jit_compile=False)
    history = distiller.fit(X, labels, batch_size=16, verbose=0).history
    np.testing.assert_allclose(history["teacher_loss"], [expected], rtol=1e-4)
    np.testing.assert_allclose(history["label_loss"], [hard], rtol=1e-4)


@each
def test_twelve_outputs_of_a_saved_model_keep_their_order(framework, tmp_path):
    keras = importlib.import_module(framework)

    def many(framework, offset):
        keras = importlib.import_module(framework)
        inputs = keras.Input((6,))
        return keras.Model(
            inputs,
            [
                keras.layers.Dense(
                    2, kernel_initializer="zeros",
                    bias_initializer=keras.initializers.Constant(place + offset),
                )(inputs)
                for place in range(12)
            ],
        )  # fmt: skip

    many("keras", 0.5).export(tmp_path / "saved", verbose=False)
    distiller = tfopt.Distiller(many(framework, 0.0), tmp_path / "saved")
    distiller.compile(keras.optimizers.SGD(0.0), ["mse"] * 12, jit_compile=False)
    labels = [np.zeros((16, 2), np.float32)] * 12
    history = distiller.fit(X, labels, batch_size=16, verbose=0).history
    np.testing.assert_allclose(history["teacher_loss"], [12 * 0.25], rtol=1e-5)
    assert any("'output_10'" in note for note in distiller.notes)


@each
def test_losses_by_key(framework):
    keras = importlib.import_module(framework)
    student, teacher = two_heads(framework, 0), two_heads("keras", 1)
    distiller = tfopt.Distiller(student, teacher, losses={"box": losses.SquaredError()})
    distiller.compile(keras.optimizers.SGD(0.0), jit_compile=False)
    history = distiller.fit(X, batch_size=16, verbose=0).history
    expected = np.square(np.asarray(student(X)["box"]) - np.asarray(teacher(X)["box"])).mean()
    np.testing.assert_allclose(history["teacher_loss"], [expected], rtol=1e-4)


@each
class TestWhatAnOutputIs:
    """Classes or values, where the loss does not say so."""

    def notes(self, framework, activation, loss, units=3):
        keras = importlib.import_module(framework)
        models = []
        for seed in (0, 1):
            keras.utils.set_random_seed(seed)
            inputs = keras.Input((6,))
            outputs = keras.layers.Dense(units, activation=activation, name="out")(inputs)
            models.append(keras.Model(inputs, outputs))
        distiller = tfopt.Distiller(*models)
        distiller.compile(keras.optimizers.SGD(0.01), loss, jit_compile=False)
        labels = np.eye(units, dtype=np.float32)[np.arange(16) % units]
        distiller.fit(X, labels, batch_size=16, verbose=0)
        return distiller.notes[-1]

    def test_a_softmax_is_of_classes_whatever_the_loss(self, framework):
        def focal(labels, outputs):
            return -tf.reduce_sum(labels * (1 - outputs) ** 2 * tf.math.log(outputs + 1e-7), -1)

        assert "SoftTargets" in self.notes(framework, "softmax", focal)
        assert "SoftTargets" in self.notes(framework, "softmax", "mse")

    def test_a_sigmoid_with_a_loss_of_its_own(self, framework):
        def own(labels, outputs):
            return tf.reduce_mean(tf.abs(labels - outputs), -1)

        assert "SoftTargets" in self.notes(framework, "sigmoid", own)

    def test_values_stay_values(self, framework):
        assert "SquaredError" in self.notes(framework, None, "mse")
        assert "SquaredError" in self.notes(framework, None, "huber")
