import gc

import numpy as np
import pytest
import tensorflow as tf

from tests import goldens
from tfopt.measure import environment
from tfopt.signature_call import SignatureCall


class Module(tf.Module):
    """Inputs and outputs whose order in the source is not the alphabet's, with a variable."""

    def __init__(self):
        super().__init__()
        self.factor = tf.Variable([2.0, 3.0])

    @tf.function(
        input_signature=[
            tf.TensorSpec([None, 2], tf.float32, name="z"),
            tf.TensorSpec([None], tf.int32, name="count"),
        ]
    )
    def __call__(self, z, count):
        return {"product": z * self.factor, "next": count + 1}


@pytest.fixture
def loaded(tmp_path):
    module = Module()
    tf.saved_model.save(module, str(tmp_path), signatures=module.__call__)
    return tf.saved_model.load(str(tmp_path))


INPUTS = {"count": np.array([1, 5], "int32"), "z": np.array([[1, 2], [3, 4]], "float32")}


def tensors(**changes):
    return {name: tf.constant(value) for name, value in (INPUTS | changes).items()}


class TestSignatureCall:
    def test_inputs_and_outputs_by_name(self, loaded):
        outputs = SignatureCall(loaded.signatures["serving_default"])(tensors())
        assert set(outputs) == {"product", "next"}
        np.testing.assert_array_equal(outputs["product"], [[2, 6], [6, 12]])
        np.testing.assert_array_equal(outputs["next"], [2, 6])

    def test_variables_are_read_at_each_call(self, loaded):
        call = SignatureCall(loaded.signatures["serving_default"])
        call(tensors())
        loaded.factor.assign([10.0, 10.0])
        np.testing.assert_array_equal(call(tensors())["product"], [[10, 20], [30, 40]])

    def test_signature_of_tensorflow_1(self, tmp_path):
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            z = tf.compat.v1.placeholder(tf.float32, [None, 2], "later")
            count = tf.compat.v1.placeholder(tf.int32, [None], "earlier")
            weights = tf.compat.v1.get_variable(
                "weights", [2], initializer=tf.constant_initializer(2)
            )
            session.run(weights.initializer)
            tf.compat.v1.saved_model.simple_save(
                session,
                str(tmp_path / "old"),
                {"z-1": z, "count": count},
                {"product": z * weights, "next": count + 1},
            )
        loaded = tf.saved_model.load(str(tmp_path / "old"))
        call = SignatureCall(loaded.signatures["serving_default"])
        outputs = call({"z-1": tf.constant(INPUTS["z"]), "count": tf.constant(INPUTS["count"])})
        np.testing.assert_array_equal(outputs["product"], 2 * INPUTS["z"])
        np.testing.assert_array_equal(outputs["next"], [2, 6])

    @pytest.mark.parametrize("name", goldens.GOLDENS)
    def test_agrees_with_the_signature(self, name, tmp_path):
        golden = goldens.GOLDENS[name]
        goldens.export(golden, tmp_path / "saved_model")
        loaded = tf.saved_model.load(str(tmp_path / "saved_model"))
        signature = loaded.signatures["serving_default"]
        call = SignatureCall(signature)
        for num_examples in (1, 3):
            inputs = {
                key: tf.constant(value) for key, value in golden.examples(num_examples, 0).items()
            }
            expected, found = signature(**inputs), call(inputs)
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("names", [(), ("z",), ("z", "other"), ("z", "count", "other")])
    def test_other_names(self, loaded, names):
        call = SignatureCall(loaded.signatures["serving_default"])
        with pytest.raises(KeyError):
            call({name: tf.constant(INPUTS["z"]) for name in names})

    def test_other_types(self, loaded):
        call = SignatureCall(loaded.signatures["serving_default"])
        for changes in (
            {"z": np.ones([2, 2], "float64")},
            {"count": np.ones(2, "int64")},
            {"z": np.ones([2, 2], "int32")},
        ):
            with pytest.raises(tf.errors.InvalidArgumentError, match="was expected to be"):
                call(tensors(**changes))

    def test_memory_is_given_back(self, tmp_path):
        class Large(tf.Module):
            @tf.function(input_signature=[tf.TensorSpec([1000, 8000], tf.float32, name="x")])
            def __call__(self, x):
                return {"x": x + tf.constant(np.arange(8e6, dtype="float32"), shape=x.shape)}

        module, signatures = Large(), tmp_path / "large"
        tf.saved_model.save(module, str(signatures), signatures=module.__call__)
        held = []
        for _ in range(6):
            loaded = tf.saved_model.load(str(signatures))
            call = SignatureCall(loaded.signatures["serving_default"])
            call({"x": tf.zeros([1000, 8000])})
            del loaded, call
            gc.collect()
            held.append(environment.resident_bytes())
        assert held[-1] - held[1] < 32_000_000  # the size of the constant; four more came since
