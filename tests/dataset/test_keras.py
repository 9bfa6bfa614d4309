"""What is read equals what Keras makes of the same data in `predict`, `evaluate` and `fit`."""

import math

import numpy as np
import pandas as pd
import pytest

from tfopt import dataset, keras_names, live
from tfopt.errors import InputError
from tfopt.graph import FrozenGraph
from tfopt.signature import Signature
from tfopt.train import training_data

COUNT = 20
RNG = np.random.default_rng(0)
WIDE, NARROW = RNG.normal(size=(COUNT, 2)), RNG.normal(size=(COUNT, 2))
CLASSES, NUMBERS = RNG.integers(0, 3, COUNT), RNG.normal(size=COUNT)


def framework(name):
    return pytest.importorskip(name)


def two_inputs(keras, structure):
    """The inputs are "z" and "b", which a signature sorts the other way round."""
    z, b = keras.Input((2,), name="z"), keras.Input((2,), name="b")
    hidden = keras.layers.Concatenate()([z * 2.0, b])
    classes = keras.layers.Dense(3, "softmax", name="classes")(hidden)
    number = keras.layers.Dense(1, name="amount")(hidden)
    inputs = {"list": [z, b], "dict": {"z": z, "b": b}}[structure]
    outputs = {"list": [number, classes], "dict": {"kind": classes, "age": number}}[structure]
    return keras.Model(inputs, outputs)


@pytest.fixture(scope="module", params=["keras-list", "keras-dict", "tf_keras-list"])
def exported(request, tmp_path_factory):
    """A model, its signature, and its graph as a function."""
    import tensorflow as tf

    name, _, structure = request.param.partition("-")
    model = two_inputs(framework(name), structure)
    folder = tmp_path_factory.mktemp("exported") / "model"
    live.export(model, folder)
    graph = FrozenGraph.from_saved_model(folder, "serving_default")
    signature = keras_names.read(folder, graph.signature)
    loaded = tf.saved_model.load(str(folder))
    return model, signature, loaded


def run_as_read(x, exported, folder):
    """Outputs of the graph, in the order of `x`."""
    import tensorflow as tf

    _, signature, loaded = exported
    written = dataset.write((x, np.arange(COUNT)), signature, folder)
    rows = {}
    for examples in filter(None, (written.calibration, written.evaluation)):
        for inputs, labels, _ in examples.batches(signature, 1):
            fed = {name: tf.constant(array) for name, array in inputs.items()}
            outputs = loaded.signatures["serving_default"](**fed)
            rows[int(labels[0])] = {name: value.numpy()[0] for name, value in outputs.items()}
    assert sorted(rows) == list(range(COUNT))
    return {name: np.stack([rows[i][name] for i in range(COUNT)]) for name in rows[0]}


FORMS = {
    "list": [WIDE, NARROW],
    "lists of numbers": [WIDE.tolist(), NARROW.tolist()],
    "frames": [pd.DataFrame(WIDE), pd.DataFrame(NARROW)],
    "by name": {"b": NARROW, "z": WIDE},
    "frames by name": {"b": pd.DataFrame(NARROW), "z": pd.DataFrame(WIDE)},
    "whole numbers": [(WIDE * 100).astype(np.int64), (NARROW * 100).astype(np.int8)],
    "booleans": [WIDE > 0, NARROW > 0],
}


@pytest.mark.parametrize("form", FORMS)
def test_predict(form, exported, tmp_path):
    x = FORMS[form]
    model = exported[0]
    if isinstance(model.input, dict) and isinstance(x, list):
        x = dict(zip(("z", "b"), x, strict=True))
    expected = model.predict(
        {name: np.asarray(part) for name, part in x.items()}
        if isinstance(x, dict)
        else [np.asarray(part) for part in x],
        verbose=0,
    )
    expected = expected if isinstance(expected, dict) else dict(enumerate(expected))
    found = run_as_read(x, exported, tmp_path)
    ports = keras_names.outputs_of(model)
    assert len(ports) == len(expected) == len(found)
    for place, port in enumerate(ports):
        wanted = expected[port.key if port.key in expected else place]
        np.testing.assert_allclose(found[port.exported], wanted, rtol=1e-4, atol=1e-4)


class TestLabels:
    def test_go_to_the_outputs_that_fit_gives_them_to(self, exported, tmp_path):
        model, signature, _ = exported
        is_dict = isinstance(model.input, dict)
        y = {"kind": CLASSES, "age": NUMBERS} if is_dict else [NUMBERS, CLASSES]
        x = {"z": WIDE, "b": NARROW}
        written = dataset.write((x, y), signature, tmp_path)
        of_classes = next(
            spec.name for spec in signature.outputs if spec.shape is not None and spec.shape[1] == 3
        )
        names = {spec.name for spec in signature.outputs}
        assert set(written.evaluation.label_names) == names
        for inputs, labels, _ in written.evaluation.batches(signature, 1):
            row = int(np.argmin(np.abs(WIDE - inputs["z"]).sum(1)))
            (of_numbers,) = names - {of_classes}
            assert labels[of_classes] == CLASSES[row]
            assert labels[of_numbers] == NUMBERS[row]

    def test_by_name_of_the_last_layer(self, exported, tmp_path):
        _, signature, _ = exported
        y = {"classes": CLASSES, "amount": NUMBERS}
        written = dataset.write(({"z": WIDE, "b": NARROW}, y), signature, tmp_path)
        assert len(written.evaluation.label_names) == 2

    def test_other_names_are_refused(self, exported, tmp_path):
        _, signature, _ = exported
        with pytest.raises(InputError, match="labels for kind, size; the model's outputs are"):
            dataset.write(
                ({"z": WIDE, "b": NARROW}, {"kind": CLASSES, "size": NUMBERS}), signature, tmp_path
            )


def one_output(keras):
    return keras.Sequential([keras.Input((2,), name="x"), keras.layers.Dense(3, "softmax")])


ONE_OUTPUT = {
    "frame and series": (pd.DataFrame(WIDE), pd.Series(CLASSES)),
    "lists": (WIDE.tolist(), CLASSES.tolist()),
    "weights": (WIDE, CLASSES, np.linspace(0, 2, COUNT)),
    "weights in a series": (pd.DataFrame(WIDE), CLASSES, pd.Series(np.linspace(0, 2, COUNT))),
    "whole numbers": ((WIDE * 10).astype(int), CLASSES[:, None]),
}


@pytest.mark.parametrize("name", ["keras", "tf_keras"])
@pytest.mark.parametrize("form", ONE_OUTPUT)
def test_evaluate(form, name):
    model = one_output(framework(name))
    model.compile("sgd", "sparse_categorical_crossentropy")
    data = ONE_OUTPUT[form]
    x, y, weights = (*map(np.asarray, data), None)[:3]
    expected = model.evaluate(x, y, sample_weight=weights, verbose=0)
    read = training_data.read(data, model)
    assert model.evaluate(**read.train, verbose=0) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("structure", ["list", "dict"])
def test_evaluate_several_outputs(structure):
    model = two_inputs(framework("keras"), structure)
    losses = {"kind": "sparse_categorical_crossentropy", "age": "mse"}
    y = {"kind": CLASSES, "age": NUMBERS}
    weights = {"kind": np.linspace(0, 1, COUNT), "age": np.linspace(1, 0, COUNT)}
    if structure == "list":
        losses, y, weights = ([part["age"], part["kind"]] for part in (losses, y, weights))
    model.compile("sgd", losses)
    x = {"z": WIDE, "b": NARROW} if structure == "dict" else [WIDE, NARROW]
    expected = model.evaluate(x, y, sample_weight=weights, verbose=0)
    read = training_data.read((x, y, weights), model)
    assert model.evaluate(**read.train, verbose=0) == pytest.approx(expected, rel=1e-5)


class TestTrainingData:
    def test_data_sets_stay_as_they_are(self):
        import keras

        class Batches(keras.utils.PyDataset):
            def __len__(self):
                return math.ceil(COUNT / 8)

            def __getitem__(self, index):
                return WIDE[index * 8 : index * 8 + 8], CLASSES[index * 8 : index * 8 + 8]

        data = Batches()
        assert training_data.read(data, one_output(keras)).train["x"] is data

    def test_validation_without_end_is_refused(self):
        import keras
        import tensorflow as tf

        data = tf.data.Dataset.from_tensor_slices((WIDE, CLASSES)).batch(4)
        for pair in (data.repeat(), (data, data.repeat()), (data.repeat(), data)):
            with pytest.raises(InputError, match=r"never ends; leave out repeat\(\)"):
                training_data.read(pair, one_output(keras))

    def test_notes_and_held_out_part(self):
        import keras

        arrays = {"x_train": WIDE[:15], "y_train": CLASSES[:15],
                  "x_test": WIDE[15:], "y_test": CLASSES[15:]}  # fmt: skip
        read = training_data.read(arrays, one_output(keras))
        assert len(read.train["x"]) == 15
        np.testing.assert_array_equal(read.validation[1], CLASSES[15:])
        assert read.notes == ("x was cast from float64 to float32.",)


def test_order_by_numbers_of_keras(tmp_path):
    """A SavedModel of a subclass names inputs args_0, args_0_1 …: 10 comes after 9."""
    from tfopt.signature import TensorSpec

    def named(names):
        return tuple(TensorSpec(name, (None,), "float32") for name in sorted(names))

    inputs = ["args_0", *(f"args_0_{i}" for i in range(1, 12))]
    found = keras_names.read(
        tmp_path, Signature("s", named(inputs), named(f"output_{i}" for i in range(12)))
    )
    assert sorted(found.inputs, key=lambda spec: spec.position) == sorted(
        found.inputs, key=lambda spec: inputs.index(spec.name)
    )
    assert [spec.position for spec in found.outputs] == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
