import json

import numpy as np
import pytest

from tests import goldens
from tfopt import live, saved_model, source
from tfopt.errors import ConversionError, InputError
from tfopt.graph import FrozenGraph


@pytest.fixture(scope="module")
def conv(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "conv"
    goldens.export(goldens.GOLDENS["conv"], path)
    return path


def _run(graph, folder, inputs):
    """Calls a frozen graph the way any TensorFlow program would."""
    import tensorflow as tf

    graph.save(folder)
    loaded = tf.saved_model.load(str(folder))
    outputs = loaded.signatures["serving_default"](
        **{name: tf.constant(value) for name, value in inputs.items()}
    )
    return {name: value.numpy() for name, value in outputs.items()}


def test_frozen_graph_stores_each_weight_once(conv, tmp_path):
    import tensorflow as tf

    prepared = source.prepare(conv, tmp_path / "source")
    stored = sum(p.stat().st_size for p in (conv / "variables").glob("*.data*"))
    weights = goldens.GOLDENS["conv"].build().get_weights()
    num_parameters = sum(weight.size for weight in weights)
    assert stored > 2 * 4 * num_parameters, "Keras 3 stores them twice"
    constants = [
        tf.make_ndarray(node.attr["value"].tensor)
        for node in prepared.frozen_graph().graph_def.node
        if node.op == "Const"
    ]
    sizes = sorted(c.size for c in constants if c.dtype == np.float32 and c.size > 1)
    assert sizes == sorted(weight.size for weight in weights)


def test_frozen_graph_agrees_with_the_live_model(tmp_path):
    golden = goldens.GOLDENS["two_inputs"]
    goldens.export(golden, tmp_path / "model")
    inputs = golden.examples(3, 0)
    outputs = _run(FrozenGraph.from_saved_model(tmp_path / "model"), tmp_path / "frozen", inputs)
    live = golden.build()(inputs)
    for name, value in live.items():
        np.testing.assert_allclose(outputs[name], value, atol=1e-6)


def test_fixed_batch_size_reaches_lists_of_loops(tmp_path):
    golden = goldens.GOLDENS["lstm"]
    goldens.export(golden, tmp_path / "model")
    inputs = golden.examples(3, 0)
    graph = FrozenGraph.from_saved_model(tmp_path / "model")
    assert graph.has_loops
    fixed = graph.with_batch_size(3)
    assert fixed.signature.batch_size == 3
    assert graph.signature.batch_size is None
    outputs = _run(fixed, tmp_path / "fixed", inputs)
    live = golden.build()(next(iter(inputs.values())))
    np.testing.assert_allclose(outputs["output_0"], live, atol=1e-6)


def test_unused_inputs_stay_inputs(tmp_path):
    import tensorflow as tf

    class Module(tf.Module):
        @tf.function(
            input_signature=[tf.TensorSpec((None,), name="used"), tf.TensorSpec((), name="unused")]
        )
        def __call__(self, used, unused):
            return {"out": used + 1.0}

    tf.saved_model.save(Module(), str(tmp_path / "model"))
    graph = FrozenGraph.from_saved_model(tmp_path / "model")
    assert graph.signature.input_names == ("unused", "used")
    inputs = {"used": np.ones(2, np.float32), "unused": np.float32(5)}
    np.testing.assert_array_equal(_run(graph, tmp_path / "frozen", inputs)["out"], [2, 2])


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_keras_files_become_saved_models(tmp_path, name):
    golden = goldens.GOLDENS["dense"]
    model = golden.build()
    model.save(tmp_path / name)
    prepared = source.prepare(tmp_path / name, tmp_path / "source")
    inputs = golden.examples(3, 0)
    outputs = _run(prepared.frozen_graph(), tmp_path / "frozen", inputs)
    np.testing.assert_allclose(outputs["output_0"], model(inputs["features"]), atol=1e-6)
    assert prepared.kind == "saved_model"
    assert prepared.name == "model"


def test_tf_keras_h5_is_loaded_by_tf_keras_where_keras_3_cannot(tmp_path):
    golden = goldens.GOLDENS["tf_keras_conv"]
    model = golden.build()
    model.save(tmp_path / "model.h5")
    prepared = source.prepare(tmp_path / "model.h5", tmp_path / "source")
    inputs = golden.examples(3, 0)
    outputs = _run(prepared.frozen_graph(), tmp_path / "frozen", inputs)
    np.testing.assert_allclose(
        next(iter(outputs.values())), np.asarray(model(inputs["image"])), atol=1e-5
    )


def test_custom_objects_come_from_a_module(tmp_path, monkeypatch):
    (tmp_path / "my_layers.py").write_text(
        "import keras\n"
        "class Scale(keras.layers.Layer):\n"
        "    def call(self, x):\n"
        "        return 3.0 * x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import keras
    import my_layers

    inputs = keras.Input((2,), name="pair")
    keras.Model(inputs, my_layers.Scale()(inputs)).save(tmp_path / "custom.keras")
    with pytest.raises(InputError, match=r"`custom_objects=package\.module`"):
        source.prepare(tmp_path / "custom.keras", tmp_path / "without")
    prepared = source.prepare(
        tmp_path / "custom.keras", tmp_path / "with", custom_objects="my_layers"
    )
    outputs = _run(prepared.frozen_graph(), tmp_path / "f", {"pair": np.ones((1, 2), np.float32)})
    np.testing.assert_allclose(outputs["output_0"], [[3.0, 3.0]])
    with pytest.raises(InputError, match="`custom_objects=no_such` cannot be imported"):
        source.prepare(tmp_path / "custom.keras", tmp_path / "bad", custom_objects="no_such")


def test_string_inputs_and_other_signatures(tmp_path):
    import tensorflow as tf

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="text")])
        def count(self, text):
            return {"num_bytes": tf.strings.length(text)}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "model"), signatures={"count": module.count})
    with pytest.raises(InputError, match="it has: count; choose one with `signature`"):
        source.prepare(tmp_path / "model", tmp_path / "default")
    prepared = source.prepare(tmp_path / "model", tmp_path / "source", signature="count")
    assert prepared.signature.key == "count"
    assert prepared.signature.inputs[0].dtype == "string"
    text = np.array([b"four", b"seven77"], object)
    outputs = _run(prepared.frozen_graph(), tmp_path / "frozen", {"text": text})
    np.testing.assert_array_equal(outputs["num_bytes"], [4, 7])


def test_lookup_tables_cannot_be_frozen_and_say_so(tmp_path):
    import tensorflow as tf

    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            keys = tf.constant(["a", "b"])
            initializer = tf.lookup.KeyValueTensorInitializer(keys, tf.constant([1, 2], tf.int64))
            self.table = tf.lookup.StaticHashTable(initializer, -1)

        @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, name="word")])
        def __call__(self, word):
            return {"number": self.table.lookup(word)}

    module = Module()
    tf.saved_model.save(module, str(tmp_path / "model"))
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    assert prepared.frozen is None
    assert prepared.signature.input_names == ("word",)
    with pytest.raises(ConversionError, match="cannot be frozen"):
        prepared.frozen_graph()


@pytest.mark.parametrize("layer", ["RandomCrop", "BatchNormalization"])
def test_layers_that_change_variables_are_named(layer, tmp_path):
    import tf_keras

    image = tf_keras.Input((6, 6, 1))
    if layer == "RandomCrop":  # its generator stays in a branch that is never taken
        found = tf_keras.layers.RandomCrop(4, 4, name="cut")(image)
    else:
        found = tf_keras.layers.BatchNormalization(name="cut")(image, training=True)
    live.export(tf_keras.Model(image, tf_keras.layers.Flatten()(found)), tmp_path / "model")
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    assert prepared.frozen is None
    with pytest.raises(ConversionError, match="cannot be frozen: cut would change variables"):
        prepared.frozen_graph()


def test_weights_without_their_model_are_refused(tmp_path):
    import keras

    file = tmp_path / "best.weights.h5"
    keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]).save_weights(file)
    with pytest.raises(InputError, match=r"best\.weights\.h5 holds weights without"):
        source.prepare(file, tmp_path / "source")


def test_layers_that_look_values_up_are_named(tmp_path):
    import keras

    kind, text = (keras.Input((1,), dtype="string", name=name) for name in ("kind", "text"))
    looked_up = keras.layers.StringLookup(vocabulary=["cat", "dog"], name="kinds")(kind)
    words = keras.layers.TextVectorization(vocabulary=["a", "b"], name="words")(text)
    live.export(keras.Model([kind, text], [looked_up, words]), tmp_path / "model")
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    with pytest.raises(ConversionError, match=r"in tables \(kinds(_\d)?, words(_\d)?\)"):
        prepared.frozen_graph()


def test_risky_ops_are_named_before_the_model_is_loaded(tmp_path):
    import tensorflow as tf

    target = tmp_path / "written"

    class Module(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None,), name="x")])
        def __call__(self, x):
            tf.io.write_file(str(target), "hello")
            return {"y": x}

    tf.saved_model.save(Module(), str(tmp_path / "model"))
    assert saved_model.count_ops(tmp_path / "model")["WriteFile"] == 1
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    assert "Op WriteFile can write files." in prepared.notes
    assert not target.exists()


def test_damaged_models_get_one_sentence(conv, tmp_path):
    with pytest.raises(InputError, match="it does not exist"):
        source.check_path(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"without saved_model\.pb"):
        source.check_path(tmp_path / "empty")
    (tmp_path / "file.txt").touch()
    with pytest.raises(InputError, match=r"a \.txt file"):
        source.check_path(tmp_path / "file.txt")
    (tmp_path / "empty" / "saved_model.pb").write_bytes(b"\xff\xff\xff")
    with pytest.raises(InputError, match="damaged"):
        source.prepare(tmp_path / "empty", tmp_path / "a")
    for name in ("bad.tflite", "bad.onnx", "bad.keras", "bad.h5"):
        (tmp_path / name).write_bytes(b"nonsense that is no model at all")
        with pytest.raises(InputError, match=name):
            source.prepare(tmp_path / name, tmp_path / f"{name}.source")


def test_onnx_weights_outside_the_folder_are_refused(tmp_path):
    import onnx
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [1], b"\0" * 4, raw=True)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
        [weight],
    )
    model = helper.make_model(graph)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../etc/passwd"
    onnx.save_model(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="outside its folder"):
        source.prepare(tmp_path / "model.onnx", tmp_path / "source")


def test_hash_of_a_live_model_follows_its_weights():
    golden = goldens.GOLDENS["dense"]
    first, second = golden.build(), golden.build()
    assert live.hash_live(first) == live.hash_live(first)
    before = live.hash_live(second)
    weights = second.get_weights()
    weights[0] = weights[0] + 1e-3
    second.set_weights(weights)
    assert live.hash_live(second) != before


def test_hash_of_files_follows_content_and_names(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    before = source.hash_files(tmp_path / "a")
    (tmp_path / "a" / "x").rename(tmp_path / "a" / "y")
    assert source.hash_files(tmp_path / "a") != before


def test_what_was_prepared_is_recorded(conv, tmp_path):
    prepared = source.prepare(conv, tmp_path / "source")
    recorded = json.loads((tmp_path / "source" / "source.json").read_text())
    assert recorded["sha256"] == prepared.sha256 == source.hash_files(conv)
    assert recorded["kind"] == "saved_model"


def test_other_objects_are_no_models(tmp_path):
    with pytest.raises(InputError, match="int is no model"):
        live.export(3, tmp_path / "model")
