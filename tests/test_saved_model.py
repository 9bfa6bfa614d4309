"""SavedModels that hold more, or something else, than one graph of dense tensors."""

import numpy as np
import pytest

from tfopt import saved_model, source
from tfopt.errors import ConversionError, InputError
from tfopt.search import candidates

X = np.array([[1.0, 2.0], [3.0, 5.0]], np.float32)


def build_with_session(folder, shifts, weight=3.0):
    """A SavedModel of TensorFlow 1 with a graph for each tuple of tags: x * weight + shift."""
    import tensorflow as tf

    v1 = tf.compat.v1
    builder = v1.saved_model.Builder(str(folder))
    for index, (tags, shift) in enumerate(shifts.items()):
        with tf.Graph().as_default(), v1.Session() as session:
            x = v1.placeholder(tf.float32, (None, 2), "x")
            kernel = v1.get_variable("kernel", initializer=weight, use_resource=True)
            y = x * kernel + shift
            signature = v1.saved_model.predict_signature_def({"x": x}, {"y": y})
            signatures = {"serving_default": signature}
            if index == 0:
                session.run(v1.global_variables_initializer())
                builder.add_meta_graph_and_variables(session, list(tags), signatures)
            else:
                builder.add_meta_graph(list(tags), signatures)
    builder.save()


def run(prepared, folder, **inputs):
    import tensorflow as tf

    graph = prepared.frozen_graph()
    assert not [node.name for node in graph.graph_def.node if "Variable" in node.op]
    assert not [node.name for node in graph.graph_def.node if node.op == "VarHandleOp"]
    graph.save(folder)
    loaded = tf.saved_model.load(str(folder))
    function = loaded.signatures["serving_default"]
    outputs = function(**{name: tf.constant(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in outputs.items()}


class TestSeveralGraphs:
    @pytest.mark.parametrize(
        "shifts",
        [
            {("train",): 100.0, ("serve",): 1.0},
            {("serve", "gpu"): 50.0, ("serve",): 1.0},
            {("train",): 100.0, ("serve", "gpu"): 1.0, ("serve", "gpu", "tpu"): 50.0},
        ],
        ids=lambda shifts: "_".join("+".join(tags) for tags in shifts),
    )
    def test_the_one_for_serving_is_taken(self, shifts, tmp_path):
        build_with_session(tmp_path / "model", shifts)
        prepared = source.prepare(tmp_path / "model", tmp_path / "source")
        np.testing.assert_allclose(run(prepared, tmp_path / "frozen", x=X)["y"], 3 * X + 1)

    def test_of_tensorflow_2(self, tmp_path):
        import tensorflow as tf
        from tensorflow.core.protobuf import saved_model_pb2

        module = tf.Module()
        module.kernel = tf.Variable(3.0)
        module.call = tf.function(
            lambda x: {"y": x * module.kernel + 1}, [tf.TensorSpec((None, 2), name="x")]
        )
        tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.call)
        file = tmp_path / "model" / "saved_model.pb"
        content = saved_model_pb2.SavedModel.FromString(file.read_bytes())
        content.meta_graphs.add().CopyFrom(content.meta_graphs[0])
        content.meta_graphs[0].meta_info_def.tags.append("gpu")
        file.write_bytes(content.SerializeToString())
        assert saved_model.tags_of(tmp_path / "model") == ["serve"]
        prepared = source.prepare(tmp_path / "model", tmp_path / "source")
        np.testing.assert_allclose(run(prepared, tmp_path / "frozen", x=X)["y"], 3 * X + 1)

    def test_none_for_serving(self, tmp_path):
        build_with_session(tmp_path / "model", {("train",): 100.0})
        with pytest.raises(InputError, match=r"no graph with the tag 'serve'; its tags are \['tr"):
            source.prepare(tmp_path / "model", tmp_path / "source")


def composite_model(kind, where, folder):
    """A SavedModel with the ragged or sparse input or output `words`, beside dense ones."""
    import tensorflow as tf

    specs = {
        "ragged": tf.RaggedTensorSpec((None, None), tf.float32),
        "sparse": tf.SparseTensorSpec((None, 4), tf.float32),
    }
    make = {"ragged": tf.RaggedTensor.from_tensor, "sparse": tf.sparse.from_dense}[kind]
    dense = {"ragged": lambda x: x.to_tensor(), "sparse": tf.sparse.to_dense}[kind]
    module = tf.Module()
    offset = tf.TensorSpec((None, 1), name="offset")
    if where == "Input":

        @tf.function(input_signature=[specs[kind], offset])
        def call(words, offset):
            return {"sums": tf.reduce_sum(dense(words), -1, keepdims=True) + offset}

    else:

        @tf.function(input_signature=[offset])
        def call(offset):
            return {"sums": offset + 1, "words": make(offset)}

    module.call = call
    tf.saved_model.save(module, str(folder), signatures=call)


@pytest.mark.parametrize("where", ["Input", "Output"])
@pytest.mark.parametrize("kind", ["ragged", "sparse"])
def test_tensors_that_are_not_dense(kind, where, tmp_path):
    composite_model(kind, where, tmp_path / "model")
    with pytest.raises(InputError) as caught:
        source.prepare(tmp_path / "model", tmp_path / "source")
    assert str(caught.value).startswith(f"{where} 'words' is a {kind} tensor")
    assert len(str(caught.value).splitlines()) == 1


def test_tables_of_tensorflow_1(tmp_path):
    import tensorflow as tf

    v1 = tf.compat.v1
    builder = v1.saved_model.Builder(str(tmp_path / "model"))
    with tf.Graph().as_default(), v1.Session() as session:
        word = v1.placeholder(tf.string, (None,), "word")
        table = tf.lookup.StaticHashTable(
            tf.lookup.KeyValueTensorInitializer(["a", "b"], tf.constant([0, 1], tf.int64)), 2
        )
        weights = v1.get_variable("weights", initializer=[1.0, 2.0, 4.0])
        number = tf.gather(weights, table.lookup(word))
        session.run([v1.global_variables_initializer(), v1.tables_initializer()])
        signature = v1.saved_model.predict_signature_def({"word": word}, {"number": number})
        builder.add_meta_graph_and_variables(
            session, ["serve"], {"serving_default": signature}, main_op=v1.tables_initializer()
        )
    builder.save()
    prepared = source.prepare(tmp_path / "model", tmp_path / "source")
    assert "looks values up in tables" in prepared.not_frozen
    assert "runs on TensorFlow as saved only" in prepared.not_frozen
    with pytest.raises(ConversionError) as caught:
        prepared.frozen_graph()
    assert str(caught.value) == prepared.not_frozen
    planned = candidates.plan("saved_model", None, prepared.not_frozen)
    assert [str(variant) for variant in planned.baselines] == ["float32@tensorflow"]
    loaded = saved_model.load(tmp_path / "model")
    found = loaded.signatures["serving_default"](tf.constant(["b", "a", "zebra"]))
    np.testing.assert_array_equal(found["number"], [2, 1, 4])
