"""`.tflite` files quantized for LiteRT, against NumPy and Keras."""

import numpy as np
import pytest

from tfopt import dataset, runtimes, source
from tfopt.errors import ConversionError, InputError
from tfopt.litert import flatbuffer, quantize
from tfopt.search import steps
from tfopt.variant import Variant

GENERATOR = np.random.default_rng(0)
KERNEL = GENERATOR.normal(scale=0.4, size=(6, 8)).astype(np.float32)
HEAD = GENERATOR.normal(scale=0.4, size=(8, 3)).astype(np.float32)
X = GENERATOR.normal(size=(64, 6)).astype(np.float32)
TOLERANCE = {"float16": 2e-3, "dynamic_range": 0.05, "int8": 0.1, "int16x8": 0.05}


def hidden(x):
    return np.maximum(x @ KERNEL, 0)


def convert(path, variant, folder, key="serving_default", **inputs):
    """Converts a file to a variant; its inputs calibrate."""
    prepared = source.prepare(path, folder / "source", signature=key)
    data = dataset.write(inputs, prepared.signature, folder / "data")
    return steps.convert(prepared, Variant.parse(variant), folder / "artifact", None, data, 1)


def run(artifact, **inputs):
    with runtimes.load(artifact) as session:
        return session.run(inputs)


def error(found, expected):
    """The norm of the difference over the norm of the deviation from the mean."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean())


def to_tflite(functions, path, *, has_signature=True):
    import tensorflow as tf

    module = tf.Module()
    module.concrete = {key: f.get_concrete_function() for key, f in functions.items()}
    if has_signature:
        tf.saved_model.save(module, str(path.with_suffix("")), signatures=module.concrete)
        converter = tf.lite.TFLiteConverter.from_saved_model(str(path.with_suffix("")))
    else:
        converter = tf.lite.TFLiteConverter.from_concrete_functions(list(module.concrete.values()))
    path.write_bytes(converter.convert())
    return path


def function(call, **specs):
    import tensorflow as tf

    signature = [tf.TensorSpec(shape, tf.float32, name=name) for name, shape in specs.items()]
    return tf.function(call, input_signature=signature)


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory):
    """A file with two signatures, the usual one not the first in it; its inputs are `a` and `b`."""
    import tensorflow as tf

    functions = {
        "first": function(lambda b: {"z": tf.nn.relu(b @ KERNEL)}, b=(None, 6)),
        "serving_default": function(
            lambda a: {"y": tf.nn.relu(a @ KERNEL) @ HEAD, "sum": tf.reduce_sum(a, -1)}, a=(None, 6)
        ),
    }
    return to_tflite(functions, tmp_path_factory.mktemp("two") / "model.tflite")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A Keras network, its file without signature, and images."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    layers = keras.layers
    image = keras.Input((8, 8, 3), name="image")
    x = layers.Conv2D(8, 3, activation="relu", padding="same")(image)
    x = layers.DepthwiseConv2D(3, activation="relu6")(x)
    x = layers.Add()([layers.Conv2D(8, 1)(x), x])
    x = layers.GlobalAveragePooling2D()(x)
    model = keras.Model(image, layers.Dense(4)(x))
    path = tmp_path_factory.mktemp("images") / "model.tflite"
    call = tf.function(lambda image: model(image))
    concrete = call.get_concrete_function(tf.TensorSpec((1, 8, 8, 3), name="image"))
    path.write_bytes(tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert())
    return model, path, np.random.default_rng(1).uniform(size=(32, 8, 8, 3)).astype(np.float32)


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_numbers_and_signature(two_layers, tmp_path, precision):
    artifact = convert(two_layers, f"{precision}@litert", tmp_path, a=X)
    assert artifact.signature.input_names == ("a",)
    assert {spec.dtype for spec in artifact.signature.inputs + artifact.signature.outputs} == {
        "float32"
    }
    for batch in (X[:1], X[:5]):
        found = run(artifact, a=batch)
        assert found["y"].dtype == np.float32
        assert error(found["y"], hidden(batch) @ HEAD) < TOLERANCE[precision]
        np.testing.assert_allclose(found["sum"], batch.sum(-1), atol=0.2)
    assert (artifact.folder / "model.tflite").stat().st_size < two_layers.stat().st_size


@pytest.mark.parametrize("precision", ["float32", *TOLERANCE])
def test_other_signatures(two_layers, tmp_path, precision):
    artifact = convert(two_layers, f"{precision}@litert", tmp_path, key="first", b=X)
    found = run(artifact, b=X[:3])
    assert set(found) == {"z"}
    assert error(found["z"], hidden(X[:3])) < TOLERANCE.get(precision, 1e-6)


def test_unknown_signature(two_layers, tmp_path):
    with pytest.raises(InputError, match=r"no signature 'third'; it has: first, serving_default"):
        source.prepare(two_layers, tmp_path / "source", signature="third")


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_networks_without_signature(images, tmp_path, precision):
    model, path, data = images
    artifact = convert(path, f"{precision}@litert", tmp_path, image=data)
    expected = model.predict(data, verbose=0)
    (name,) = artifact.signature.output_names
    found = np.concatenate([run(artifact, image=data[i : i + 1])[name] for i in range(4)])
    assert error(found, expected[:4]) < TOLERANCE[precision]


def test_float32_is_the_file_itself(images, tmp_path):
    _, path, data = images
    artifact = convert(path, "float32@litert", tmp_path, image=data)
    assert (artifact.folder / "model.tflite").read_bytes() == path.read_bytes()


def test_layers_are_int8(images, tmp_path, capfd):
    _, path, data = images
    artifact = convert(path, "int8@litert", tmp_path, image=data)
    layers = {layer.op: layer.dtype for layer in runtimes.get("litert").layers(
        artifact, [{"image": data[:1]}], 1)}  # fmt: skip
    assert {layers[op] for op in ("CONV_2D", "DEPTHWISE_CONV_2D", "ADD", "FULLY_CONNECTED")} == {
        "int8"
    }
    assert not any("stayed float32" in note for note in artifact.notes)
    printed = capfd.readouterr()
    assert "Calibration" not in printed.out + printed.err


def test_int8_inputs_and_outputs(images, tmp_path):
    from ai_edge_litert.interpreter import Interpreter

    model, path, data = images
    artifact = convert(path, "int8(inputs=int8,outputs=int8)@litert", tmp_path, image=data)
    interpreter = Interpreter(model_path=str(artifact.folder / "model.tflite"))
    ports = [*interpreter.get_input_details(), *interpreter.get_output_details()]
    assert [port["dtype"] for port in ports] == [np.int8, np.int8]
    (found,) = run(artifact, image=data[:1]).values()
    assert error(found, model.predict(data[:1], verbose=0)) < 0.2


@pytest.mark.parametrize("scales", [(20, 1), (1, 20)])
def test_ranges_hold_every_batch(two_layers, scales):
    from ai_edge_litert.interpreter import Interpreter

    content = flatbuffer.only_signature(two_layers.read_bytes(), "serving_default")
    made = quantize.quantize(content, "int8", [{"a": X * scale} for scale in scales])
    run = Interpreter(model_content=made).get_signature_runner("serving_default")
    expected = hidden(X * 20) @ HEAD
    np.testing.assert_allclose(run(a=X * 20)["y"], expected, atol=0.03 * np.abs(expected).max())


def test_infinities_inside_do_not_spoil_the_ranges(tmp_path):
    import tensorflow as tf

    def network(a):
        masked = tf.where(tf.constant([True, False] * 4), a @ KERNEL, -np.inf)
        return {"y": tf.nn.relu(a @ KERNEL) @ HEAD, "highest": tf.reduce_max(masked, -1)}

    path = to_tflite({"serving_default": function(network, a=(None, 6))}, tmp_path / "mask.tflite")
    artifact = convert(path, "int8@litert", tmp_path, a=X)
    found = run(artifact, a=X[:8])
    assert error(found["y"], hidden(X[:8]) @ HEAD) < 0.1
    assert error(found["highest"], (X[:8] @ KERNEL)[:, ::2].max(-1)) < 0.1


@pytest.mark.parametrize("made", ["int8@litert", "dynamic_range@litert"])
def test_quantized_files_are_refused(images, tmp_path, made):
    _, path, data = images
    quantized = convert(path, made, tmp_path / "made", image=data).folder / "model.tflite"
    with pytest.raises(ConversionError, match=r"quantized already \(\d+ of its tensors are"):
        convert(quantized, "dynamic_range@litert", tmp_path / "again", image=data)


@pytest.fixture(scope="module", params=["converter", "quantizer"])
def float16_weights(request, images, tmp_path_factory):
    """A file with weights in float16, by the converter of TensorFlow or by LiteRT Quantizer."""
    import tensorflow as tf

    model, path, data = images
    folder = tmp_path_factory.mktemp("float16")
    if request.param == "quantizer":
        return convert(path, "float16@litert", folder, image=data).folder / "model.tflite"
    model.export(folder / "model", verbose=False)
    converter = tf.lite.TFLiteConverter.from_saved_model(str(folder / "model"))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.target_spec.supported_types = [tf.float16]
    (folder / "model.tflite").write_bytes(converter.convert())
    return folder / "model.tflite"


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_files_with_float16_weights(images, float16_weights, tmp_path, precision):
    model, _, data = images
    artifact = convert(float16_weights, f"{precision}@litert", tmp_path, **{
        source.prepare(float16_weights, tmp_path / "named").signature.input_names[0]: data
    })  # fmt: skip
    expected = model.predict(data[:4], verbose=0)
    (given,), (name,) = artifact.signature.input_names, artifact.signature.output_names
    found = np.concatenate([run(artifact, **{given: data[i : i + 1]})[name] for i in range(4)])
    assert error(found, expected) < TOLERANCE[precision] + 2e-3
    operations = runtimes.get("litert").layers(artifact, [{given: data[:1]}], 1)
    wanted = {"float16": "float32", "int16x8": "int16"}.get(precision, "int8")
    (convolution, *_) = (layer for layer in operations if layer.op == "CONV_2D")
    assert convolution.dtype == wanted


def test_loops(tmp_path):
    import tensorflow as tf

    def network(a):
        step = lambda i, h: (i + 1, tf.tanh(h @ KERNEL[:, :6]))  # noqa: E731
        return {"y": tf.while_loop(lambda i, h: i < 3, step, [0, a])[1]}

    path = to_tflite({"serving_default": function(network, a=(1, 6))}, tmp_path / "loop.tflite")
    expected = X[:1]
    for _ in range(3):
        expected = np.tanh(expected @ KERNEL[:, :6])
    artifact = convert(path, "dynamic_range@litert", tmp_path / "dynamic", a=X)
    assert error(run(artifact, a=X[:1])["y"], expected) < 0.05
    with pytest.raises(ConversionError, match="cannot calibrate models with WHILE"):
        convert(path, "int8@litert", tmp_path / "int8", a=X)


def test_weights_in_variables(tmp_path):
    import tensorflow as tf

    kernel = tf.Variable(KERNEL)
    module = tf.Module()
    module.kernel = kernel

    def network(a):
        return {"y": a @ kernel.assign_add(tf.ones_like(kernel) * 0.1)}

    call = function(network, a=(1, 6)).get_concrete_function()
    converter = tf.lite.TFLiteConverter.from_concrete_functions([call], module)
    (tmp_path / "m.tflite").write_bytes(converter.convert())
    with pytest.raises(ConversionError, match="weights in variables"):
        convert(tmp_path / "m.tflite", "dynamic_range@litert", tmp_path, a=X)


def test_nothing_to_quantize(tmp_path):
    import tensorflow as tf

    functions = {"serving_default": function(lambda a: {"y": tf.sin(a)}, a=(None, 6))}
    path = to_tflite(functions, tmp_path / "sine.tflite")
    with pytest.raises(ConversionError, match="found no layer to quantize"):
        convert(path, "float16@litert", tmp_path, a=X)


def test_dropping_a_signature_drops_its_weights(two_layers):
    kept = flatbuffer.only_signature(two_layers.read_bytes(), "first")
    assert len(kept) < two_layers.stat().st_size
    model = flatbuffer.read(kept)
    assert len(model.subgraphs) == len(model.signatureDefs) == 1
    assert flatbuffer.only_signature(kept, "first") == kept


def test_the_output_that_cannot_be_int8_is_named(tmp_path):
    import tensorflow as tf

    module = tf.Module()
    module.call = function(
        lambda x: {"a": x @ KERNEL, "b": tf.argmax(x, -1, tf.int32)}, x=(None, 6)
    )
    tf.saved_model.save(module, str(tmp_path / "model"), signatures=module.call)
    with pytest.raises(ConversionError, match=r"Only float32 outputs .* and b is int32"):
        convert(tmp_path / "model", "int8(inputs=int8,outputs=int8)@litert", tmp_path, x=X)
