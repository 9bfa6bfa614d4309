import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest

from tests import goldens

MAX_PARAMETERS = 5000


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Returns a function that gives the live model of a golden and its reloaded SavedModel."""
    import tensorflow as tf

    tf.get_logger().setLevel("ERROR")
    cache = {}

    def get(name):
        if name not in cache:
            golden = goldens.GOLDENS[name]
            path = tmp_path_factory.mktemp("goldens") / name
            goldens.export(golden, path)
            cache[name] = golden, golden.build(), tf.saved_model.load(str(path))
        return cache[name]

    return get


def call_live(model, inputs):
    """Calls a live model as its user would; a single output has no name of its own."""
    arguments = inputs if len(inputs) > 1 else next(iter(inputs.values()))
    outputs = model(arguments)
    return outputs if isinstance(outputs, dict) else {None: outputs}


def call_signature(loaded, inputs):
    import tensorflow as tf

    tensors = {name: tf.constant(array) for name, array in inputs.items()}
    return loaded.signatures["serving_default"](**tensors)


def assert_same_outputs(live, served):
    if None in live:
        live = dict.fromkeys(served, live[None])
        assert len(served) == 1
    assert live.keys() == served.keys()
    for name, expected in live.items():
        np.testing.assert_allclose(served[name].numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)


def test_goldens_cover_what_runtimes_are_tried_on():
    assert set(goldens.GOLDENS) == {
        "conv",
        "dense",
        "depthwise",
        "detector",
        "dynamic",
        "float64",
        "grouped",
        "integer_input",
        "lstm",
        "masked_attention",
        "mixed_float16",
        "module",
        "padded_pooling",
        "spectrum",
        "swish",
        "tf_keras_conv",
        "transformer",
        "two_inputs",
        "volumes",
    }


def test_registering_a_name_twice_is_refused():
    golden = goldens.GOLDENS["dense"]
    with pytest.raises(ValueError, match="second golden named 'dense'"):
        goldens.register(golden.examples)(golden.build)
    assert goldens.GOLDENS["dense"] is golden


@pytest.mark.parametrize("name", sorted(goldens.GOLDENS))
def test_examples_are_the_same_for_the_same_seed(name):
    examples = goldens.GOLDENS[name].examples
    first, again, other = examples(5, 0), examples(5, 0), examples(5, 1)
    assert first.keys() == again.keys() == other.keys()
    for input_name, array in first.items():
        assert array.shape[0] == 5
        assert array.dtype in (np.float32, np.float64, np.int32)
        np.testing.assert_array_equal(array, again[input_name])
        assert not np.array_equal(array, other[input_name])


@pytest.mark.parametrize("name", sorted(goldens.GOLDENS))
def test_signature_takes_the_examples(name, exported):
    golden, _, loaded = exported(name)
    _, specs = loaded.signatures["serving_default"].structured_input_signature
    arrays = golden.examples(3, 0)
    assert specs.keys() == arrays.keys()
    for input_name, spec in specs.items():
        assert spec.shape[0] is None
        assert spec.shape.is_compatible_with(arrays[input_name].shape)
        assert spec.dtype.as_numpy_dtype == arrays[input_name].dtype


@pytest.mark.parametrize("name", sorted(goldens.GOLDENS))
def test_saved_model_agrees_with_live_model(name, exported):
    golden, model, loaded = exported(name)
    for num_examples in (1, 7):
        inputs = golden.examples(num_examples, 0)
        assert_same_outputs(call_live(model, inputs), call_signature(loaded, inputs))


@pytest.mark.parametrize("name", sorted(goldens.GOLDENS))
def test_outputs_depend_on_the_inputs(name, exported):
    golden, _, loaded = exported(name)
    for output in call_signature(loaded, golden.examples(16, 0)).values():
        assert np.all(np.isfinite(output))
        spread = np.ptp(output.numpy(), axis=0)
        # Places for boxes that no image has stay empty.
        assert (np.max(spread) if name == "detector" else np.min(spread)) > 1e-3


@pytest.mark.parametrize("name", sorted(goldens.GOLDENS))
def test_two_builds_have_the_same_weights(name, exported):
    golden, model, _ = exported(name)
    variables, variables_again = model.variables, golden.build().variables
    assert len(variables) == len(variables_again)
    assert 0 < sum(np.size(v.numpy()) for v in variables) <= MAX_PARAMETERS
    for variable, again in zip(variables, variables_again, strict=True):
        np.testing.assert_array_equal(variable.numpy(), again.numpy())


@pytest.mark.parametrize("name", ["conv", "depthwise", "tf_keras_conv"])
def test_moving_statistics_are_not_trivial(name, exported):
    _, model, _ = exported(name)
    normalizations = [layer for layer in model.layers if hasattr(layer, "moving_variance")]
    assert normalizations
    for layer in normalizations:
        assert np.ptp(layer.moving_mean.numpy()) > 0.1
        assert np.ptp(layer.moving_variance.numpy()) > 0.1


@pytest.mark.parametrize("name", ["dynamic", "lstm"])
def test_length_is_dynamic(name, exported):
    golden, model, loaded = exported(name)
    sequence = golden.examples(2, 0)["sequence"]
    for length in (5, 9):
        inputs = {"sequence": sequence[:, :length]}
        assert_same_outputs(call_live(model, inputs), call_signature(loaded, inputs))


def test_two_inputs_are_not_declared_in_the_order_of_their_names(exported):
    golden, model, _ = exported("two_inputs")
    declared = [tensor.name for tensor in model.inputs]
    assert declared == list(golden.examples(1, 0)) == ["signal", "context"]
    assert declared != sorted(declared)
